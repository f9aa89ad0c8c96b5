"""The rules of the gate: each kind a class with its thresholds, and a pure check of what both sides showed.

    floor, ceiling      a metric of the challenger, at least or at most so much
    better              surely better than the champion, by a paired bootstrap over days
    slices              no part of the rows surely worse than with the champion
    calibration         predicted and observed rates near each other
    fairness            groups of a column treated alike
    latency, size       what the model costs to use and to keep
    freshness           how old the training data is
    too_good            a jump that smells of a leak
    label_rate          training data like that of the past
    stability           how many predictions change sides

``params.yaml: decide.rules`` lists them. A rule that fails blocks the promotion or warns, as its severity says. What
the gate needs to judge at all is no rule, and stands in decide.py. A metric that the rows do not define passes none.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from pipelines.params import Params
from pipelines.record import Finding, Severity

if TYPE_CHECKING:
    import pandas as pd

    from pipelines.metrics import Estimate, Floats

Metric = Literal[
    "roc_auc", "pr_auc", "log_loss", "brier", "f1", "precision", "recall", "calibration_error", "label_rate"
]
Share = Annotated[float, Field(ge=0, le=1)]
Confidence = Annotated[float, Field(gt=0.5, lt=1)]

FIRST = "first model"
OTHERS = "(others)"  # the slice of all values that have too few rows for one of their own


@dataclass(frozen=True)
class Scored:
    """A side of the comparison: its predictions on the test rows, (rows,), and what is known of its model."""

    probability: Floats
    trained_until: datetime
    label_rates: Mapping[str, float]
    """By window: train, validation and test as they were when it was trained."""
    size: int
    """Bytes of its folder."""
    seconds: float | None
    """To predict 1,000 rows, the median; None if no rule asks."""


@dataclass(frozen=True)
class Evidence:
    """All that a rule may look at. ``champion`` is None if there is none, and then nothing is compared."""

    test: pd.DataFrame
    challenger: Scored
    champion: Scored | None
    as_of: date
    threshold: float
    bins: int
    seed: int

    @property
    def days(self) -> pd.Series[Any]:
        """The day, UTC, of each test row."""
        days: pd.Series[Any] = self.test["time"].dt.floor("D")
        return days

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The challenger's metrics on the test rows."""
        return self._measure(self.challenger)

    @cached_property
    def champion_metrics(self) -> dict[str, float]:
        """The champion's on the same rows; empty if there is none."""
        return self._measure(self.champion) if self.champion else {}

    def _measure(self, side: Scored) -> dict[str, float]:
        from pipelines import metrics

        return metrics.binary(self.test["label"], side.probability, self.threshold, self.bins)

    def gain(self, champion: Scored) -> Floats:
        """How much lower the challenger's log loss is than the champion's, row by row, (rows,)."""
        from pipelines import metrics

        label = self.test["label"]
        gain: Floats = metrics.log_loss_rows(label, champion.probability)
        return gain - metrics.log_loss_rows(label, self.challenger.probability)


class Base(Params):
    """What every kind of rule has."""

    severity: Severity = "block"

    @abstractmethod
    def check(self, evidence: Evidence) -> Finding:
        """Whether the evidence satisfies this rule; changes nothing and looks at nothing else."""

    @property
    def reads(self) -> Sequence[str]:
        """The columns of the test rows that it looks at, beside key, time and label."""
        return ()

    def _finding(
        self, rule: str, measured: float | str | None, needed: float | str | None, passed: bool, words: str
    ) -> Finding:
        known = None if isinstance(measured, float) and math.isnan(measured) else measured
        return Finding(
            rule=rule, severity=self.severity, measured=known, needed=needed, passed=bool(passed), words=words
        )

    def _no_champion(self, rule: str, needed: float | str | None) -> Finding:
        return self._finding(rule, None, needed, True, f"{FIRST}: nothing to compare with")


class Floor(Base):
    """A metric must be at least so much."""

    rule: Literal["floor"]
    metric: Metric
    at_least: float

    def check(self, evidence: Evidence) -> Finding:
        """The challenger's value on the test rows."""
        value = evidence.metrics[self.metric]
        words = f"{_named(self.metric)} {value:.3f}, needed: at least {self.at_least:g}"
        return self._finding(f"floor {self.metric}", value, self.at_least, value >= self.at_least, words)


class Ceiling(Base):
    """A metric must be at most so much, or at most the champion's on the same rows where the month is hard for both."""

    rule: Literal["ceiling"]
    metric: Metric
    at_most: float
    or_champion: bool = False

    def check(self, evidence: Evidence) -> Finding:
        """The challenger's value on the test rows."""
        return _ceiling(self, f"ceiling {self.metric}", self.metric, self.at_most, self.or_champion, evidence)


