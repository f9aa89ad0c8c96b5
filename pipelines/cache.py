"""DVC's cache, as it is believed here: an object is what its name says, and an entry of the run cache is whole.

DVC itself believes every object that is write-protected, and every entry that can be read.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import BallastError
from pipelines.files import locked, md5

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage
    from dvc_data.hashfile.db import HashFileDB
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.obj import HashFile

MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")


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
            f"DVC's own database of {root} is damaged: {error}. Delete {folder}, though others may have theirs "
            "there: it only saves DVC the hashing again."
        ) from None


def set_aside(objects: Path) -> Path:
    """Where the damaged lists of folders are kept, of the cache whose objects lie in ``objects``."""
    return objects.parents[1] / "damaged"


def whole(odb: HashFileDB, hashes: Iterable[str]) -> set[str]:
    """Those of the objects that are there and hold what their names say; one that does not is removed.

    The damaged list of a folder is set aside, as `ballast gc` must know that the folder's files may be needed. All are
    read, 1.3 s for each GB on two cores: DVC's database says of what was only copied that it is whole.
    """
    paths = {one: Path(odb.oid_to_path(one)) for one in hashes}
    with ThreadPoolExecutor() as pool:
        sound = {one for one, held in zip(paths, pool.map(_is_whole, paths.values()), strict=True) if held}
    if damaged := [path for one, path in paths.items() if one not in sound and path.exists()]:
        with locked(set_aside(Path(odb.path))):  # whoever makes one anew has waited here, or found none
            for path in damaged:
                if path.exists() and not _is_whole(path):
                    _remove(path, set_aside(Path(odb.path)))
    return sound


def _is_whole(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return md5(path) == (path.parent.name + path.name).removesuffix(".dir")
    return False


def _remove(path: Path, aside: Path) -> None:
    if path.suffix == ".dir":
        aside.mkdir(exist_ok=True)
        path.replace(aside / (path.parent.name + path.name))
    else:
        path.unlink()


def objects(made: Iterable[HashFile]) -> set[str]:
    """The hashes of what files and folders consist of: a folder's list, and the files that it names."""
    from dvc_data.hashfile.tree import Tree

    found: set[str] = set()
    for one in made:
        found.add(str(one.hash_info.value))
        if isinstance(one, Tree):
            found |= {str(file.value) for _, _, file in one}
    return found


def _kept(odb: HashFileDB, made: Sequence[HashInfo]) -> list[HashFile]:
    """What the cache has of these hashes; a folder's list that is damaged names nothing."""
    from dvc_data.hashfile.tree import Tree

    lists = whole(odb, [str(one.value) for one in made if one.isdir])
    return [Tree.load(odb, one) if one.value in lists else odb.get(str(one.value)) for one in made]


def dvc_hash(root: Path, path: Path) -> str:
    """DVC's hash of a file or folder of a workspace, without what .dvcignore names."""
    from dvc_data.hashfile.build import build

    with opened(root) as repo:
        _, _, found = build(repo.cache.local, str(path), repo.fs, "md5", ignore=repo.dvcignore, dry_run=True)
        return str(found.hash_info.value)


def lacking(root: Path, hashes: Collection[str]) -> set[str]:
    """What the cache of a workspace lacks of files and folders; what it has damaged is removed, and lacks then."""
    from dvc_data.hashfile.hash_info import HashInfo

    with opened(root) as repo:
        odb = repo.cache.local
        wanted = objects(_kept(odb, [HashInfo("md5", one) for one in hashes]))
        return wanted - whole(odb, wanted)


def promised(repo: Repo, stage: PipelineStage) -> set[str]:
    """The objects that DVC would restore a stage from: by dvc.lock, or by the run cache, torn entries of which go."""
    from dvc.stage.cache import _can_hash, _get_stage_hash

    now = copy(stage)  # with its inputs as they lie here; the stage goes on knowing them as dvc.lock has them
    now.deps = [copy(dep) for dep in stage.deps]
    now.save_deps()
    if not _can_hash(now):
        return set()
    runs, outs = repo.stage_cache, stage.outs
    drop_torn_entries(Path(runs._get_cache_dir(_get_stage_hash(now))), stage)
    if stage.changed_stage() or not stage.deps_cached() or not all(out.hash_info for out in outs):
        outs = runs._create_stage(entry).outs if (entry := runs._load(now)) else []
    return objects(_kept(repo.cache.local, [out.hash_info for out in outs if out.hash_info]))


def drop_torn_entries(folder: Path, stage: PipelineStage) -> None:
    """Remove what the run cache has of a stage in a folder that does not say of each out what it was."""
    from dvc.exceptions import DvcException
    from dvc.utils.serialize import load_yaml

    outs = {out.def_path for out in stage.outs}
    for file in folder.glob("*"):
        with suppress(DvcException, ValueError, LookupError, TypeError, AttributeError):
            if {out["path"] for out in load_yaml(file)["outs"] if MD5.fullmatch(out["md5"])} == outs:
                continue
        file.unlink(missing_ok=True)
    with suppress(OSError):  # not there, or not empty; DVC cannot do with an empty one
        folder.rmdir()


def forget(root: Path) -> None:
    """Remove what DVC keeps of a workspace outside of it: a database of the sizes and times that it has seen."""
    from dvc.exceptions import DvcException

    if (root / ".dvc" / "tmp" / "btime").exists():  # DVC has been there
        with suppress(DvcException, BallastError, OSError, sqlite3.Error):
            with opened(root) as repo:
                folder = repo.site_cache_dir
            shutil.rmtree(folder)
