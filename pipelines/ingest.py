"""Lay the landed partitions out as files that DVC tracks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import places, stage
from pipelines.errors import BallastError, exit_with
from pipelines.files import read_json, whole_folder
from pipelines.params import load
from pipelines.schema import Declared, Table

LAND_AGAIN = "Run `python -m pipelines.land` again"


def ingest(manifest: Path, landing: Path, out: Path, tables: Mapping[str, Table]) -> dict[str, Any]:
    """Copy every object that the manifest names to ``out/tables/<table>/<partition>.parquet``.

    A partition that came in several pieces has several files, the second being ``<partition>-2.parquet``. Each copy's
    hash is checked on the way. Copies, not links: DVC may link what it tracks, and a write in place would then go
    through to the store. Raise BallastError if an object is missing or damaged, with ``out/tables`` as it was.
    """
    landed = read_json(manifest)["tables"]
    if missing := [name for name in tables if name not in landed]:
        raise BallastError(f"{manifest} has no table `{missing[0]}`, which params.yaml declares. {LAND_AGAIN}.")
    with whole_folder(out / "tables") as part:
        for name in tables:
            (part / name).mkdir()
            for partition, objects in landed[name].items():
                for number, stored in enumerate(objects, start=1):
                    suffix = f"-{number}" if number > 1 else ""
                    _copy(landing, stored["sha256"], part / name / f"{partition}{suffix}.parquet")
    rows = {name: sum(stored["rows"] for objects in landed[name].values() for stored in objects) for name in tables}
    return {"summary": summary(landed, tables, rows), "rows": rows}


def _copy(landing: Path, sha256: str, target: Path) -> None:
    source = landing / "objects" / sha256[:2] / f"{sha256[2:]}.parquet"
    try:
        data = source.read_bytes()
    except FileNotFoundError:
        raise BallastError(f"The landing store lacks the object {source}. {LAND_AGAIN}.") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BallastError(f"The object {source} is damaged: its hash is not its name. Delete it. {LAND_AGAIN}.")
    target.write_bytes(data)


def summary(landed: Mapping[str, Mapping[str, Any]], tables: Mapping[str, Table], rows: Mapping[str, int]) -> str:
    """One line: ``90 days · 80,789 flights · 3,322 planes``."""
    partitions = {partition for name, table in tables.items() if table.time for partition in landed[name]}
    unit = "month" if partitions and len(min(partitions)) == len("2013-01") else "day"
    span = [f"{len(partitions):,} {unit}{'s' * (len(partitions) != 1)}"] if partitions else []
    return " · ".join([*span, *(f"{count:,} {name}" for name, count in rows.items())])


def main() -> None:
    """Ingest what data/land names."""
    args = stage.options("ingest", "manifest", "out")
    tables = load(args.params, "land", Declared).tables
    stage.finish("ingest", args.out, ingest(args.manifest, places.landing(), args.out, tables))


if __name__ == "__main__":
    exit_with(main)
