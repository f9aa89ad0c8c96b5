"""Thresholds: distances that are Evidently's, and bounds that follow the laws of samples of days."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import comparison
from pipelines.comparison import Column, Method, Rule
from pipelines.thresholds import BINS, distance, histogram, threshold

DAYS, ROWS = 40, 200
BINNED: list[Method] = ["jensenshannon", "hellinger", "psi", "kl_div"]


def days(count: int, by_day: float = 0.0, rows: int = ROWS, seed: int = 1) -> pd.Series:
    """Normal numbers whose days differ in their means by so many standard deviations, indexed by day."""
    random = np.random.default_rng(seed)
    index = pd.date_range("2013-01-01", periods=count, tz="UTC").repeat(rows)
    return pd.Series(random.normal(size=count * rows) + random.normal(0, by_day, count).repeat(rows), index=index)


def numbers(batch: pd.Series, reference: pd.Series, method: Method = "wasserstein", floor: float = 1e-9) -> Column:
    return Column("x", True, Rule(method=method, floor=floor), batch, reference)


def ours(column: Column, bins: int | None) -> float:
    """The distance of the batch by the counts of both sides, in the bins that both have together."""
    together = pd.concat([column.values(column.reference), column.values(column.batch)])
    sides = np.repeat([0, 1], [len(column.values(column.reference)), len(column.values(column.batch))])
    counted = histogram(Column("x", column.numeric, column.rule, column.batch, together.set_axis(sides)), bins)
    [found] = distance(column.rule.method, counted.counts[:1], counted.counts[1:], counted.points)
    return float(found)


@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=60), st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=60))
@settings(max_examples=30, deadline=None)
def test_distance_wasserstein_of_every_value_is_evidently_s(batch, reference):
    column = numbers(*(pd.Series(side).round(3) for side in (batch, reference)))
    assert ours(column, None) == pytest.approx(comparison.distance(column), rel=1e-6, abs=1e-6)


@given(
    st.sampled_from(BINNED),
    st.lists(st.sampled_from("abcdef"), min_size=3, max_size=60),
    st.lists(st.sampled_from("abcdef"), min_size=3, max_size=60),
)
@settings(max_examples=30, deadline=None)
def test_distance_of_categories_is_evidently_s(method, batch, reference):
    rule = Rule(method=method, floor=0.1)
    column = Column("x", False, rule, *(pd.Series(side, dtype="object") for side in (batch, reference)))
    assert ours(column, BINS) == pytest.approx(comparison.distance(column), abs=1e-6)


@pytest.mark.parametrize("method", BINNED)
def test_distance_of_binned_numbers_is_evidently_s(method):
    column = numbers(days(5, seed=2) + 0.5, days(10), method)
    assert ours(column, BINS) == pytest.approx(comparison.distance(column), abs=1e-6)


@pytest.mark.parametrize("tail", [1.0, 5.0])
def test_histogram_wasserstein_in_bins_is_close_to_that_of_every_value(tail):
    """Also where a few values lie far out, as delays do."""
    reference, batch = (np.exp(tail * days(20, seed=seed) / 2) for seed in (1, 2))
    column = numbers(batch * 1.3, reference)
    assert ours(column, BINS) == pytest.approx(ours(column, None), rel=0.02)


def test_threshold_falls_as_the_days_of_the_batch_grow():
    reference = days(DAYS, by_day=0.5)
    found = [threshold(numbers(days(count, seed=2), reference), 0.01, 1, 1) for count in (1, 3, 7, 14, 30)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 2 * found[-1]


def test_threshold_grows_with_the_spread_of_the_days():
    found = [threshold(numbers(days(7), days(DAYS, by_day=spread)), 0.01, 1, 1) for spread in (0.0, 0.1, 0.5, 1.0)]
    assert found == sorted(found)


def test_threshold_grows_as_alpha_falls():
    column = numbers(days(7, rows=20), days(200, by_day=0.5, rows=20))
    found = [threshold(column, alpha, 1, 1) for alpha in (0.3, 0.05, 0.01, 0.001)]
    assert found == sorted(found)
    assert found[3] > 2 * found[0]


def test_threshold_grows_as_the_rows_of_the_batch_shrink():
    found = [threshold(numbers(days(7, rows=rows), days(DAYS)), 0.01, 1, 1) for rows in (ROWS, 20, 5)]
    assert found == sorted(found)
    assert found[2] > 3 * found[0]


def test_threshold_days_that_hang_together_are_drawn_together():
    """Weeks that differ as wholes: single days drawn at random would hide how far a real week lies."""
    weeks = pd.Series(np.random.default_rng(1).normal(size=10).repeat(7 * ROWS), index=days(70).index)
    single, runs = (threshold(numbers(days(7), days(70) + weeks), 0.05, run, 1) for run in (1, 7))
    assert runs > 1.5 * single


def test_threshold_is_never_below_the_floor():
    assert threshold(numbers(days(30), days(DAYS), floor=0.4), 0.01, 7, 1) == 0.4


def test_threshold_is_the_same_for_the_same_seed():
    column = numbers(days(7), days(DAYS, by_day=0.5))
    assert threshold(column, 0.01, 7, 1) == threshold(column, 0.01, 7, 1) != threshold(column, 0.01, 7, 2)


def test_threshold_does_not_depend_on_the_values_of_the_batch():
    reference = days(DAYS, by_day=0.5)
    found = {threshold(numbers(days(7) * factor, reference), 0.01, 7, 1) for factor in (1, 1000)}
    assert len(found) == 1


def test_threshold_of_three_days_is_unknown():
    assert threshold(numbers(days(7), days(3)), 0.01, 7, 1) is None


def test_threshold_of_few_days_is_wider_than_of_the_same_days_many_times_over():
    """They are the same days, and say as little: but those who believe in ten times as many may be surer."""
    few = days(8, by_day=1.0)
    many = pd.concat([few.set_axis(few.index + pd.Timedelta(days=8 * i)) for i in range(10)])
    wide, narrow = (threshold(numbers(days(1), reference), 0.01, 1, 1) for reference in (few, many))
    assert wide > 1.5 * narrow  # 1.3 without the widening


@pytest.mark.parametrize("by_day", [0.0, 0.5])
def test_threshold_is_exceeded_by_chance_no_more_often_than_asked(by_day):
    """60 batches of a week at 5 %: 8 or more would be a chance of 2 % (binomial), and few days are allowed for."""
    reference = days(DAYS, by_day, rows=50)
    bound = threshold(numbers(days(7, rows=50), reference), 0.05, 1, 1)
    found = [comparison.distance(numbers(days(7, by_day, 50, seed), reference)) for seed in range(2, 62)]
    assert sum(score >= bound for score in found) < 8


def test_threshold_of_a_category_is_passed_where_its_share_doubles():
    random = np.random.default_rng(1)
    index = pd.date_range("2013-01-01", periods=DAYS, tz="UTC").repeat(ROWS)
    reference = pd.Series(random.choice(["a", "b"], DAYS * ROWS, p=[0.1, 0.9]), index=index, dtype="object")
    for share, moved in ((0.1, False), (0.2, True)):
        batch = pd.Series(random.choice(["a", "b"], 7 * ROWS, p=[share, 1 - share]), index=index[: 7 * ROWS])
        column = Column("x", False, Rule(method="jensenshannon", floor=0.05), batch.astype("object"), reference)
        assert (comparison.distance(column) >= threshold(column, 0.01, 7, 1)) is moved
