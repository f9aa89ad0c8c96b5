"""CSV and Parquet files over http(s) and in S3, by one URL for a table or a list of them:

    options:
      visits: s3://warehouse/visits/*.parquet
      weather: {url: "https://example.org/weather-{date:%Y-%m}.csv", since: "2024-01-01"}
      shops: https://example.org/shops.csv

A ``*`` matches what S3 lists. A web server lists nothing, so a name there may hold a date instead, as one in S3 may,
which is filled in for every day from ``since`` to the as-of date (``%Y-%m-%d``, ``%Y/%m``, ...). Days whose file is not
there are left out.

A piece is a file. It is read again when its ETag, its time or its size is another; where a server says neither ETag nor
time, always. In CSV an empty field is null.

What it takes to get in comes from the environment, in the ways of those who read it: AWS's own variables for S3
(``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``, ``AWS_ENDPOINT_URL_S3``, ...), ``~/.netrc`` for a web server, and fsspec's for
both, such as ``FSSPEC_HTTP='{"headers": {"Authorization": "Bearer ..."}}'`` and ``FSSPEC_S3_ANON=true``. Or from a
connection of Airflow, ``connection: lake`` (outside of Airflow ``AIRFLOW_CONN_LAKE``, in JSON). One with a host is for
that web server alone: its login, and as ``extra`` headers. One without is for S3: the two keys as login and password,
and as ``extra`` ``endpoint_url``, ``region_name`` and ``aws_session_token``.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date, timedelta
from functools import cached_property, partial
from pathlib import PurePosixPath
from time import time_ns
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from aiohttp import ClientResponseError, ClientTimeout, encode_basic_auth
from botocore.exceptions import BotoCoreError
from pydantic import model_validator

from pipelines.errors import DataRejected, ParamsError, TryAgain
from pipelines.params import Params
from pipelines.sources import _secrets, read_csv, read_parquet

AT_ONCE = 16
TAGS = ("ETag", "Content-MD5", "Last-Modified", "LastModified")
TIMEOUT = ClientTimeout(total=None, sock_connect=10, sock_read=60)


class Dated(Params):
    """Files with a date in their name, one for each that is written differently from ``since`` on."""

    url: str
    since: date

    def names(self, until: date) -> list[str]:
        """The URLs of all days before ``until``, each once."""
        days = (self.since + timedelta(days=number) for number in range((until - self.since).days))
        return list(dict.fromkeys(self.url.format(date=day) for day in days))


Where = str | Dated


class Options(Params, extra="allow"):
    """The URLs of each table, by the table's name."""

    connection: _secrets.ConnectionId | None = None
    __pydantic_extra__: dict[str, Where | list[Where]]

    @model_validator(mode="after")
    def _sound(self) -> Options:
        for table, wheres in self.by_table.items():
            for where in wheres:
                _check(f"land.options.{table}", where)
        return self

    @property
    def by_table(self) -> dict[str, list[Where]]:
        """A list for every table."""
        return {
            table: found if isinstance(found, list) else [found] for table, found in self.__pydantic_extra__.items()
        }


class Adapter:
    """One piece a file."""

    def __init__(self, options: Options) -> None:
        self._by_table = options.by_table
        login = _secrets.connection(options.connection) if options.connection else {}
        self._host = _host(login)
        self._keys = {} if self._host else _keys(login)
        self._headers = _headers(login) if self._host else {}

    def pieces(self, table: str, until: date) -> dict[str, str]:
        """Every file that is there now; DataRejected if there is none for one of the table's URLs."""
        if table not in self._by_table:
            has = ", ".join(self._by_table) or "none"
            raise ParamsError(f"`land.options` has no URL for the table `{table}` (it has: {has}). Add one.")
        return {url: tag for where in self._by_table[table] for url, tag in self._found(table, where, until).items()}

    def read(self, table: str, piece: str) -> pa.Table:
        """The rows of one file: Parquet as typed there, CSV as strings."""
        with _reaching(piece):
            data = self._system(piece).cat_file(piece)
        return read_parquet(data, piece) if _suffix(piece) == ".parquet" else read_csv(data, piece, nulls=[""])

    def _found(self, table: str, where: Where, until: date) -> dict[str, str]:
        url = where.url if isinstance(where, Dated) else where
        names = where.names(until) if isinstance(where, Dated) else [where]
        look = partial(_look, self._system(url))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = {name: tag for one in pool.map(look, names) for name, tag in one.items()}
        if not found:
            raise DataRejected(f"`land.options.{table}`: there is no file {url}. Put it there, or correct the URL.")
        if strange := [name for name in found if _suffix(name) not in (".csv", ".parquet")]:
            raise DataRejected(
                f"`land.options.{table}`: {strange[0]} is neither .csv nor .parquet. Name such files only."
            )
        return found

    def _system(self, url: str) -> Any:
        if url.startswith("s3:"):
            return self._s3
        return self._http_of_login if urlsplit(url).hostname == self._host else self._http

    @cached_property
    def _s3(self) -> Any:
        return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, **self._keys)

    @cached_property
    def _http(self) -> Any:
        return _web({})

    @cached_property
    def _http_of_login(self) -> Any:
        return _web(self._headers)


