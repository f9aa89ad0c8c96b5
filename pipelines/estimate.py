"""Estimated performance, before the labels come: confidence-based performance estimation (CBPE).

A calibrated probability says how often rows like this one have the label 1, and so which loss to expect of it. The
champion's are calibrated on its own test window by Platt scaling: log odds of the labels as a line in its log odds.
What this expects of the test window itself is what was realised there, so neither flatters the other. Nothing here
sees concept drift: where the same inputs have come to mean something else, the calibration is wrong and nothing tells.

Sources: Platt, "Probabilistic Outputs for Support Vector Machines" (1999); NannyML's CBPE, as in Białek et al.,
"Estimating Model Performance Under Covariate Shift Without Labels" (2024), https://arxiv.org/abs/2401.08348.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import expit, logit

from pipelines import metrics
from pipelines.metrics import Floats
from pipelines.performance import PerformanceParams, Verdict, Window, days, judgement

PULL = 0.01
DRAWS = 100  # of the test window's days, each with a calibration of its own


def estimate_verdict(
    batch: pd.DataFrame, reference: pd.DataFrame, track: Verdict, params: PerformanceParams
) -> Verdict:
    """What the log loss and AUC of the batch will be, if its labels keep to what the test window's were.

    ``track`` is the record of earlier estimates (see ``tracked``). ``standard_error`` is that of the rise,
    ``log_loss_standard_error`` that of the estimate; both are null where a side has one day only.
    """
    reference = reference[reference["label"].notna()]
    if lack := _lack(batch, reference, params.min_rows):
        return {"measured": False, "rows": len(batch), **track, "words": f"not estimated: {lack}"}
    found = _estimate(batch, reference, params)
    worse, words = judgement(found["rise"], found["standard_error"], params)
    error = "" if worse is None else f" ± {found['log_loss_standard_error']:.3f}"
    losses = f"log loss {found['log_loss']:.3f}{error}, was {found['reference_log_loss']:.3f}"
    words = f"estimate {words}: {losses}{_record(track)}"
    return {"measured": True, "rows": len(batch), **found, "worse": worse, **track, "words": words}


def tracked(windows: list[Verdict], history: Iterable[Verdict], present: Window) -> Verdict:
    """Earlier windows' estimates, as made then, against what came true; ``bias`` is the mean error.

    Only windows whose labels were all due by now count: estimates are of all rows.
    """
    then = {Window(past["start"], past["end"], past["version"]): past.get("estimate", {}) for past in history}
    found = []
    for window in windows:
        key = Window(window["start"], window["end"], window["version"])
        estimated, realised = then.get(key, {}).get("log_loss"), window["log_loss"]
        if key != present and window["complete"] and estimated is not None and realised is not None:
            error = estimated - realised
            found.append({**key._asdict(), "estimated": estimated, "realised": realised, "error": error})
    return {"tracked": found, "bias": float(np.mean([one["error"] for one in found])) if found else None}


def calibrate(
    odds: Floats, label: Floats, times: Floats | None = None, start: tuple[float, float] = (0.0, 0.0)
) -> Floats:
    """Intercept and slope of the line in the champion's log ``odds`` that its labels follow, by Newton's method.

    ``times`` is how often each row counts. A weak pull towards the champion's own probabilities (0, 1) lets there be a
    line even where the labels are all of one class.
    """
    own, line, weight = np.array([0.0, 1.0]), np.array(start), np.ones_like(odds) if times is None else times

    def loss(line: Floats) -> float:
        losses = weight * expected_losses(line[0] + line[1] * odds, label)
        return float(losses.sum() + PULL / 2 * np.square(line - own).sum())

    # Sums, no matrix products: on a busy machine BLAS's threads wait for each other many times as long as this takes.
    for _ in range(100):
        chance = expit(line[0] + line[1] * odds)
        gap, spread = weight * (chance - label), weight * chance * (1 - chance)
        slope = np.array([gap.sum(), (gap * odds).sum()]) + PULL * (line - own)
        level, tilt, square = spread.sum(), (spread * odds).sum(), (spread * odds * odds).sum()
        step = np.linalg.solve(np.array([[level + PULL, tilt], [tilt, square + PULL]]), slope)
        if slope @ step < 1e-6:
            break
        while loss(line - step) > loss(line):
            step /= 2
        line = line - step
    return line


def expected_losses(odds: Floats, chance: Floats) -> Floats:
    """The log loss to expect of each row, (n,), whose label is 1 with this chance (or this label, if it is known)."""
    return cast(Floats, np.logaddexp(0, odds) - chance * odds)


def log_odds(rows: pd.DataFrame) -> Floats:
    """The champion's, kept as far from the infinite as the log loss keeps its probabilities from 0 and 1."""
    epsilon = np.finfo(np.float64).eps
    return cast(Floats, logit(rows["probability"].clip(epsilon, 1 - epsilon).to_numpy()))


