"""Rows: what a SQL file makes of tables on disk, and what it cannot reach."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import rows
from pipelines.errors import BallastError, DataRejected
from pipelines.schema import Table

ORDERS = Table(
    time="sold",
    key=["sold", "shop"],
    columns={
        "sold": "timestamp",
        "shop": "string",
        "items": "int",
        "price": "float",
        "paid": "bool",
        "returned": "bool",
    },
)
SHOPS = Table(key=["shop"], columns={"shop": "string", "size": "int"})
DECLARED = {"orders": ORDERS, "shops": SHOPS}
SQL = """
SELECT
    strftime(sold, '%Y-%m-%dT%H') || shop AS key, sold AS time, returned AS label,
    items, price, paid, orders.shop, size
FROM orders LEFT JOIN shops USING (shop);  -- a semicolon and a comment may end it
"""
HEAD = "SELECT 'a' AS key, TIMESTAMPTZ '2013-01-01' AS time, 1 AS label"


def order(hour: int, shop: str | None, **others: Any) -> dict[str, Any]:
    known = {"items": 2, "price": 1.5, "paid": True, "returned": False} | others
    return {"sold": datetime(2013, 1, 1, hour, tzinfo=UTC), "shop": shop} | known


def write(path: Path, table: Table, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records, schema=table.arrow), path)


@pytest.fixture
def tables(tmp_path) -> Path:
    folder = tmp_path / "tables"
    write(folder / "orders" / "2013-01-02.parquet", ORDERS, [order(9, "b", returned=True), order(7, "a", items=None)])
    write(folder / "orders" / "2013-01-01.parquet", ORDERS, [order(8, "b"), order(8, "a", returned=None)])
    write(folder / "shops" / "all.parquet", SHOPS, [{"shop": "a", "size": 3}])
    return folder


def select(tables: Path, sql: str = SQL, quarantine: Path | None = None) -> pd.DataFrame:
    return rows.select(tables, quarantine, sql, DECLARED)


def test_select_partitions_gives_typed_rows_in_order(tables):
    frame = select(tables)
    assert frame["key"].to_list() == ["2013-01-01T07a", "2013-01-01T08a", "2013-01-01T08b", "2013-01-01T09b"]
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == {
        "key": "str",
        "time": "datetime64[us, UTC]",
        "label": "Int8",
        "items": "float64",
        "price": "float64",
        "paid": "float64",
        "shop": "str",
        "size": "float64",
    }
    assert frame["label"].to_list() == [0, pd.NA, 0, 1]
    assert frame["items"].isna().to_list() == [True, False, False, False]
    assert frame["size"].fillna(-1).to_list() == [3, 3, -1, -1]


def test_select_columns_in_any_order_gives_head_first(tables):
    frame = select(tables, "SELECT items, returned AS label, shop || hour(sold) AS key, sold AS time FROM orders")
    assert list(frame.columns) == ["key", "time", "label", "items"]


def test_select_empty_or_absent_table_is_an_empty_view_of_the_declared_types(tmp_path):
    (tmp_path / "orders").mkdir()
    frame = select(tmp_path)
    assert frame.empty
    assert {str(frame[name].dtype) for name in ("items", "price", "size")} == {"float64"}
    assert str(frame["shop"].dtype) == "str"


def test_select_column_of_nulls_keeps_its_kind(tables):
    frame = select(tables, f"{HEAD}, NULL::VARCHAR AS word, NULL::BIGINT AS number")
    assert (str(frame["word"].dtype), str(frame["number"].dtype)) == ("str", "float64")


def test_select_quarantined_rows_are_left_out_by_their_key(tables, tmp_path):
    write(tables / "orders" / "2013-01-03.parquet", ORDERS, [order(5, None), order(6, None)])
    reason = pa.array(["price is negative", "shop is null"])
    aside = pa.Table.from_pylist([order(8, "b", price=-1.0), order(5, None)], schema=ORDERS.arrow)
    (tmp_path / "quarantine").mkdir()
    pq.write_table(aside.append_column("reason", reason), tmp_path / "quarantine" / "orders.parquet")
    sql = "SELECT hour(sold) || coalesce(shop, '-') AS key, sold AS time, returned AS label FROM orders"
    assert select(tables, sql, tmp_path / "quarantine")["key"].to_list() == ["6-", "7a", "8a", "9b"]


def test_select_table_may_have_any_name(tables):
    names = ["landed", "quarantined", "order", 'a "b"']
    for name in names:
        write(tables / name / "all.parquet", SHOPS, [{"shop": name, "size": 1}])
    union = " UNION ".join(f"""FROM "{name.replace('"', '""')}" """ for name in names)
    sql = f"SELECT shop AS key, TIMESTAMPTZ '2013-01-01' AS time, 1 AS label FROM ({union})"
    frame = rows.select(tables, None, sql, dict.fromkeys(names, SHOPS))
    assert frame["key"].to_list() == sorted(names)


def test_select_empty_quarantine_leaves_every_row(tables, tmp_path):
    (tmp_path / "quarantine").mkdir()
    assert len(select(tables, SQL, tmp_path / "quarantine")) == 4


def test_select_file_with_narrower_types_and_more_columns_gives_the_declared_ones(tables):
    narrow = pa.table({"size": pa.array([4], pa.int16()), "note": ["new"], "shop": ["b"]})
    pq.write_table(narrow, tables / "shops" / "all-2.parquet")
    assert select(tables)["size"].to_list() == [3, 3, 4, 4]


