"""Ask the source for what is missing up to the as-of date; store it by content.

The landing store holds two things, both written whole:

    objects/ab/cdef….parquet   a partition of a piece, under the SHA-256 of its bytes: never changed, so safe to share
    index/<source>.json        what each piece gave and at which revision, so that asking again reads nothing

Objects come before the index that names them, the index before the manifest. Whatever is lost by a crash, or
to another landing that wrote the index at the same time, costs no more than reading a piece again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pipelines import places, stage
from pipelines.errors import BallastError, DataRejected, ParamsError, exit_with
from pipelines.files import canonical_json, read_json, whole_file, write_json
from pipelines.params import Params, load
from pipelines.params import as_of as read_as_of
from pipelines.schema import Table
from pipelines.sources import Source, connect
from pipelines.sources._conform import conform

log = logging.getLogger(__name__)

UNITS = {"day": "D", "month": "M"}
ALL = "all"  # the one partition of a table without time


class LandParams(Params):
    """Section ``land`` of params.yaml."""

    source: str
    options: dict[str, Any] = Field(default_factory=dict)
    partition: Literal["day", "month"]
    tables: dict[str, Table] = Field(min_length=1)

    @model_validator(mode="after")
    def _declared(self) -> LandParams:
        for name, table in self.tables.items():
            where = f"`land.tables.{name}`"
            if not name.isidentifier():
                raise ParamsError(f"{where}: {name!r} cannot name a table in SQL. Use letters, digits and underscores.")
            used = [*table.key, *([table.time] if table.time else [])]
            if missing := [column for column in used if column not in table.columns]:
                raise ParamsError(f"{where}: its key or time names {missing[0]!r}, which its columns do not declare.")
            if table.time and table.columns[table.time] != "timestamp":
                found = table.columns[table.time]
                raise ParamsError(f"{where}: its time column `{table.time}` must be a timestamp (found {found}).")
        return self


class Object(TypedDict):
    """A stored partition of one piece."""

    sha256: str
    rows: int


class Entry(TypedDict):
    """What the index knows of a piece: all its rows before ``until`` are in ``partitions``.

    ``first`` and ``last`` are the times of its first and last row, landed or not, and ``rest`` that of the first row
    from ``until`` on; None if there is no such row. ISO 8601 in UTC, all of one shape, so that they compare as text.
    """

    revision: str
    until: str
    first: str | None
    last: str | None
    rest: str | None
    partitions: dict[str, Object]


Index = dict[str, dict[str, dict[str, Entry]]]  # by table, hash of the settings, piece
Manifest = dict[str, dict[str, list[Object]]]  # by table, partition


@dataclass
class Store:
    """The objects of the landing store."""

    root: Path
    written: set[str] = field(default_factory=set)

    def path(self, sha256: str) -> Path:
        """Where the object of this hash lies."""
        return self.root / "objects" / sha256[:2] / f"{sha256[2:]}.parquet"

    def put(self, rows: pa.Table) -> Object:
        """Store rows; equal rows are one object, as their Parquet bytes are equal."""
        sink = pa.BufferOutputStream()
        # One chunk a column: pages are cut at chunks, and where those lie depends on the rows around.
        pq.write_table(rows.combine_chunks(), sink, compression="zstd", store_schema=False)
        data = sink.getvalue()
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.path(sha256).exists():
            with whole_file(self.path(sha256)) as part:
                part.write_bytes(data)
            self.written.add(sha256)
        return Object(sha256=sha256, rows=rows.num_rows)

    def before(self, stored: Object, time: str, as_of: date) -> Object | None:
        """The object of those rows of a stored one that are before the as-of date; None if there are none."""
        path = self.path(stored["sha256"])
        try:
            rows = pq.read_table(path, partitioning=None)
        except (pa.ArrowException, OSError) as error:
            raise BallastError(f"The landed object {path} cannot be read: {error}. Delete it; land again.") from None
        rows = rows.filter(pc.less(rows[time], pa.scalar(as_of).cast(rows[time].type)))
        return self.put(rows) if rows.num_rows else None


@dataclass(frozen=True)
class Landed:
    """The manifest, and what it took to make it: stored partitions that were new, pieces that were read."""

    manifest: Manifest
    new: int
    pieces: int
    read: int

    @property
    def partitions(self) -> int:
        """How many partitions the tables have together."""
        return sum(map(len, self.manifest.values()))


def land(source: Source, as_of: date, landing: Path, out: Path, params: LandParams) -> Landed:
    """Land every table up to the as-of date and write ``out/manifest.json``, the hashes of its partitions.

    Raise DataRejected or TryAgain, with index and manifest as they were, when any table cannot be had whole.
    """
    store = Store(landing)
    path = landing / "index" / f"{params.source}.json"
    index = _read_index(path)
    manifest: Manifest = {}
    pieces = read = 0
    for name in sorted(params.tables):
        entries, now = _ask(source, name, as_of, index, params, store)
        manifest[name] = _partitions(name, entries, as_of, params, store)
        pieces, read = pieces + len(entries), read + now
    if read:
        write_json(path, index)
    write_json(out / "manifest.json", {"tables": manifest})
    stored = [{one["sha256"] for one in objects} for table in manifest.values() for objects in table.values()]
    return Landed(manifest, sum(not store.written.isdisjoint(hashes) for hashes in stored), pieces, read)


def _read_index(path: Path) -> Index:
    """The index as it stands; one that cannot be read is as good as none."""
    try:
        index: Index = read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        log.warning("The index %s is damaged (%s); every piece is read again.", path, error)
        return {}
    return index


def _settings(params: LandParams, table: Table) -> str:
    """A hash of all settings that an entry of the index depends on."""
    values = params.model_dump(mode="json", include={"options", "partition"})
    text = canonical_json({**values, "columns": list(table.columns.items()), "time": table.time})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ask(
    source: Source, name: str, as_of: date, index: Index, params: LandParams, store: Store
) -> tuple[list[Entry], int]:
    """The entries of a table's pieces, and how many of them had to be read; ``index`` learns what they gave."""
    table, read = params.tables[name], 0
    known = index.setdefault(name, {}).setdefault(_settings(params, table), {})
    pieces = dict(sorted(source.pieces(name, as_of).items()))
    for piece, revision in pieces.items():
        if _must_read(known.get(piece), revision, as_of, store):
            rows = conform(source.read(name, piece), name, table, piece)
            known[piece] = _store_piece(rows, revision, as_of, table, params, store)
            read += 1
    return [known[piece] for piece in pieces], read


