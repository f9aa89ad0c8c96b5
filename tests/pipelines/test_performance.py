"""Realised performance: frames whose answers are known by construction, labels that come late, days that differ."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from pipelines.performance import PerformanceParams, Window, by_window, performance_verdict

PARAMS = PerformanceParams(
    earlier_windows=2, min_rows=100, min_days=7, standard_errors=2, confidence=0.95, calibration_bins=10, seed=1
)
FEBRUARY = Window("2013-02-01", "2013-03-01", 3)
MARCH = Window("2013-03-01", "2013-04-01", 3)
APRIL = Window("2013-04-01", "2013-05-01", 3)


def rows(seed: int, start: str, count: int = 1500) -> pd.DataFrame:
    """Calibrated predictions over ten days."""
    random = np.random.default_rng(seed)
    probability = random.beta(2, 6, count)
    return pd.DataFrame(
        {
            "time": pd.date_range(start, periods=count, freq=f"{10 * 86400 // count}s", tz="UTC"),
            "label": pd.array((random.random(count) < probability).astype(int), dtype="Int8"),
            "probability": probability,
        }
    )


REFERENCE = rows(2, "2013-02-01")


def daily(frame: pd.DataFrame) -> dict[Window, pd.DataFrame]:
    """A window for each of its days."""
    by_day = dict(tuple(frame.groupby(frame["time"].dt.date)))
    return {Window(str(day), str(day + timedelta(days=1)), 3): part for day, part in by_day.items()}


def judge(batch: pd.DataFrame, *earlier: tuple[Window, pd.DataFrame], reference: pd.DataFrame = REFERENCE) -> Any:
    windows = dict([*earlier, (APRIL, batch)])
    return performance_verdict(windows, APRIL, reference, "2013-04-01", PARAMS)


def unlabelled(frame: pd.DataFrame, known: int = 0) -> pd.DataFrame:
    return frame.assign(label=frame["label"].where(frame.index < known))


def by_days(random: np.random.Generator, days: int, effect: float) -> pd.DataFrame:
    """A hundred and twenty rows a day; each day's labels keep to odds of its own, which no prediction knows."""
    day = np.repeat(np.arange(days), 120)
    odds = random.normal(-1, 1, len(day))
    chance = expit(odds + random.normal(scale=effect, size=days)[day])
    time = pd.Timestamp("2013-01-01", tz="UTC") + pd.to_timedelta(day, unit="D")
    label = (random.random(len(day)) < chance).astype("int8")
    return pd.DataFrame({"time": time, "label": label, "probability": expit(odds)})


def test_performance_flipped_labels_are_worse():
    batch = rows(3, "2013-04-01")
    batch["label"] = 1 - batch["label"]
    found = judge(batch)
    assert found["worse"] is True
    assert found["rise"] == pytest.approx(found["log_loss"] - found["reference_log_loss"])
    assert found["rise"] > 10 * found["standard_error"]
    assert found["auc"] < 0.5 < found["reference_auc"]
    assert found["words"].startswith("model WORSE: log loss 1.")
    assert (found["present"], found["start"], found["end"]) == (True, "2013-04-01", "2013-05-01")


def test_performance_noise_is_not_worse():
    """Of ten windows of the same process at most two may look worse at two standard errors (binomial: 0.998)."""
    assert sum(judge(rows(10 + i, "2013-04-01"))["worse"] for i in range(10)) <= 2


def test_performance_two_bad_days_of_ten_are_uncertain():
    """They cost much, but days hang together: by rows the same rise would be certain many times over."""
    batch = rows(3, "2013-04-01")
    batch.loc[batch["time"] < "2013-04-03", "label"] = 1
    found = judge(batch)
    by_row = np.sqrt(2 * 0.5**2 / len(batch))
    assert found["rise"] > 2 * found["standard_errors"] * by_row
    assert found["worse"] is False
    assert found["words"].startswith("model not certainly worse")


def test_performance_two_standard_errors_cover_what_they_should_where_days_differ():
    """Nothing has changed but the days: 93 % by Student's t of the reference's 13 degrees; 24 to 30 of 30 by luck."""
    random = np.random.default_rng(1)
    found = [judge(by_days(random, 30, 1.0), reference=by_days(random, 14, 1.0)) for _ in range(30)]
    rise, error = (np.array([one[name] for one in found]) for name in ("rise", "standard_error"))
    assert 24 <= (np.abs(rise) < 2 * error).sum() <= 30
    by_row = 0.6 * np.hypot(1 / np.sqrt(3600), 1 / np.sqrt(1680))
    assert (np.abs(rise) < 2 * by_row).sum() < 24


