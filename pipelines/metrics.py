"""What a binary classifier's probabilities are worth: metrics, curves and a bootstrap over whole days.

``label`` is (n,) of 0 and 1, ``probability`` (n,) the probability of label 1; both are checked, and anything
else raises BallastError. What one class alone cannot define (ROC AUC, PR AUC) is NaN here and null in JSON.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipelines.errors import BallastError

Floats = npt.NDArray[np.float64]


def binary(label: npt.ArrayLike, probability: npt.ArrayLike, threshold: float, bins: int) -> dict[str, float]:
    """Every metric of the project; a row counts as predicted 1 where its probability is above ``threshold``."""
    label, probability = _checked(label, probability)
    return {
        **_ranking(label, probability),
        "log_loss": float(log_loss_rows(label, probability).mean()),
        "brier": float(np.square(probability - label).mean()),
        **_decisions(label, probability > threshold),
        "calibration_error": calibration_error(label, probability, bins),
        "rows": len(label),
        "label_rate": float(label.mean()),
    }


def log_loss_rows(label: npt.ArrayLike, probability: npt.ArrayLike) -> Floats:
    """The log loss of each row, in nats, (n,); their mean is the log loss.

    Probabilities are kept a float64 epsilon away from 0 and 1, as scikit-learn does: one sure and wrong
    prediction costs 36 nats, not infinity.
    """
    label, probability = _checked(label, probability)
    epsilon = np.finfo(np.float64).eps
    clipped = np.clip(probability, epsilon, 1 - epsilon)
    losses: Floats = -np.where(label == 1, np.log(clipped), np.log1p(-clipped))
    return losses


def calibration_curve(label: npt.ArrayLike, probability: npt.ArrayLike, bins: int) -> pd.DataFrame:
    """Mean ``predicted`` and ``observed`` rate and ``rows`` of at most ``bins`` bins of about equal size.

    Bins are cut at quantiles of the probability (Nixon et al., 2019): bins of equal width would leave most
    nearly empty. Equal probabilities share a bin, so fewer distinct ones give fewer bins.
    """
    label, probability = _checked(label, probability)
    edges = np.quantile(probability, np.linspace(0, 1, bins + 1)[1:-1])
    position = np.searchsorted(edges, probability)
    rows = np.bincount(position, minlength=bins)
    filled = rows > 0
    sums = [np.bincount(position, weights=values, minlength=bins)[filled] for values in (probability, label)]
    rows = rows[filled]
    return pd.DataFrame({"predicted": sums[0] / rows, "observed": sums[1] / rows, "rows": rows})


def calibration_error(label: npt.ArrayLike, probability: npt.ArrayLike, bins: int) -> float:
    """The expected calibration error: the mean distance of predicted and observed rate, bins weighed by rows."""
    curve = calibration_curve(label, probability, bins)
    return float(np.average((curve["predicted"] - curve["observed"]).abs(), weights=curve["rows"]))


def roc_curve(label: npt.ArrayLike, probability: npt.ArrayLike, points: int = 200) -> pd.DataFrame:
    """At most ``points`` points (``fpr``, ``tpr``) of the ROC curve, its two ends among them."""
    hits, alarms = _counts(*_two_classes(label, probability))
    return _thinned(pd.DataFrame({"fpr": alarms / alarms[-1], "tpr": hits / hits[-1]}), points)


def precision_recall_curve(label: npt.ArrayLike, probability: npt.ArrayLike, points: int = 200) -> pd.DataFrame:
    """At most ``points`` points (``recall``, ``precision``) by rising recall, the two ends among them."""
    hits, alarms = _counts(*_two_classes(label, probability))
    return _thinned(pd.DataFrame({"recall": hits / hits[-1], "precision": _precision(hits, alarms)}), points)


def bootstrap_by_day(values: npt.ArrayLike, days: npt.ArrayLike, seed: int, draws: int = 2000) -> Floats:
    """Means of ``values`` over resampled whole days, (draws,); a day weighs as many rows as it has.

    Rows of one day share its weather and its queues: resampling rows would call noise certain. ``days`` is
    (n,) of whatever sorts, one entry per value. A cluster bootstrap (Cameron, Gelbach and Miller, 2008).
    """
    values, days = np.asarray(values, dtype=np.float64), np.asarray(days)
    if values.shape != days.shape or values.ndim != 1 or not len(values):
        raise BallastError(f"A bootstrap needs one day per value (found values {values.shape}, days {days.shape}).")
    if np.isnan(values).any():
        raise BallastError(f"A bootstrap needs numbers (found {np.isnan(values).sum()} NaN of {len(values)} values).")
    position, times = resampled_days(days, seed, draws)
    means: Floats = (times @ np.bincount(position, weights=values)) / (times @ np.bincount(position))
    return means


def resampled_days(days: npt.ArrayLike, seed: int, draws: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
    """The place of each row's day among the days, (n,), and how often each draw takes each day, (draws, days)."""
    names, position = np.unique(np.asarray(days), return_inverse=True)
    times = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return position, times


