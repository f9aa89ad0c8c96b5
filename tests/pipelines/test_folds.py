"""The folds: their order in time, what each may know, and what cannot be cut."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from conftest import day

from pipelines.errors import DataRejected
from pipelines.folds import cut, encode
from pipelines.schema import Features


def rows(days: int = 53, a_day: int = 12) -> pd.DataFrame:
    """Rows of both classes, in no order of time."""
    random = np.random.default_rng(0)
    number = random.permutation(days * a_day)
    time = pd.to_datetime([day(0)] * len(number)).as_unit("us") + pd.to_timedelta(number * 24 // a_day, unit="h")
    x, c = random.normal(size=len(number)), np.where(random.random(len(number)) < 0.3, "b", "a")
    return pd.DataFrame({"key": number.astype("str"), "time": time, "label": (x > 0).astype("int8"), "x": x, "c": c})


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_folds_train_on_the_past_and_validate_on_successive_days(count: int) -> None:
    frame = rows()
    last = {"start": day(46).isoformat(), "end": day(53).isoformat()}
    folds = cut(frame, last, count)
    assert len(folds) == count
    assert folds[-1].end == day(53)
    for fold, after in pairwise(folds):
        assert fold.end == after.start
    for fold in folds:
        assert fold.end - fold.start == timedelta(days=7)
        assert fold.train["time"].max() < fold.start <= fold.validation["time"].min()
        assert fold.validation["time"].max() < fold.end
        assert set(fold.train["key"]).isdisjoint(fold.validation["key"])
        assert len(fold.train) == (frame["time"] < fold.start).sum()
        assert len(fold.validation) == 7 * 12


def test_folds_beyond_the_data_are_refused() -> None:
    last = {"start": day(46).isoformat(), "end": day(53).isoformat()}
    with pytest.raises(DataRejected, match=r"7 folds of 7 days.* ask for 56 days .*found 53.*fewer --folds"):
        cut(rows(), last, 7)


def test_folds_with_one_class_are_refused() -> None:
    last = {"start": day(46).isoformat(), "end": day(53).isoformat()}
    frame = rows()
    frame.loc[frame["time"].between(day(39), day(46), inclusive="left"), "label"] = 0
    with pytest.raises(DataRejected, match=r"validation part of the fold 2013-02-09 → 2013-02-16 .*only label 0 in 84"):
        cut(frame, last, 3)
    frame.loc[frame["time"] < day(32), "label"] = 1
    with pytest.raises(DataRejected, match=r"train part of the fold 2013-02-02 → 2013-02-09 .*only label 1"):
        cut(frame, last, 3)


def test_fold_is_encoded_by_its_own_past() -> None:
    frame = rows()
    frame.loc[frame["time"] >= day(46), "x"] += 100.0
    [first, last] = cut(frame, {"start": day(46).isoformat(), "end": day(53).isoformat()}, 2)
    for fold in (first, last):
        [number] = encode(fold, Features(numeric=["x"], categorical=["c"])).transform.numeric
        assert number.mean == pytest.approx(fold.train["x"].mean())
