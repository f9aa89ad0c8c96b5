"""A SQL database, by an SQLAlchemy URL and a query for each table:

    options:
      since: "2024-01-01"         # where the first window begins
      window: month               # or day: what is read at a time
      settled_days: 30            # a window that ended longer ago is read once more, and then never again
      tables:
        visits:
          query: SELECT visit, at, shop FROM visits WHERE at >= :start AND at < :end
          revision: SELECT count(*), max(changed_at) FROM visits WHERE at >= :start AND at < :end
        shops: {query: SELECT shop, city FROM shops}

The URL comes from the environment variable ``BALLAST_SOURCE_URL``, or from the one that ``url_from`` names, as there
may be a password in it. ``connection: warehouse`` takes Airflow's connection of that id, which outside of Airflow is
the environment variable ``AIRFLOW_CONN_WAREHOUSE``, a URI or JSON. A URL without a password may stand in ``url``. A
relative path of SQLite starts in ``BALLAST_SOURCE``.

A piece is a window, its bounds bound to ``:start`` and ``:end``; a query without them is one piece. ``revision`` is
what changes when a window's rows do; without one, a window is read at every landing until it has settled. Windows begin
at midnight UTC. What the database calls a time without a zone is in ``zone`` (UTC), and so are the bounds beside it.
SQLite keeps times as text, and gets the bounds as such: ``2024-01-01 00:00:00``.

Rows are sorted by all their columns: a query needs no ORDER BY. The connection only reads, where it can be told to.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal
from urllib.parse import quote
from uuid import UUID
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.types as pt
from pydantic import Field, model_validator
from sqlalchemy import URL, Connection, CursorResult, Engine, create_engine, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.pool import NullPool

from pipelines import places
from pipelines.errors import BallastError, DataRejected, ParamsError, TryAgain
from pipelines.params import Params
from pipelines.sources import _secrets

ALL = "all"  # the one piece of a query without bounds
CHUNK_ROWS = 50_000
CONNECT_TIMEOUT_S = 10
POSTGRESQL = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg"}
UTC_TIME = pa.timestamp("us", tz="UTC")
# By the first two characters of SQLSTATE: a read-only transaction, syntax or access, a feature that is not there.
WRONG_QUERY = ("25", "42", "0A")
WRONG_QUERY_SQLITE = ("SQLITE_ERROR", "SQLITE_READONLY")
AWAY = ("08", "40", "53", "57", "58")


class Query(Params):
    """How the rows of a table are asked for."""

    query: str
    revision: str | None = None


class Options(Params):
    """Where the database is, and what to ask it."""

    connection: _secrets.ConnectionId | None = None
    url_from: str = "BALLAST_SOURCE_URL"
    url: str | None = None
    zone: ZoneInfo = ZoneInfo("UTC")
    since: date | None = None
    window: Literal["day", "month"] = "month"
    settled_days: int | None = Field(None, ge=0)
    tables: dict[str, Query] = Field(min_length=1)

    @property
    def variable(self) -> str:
        """The environment variable that has the URL."""
        return _secrets.variable(self.connection) if self.connection else self.url_from

    @model_validator(mode="after")
    def _bounded(self) -> Options:
        remedy = "Take it out of params.yaml, and put the URL into the environment variable BALLAST_SOURCE_URL."
        _secrets.refuse("land.options.url", self.url or "", remedy)
        for name, asked in self.tables.items():
            for which, query in (("query", asked.query), ("revision", asked.revision)):
                where = f"`land.options.tables.{name}.{which}`"
                if query and (bound := _bounds_of(query)) not in (set(), {"start", "end"}):
                    raise ParamsError(
                        f"{where}: a window needs both :start and :end, and nothing else can be bound "
                        f"(found {', '.join(sorted(bound))}). Write both or neither; a colon of your own as \\:."
                    )
            if _bounds_of(asked.query) and not self.since:
                raise ParamsError(
                    f"`land.options.since` is missing: `{name}` is read by windows. Say where they begin."
                )
        return self


@dataclass(frozen=True)
class Window:
    """What the rows of one piece are asked with: its bounds, or nothing for a query without any."""

    piece: str
    bounds: Mapping[str, datetime]

    def is_over(self, days: int | None) -> bool:
        """Whether it ended more than so many days ago."""
        settled = timedelta(days=days) if days is not None else None
        return bool(settled is not None and self.bounds and self.bounds["end"] + settled <= datetime.now(UTC))


class Adapter:
    """One piece a window of a table."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._url = _url(options)
        self._engine = _engine(self._url)
        self._place = _mere_place(self._url)
        if self._url.get_backend_name() == "sqlite" and options.zone.key != "UTC":
            raise ParamsError(
                f"`land.options.zone` is not for SQLite (found {options.zone.key}): its times are text, taken for "
                "UTC where they name no zone. Convert them in the query."
            )

    def pieces(self, table: str, until: date) -> dict[str, str]:
        """The windows that begin before ``until``, each with its revision."""
        with self._connected(table, "revision") as connection:
            return {window.piece: self._revision(connection, table, window) for window in self._windows(table, until)}

    def read(self, table: str, piece: str) -> pa.Table:
        """The rows of one window as the driver types them; as text what has no Arrow type of its own."""
        window = next(one for one in self._windows(table, date.max) if one.piece == piece)
        where, query = f"table `{table}`, {piece}", self._asked(table).query
        with self._connected(table, "query") as connection, self._ask(connection, query, window) as result:
            names = list(result.keys())
            chunks = [self._columns(part, names, where) for part in result.partitions(CHUNK_ROWS)]
        return _sorted(pa.Table.from_arrays(_join(chunks, len(names)), names))

    def _asked(self, table: str) -> Query:
        if table not in self._options.tables:
            has = ", ".join(self._options.tables)
            raise ParamsError(f"`land.options.tables` has no query for the table `{table}` (it has: {has}). Add one.")
        return self._options.tables[table]

    def _windows(self, table: str, until: date) -> Iterator[Window]:
        since = self._options.since
        if not _bounds_of(self._asked(table).query) or since is None:
            yield Window(ALL, {})
            return
        start = since
        while start < until:
            end = _next(start, self._options.window)
            name = str(start)[:7] if self._options.window == "month" else str(start)
            yield Window(name, {"start": _midnight(start), "end": _midnight(end)})
            start = end

    def _revision(self, connection: Connection, table: str, window: Window) -> str:
        asked = self._asked(table)
        if window.is_over(self._options.settled_days):
            return f"{self._place} settled"
        if asked.revision is None:
            return f"{self._place} {time.time_ns()}"  # nothing tells whether its rows have changed
        row = self._ask(connection, asked.revision, window).first()
        return f"{self._place} {' '.join(map(str, row or ()))}"

    def _ask(self, connection: Connection, query: str, window: Window) -> CursorResult[Any]:
        bounds = {name: self._bound(window.bounds[name]) for name in _bounds_of(query)}
        result = connection.execute(text(query), bounds)
        if not result.returns_rows:
            raise ParamsError(f"`land.options.tables` must hold queries that return rows (found {query!r}).")
        return result

    def _bound(self, moment: datetime) -> datetime | str:
        """A bound as the database compares it: with its zone where it has such times, else as its own naive ones."""
        if self._url.get_backend_name() == "postgresql":
            return moment
        naive = moment.astimezone(self._options.zone).replace(tzinfo=None)
        return str(naive) if self._url.get_backend_name() == "sqlite" else naive

    def _columns(self, rows: Sequence[Any], names: list[str], where: str) -> list[pa.Array]:
        columns = zip(*rows, strict=True)
        return [
            _array(values, self._options.zone, f"{where}: `{name}`")
            for values, name in zip(columns, names, strict=True)
        ]

    @contextmanager
    def _connected(self, table: str, which: str) -> Iterator[Connection]:
        """A connection whose errors say what is wrong: the server, the query, or the data."""
        try:
            with self._engine.connect() as connection:
                if self._url.get_backend_name() == "postgresql":
                    connection = connection.execution_options(postgresql_readonly=True)
                    connection.execute(
                        text("SELECT set_config('TimeZone', :zone, false)"), {"zone": str(self._options.zone)}
                    )
                yield connection.execution_options(stream_results=which == "query")
        except DBAPIError as error:
            raise self._explained(error, f"`land.options.tables.{table}.{which}`") from None

    def _explained(self, error: DBAPIError, where: str) -> BallastError:
        said = " ".join(str(error.orig).replace(self._url.password or "\0", "***").split())
        state = str(getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None) or "")
        lite = getattr(error.orig, "sqlite_errorname", "")
        if isinstance(error, ProgrammingError) or state.startswith(WRONG_QUERY) or lite in WRONG_QUERY_SQLITE:
            return ParamsError(f"{where}: {self._place} does not take the query: {said}. Correct it.")
        if isinstance(error, OperationalError | InterfaceError) or state.startswith(AWAY):
            from_where = "`land.options.url`" if self._options.url else self._options.variable
            return TryAgain(f"{self._place} cannot be reached: {said}. Check that it is up, and {from_where}.")
        return DataRejected(f"{where}: {self._place} cannot give the rows: {said}. Correct the data, or the query.")