def error_by_day(values: npt.ArrayLike, days: npt.ArrayLike) -> float | None:
    """The standard error of the mean of ``values`` where days are the sample, not rows; None for a single day.

    ``days`` is (n,) of dates. The deviations of a day are added before they are squared (cluster-robust: Cameron,
    Gelbach and Miller, 2008). Days near each other hang together as well: their products count with Bartlett's weights,
    so many days apart as their number lets be told (Newey and West, 1987; the lag of 1994). They may only add to the
    error: a swing that makes the mean look surer than independent days would is luck in so few of them.
    """
    values, days = np.asarray(values, dtype=np.float64), np.asarray(days, dtype="datetime64[D]").astype(np.int64)
    place = days - days.min()
    if (count := len(np.unique(place))) < 2:
        return None
    sums = np.bincount(place, weights=values - values.mean())
    lag = min(int(4 * (count / 100) ** (2 / 9)), len(sums) - 1)
    near = sum((1 - step / (lag + 1)) * 2 * float(sums[step:] @ sums[:-step]) for step in range(1, lag + 1))
    variance = float(sums @ sums) + max(near, 0.0)
    return math.sqrt(count / (count - 1) * variance) / len(values)


def auc_error_by_day(label: npt.ArrayLike, probability: npt.ArrayLike, days: npt.ArrayLike) -> float | None:
    """The standard error of the ROC AUC where days are the sample, not rows; None for one day or one class.

    Each row's part is the share of the other class that it is ranked right against, less the AUC; parts of a day are
    added before they are squared. Source: Obuchowski, "Nonparametric Analysis of Clustered ROC Curve Data" (1997).
    """
    label, probability = _checked(label, probability)
    position = np.unique(np.asarray(days), return_inverse=True)[1]
    rows = np.array([(label == 0).sum(), (label == 1).sum()])
    if (count := position.max() + 1) < 2 or not rows.all():
        return None
    scores = pd.Series(probability)
    above = (scores.rank() - scores.groupby(label).rank()).to_numpy()  # rows of the other class, a tie as one half
    own, other = rows[label.astype(int)], rows[1 - label.astype(int)]
    right = np.where(label == 1, above, other - above) / other
    sums = np.bincount(position, weights=(right - right[label == 1].mean()) / own)
    return float(math.sqrt(count / (count - 1) * np.square(sums).sum()))


class Estimate(NamedTuple):
    """A mean, its standard error, its lower confidence bound, and the number of days that it comes from."""

    mean: float
    spread: float
    lower: float
    days: int


def mean_by_day(values: npt.ArrayLike, days: npt.ArrayLike, confidence: float, seed: int) -> Estimate:
    """The mean of ``values`` and how far it may be trusted, by ``bootstrap_by_day``, widened for few days.

    One day says nothing about others: its lower bound is -inf.
    """
    draws, count = bootstrap_by_day(values, days, seed), len(np.unique(np.asarray(days)))
    mean = float(np.asarray(values, dtype=np.float64).mean())
    below = mean - float(np.quantile(draws, 1 - confidence))
    lower = mean - widening(count, confidence) * below if count > 1 else -math.inf
    return Estimate(mean, float(draws.std()), lower, count)


