"""The avoidable loss: how much of the champion's log loss a retraining could have saved by now.

A month may be hard for every model, or easy: its log loss alone does not say that the champion is stale. What says so
is a correction that does better on the same rows. It is learnt from labelled rows that the champion was not trained on,
and each week is judged by what was learnt from the days before it, as the gate judges a challenger: nothing is gained
that would not have been gained then, and how hard a day was cancels in the difference.

The correction is additive in the champion's log odds: a step for each eighth of each number (its own log odds among
them), for a missing one and for each category, pulled towards none (a ridge). It costs a second where a training costs
a minute, finds what moved in the inputs' effects or in their level, and no change in how inputs act together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import expit, stdtrit

from pipelines import metrics
from pipelines.estimate import expected_losses, log_odds
from pipelines.metrics import Floats
from pipelines.performance import PerformanceParams, Verdict, days
from pipelines.schema import Features

# Chosen with champions of 15 February to 1 April 2013 on rows before May; docs/policy.md has the figures.
EIGHTHS = tuple(n / 8 for n in range(1, 8))
PULL = 1000.0  # towards no correction: as much as 6,000 rows with a chance of 0.2 tell of a step
WEEK = 7  # days that one correction is judged on
TRIES = 30  # of Newton's method; a handful is enough where a step need not be halved

Steps = npt.NDArray[np.float32]  # (rows, steps), of 0 and 1


def avoidable_verdict(
    judged: pd.DataFrame, unseen: pd.DataFrame, features: Features, params: PerformanceParams
) -> Verdict:
    """What a correction learnt from the ``unseen`` rows before each week of the ``judged`` ones saves.

    Both are labelled and not among the champion's train rows; ``unseen`` holds the judged rows too. ``loss`` is in nats
    a row, ``lower`` its confidence bound by Student's t of the days; below zero there is nothing to save.
    """
    rows = unseen.sort_values("time", kind="stable", ignore_index=True)
    saved, day = _saved(rows, days(judged).min(), features, params.min_rows)
    count = len(np.unique(day))
    error = metrics.error_by_day(saved, day) if count >= params.min_days else None
    if error is None:
        return {
            "measured": False,
            "days": count,
            "words": f"avoidable loss not judged: {count} days with labels before them, {params.min_days} needed",
        }
    loss = float(saved.mean())
    return {
        "measured": True,
        "days": count,
        "rows": len(saved),
        "loss": loss,
        "standard_error": error,
        "lower": loss - float(stdtrit(count - 1, params.confidence)) * error,
        "confidence": params.confidence,
        "words": f"avoidable loss {loss:.4f} ± {error:.4f}, by a correction learnt from the labels of the days before",
    }


def _saved(
    rows: pd.DataFrame, first: np.datetime64, features: Features, least: int
) -> tuple[Floats, npt.NDArray[np.datetime64]]:
    """The log loss that is saved on each row from the ``first`` day on, and its day; of weeks with rows before them."""
    steps, day, label = _steps(rows, features), days(rows), rows["label"].to_numpy(dtype=np.float64)
    odds = log_odds(rows)
    chance = expit(odds)
    spread = (chance * (1 - chance)).astype(np.float32)
    curve, learnt = PULL * np.eye(steps.shape[1]), 0
    correction, saved = np.zeros(steps.shape[1]), np.zeros(len(rows))
    starts = np.arange(first, day.max() + np.timedelta64(1, "D"), np.timedelta64(WEEK, "D"))
    bounds = [*np.searchsorted(day, starts), len(rows)]
    for begin, end in pairwise(bounds):
        if begin < least:
            saved[begin:end] = np.nan
            continue
        new = steps[learnt:begin]
        curve += new.T @ (new * spread[learnt:begin, None])
        learnt = begin
        correction = _fit(steps[:begin], odds[:begin], label[:begin], curve, correction)
        better = odds[begin:end] + steps[begin:end] @ correction
        saved[begin:end] = expected_losses(odds[begin:end], label[begin:end]) - expected_losses(
            better, label[begin:end]
        )
    judged = np.arange(len(rows)) >= bounds[0]
    judged &= ~np.isnan(saved)
    return saved[judged], day[judged]


def _fit(steps: Steps, odds: Floats, label: Floats, curve: Floats, start: Floats) -> Floats:
    """The correction with the least log loss and pull, by Newton's method with the curvature at the champion's odds."""

    def loss(correction: Floats) -> float:
        losses = expected_losses(odds + steps @ correction.astype(np.float32), label)
        return float(losses.sum() + PULL / 2 * correction @ correction)

    correction, least = start, loss(start)
    for _ in range(TRIES):
        gap = expit(odds + steps @ correction.astype(np.float32)) - label
        slope = gap.astype(np.float32) @ steps + PULL * correction
        step = np.linalg.solve(curve, slope)
        while (found := loss(correction - step)) > least and slope @ step > 1e-3:
            step /= 2
        if least - found < 1e-3 * len(label) ** 0.5:
            break
        correction, least = correction - step, found
    return correction


def _steps(rows: pd.DataFrame, features: Features) -> Steps:
    """Which eighth each number lies in, or that it is missing, and which category each string is."""
    numbers = {name: _numbers(rows, name) for name in features.numeric} | {"": log_odds(rows)}
    parts = [_eighths(values) for values in numbers.values()]
    parts += [pd.factorize(rows[name])[0] for name in features.categorical if name in rows]
    return np.hstack([_indicators(part) for part in parts])


def _numbers(rows: pd.DataFrame, name: str) -> Floats:
    """A column as floats; what is missing or infinite is NaN."""
    if name not in rows:
        return np.full(len(rows), np.nan)
    values = rows[name].to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def _eighths(values: Floats) -> npt.NDArray[np.intp]:
    """0 to 7, -1 where it is missing."""
    known = ~np.isnan(values)
    if not known.any():
        return np.full(len(values), -1)
    return np.where(known, np.searchsorted(np.quantile(values[known], EIGHTHS), values), -1)


def _indicators(codes: npt.NDArray[np.intp] | Sequence[int]) -> Steps:
    found: Steps = (np.asarray(codes)[:, None] == np.unique(codes)).astype(np.float32)
    return found
