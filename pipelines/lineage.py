"""Lineage by hashes, both ways: what a version was made from, and which versions saw a partition of the data.

Read from what ``register`` kept. A file counts only with the hash that the version's own dvc.lock has of it: two
versions may share a run, and an artifact can be changed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from pipelines import registry
from pipelines.errors import BallastError
from pipelines.files import canonical_json, sha256
from pipelines.registry import Version
from pipelines.state import State

MANIFEST, VERDICT, UV_LOCK = "land/manifest.json", "validate/verdict.json", "uv.lock"
TABLES = Path("data/ingest/tables")
ALL = "all"  # land's name of the one partition of a table without time; to import land takes a sixth of a second

Objects = Sequence[Mapping[str, Any]]  # the pieces of a partition, each by its sha256 and rows
Manifest = Mapping[str, Mapping[str, Objects]]  # by table, partition


@dataclass(frozen=True)
class Records:
    """What is on record of how a version was made: the stages of its dvc.lock, files, and why others are not."""

    stages: Mapping[str, Any]
    files: Mapping[str, Any]
    missing: Mapping[str, str]

    def md5(self, path: str) -> str | None:
        """The hash that dvc.lock has of a file as a stage read it: it may have been written again. Else as written."""
        entries = [entry for kind in ("deps", "outs") for one in self.stages.values() for entry in one.get(kind, [])]
        return next((entry.get("md5") for entry in entries if entry["path"] == path), None)

    @property
    def manifest(self) -> Manifest | None:
        """The hashes of the partitions, if they are on record."""
        return self.files[MANIFEST]["tables"] if MANIFEST in self.files else None


# --- from a version to its data


def records(version: Version, *names: str) -> Records:
    """The named JSON files, as ``land/manifest.json`` for the one under ``data/``, as far as they are on record."""
    lock = registry.kept(version, "dvc.lock")
    if lock is None or hashlib.sha256(lock).hexdigest() != version.lock:
        why = "no dvc.lock was kept" if lock is None else "the dvc.lock that was kept is not the version's own"
        return Records({}, {}, dict.fromkeys([*names, UV_LOCK], why))
    found = Records(_stages(lock), files := {}, missing := {})
    for name in names:
        content = registry.kept(version, name)
        if content is None:
            missing[name] = f"no {name} was kept"
        elif hashlib.md5(content).hexdigest() != found.md5(f"data/{name}"):
            missing[name] = f"the {name} that was kept is not the one in dvc.lock"
        else:
            files[name] = json.loads(content)
    if found.md5(UV_LOCK) is None:
        missing[UV_LOCK] = "dvc.lock has no hash of it"
    return found


def _stages(lock: bytes) -> Mapping[str, Any]:
    found = yaml.load(lock, yaml.CSafeLoader)  # the plain loader takes 80 ms, for each version
    return found.get("stages", {}) if isinstance(found, dict) else {}


def tables(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Each table's partitions, with one hash over all of theirs: that of the table's part of the manifest."""
    return {
        name: {
            "first": min(partitions),
            "last": max(partitions),
            "rows": sum(stored["rows"] for objects in partitions.values() for stored in objects),
            "sha256": hashlib.sha256(canonical_json(partitions).encode()).hexdigest(),
            "partitions": partitions,
        }
        for name, partitions in manifest.items()
    }


# --- from data to versions


def seen(path: Path, state: State) -> dict[str, Any]:
    """Which versions saw a partition, in what revision and as what; ``path`` is a file of it, or ``TABLE/PARTITION``.

    Raises BallastError if that is no partition.
    """
    versions = registry.versions()
    kept = {version.number: records(version, MANIFEST) for version in versions}
    file = _file(path)
    digest = sha256(file) if file else None
    table, partition = _partition(path, digest, [one.manifest for one in kept.values() if one.manifest])
    champion = state.champion()
    return {
        "model": registry.name(),
        "table": table,
        "partition": partition,
        "file": str(file) if file else None,
        "sha256": digest,
        "versions": [
            {
                "version": version.number,
                "champion": version.number == champion,
                "as_of": version.tags.get("ballast.as_of"),
                **_saw(version, kept[version.number], table, partition, digest),
            }
            for version in versions
        ],
    }


def _file(path: Path) -> Path | None:
    """The file that is meant; None if there is none, and the path only names a partition."""
    return next((file for file in (path, TABLES / f"{path}.parquet") if file.is_file()), None)


def _partition(path: Path, digest: str | None, manifests: Sequence[Manifest]) -> tuple[str, str]:
    """The table and partition that a path names (a second piece is of the same one), else those of its bytes."""
    known = [(table, name, objects) for one in manifests for table in one for name, objects in one[table].items()]
    table, stem = path.parent.name, path.name.removesuffix(".parquet")
    for named in ((table, stem), (table, re.sub(r"-[1-9]\d*$", "", stem))):
        if named in {(table, name) for table, name, _ in known}:
            return named
    for there, name, objects in known:
        if digest in {stored["sha256"] for stored in objects}:
            return there, name
    is_new = digest and table in {table for table, _, _ in known}
    if table and (is_new or not known):
        return table, stem
    raise _no_partition(path, f"{table}/{stem}", sorted({f"{table}/{name}" for table, name, _ in known}))


def _no_partition(path: Path, named: str, known: list[str]) -> BallastError:
    near = difflib.get_close_matches(named, known, cutoff=0.4)
    return BallastError(
        f"{path} is no partition that a version on record saw. "
        + (f"Near it: {', '.join(near)}. " if near else "")
        + f"Name one as {TABLES}/TABLE/PARTITION.parquet, or as TABLE/PARTITION."
    )


def _saw(version: Version, kept: Records, table: str, partition: str, digest: str | None) -> dict[str, Any]:
    """What a version saw of the partition: ``saw`` is None if that is not on record."""
    objects = (kept.manifest or {}).get(table, {}).get(partition, [])
    hashes = [stored["sha256"] for stored in objects]
    saw = "nothing" if not hashes else "a revision" if digest is None else "another revision"
    return {
        "saw": None if kept.manifest is None else "these bytes" if digest in hashes else saw,
        "sha256": hashes,
        "rows": sum(stored["rows"] for stored in objects),
        "used_as": _used_as(partition, version) if hashes else [],
        "refit": version.tags.get("ballast.refit") == "true",
        "missing": kept.missing.get(MANIFEST),
    }


def _used_as(partition: str, version: Version) -> list[str]:
    """The windows that the days of a partition lie in; ``reference`` for a table without time."""
    if partition == ALL:
        return ["reference"]
    windows = json.loads(version.tags.get("ballast.windows", "{}"))
    size = len(partition)  # of a day or a month
    return [
        name
        for name, window in windows.items()
        if window["start"][:size] <= partition <= _last_moment(window["end"])[:size]
    ]


def _last_moment(end: str) -> str:
    return (datetime.fromisoformat(end) - timedelta(microseconds=1)).isoformat()
