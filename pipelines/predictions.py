"""The prediction log: what each champion predicted in each batch, before anyone knew better.

    var/predictions/date=2013-04-05/v3.parquet

Partitioned by the day of the rows (UTC), one file for each version. A batch begins and ends at midnight, so a day of a
version comes from one batch: to score it again, in whatever interval, replaces it, and the log holds a row once per
version. Another champion's predictions of the day stay beside. Labels come later and are not here.
"""

from __future__ import annotations

from datetime import date, timedelta
from hashlib import sha256
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import BallastError
from pipelines.files import canonical_json, whole_file
from pipelines.schema import ARROW, Features

SCHEMA = pa.schema(
    {
        "version": pa.int32(),
        "start": pa.date32(),  # of the batch
        "end": pa.date32(),  # exclusive
        "time": ARROW["timestamp"],
        "key": pa.string(),
        "probability": pa.float64(),
        "features_hash": pa.string(),
    }
)


def features_hash(rows: pd.DataFrame, features: Features) -> list[str]:
    """The SHA-256 of each row's features as canonical JSON by name, whatever other columns there are.

    A missing value is null, be it None or NaN, and -0.0 is 0.0: no model tells them apart.
    """
    values = rows[features.names].astype(dict.fromkeys(features.numeric, "float64"))
    values[features.numeric] += 0.0  # -0.0 + 0.0 is 0.0
    values = values.astype(object).where(values.notna(), None)
    return [sha256(canonical_json(row).encode()).hexdigest() for row in values.to_dict("records")]


def write(log: Path, batch: pd.DataFrame, version: int, start: date, end: date) -> None:
    """Replace what ``version`` predicted for the rows from ``start`` to ``end``; each day is written whole."""
    rows = batch.assign(version=version, start=start, end=end)
    days = dict(tuple(rows.groupby(rows["time"].dt.strftime("%Y-%m-%d"))))
    for day, file in files(log, version, start, end).items():
        if str(day) in days:
            _write(file, days[str(day)])
        else:
            file.unlink(missing_ok=True)


def files(log: Path, version: int, start: date, end: date) -> dict[date, Path]:
    """Where the days of a batch lie; one without rows has no file."""
    days = (start + timedelta(days=n) for n in range((end - start).days))
    return {day: log / f"date={day}" / f"v{version}.parquet" for day in days}


def read(log: Path, until: date, batches: int) -> pd.DataFrame:
    """What every version predicted in the last so many batches of those that ended by ``until``, in order of time."""
    tables: list[pa.Table] = []
    found: list[tuple[date, date]] = []  # end, start; the newest first
    for file in sorted(log.glob("date=*/v*.parquet"), reverse=True):
        day = date.fromisoformat(file.parent.name.removeprefix("date="))
        if len(found) >= batches and day < min(start for _, start in found[:batches]):
            break
        if day < until and (batch := _batch(table := _read(file)))[0] <= until:
            tables.append(table)
            found = sorted({*found, batch}, reverse=True)
    kept = pa.concat_tables([t for t in tables if _batch(t) in found[:batches]] or [SCHEMA.empty_table()])
    frame: pd.DataFrame = kept.sort_by([("time", "ascending"), ("key", "ascending")]).to_pandas()
    return frame


def _read(file: Path) -> pa.Table:
    try:
        return pq.ParquetFile(file).read()
    except pa.ArrowException as error:
        raise BallastError(
            f"The logged predictions {file} cannot be read: {error}. Delete the file, and monitor its window again."
        ) from None


def _batch(table: pa.Table) -> tuple[date, date]:
    return table["end"][0].as_py(), table["start"][0].as_py()


def _write(file: Path, rows: pd.DataFrame) -> None:
    table = pa.Table.from_pandas(rows[SCHEMA.names], schema=SCHEMA, preserve_index=False)
    with whole_file(file) as part:
        pq.write_table(table.replace_schema_metadata(None), part, compression="zstd")
