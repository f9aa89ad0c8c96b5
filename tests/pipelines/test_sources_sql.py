"""The adapter `sql` on real databases: SQLite, and PostgreSQL where its server's programs are installed."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from postgresql import PASSWORD, URL_PASSWORD, Server
from sqlalchemy import make_url

from pipelines.errors import DataRejected, ParamsError, TryAgain
from pipelines.land import LandParams, land
from pipelines.schema import Table
from pipelines.sources import connect, sql
from pipelines.sources._conform import conform

APRIL = date(2024, 4, 1)
VISITS = "SELECT id, at, shop FROM visits WHERE at >= :start AND at < :end"
COLUMNS = {"id": "int", "at": "timestamp", "shop": "string"}
TABLES = {"visits": {"columns": COLUMNS, "key": ["id"], "time": "at"}}


def adapter(query: str = VISITS, **more: Any) -> Any:
    asked = {"query": query, **{name: more.pop(name) for name in ("revision",) if name in more}}
    return connect("sql", {"since": "2024-01-01", "tables": {"visits": asked}, **more})


class Lite:
    """A SQLite database of visits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run("CREATE TABLE visits (id INTEGER, at TEXT, shop, changed INTEGER DEFAULT 0)")

    def run(self, statement: str, *rows: tuple[Any, ...]) -> None:
        with sqlite3.connect(self.path) as connection:
            connection.executemany(statement, rows) if rows else connection.execute(statement)
        connection.close()

    def visits(self, *rows: tuple[Any, ...]) -> None:
        self.run("INSERT INTO visits (id, at, shop) VALUES (?, ?, ?)", *rows)


@pytest.fixture
def lite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lite:
    made = Lite(tmp_path / "shop.db")
    made.visits(
        (3, "2024-03-31 23:59:59", "b"),
        (1, "2024-01-31T23:59:59Z", "a"),
        (2, "2024-02-01T00:00:00Z", None),
        (4, "2024-04-01 00:00:00", "c"),
    )
    monkeypatch.setenv("BALLAST_SOURCE_URL", f"sqlite:///{made.path}")
    return made


def test_pieces_are_the_windows_that_begin_before_the_as_of_date(lite: Lite) -> None:
    assert list(adapter().pieces("visits", APRIL)) == ["2024-01", "2024-02", "2024-03"]
    assert list(adapter().pieces("visits", date(2024, 4, 2)))[-1] == "2024-04"
    days = list(adapter(window="day", since="2024-02-28").pieces("visits", date(2024, 3, 2)))
    assert days == ["2024-02-28", "2024-02-29", "2024-03-01"]


def test_read_gives_each_row_to_one_window(lite: Lite) -> None:
    source = adapter()
    read = {piece: source.read("visits", piece)["id"].to_pylist() for piece in source.pieces("visits", APRIL)}
    assert read == {"2024-01": [1], "2024-02": [2], "2024-03": [3]}


def test_read_begins_with_since_also_within_a_month(lite: Lite) -> None:
    lite.visits((0, "2024-01-09 23:00:00", "a"), (9, "2024-01-10 01:00:00", "a"))
    assert adapter(since="2024-01-10").read("visits", "2024-01")["id"].to_pylist() == [1, 9]


def test_read_query_without_bounds_is_one_piece(lite: Lite) -> None:
    source = adapter("SELECT id FROM visits", since=None)
    assert list(source.pieces("visits", APRIL)) == ["all"]
    assert source.read("visits", "all")["id"].to_pylist() == [1, 2, 3, 4]


def test_read_in_chunks_is_the_same_as_whole(lite: Lite, monkeypatch: pytest.MonkeyPatch) -> None:
    lite.visits(*((n, "2024-03-02 10:00:00", None if n % 3 else f"s{n}") for n in range(10, 60)))
    whole = adapter().read("visits", "2024-03")
    monkeypatch.setattr(sql, "CHUNK_ROWS", 7)
    assert adapter().read("visits", "2024-03").equals(whole)
    assert whole.num_rows == 51


def test_read_column_of_several_types_is_text_that_conform_judges(lite: Lite, monkeypatch: pytest.MonkeyPatch) -> None:
    lite.visits((5, "2024-03-01 10:00:00", 7), (6, "2024-03-01 11:00:00", 1.5), (7, "2024-03-01 12:00:00", 2**62))
    monkeypatch.setattr(sql, "CHUNK_ROWS", 1)
    rows = adapter().read("visits", "2024-03")
    assert sorted(rows["shop"].to_pylist()) == ["1.5", str(2**62), "7", "b"]
    table = Table(columns={**COLUMNS, "shop": "float"}, key=["id"])  # type: ignore[dict-item]
    with pytest.raises(DataRejected, match="`shop` is declared as float, and row 1 holds 'b'"):
        conform(rows, "visits", table, "2024-03")


