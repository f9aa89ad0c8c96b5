"""Bring the rows of a source into the columns and types that params.yaml declares, or say what does not fit.

Nothing is guessed and nothing is lost: a value converts exactly, or the table is rejected with that value named.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.types as pt

from pipelines.errors import DataRejected
from pipelines.schema import ARROW, ColumnType, Table

# What text may say for "no value" where a number, a bool or a time is declared: Arrow's own list (NA, null, NaN, ...).
# A string column keeps these words, as NA may be a code there; which fields are null in it is the adapter's to say.
NULLS = pa.array(pa.csv.ConvertOptions().null_values)
ZONE = r":\d\d.*(Z|[+-]\d\d(:?\d\d)?)$"


def conform(rows: pa.Table, name: str, table: Table, piece: str) -> pa.Table:
    """The rows with exactly the schema ``table.arrow``, in the same order.

    Raise DataRejected for an unknown, a missing or a doubled column, a value that does not convert to its declared
    type, or a null in the time column.
    """
    where = f"table `{name}`, {piece}"
    _check_columns(rows, name, table, where)
    columns = [_column(rows[column], column, kind, name, where) for column, kind in table.columns.items()]
    conformed = pa.table(columns, schema=table.arrow)
    if table.time and conformed[table.time].null_count:
        row = pc.index(conformed[table.time].is_null(), True).as_py()
        found = ", ".join(f"{key} {rows[key][row].as_py()!r}" for key in table.key)
        raise DataRejected(
            f"{where}: the time column `{table.time}` is empty in row {row + 1} ({found}). Every row needs its time: "
            "correct the source."
        )
    return conformed


def _check_columns(rows: pa.Table, name: str, table: Table, where: str) -> None:
    found = rows.column_names
    if missing := [column for column in table.columns if column not in found]:
        raise DataRejected(
            f"{where}: the declared column `{missing[0]}` is missing (found: {', '.join(found)}). Have the source "
            f"bring it, or take it out of `land.tables.{name}.columns`."
        )
    if unknown := [column for column in found if column not in table.columns]:
        values = rows[unknown[0]].drop_null()
        example = f"for example {values[0].as_py()!r}" if len(values) else "all empty"
        raise DataRejected(
            f"{where}: the column `{unknown[0]}` is not declared ({example}). Declare it with its type in "
            f"`land.tables.{name}.columns`, or have the source leave it out."
        )
    if doubled := [column for column in table.columns if found.count(column) > 1]:
        raise DataRejected(f"{where}: there are {found.count(doubled[0])} columns `{doubled[0]}`. Correct the source.")


def _column(values: pa.ChunkedArray, column: str, kind: ColumnType, name: str, where: str) -> pa.ChunkedArray:
    try:
        return _convert(values, kind)
    except pa.ArrowException:
        row = _first_bad(values, kind)
    raise DataRejected(
        f"{where}: the column `{column}` is declared as {kind}, and row {row + 1} holds {values[row].as_py()!r}. "
        f"Correct the source, or declare another type in `land.tables.{name}.columns.{column}`."
    )


def _first_bad(values: pa.ChunkedArray, kind: ColumnType) -> int:
    """The first row that does not convert, by bisection: the rows up to ``good`` do, those up to ``bad`` do not."""
    good, bad = 0, len(values)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            _convert(values.slice(good, middle - good), kind)
            good = middle
        except pa.ArrowException:
            bad = middle
    return good


def _convert(values: pa.ChunkedArray, kind: ColumnType) -> pa.ChunkedArray:
    """The values as ``kind``; raise ArrowException if one does not convert exactly."""
    if pt.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if values.null_count == len(values):
        return pa.chunked_array([pa.nulls(len(values), ARROW[kind])])
    if kind != "string" and _is_text(values.type):
        return _parse(values.cast(pa.string()), kind)
    if not _fits(values.type, kind):
        raise pa.ArrowInvalid(f"{values.type} is no {kind}")
    if kind == "bool" and not pt.is_boolean(values.type):
        return _parse(values.cast(pa.string()), kind)  # a plain cast would take the number 2 for true
    return _without_nan(values.cast(ARROW[kind]), kind)


def _is_text(found: pa.DataType) -> bool:
    return bool(pt.is_string(found) or pt.is_large_string(found) or pt.is_string_view(found))


def _fits(found: pa.DataType, kind: ColumnType) -> bool:
    """Whether a cast keeps the meaning: Arrow would also turn numbers into times since 1970, and back."""
    if kind == "string":
        return not pt.is_nested(found)
    if kind == "timestamp":
        return bool(pt.is_timestamp(found) or pt.is_date(found))
    number = pt.is_integer(found) or pt.is_floating(found) or pt.is_decimal(found)
    return bool(number or (kind == "bool" and pt.is_boolean(found)))


def _parse(text: pa.ChunkedArray, kind: ColumnType) -> pa.ChunkedArray:
    """Parse text: first as it is, which is fast, then with the spellings that writers of CSV are known for."""
    try:
        parsed = text.cast(ARROW[kind])
    except pa.ArrowInvalid:
        parsed = _parse_spellings(text, kind)
    return _without_nan(parsed, kind)


def _without_nan(values: pa.ChunkedArray, kind: ColumnType) -> pa.ChunkedArray:
    """Null for NaN, which SQL takes for the largest of all numbers."""
    return pc.if_else(pc.is_nan(values), None, values) if kind == "float" else values


def _parse_spellings(text: pa.ChunkedArray, kind: ColumnType) -> pa.ChunkedArray:
    """Parse text with spaces around, words for null, integers like ``830.0`` and times without a zone (UTC)."""
    text = pc.utf8_trim_whitespace(text)
    text = pc.if_else(pc.is_in(text, NULLS), None, text)
    if kind in ("int", "bool"):
        text = pc.replace_substring_regex(text, r"^([+-]?\d+)\.0*$", r"\1")
    if kind != "timestamp":
        return text.cast(ARROW[kind])
    zoned = pc.match_substring_regex(text, ZONE)
    with_zone = pc.if_else(zoned, text, None).cast(ARROW[kind])
    without = pc.if_else(zoned, None, text).cast(pa.timestamp("us")).cast(ARROW[kind])
    return pc.coalesce(with_zone, without)