def _must_read(entry: Entry | None, revision: str, as_of: date, store: Store) -> bool:
    if entry is None or entry["revision"] != revision:
        return True
    if entry["rest"] and entry["rest"] < as_of.isoformat():
        return True
    return not all(store.path(stored["sha256"]).exists() for stored in entry["partitions"].values())


def _store_piece(rows: pa.Table, revision: str, as_of: date, table: Table, params: LandParams, store: Store) -> Entry:
    """Store the rows of a piece that are before the as-of date, by partition."""
    until = as_of.isoformat()
    if table.time is None:
        stored = {ALL: store.put(rows)} if rows.num_rows else {}
        return Entry(revision=revision, until=until, first=None, last=None, rest=None, partitions=stored)
    times = rows[table.time].to_numpy().astype("datetime64[us]")
    visible = times < np.datetime64(until)
    landed = rows if visible.all() else rows.filter(pa.array(visible))
    partitions = {name: store.put(part) for name, part in _split(landed, times[visible], UNITS[params.partition])}
    return Entry(
        revision=revision,
        until=until,
        first=_least(times),
        last=str(times.max()) if len(times) else None,
        rest=_least(times[~visible]),
        partitions=partitions,
    )


def _least(times: np.ndarray[Any, Any]) -> str | None:
    return str(times.min()) if len(times) else None


def _split(rows: pa.Table, times: np.ndarray[Any, Any], unit: str) -> Iterator[tuple[str, pa.Table]]:
    """Yield the rows of each day or month, in the order of the source."""
    keys = times.astype(f"datetime64[{unit}]")
    if (keys[1:] < keys[:-1]).any():
        order = np.argsort(keys, kind="stable")
        rows, keys = rows.take(pa.array(order)), keys[order]
    names, starts = np.unique(keys, return_index=True)
    for name, (start, end) in zip(names, pairwise([*starts, len(keys)]), strict=True):
        yield str(name), rows.slice(start, end - start)


def _partitions(
    name: str, entries: list[Entry], as_of: date, params: LandParams, store: Store
) -> dict[str, list[Object]]:
    """The objects of a table by partition, in order of the pieces; DataRejected if nothing is before the as-of date."""
    found: dict[str, list[Object]] = {}
    for entry in entries:
        for partition, stored in entry["partitions"].items():
            visible = _visible(partition, stored, entry, as_of, params.tables[name], store)
            if visible:
                found.setdefault(partition, []).append(visible)
    if not found:
        raise _nothing(name, entries, as_of, params)
    return dict(sorted(found.items()))


def _visible(partition: str, stored: Object, entry: Entry, as_of: date, table: Table, store: Store) -> Object | None:
    """The object, less what an earlier as-of date than the one it was landed under may not see."""
    until = as_of.isoformat()
    if table.time is None or entry["until"] <= until or partition < until[: len(partition)]:
        return stored
    return store.before(stored, table.time, as_of) if until.startswith(partition) else None


def _nothing(name: str, entries: list[Entry], as_of: date, params: LandParams) -> DataRejected:
    first = min((entry["first"] for entry in entries if entry["first"]), default=None)
    last = max((entry["last"] for entry in entries if entry["last"]), default=None)
    if first is None or last is None:
        return DataRejected(f"The source `{params.source}` has no row for the table `{name}`. It must bring some.")
    return DataRejected(
        f"The source `{params.source}` has no row for the table `{name}` before the as-of date {as_of}: "
        f"its rows go from {first[:16]} to {last[:16]} UTC. Choose a later `as_of`, or bring earlier rows."
    )


def summary(manifest: Manifest, params: LandParams) -> str:
    """One line: ``flights 90 days · planes``."""
    return " · ".join(
        f"{name} {len(manifest[name])} {params.partition}{'s' * (len(manifest[name]) != 1)}" if table.time else name
        for name, table in params.tables.items()
    )


def main() -> None:
    """Land what params.yaml asks for. What was new is printed only: equal runs have equal outs."""
    args = stage.options("land", "out")
    params = load(args.params, "land", LandParams)
    source = connect(params.source, params.options)
    landed = land(source, read_as_of(args.params), places.landing(), args.out, params)
    stage.finish("land", args.out, {"summary": summary(landed.manifest, params)})
    new = f"{landed.new:,} of {landed.partitions:,} partitions new"
    print(f"{'':<10} {new} · read {landed.read:,} of {landed.pieces:,} pieces", flush=True)


if __name__ == "__main__":
    exit_with(main)
