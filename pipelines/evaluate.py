"""Evaluate: what the challenger is worth on the test window, overall and by slice, with its curves."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, PositiveInt

from pipelines import metrics, rows
from pipelines.errors import ParamsError, exit_with
from pipelines.files import whole_file, write_json
from pipelines.metrics import Floats
from pipelines.params import Params, load
from pipelines.stage import finish, options

DIGITS = 6  # of what is written: more would be noise in a diff
OTHERS = "(others)"  # the slice of all values that have too few rows for one of their own
SLICE_COLUMNS = [
    *("column", "value", "rows", "label_rate", "roc_auc", "log_loss", "brier"),
    *("pr_auc", "f1", "precision", "recall", "calibration_error"),
]


class EvaluateParams(Params):
    """Where a probability becomes a decision, and how finely to look."""

    threshold: Annotated[float, Field(gt=0, lt=1)]
    slices: list[str]
    min_slice_rows: PositiveInt
    calibration_bins: Annotated[int, Field(ge=2)]


def evaluate(data: Path, model: Path, out: Path, params: EvaluateParams) -> dict[str, Any]:
    """Score the prepared rows of ``data`` with the model; write metrics, slices and curves; return the result.

    Raises BallastError where the rows are of one class only: prepare lets no such window through.
    """
    from pipelines.model import load as load_model  # torch: not for those who only want the parameters

    window, challenger = rows.read(data), load_model(model)
    label, probability = window["label"].to_numpy(), challenger.predict(window)
    tables = {
        "slices": slices(window, probability, params),
        "calibration": metrics.calibration_curve(label, probability, params.calibration_bins),
        "roc": metrics.roc_curve(label, probability),
        "precision_recall": metrics.precision_recall_curve(label, probability),
    }
    for name, table in tables.items():
        _write_csv(out / f"{name}.csv", table)
    overall = _measure(label, probability, params)
    write_json(out / "metrics.json", overall)
    return {"summary": _summary(overall), "digest": challenger.digest, "metrics": overall}


def slices(window: pd.DataFrame, probability: Floats, params: EvaluateParams) -> pd.DataFrame:
    """The metrics of each value of each sliced column; values with few rows together, as ``(others)``.

    A metric that the rows of a slice do not define (the AUC of one class) is NaN, and empty in the file.
    """
    measured = [
        {"column": column, "value": value, **_measure(window["label"][mask], probability[mask], params)}
        for column in params.slices
        for value, mask in _masks(window, column, params.min_slice_rows)
    ]
    return pd.DataFrame(measured, columns=SLICE_COLUMNS)


def _masks(window: pd.DataFrame, column: str, min_rows: int) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """Each value with at least ``min_rows`` rows, the most frequent first, and last the rows of all others."""
    features = [name for name in window.columns if name not in rows.HEAD]
    if column not in features:
        near = get_close_matches(column, features, n=1)
        remedy = f"did you mean `{near[0]}`?" if near else f"the features are {', '.join(features)}."
        raise ParamsError(f"`evaluate.slices` names `{column}`, which is no feature of the rows; {remedy}")
    values = window[column].astype("str").fillna("(none)")
    counts = values.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    shown = counts.index[counts >= min_rows]
    yield from ((value, (values == value).to_numpy()) for value in shown)
    if len(shown) < len(counts):
        yield OTHERS, (~values.isin(shown)).to_numpy()


def _measure(label: npt.ArrayLike, probability: Floats, params: EvaluateParams) -> dict[str, float]:
    measured = metrics.binary(label, probability, params.threshold, params.calibration_bins)
    return {name: round(value, DIGITS) for name, value in measured.items()}


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    with whole_file(path) as part:
        frame.round(DIGITS).to_csv(part, index=False, lineterminator="\n")


def _summary(measured: dict[str, float]) -> str:
    return f"test: AUC {measured['roc_auc']:.3f} · log loss {measured['log_loss']:.3f} · Brier {measured['brier']:.3f}"


def main() -> None:
    """Run the stage as dvc.yaml's command does."""
    args = options("evaluate", "data", "model", "out")
    result = evaluate(args.data, args.model, args.out, load(args.params, "evaluate", EvaluateParams))
    finish("evaluate", args.out, result)


if __name__ == "__main__":
    exit_with(main)
