"""Columns of a batch against a reference, by Evidently; the only module that imports it."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
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
    """How one column is compared: it has moved where the distance reaches the threshold."""

    method: Method
    threshold: float = Field(gt=0)


@dataclass(frozen=True)
class Column:
    """One column of the batch and of its reference; the two may have different numbers of rows."""

    name: str
    numeric: bool
    rule: Rule
    batch: pd.Series
    reference: pd.Series

    def shown(self, side: pd.Series) -> pd.Series:
        """The values as Evidently gets them: a missing category is a category, a missing number is left out."""
        return side if self.numeric else side.fillna(MISSING)


@dataclass(frozen=True)
class Finding:
    """What came of one column. ``moved`` is None where it could not be judged."""

    moved: bool | None
    score: float | None
    words: str


def column(name: str, numeric: bool, rule: Rule, batch: pd.DataFrame, reference: pd.DataFrame) -> Column:
    """One column of both frames, typed; where a frame has no such column, it is empty there."""
    sides = (frame[name] if name in frame else pd.Series(np.nan, index=frame.index) for frame in (batch, reference))
    if numeric:
        now, then = (pd.to_numeric(side).astype("float64").replace([np.inf, -np.inf], np.nan) for side in sides)
    else:
        now, then = (side.astype("object") for side in sides)
    return Column(name, numeric, rule, now.reset_index(drop=True), then.reset_index(drop=True))


def compare(columns: list[Column], min_rows: int) -> tuple[dict[str, Finding], Any | None]:
    """Judge each column; also Evidently's run over those that could be measured, None if there were none.

    A column without a single value in the batch counts as moved where the reference has values. Fewer than
    ``min_rows`` values on a side: not measured, which says neither yes nor no.
    """
    findings = {column.name: _without_score(column, min_rows) for column in columns}
    measurable = [column for column in columns if findings[column.name] is None]
    run = _evidently(measurable) if measurable else None
    scores = {metric["config"]["column"]: metric["value"] for metric in run.dict()["metrics"]} if run else {}
    return {column.name: findings[column.name] or _judge(column.rule, scores[column.name]) for column in columns}, run


def keep(run: Any, out: Path) -> None:
    """Write Evidently's report.html and report.json, whole."""
    with whole_file(out / "report.html") as part, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.save_html(str(part))
    with whole_file(out / "report.json") as part:
        part.write_text(run.json() + "\n", encoding="utf-8")


def _without_score(column: Column, min_rows: int) -> Finding | None:
    """The finding of a column that cannot be measured; None for one that can."""
    now, then = int(column.batch.notna().sum()), int(column.reference.notna().sum())
    if then == 0:
        return Finding(None, None, "not measured: empty in the reference")
    if now == 0:
        return Finding(True, None, "empty in the batch: not one value")
    if min(now, then) < min_rows:
        side, count = ("batch", now) if now < min_rows else ("reference", then)
        return Finding(None, None, f"not measured: {count:,} values in the {side}, {min_rows:,} needed")
    return None


def _judge(rule: Rule, value: float) -> Finding:
    score = float(value)  # Evidently gives numpy's
    if not math.isfinite(score):
        return Finding(None, None, f"not measured: {rule.method} gave no number")
    return Finding(score >= rule.threshold, score, f"{score:.2f}, bound {rule.threshold:.2f}")


def _evidently(columns: list[Column]) -> Any:
    """Evidently's run: one ValueDrift per column, nothing left to its defaults.

    Its import takes two to three seconds, and brings a web server, nltk and deprecated calls along.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from evidently import DataDefinition, Dataset, Report
        from evidently.metrics import ValueDrift

        definition = DataDefinition(
            numerical_columns=[column.name for column in columns if column.numeric],
            categorical_columns=[column.name for column in columns if not column.numeric],
        )
        # Side by side: it compares column by column, so each may have rows of its own.
        now = pd.concat({column.name: column.shown(column.batch) for column in columns}, axis=1)
        then = pd.concat({column.name: column.shown(column.reference) for column in columns}, axis=1)
        tests = [ValueDrift(column=column.name, **column.rule.model_dump()) for column in columns]
        sides = [Dataset.from_pandas(frame, data_definition=definition) for frame in (now, then)]
        return Report(tests, include_tests=True).run(*sides)