def _bounds_of(query: str) -> set[str]:
    return set(text(query).compile().params)


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def _next(day: date, unit: str) -> date:
    """The next midnight at which a window begins."""
    return day + timedelta(days=1) if unit == "day" else (day.replace(day=1) + timedelta(days=31)).replace(day=1)


# --- the database


def _url(options: Options) -> URL:
    """The URL of the database, from params.yaml or from the environment; the error for a wrong one does not show it."""
    where, found = "`land.options.url`", options.url
    if not found:
        where, found = f"the environment variable {options.variable}", os.environ.get(options.variable)
    if not found:
        made = f", or make the connection `{options.connection}` in Airflow" if options.connection else ""
        raise ParamsError(f"Where is the database? Set {where} (found none) to its SQLAlchemy URL{made}.")
    try:
        url = _of_json(json.loads(found)) if found.lstrip().startswith("{") else make_url(found)
        if "__extra__" in url.query:  # how Airflow writes in a URI what no other part can hold
            extra = json.loads(str(url.query["__extra__"]))
            url = url.difference_update_query(["__extra__"]).update_query_dict(_words(extra))
    except (ArgumentError, ValueError, KeyError, AttributeError):
        raise ParamsError(
            f"{where} is no URL of a database. It looks like postgresql://user:password@host/name."
        ) from None
    return url.set(drivername=POSTGRESQL.get(url.drivername, url.drivername))


