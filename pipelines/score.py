"""Score a batch with the champion: its own preparation, its own windows beside it, and the labels known by now.

What is predicted goes to the prediction log, and what was logged before meets the labels that have come since.
"""

from __future__ import annotations

import argparse
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import places, predictions, registry, stage
from pipelines.errors import BallastError, DataRejected, exit_with
from pipelines.files import whole_file
from pipelines.model import Model, load
from pipelines.params import Params, as_of
from pipelines.params import load as load_params
from pipelines.performance import PerformanceParams
from pipelines.state import State


class ScoreParams(Params):
    """The ``score`` section of params.yaml: nothing to set, the champion's own schema says how it is scored."""


def score(
    champion: Model,
    version: int,
    tables: Path,
    quarantine: Path | None,
    start: date,
    end: date,
    out: Path,
    log: Path,
    earlier_windows: int,
) -> dict[str, Any]:
    """Write predictions.parquet (rows with start <= time < end) and reference.parquet (train and test window).

    The predictions are logged in ``log``; logged.parquet is what it has of this batch and the ``earlier_windows``
    before, with the labels and features of now. A label is null where it could not be known at ``end``; so is the
    probability of train rows, which the champion has seen: nothing may be compared with it. Raises DataRejected
    where the interval holds no row.
    """
    rows = champion.prepare(tables, quarantine)
    labels_until = end - timedelta(days=champion.schema["label_delay_days"])
    rows.loc[rows["time"] >= _midnight(labels_until), "label"] = pd.NA
    batch = _between(rows, _midnight(start), _midnight(end))
    if batch.empty:
        raise DataRejected(
            f"There is no row to score from {start} to {end} (found {_extent(rows)}). "
            "Land the missing data, or ask for another interval."
        )
    windows = champion.schema["windows"]
    train, test = (
        _between(rows, pd.Timestamp(windows[name]["start"]), pd.Timestamp(windows[name]["end"])).assign(window=name)
        for name in ("train", "test")
    )
    test, batch = (frame.assign(probability=champion.predict(frame)) for frame in (test, batch))
    columns = ["key", "time", "label", "probability", *champion.features.names]
    _write(out / "predictions.parquet", batch[columns])
    _write(out / "reference.parquet", pd.concat([train.assign(probability=np.nan), test])[["window", *columns]])
    hashes = predictions.features_hash(batch, champion.features)
    predictions.write(log, batch.assign(features_hash=hashes), version, start, end)
    logged = predictions.read(log, end, 1 + earlier_windows)
    now = rows[["key", "label", *champion.features.names]]
    _write(out / "logged.parquet", logged.merge(now, on="key", how="left", validate="m:1"))
    labelled = int(batch["label"].notna().sum())
    return {
        **_about(version, start, end),
        "rows": len(batch),
        "labelled_rows": labelled,
        "labels_until": labels_until.isoformat(),
        "features": champion.features.model_dump(),
        "importance": champion.schema.get("importance", {}),
        "summary": f"{len(batch):,} rows with v{version} · {labelled:,} with a label",
    }


def without_champion(start: date, end: date, out: Path) -> dict[str, Any]:
    """The result while no model has been promoted; what an earlier run left is removed."""
    for name in ("predictions.parquet", "reference.parquet", "logged.parquet"):
        (out / name).unlink(missing_ok=True)
    return {**_about(None, start, end), "rows": 0, "labelled_rows": 0, "summary": "no champion yet: nothing scored"}


def _about(version: int | None, start: date, end: date) -> dict[str, Any]:
    return {"version": version, "start": start.isoformat(), "end": end.isoformat()}


def _between(rows: pd.DataFrame, start: pd.Timestamp, end: pd.Timestamp) -> pd.DataFrame:
    return rows[(rows["time"] >= start) & (rows["time"] < end)].reset_index(drop=True)


def _midnight(day: date) -> pd.Timestamp:
    return pd.Timestamp(day, tz="UTC")


def _extent(rows: pd.DataFrame) -> str:
    return f"rows from {rows['time'].min():%Y-%m-%d} to {rows['time'].max():%Y-%m-%d}" if len(rows) else "no rows"


def _write(path: Path, rows: pd.DataFrame) -> None:
    with whole_file(path) as part:
        pq.write_table(pa.Table.from_pandas(rows, preserve_index=False), part, compression="zstd")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipelines.score")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--start", type=date.fromisoformat, required=True, help="first day of the batch")
    parser.add_argument("--tables", type=Path, default=Path("data/ingest/tables"))
    parser.add_argument("--quarantine", type=Path, default=Path("data/validate/quarantine"))
    parser.add_argument("--out", type=Path, default=Path("data/score"))
    return parser.parse_args()


def main() -> None:
    """Score from ``--start`` to the as-of date with the version that was champion as that began."""
    options = _options()
    load_params(options.params, "score", ScoreParams)
    earlier = load_params(options.params, "performance", PerformanceParams).earlier_windows
    start, end = options.start, as_of(options.params)
    if start >= end:
        raise BallastError(f"--start must lie before the as-of date {end} (found {start}): the batch ends there.")
    version = State().champion_at(start)
    if version is None:
        result = without_champion(start, end, options.out)
    else:
        champion, log = load(registry.model(version)), places.var() / "predictions"
        result = score(champion, version, options.tables, options.quarantine, start, end, options.out, log, earlier)
    stage.finish("score", options.out, result)


if __name__ == "__main__":
    exit_with(main)
