"""The monitored windows as the reports keep them, each with what is known of it by now; for the pages."""

from __future__ import annotations

import calendar
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pipelines.files import read_json

log = logging.getLogger(__name__)

Verdict = dict[str, Any]
Event = Mapping[str, Any]
"""What happened to the champion: kind, version, as_of (ISO 8601), summary, and a link, ``href``, where one is known."""

PARTS: dict[str, Verdict] = {
    "data": {"rejected": False, "validated": False, "warnings": 0, "quarantined": 0}
    | {"expectations": None, "empty": [], "out_of_scale": []},
    "inputs": {"columns": {}, "moved_columns": [], "judged": 0, "critical_moved": []}
    | dict.fromkeys(("moved", "raises", "weighted_share")),
    "predictions": dict.fromkeys(("moved", "score", "threshold", "mean", "reference_mean", "words")),
    "performance": {"measured": False, "labelled_rows": 0, "windows": []}
    | dict.fromkeys(("start", "end", "log_loss", "reference_log_loss", "rise", "standard_error", "standard_errors"))
    | dict.fromkeys(("worse", "auc", "reference_auc", "label_rate", "reference_label_rate", "calibration", "words"))
    | {"avoidable": {"words": ""}},
    "estimate": {"measured": False, "tracked": []}
    | dict.fromkeys(("log_loss", "log_loss_standard_error", "reference_log_loss", "rise", "standard_error"))
    | dict.fromkeys(("worse", "bias", "words")),
}
COLUMN = {"critical": False} | dict.fromkeys(
    ("method", "threshold", "floor", "score", "moved", "words", "weight", "missing", "reference_missing")
)
ENTRY = {"complete": True} | dict.fromkeys(("version", "rows", "labelled_rows", "log_loss", "standard_error", "auc"))


@dataclass(frozen=True)
class Window:
    """One window, what was said of it then, and what has come after: its labels (``realised``), and the events.

    ``folder`` is the name of its folder in the reports; ``last``: none comes after it yet.
    """

    folder: str
    verdict: Verdict
    decision: Verdict
    evidently: bool = False
    realised: Verdict | None = None
    events: Sequence[Event] = ()
    last: bool = True

    @property
    def name(self) -> str:
        """``April 2013``."""
        return window_name(self.verdict["start"], self.verdict["end"])

    @property
    def reference(self) -> float | None:
        """The champion's log loss on its own test window."""
        loss: float | None = self.verdict["performance"]["reference_log_loss"]
        return self.verdict["estimate"]["reference_log_loss"] if loss is None else loss


def read(reports: Path, events: Sequence[Event] = ()) -> list[Window]:
    """Every window whose verdicts ``reports`` keeps, the oldest first."""
    folders = [path.parent for path in reports.glob("monitor/[!.]*/policy.json")]
    found = [(folder, verdict) for folder in folders if (verdict := _verdict(folder))]
    found.sort(key=lambda one: (one[1]["end"], one[1]["start"]))
    labels = _labels(verdict for _, verdict in found)
    ends = [verdict["end"] for _, verdict in found]
    return [
        Window(
            folder.name,
            verdict,
            {"train_days": None} | read_json(folder / "policy.json"),
            (folder / "evidently.html").exists(),
            labels.get(_key(verdict)),
            _between(events, verdict["end"], after := min((end for end in ends if end > verdict["end"]), default=None)),
            after is None,
        )
        for folder, verdict in found
    ]


def _verdict(folder: Path) -> Verdict | None:
    """What a folder keeps; None, and a warning, where that cannot be read: one window must not hide the others."""
    try:
        return complete(read_json(folder / "verdict.json"))
    except (OSError, ValueError, KeyError) as error:
        log.warning("The window %s is left out of the pages: its verdict cannot be read (%r).", folder.name, error)
        return None


def complete(verdict: Verdict) -> Verdict:
    """The verdict with everything that a page asks for; what is not in it is None or empty, which reads: not judged."""
    whole: Verdict = {"rows": 0, "labelled_rows": 0, "sample": ""} | verdict
    whole |= {name: absent | (verdict.get(name) or {}) for name, absent in PARTS.items()}
    inputs, performance = whole["inputs"], whole["performance"]
    inputs["columns"] = {name: COLUMN | column for name, column in inputs["columns"].items()}
    performance["windows"] = [ENTRY | entry for entry in performance["windows"]]
    for name in ("start", "end"):  # an older verdict is judged on its own window
        performance[name] = performance[name] or verdict[name]
    return whole


def own(verdict: Verdict) -> bool:
    """Whether the window was judged by its own labels: late ones leave that to the newest window that has them."""
    found = verdict["performance"]
    return bool(found["measured"]) and (found["start"], found["end"]) == (verdict["start"], verdict["end"])


def entry(verdict: Verdict) -> Verdict | None:
    """What the verdict says of the labels that it judged its own window by; None if they had not come."""
    if not own(verdict):
        return None
    older = {name: verdict["performance"][name] for name in ("log_loss", "auc", "labelled_rows")}
    found = ENTRY | {name: verdict[name] for name in ("start", "end", "version", "rows")} | older
    return next((one for one in verdict["performance"]["windows"] if _key(one) == _key(verdict)), found)


def excess(column: Mapping[str, Any]) -> float | None:
    """The distance in thresholds; None for a column that has none."""
    score, threshold = column["score"], column["threshold"]
    return score / threshold if score is not None and threshold else None


def window_name(start: str, end: str) -> str:
    """``April 2013`` for a whole month, else both dates (the end is exclusive)."""
    first, after = date.fromisoformat(start), date.fromisoformat(end)
    days = calendar.monthrange(first.year, first.month)[1]
    whole_month = first.day == 1 and (after - first).days == days
    return f"{calendar.month_name[first.month]} {first.year}" if whole_month else f"{start} to {end}"


def _labels(verdicts: Iterable[Verdict]) -> dict[tuple[Any, ...], Verdict]:
    """The newest that any verdict, the oldest first, says of a window's labels: all of them, or enough to judge by."""
    found: dict[tuple[Any, ...], Verdict] = {}
    for verdict in verdicts:
        known = [one for one in verdict["performance"]["windows"] if one["complete"] and one["log_loss"] is not None]
        found |= {_key(one): one for one in [*known, entry(verdict)] if one is not None}
    return found


def _between(events: Sequence[Event], start: str, end: str | None) -> list[Event]:
    """What happened as of ``start`` or later, and before ``end``; the earliest first."""
    return [event for event in events if start <= event["as_of"] and (end is None or event["as_of"] < end)]


def _key(found: Mapping[str, Any]) -> tuple[Any, ...]:
    """A window as one version scored it."""
    return tuple(found[name] for name in ("start", "end", "version"))
