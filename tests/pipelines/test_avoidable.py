"""Avoidable loss: what a correction saves where something is planted, nothing where there is nothing to learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from pipelines.avoidable import avoidable_verdict
from pipelines.metrics import log_loss_rows
from pipelines.performance import PerformanceParams
from pipelines.schema import Features

PARAMS = PerformanceParams(
    earlier_windows=2, min_rows=1000, min_days=7, standard_errors=2, confidence=0.95, calibration_bins=10, seed=1
)
FEATURES = Features(numeric=["wind", "sparse", "gone"], categorical=["carrier"])
BEFORE, DAY = 14, 200  # days of the champion's test window, rows a day
MARGIN = 0.001


def rows(seed: int, days: int = BEFORE + 28, level: float = 0.3, wind: float = 0.0, carrier: float = 0.0) -> Any:
    """A champion that knows all but how hard a day is; from the test window's end on, wind and a carrier may count."""
    random = np.random.default_rng(seed)
    day = np.repeat(np.arange(days), DAY)
    frame = pd.DataFrame({"wind": random.normal(size=len(day)), "carrier": random.choice(["AA", "B6", "UA"], len(day))})
    frame["sparse"] = np.where(random.random(len(day)) < 0.9, np.nan, frame["wind"] * 1e300 * 1e300)
    odds, new = random.normal(-1, 1, len(day)), day >= BEFORE
    odds_now = odds + random.normal(scale=level, size=days)[day]
    odds_now += new * (wind * frame["wind"] + carrier * (frame["carrier"] == "B6"))
    label = pd.array((random.random(len(day)) < expit(odds_now)).astype(int), dtype="Int8")
    time = pd.Timestamp("2013-01-01", tz="UTC") + pd.to_timedelta(day, unit="D")
    return frame.assign(time=time, label=label, probability=expit(odds))


def judge(frame: pd.DataFrame, start: int = BEFORE) -> dict[str, Any]:
    """The days from ``start`` on."""
    since = pd.Timestamp("2013-01-01", tz="UTC") + pd.Timedelta(days=start)
    return avoidable_verdict(frame[frame["time"] >= since], frame, FEATURES, PARAMS)


@pytest.mark.parametrize("planted", [{"wind": 0.8}, {"carrier": 1.5}], ids=["a number", "a category"])
def test_avoidable_concept_drift_is_found_within_one_labelled_window(planted):
    found = judge(rows(1, **planted))
    assert found["lower"] > MARGIN
    assert (found["measured"], found["days"], found["rows"]) == (True, 28, 28 * DAY)
    assert found["loss"] - found["lower"] == pytest.approx(1.703 * found["standard_error"], rel=1e-3)


def test_avoidable_flipped_labels_are_found():
    """The farthest that a champion can be off: Newton's method must not run away."""
    frame = rows(1)
    frame["label"] = frame["label"].where(frame["time"] < "2013-01-15", 1 - frame["label"])
    assert judge(frame)["lower"] > 0.1


def test_avoidable_nothing_planted_is_quiet():
    """Days differ, and none of forty windows of one or four weeks raises: at one in a hundred, two do in 6 %."""
    found = [judge(rows(100 + seed, days=BEFORE + length)) for seed in range(20) for length in (7, 28)]
    assert sum(one["lower"] > MARGIN for one in found) <= 1
    assert np.mean([one["loss"] for one in found]) < MARGIN


def test_avoidable_hard_days_alone_are_no_loss_to_avoid():
    """Twice as hard to foretell, as no model could know: the loss has risen, and nothing of it could be saved."""
    frame = rows(2)
    hard = frame["time"] >= "2013-01-15"
    coin = np.random.default_rng(5).random(len(frame)) < 0.4
    frame.loc[hard, "probability"] = 0.4
    frame.loc[hard, "label"] = coin[hard].astype(int)
    losses = log_loss_rows(frame["label"].astype(float), frame["probability"])
    assert losses[hard].mean() > losses[~hard].mean() + 0.03
    assert judge(frame)["lower"] < MARGIN


def test_avoidable_a_week_is_judged_by_what_was_known_before_it():
    """What is planted in the last week alone cannot be learnt in time, however often its rows say so."""
    frame = rows(3, days=BEFORE + 7, carrier=1.5)
    assert judge(frame)["loss"] < 0
    frame["label"] = frame["label"].where(frame["time"] < "2013-01-15")
    assert judge(rows(3, days=BEFORE + 14, carrier=1.5), BEFORE + 7)["lower"] > MARGIN


@pytest.mark.parametrize(
    ("frame", "start"),
    [(rows(4, days=BEFORE + 6), BEFORE), (rows(4, days=8), 0), (rows(4, days=9), 4)],
    ids=["few days", "nothing before", "few rows before"],
)
def test_avoidable_too_few_days_or_rows_before_them_are_not_judged(frame, start):
    found = judge(frame, start)
    assert found["measured"] is False
    assert found["words"].startswith("avoidable loss not judged: ")


def test_avoidable_order_of_rows_does_not_matter():
    frame = rows(1, wind=0.8)
    assert judge(frame.sample(frac=1, random_state=1))["loss"] == pytest.approx(judge(frame)["loss"], abs=1e-5)