def _web(headers: dict[str, str]) -> Any:
    client = {"trust_env": True, "timeout": TIMEOUT, "headers": headers}  # the environment's: proxies, and .netrc
    return fsspec.filesystem("http", skip_instance_cache=True, client_kwargs=client)


def _host(login: dict[str, Any]) -> str | None:
    """The web server that a connection is for."""
    host = login.get("host") or ""
    return urlsplit(host if "://" in host else f"//{host}").hostname


def _headers(login: dict[str, Any]) -> dict[str, str]:
    """What the web server is told with each request. No ``auth``: aiohttp tells that to whom a redirect leads, too."""
    if not login.get("login"):
        return dict(login["extra"])
    return {"Authorization": encode_basic_auth(login["login"], login.get("password") or ""), **login["extra"]}


def _keys(login: dict[str, Any]) -> dict[str, Any]:
    """What s3fs takes of a connection; what it does not take and would have to is refused."""
    extra = dict(login.get("extra", {}))
    region = extra.pop("region_name", None)
    taken = {
        "key": login.get("login"),
        "secret": login.get("password"),
        "token": extra.pop("aws_session_token", None),
        "endpoint_url": extra.pop("endpoint_url", None),
        "client_kwargs": {"region_name": region} if region else None,
    }
    if extra:
        raise ParamsError(
            "`land.options.connection`: for S3 the extra of a connection may hold endpoint_url, region_name and "
            f"aws_session_token (found {', '.join(extra)}). A role comes by AWS's own variables."
        )
    return {name: value for name, value in taken.items() if value}


def _check(name: str, where: Where) -> None:
    url = where.url if isinstance(where, Dated) else where
    _secrets.refuse(name, url, "Take it out of params.yaml; pipelines/sources/remote.py says where it may stand.")
    if urlsplit(url).scheme not in ("https", "http", "s3"):
        raise ParamsError(
            f"`{name}` must begin with https://, http:// or s3:// (found {url}). Files here: source `files`."
        )
    if "*" in url and not url.startswith("s3:"):
        raise ParamsError(
            f"`{name}`: a web server lists nothing to match * with (found {url}). Write a date, {{date:%Y-%m}}."
        )
    if not isinstance(where, Dated):
        return
    try:
        names = where.names(where.since + timedelta(days=800))
    except (LookupError, ValueError, AttributeError):
        names = []
    if len(names) < 2:
        raise ParamsError(
            f"`{name}` has no date in it (found {url}). Write one as {{date:%Y-%m-%d}}, or leave out `since`."
        )


def _look(system: Any, url: str) -> dict[str, str]:
    """The files of one URL or pattern, each with its revision; none if there are none."""
    with _reaching(url):
        if "*" in url:
            found = system.glob(url, detail=True)
            return {f"s3://{name}": _revision(info) for name, info in found.items() if info["type"] == "file"}
        try:
            return {url: _revision(system.info(url))}
        except FileNotFoundError as error:
            # By http, fsspec says so of whatever went wrong.
            if isinstance(error.__cause__, ClientResponseError) and error.__cause__.status in (404, 410):
                return {}
            if error.__cause__ and not url.startswith("s3:"):
                raise error.__cause__ from None
            return {}


def _suffix(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).suffix.lower()


def _revision(info: dict[str, Any]) -> str:
    """What the server says of the file's state; if that is nothing, what it never says twice."""
    tags = [str(info[tag]) for tag in TAGS if info.get(tag)] or [str(time_ns())]
    return " ".join([str(info.get("size")), *tags])


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """What goes wrong on the way there is no fault of the data."""
    try:
        yield
    except (OSError, BotoCoreError, ClientResponseError) as error:
        said = (
            f"{error.status} {error.message}" if isinstance(error, ClientResponseError) else str(error) or repr(error)
        )
        raise TryAgain(
            f"{url} cannot be reached: {_secrets.mask(said)}. Check that it is up, and what lets you in there."
        ) from None