def test_read_order_does_not_depend_on_the_database(lite: Lite) -> None:
    before = adapter("SELECT id, shop FROM visits ORDER BY id").read("visits", "all")
    assert adapter("SELECT id, shop FROM visits ORDER BY id DESC").read("visits", "all").equals(before)


def test_read_empty_window_has_the_columns(lite: Lite) -> None:
    lite.run("DELETE FROM visits")
    assert conform(adapter().read("visits", "2024-03"), "visits", Table(**TABLES["visits"]), "2024-03").num_rows == 0  # type: ignore[arg-type]


def test_revision_query_changes_with_its_window_only(lite: Lite) -> None:
    source = adapter(revision="SELECT count(*), max(changed) FROM visits WHERE at >= :start AND at < :end")
    before = source.pieces("visits", APRIL)
    assert source.pieces("visits", APRIL) == before
    lite.run("UPDATE visits SET shop = 'z', changed = 1 WHERE id = 2")
    after = source.pieces("visits", APRIL)
    assert {piece for piece in after if after[piece] != before[piece]} == {"2024-02"}


def test_without_revision_a_window_is_read_again_until_it_has_settled(lite: Lite) -> None:
    assert adapter().pieces("visits", APRIL).items().isdisjoint(adapter().pieces("visits", APRIL).items())
    now = datetime.now(UTC).date()
    since = now.replace(year=now.year - 1)
    settled = adapter(since=str(since), settled_days=10)
    first, second = settled.pieces("visits", now), settled.pieces("visits", now)
    same = [piece for piece in first if first[piece] == second[piece]]
    assert same == list(first)[: len(same)], "the old ones"
    assert len(first) - len(same) in (1, 2), "the current month, and the one before it for ten days"


def test_revision_tells_one_database_from_another(lite: Lite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = adapter(settled_days=0).pieces("visits", APRIL)
    Lite(tmp_path / "other.db")
    monkeypatch.setenv("BALLAST_SOURCE_URL", f"sqlite:///{tmp_path / 'other.db'}")
    assert adapter(settled_days=0).pieces("visits", APRIL).items().isdisjoint(one.items())


def test_url_relative_path_starts_in_the_source_folder(lite: Lite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLAST_SOURCE", str(lite.path.parent))
    assert adapter(url="sqlite:///shop.db").read("visits", "2024-02")["id"].to_pylist() == [2]


def test_database_is_never_written(lite: Lite, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"tables.visits.query`: .* does not take the query: .*readonly.* Correct it"):
        adapter("DELETE FROM visits RETURNING id", since=None).read("visits", "all")
    with pytest.raises(TryAgain, match=r"none.db cannot be reached: unable to open database file"):
        adapter(url=f"sqlite:///{tmp_path / 'none.db'}").read("visits", "2024-01")
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT gate FROM visits", r"`land.options.tables.visits.query`: .* no such column: gate. Correct it"),
        ("SELECT * FROM visitors", "no such table: visitors"),
        ("SELEC 1", "syntax error"),
    ],
)
def test_wrong_query_is_an_error_with_the_databases_words(lite: Lite, query: str, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        adapter(query).read("visits", "all")


def test_wrong_revision_names_the_revision(lite: Lite) -> None:
    with pytest.raises(ParamsError, match=r"tables.visits.revision`: .*no such column: stamp"):
        adapter(revision="SELECT max(stamp) FROM visits").pieces("visits", APRIL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"query": "SELECT 1 WHERE at >= :start"},
            r"`land.options.tables.visits.query`: .*both :start and :end.*found start",
        ),
        ({"query": "SELECT 1 WHERE at < :until"}, r"found until"),
        ({"since": None}, r"`land.options.since` is missing: `visits` is read by windows"),
        ({"zone": "Mars/Olympus"}, r"`land.options.zone`: .*Mars"),
        ({"zone": "America/New_York"}, r"`land.options.zone` is not for SQLite \(found America/New_York\)"),
        ({"url": "postgresql://me:hunter2@db/shop"}, r"`land.options.url` has a password in it \(found .*me:\*\*\*@db"),
        ({"url": "postgresql://db/shop?user=me&password=hunter2"}, r"has a password in it"),
        ({"urll": "postgresql://me:hunter2@db/shop"}, r"`land.options.urll`: .*me:\*\*\*@db"),
        ({"url_from": "NOWHERE_SET"}, r"Set the environment variable NOWHERE_SET \(found none\)"),
        ({"connection": "shop"}, r"variable AIRFLOW_CONN_SHOP .*, or make the connection `shop` in Airflow"),
        ({"connection": "the shop"}, r"`land.options.connection`: .*found 'the shop'"),
        ({"url": "oracel://db/shop"}, r"There is no driver for oracel://"),
        ({"url": "db.example.org"}, r"`land.options.url` is no URL of a database"),
    ],
)
def test_wrong_settings_are_refused_and_show_no_password(lite: Lite, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message) as error:
        adapter(**options)
    assert "hunter2" not in str(error.value)


