"""CSV and Parquet files, found by globs: ``options: {flights: inbox/flights-*.csv}``, or a list of globs for a table.

A piece is a file. Its revision is its size and its times of modification and change, so a file is read again when it
was written again. What this cannot see is an edit that keeps the size within one tick of the file system's clock: some
milliseconds, 2 s on FAT. A name that begins with a dot is a file still on its way, and is left alone.

Relative globs start in ``BALLAST_SOURCE``: for a DAG run the project's checkout (its workspace is a clone, without the
data that git does not hold), else the folder the stage runs in. In CSV an empty field is null.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pyarrow as pa

from pipelines import places
from pipelines.errors import DataRejected, ParamsError, TryAgain
from pipelines.params import Params
from pipelines.sources import read_csv, read_parquet

Globs = str | list[str]


class Options(Params, extra="allow"):
    """The globs of each table, by the table's name."""

    __pydantic_extra__: dict[str, Globs]


class Adapter:
    """One piece a file."""

    def __init__(self, options: Options) -> None:
        by_table = options.__pydantic_extra__
        self._globs = {table: [globs] if isinstance(globs, str) else globs for table, globs in by_table.items()}

    def pieces(self, table: str, until: date) -> dict[str, str]:
        """Every file that a glob of the table matches; DataRejected if a glob matches none."""
        if table not in self._globs:
            has = ", ".join(self._globs) or "none"
            raise ParamsError(f"`land.options` has no globs for the table `{table}` (it has: {has}). Add them.")
        return {str(path): _revision(path) for pattern in self._globs[table] for path in _matches(table, pattern)}

    def read(self, table: str, piece: str) -> pa.Table:
        """The rows of one file: Parquet as typed there, CSV as strings."""
        try:
            data = Path(piece).read_bytes()
        except OSError as error:
            raise _unreachable(piece, error) from None
        return read_parquet(data, piece) if _suffix(piece) == ".parquet" else read_csv(data, piece, nulls=[""])


def _matches(table: str, pattern: str) -> list[Path]:
    anchor = Path(pattern).anchor
    base = Path(anchor) if anchor else places.source()
    try:
        found = base.glob(str(Path(pattern).relative_to(anchor)))
        paths = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise _unreachable(pattern, error) from None
    if not paths:
        raise DataRejected(
            f"`land.options.{table}`: no file matches {pattern} (looked in {base.absolute()}). "
            "Put the files there, or correct the glob."
        )
    if strange := [path for path in paths if _suffix(path) not in (".csv", ".parquet")]:
        raise DataRejected(
            f"`land.options.{table}`: {pattern} matches {strange[0]}, which is neither .csv nor .parquet. "
            "Narrow the glob."
        )
    return paths


def _suffix(path: str | Path) -> str:
    return Path(path).suffix.lower()


def _revision(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError as error:
        raise _unreachable(path, error) from None
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"


def _unreachable(path: str | Path, error: OSError) -> TryAgain:
    return TryAgain(f"{path} cannot be reached: {error.strerror or error}. Check the mount and its permissions.")