class Calibration(Base):
    """The mean distance of predicted and observed rate, over bins of equal size; ``or_champion`` as in a ceiling."""

    rule: Literal["calibration"]
    max_error: PositiveFloat
    or_champion: bool = False

    def check(self, evidence: Evidence) -> Finding:
        """The challenger's expected calibration error on the test rows."""
        return _ceiling(self, "calibration", "calibration_error", self.max_error, self.or_champion, evidence)


class Better(Base):
    """Better than the champion by more than the margin, surely. Ties go to the champion, so this rule always blocks."""

    rule: Literal["better"]
    severity: Literal["block"] = "block"
    metric: Literal["log_loss"] = "log_loss"
    margin: NonNegativeFloat
    confidence: Confidence

    def check(self, evidence: Evidence) -> Finding:
        """The lower bound of the gain, by a paired bootstrap over days."""
        if evidence.champion is None:
            return self._finding("better", None, self.margin, True, FIRST)
        gain = _estimate(evidence.gain(evidence.champion), evidence.days, self.confidence, evidence.seed)
        passed = gain.mean > 0 and gain.lower > self.margin
        return self._finding("better", gain.lower, self.margin, passed, self._words(gain, passed))

    def _words(self, gain: Estimate, passed: bool) -> str:
        by = f"by {abs(gain.mean):.3f} ± {gain.spread:.3f} log loss over {gain.days} days"
        if gain.mean == 0:
            return f"equal in log loss over {gain.days} days"
        if gain.mean < 0 or passed:
            return f"{'better' if passed else 'worse'} {by}"
        bound = f"{self.confidence:.1%} sure of {gain.lower:.3f}, needed: more than {self.margin:g}"
        return f"not surely better than the champion: better {by} ({bound})"


class Slices(Base):
    """No value of the named columns may have a log loss that is surely higher than the champion's by more than this.

    Values with fewer rows than ``min_rows`` are judged together. Surely: by days, and at the confidence for all slices
    at once. So a slice that is worse by chance does not block, and one that is worse on few rows may pass.
    """

    rule: Literal["slices"]
    columns: Annotated[list[str], Field(min_length=1)]
    max_worse: NonNegativeFloat
    min_rows: PositiveInt
    confidence: Confidence

    @property
    def reads(self) -> Sequence[str]:
        """The sliced columns."""
        return self.columns

    def check(self, evidence: Evidence) -> Finding:
        """The slice of which it is surest that it became worse."""
        rule = f"slices {', '.join(self.columns)}"
        if evidence.champion is None:
            return self._no_champion(rule, self.max_worse)
        rise, days = -evidence.gain(evidence.champion), evidence.days.to_numpy()
        masks = dict(part for column in self.columns for part in _slices(evidence.test[column], self.min_rows))
        if not masks:
            return self._finding(rule, None, self.max_worse, True, f"no slice has {self.min_rows:,} rows")
        each = 1 - (1 - self.confidence) / len(masks)  # by Bonferroni: of many slices, one looks bad by chance
        judged = {name: _estimate(rise[mask], days[mask], each, evidence.seed) for name, mask in masks.items()}
        return self._judge(rule, judged)

    def _judge(self, rule: str, judged: Mapping[str, Estimate]) -> Finding:
        broken = [name for name, rise in judged.items() if rise.lower > self.max_worse]
        worst = max(judged, key=lambda name: judged[name].lower)
        found = judged[worst]
        direction = "worse" if found.mean > 0 else "better"
        by = f"{worst}, {direction} by {abs(found.mean):.3f} ± {found.spread:.3f} log loss"
        words = f"none of {len(judged)} slices surely worse by more than {self.max_worse:g} (nearest: {by})"
        if broken:
            words = f"{len(broken)} of {len(judged)} slices surely worse by more than {self.max_worse:g}: {by}"
        return self._finding(rule, found.lower, self.max_worse, not broken, words)