def test_select_file_lacking_a_declared_column_is_rejected(tables):
    pq.write_table(pa.table({"shop": ["b"]}), tables / "shops" / "all.parquet")
    with pytest.raises(DataRejected, match=r"all\.parquet lacks the declared columns size"):
        select(tables)


def test_select_file_that_is_no_parquet_is_rejected(tables):
    (tables / "shops" / "all.parquet").write_text("shop,size\na,3\n")
    with pytest.raises(DataRejected, match=r"all\.parquet does not hold the declared columns"):
        select(tables)


@pytest.fixture
def far_away(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("far_away")
def test_select_on_a_machine_in_tokyo_still_writes_utc(tables):
    assert select(tables)["key"].iloc[0] == "2013-01-01T07a"


@pytest.mark.parametrize(
    ("sql", "fact"),
    [
        ("SELECT shop AS key, sold AS time FROM orders", "no column label"),
        (f"{HEAD}, 1 AS x, 2 AS x", "two columns of one name"),
        ("SELECT shop AS key, sold AS time, returned AS label FROM orders", "2 rows whose `key` an earlier row has"),
        (
            "SELECT nullif(shop || hour(sold), 'a7') AS key, sold AS time, 1 label FROM orders",
            "1 rows with no `key`",
        ),
        (HEAD.replace("TIMESTAMPTZ '2013-01-01'", "NULL::TIMESTAMPTZ"), "1 rows with no `time`"),
        (HEAD.replace("TIMESTAMPTZ", "TIMESTAMP"), "a time with a zone"),
        (HEAD.replace("'a'", "7"), "must be text"),
        (HEAD.replace("1 AS label", "2 AS label"), r"not 0, 1 or null \(found 2\)"),
        (HEAD.replace("1 AS label", "0.5 AS label"), r"not 0, 1 or null \(found 0.5\)"),
        (HEAD.replace("1 AS label", "'yes' AS label"), "must be a number"),
        (f"{HEAD}, [1, 2] AS pair", "`pair` as list"),
    ],
)
def test_select_rows_out_of_form_are_rejected(tables, sql, fact):
    with pytest.raises(DataRejected, match=fact):
        select(tables, sql)


@pytest.mark.parametrize(
    ("sql", "fact"),
    [
        ("SELEC 1", "does not run: .*SELEC"),
        (f"{HEAD} FROM nowhere", "does not run: .*nowhere"),
        (f"{HEAD}, 'x'::INTEGER AS number", "does not run: .*'x'"),
        ("", r"one SELECT statement \(found none"),
        (f"{HEAD}; {HEAD}", "found SELECT, SELECT"),
        ("DELETE FROM orders", "found DELETE"),
    ],
)
def test_select_sql_that_is_no_query_is_refused(tables, sql, fact):
    with pytest.raises(BallastError, match=fact):
        select(tables, sql)


@pytest.mark.parametrize(
    "source",
    [
        "read_text('{secret}')",
        "(SELECT filename AS content FROM read_blob('{secret}'))",
        "(SELECT column0 AS content FROM read_csv('{secret}', header = false))",
        "(SELECT file AS content FROM glob('{secret}'))",
        "(SELECT file_name AS content FROM parquet_metadata('{parquet}'))",
        "(SELECT shop AS content FROM '{parquet}')",
    ],
)
def test_select_sql_that_reads_files_is_refused(tables, tmp_path, source):
    (tmp_path / "secret.txt").write_text("hidden")
    there = source.format(secret=tmp_path / "secret.txt", parquet=tables / "shops" / "all.parquet")
    with pytest.raises(BallastError, match=r"does not run: .*(disabled by configuration|does not exist)"):
        select(tables, HEAD.replace("'a'", "content") + f" FROM {there}")


@pytest.mark.parametrize(
    "setting",
    ["enable_profiling(format = 'json', save_location = '{out}.json')", "enable_logging(storage = 'memory')"],
)
def test_select_sql_that_changes_a_setting_by_a_function_is_refused(tables, tmp_path, setting):
    with pytest.raises(BallastError, match="the configuration has been locked"):
        select(tables, f"{HEAD} FROM {setting.format(out=tmp_path / 'out')}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "COPY (SELECT 1) TO '{out}'",
        "EXPORT DATABASE '{out}'",
        "ATTACH '{out}'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
    ],
)
def test_select_sql_that_writes_or_unlocks_is_refused_and_leaves_nothing(tables, tmp_path, statement):
    unsafe = statement.format(out=tmp_path / "out")
    for sql in (unsafe, f"{unsafe}; {HEAD}", f"{HEAD}; {unsafe}"):
        with pytest.raises(BallastError, match="must be one SELECT statement"):
            select(tables, sql)
    assert not (tmp_path / "out").exists()


def test_read_window_gives_the_types_of_select_with_known_labels(tables, tmp_path):
    frame = select(tables).dropna(subset="label")
    schema = pa.schema([*rows.HEAD.items(), ("price", pa.float64()), ("shop", pa.string())])
    pq.write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False), tmp_path / "window.parquet")
    window = rows.read(tmp_path / "window.parquet")
    assert [str(kind) for kind in window.dtypes] == ["str", "datetime64[us, UTC]", "int8", "float64", "str"]
