"""What lies under var/ and not in a workspace, and other runs need: it travels by the two remotes as well.

    landing/index/<source>.json, landing/objects/…    the landing store, which land and ingest read
    predictions/date=…/v<version>.parquet             the prediction log: score reads the windows before its own
    reports/monitor/<window>/{verdict,policy}.json    the verdicts: policy lays out the pages of all windows

The index, a file at the ref ``refs/ballast/shared/var``, names each of them and its hash; they lie in the DVC remote.
What the index does not name stays here as it is, and is sent with the next step of its kind: an installation may begin
to travel at any time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from pipelines import places, refs
from pipelines.files import canonical_json, md5, read_json, whole_file
from pipelines.refs import SHARED
from pipelines.remote import Remote
from pipelines.workspace import git

STEPS = ("land", "ingest", "score", "policy")
FILE = "index.json"
OBJECT = re.compile(r'"sha256": "(([0-9a-f]{2})([0-9a-f]{62}))"')

Paths = dict[str, Path]  # by name, such as predictions/date=2013-04-05/v3.parquet


@dataclass(frozen=True)
class Index:
    """The index as it was fetched, and the commit that holds it; None if there is none yet."""

    commit: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    """By name, the MD5 of the bytes; of a file that is gone, nothing."""


def fetched(root: Path) -> Index:
    """The index, where it was fetched into the refs of ``root``."""
    return Index(git(root, "rev-parse", SHARED), json.loads(git(root, "show", f"{SHARED}:{FILE}")))


def bring(step: str, root: Path, index: Index, remote: Remote) -> None:
    """Make what the step reads as the index has it."""
    if step == "ingest":
        _bring(_objects([root / "data" / "land" / "manifest.json"]), index, remote)
        return
    folder = {"land": "landing/index/", "score": "predictions/", "policy": "reports/"}[step]
    _bring([name for name in index.hashes if name.startswith(folder)], index, remote)
    if step == "land":
        _bring(_objects(_landed().values()), index, remote)


def send(step: str, root: Path, index: Index, remote: Remote) -> None:
    """Send what the step has written, and what was here before and the index lacks; then move its ref."""
    own, here = _written(step, root)
    new = {name: path for name, path in here.items() if name not in index.hashes}
    files = {name: path for name, path in (new | own).items() if path.exists()}
    hashes = {name: md5(path) for name, path in files.items()}
    remote.send_files({found: files[name] for name, found in hashes.items() if index.hashes.get(name) != found})
    while True:
        written = {name: hashes.get(name, "") for name in own if name in hashes or name in index.hashes}
        after = hashes | index.hashes | written
        if after == index.hashes or refs.move(root, {SHARED: (index.commit, _commit(root, after))}):
            return
        refs.fetch(root, SHARED)
        index = fetched(root)


def _written(step: str, root: Path) -> tuple[Paths, Paths]:
    """The files that the step writes, be they there or not, and others of its kind that are here."""
    if step == "land":
        indexes = _landed()
        return indexes, {name: _path(name) for name in _objects([*indexes.values(), root / "data/land/manifest.json"])}
    if step == "score":
        from pipelines import predictions  # pandas: not for every step

        result, log = read_json(root / "data" / "score" / "result.json"), places.var() / "predictions"
        start, end = (date.fromisoformat(result[name]) for name in ("start", "end"))
        own = predictions.files(log, result["version"], start, end).values() if result["version"] else ()
        return _named(own), _named(log.glob("date=*/v*.parquet"))
    if step == "policy":
        reports = places.var() / "reports" / "monitor"
        window = reports / read_json(root / "data" / "policy" / "result.json")["interval"]
        verdicts = [file for kind in ("verdict", "policy") for file in reports.glob(f"[!.]*/{kind}.json")]
        return _named(file for file in verdicts if file.parent == window), _named(verdicts)
    return {}, {}


def _bring(names: Iterable[str], index: Index, remote: Remote) -> None:
    wanted = {}
    for name in names:
        path, there = _path(name), index.hashes.get(name)
        if there == "":
            path.unlink(missing_ok=True)
        elif there and not (path.exists() and (name.startswith("landing/objects/") or md5(path) == there)):
            wanted[path] = there
    remote.bring_files(wanted)


def _landed() -> Paths:
    """The landing store's own indexes."""
    return _named((places.landing() / "index").glob("[!.]*.json"))


def _objects(files: Iterable[Path]) -> list[str]:
    """The objects of the landing store that indexes or manifests of it name."""
    found = {match.groups() for file in files for match in OBJECT.finditer(file.read_text(encoding="utf-8"))}
    return sorted(f"landing/objects/{start}/{rest}.parquet" for _, start, rest in found)


def _path(name: str) -> Path:
    kind, _, rest = name.partition("/")
    return (places.landing() if kind == "landing" else places.var() / kind) / rest


def _named(paths: Iterable[Path]) -> Paths:
    roots = {"landing": places.landing(), "": places.var()}
    return {
        "/".join(filter(None, (kind, path.relative_to(root).as_posix()))): path
        for path in paths
        for kind, root in roots.items()
        if path.is_relative_to(root) and (kind or not path.is_relative_to(roots["landing"]))
    }


def _commit(root: Path, hashes: dict[str, str]) -> str:
    """A commit of the index alone: the one before is not needed, and goes."""
    file = root / ".dvc" / "tmp" / FILE
    with whole_file(file) as part:
        part.write_text(canonical_json(hashes).replace('",', '",\n') + "\n", encoding="utf-8")
    stage = {"GIT_INDEX_FILE": str(file.with_suffix(".index"))}
    blob = git(root, "hash-object", "-w", str(file))
    git(root, "read-tree", "--empty", **stage)
    git(root, "update-index", "--add", "--cacheinfo", f"100644,{blob},{FILE}", **stage)
    return refs.commit(root, git(root, "write-tree", **stage), "What runs share")
