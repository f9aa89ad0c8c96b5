"""What lies under var/ and not in a workspace, and other runs need: it travels by the two remotes as well.

    landing/index/<source>.json, landing/objects/…    the landing store, which land and ingest read
    predictions/date=…/v<version>.parquet             the prediction log: score reads the windows before its own
    reports/monitor/<window>/{verdict,policy}.json    the verdicts: policy lays out the pages of all windows

The ref ``refs/ballast/shared/var`` of the git remote holds ``landing/<source>.json`` as they are, which the exporter
reads there too, and ``index.json``, which names each other file and its hash; these lie in the DVC remote. What the ref
does not have stays here as it is, and is sent with the next step of its kind: an installation may begin to travel at
any time.
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


def landing_indexes(root: Path) -> dict[str, str]:
    """The landing store's own index of each source, by its file's name, where the ref was fetched into ``root``."""
    names = git(root, "ls-tree", "--name-only", SHARED, "landing/").splitlines()
    return {Path(name).name: git(root, "show", f"{SHARED}:{name}") + "\n" for name in names}


def bring(step: str, root: Path, index: Index, remote: Remote) -> None:
    """Make what the step reads as the index has it."""
    if step == "land":
        for name, text in landing_indexes(root).items() if index.commit else ():
            with whole_file(places.landing() / "index" / name) as part:
                part.write_text(text, encoding="utf-8")
        _bring(_objects(_indexes_here()), index, remote)
    elif step == "ingest":
        _bring(_objects([root / "data" / "land" / "manifest.json"]), index, remote)
    else:
        folder = {"score": "predictions/", "policy": "reports/"}[step]
        _bring([name for name in index.hashes if name.startswith(folder)], index, remote)


def send(step: str, root: Path, index: Index, remote: Remote) -> None:
    """Send what the step has written, and what was here before and the index lacks; then move its ref."""
    own, here = _written(step, root)
    indexes = {f"landing/{path.name}": path for path in (_indexes_here() if step == "land" else ())}
    if not (own or here or indexes):
        return
    new = {name: path for name, path in here.items() if name not in index.hashes}
    files = {name: path for name, path in (new | own).items() if path.exists()}
    hashes = {name: md5(path) for name, path in files.items()}
    remote.send_files({found: files[name] for name, found in hashes.items() if index.hashes.get(name) != found})
    while True:
        written = {name: hashes.get(name, "") for name in own if name in hashes or name in index.hashes}
        tree = _tree(root, index.commit, hashes | index.hashes | written, indexes)
        if index.commit and tree == git(root, "rev-parse", f"{index.commit}^{{tree}}"):
            return
        # A commit alone: the one before is not needed, and goes.
        if refs.move(root, {SHARED: (index.commit, refs.commit(root, tree, "What runs share"))}):
            return
        refs.fetch(root, SHARED)
        index = fetched(root)


def _written(step: str, root: Path) -> tuple[Paths, Paths]:
    """The files that the step writes, be they there or not, and others of its kind that are here."""
    if step == "land":
        return {}, {name: _path(name) for name in _objects([*_indexes_here(), root / "data/land/manifest.json"])}
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


def _indexes_here() -> list[Path]:
    """The landing store's own indexes, here."""
    return sorted((places.landing() / "index").glob("[!.]*.json"))


def _objects(files: Iterable[Path]) -> list[str]:
    """The objects of the landing store that indexes or manifests of it name."""
    found = {match.groups() for file in files for match in OBJECT.finditer(file.read_text(encoding="utf-8"))}
    return sorted(f"landing/objects/{start}/{rest}.parquet" for _, start, rest in found)


def _path(name: str) -> Path:
    kind, _, rest = name.partition("/")
    return (places.landing() if kind == "landing" else places.var() / kind) / rest


def _named(paths: Iterable[Path]) -> Paths:
    return {path.relative_to(places.var()).as_posix(): path for path in paths}


def _tree(root: Path, before: str | None, hashes: dict[str, str], files: Paths) -> str:
    """What the ref is to hold: the index and these files, beside what the commit before has."""
    index = root / ".dvc" / "tmp" / FILE
    with whole_file(index) as part:
        part.write_text(canonical_json(hashes).replace('",', '",\n') + "\n", encoding="utf-8")
    stage = {"GIT_INDEX_FILE": str(index.with_suffix(".index"))}
    git(root, "read-tree", before or "--empty", **stage)
    for name, path in {FILE: index, **files}.items():
        blob = git(root, "hash-object", "-w", str(path))
        git(root, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", **stage)
    return git(root, "write-tree", **stage)
