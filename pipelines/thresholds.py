"""How far a column may stray by chance: the distance between random groups of the reference's own days.

A day's rows share its weather and its queues, and neighbouring days share much of both, so whole days are drawn, in
runs of consecutive ones: a block bootstrap by day (Künsch, "The Jackknife and the Bootstrap for General Stationary
Observations", 1989). A draw is a group of as many days as the batch has, against one of as many as the reference has.
Counts by day and bin make a draw a row of a matrix product, so that thousands take a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import rel_entr

from pipelines import metrics
from pipelines.comparison import Column, Method

DRAWS = 10_000
BINS = 128  # of a number for wasserstein: its distances are then within a fiftieth of those of all values
MIN_DAYS = 4  # of the reference: from fewer no spread of days can be told

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Histogram(NamedTuple):
    """A column of the reference, counted: ``counts`` (days, bins), and the mean value of each bin, ``points``."""

    counts: Floats
    points: Floats


def threshold(column: Column, alpha: float, run_days: int, seed: int) -> float | None:
    """The distance that a batch of its days and rows exceeds by chance with probability ``alpha``.

    Never below the floor of the column's rule. None where the reference has fewer than ``MIN_DAYS`` days.
    """
    reference = histogram(column)
    days, batch = len(reference.counts), column.values(column.batch)
    if days < MIN_DAYS:
        return None
    run = max(1, min(run_days, days // MIN_DAYS))
    random = np.random.default_rng(seed)
    then = _drawn(reference.counts, days, run, random)
    now = _thinned(_drawn(reference.counts, batch.index.nunique(), run, random), len(batch), random)
    distances = distance(column.rule.method, then, now, reference.points)
    by_chance = float(np.quantile(distances, 1 - alpha)) * metrics.widening(days // run, 1 - alpha)
    return max(by_chance, column.rule.floor)


def histogram(column: Column, bins: int | None = BINS) -> Histogram:
    """The reference by day; for wasserstein in at most ``bins`` bins, or one a value, else in those of Evidently."""
    values = column.values(column.reference)
    if column.rule.method == "wasserstein":
        codes = _fine_bins(values.to_numpy(), bins)
    elif column.numeric and values.nunique() > 20:  # Evidently's own line
        codes = _evidently_bins(values.to_numpy(), column.values(column.batch).to_numpy(), column.rule.method)
    else:
        codes = pd.factorize(values)[0]
    day, names = pd.factorize(values.index, sort=True)
    width = int(codes.max()) + 1
    counts = np.bincount(day * width + codes, minlength=len(names) * width).reshape(len(names), width)
    sums = np.bincount(codes, weights=values) if column.numeric else np.zeros(width)
    return Histogram(counts.astype(np.float64), sums / np.maximum(counts.sum(axis=0), 1))


def distance(method: Method, then: Floats, now: Floats, points: Floats) -> Floats:
    """Evidently's distance of each row of counts in ``now`` from that in ``then``, both (draws, bins); (draws,)."""
    reference, batch = (counts / counts.sum(axis=1, keepdims=True) for counts in (then, now))
    if method == "wasserstein":
        return _wasserstein(reference, batch, points)
    return DISTANCES[method](reference, batch)


def _drawn(counts: Floats, days: int, run: int, random: np.random.Generator) -> Floats:
    """``DRAWS`` groups of so many days, in runs; the last day of the reference is followed by its first."""
    known = len(counts)
    first = random.integers(known, size=(DRAWS, -(-days // run), 1))
    chosen = (first + np.arange(run)).reshape(DRAWS, -1)[:, :days] % known
    places = (chosen + known * np.arange(DRAWS)[:, None]).ravel()
    times = np.bincount(places, minlength=DRAWS * known).reshape(DRAWS, known)
    drawn: Floats = times @ counts
    return drawn


def _thinned(counts: Floats, rows: int, random: np.random.Generator) -> Floats:
    """The groups with the noise of so many rows, where they have more."""
    found = counts.sum(axis=1, keepdims=True)
    if rows >= found.mean():
        return counts
    more = 1 / (1 / rows - 1 / found.mean())  # so many rows drawn from a group have what is lacking of the noise
    return random.multinomial(max(1, round(more)), counts / found).astype(np.float64)


def _fine_bins(values: Floats, bins: int | None) -> Integers:
    """The bin of each value: one a value if they are few, else half by quantiles, half of equal width for the tails."""
    known, codes = np.unique(values, return_inverse=True)
    if bins is None or len(known) <= bins:
        return codes
    inner = np.arange(1, bins // 2) / (bins // 2)
    edges = np.concatenate([np.quantile(values, inner), known[0] + inner * (known[-1] - known[0])])
    return pd.factorize(np.searchsorted(np.sort(edges), values, side="right"), sort=True)[0]


def _evidently_bins(reference: Floats, batch: Floats, method: Method) -> Integers:
    """The bin of each value of the reference, of those that Evidently lays over both sides."""
    both = np.concatenate([reference, batch])
    edges = np.histogram_bin_edges(np.unique(both) if method == "hellinger" else both, bins="sturges")
    return np.clip(np.searchsorted(edges, reference, side="right") - 1, 0, len(edges) - 2)


def _wasserstein(reference: Floats, batch: Floats, points: Floats) -> Floats:
    """In standard deviations of the reference."""
    means = reference @ points
    deviations = np.sqrt(np.maximum(reference @ points**2 - means**2, 0))
    apart = np.abs(np.cumsum(batch - reference, axis=1)[:, :-1]) @ np.diff(points)
    scaled: Floats = apart / np.maximum(deviations, 0.001)
    return scaled


def _jensenshannon(reference: Floats, batch: Floats) -> Floats:
    middle = (reference + batch) / 2
    apart: Floats = np.sqrt((rel_entr(reference, middle) + rel_entr(batch, middle)).sum(axis=1).clip(min=0) / 2)
    return apart


def _hellinger(reference: Floats, batch: Floats) -> Floats:
    apart: Floats = np.sqrt(1 - np.clip(np.sqrt(reference * batch).sum(axis=1), 0, 1))
    return apart


def _psi(reference: Floats, batch: Floats) -> Floats:
    then, now = _filled(reference), _filled(batch)
    apart: Floats = ((then - now) * np.log(then / now)).sum(axis=1)
    return apart


def _kl_div(reference: Floats, batch: Floats) -> Floats:
    then, now = (side / side.sum(axis=1, keepdims=True) for side in (_filled(reference), _filled(batch)))
    apart: Floats = rel_entr(then, now).sum(axis=1)
    return apart


def _filled(shares: Floats) -> Floats:
    """A little in place of nothing, as Evidently has it, for the logarithm."""
    least = np.where(shares > 0, shares, 1).min(axis=1, keepdims=True)
    return np.where(shares > 0, shares, np.where(least <= 0.0001, least / 10**6, 0.0001))


DISTANCES: dict[Method, Callable[[Floats, Floats], Floats]] = {
    "jensenshannon": _jensenshannon,
    "hellinger": _hellinger,
    "psi": _psi,
    "kl_div": _kl_div,
}