class Fairness(Base):
    """The groups of a column must be treated alike: bounds on the largest difference between two of them.

    ``selection_rate`` is the share predicted 1 at ``decide.threshold``, the others the shares of wrong predictions
    among the rows of label 0 and of label 1. A rate of fewer than ``min_rows`` rows is left out: it is noise.
    """

    rule: Literal["fairness"]
    column: str
    min_rows: PositiveInt
    selection_rate: Share | None = None
    false_positive_rate: Share | None = None
    false_negative_rate: Share | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> Fairness:
        if not self.bounds:
            raise ValueError("name a bound: selection_rate, false_positive_rate or false_negative_rate")
        return self

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set."""
        bounds = {
            name: getattr(self, name) for name in ("selection_rate", "false_positive_rate", "false_negative_rate")
        }
        return {name: bound for name, bound in bounds.items() if bound is not None}

    @property
    def reads(self) -> Sequence[str]:
        """The column of the groups."""
        return (self.column,)

    def check(self, evidence: Evidence) -> Finding:
        """The difference that is furthest beyond its bound, or else nearest to it."""
        by_group = _rates(evidence, self.column, self.min_rows)
        findings = [self._difference(name, by_group[name].dropna(), bound) for name, bound in self.bounds.items()]
        return max(findings, key=lambda found: _excess(found.measured, found.needed))

    def _difference(self, name: str, rates: pd.Series[Any], bound: float) -> Finding:
        rule = f"fairness {self.column}"
        if len(rates) < 2:
            words = f"{_named(name)}: fewer than two groups of {self.column} have {self.min_rows:,} rows"
            return self._finding(rule, None, bound, True, words)
        measured = float(rates.max() - rates.min())
        words = f"{_named(name)} differs by {measured:.3f} between {self.column} {rates.idxmax()} and "
        words += f"{rates.idxmin()} ({len(rates)} groups), needed: at most {bound:g}"
        return self._finding(rule, measured, bound, measured <= bound, words)


class Latency(Base):
    """Seconds to predict 1,000 rows, the median of a few tries in decide's process; with a bound of its own, or as a
    ratio to the champion's, or both. It holds for the machine that decides.
    """

    rule: Literal["latency"]
    max_seconds: PositiveFloat | None = None
    max_ratio: PositiveFloat | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> Latency:
        if self.max_seconds is None and self.max_ratio is None:
            raise ValueError("name a bound: max_seconds or max_ratio")
        return self

    def check(self, evidence: Evidence) -> Finding:
        """The challenger's seconds, and the champion's beside them."""
        seconds = evidence.challenger.seconds or 0.0
        theirs = evidence.champion.seconds if evidence.champion else None
        limits = [] if self.max_seconds is None else [self.max_seconds]
        limits += [] if self.max_ratio is None or theirs is None else [self.max_ratio * theirs]
        if not limits:
            return self._no_champion("latency", None)
        limit = min(limits)
        words = f"{seconds:.4f} s to predict 1,000 rows, needed: at most {limit:.4g} s"
        words += f" (the champion takes {theirs:.4f} s)" if theirs is not None else ""
        return self._finding("latency", seconds, limit, seconds <= limit, words)


class Size(Base):
    """Megabytes (of 1,000,000 bytes) of the model's folder."""

    rule: Literal["size"]
    max_mb: PositiveFloat

    def check(self, evidence: Evidence) -> Finding:
        """The size of the challenger."""
        size = evidence.challenger.size / 1e6
        words = f"the model takes {size:.2f} MB, needed: at most {self.max_mb:g} MB"
        return self._finding("size", size, self.max_mb, size <= self.max_mb, words)


class Freshness(Base):
    """Days from the end of what the model learned or was chosen on to the as-of date."""

    rule: Literal["freshness"]
    max_days: PositiveInt

    def check(self, evidence: Evidence) -> Finding:
        """The age of the challenger's data."""
        now = datetime.combine(evidence.as_of, datetime.min.time(), tzinfo=UTC)
        days = (now - evidence.challenger.trained_until).days
        words = f"its data ends {days} days before {evidence.as_of}, needed: at most {self.max_days}"
        return self._finding("freshness", days, self.max_days, days <= self.max_days, words)


class TooGood(Base):
    """Not better than the champion in log loss by more than ``max_gain``; a first model's AUC at most ``max_auc``."""

    rule: Literal["too_good"]
    max_gain: PositiveFloat
    max_auc: Share

    def check(self, evidence: Evidence) -> Finding:
        """The gain over the champion, or the challenger's AUC."""
        if evidence.champion is None:
            value, limit = evidence.metrics["roc_auc"], self.max_auc
            words = f"ROC AUC {value:.3f}, believed up to {limit:g}"
        else:
            value, limit = float(evidence.gain(evidence.champion).mean()), self.max_gain
            words = f"{'better' if value >= 0 else 'worse'} by {abs(value):.3f} log loss, believed up to {limit:g}"
        passed = value <= limit
        words += "" if passed else ": look for a feature that knows the label"
        return self._finding("too_good", value, limit, passed, words)


