"""The DVC remote, as a step that travels uses it: what a workspace needs is brought, what it made is sent.

All goes by DVC's own file system and its store of objects, so that URL and credentials are DVC's. While the remote does
not serve, everything here raises TryAgain.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipelines import cache
from pipelines.errors import BallastError, TryAgain
from pipelines.files import md5
from pipelines.places import travels
from pipelines.workspace import run_cache_alone

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

ENTRY = re.compile(r"[0-9a-f]{64}")  # of the run cache; what has another name is still being written


class Remote:
    """The remote of one workspace, between it and the cache of this machine."""

    def __init__(self, repo: Repo) -> None:
        self._repo = repo
        self._cache = repo.cache.local
        self._remote = repo.cloud.get_remote()
        self._odb = self._remote.odb

    @classmethod
    @contextmanager
    def of(cls, root: Path) -> Iterator[Self]:
        """The remote of the workspace ``root``, which is the working directory."""
        logging.getLogger("dvc").setLevel(logging.WARNING)
        with cache.opened(root) as repo:
            made = cls(repo)
            with made._serving():
                yield made

    @cached_property
    def stages(self) -> Mapping[str, PipelineStage]:
        """The stages of dvc.yaml, with what dvc.lock says of them."""
        from dvc.dvcfile import load_file

        stages: Mapping[str, PipelineStage] = load_file(self._repo, "dvc.yaml").stages
        return stages

    # --- outs

    def bring(self, outs: Iterable[Output]) -> None:
        """Fetch what the cache lacks of the outs, and lay them out."""
        outs = list(outs)
        self._fetch(outs)
        for out in outs:
            out.checkout(force=True)

    def send(self, outs: Iterable[Output]) -> None:
        """Send what the remote lacks of the outs; the list of a folder's files after these."""
        lists = [out for out in outs if out.hash_info.isdir]
        files = self._files(outs)
        for hashes in (files, {out.hash_info.value for out in lists}):
            self.send_files({one: Path(self._cache.oid_to_path(one)) for one in hashes})

    def add(self, folder: str, file: str) -> list[Output]:
        """Do what ``dvc add`` does, to a folder that git ignores."""
        stage = self._repo.stage.create(single_stage=True, validate=False, fname=file, outs=[folder])
        with self._repo.lock:
            stage.save()
            stage.commit()
            stage.dump()
        return list(stage.outs)

    def added(self, file: str) -> list[Output]:
        """What a .dvc file names."""
        return list(self._repo.stage.load_one(file).outs)

    def _fetch(self, outs: list[Output]) -> None:
        self._fetch_objects({out.hash_info.value for out in outs})
        self._fetch_objects(self._files(outs))

    def _fetch_objects(self, hashes: set[str]) -> None:
        if lacking := sorted(hashes - cache.whole(self._cache, hashes)):
            paths = [self._odb.oid_to_path(one) for one in lacking]
            self._cache.add(paths, self._odb.fs, lacking, check_exists=False, verify=True)
            if damaged := set(lacking) - set(self._cache.oids_exist(lacking)):
                where = self._odb.oid_to_path(damaged.pop())
                raise OSError(
                    f"{where} holds other bytes than its name says. Delete it there: what made it sends it anew"
                )

    def _files(self, outs: Iterable[Output]) -> set[str]:
        """The hashes of the files of the outs, whose lists are in the cache."""
        from dvc_data.hashfile.tree import Tree

        found = set()
        for out in outs:
            tree = Tree.load(self._cache, out.hash_info) if out.hash_info.isdir else [(None, None, out.hash_info)]
            found |= {one.value for _, _, one in tree}
        return found

    # --- the run cache

    def bring_cached(self, stage: PipelineStage) -> None:
        """Fetch what is known of a stage with its inputs as they lie here, so that the run cache can restore it."""
        stage.save_deps()
        if (folder := self._runs(stage)) is None:
            return
        fs, here = self._remote.fs, Path(self._repo.stage_cache.cache_dir, folder)
        names = {fs.name(path): path for path in fs.find(fs.join(self._remote.path, "runs", folder))}
        with run_cache_alone(self._repo.stage_cache.cache_dir):
            cache.drop_torn_entries(here, stage)
            lacking = {here / name: path for name, path in names.items() if not (here / name).exists()}
            self._copy({path: there for path, there in lacking.items() if ENTRY.fullmatch(path.name)})
            cache.drop_torn_entries(here, stage)
            entry = self._repo.stage_cache._load(stage)
        if entry:
            with suppress(FileNotFoundError):  # the data is gone from the remote: the stage is run
                self._fetch(self._repo.stage_cache._create_stage(entry).outs)

    def send_cached(self, stage: PipelineStage) -> None:
        """Send what the run cache has of a stage that was recorded just now."""
        if folder := self._runs(stage):
            fs, here = self._remote.fs, Path(self._repo.stage_cache.cache_dir, folder)
            with run_cache_alone(self._repo.stage_cache.cache_dir):
                known = [path for path in here.glob("*") if ENTRY.fullmatch(path.name)]
            self._put({path: fs.join(self._remote.path, "runs", folder, path.name) for path in known})

    def _runs(self, stage: PipelineStage) -> str | None:
        """Where the run cache keeps a stage with these inputs; None if it does not, as with one that is always run."""
        from dvc.stage.cache import _can_hash, _get_stage_hash

        if not _can_hash(stage):
            return None
        key: str = _get_stage_hash(stage)
        return f"{key[:2]}/{key}"

    # --- single files

    def send_files(self, files: Mapping[str, Path]) -> None:
        """Send files, by the MD5 of their bytes, that the remote lacks; raise BallastError if one is damaged."""
        if lacking := sorted(set(files) - set(self._odb.oids_exist(list(files)) if files else ())):
            for one in lacking:
                if md5(files[one]) != one.removesuffix(".dir"):
                    raise BallastError(f"{files[one]} is damaged. Delete it, and clear the task that made it.")
            self._odb.add([str(files[one]) for one in lacking], self._local, lacking, check_exists=False)

    def bring_files(self, files: Mapping[Path, str]) -> None:
        """Fetch files to where they belong, each whole, by the MD5 of their bytes."""
        self._copy({path: self._odb.oid_to_path(md5) for path, md5 in files.items()})

    def _copy(self, files: Mapping[Path, str]) -> None:
        from dvc_objects.fs.generic import copy

        if files:
            copy(self._remote.fs, list(files.values()), self._local, [str(path) for path in files])

    def _put(self, files: Mapping[Path, str]) -> None:
        from dvc_objects.fs.generic import copy

        if files:
            copy(self._local, [str(path) for path in files], self._remote.fs, list(files.values()))

    @property
    def _local(self) -> Any:
        from dvc_objects.fs.local import localfs

        return localfs

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Turn what fails on the way into TryAgain: each file system raises what its library does."""
        try:
            folder = os.environ.get("BALLAST_DVC_REMOTE") if self._remote.fs.protocol == "local" else None
            if folder and not Path(folder).is_dir():
                raise NotADirectoryError("there is no such folder. Make it, or mount it")
            yield
        except (
            BallastError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            sqlite3.Error,
        ):  # not of a remote
            raise
        except Exception as error:
            where = self._remote.fs.unstrip_protocol(self._remote.path)
            cause = f"{type(error).__name__}: {error}"
            named = "BALLAST_DVC_REMOTE" if travels() else f"{self._remote.name} in .dvc/config"
            raise TryAgain(f"The DVC remote {where} ({named}) does not serve: {cause}") from error