def test_url_that_is_none_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("postgresql:me:hunter2@db", "postgresql://me:hunter2@db:port/x", '{"login": "hunter2"}', '{"hunter2'):
        monkeypatch.setenv("BALLAST_SOURCE_URL", wrong)
        with pytest.raises(
            ParamsError, match="environment variable BALLAST_SOURCE_URL is no URL of a database"
        ) as error:
            adapter()
        assert "hunter2" not in str(error.value)


def test_table_without_a_query_is_an_error(lite: Lite) -> None:
    with pytest.raises(ParamsError, match=r"no query for the table `shops` \(it has: visits\)"):
        adapter().pieces("shops", APRIL)


@pytest.mark.parametrize(
    "written",
    [
        "postgres://me:a%20word@db:5433/shop?sslmode=require",
        "postgresql+psycopg://me:a%20word@db:5433/shop?sslmode=require",
        "postgres://me:a%20word@db:5433/shop?__extra__=%7B%22sslmode%22%3A+%22require%22%2C+%22n%22%3A+1%7D",
        json.dumps(
            {"conn_type": "postgres", "login": "me", "password": "a word", "host": "db", "port": 5433, "schema": "shop"}
            | {"extra": {"sslmode": "require"}}
        ),
    ],
)
def test_connection_of_airflow_is_read_as_uri_and_as_json(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", written)
    url = adapter(connection="warehouse")._url
    assert (url.drivername, url.username, url.password) == ("postgresql+psycopg", "me", "a word")
    assert (url.host, url.port, url.database, dict(url.query)) == ("db", 5433, "shop", {"sslmode": "require"})


def test_bounds_are_in_the_zone_of_times_that_have_none(lite: Lite) -> None:
    source = adapter()
    source._url = make_url("mysql://db/shop")
    source._options = source._options.model_copy(update={"zone": ZoneInfo("America/New_York")})
    assert source._bound(datetime(2024, 3, 1, tzinfo=UTC)) == datetime(2024, 2, 29, 19)


def test_airflow_is_not_imported(lite: Lite) -> None:
    code = "import sys; import pipelines.sources.sql; assert 'airflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_land_again_reads_only_the_changed_window(lite: Lite, tmp_path: Path) -> None:
    revision = "SELECT count(*), max(changed) FROM visits WHERE at >= :start AND at < :end"
    options = {"since": "2024-01-01", "tables": {"visits": {"query": VISITS, "revision": revision}}}
    params = LandParams(source="sql", options=options, partition="month", tables=TABLES)  # type: ignore[arg-type]

    def landed() -> tuple[int, int, dict[str, Any]]:
        found = land(connect("sql", options), APRIL, tmp_path / "landing", tmp_path / "out", params)
        return found.read, found.new, found.manifest["visits"]

    read, new, first = landed()
    assert (read, new, list(first)) == (3, 3, ["2024-01", "2024-02", "2024-03"])
    assert landed()[:2] == (0, 0)
    lite.run("UPDATE visits SET shop = 'late', changed = 1 WHERE id = 2")
    read, new, second = landed()
    assert (read, new) == (1, 1)
    assert [month for month in second if second[month] != first[month]] == ["2024-02"]


# --- PostgreSQL


@pytest.fixture
def postgresql(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("BALLAST_SOURCE_URL", server.url)
    server.run(
        "DROP TABLE IF EXISTS visits",
        "CREATE TABLE visits (id int8, at timestamptz, local timestamp, shop text, paid numeric(12, 2), ok bool,"
        " token uuid, day date, x float4)",
        "INSERT INTO visits SELECT n, timestamptz '2024-03-01 00:00Z' + n * interval '6 hours',"
        " timestamp '2024-03-01 00:00' + n * interval '6 hours', 's' || n % 3, n + 0.25, n % 2 = 0,"
        " '00000000-0000-0000-0000-00000000000a', '2024-03-01', 0.5 FROM generate_series(0, 123) AS n",
    )
    return server


EVERY = {
    "id": "int",
    "at": "timestamp",
    "local": "timestamp",
    "shop": "string",
    "paid": "float",
    "ok": "bool",
    "token": "string",
    "day": "timestamp",
    "x": "float",
}


def test_postgresql_types_are_those_declared(postgresql: Server) -> None:
    rows = adapter("SELECT * FROM visits WHERE at >= :start AND at < :end").read("visits", "2024-03")
    table = Table(columns=EVERY, key=["id"], time="at")  # type: ignore[arg-type]
    row = conform(rows, "visits", table, "2024-03").to_pylist()[1]
    at = datetime(2024, 3, 1, 6, tzinfo=UTC)
    day = datetime(2024, 3, 1, tzinfo=UTC)
    token = "00000000-0000-0000-0000-00000000000a"
    expected = [1, at, at, "s1", 1.25, False, token, day, 0.5]
    assert list(row.values()) == expected
    assert rows.num_rows == 124


@pytest.mark.parametrize(("column", "hours"), [("at", [0, 6]), ("local", [5, 11])])
def test_postgresql_windows_are_cut_in_utc_whatever_the_columns_zone(
    postgresql: Server, column: str, hours: list[int]
) -> None:
    query = f"SELECT id, {column} AS at FROM visits WHERE {column} >= :start AND {column} < :end AND id < 120"
    source = adapter(query, window="day", zone="America/New_York", since="2024-02-29")
    days = {piece: source.read("visits", piece)["at"].to_pylist() for piece in source.pieces("visits", APRIL)}
    assert {str(moment.date()) == piece for piece, moments in days.items() for moment in moments} == {True}
    assert [moment.hour for moment in days["2024-03-05"]][:2] == hours
    assert sum(map(len, days.values())) == 120


def test_postgresql_time_that_the_clocks_show_twice_is_rejected(postgresql: Server) -> None:
    postgresql.run("UPDATE visits SET local = '2024-11-03 01:30' WHERE id = 7")
    query = "SELECT id, local FROM visits"
    with pytest.raises(DataRejected, match=r"`local` holds 2024-11-03 01:30:00, which the clocks of America/New_York"):
        adapter(query, zone="America/New_York").read("visits", "all")
    assert adapter(query).read("visits", "all")["local"][7].as_py() == datetime(2024, 11, 3, 1, 30, tzinfo=UTC)


def test_postgresql_rows_come_in_chunks(postgresql: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cursor on the server: the first rows are here before the last are made."""
    monkeypatch.setattr(sql, "CHUNK_ROWS", 100)
    query = "SELECT n AS id, CASE WHEN n < 5000 THEN 1 ELSE 1 / (n - 5000) END AS x FROM generate_series(1, 9999) AS n"
    arrived: list[int] = []
    columns = sql.Adapter._columns
    monkeypatch.setattr(
        sql.Adapter, "_columns", lambda self, rows, *more: arrived.append(len(rows)) or columns(self, rows, *more)
    )
    with pytest.raises(DataRejected, match="cannot give the rows: division by zero"):
        adapter(query).read("visits", "all")
    assert sum(arrived) >= 4000


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT gate FROM visits", r'query`: .*column "gate" does not exist'),
        ("DELETE FROM visits RETURNING id", r"does not take the query"),
        ("SELECT nextval('visits_id')", r"does not take the query"),
    ],
)
def test_postgresql_wrong_query_is_an_error(postgresql: Server, query: str, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        adapter(query).read("visits", "all")


def test_postgresql_is_never_written(postgresql: Server) -> None:
    postgresql.run("CREATE OR REPLACE FUNCTION wipe() RETURNS int LANGUAGE sql AS 'DELETE FROM visits; SELECT 1'")
    with pytest.raises(ParamsError, match=r"does not take the query: cannot execute DELETE in a read-only transaction"):
        adapter("SELECT wipe() AS id").read("visits", "all")


def test_postgresql_wrong_password_is_not_shown(postgresql: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLAST_SOURCE_URL", postgresql.url.replace(URL_PASSWORD, "hunter2"))
    with pytest.raises(
        TryAgain, match=r"cannot be reached: .*password authentication failed.*BALLAST_SOURCE_URL"
    ) as error:
        adapter().pieces("visits", APRIL)
    assert "hunter2" not in str(error.value)


def test_main_server_away_exits_75_and_leaves_nothing(postgresql: Server, tmp_path: Path) -> None:
    options = {"since": "2024-03-01", "tables": {"visits": {"query": VISITS}}}
    values = {
        "as_of": str(APRIL),
        "land": {"source": "sql", "options": options, "partition": "day", "tables": TABLES},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    environment = {**os.environ, "BALLAST_LANDING": str(tmp_path / "landing"), "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "pipelines.land", "--params", "params.yaml", "--out", "out"]

    def main() -> tuple[int, str]:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    postgresql.stop()
    code, said = main()
    postgresql.start()
    assert code == 75, said
    assert f"error: postgresql://127.0.0.1:{postgresql.port}/postgres cannot be reached:" in said
    assert said.count("\n") == 1
    assert PASSWORD not in said
    assert not (tmp_path / "landing").exists()
    assert not (tmp_path / "out").exists()
    code, said = main()
    assert code == 0, said
    assert "visits 31 days" in said