def _lack(batch: pd.DataFrame, reference: pd.DataFrame, least: int) -> str:
    """What there is too little of to estimate anything, if so."""
    if len(batch) < least:
        return f"{len(batch):,} rows, {least:,} needed"
    if len(reference) < least:
        return f"{len(reference):,} labelled rows in the reference, {least:,} needed"
    return "the reference has labels of one class only" if reference["label"].nunique() < 2 else ""


def _estimate(batch: pd.DataFrame, reference: pd.DataFrame, params: PerformanceParams) -> dict[str, Any]:
    now, then = log_odds(batch), log_odds(reference)
    label = reference["label"].to_numpy(dtype=np.float64)
    intercept, slope = calibrate(then, label)
    chance = expit(intercept + slope * now)
    losses, realised = expected_losses(now, chance), expected_losses(then, label)
    by_batch = metrics.error_by_day(losses, days(batch))
    by_calibration = _calibration_errors(now, then, label, days(reference), (intercept, slope), params.seed)
    errors: list[float | None] = [None, None]
    if by_batch is not None and by_calibration is not None:
        errors = [math.hypot(by_batch, error) for error in by_calibration]
    return {
        "log_loss": float(losses.mean()),
        "log_loss_standard_error": errors[0],
        "auc": metrics.expected_auc(chance, batch["probability"]),
        "reference_log_loss": float(realised.mean()),
        "rise": float(losses.mean() - realised.mean()),
        "standard_error": errors[1],
        "standard_errors": params.standard_errors,
        "calibration": {"intercept": float(intercept), "slope": float(slope)},
    }


def _calibration_errors(
    now: Floats,
    then: Floats,
    label: Floats,
    day: npt.NDArray[np.datetime64],
    line: tuple[float, float],
    seed: int,
) -> tuple[float, float] | None:
    """What the choice of the test window's days adds to the error of the estimate, and of its rise."""
    position, times = metrics.resampled_days(day, seed, DRAWS)
    if (count := times.shape[1]) < 2:
        return None
    realised, draws = expected_losses(then, label), []
    for taken in times[:, position].astype(np.float64):
        intercept, slope = calibrate(then, label, taken, line)
        loss = expected_losses(now, expit(intercept + slope * now)).mean()
        draws.append((loss, loss - np.average(realised, weights=taken)))
    loss_error, rise_error = np.std(draws, axis=0) * math.sqrt(count / (count - 1))
    return float(loss_error), float(rise_error)


def _record(track: Verdict) -> str:
    """How far earlier estimates were off, in words; nothing without one."""
    if not (count := len(track["tracked"])):
        return ""
    way, many = "low" if track["bias"] < 0 else "high", "estimate was" if count == 1 else f"{count} estimates were"
    return f"; its last {many} too {way} by {abs(track['bias']):.3f}" + (" on average" if count > 1 else "")
