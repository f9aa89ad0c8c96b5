"""Estimated performance: what it must see without a label, what it cannot, and how sure it may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from pipelines.estimate import PULL, calibrate, estimate_verdict, expected_losses, log_odds, tracked
from pipelines.metrics import log_loss_rows
from pipelines.performance import PerformanceParams, Window, performance_verdict

PARAMS = PerformanceParams(
    earlier_windows=2, min_rows=100, min_days=7, standard_errors=2, confidence=0.95, calibration_bins=10, seed=1
)
APRIL, MAY, JUNE = (Window(f"2013-0{month}-01", f"2013-0{month + 1}-01", 3) for month in (4, 5, 6))
UNTRACKED: dict[str, Any] = {"tracked": [], "bias": None}


def rows(
    seed: int,
    days: int = 14,
    odds: tuple[float, float] = (-1.5, 1.5),
    boast: float = 1.0,
    effect: float = 0.0,
    daily: int = 100,
) -> pd.DataFrame:
    """Rows of a champion whose log odds are ``boast`` times the true ones; ``effect`` is how much days differ."""
    random = np.random.default_rng(seed)
    day = np.repeat(np.arange(days), daily)
    true = random.normal(*odds, size=len(day)) + random.normal(scale=effect, size=days)[day]
    label = (random.random(len(day)) < expit(true)).astype("int8")
    time = pd.Timestamp("2013-01-01", tz="UTC") + pd.to_timedelta(day, unit="D")
    return pd.DataFrame({"time": time, "label": label, "probability": expit(boast * true)})


def estimate(batch: pd.DataFrame, reference: pd.DataFrame, track: dict[str, Any] = UNTRACKED) -> Any:
    return estimate_verdict(batch.drop(columns="label"), reference, track, PARAMS)


def realised(frame: pd.DataFrame) -> float:
    return float(log_loss_rows(frame["label"], frame["probability"]).mean())


def test_calibrate_agrees_with_sklearn():
    frame = rows(1, boast=2)
    odds = log_odds(frame)
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(odds[:, None], frame["label"])
    assert calibrate(odds, frame["label"].to_numpy()) == pytest.approx(
        [theirs.intercept_[0], theirs.coef_[0, 0]], abs=0.01
    )


def test_calibrate_counts_rows_as_often_as_told():
    frame = rows(1, days=2)
    odds, label, times = log_odds(frame), frame["label"].to_numpy(), np.repeat([3.0, 0.0], 100)
    assert calibrate(odds, label, times) == pytest.approx(calibrate(np.tile(odds[:100], 3), np.tile(label[:100], 3)))


@pytest.mark.parametrize("label", [0, 1])
def test_calibrate_labels_of_one_class_have_a_line_all_the_same(label):
    odds = np.linspace(-3, 3, 50)
    intercept, slope = calibrate(odds, np.full(50, float(label)))
    assert (intercept > 0) == bool(label)
    gap = label - expit(intercept + slope * odds)  # what the pull holds against
    assert [gap.sum(), gap @ odds] == pytest.approx([PULL * intercept, PULL * (slope - 1)], rel=0.05, abs=1e-3)


def test_expected_losses_of_known_labels_are_the_log_loss():
    frame = pd.DataFrame({"probability": [0.0, 0.3, 0.3, 1.0], "label": [1, 0, 1, 0]})
    found = expected_losses(log_odds(frame), frame["label"].to_numpy())
    assert found == pytest.approx(log_loss_rows(frame["label"], frame["probability"]), rel=1e-9)


@pytest.mark.parametrize("boast", [0.5, 1.0, 2.0])
def test_estimate_of_the_reference_is_what_was_realised_there(boast):
    """So the rise is against neither a flattered nor a blurred value."""
    reference = rows(1, boast=boast)
    found = estimate(reference, reference)
    assert found["reference_log_loss"] == pytest.approx(realised(reference))
    assert found["rise"] == pytest.approx(0, abs=2e-5)


def test_estimate_same_process_is_not_worse_and_near_what_comes_true():
    batch = rows(2, days=30)
    found = estimate(batch, rows(1))
    assert found["worse"] is False
    assert found["log_loss"] == pytest.approx(realised(batch), abs=2 * found["log_loss_standard_error"])
    assert found["log_loss_standard_error"] < 0.03
    assert found["words"].startswith(f"estimate not worse: log loss {found['log_loss']:.3f} ± 0.0")


def test_estimate_inputs_moved_to_where_labels_are_uncertain_is_worse():
    batch = rows(2, days=30, odds=(-0.2, 0.5))
    found = estimate(batch, rows(1))
    assert found["worse"] is True
    assert found["log_loss"] == pytest.approx(realised(batch), abs=2 * found["log_loss_standard_error"])
    assert found["words"].startswith("estimate WORSE")


def test_estimate_miscalibrated_champion_is_corrected():
    """A champion twice as sure as it may be thinks itself far better than it is."""
    batch, reference = rows(2, days=30, boast=2), rows(1, boast=2)
    found = estimate(batch, reference)
    believed = expected_losses(log_odds(batch), batch["probability"].to_numpy()).mean()
    assert believed < realised(batch) - 0.15
    assert found["log_loss"] == pytest.approx(realised(batch), abs=2 * found["log_loss_standard_error"])
    assert found["calibration"]["slope"] == pytest.approx(0.5, abs=0.1)


def test_estimate_of_the_auc_is_near_what_comes_true():
    batch = rows(2, days=30, odds=(-1, 0.8))
    windows = {APRIL: batch}
    true = performance_verdict(windows, APRIL, rows(1), "2013-05-01", PARAMS)
    assert estimate(batch, rows(1))["auc"] == pytest.approx(true["auc"], abs=2 * true["auc_standard_error"])


def test_estimate_concept_drift_is_not_seen_here_and_is_by_the_labels():
    """The labels turn round and the inputs stay: no estimate from probabilities can know, and the first labels tell."""
    batch, reference = rows(2, days=30), rows(1)
    flipped = batch.assign(label=1 - batch["label"])
    assert estimate(flipped, reference)["worse"] is False
    assert estimate(flipped, reference)["log_loss"] == estimate(batch, reference)["log_loss"]
    assert performance_verdict({APRIL: flipped}, APRIL, reference, "2013-05-01", PARAMS)["worse"] is True
    assert performance_verdict({APRIL: batch}, APRIL, reference, "2013-05-01", PARAMS)["worse"] is False


def test_estimate_two_standard_errors_cover_what_they_should_where_days_differ():
    """Nothing has changed but the days: 93 % by Student's t of 13 degrees; 33 to 40 of 40 by luck."""
    sizes = {"effect": 0.7, "daily": 20}
    found = [estimate(rows(100 + i, days=30, **sizes), rows(200 + i, **sizes)) for i in range(40)]
    scores = np.array([one["rise"] / one["standard_error"] for one in found])
    assert 33 <= (np.abs(scores) < 2).sum() <= 40
    assert np.std(scores) > 0.6  # and they are no wider than they must be


