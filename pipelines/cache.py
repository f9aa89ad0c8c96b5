"""DVC's cache, as it is believed here: an object is what its name says, and so is an entry of the run cache.

DVC itself believes every object that is write-protected, and every entry that can be read.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import BallastError

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage
    from dvc.stage.cache import StageCache
    from dvc_data.hashfile.db import HashFileDB
    from dvc_data.hashfile.obj import HashFile


@contextmanager
def opened(root: Path) -> Iterator[Repo]:
    """DVC in a checkout or workspace; raise BallastError where its own database is damaged."""
    from dvc.config import Config
    from dvc.dirs import site_cache_dir
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            yield repo
    except sqlite3.DatabaseError as error:
        if not re.search("malformed|not a database", str(error)):
            raise
        folder = Path(site_cache_dir(Config(str(root / ".dvc"))["core"].get("site_cache_dir")), "repo")
        raise BallastError(
            f"DVC's own database of {root} is damaged: {error}. Delete {folder}: it only saves DVC the hashing again."
        ) from None


def whole(odb: HashFileDB, hashes: Iterable[str]) -> set[str]:
    """Those of the objects that are there and hold what their names say; one that does not is removed.

    What DVC has not seen before from this workspace is read: 1.3 s for each GB on two cores.
    """
    from dvc_data.hashfile.build import _get_hashes

    there = {one: path for one in hashes if odb.fs.exists(path := odb.oid_to_path(one))}
    infos = {path: odb.fs.info(path) for path in there.values()}
    held = _get_hashes(list(infos), odb.fs, odb.hash_name, infos, odb.state)
    found = {path: str(hash_info.value) for path, (_, hash_info, _) in held.items()}
    # A folder's list is known by its MD5, with or without the mark of a folder behind it.
    sound = {one for one, path in there.items() if found[path].removesuffix(".dir") == one.removesuffix(".dir")}
    for one in there.keys() - sound:
        Path(there[one]).unlink(missing_ok=True)
    return sound


def objects(made: Iterable[HashFile]) -> set[str]:
    """The hashes of what files and folders consist of: a folder's own, and those of the files in it."""
    from dvc_data.hashfile.tree import Tree

    found: set[str] = set()
    for one in made:
        found.add(str(one.hash_info.value))
        if isinstance(one, Tree):
            found |= {str(file.value) for _, _, file in one}
    return found


def lacking(root: Path, hashes: Collection[str]) -> set[str]:
    """What the cache of a workspace lacks of files and folders; what it has damaged is removed, and lacks then."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    with opened(root) as repo:
        odb = repo.cache.local
        there = whole(odb, hashes)
        folders = [HashInfo("md5", one) for one in there if one.endswith(".dir")]
        wanted = {*hashes, *objects(Tree.load(odb, one) for one in folders)}
        return wanted - there - whole(odb, wanted - there)


def drop_torn_entries(runs: StageCache, stage: PipelineStage) -> None:
    """Remove what the run cache has of a stage with its inputs as they lie here, where it is not what its name says."""
    from dvc.stage.cache import _can_hash, _get_cache_hash, _get_stage_hash
    from dvc.utils.serialize import YAMLFileCorruptedError, load_yaml

    now = copy(stage)  # the stage goes on knowing its inputs as dvc.lock has them
    now.deps = [copy(dep) for dep in stage.deps]
    now.save_deps()
    if not _can_hash(now):
        return
    folder = Path(runs._get_cache_dir(_get_stage_hash(now)))
    for file in folder.glob("*"):
        with suppress(YAMLFileCorruptedError, AttributeError, TypeError):
            if _get_cache_hash(load_yaml(file)) == file.name:
                continue
        file.unlink()
    with suppress(OSError):  # not there, or not empty; DVC cannot do with an empty one
        folder.rmdir()
