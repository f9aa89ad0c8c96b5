"""The pages that a person opens: one per monitoring window and an index of all; HTML that needs no network."""

from __future__ import annotations

import calendar
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pipelines.files import read_json, whole_file, whole_folder, write_json

TEMPLATES = Path(__file__).parent / "pages"
BAR_TOP = 3.0  # bars end at three thresholds; what is further out is drawn as full, its number says how far
CHART = (720, 240)
MARGIN = (46, 14, 16, 34)  # left, top, right, bottom, in pixels

Verdict = dict[str, Any]
Tone = Literal["good", "watch", "bad", "unknown"]


@dataclass(frozen=True)
class Answer:
    """One of the four questions, its answer in a word and in a sentence with the numbers."""

    question: str
    short: str
    sentence: str
    tone: Tone


def publish(reports: Path, verdict: Verdict, decision: Verdict, evidently: Path) -> Path:
    """Lay out the folder of a window (its page, Evidently's report, both verdicts) and the index; return the folder."""
    folder = reports / "monitor" / f"{verdict['start']}..{verdict['end']}"
    with whole_folder(folder) as part:
        write_json(part / "verdict.json", verdict)
        write_json(part / "policy.json", decision)
        if evidently.exists():
            shutil.copyfile(evidently, part / "evidently.html")
        (part / "index.html").write_text(window_page(verdict, decision, evidently.exists()), encoding="utf-8")
    with whole_file(reports / "index.html") as part:
        part.write_text(index_page(reports), encoding="utf-8")
    return folder


def window_page(verdict: Verdict, decision: Verdict, evidently: bool) -> str:
    """The page of one window, as HTML; ``evidently`` says whether Evidently's report lies beside it."""
    return render(
        "window.html",
        title=window_name(verdict["start"], verdict["end"]),
        verdict=verdict,
        decision=decision,
        evidently=evidently,
        answers=answers(verdict),
        columns=_bars(verdict["inputs"]["columns"]),
        calibration=square_chart(verdict["performance"].get("calibration")),
    )


def index_page(reports: Path) -> str:
    """The index of all windows that ``reports`` keeps, oldest first, as HTML."""
    folders = sorted(
        path.parent for path in reports.glob("monitor/*/policy.json") if not path.parent.name.startswith(".")
    )
    windows = [_window(folder) for folder in folders]
    return render("index.html", windows=windows, chart=_history(windows))


def answers(verdict: Verdict) -> list[Answer]:
    """The four questions, each answered apart."""
    return [
        _data(verdict["data"]),
        _inputs(verdict["inputs"]),
        _predictions(verdict["predictions"]),
        _model(verdict["performance"]),
    ]


def window_name(start: str, end: str) -> str:
    """``April 2013`` for a whole month, else both dates (the end is exclusive)."""
    first, after = date.fromisoformat(start), date.fromisoformat(end)
    days = calendar.monthrange(first.year, first.month)[1]
    whole_month = first.day == 1 and (after - first).days == days
    return f"{calendar.month_name[first.month]} {first.year}" if whole_month else f"{start} to {end}"


def _data(found: Verdict) -> Answer:
    question = "Is the data broken?"
    if found["rejected"]:
        return Answer(question, "Yes", "Validation rejected it.", "bad")
    if found["empty"]:
        return Answer(question, "Yes", f"Not one value came for {', '.join(found['empty'])}.", "bad")
    if not found["validated"]:
        return Answer(question, "Not checked", "No verdict of validation lies beside this batch.", "unknown")
    checked = f"{found['expectations']} expectations checked" if found["expectations"] else "It passed validation"
    aside = f"{_count(found['warnings'], 'warning')}, {_count(found['quarantined'], 'row')} in quarantine"
    return Answer(question, "No", f"{checked}: {aside}.", "good")


def _inputs(found: Verdict) -> Answer:
    question = "Have the inputs moved?"
    columns, judged = found["columns"], found["judged"]
    aside = f" {len(columns) - judged} could not be measured." if judged < len(columns) else ""
    if found["moved"] is None:
        return Answer(question, "Not measured", aside.strip() or "There is nothing to compare with.", "unknown")
    scored = {name: column for name, column in columns.items() if column["score"] is not None}
    most = max(scored, key=lambda name: scored[name]["score"] / scored[name]["threshold"], default=None)
    furthest = f" Furthest: {most} with {columns[most]['words']}." if most else ""
    if not found["moved"]:
        return Answer(question, "No", f"None of {_count(judged, 'column')}.{furthest}{aside}", "good")
    moved = f"{len(found['moved_columns'])} of {_count(judged, 'column')}."
    return Answer(question, "Yes", f"{moved}{furthest}{aside}", "watch")


def _predictions(found: Verdict) -> Answer:
    question = "Have the predictions moved?"
    if found["moved"] is None:
        return Answer(question, "Not measured", found.get("words") or "There is nothing to compare with.", "unknown")
    means = f"Mean probability {found['mean']:.3f}, was {found['reference_mean']:.3f}."
    distance = f"Distance {found['score']:.2f}, bound {found['threshold']:.2f}."
    if found["moved"]:
        return Answer(question, "Yes", f"{means} {distance}", "watch")
    return Answer(question, "No", f"{means} {distance}", "good")


