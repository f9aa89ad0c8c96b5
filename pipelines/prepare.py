"""Prepare: one row per prediction, with what was known at its time; windows cut by time.

::

    ── train ──────────────┬─ validation ─┬─ test ─┬─ labels not known yet ─┤ as-of date
                                                   └ as-of date − label_delay_days

The SQL says what a row is and what was known when; this module cuts, checks and writes the windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import NonNegativeInt, PositiveInt, model_validator

from pipelines import rows
from pipelines.errors import DataRejected, ParamsError, exit_with
from pipelines.files import whole_file, write_json
from pipelines.params import Params, as_of, load
from pipelines.schema import Declared, Features, Table
from pipelines.stage import finish, options

Window = tuple[datetime, datetime]  # start, end (exclusive)


class PrepareParams(Params):
    """The windows, in days of 24 hours from midnight UTC, and the features of a row."""

    label_delay_days: NonNegativeInt
    train_days: PositiveInt | None = None
    validation_days: PositiveInt
    test_days: PositiveInt
    features: Features

    @model_validator(mode="after")
    def _features_are_features(self) -> Self:
        names = self.features.names
        if wrong := sorted({name for name in names if names.count(name) > 1 or name in rows.HEAD}):
            raise ValueError(f"features must be named once and be none of {', '.join(rows.HEAD)}: {', '.join(wrong)}")
        if not names:
            raise ValueError("a model needs a feature at least")
        return self


def prepare(
    tables: Path,
    quarantine: Path,
    sql: Path,
    out: Path,
    params: PrepareParams,
    declared: Mapping[str, Table],
    as_of: date,
) -> dict[str, Any]:
    """Write train.parquet, validation.parquet, test.parquet and schema.json; return the stage's result.

    Raises DataRejected where a window is empty, shorter than asked or of one class only.
    """
    selected = rows.select(tables, quarantine, sql.read_text(encoding="utf-8"), declared)
    _check_features(selected, params.features)
    windows = cut(selected["time"], params, as_of)
    frames = {name: _within(selected, window) for name, window in windows.items()}
    labelled = {name: frame[frame["label"].notna()] for name, frame in frames.items()}
    for name, frame in labelled.items():
        _check_window(name, frame, windows[name])
    for name, frame in labelled.items():
        _write(out / f"{name}.parquet", frame, params.features)
    write_json(out / "schema.json", _schema(labelled, windows, params, declared, as_of))
    return _result(labelled, sum(map(len, frames.values())))


def cut(times: pd.Series[pd.Timestamp], params: PrepareParams, as_of: date) -> dict[str, Window]:
    """The windows before ``as_of``: the last rows whose labels are known are the test window.

    Raises DataRejected where the rows do not reach back as far as the windows do.
    """
    end = datetime.combine(as_of, time(), tzinfo=UTC) - timedelta(days=params.label_delay_days)
    test = end - timedelta(days=params.test_days)
    validation = test - timedelta(days=params.validation_days)
    first = datetime.combine(times.min().date(), time(), tzinfo=UTC) if len(times) else end
    train = validation - timedelta(days=params.train_days) if params.train_days else first
    if first > train or train >= validation:
        asked = (end - train).days if params.train_days else (end - validation).days + 1
        raise DataRejected(
            f"The windows ask for {asked} days of rows before {end:%Y-%m-%d} (found {max(0, (end - first).days)}). "
            f"Land earlier data, take a later as-of date, or shorten the windows in `prepare`."
        )
    return {"train": (train, validation), "validation": (validation, test), "test": (test, end)}


def _within(frame: pd.DataFrame, window: Window) -> pd.DataFrame:
    return frame[frame["time"].between(*window, inclusive="left")]


def _check_features(frame: pd.DataFrame, features: Features) -> None:
    found = {name: "numeric" if frame[name].dtype == "float64" else "categorical" for name in frame.columns[3:]}
    for kind, names in (("numeric", features.numeric), ("categorical", features.categorical)):
        for name in names:
            if found.get(name) != kind:
                raise ParamsError(
                    f"`prepare.features.{kind}` names `{name}`, which the SQL gives as {found.get(name, 'no column')}. "
                    f"Its {kind} columns are {', '.join(n for n in found if found[n] == kind) or 'none'}."
                )


def _check_window(name: str, frame: pd.DataFrame, window: Window) -> None:
    start, end = (f"{at:%Y-%m-%d}" for at in window)
    if frame.empty:
        raise DataRejected(
            f"The {name} window, {start} to {end}, holds no row with a label. "
            f"Land the missing data, or change the windows in `prepare`."
        )
    if frame["label"].nunique() == 1:
        raise DataRejected(
            f"The {name} window, {start} to {end}, holds one class only (found label {frame['label'].iloc[0]} in all "
            f"{len(frame)} rows). Check the label of the SQL, or lengthen the window in `prepare`."
        )


def _write(path: Path, frame: pd.DataFrame, features: Features) -> None:
    """Equal frames give equal bytes: explicit types, no index, and nothing of pandas in the metadata."""
    types: dict[str, pa.DataType] = {name: pa.float64() for name in features.numeric}
    types |= {name: pa.string() for name in features.categorical}
    schema = pa.schema(rows.HEAD | types)
    table = pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
    with whole_file(path) as part:
        pq.write_table(table.replace_schema_metadata(None), part, compression="zstd")


def _schema(
    frames: Mapping[str, pd.DataFrame],
    windows: Mapping[str, Window],
    params: PrepareParams,
    declared: Mapping[str, Table],
    as_of: date,
) -> dict[str, Any]:
    return {
        "as_of": as_of.isoformat(),
        "label_delay_days": params.label_delay_days,
        "features": params.features.model_dump(),
        "tables": {name: table.model_dump() for name, table in declared.items()},
        "windows": {
            name: {
                "start": start.isoformat(),
                "end": end.isoformat(),
                "rows": len(frames[name]),
                "label_rate": float(frames[name]["label"].mean()),
            }
            for name, (start, end) in windows.items()
        },
    }


def _result(frames: Mapping[str, pd.DataFrame], selected: int) -> dict[str, Any]:
    counts = {name: len(frame) for name, frame in frames.items()}
    summary = " · ".join(f"{name} {count:,}" for name, count in counts.items()) + " rows"
    return {"summary": summary, "rows": counts, "rows_without_label": selected - sum(counts.values())}


def main() -> None:
    """Run the stage as dvc.yaml's command does."""
    args = options("prepare", "tables", "quarantine", "sql", "out")
    params = load(args.params, "prepare", PrepareParams)
    declared = load(args.params, "land", Declared).tables
    result = prepare(args.tables, args.quarantine, args.sql, args.out, params, declared, as_of(args.params))
    finish("prepare", args.out, result)


if __name__ == "__main__":
    exit_with(main)
