"""Columns of a batch against a reference, by Evidently; the only module that imports it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from pipelines.files import whole_file
from pipelines.params import Params

# Distances only: a p-value falls with every row, so that a large batch would flag trifles.
Method = Literal["wasserstein", "jensenshannon", "hellinger", "psi", "kl_div"]

MISSING = "(missing)"


class Rule(Params):
    """How one column is compared: by which distance, and below how much of it a change is a trifle."""

    method: Method
    floor: float = Field(gt=0)


@dataclass(frozen=True)
class Column:
    """One column of the batch and of its reference, each indexed by the days of its rows."""

    name: str
    numeric: bool
    rule: Rule
    batch: pd.Series
    reference: pd.Series

    def values(self, side: pd.Series) -> pd.Series:
        """The values that are compared: a missing category is a category, a missing number is left out."""
        return side.dropna() if self.numeric else side.fillna(MISSING)


@dataclass(frozen=True)
class Finding:
    """What came of one column. ``moved`` is None where it could not be judged."""

    moved: bool | None
    score: float | None
    threshold: float | None
    words: str


def column(name: str, numeric: bool, rule: Rule, batch: pd.DataFrame, reference: pd.DataFrame) -> Column:
    """One column of both frames, typed; where a frame has no such column, it is empty there."""
    now, then = (_typed(frame, name, numeric).set_axis(frame["time"].dt.floor("D")) for frame in (batch, reference))
    return Column(name, numeric, rule, now, then)


def _typed(frame: pd.DataFrame, name: str, numeric: bool) -> pd.Series:
    values = frame[name] if name in frame else pd.Series(np.nan, index=frame.index)
    if not numeric:
        return values.astype("object")
    return pd.to_numeric(values).astype("float64").replace([np.inf, -np.inf], np.nan)


def compare(column: Column, min_rows: int, threshold: Callable[[Column], float | None]) -> Finding:
    """Judge a column by Evidently's distance of all its rows, and the ``threshold`` that it is asked for.

    A column without a single value in the batch counts as moved where the reference has values. Fewer than
    ``min_rows`` values on a side: not measured, which says neither yes nor no.
    """
    if found := _without_score(column, min_rows):
        return found
    bound = threshold(column)
    if bound is None:
        return Finding(None, None, None, "not measured: too few days in the reference")
    score = distance(column)
    if not math.isfinite(score):
        return Finding(None, None, None, f"not measured: {column.rule.method} gave no number")
    return Finding(score >= bound, score, bound, _words(column, score, bound))


def distance(column: Column) -> float:
    """Evidently's own distance between the two sides, on every row."""
    with _quiet():
        from evidently.legacy.calculations.stattests import get_stattest
        from evidently.legacy.core import ColumnType

        kind = ColumnType.Numerical if column.numeric else ColumnType.Categorical
        # Its functions write into what they get.
        then, now = (column.values(side).reset_index(drop=True) for side in (column.reference, column.batch))
        score = get_stattest(then, now, kind, column.rule.method)(then, now, kind, None).drift_score
    return float(f"{score:.12g}")  # it sums in the order of a set: the last bits would differ between equal runs


def keep(run: Any, out: Path) -> None:
    """Write Evidently's report.html and report.json, whole."""
    with whole_file(out / "report.html") as part, _quiet():
        run.save_html(str(part))
    with whole_file(out / "report.json") as part:
        part.write_text(run.json() + "\n", encoding="utf-8")


def _without_score(column: Column, min_rows: int) -> Finding | None:
    """The finding of a column that cannot be measured; None for one that can."""
    now, then = int(column.batch.notna().sum()), int(column.reference.notna().sum())
    if then == 0:
        return Finding(None, None, None, "not measured: empty in the reference")
    if now == 0:
        return Finding(True, None, None, "empty in the batch: not one value")
    if min(now, then) < min_rows:
        side, count = ("batch", now) if now < min_rows else ("reference", then)
        return Finding(None, None, None, f"not measured: {count:,} values in the {side}, {min_rows:,} needed")
    return None


def _words(column: Column, score: float, bound: float) -> str:
    """``1.31 sd, bound 0.70``: standard deviations are what wasserstein is measured in."""
    unit = " sd" if column.rule.method == "wasserstein" else ""
    return f"{score:.2f}{unit}, bound {bound:.2f}"


def report(columns: Sequence[Column], thresholds: Sequence[float]) -> Any:
    """Evidently's run: one ValueDrift per column, nothing left to its defaults."""
    with _quiet():
        from evidently import DataDefinition, Dataset, Report
        from evidently.metrics import ValueDrift

        definition = DataDefinition(
            numerical_columns=[column.name for column in columns if column.numeric],
            categorical_columns=[column.name for column in columns if not column.numeric],
        )
        # Side by side: it compares column by column, so each may have rows of its own.
        now, then = (
            pd.concat({column.name: column.values(side(column)).reset_index(drop=True) for column in columns}, axis=1)
            for side in (attrgetter("batch"), attrgetter("reference"))
        )
        tests = [
            ValueDrift(column=column.name, method=column.rule.method, threshold=bound)
            for column, bound in zip(columns, thresholds, strict=True)
        ]
        sides = [Dataset.from_pandas(frame, data_definition=definition) for frame in (now, then)]
        return Report(tests, include_tests=True).run(*sides)


@contextmanager
def _quiet() -> Iterator[None]:
    """Evidently takes two to three seconds to import, and brings a web server, nltk and deprecated calls along."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
