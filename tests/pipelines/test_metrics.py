"""Metrics against scikit-learn, values worked out by hand, and brute force."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import calibration
from sklearn import metrics as reference

from pipelines import metrics
from pipelines.errors import BallastError

LABEL = np.array([0, 0, 1, 1], dtype=np.int8)
PROBABILITY = np.array([0.1, 0.4, 0.35, 0.8])


@pytest.fixture(scope="module")
def many() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    probability = random.beta(2, 5, size=5000).round(3)  # rounded: ties
    return (random.random(5000) < probability).astype(np.int8), probability


def test_binary_four_rows_gives_values_worked_out_by_hand():
    measured = metrics.binary(LABEL, PROBABILITY, threshold=0.5, bins=2)
    # one pair of four is in the wrong order; recall steps at 0.8 (precision 1) and 0.35 (precision 2/3)
    assert measured["roc_auc"] == pytest.approx(3 / 4)
    assert measured["pr_auc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert measured["log_loss"] == pytest.approx(-np.log([0.9, 0.6, 0.35, 0.8]).mean())
    assert measured["brier"] == pytest.approx((0.01 + 0.16 + 0.4225 + 0.04) / 4)
    assert (measured["precision"], measured["recall"]) == (1.0, 0.5)
    assert measured["f1"] == pytest.approx(2 / 3)
    # bins {0.1, 0.35} and {0.4, 0.8}: both observed 1/2, predicted 0.225 and 0.6
    assert measured["calibration_error"] == pytest.approx((0.275 + 0.1) / 2)
    assert (measured["rows"], measured["label_rate"]) == (4, 0.5)


def test_binary_many_rows_agrees_with_sklearn(many):
    label, probability = many
    predicted = probability > 0.3
    measured = metrics.binary(label, probability, threshold=0.3, bins=10)
    expected = {
        "roc_auc": reference.roc_auc_score(label, probability),
        "pr_auc": reference.average_precision_score(label, probability),
        "log_loss": reference.log_loss(label, probability),
        "brier": reference.brier_score_loss(label, probability),
        "f1": reference.f1_score(label, predicted),
        "precision": reference.precision_score(label, predicted),
        "recall": reference.recall_score(label, predicted),
    }
    assert {name: measured[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_binary_probability_at_threshold_does_not_count_as_predicted():
    assert metrics.binary([0, 1], [0.3, 0.4], threshold=0.3, bins=2)["precision"] == 1.0


def test_binary_nothing_predicted_gives_zeros():
    measured = metrics.binary(LABEL, PROBABILITY, threshold=0.9, bins=2)
    assert (measured["f1"], measured["precision"], measured["recall"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("only", [0, 1])
def test_binary_one_class_leaves_ranking_undefined(only):
    measured = metrics.binary([only, only], [0.2, 0.6], threshold=0.5, bins=2)
    assert np.isnan([measured["roc_auc"], measured["pr_auc"]]).all()
    assert np.isfinite([value for name, value in measured.items() if name not in ("roc_auc", "pr_auc")]).all()


def test_log_loss_rows_sure_and_wrong_stays_finite():
    assert metrics.log_loss_rows([1, 0, 1], [0.0, 1.0, 1.0]) == pytest.approx([36.04, 36.04, 0], abs=0.01)


def test_log_loss_rows_mean_agrees_with_sklearn_at_the_edges():
    label, probability = [1, 0, 1, 0], [0.0, 0.25, 1.0, 1.0]
    assert metrics.log_loss_rows(label, probability).mean() == pytest.approx(reference.log_loss(label, probability))


def test_calibration_curve_many_rows_agrees_with_sklearn_and_loses_no_row(many):
    label, probability = many
    observed, predicted = calibration.calibration_curve(label, probability, n_bins=10, strategy="quantile")
    curve = metrics.calibration_curve(label, probability, bins=10)
    assert curve["observed"].to_numpy() == pytest.approx(observed)
    assert curve["predicted"].to_numpy() == pytest.approx(predicted)
    assert curve["rows"].sum() == len(label)
    assert curve["rows"].min() > 450


def test_calibration_curve_equal_probabilities_share_one_bin():
    curve = metrics.calibration_curve([0, 1, 1, 1], [0.5] * 4, bins=10)
    assert curve.to_dict("list") == {"predicted": [0.5], "observed": [0.75], "rows": [4]}


def test_calibration_error_bins_of_unequal_size_weighs_them_by_rows():
    # 0.1 three times (observed 1/3) and 0.9 once (observed 1)
    error = metrics.calibration_error([0, 0, 1, 1], [0.1, 0.1, 0.1, 0.9], bins=2)
    assert error == pytest.approx((3 * (1 / 3 - 0.1) + 0.1) / 4)


def test_roc_curve_many_rows_is_thin_and_keeps_ends_and_area(many):
    curve = metrics.roc_curve(*many)
    assert len(curve) == 200
    assert curve.iloc[[0, -1]].to_numpy().tolist() == [[0, 0], [1, 1]]
    assert reference.auc(curve["fpr"], curve["tpr"]) == pytest.approx(reference.roc_auc_score(*many), abs=1e-3)


def test_precision_recall_curve_many_rows_is_thin_and_rises_in_recall(many):
    curve = metrics.precision_recall_curve(*many)
    assert len(curve) == 200
    assert curve["recall"].is_monotonic_increasing
    assert curve.iloc[0].to_list() == [0, 1]
    assert curve.iloc[-1].to_list() == [1, pytest.approx(many[0].mean())]


def test_roc_curve_few_rows_keeps_every_point():
    assert metrics.roc_curve(LABEL, PROBABILITY).to_dict("list") == {
        "fpr": [0, 0, 0.5, 0.5, 1],
        "tpr": [0, 0.5, 0.5, 1, 1],
    }


@pytest.mark.parametrize("curve", [metrics.roc_curve, metrics.precision_recall_curve])
def test_curve_one_class_is_refused(curve):
    with pytest.raises(BallastError, match=r"both classes \(found only label 1"):
        curve([1, 1], [0.2, 0.6])


@pytest.mark.parametrize(
    ("label", "probability", "fact"),
    [
        ([0, 1], [0.5], r"labels \(2,\), probabilities \(1,\)"),
        ([], [], r"labels \(0,\)"),
        ([[0, 1]], [[0.2, 0.3]], r"labels \(1, 2\)"),
        ([0, 2], [0.5, 0.5], "1 others of 2"),
        ([0, np.nan], [0.5, 0.5], "1 others of 2"),
        ([0, 1], [0.5, np.nan], "1 of 2 outside, the first nan"),
        ([0, 1], [-0.1, 1.1], "2 of 2 outside, the first -0.1"),
    ],
)
def test_binary_unusable_input_is_refused(label, probability, fact):
    with pytest.raises(BallastError, match=fact):
        metrics.binary(label, probability, threshold=0.5, bins=2)


def test_binary_nullable_labels_of_pandas_are_read():
    labels = pd.Series(LABEL, dtype="Int8")
    assert metrics.binary(labels, PROBABILITY, 0.5, 2) == metrics.binary(LABEL, PROBABILITY, 0.5, 2)


@given(value=st.floats(-1e6, 1e6), days=st.lists(st.integers(0, 5), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_bootstrap_by_day_constant_values_have_no_spread(value, days):
    means = metrics.bootstrap_by_day(np.full(len(days), value), np.array(days), seed=1, draws=20)
    assert means == pytest.approx(np.full(20, value), rel=1e-12)


def test_bootstrap_by_day_equal_seed_gives_equal_draws():
    values, days = np.arange(12.0), np.arange(12) // 3
    again = metrics.bootstrap_by_day(values, days, seed=7)
    assert np.array_equal(metrics.bootstrap_by_day(values, days, seed=7), again)
    assert not np.array_equal(metrics.bootstrap_by_day(values, days, seed=8), again)
    assert again.shape == (2000,)


def test_bootstrap_by_day_three_days_agrees_with_all_resamples_by_brute_force():
    by_day = {"2013-01-01": [1.0], "2013-01-02": [5.0, 7.0, 9.0], "2013-01-03": [20.0, 22.0]}
    days = np.array([day for day, values in by_day.items() for _ in values], dtype="datetime64[D]")
    values = np.concatenate(list(by_day.values()))
    resamples = [np.concatenate(drawn).mean() for drawn in _triples(list(by_day.values()))]  # 27, equally likely
    means = metrics.bootstrap_by_day(values, days, seed=1, draws=20000)
    found, counts = np.unique(means.round(9), return_counts=True)
    expected, weights = np.unique(np.round(resamples, 9), return_counts=True)
    assert found.tolist() == expected.tolist()
    assert counts / 20000 == pytest.approx(weights / 27, abs=0.01)


def test_bootstrap_by_day_long_day_weighs_by_its_rows():
    values = np.r_[np.zeros(99), 1.0]
    means = metrics.bootstrap_by_day(values, np.r_[np.zeros(99), 1.0], seed=1, draws=4000)
    # both days once: 1/100, not 1/2
    assert set(means.round(9)) == {0.0, 0.01, 1.0}


def test_bootstrap_by_day_days_spread_wider_than_rows_would():
    random = np.random.default_rng(1)
    day = np.repeat(np.arange(14), 100)
    values = random.normal(size=14)[day] + 0.01 * random.normal(size=1400)
    by_day = metrics.bootstrap_by_day(values, day, seed=1).std()
    by_row = metrics.bootstrap_by_day(values, np.arange(1400), seed=1).std()
    assert by_day > 5 * by_row


@pytest.mark.parametrize(
    ("values", "days", "fact"),
    [([1.0, 2.0], [1], r"values \(2,\), days \(1,\)"), ([], [], "values"), ([1.0, np.nan], [1, 2], "1 NaN of 2")],
)
def test_bootstrap_by_day_unusable_input_is_refused(values, days, fact):
    with pytest.raises(BallastError, match=fact):
        metrics.bootstrap_by_day(values, days, seed=1)


def _triples(days: list[list[float]]) -> list[list[list[float]]]:
    return [[first, second, third] for first in days for second in days for third in days]


def test_mean_by_day_gives_the_bootstraps_bound_widened() -> None:
    random = np.random.default_rng(0)
    values, days = random.normal(size=900), np.repeat(np.arange(9), 100)
    found = metrics.mean_by_day(values, days, 0.975, seed=4)
    draws = metrics.bootstrap_by_day(values, days, seed=4)
    assert (found.mean, found.spread, found.days) == (pytest.approx(values.mean()), draws.std(), 9)
    below = found.mean - np.quantile(draws, 0.025)
    assert found.lower == pytest.approx(found.mean - metrics.widening(9, 0.975) * below)


def test_mean_by_day_of_one_day_is_sure_of_nothing() -> None:
    assert metrics.mean_by_day([1.0, 1.0], ["a", "a"], 0.975, seed=1).lower == -np.inf


@pytest.mark.parametrize(("days", "factor"), [(2, 9.168), (7, 1.3485), (14, 1.1439), (10_000, 1.0001)])
def test_widening_follows_students_t(days: int, factor: float) -> None:
    """By scipy.stats: t.ppf(0.975, n - 1) / norm.ppf(0.975) * sqrt(n / (n - 1))."""
    assert metrics.widening(days, 0.975) == pytest.approx(factor, abs=2e-4)


def test_error_by_day_of_independent_days_is_that_of_their_means() -> None:
    """Of equal days: the standard deviation of their means over the root of their number. These lie a month apart."""
    by_day, place = np.random.default_rng(1).normal(size=8), np.repeat(np.arange(8), 50)
    days = np.datetime64("2013-01-01") + 30 * place
    assert metrics.error_by_day(by_day[place], days) == pytest.approx(by_day.std(ddof=1) / np.sqrt(8))
    assert metrics.error_by_day([1.0, 2.0], days[:2]) is None


def test_error_by_day_takes_in_what_days_near_each_other_share() -> None:
    """By hand, of six days that rise: lag 2, weights 2/3 and 1/3 on their products, 6/5 for few days."""
    days, values = np.datetime64("2013-01-01") + np.arange(6), np.arange(6.0)
    apart = values - 2.5
    near = 2 * (2 / 3 * apart[1:] @ apart[:-1] + 1 / 3 * apart[2:] @ apart[:-2])
    expected = np.sqrt(6 / 5 * (apart @ apart + near)) / 6
    assert metrics.error_by_day(values, days) == pytest.approx(expected)


def test_error_by_day_of_days_that_swing_is_not_less_than_that_of_independent_ones() -> None:
    days, values = np.datetime64("2013-01-01") + np.arange(8), np.tile([1.0, -1.0], 4)
    assert metrics.error_by_day(values, days) == pytest.approx(values.std(ddof=1) / np.sqrt(8))


def test_error_by_day_covers_the_mean_of_a_series_that_hangs_together() -> None:
    """60 days with a correlation of 0.4: two standard errors hold 92 % here, by independent days 81 %."""
    random, days = np.random.default_rng(3), np.datetime64("2013-01-01") + np.arange(60)
    held = 0
    for _ in range(200):
        values = [random.normal(scale=1 / np.sqrt(1 - 0.4**2))]
        for _ in days[1:]:
            values.append(0.4 * values[-1] + random.normal())
        held += abs(np.mean(values)) < 2 * metrics.error_by_day(values, days)
    assert held >= 172


def test_auc_error_by_day_agrees_with_resampled_days(many) -> None:
    """Each day's scores are moved as a whole, so that days matter; rows alone would be several times surer."""
    label, probability = many
    days = np.repeat(np.arange(25), 200)
    scores = probability + np.random.default_rng(1).normal(scale=0.3, size=25)[days] * (label - 0.5)
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    places, random, draws = [np.flatnonzero(days == day) for day in range(25)], np.random.default_rng(2), []
    for _ in range(300):
        taken = np.concatenate([places[day] for day in random.integers(25, size=25)])
        draws.append(reference.roc_auc_score(label[taken], scores[taken]))
    found = metrics.auc_error_by_day(label, scores, days)
    assert found == pytest.approx(np.std(draws), rel=0.15)
    assert found > 2 * metrics.auc_error_by_day(label, scores, np.arange(5000))


def test_auc_error_by_day_of_one_day_or_one_class_is_none() -> None:
    assert metrics.auc_error_by_day(LABEL, PROBABILITY, [1, 1, 1, 1]) is None
    assert metrics.auc_error_by_day([1, 1, 1, 1], PROBABILITY, [1, 1, 2, 2]) is None


def test_expected_auc_of_known_labels_is_their_auc(many) -> None:
    label, probability = many
    assert metrics.expected_auc(label, probability) == pytest.approx(reference.roc_auc_score(label, probability))


def test_expected_auc_is_the_mean_over_labels_drawn_by_chance(many) -> None:
    _, probability = many
    random = np.random.default_rng(1)
    drawn = [reference.roc_auc_score(random.random(5000) < probability, probability) for _ in range(50)]
    assert metrics.expected_auc(probability, probability) == pytest.approx(np.mean(drawn), abs=0.003)
