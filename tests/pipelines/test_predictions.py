"""The prediction log: real Parquet files, read back by their own reader and by DuckDB."""

from __future__ import annotations

from datetime import date
from hashlib import sha256
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

from pipelines import predictions
from pipelines.schema import Features

FEATURES = Features(numeric=["size", "age"], categorical=["colour"])
ROW = {"size": 1.5, "age": 2.0, "colour": "red"}


def hashed(**changes: object) -> str:
    frame = pd.DataFrame([ROW | changes]).astype({"size": "float64", "age": "float64", "colour": "str"})
    return predictions.features_hash(frame, FEATURES)[0]


def batch(start: str, days: int) -> pd.DataFrame:
    """Two rows a day."""
    time = pd.date_range(start, periods=2 * days, freq="12h", tz="UTC")
    probability = np.linspace(0.1, 0.9, len(time))
    return pd.DataFrame(
        {"time": time, "key": [f"e{at:%m%d%H}" for at in time], "probability": probability, "features_hash": "0"}
    )


def day(number: int, month: int = 4) -> date:
    return date(2013, month, number)


def starts(log: Path, until: date, batches: int) -> list[tuple[str, int, int]]:
    """First day, version and rows of each batch that is read."""
    found = predictions.read(log, until, batches).groupby(["start", "version"]).size()
    return [(str(start), int(version), int(rows)) for (start, version), rows in found.items()]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Three weeks by v1, the last of them by v2 as well."""
    for version, first in ((1, 1), (1, 8), (1, 15), (2, 15)):
        predictions.write(tmp_path, batch(f"2013-04-{first:02}", 7), version, day(first), day(first + 7))
    return tmp_path


def test_features_hash_is_that_of_the_features_as_json():
    """So whoever has the rows can make it again, in any language and with any later release."""
    assert hashed() == sha256(b'{"age":2.0,"colour":"red","size":1.5}').hexdigest()
    missing = sha256('{"age":null,"colour":"rösa","size":1e-07}'.encode()).hexdigest()
    assert hashed(age=np.nan, colour="rösa", size=1e-7) == missing


@pytest.mark.parametrize(
    "change",
    [
        {"size": np.nextafter(1.5, 2)},
        {"size": np.nan},
        {"size": 0.0},
        {"size": 2.0, "age": 1.5},
        {"colour": "blue"},
        {"colour": None},
        {"colour": ""},
        {"colour": "nan"},
        {"colour": "null"},
    ],
)
def test_features_hash_differs_where_a_feature_does(change):
    assert hashed(**change) != hashed()


def test_features_hash_is_one_for_what_no_model_tells_apart():
    assert hashed(size=-0.0) == hashed(size=0.0)
    assert hashed(size=None) == hashed(size=np.nan)
    assert hashed(colour=None) == hashed(colour=np.nan)
    assert len({hashed(size=size, colour=None) for size in (0.0, np.nan, 1.0)}) == 3


def test_features_hash_does_not_depend_on_order_or_on_what_is_not_read():
    frame = pd.DataFrame([{"other": 1, **dict(reversed(ROW.items()))}, ROW])
    assert predictions.features_hash(frame, FEATURES) == [hashed()] * 2
    assert predictions.features_hash(frame, Features(numeric=["size"], categorical=["colour"]))[0] != hashed()


def test_write_day_without_rows_any_more_is_removed(log):
    less = batch("2013-04-01", 7).query("time.dt.day != 3")
    predictions.write(log, less, 1, day(1), day(8))
    assert not (log / "date=2013-04-03" / "v1.parquet").exists()
    assert starts(log, day(8), 9) == [("2013-04-01", 1, 12)]


def test_write_in_another_interval_keeps_each_row_once(log):
    predictions.write(log, batch("2013-04-03", 1), 1, day(3), day(4))
    predictions.write(log, batch("2013-04-08", 14), 1, day(8), day(22))
    found = predictions.read(log, day(22), 9)
    assert not found.duplicated(["version", "key"]).any()
    assert starts(log, day(22), 9) == [
        ("2013-04-01", 1, 12), ("2013-04-03", 1, 2), ("2013-04-08", 1, 28), ("2013-04-15", 2, 14),
    ]  # fmt: skip
    assert starts(log, day(22), 1) == [("2013-04-15", 2, 14)]  # the last by its end, and then by its beginning


def test_read_gives_the_last_batches_of_every_version(log):
    assert starts(log, day(22), 2) == [("2013-04-08", 1, 14), ("2013-04-15", 1, 14), ("2013-04-15", 2, 14)]
    assert starts(log, day(22), 1) == [("2013-04-15", 1, 14), ("2013-04-15", 2, 14)]


def test_read_leaves_out_batches_that_ended_later(log):
    assert starts(log, day(21), 9) == [("2013-04-01", 1, 14), ("2013-04-08", 1, 14)]


def test_read_opens_no_more_files_than_it_needs(log):
    (log / "date=2013-04-01" / "v1.parquet").write_bytes(b"not Parquet")
    assert starts(log, day(22), 2)[0] == ("2013-04-08", 1, 14)


def test_read_empty_log_is_an_empty_frame(tmp_path):
    found = predictions.read(tmp_path / "none", day(8), 3)
    assert (len(found), list(found.columns)) == (0, predictions.SCHEMA.names)


def test_log_is_a_hive_partitioned_table_for_others(log):
    query = (
        "SELECT version, count(*) FROM read_parquet(?, hive_partitioning = true) WHERE date = '2013-04-16' GROUP BY 1"
    )
    assert sorted(duckdb.execute(query, [f"{log}/*/*.parquet"]).fetchall()) == [(1, 2), (2, 2)]
