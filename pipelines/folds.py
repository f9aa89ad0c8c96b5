"""Folds: the rows that `prepare` cut, as origins of time one after another; `ballast tune` measures settings there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines import rows
from pipelines.errors import BallastError, DataRejected
from pipelines.files import read_json
from pipelines.fit import Window
from pipelines.model import Transform
from pipelines.schema import Features


def read(data: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows of the train and the validation window in the order of time, and the schema."""
    wanted = [data / "schema.json", data / "train.parquet", data / "validation.parquet"]
    if lacking := [path.name for path in wanted if not path.exists()]:
        raise BallastError(f"{data} has no {', '.join(lacking)}. Make the rows first: dvc repro prepare")
    frame, schema = pd.concat([rows.read(path) for path in wanted[1:]], ignore_index=True), read_json(wanted[0])
    for name in schema["features"]["numeric"]:
        if infinite := int(np.isinf(frame[name]).sum()):
            raise DataRejected(f"`{name}` is infinite in {infinite} rows. Guard it in prepare.sql.")
    return frame.sort_values(["time", "key"], kind="stable", ignore_index=True), schema


@dataclass(frozen=True)
class Fold:
    """One origin of time: what lies before it trains, the days from it on validate."""

    start: datetime
    end: datetime
    train: pd.DataFrame
    validation: pd.DataFrame

    @property
    def name(self) -> str:
        """The days that validate."""
        return f"{self.start:%Y-%m-%d} → {self.end:%Y-%m-%d}"


@dataclass(frozen=True)
class Encoded:
    """A fold as a candidate takes it; its transform knows the fold's train part only."""

    train: Window
    validation: Window
    transform: Transform


def cut(frame: pd.DataFrame, last: Mapping[str, str], count: int) -> list[Fold]:
    """Folds in the order of time, each validating as many days as the window ``last``, with which the last one ends.

    Raises DataRejected where the first would have fewer days to train on than to validate, or a part one class only.
    """
    end = datetime.fromisoformat(last["end"])
    days = end - datetime.fromisoformat(last["start"])
    first = frame["time"].min().normalize().to_pydatetime()
    if count < 1 or first > end - (count + 1) * days:
        raise DataRejected(
            f"{count} folds of {days.days} days, and as many days before them to train on, ask for "
            f"{(count + 1) * days.days} days of rows before {end:%Y-%m-%d} (found {(end - first).days}). "
            f"Take fewer --folds, shorten `prepare.validation_days`, or land earlier data."
        )
    folds = [_fold(frame, end - number * days, days) for number in range(count, 0, -1)]
    for fold in folds:
        for part in (fold.train, fold.validation):
            _check_classes(fold, part)
    return folds


def _fold(frame: pd.DataFrame, start: datetime, days: timedelta) -> Fold:
    time, end = frame["time"], start + days
    return Fold(start, end, frame[time < start], frame[(time >= start) & (time < end)])


def _check_classes(fold: Fold, part: pd.DataFrame) -> None:
    if part["label"].nunique() < 2:
        where = "validation" if part is fold.validation else "train"
        found = f"only label {part['label'].iloc[0]} in {len(part)} rows" if len(part) else "no row"
        raise DataRejected(
            f"The {where} part of the fold {fold.name} needs rows of both classes (found {found}). Take fewer --folds."
        )


def encode(fold: Fold, features: Features) -> Encoded:
    """Fit the transform to the fold's train part, and make both parts matrices."""
    transform = Transform.fit(fold.train, features)
    train, validation = (Window.of(part, transform) for part in (fold.train, fold.validation))
    return Encoded(train, validation, transform)
