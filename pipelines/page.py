"""The pages that a person opens: one per monitoring window and the history of all; HTML that needs no network."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import charts
from pipelines.answers import answers, fixed, with_error
from pipelines.files import whole_file, whole_folder, write_json
from pipelines.windows import Event, Verdict, Window, excess, read, window_name

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "pages"
SHOWN_COLUMNS = 13  # the first ones; of the others those that have moved; what is left is folded
SHOWN_WINDOWS = 7  # of those that were judged again as their labels came
STRIP = 96  # the width of a window's whiskers, in pixels
HAPPENED = {
    "retraining": "Retraining",
    "passed": "Passed the gate",
    "refused": "Refused by the gate",
    "promote": "Promoted",
    "rollback": "Rolled back",
    "force": "Forced",
    "ask": "Waits for approval",
    "approve": "Approved",
    "reject": "Rejected",
    "supersede": "Superseded",
    "reset": "Breaker reset",
}


def publish(reports: Path, verdict: Verdict, decision: Verdict, evidently: Path, events: Sequence[Event] = ()) -> Path:
    """Lay out the folder of a window (its page, Evidently's report, both verdicts), and every page anew; return it."""
    folder = reports / "monitor" / f"{verdict['start']}..{verdict['end']}"
    with whole_folder(folder) as part:
        write_json(part / "verdict.json", verdict)
        write_json(part / "policy.json", decision)
        if evidently.exists():
            shutil.copyfile(evidently, part / "evidently.html")
    refresh(reports, events)
    return folder


def refresh(reports: Path, events: Sequence[Event] = ()) -> None:
    """Write every page anew with what is known by now: late labels and later events belong to earlier windows."""
    if not (windows := read(reports, events)):
        return
    for before, window, after in zip([None, *windows], windows, [*windows[1:], None], strict=False):
        with whole_file(reports / "monitor" / window.folder / "index.html") as part:
            part.write_text(window_page(window, before, after), encoding="utf-8")
    with whole_file(reports / "index.html") as part:
        part.write_text(index_page(windows, events), encoding="utf-8")


def window_page(window: Window, before: Window | None = None, after: Window | None = None) -> str:
    """The page of one window, as HTML, with links to those around it."""
    verdict = window.verdict
    rows = _columns(verdict["inputs"]["columns"])
    shown = [row for at, row in enumerate(rows) if at < SHOWN_COLUMNS or row["moved"]]
    return render(
        "window.html",
        window=window,
        verdict=verdict,
        decision=window.decision,
        before=before,
        after=after,
        answers=answers(verdict, window.realised),
        columns=shown,
        folded=[row for row in rows if row not in shown],
        weighted=any(row["weight"] is not None for row in rows),
        floored=any(row["floor"] is not None for row in rows),
        most=max((row["weight"] for row in rows if row["weight"]), default=1.0),
        calibration=charts.square_chart(verdict["performance"]["calibration"]),
        labels=_labels(window),
        strip=STRIP,
        happened=HAPPENED,
    )


def index_page(windows: Sequence[Window], events: Sequence[Event] = ()) -> str:
    """The history of all windows, the oldest first, as HTML."""
    return render(
        "index.html",
        windows=windows,
        answers={window.folder: answers(window.verdict, window.realised) for window in windows},
        chart=charts.history(windows, events),
        scale=[(n / 2, charts.shade(n / 2)) for n in range(7)],
    )


def _columns(columns: dict[str, Verdict]) -> list[Verdict]:
    """The rows of the table: empty columns, then by weight times drift, the unmeasured last."""
    rows = []
    for name, column in columns.items():
        far = excess(column)
        empty = bool(column["moved"]) and far is None
        weight = 1.0 if column["weight"] is None else column["weight"]
        rank = (math.inf, 0.0) if empty else (-1.0, weight) if far is None else (weight * far, far)
        least = column["floor"] / column["threshold"] if column["floor"] and column["threshold"] else None
        place = {"width": _place(far or 0.0), "floor_at": None if least is None else _place(least)}
        rows.append({"name": name, **column, "far": far, "empty": empty, "rank": rank, **place})
    return sorted(rows, key=lambda row: (-row["rank"][0], -row["rank"][1], row["name"]))


def _place(far: float) -> float:
    """Where a distance in thresholds ends in its bar, in percent."""
    return 100 * min(far, charts.CAP) / charts.CAP


def _labels(window: Window) -> list[Verdict]:
    """The windows that were judged again as their labels came, the newest first: estimated beside realised."""
    verdict, reference = window.verdict, window.reference
    estimates = {(one["start"], one["end"]): (one["estimated"], None) for one in verdict["estimate"]["tracked"]}
    if verdict["estimate"]["measured"]:
        own = (verdict["estimate"]["log_loss"], verdict["estimate"]["log_loss_standard_error"])
        estimates[verdict["start"], verdict["end"]] = own
    found = verdict["performance"]["windows"][::-1][:SHOWN_WINDOWS]
    values = [
        (
            estimates.get((one["start"], one["end"])),
            None if one["log_loss"] is None else (one["log_loss"], one["standard_error"]),
        )
        for one in found
    ]
    places = charts.whiskers([*values, (None if reference is None else (reference, None),)], STRIP)
    return [
        one
        | {"name": window_name(one["start"], one["end"]), "estimated": estimated, "realised": realised}
        | {"places": place, "reference": places[-1][0] if one["version"] == verdict["version"] else None}
        for one, (estimated, realised), place in zip(found, values, places, strict=False)
    ]


def render(template: str, **values: Any) -> str:
    """Fill one of the templates in ``pages/``; what goes into HTML is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": fixed, "with_error": with_error}
    return environment
