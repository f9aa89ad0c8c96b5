"""Realised performance: what the champion's predictions were worth, once their labels have come.

The log loss of a window's labelled rows against that of the champion's own test window, with a standard error by day.
It is judged on the newest rows that have one: the present window's, and where its labels are few or of few days, those
of the champion's windows before it as well.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, NonNegativeInt, PositiveInt

from pipelines import metrics
from pipelines.params import Params

Verdict = dict[str, Any]


class PerformanceParams(Params):
    """The ``performance`` section of params.yaml."""

    earlier_windows: NonNegativeInt
    min_rows: PositiveInt
    min_days: int = Field(ge=2)
    standard_errors: float = Field(ge=0)
    confidence: float = Field(gt=0.5, lt=1)
    calibration_bins: int = Field(ge=2)
    seed: int


class Window(NamedTuple):
    """One batch as one version scored it; dates as in ISO 8601, ``end`` exclusive."""

    start: str
    end: str
    version: int


def by_window(logged: pd.DataFrame) -> dict[Window, pd.DataFrame]:
    """The logged predictions (score's logged.parquet) of each window, the oldest first."""
    groups: Any = logged.groupby(["end", "start", "version"])
    return {Window(str(start), str(end), int(version)): rows for (end, start, version), rows in groups}


def performance_verdict(
    windows: dict[Window, pd.DataFrame],
    present: Window,
    reference: pd.DataFrame,
    labels_until: str,
    params: PerformanceParams,
) -> Verdict:
    """Is the model worse: its log loss on the newest labelled rows against that on its own test window.

    ``start`` and ``end`` are those of the judged windows (see ``judged_windows``), ``present`` says whether that is
    this one alone. ``worse`` is null where there are too few days: they are what the standard error is taken from. A
    window is ``complete`` when all its labels were due by ``labels_until``.
    """
    labelled = {window: rows[rows["label"].notna()] for window, rows in windows.items()}
    entries = [_entry(window, windows[window], labelled[window], labels_until, params) for window in windows]
    judged = judged_windows(windows, present, params)
    count, reference = len(labelled.get(present, ())), reference[reference["label"].notna()]
    if not judged or reference.empty:
        lack = "no labels in the reference" if judged else f"{count:,} labelled rows, {params.min_rows:,} needed"
        return {"measured": False, "labelled_rows": count, "words": f"model not judged: {lack}", "windows": entries}
    found = _compare(pd.concat([labelled[window] for window in judged]), reference, params)
    alone, start, end = judged == [present], judged[0].start, judged[-1].end
    if not alone:
        found["words"] += f", from {start} to {end}, as this window has {count:,} labels yet"
    return {"measured": True, "present": alone, "start": start, "end": end, **found, "windows": entries}


def judged_windows(windows: dict[Window, pd.DataFrame], present: Window, params: PerformanceParams) -> list[Window]:
    """The champion's newest windows that together have enough labels, of enough days; the oldest first.

    All of them where their days are too few, and none where their labels are.
    """
    found: list[Window] = []
    labels, known = 0, np.empty(0, dtype="datetime64[D]")
    for window in (window for window in reversed(windows) if window.version == present.version):
        rows = windows[window]
        if not (rows := rows[rows["label"].notna()]).empty:
            found.insert(0, window)
            labels, known = labels + len(rows), np.union1d(known, days(rows))
        if labels >= params.min_rows and len(known) >= params.min_days:
            break
    return found if labels >= params.min_rows else []


def days(rows: pd.DataFrame) -> npt.NDArray[np.datetime64]:
    """The day, UTC, of each row, (rows,); without its zone, which NumPy could only compare as objects, slowly."""
    found: npt.NDArray[np.datetime64] = rows["time"].dt.tz_convert(None).dt.floor("D").to_numpy()
    return found


def judgement(rise: float, error: float | None, params: PerformanceParams) -> tuple[bool | None, str]:
    """Whether a rise in log loss means worse, and in words: one of up to a standard error is noise.

    One that is more, and yet not enough to be sure, is called that.
    """
    if error is None:
        return None, "not judged"
    if rise > params.standard_errors * error:
        return True, "WORSE"
    return False, "not certainly worse" if rise > error else "not worse"


def _compare(batch: pd.DataFrame, reference: pd.DataFrame, params: PerformanceParams) -> Verdict:
    now, then = _metrics(batch, params), _metrics(reference, params)
    rise = now["log_loss"] - then["log_loss"]
    errors, count = [_error(rows) for rows in (batch, reference)], len(np.unique(days(batch)))
    error = math.hypot(*filter(None, errors)) if None not in errors and count >= params.min_days else None
    worse, words = judgement(rise, error, params)
    return {
        "labelled_rows": len(batch),
        "days": count,
        "log_loss": now["log_loss"],
        "reference_log_loss": then["log_loss"],
        "rise": rise,
        "standard_error": error,
        "standard_errors": params.standard_errors,
        "worse": worse,
        "auc": _number(now["roc_auc"]),
        "auc_standard_error": _auc_error(batch),
        "reference_auc": _number(then["roc_auc"]),
        "reference_auc_standard_error": _auc_error(reference),
        "label_rate": now["label_rate"],
        "reference_label_rate": then["label_rate"],
        "calibration": {"batch": _calibration(batch, params), "reference": _calibration(reference, params)},
        "words": f"model {words}: log loss {now['log_loss']:.3f}, was {then['log_loss']:.3f}",
    }


def _entry(
    window: Window, rows: pd.DataFrame, labelled: pd.DataFrame, labels_until: str, params: PerformanceParams
) -> Verdict:
    """One line of the history: a window with the labels that have come by now."""
    about = {**window._asdict(), "rows": len(rows), "labelled_rows": len(labelled)}
    about["complete"] = window.end <= labels_until
    if labelled.empty:
        return about | dict.fromkeys(("log_loss", "standard_error", "auc", "auc_standard_error"))
    found = _metrics(labelled, params)
    return {
        **about,
        "log_loss": found["log_loss"],
        "standard_error": _error(labelled),
        "auc": _number(found["roc_auc"]),
        "auc_standard_error": _auc_error(labelled),
    }


def _error(rows: pd.DataFrame) -> float | None:
    """The standard error of the log loss; None for a single day."""
    losses = metrics.log_loss_rows(rows["label"].astype(float), rows["probability"])
    return metrics.error_by_day(losses, days(rows))


def _metrics(rows: pd.DataFrame, params: PerformanceParams) -> dict[str, float]:
    return metrics.binary(rows["label"].astype(float), rows["probability"], threshold=0.5, bins=params.calibration_bins)


def _auc_error(rows: pd.DataFrame) -> float | None:
    return metrics.auc_error_by_day(rows["label"].astype(float), rows["probability"], days(rows))


def _calibration(rows: pd.DataFrame, params: PerformanceParams) -> list[dict[str, float]]:
    curve = metrics.calibration_curve(rows["label"].astype(float), rows["probability"], params.calibration_bins)
    return [{str(name): float(value) for name, value in point.items()} for point in curve.to_dict("records")]


def _number(value: float) -> float | None:
    """A float that JSON can hold, else None."""
    return value if math.isfinite(value) else None
