"""Rows to predict: what a SQL file makes of the tables, and the prepared windows on disk.

The SQL may come out of a model artifact, so it is not trusted: it runs over tables that lie in memory, in a
DuckDB that can neither reach files, network and extensions nor change its own settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import BallastError, DataRejected
from pipelines.schema import ARROW, Table

HEAD = {"key": ARROW["string"], "time": ARROW["timestamp"], "label": pa.int8()}


def select(tables: Path, quarantine: Path | None, sql: str, declared: Mapping[str, Table]) -> pd.DataFrame:
    """Run ``sql`` over the declared tables without their quarantined rows.

    Gives ``key`` (str, unique), ``time`` (UTC), ``label`` (Int8: 0, 1 or NA), then the features: float64 with
    NaN, or str with NaN. Ordered by time, then key. Raises DataRejected where the rows break this form.
    """
    connection = _locked_in()
    try:
        for name, table in declared.items():
            _lay_out(connection, name, table, tables / name, quarantine / f"{name}.parquet" if quarantine else None)
        connection.execute("SET lock_configuration = true")
        result = _query(connection, sql)
    finally:
        connection.close()
    frame: pd.DataFrame = _in_form(result).sort_by([("time", "ascending"), ("key", "ascending")]).to_pandas()
    frame["label"] = frame["label"].astype("Int8")
    _check_values(frame)
    return frame


def read(path: Path) -> pd.DataFrame:
    """Read one prepared window, its columns as in ``select`` with every label known (int8)."""
    try:
        with pq.ParquetFile(path) as window:
            frame: pd.DataFrame = window.read().to_pandas(ignore_metadata=True)
    except pa.ArrowException as error:
        raise BallastError(
            f"{path} cannot be read: {error}. Delete it, and run again the step that writes it."
        ) from None
    return frame


def _locked_in() -> duckdb.DuckDBPyConnection:
    """A database in memory that reaches nothing outside.

    One thread: with more, the order of a float sum, and so its last bits, may differ from run to run.
    """
    connection = duckdb.connect(config={"enable_external_access": "false", "threads": "1"})
    connection.execute("SET TimeZone = 'UTC'")  # else strftime and date parts would follow the machine's
    connection.execute("SET enable_progress_bar = false")  # it would draw into whatever stdout is
    return connection


def _lay_out(
    connection: duckdb.DuckDBPyConnection, name: str, table: Table, folder: Path, quarantined: Path | None
) -> None:
    """Make the table ``name`` from the partitions in ``folder``, less the rows whose key is in quarantine."""
    aside = [quarantined] if quarantined and quarantined.exists() else []
    connection.register("landed", _read_all(sorted(folder.glob("*.parquet")), table.arrow))
    connection.register("quarantined", _read_all(aside, table.arrow))
    # IS NOT DISTINCT FROM: a row may be in quarantine just because a part of its key is null.
    same = [f"landed.{_quoted(part)} IS NOT DISTINCT FROM quarantined.{_quoted(part)}" for part in table.key]
    connection.execute(f"CREATE TABLE {_quoted(name)} AS FROM landed ANTI JOIN quarantined ON {' AND '.join(same)}")
    connection.unregister("landed")
    connection.unregister("quarantined")


def _read_all(files: list[Path], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([_read_partition(file, schema) for file in files]) if files else schema.empty_table()


def _read_partition(file: Path, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema`` from one file; others are left out, none is made up."""
    try:
        with pq.ParquetFile(file) as partition:
            if lacking := sorted(set(schema.names) - set(partition.schema_arrow.names)):
                raise DataRejected(f"{file} lacks the declared columns {', '.join(lacking)}. Ingest the tables again.")
            return partition.read(columns=schema.names).select(schema.names).cast(schema)
    except pa.ArrowException as error:
        raise DataRejected(f"{file} does not hold the declared columns: {error}. Ingest the tables again.") from None


def _query(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    try:
        statements = connection.extract_statements(sql)
        if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
            found = ", ".join(statement.type.name for statement in statements) or "none"
            raise BallastError(f"The SQL that prepares rows must be one SELECT statement (found {found}).")
        return connection.sql(statements[0]).to_arrow_table()
    except duckdb.Error as error:
        raise BallastError(f"The SQL that prepares rows does not run: {error}") from None


def _in_form(result: pa.Table) -> pa.Table:
    """Key, time and label first, every column in the one type of its kind."""
    names = result.column_names
    if lacking := [name for name in HEAD if name not in names]:
        raise DataRejected(f"The SQL gives no column {', '.join(lacking)} (found {', '.join(names)}). Name them so.")
    if len(set(names)) < len(names):
        raise DataRejected(f"The SQL gives two columns of one name (found {', '.join(names)}). Rename one.")
    order = [*HEAD, *(name for name in names if name not in HEAD)]
    return pa.table({name: _typed(name, result[name]) for name in order})


def _typed(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """``column`` in the type that its name (key, time, label) or its kind (number, text) calls for."""
    found = column.type
    textual = pa.types.is_string(found) or pa.types.is_dictionary(found)
    numeric = pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)
    fits = {"key": textual, "time": pa.types.is_timestamp(found) and found.tz is not None}
    if not fits.get(name, numeric or pa.types.is_boolean(found) or (textual and name != "label")):
        raise DataRejected(f"The SQL gives `{name}` as {found}; {_REMEDY.get(name, _REMEDY['label'])}.")
    if name == "label":
        _check_label(column)
    wanted = HEAD.get(name) or (pa.string() if textual else pa.float64())
    return column.cast(wanted, safe=False)  # a feature beyond 2^53 loses digits that no model sees


_REMEDY = {
    "key": "it must be text: CAST it to VARCHAR",
    "time": "it must be a time with a zone: TIMESTAMPTZ, as the declared times are",
    "label": "it must be a number or a boolean (features also text): CAST it",
}


def _check_label(column: pa.ChunkedArray) -> None:
    values = pd.Series(column.drop_null().to_numpy()).astype("float64")
    if not (wrong := values[~values.isin((0, 1))]).empty:
        raise DataRejected(
            f"The SQL gives {len(wrong)} labels that are not 0, 1 or null (found {wrong.iloc[0]:g}). "
            f"State the question as a condition, such as `delay > 15 AS label`."
        )


def _check_values(frame: pd.DataFrame) -> None:
    for name in ("key", "time"):
        if missing := int(frame[name].isna().sum()):
            raise DataRejected(f"The SQL gives {missing} rows with no `{name}`. Leave such rows out, or fill it.")
    if (again := frame["key"].duplicated()).any():
        example = frame.loc[again, "key"].iloc[0]
        raise DataRejected(
            f"The SQL gives {again.sum()} rows whose `key` an earlier row has (such as {example!r}). "
            f"A join that finds two matches for one row does this."
        )


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'
