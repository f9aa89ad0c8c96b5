"""Files that are written whole or not at all: to a temporary name beside the target, then renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.errors import BallastError


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5(path: Path) -> str:
    """The MD5 of a file's bytes, as hex: DVC's hash of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def dvc_md5(path: Path) -> str:
    """DVC's hash of a file or of a folder: of this the MD5 of the list of its files, and a mark."""
    if path.is_file():
        return md5(path)
    names = sorted(one.relative_to(path).as_posix() for one in path.rglob("*") if one.is_file())
    listed = json.dumps([{"md5": md5(path / name), "relpath": name} for name in names])
    return hashlib.md5(listed.encode(), usedforsecurity=False).hexdigest() + ".dir"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it takes the name of ``path`` only if the block succeeds."""
    temporary, lock = _begin(path, _make_file)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces ``path`` only if the block succeeds."""
    temporary, lock = _begin(path, Path.mkdir)
    try:
        yield temporary
        old = temporary.with_suffix(".old")
        if path.exists():
            path.replace(old)
        temporary.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _begin(path: Path, make: Callable[[Path], object]) -> tuple[Path, int]:
    """Make the temporary file or folder of ``path`` and hold its lock, which the kernel gives back however we end.

    By that lock it is told from what writers of the same path left behind that were killed: this is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in _siblings(path):
        _remove_if_left(left)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        make(temporary)
        with suppress(FileNotFoundError):  # another writer of this path was faster to take it for a rest
            lock = os.open(temporary, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, lock
            os.close(lock)


def _make_file(path: Path) -> None:
    path.touch(exist_ok=False)


def _siblings(path: Path) -> list[Path]:
    """The temporary files and folders of ``path``, whoever made them."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-z_]+\.(part|old)")
    return [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]


def _remove_if_left(path: Path) -> None:
    with suppress(FileNotFoundError):
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except BlockingIOError:  # it is being written
            pass
        finally:
            os.close(lock)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` alone; the kernel lets go of it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal bytes, fit for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, whole. NaN is refused: JSON has none."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


class Damaged(BallastError, ValueError):
    """A file is not as it was written."""


class Missing(BallastError, FileNotFoundError):
    """A file that an earlier step writes is not there."""


def read_json(path: Path) -> Any:
    """Read a JSON file; raise Damaged if it is not whole, and Missing if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Missing(f"{path} is not there. Run the step that writes it.") from None
    except ValueError as error:
        raise Damaged(f"{path} is no whole JSON ({error}). Delete it, and run again the step that writes it.") from None