class LabelRate(Base):
    """The label rate of the challenger's training data within ``max_change`` of the champion's.

    A first model's is compared with that of its own validation window, the days right after.
    """

    rule: Literal["label_rate"]
    max_change: Share

    def check(self, evidence: Evidence) -> Finding:
        """The change of the rate."""
        ours = evidence.challenger.label_rates["train"]
        past = (
            evidence.champion.label_rates["train"]
            if evidence.champion
            else evidence.challenger.label_rates["validation"]
        )
        whose = "the champion's" if evidence.champion else "its validation window's"
        change = abs(ours - past)
        words = f"label rate {ours:.3f} in training, {whose} {past:.3f}, needed: within {self.max_change:g}"
        return self._finding("label_rate", change, self.max_change, change <= self.max_change, words)


class Stability(Base):
    """The share of the test rows that the two sides put on different sides of ``decide.threshold``."""

    rule: Literal["stability"]
    max_flipped: Share

    def check(self, evidence: Evidence) -> Finding:
        """The share of the predictions that flip."""
        if evidence.champion is None:
            return self._no_champion("stability", self.max_flipped)
        sides = [side.probability > evidence.threshold for side in (evidence.challenger, evidence.champion)]
        flipped = float((sides[0] != sides[1]).mean())
        words = f"{flipped:.1%} of the predictions change sides of {evidence.threshold:g}, "
        words += f"needed: at most {self.max_flipped:.1%}"
        return self._finding("stability", flipped, self.max_flipped, flipped <= self.max_flipped, words)


AnyRule = Annotated[
    Floor
    | Ceiling
    | Better
    | Slices
    | Calibration
    | Fairness
    | Latency
    | Size
    | Freshness
    | TooGood
    | LabelRate
    | Stability,
    Field(discriminator="rule"),
]


def _named(metric: str) -> str:
    return {"roc_auc": "ROC AUC", "pr_auc": "PR AUC", "f1": "F1"}.get(metric, metric.replace("_", " "))


def _ceiling(rule: Base, name: str, metric: Metric, at_most: float, or_champion: bool, evidence: Evidence) -> Finding:
    """A month may be hard for every model: a ceiling that did not move with it would keep the worse of two in place."""
    value, champion = evidence.metrics[metric], evidence.champion_metrics.get(metric, -math.inf)
    words = f"{_named(metric)} {value:.3f}, needed: at most {at_most:g}"
    if gives_way := or_champion and champion > at_most:
        words += f", or the champion's on these rows: {champion:.3f}"
    limit = champion if gives_way else at_most
    return rule._finding(name, value, limit, value <= limit, words)


def _excess(measured: float | str | None, needed: float | str | None) -> float:
    return measured - needed if isinstance(measured, float) and isinstance(needed, float) else -math.inf


def _estimate(values: Floats, days: Any, confidence: float, seed: int) -> Estimate:
    from pipelines import metrics

    return metrics.mean_by_day(values, days, confidence, seed)


def _groups(column: pd.Series[Any]) -> pd.Series[Any]:
    return column.astype("str").fillna("(none)")


def _slices(column: pd.Series[Any], min_rows: int) -> Iterator[tuple[str, Any]]:
    """Each value with enough rows, as ``column value``, and its mask, (rows,); then the others together."""
    values = _groups(column)
    counts = values.value_counts().sort_index()
    shown = counts.index[counts >= min_rows]
    yield from ((f"{column.name} {value}", (values == value).to_numpy()) for value in shown)
    if counts.sum() - counts[shown].sum() >= min_rows:
        yield f"{column.name} {OTHERS}", (~values.isin(shown)).to_numpy()


def _rates(evidence: Evidence, column: str, min_rows: int) -> pd.DataFrame:
    """The rates of each group, by fairlearn's MetricFrame; NaN where fewer than ``min_rows`` rows make a rate."""
    from fairlearn.metrics import MetricFrame, false_negative_rate, false_positive_rate, selection_rate

    groups, label = _groups(evidence.test[column]), evidence.test["label"].astype("int64")
    made_of = {"selection_rate": label >= 0, "false_positive_rate": label == 0, "false_negative_rate": label == 1}
    frame = MetricFrame(
        metrics={
            "selection_rate": selection_rate,
            "false_positive_rate": false_positive_rate,
            "false_negative_rate": false_negative_rate,
        },
        y_true=label.to_numpy(),
        y_pred=(evidence.challenger.probability > evidence.threshold).astype("int64"),
        sensitive_features=groups.to_numpy(),
    )
    rates: pd.DataFrame = frame.by_group
    for name, mask in made_of.items():
        rows = mask.groupby(groups.to_numpy()).sum()
        rates[name] = rates[name].where(rows.reindex(rates.index) >= min_rows)
    return rates