def test_performance_unlabelled_rows_are_left_out():
    found = judge(unlabelled(rows(3, "2013-04-01"), known=100))
    assert (found["measured"], found["labelled_rows"]) == (True, 100)


def test_performance_too_few_labels_are_not_judged():
    found = judge(unlabelled(rows(3, "2013-04-01"), known=99))
    assert (found["measured"], found["labelled_rows"]) == (False, 99)
    assert found["words"] == "model not judged: 99 labelled rows, 100 needed"


def test_performance_reference_without_labels_is_not_judged():
    assert judge(rows(3, "2013-04-01"), reference=unlabelled(REFERENCE))["measured"] is False


def test_performance_one_day_is_not_judged():
    found = judge(rows(3, "2013-04-01", 1500).head(149))
    assert (found["worse"], found["standard_error"]) == (None, None)
    assert found["words"].startswith("model not judged: log loss")
    assert (found["auc"] is None, found["auc_standard_error"]) == (False, None)


def test_performance_one_class_has_no_auc():
    found = judge(rows(3, "2013-04-01").assign(label=0))
    assert (found["auc"], found["auc_standard_error"]) == (None, None)


def test_performance_window_without_labels_yet_is_judged_by_the_newest_that_has_them():
    worse = rows(4, "2013-03-01")
    worse["label"] = 1 - worse["label"]
    found = judge(unlabelled(rows(3, "2013-04-01")), (FEBRUARY, rows(5, "2013-02-01")), (MARCH, worse))
    assert (found["measured"], found["worse"], found["labelled_rows"]) == (True, True, 1500)
    assert (found["present"], found["start"], found["end"]) == (False, "2013-03-01", "2013-04-01")
    assert found["words"].endswith(", from 2013-03-01 to 2013-04-01, as this window has 0 labels yet")


@pytest.mark.parametrize(("count", "worse"), [(6, None), (7, True), (10, True)])
def test_performance_days_are_judged_together_once_there_are_enough(count, worse):
    """The newest seven of them, and a rise of a day is not judged alone."""
    frame = rows(3, "2013-04-01")
    frame["label"] = 1 - frame["label"]
    windows = dict(list(daily(frame).items())[:count])
    found = performance_verdict(windows, list(windows)[-1], REFERENCE, "2013-04-20", PARAMS)
    assert (found["worse"], found["standard_error"] is None) == (worse, worse is None)
    assert (found["days"], found["labelled_rows"]) == (min(count, 7), 150 * min(count, 7))
    assert (found["start"], found["end"]) == (f"2013-04-{max(count - 6, 1):02}", f"2013-04-{count + 1:02}")


def test_performance_another_champions_window_does_not_judge_this_one():
    found = judge(unlabelled(rows(3, "2013-04-01")), (MARCH._replace(version=2), rows(4, "2013-03-01")))
    assert found["measured"] is False
    assert found["windows"][0]["log_loss"] == pytest.approx(0.5, abs=0.1)


def test_performance_windows_are_listed_with_the_labels_of_now():
    found = judge(unlabelled(rows(3, "2013-04-01"), known=700), (MARCH, rows(4, "2013-03-01")))
    march, april = found["windows"]
    assert (march["start"], march["labelled_rows"], march["complete"]) == ("2013-03-01", 1500, True)
    assert (april["rows"], april["labelled_rows"], april["complete"]) == (1500, 700, False)
    assert march["log_loss"] < found["log_loss"] < april["log_loss"]  # April's five days are judged with March's ten
    assert (found["present"], found["start"], found["days"]) == (False, "2013-03-01", 15)
    assert 0 < march["standard_error"] < found["standard_error"]  # of the loss, and of its rise
    assert 0 < april["auc_standard_error"] < 0.1
    nothing = judge(unlabelled(rows(3, "2013-04-01")))["windows"][0]
    assert (nothing["labelled_rows"], nothing["log_loss"], nothing["standard_error"]) == (0, None, None)


def test_by_window_tells_batches_and_versions_apart_oldest_first():
    days = {"start": date(2013, 4, 1), "end": date(2013, 5, 1)}
    parts = [
        rows(1, "2013-04-01", 10).assign(version=4, **days),
        rows(1, "2013-04-01", 10).assign(version=3, **days),
        rows(1, "2013-03-01", 5).assign(version=3, start=date(2013, 3, 1), end=date(2013, 4, 1)),
    ]
    found = by_window(pd.concat(parts))
    assert {window: len(frame) for window, frame in found.items()} == {
        MARCH: 5,
        APRIL: 10,
        APRIL._replace(version=4): 10,
    }
    assert list(found) == [MARCH, APRIL, APRIL._replace(version=4)]
