"""What a replay showed: each policy's months, what its retrainings gained, and that as a table, a figure and files.

A month's log loss and AUC are those of the champion that served it, on all rows of the month that were scored then and
whose label is known once the replay's last labels have arrived.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from pipelines import metrics, page
from pipelines.files import whole_file, write_json

MARKS = {"promote": "+", "refuse": "-", "paused": "=", "held": "="}
LEGEND = (
    "after the month the policy asked for a retraining, and the gate: + promoted, - refused, = it was held or paused",
    "(0.123): as estimated from the champion's probabilities before the labels",
    "a training is one after the first champion's; after the last month none is begun",
    "gain kept: (never - policy) / (never - schedule) in log loss",
)
COLOURS = ("#7b8794", "#2463a8", "#b3362c", "#2c7a57", "#a86a08", "#6b4fa0")
SIZE = (760, 582)
LEFT, RIGHT = 52, 16  # of the panels, in pixels
PANELS = (("log_loss", "log loss", 24, 300), ("auc", "AUC", 346, 500))  # top and bottom of each
COLUMNS = ("policy", "start", "end", "champion", "rows", "labelled_rows", "log_loss", "auc", "estimated_log_loss")
NUMBERS = ("log_loss", "auc")


@dataclass(frozen=True)
class Retraining:
    """A retraining as of a date: promote, refuse, held (a person's word stands against it) or paused (not trained)."""

    as_of: date
    outcome: str
    words: str
    version: int | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Month:
    """A monitored month under one policy: who served, what the policy said at its end, what came of it."""

    start: date
    end: date
    champion: int
    verdict: str
    words: str
    retraining: Retraining | None = None
    estimated_log_loss: float | None = None
    rows: int = 0
    labelled_rows: int = 0
    log_loss: float | None = None
    auc: float | None = None

    def measured(self, predictions: pd.DataFrame, labels: pd.DataFrame) -> Month:
        """With what the champion's predictions were worth; both frames have ``key``, which is unique."""
        joined = predictions.merge(labels, on="key", how="left", validate="one_to_one")
        known = joined[joined["label"].notna()]
        found = metrics.binary(known["label"].astype(float), known["probability"], threshold=0.5, bins=10)
        auc = None if math.isnan(found["roc_auc"]) else found["roc_auc"]
        return replace(self, rows=len(joined), labelled_rows=len(known), log_loss=found["log_loss"], auc=auc)

    def line(self, policy: str) -> str:
        """What happened, in one line."""
        then = f" → {self.retraining.words}" if self.retraining else ""
        return f"{policy:<12} {self.start:%Y-%m}  v{self.champion}  {self.words}{then}"


@dataclass(frozen=True)
class Played:
    """One policy, played to its end; the first champion's training is ``first`` and no month's."""

    first: Retraining
    months: Sequence[Month]
    seconds: Mapping[str, float]
    cached_trainings: int

    def outcomes(self, *names: str) -> int:
        """How many retrainings ended so."""
        return sum(month.retraining is not None and month.retraining.outcome in names for month in self.months)

    @property
    def trainings(self) -> int:
        """How many challengers were trained after the first champion."""
        return self.outcomes("promote", "refuse", "held")


class Overall(NamedTuple):
    """All months in one number: each row counting as much as another, and each month."""

    by_rows: float
    by_months: float


def overall(months: Sequence[Month], name: str) -> Overall:
    """Of ``log_loss`` (by rows: that of all rows together) or ``auc`` (by rows: the months' own, weighed)."""
    values = pd.Series([getattr(month, name) for month in months], dtype=float)
    weights = pd.Series([month.labelled_rows for month in months], dtype=float)
    return Overall(float((values * weights).sum() / weights.sum()), float(values.mean()))


def summary(played: Mapping[str, Played]) -> dict[str, dict[str, Any]]:
    """Per policy: log loss and AUC overall, trainings and what came of them, and both beside never and schedule."""
    loss = {policy: overall(one.months, "log_loss") for policy, one in played.items()}
    return {
        policy: {
            "log_loss": loss[policy]._asdict(),
            "auc": overall(one.months, "auc")._asdict(),
            "gain_kept": _gain_kept(loss, policy),
            "trainings": one.trainings,
            "share_of_schedule": _share(one.trainings, played),
            "promoted": one.outcomes("promote"),
            "refused": one.outcomes("refuse"),
            "held": one.outcomes("held"),
            "paused": one.outcomes("paused"),
            "cached_trainings": one.cached_trainings,
            "seconds": round(sum(one.seconds.values()), 1),
        }
        for policy, one in played.items()
    }


def _gain_kept(loss: Mapping[str, Overall], policy: str) -> dict[str, float] | None:
    """(never - policy) / (never - schedule), by rows and by months; None without both, or where nothing was gained."""
    if not {"never", "schedule"} <= loss.keys():
        return None
    never, schedule = loss["never"], loss["schedule"]
    if min(gain := [then - now for then, now in zip(never, schedule, strict=True)]) <= 0:
        return None
    kept = [(then - now) / most for then, now, most in zip(never, loss[policy], gain, strict=True)]
    return Overall(*kept)._asdict()


def _share(trainings: int, played: Mapping[str, Played]) -> float | None:
    all_of_them = played["schedule"].trainings if "schedule" in played else 0
    return trainings / all_of_them if all_of_them else None


# --- files


def publish(home: Path, commit: str, played: Mapping[str, Played]) -> dict[str, Any]:
    """Write replay.json, replay.csv, replay.svg and index.html (that fetch nothing); return the first."""
    found = {
        "name": home.name,
        "commit": commit,
        "policies": {policy: _shown(one) for policy, one in played.items()},
        "summary": summary(played),
        "seconds": _by_step(played.values()),
        "folder": str(home),
    }
    write_json(home / "replay.json", found)
    figure = page.render(
        "replay.svg", panels=[_panel(played, *one) for one in PANELS], size=SIZE, series=_series(played)
    )
    for name, text in (
        ("replay.csv", _csv(played)),
        ("replay.svg", figure),
        ("index.html", page.render("replay.html", found=found, figure=figure, grids=grids(found), legend=LEGEND)),
    ):
        with whole_file(home / name) as part:
            part.write_text(text, encoding="utf-8")
    return found


def _shown(one: Played) -> dict[str, Any]:
    def iso(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: iso(inner) for name, inner in value.items()}
        return value.isoformat() if isinstance(value, date) else value

    return {"first": iso(asdict(one.first)), "months": [iso(asdict(month)) for month in one.months]}


def _by_step(played: Iterable[Played]) -> dict[str, float]:
    """The seconds that went into each step under all policies, the most first."""
    total = pd.DataFrame([one.seconds for one in played]).sum().sort_values(ascending=False)
    return {str(step): round(float(seconds), 1) for step, seconds in total.items()}


def _csv(played: Mapping[str, Played]) -> str:
    """A line per policy and month."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow([*COLUMNS, "verdict", "retraining", "challenger"])
    for policy, one in played.items():
        for month in one.months:
            values = [getattr(month, name) for name in COLUMNS[1:]]
            done = month.retraining
            out.writerow([policy, *values, month.verdict, done and done.outcome, done and done.digest])
    return text.getvalue()


# --- the table


def table(found: Mapping[str, Any]) -> str:
    """All tables as text, with their legend."""
    parts = [f"{title}\n{_aligned(grid)}" for title, grid in grids(found).items()]
    return "\n\n".join([*parts, "\n".join(LEGEND)])


def grids(found: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """The tables of what ``publish`` returned, by title; of each the first line is its head."""
    return {
        "log loss": _monthly(found, "log_loss"),
        "AUC": _monthly(found, "auc"),
        "policies": _policies(found["summary"]),
    }


def _monthly(found: Mapping[str, Any], name: str) -> list[list[str]]:
    policies, digits = found["policies"], 4
    lines = [["month", "rows", *policies]]
    for together in zip(*(one["months"] for one in policies.values()), strict=True):
        cells = [_cell(month, name, digits) for month in together]
        lines.append([together[0]["start"][:7], f"{together[0]['labelled_rows']:,}", *cells])
    for words, how in (("overall, by rows", "by_rows"), ("mean of months", "by_months")):
        lines.append([words, "", *(f"{one[name][how]:.{digits}f}  " for one in found["summary"].values())])
    return lines


def _cell(month: Mapping[str, Any], name: str, digits: int) -> str:
    """A number, with the estimated one behind a log loss; and what came of a retraining at the month's end."""
    value, estimated = month[name], month["estimated_log_loss"] if name == "log_loss" else None
    number = "none" if value is None else f"{value:.{digits}f}"
    beside = "" if estimated is None else f" ({estimated:.3f})"
    mark = MARKS[month["retraining"]["outcome"]] if month["retraining"] else " "
    return f"{number}{beside} {mark}"


def _policies(summary: Mapping[str, Any]) -> list[list[str]]:
    head = [
        "policy",
        "log loss",
        "AUC",
        "gain kept",
        "(by months)",
        "trainings",
        "of schedule's",
        "promoted",
        "refused",
    ]
    lines = [[*head, "held or paused", "seconds", "from the cache"]]
    for policy, one in summary.items():
        kept = one["gain_kept"] or {"by_rows": None, "by_months": None}
        scores = [f"{one[name]['by_rows']:.4f}" for name in NUMBERS]
        shares = [_percent(kept["by_rows"]), _percent(kept["by_months"]), str(one["trainings"])]
        counts = [str(one["promoted"]), str(one["refused"]), str(one["held"] + one["paused"])]
        times = [f"{one['seconds']:.0f}", f"{one['cached_trainings']} trainings"]
        lines.append([policy, *scores, *shares, _percent(one["share_of_schedule"]), *counts, *times])
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _aligned(grid: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return "\n".join(
        "  ".join(
            [f"{line[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in grid
    )


# --- the figure


def _series(played: Mapping[str, Played]) -> list[dict[str, Any]]:
    """Name, colour and overall log loss of each policy."""
    return [
        {"policy": policy, "colour": colour, "log_loss": overall(one.months, "log_loss").by_rows}
        for (policy, one), colour in zip(played.items(), COLOURS, strict=False)
    ]


def _panel(played: Mapping[str, Played], name: str, title: str, top: int, bottom: int) -> dict[str, Any]:
    """One number by month, a line per policy, as SVG points; y grows downwards."""
    months = next(iter(played.values())).months
    step = (SIZE[0] - LEFT - RIGHT) / len(months)
    drawn = [name, "estimated_log_loss"] if name == "log_loss" else [name]
    low, high = _range([getattr(month, one) for by in played.values() for month in by.months for one in drawn])

    def y(value: float) -> float:
        return top + (bottom - top) * (high - value) / (high - low)

    def places(one: Played, name: str) -> list[tuple[float, float, Month]]:
        values = [(number, getattr(month, name), month) for number, month in enumerate(one.months)]
        return [(LEFT + step * (n + 0.5), y(value), month) for n, value, month in values if value is not None]

    return {
        "title": title,
        "top": top,
        "bottom": bottom,
        "ticks": [(tick / 100, y(tick / 100)) for tick in range(round(low * 100), round(high * 100) + 1, 5)],
        "labels": [(LEFT + step * (n + 0.5), f"{month.start:%b}") for n, month in enumerate(months)],
        "lines": [[places(one, name) for name in drawn] for one in played.values()],
        "half": step / 2,
    }


def _range(values: Sequence[float | None]) -> tuple[float, float]:
    """The twentieths below and above all values."""
    known = [value for value in values if value is not None]
    return math.floor(min(known) * 20) / 20, math.floor(max(known) * 20 + 1) / 20