def _model(found: Verdict) -> Answer:
    question = "Is the model worse?"
    if not found["measured"]:
        return Answer(question, "Not judged", found["words"] or "There is no champion yet.", "unknown")
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.3f}"
    direction = "worse" if found["rise"] > 0 else "better"
    losses = f"Log loss {found['log_loss']:.3f}, was {found['reference_log_loss']:.3f}: {direction} by"
    auc = (
        f" AUC {found['auc']:.3f}, was {found['reference_auc']:.3f}." if found["auc"] and found["reference_auc"] else ""
    )
    sentence = f"{losses} {abs(found['rise']):.3f}{error} on {found['labelled_rows']:,} labelled rows.{auc}"
    if not found.get("present", True):
        sentence += f" These are of {window_name(found['start'], found['end'])}: this window has too few labels yet."
    if found["standard_error"] is None:
        return Answer(question, "Not judged", f"{sentence} One day is too few to tell.", "unknown")
    if found["worse"]:
        return Answer(question, "Yes", sentence, "bad")
    if found["rise"] > found["standard_error"]:
        return Answer(question, "Not certainly", sentence, "watch")
    return Answer(question, "No", sentence, "good")


def _bars(columns: dict[str, Verdict]) -> list[Verdict]:
    """The rows of the table: empty columns, then the furthest beyond its threshold first, the unmeasured last."""
    rows = []
    for name, column in columns.items():
        scored = column["score"] is not None
        excess = column["score"] / column["threshold"] if scored else math.inf if column["moved"] else -1.0
        rows.append({"name": name, **column, "excess": excess, "width": 100 * min(excess, BAR_TOP) / BAR_TOP})
    return sorted(rows, key=lambda row: (-row["excess"], row["name"]))


def square_chart(
    curves: Mapping[str, Sequence[Mapping[str, float]]] | None, x: str = "predicted", y: str = "observed"
) -> Verdict | None:
    """Curves of rates as SVG points in a square of 100, y down, scaled to the largest rate."""
    if curves is None:
        return None
    rates = [point[axis] for curve in curves.values() for point in curve for axis in (x, y)]
    step = 0.1 if max(rates) < 0.6 else 0.2
    top = min(1.0, _ceil(max(rates), step))
    place = {
        name: [(100 * point[x] / top, 100 - 100 * point[y] / top) for point in curve] for name, curve in curves.items()
    }
    ticks = [(n * step, 100 * n * step / top) for n in range(round(top / step) + 1)]
    return {"ticks": ticks, "points": place, "lines": {name: _line(points) for name, points in place.items()}}


def _window(folder: Path) -> Verdict:
    verdict, decision = read_json(folder / "verdict.json"), read_json(folder / "policy.json")
    return {
        "name": window_name(verdict["start"], verdict["end"]),
        "href": f"monitor/{folder.name}/index.html",
        "verdict": verdict,
        "decision": decision,
        "answers": answers(verdict),
    }


def _history(windows: list[Verdict]) -> Verdict | None:
    """Realised log loss per window and that of the champion's test window, as SVG points; None without labels."""
    judged = [(i, window["verdict"]["performance"]) for i, window in enumerate(windows)]
    judged = [(i, found) for i, found in judged if found["measured"] and found.get("present", True)]
    if not judged:
        return None
    losses = [found[name] for _, found in judged for name in ("log_loss", "reference_log_loss")]
    bottom, top = _ceil(min(losses), 0.05) - 0.05, _ceil(max(losses), 0.05)
    left, above, right, below = MARGIN
    step = (CHART[0] - left - right) / len(windows)

    def x(i: float) -> float:
        return left + step * (i + 0.5)

    def y(loss: float) -> float:
        return above + (CHART[1] - above - below) * (top - loss) / (top - bottom)

    points = [(x(i), y(found["log_loss"])) for i, found in judged]
    ticks = [(bottom + 0.05 * n, y(bottom + 0.05 * n)) for n in range(round((top - bottom) / 0.05) + 1)]
    return {
        "size": CHART,
        "floor": CHART[1] - below,
        "ticks": ticks,
        "points": [(*point, found) for point, (_, found) in zip(points, judged, strict=True)],
        "line": _line(points),
        "references": [
            (x(i) - step / 2, x(i) + step / 2, y(found["reference_log_loss"]), found["reference_log_loss"])
            for i, found in judged
        ],
        "labels": [(x(i), window["name"].split(" to ")[0].split(" ")[0][:10]) for i, window in enumerate(windows)],
        "retrainings": [x(i) for i, window in enumerate(windows) if window["decision"]["verdict"] == "retrain"],
        "promotions": [
            (x(i) - step / 2, windows[i]["verdict"]["version"])
            for i in range(1, len(windows))
            if windows[i]["verdict"]["version"] != windows[i - 1]["verdict"]["version"]
        ],
    }


def _line(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _ceil(value: float, step: float) -> float:
    """The next multiple of ``step`` above ``value``."""
    return (int(value / step) + 1) * step


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def render(template: str, **values: Any) -> str:
    """Fill one of the templates in ``pages/``; what goes into HTML is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