def _of_json(connection: dict[str, Any]) -> URL:
    """The URL of a connection of Airflow."""
    extra = connection.get("extra") or {}
    return URL.create(
        connection["conn_type"],
        connection.get("login"),
        connection.get("password"),
        connection.get("host"),
        connection.get("port"),
        connection.get("schema"),
        _words(json.loads(extra) if isinstance(extra, str) else extra),
    )


def _words(extra: Mapping[str, Any]) -> dict[str, str]:
    return {name: value for name, value in extra.items() if isinstance(value, str)}


def _mere_place(url: URL) -> str:
    """Which database it is, with no word of who asks: part of a revision, and fit for a log."""
    return URL.create(url.get_backend_name(), host=url.host, port=url.port, database=url.database).render_as_string()


def _engine(url: URL) -> Engine:
    try:
        if url.get_backend_name() == "sqlite":
            path = (places.source() / (url.database or "")).absolute()
            # Read-only, as SQLite makes a database that is not there.
            url = url.set(database=f"file:{quote(str(path))}", query={"mode": "ro", "uri": "true"})
        patient = url.get_backend_name() != "postgresql" or "connect_timeout" in url.query
        arguments = {} if patient else {"connect_timeout": CONNECT_TIMEOUT_S}
        return create_engine(url, poolclass=NullPool, connect_args=arguments)
    except (NoSuchModuleError, ImportError) as error:
        raise ParamsError(f"There is no driver for {url.drivername}:// ({error}). Add it to pyproject.toml.") from None


# --- rows


def _array(values: Sequence[Any], zone: ZoneInfo, where: str) -> pa.Array:
    """The values of one type; as text where they are of several, or of one that Arrow has not."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {datetime}:
        return pa.array([_in_utc(value, zone, where) for value in values], UTC_TIME)
    if len(kinds) <= 1 and not kinds & {Decimal, UUID}:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError):
            pass
    return pa.array([None if value is None else _written(value, zone, where) for value in values], pa.string())


def _in_utc(value: datetime | None, zone: ZoneInfo, where: str) -> datetime | None:
    if value is None or value.tzinfo:
        return value
    local = value.replace(tzinfo=zone)
    if local.utcoffset() != local.replace(fold=1).utcoffset():
        raise DataRejected(
            f"{where} holds {value}, which the clocks of {zone} show twice or never. Have the query give it in UTC, "
            "and convert the other times of the database in it as well."
        )
    return local


def _written(value: Any, zone: ZoneInfo, where: str) -> str:
    if isinstance(value, Decimal):
        return f"{value:f}"
    return str(_in_utc(value, zone, where)) if isinstance(value, datetime) else str(value)


def _join(chunks: Sequence[Sequence[pa.Array]], columns: int) -> list[pa.ChunkedArray]:
    return [_chunked([chunk[number] for chunk in chunks]) for number in range(columns)]


def _chunked(arrays: Sequence[pa.Array]) -> pa.ChunkedArray:
    """The chunks of a column as one: of the type that those with a value have, else as text."""
    types = {array.type for array in arrays if not pt.is_null(array.type)} or {pa.null()}
    one = types.pop() if len(types) == 1 else pa.string()
    return pa.chunked_array([array.cast(one) for array in arrays], one)


def _sorted(rows: pa.Table) -> pa.Table:
    """The rows in an order of their own: the database may give them in another one the next time."""
    names = rows.column_names
    if len(set(names)) < len(names) or any(pt.is_nested(kind) for kind in rows.schema.types):
        return rows  # which landing refuses, and says why
    return rows.sort_by([(name, "ascending") for name in names])