def test_estimate_of_few_days_is_less_sure():
    few, many = (estimate(rows(2, days=days, effect=0.7), rows(1)) for days in (4, 60))
    for name in ("standard_error", "log_loss_standard_error"):
        assert few[name] > 1.5 * many[name]


def test_estimate_of_the_rise_is_less_sure_where_the_test_windows_days_were_of_their_own():
    """Days that the champion knew to be easy or hard say nothing of its calibration, and all of what it is held to."""
    found = estimate(rows(2, days=30, effect=0.7), rows(1, effect=0.7))
    assert found["standard_error"] > 1.2 * found["log_loss_standard_error"]


def test_estimate_one_day_has_no_error_and_is_not_judged():
    found = estimate(rows(2, days=1), rows(1))
    assert (found["worse"], found["standard_error"], found["log_loss_standard_error"]) == (None, None, None)
    assert found["words"].startswith("estimate not judged: log loss 0.")


@pytest.mark.parametrize(
    ("batch", "reference", "lack"),
    [
        (rows(2).head(99), rows(1), "99 rows, 100 needed"),
        (rows(2), rows(1).head(99), "99 labelled rows in the reference, 100 needed"),
        (rows(2), rows(1).assign(label=0), "the reference has labels of one class only"),
    ],
)
def test_estimate_without_enough_to_go_by_is_not_made(batch, reference, lack):
    found = estimate(batch, reference)
    assert (found["measured"], found["words"]) == (False, f"not estimated: {lack}")


def entry(window: Window, log_loss: float | None, complete: bool = True) -> dict[str, Any]:
    return {**window._asdict(), "log_loss": log_loss, "complete": complete}


def past(window: Window, log_loss: float | None) -> dict[str, Any]:
    return {**window._asdict(), "estimate": {"log_loss": log_loss} if log_loss else {"measured": False}}


def test_tracked_holds_what_was_estimated_against_what_came_true():
    windows = [entry(APRIL, 0.52), entry(MAY, 0.44), entry(JUNE, 0.50)]
    found = tracked(windows, [past(MAY, 0.46), past(APRIL, 0.46), past(JUNE, 0.4)], JUNE)
    assert [(one["start"], one["estimated"], one["realised"]) for one in found["tracked"]] == [
        ("2013-04-01", 0.46, 0.52),
        ("2013-05-01", 0.46, 0.44),
    ]
    assert found["bias"] == pytest.approx((-0.06 + 0.02) / 2)
    words = estimate(rows(2), rows(1), found)["words"]
    assert words.endswith("; its last 2 estimates were too low by 0.020 on average")


@pytest.mark.parametrize(
    ("window", "before"),
    [
        (entry(APRIL, 0.52, complete=False), past(APRIL, 0.46)),
        (entry(APRIL, None), past(APRIL, 0.46)),
        (entry(APRIL, 0.52), past(APRIL, None)),
        (entry(APRIL, 0.52), past(APRIL._replace(version=2), 0.46)),
        (entry(APRIL, 0.52), APRIL._asdict()),  # as Ballast wrote it before there were estimates
    ],
)
def test_tracked_window_that_cannot_be_compared_is_left_out(window, before):
    assert tracked([window], [before], JUNE) == UNTRACKED


def test_tracked_keeps_to_the_champion_that_made_the_estimate():
    other = APRIL._replace(version=4)
    found = tracked([entry(APRIL, 0.52), entry(other, 0.45)], [past(other, 0.46)], JUNE)
    assert [(one["version"], one["realised"]) for one in found["tracked"]] == [(4, 0.45)]


def test_log_odds_of_certainty_stay_finite():
    found = log_odds(pd.DataFrame({"probability": [0.0, 0.5, 1.0]}))
    assert np.isfinite(found).all()
    assert found[1] == logit(0.5)