def widening(days: int, confidence: float) -> float:
    """How much further the bound of a bootstrap over so few days must lie from the mean than its quantile does.

    The spread of n resampled days is short by sqrt((n - 1) / n), and its quantiles are those of a normal
    distribution where Student's t of n - 1 degrees is called for: at 97.5 % and 14 days, 1.14; at 7 days, 1.35.
    Without it nearly twice the promised share would pass by luck (docs/adr/0007). After the expanded percentile
    interval of Hesterberg, "What Teachers Should Know About the Bootstrap" (2015).
    """
    from scipy.special import ndtri, stdtrit

    return float(math.sqrt(days / (days - 1)) * stdtrit(days - 1, confidence) / ndtri(confidence))


def expected_auc(expected: npt.ArrayLike, probability: npt.ArrayLike) -> float:
    """The ROC AUC of ``probability`` if each row's label is 1 with the chance ``expected``, (n,), and 0 otherwise."""
    hits, alarms = _counts(np.asarray(expected, dtype=np.float64), np.asarray(probability, dtype=np.float64))
    return float(np.trapezoid(hits / hits[-1], alarms / alarms[-1]))


# Counted here and not by scikit-learn, whose import takes a second that each run of evaluate and decide would wait;
# the tests hold these to its numbers.


def _ranking(label: Floats, probability: Floats) -> dict[str, float]:
    """The area under the ROC curve, and the average precision: precision weighed by the recall it adds."""
    if label.min() == label.max():
        return {"roc_auc": float("nan"), "pr_auc": float("nan")}
    hits, alarms = _counts(label, probability)
    return {
        "roc_auc": float(np.trapezoid(hits / hits[-1], alarms / alarms[-1])),
        "pr_auc": float(np.diff(hits / hits[-1]) @ _precision(hits, alarms)[1:]),
    }


def _counts(label: Floats, probability: Floats) -> tuple[Floats, Floats]:
    """True and false positives above each distinct probability from the highest down, beginning with none."""
    order = np.argsort(-probability, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(probability[order])), len(label) - 1)
    hits = np.concatenate([[0.0], np.cumsum(label[order])[ends]])
    return hits, np.concatenate([[0.0], ends + 1.0]) - hits


def _precision(hits: Floats, alarms: Floats) -> Floats:
    """Precision at each count; 1 by convention where nothing is predicted yet."""
    precision: Floats = np.divide(hits, hits + alarms, out=np.ones_like(hits), where=hits + alarms > 0)
    return precision


def _decisions(label: Floats, predicted: npt.NDArray[np.bool_]) -> dict[str, float]:
    """F1, precision and recall of label 1; 0 where nothing was predicted or nothing was there to find."""
    hits = float((predicted & (label == 1)).sum())
    precision = hits / predicted.sum() if predicted.any() else 0.0
    recall = hits / label.sum() if label.any() else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall)}


def _thinned(curve: pd.DataFrame, points: int) -> pd.DataFrame:
    """Points at even places in the curve's own order (its thresholds), so that steep parts keep theirs."""
    places = np.unique(np.linspace(0, len(curve) - 1, min(points, len(curve))).round().astype(int))
    return curve.iloc[places].reset_index(drop=True)


def _two_classes(label: npt.ArrayLike, probability: npt.ArrayLike) -> tuple[Floats, Floats]:
    label, probability = _checked(label, probability)
    if label.min() == label.max():
        raise BallastError(f"A curve needs rows of both classes (found only label {label[0]:.0f}).")
    return label, probability


def _checked(label: npt.ArrayLike, probability: npt.ArrayLike) -> tuple[Floats, Floats]:
    labels, probabilities = np.asarray(label, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    if labels.shape != probabilities.shape or labels.ndim != 1 or not len(labels):
        raise BallastError(
            f"Metrics need one probability per label, and a row at least "
            f"(found labels {labels.shape}, probabilities {probabilities.shape})."
        )
    if wrong := int((~np.isin(labels, (0, 1))).sum()):
        raise BallastError(f"Labels must be 0 or 1 (found {wrong} others of {len(labels)}): leave unlabelled rows out.")
    outside = probabilities[~((probabilities >= 0) & (probabilities <= 1))]  # true for NaN as well
    if len(outside):
        raise BallastError(
            f"Probabilities must lie in [0, 1] (found {len(outside)} of {len(probabilities)} outside, "
            f"the first {outside[0]}): see what the model returned."
        )
    return labels, probabilities
