"""The run workspace: a clone of the project at a pinned commit, one per DAG run, sharing one DVC cache.

Every task makes sure of its workspace itself: a worker may be another machine, and any step may have been killed.
"""

from __future__ import annotations

import configparser
import fcntl
import hashlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pipelines import cache, params, places
from pipelines.errors import BallastError, TryAgain
from pipelines.files import locked, read_json, sha256, whole_folder, write_json
from pipelines.places import ROOT, var

log = logging.getLogger(__name__)

ORPHAN_GRACE_S = 10.0
GIT_WITHIN_S = 600.0  # a server that takes the connection and then says nothing would be waited for without end
RUNS = "refs/ballast/runs"  # /<dag>/<run>: the commit that the run was begun on
REMOTE = "local"  # of DVC: the one that .dvc/config comes with
KEEP = {"BALLAST_KEEP_RUNS": "3", "BALLAST_KEEP_FAILED_DAYS": "14"}
SEAL = Path(".dvc/tmp/ballast-seal.json")


@dataclass(frozen=True)
class Workspace:
    """Where one DAG run works, on which commit, and as of when."""

    root: Path
    commit: str
    as_of: date


def name_of(run_id: str) -> str:
    """A run id as one safe name for folders and git refs; different ids stay different."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", run_id).strip("-")
    return plain if plain == run_id else f"{plain}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"


def root_of(dag_id: str, run_id: str) -> Path:
    """Where the workspace of a run lies, or will."""
    return var() / "runs" / name_of(dag_id) / name_of(run_id)


def ensure(
    dag_id: str, run_id: str, as_of: date | None, origin: Path = ROOT, train_days: str | None = None
) -> Workspace:
    """Make the workspace of a run, or find it as it was left. The first call pins the commit and what differs from it.

    That is the as-of date (without one a new run takes the clock's) and, where they are given, ``prepare.train_days``
    (a number or ``all``). Raises BallastError if the project is no git repository, if the
    commit's ``uv.lock`` is not the environment's, or if the run was begun as of another date.
    """
    root = root_of(dag_id, run_id)
    commit = _pin(origin, f"{RUNS}/{root.parent.name}/{root.name}", anew=not root.exists())
    if not root.exists():
        tell_uncommitted(origin)
        with whole_folder(root) as part:
            clone(origin, commit, part)
            settle_in(origin, part)
            begin(part, as_of, train_days)
        tidy_beside(root)
    return found(root, commit, run_id, as_of)


def settle_in(origin: Path, root: Path) -> None:
    """Make the checked-out commit a workspace; raise BallastError if it is of another ``uv.lock``."""
    _refuse_foreign_lock(root)
    share_cache(origin, root)


def begin(root: Path, as_of: date | None, train_days: str | None) -> None:
    """Write into params.yaml what is pinned when a run begins."""
    if as_of is None:
        from pipelines.state import today  # the database's library takes longer to import than all else here

        as_of = today()
    _set_as_of(root / "params.yaml", as_of)
    if train_days:
        _set_train_days(root / "params.yaml", train_days)
    seal(root)


def found(root: Path, commit: str, run_id: str, as_of: date | None) -> Workspace:
    """The workspace that is there; raise BallastError if the run was begun as of another date."""
    began = params.as_of(root / "params.yaml")
    if as_of and as_of != began:
        raise BallastError(f"Run {run_id} began as of {began} (asked for: {as_of}). Start a new run for another date.")
    return Workspace(root, commit, began)


def retention() -> tuple[int, int]:
    """How many workspaces stay of the runs of a DAG that ended well, and for how many days one that failed.

    ``BALLAST_KEEP_RUNS`` (3) and ``BALLAST_KEEP_FAILED_DAYS`` (14).
    """
    found = {name: os.environ.get(name) or default for name, default in KEEP.items()}
    for name, text in found.items():
        if not text.isdigit():
            raise BallastError(f"{name} must be a whole number, 0 or more (found {text!r}). Unset it for {KEEP[name]}.")
    keep, days = map(int, found.values())
    return keep, days


def tidy_beside(root: Path) -> None:
    """Where a new workspace makes it more than stay of a DAG, have those that can go removed beside the step: gc.py."""
    keep, _ = retention()
    if sum(not space.name.startswith(".") for space in root.parent.iterdir()) > keep:
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen([sys.executable, "-m", "pipelines.gc"], cwd=places.ROOT, start_new_session=True, **quiet)


def seal(root: Path) -> None:
    """Note what the files hold that nothing but the run's own steps changes.

    Cut short they may still be read, and say something else.
    """
    files = ("params.yaml", ".dvc/config.local", "dvc.lock")
    write_json(root / SEAL, {name: sha256(root / name) for name in files if (root / name).exists()})


def broken_seal(root: Path) -> Path | None:
    """The first of the files that is not as ``seal`` noted it."""
    if not (root / SEAL).exists():  # the workspace of an older Ballast
        return None
    noted = {"dvc.lock": None, **read_json(root / SEAL)}
    return next((root / name for name, digest in noted.items() if digest != _digest(root / name)), None)


def _digest(file: Path) -> str | None:
    return sha256(file) if file.exists() else None


def check_seal(root: Path) -> None:
    """Raise BallastError if one of the files is not as ``seal`` noted it."""
    if file := broken_seal(root):
        raise BallastError(
            f"{file} is not as the run's steps left it: cut short, or changed by hand. Remove {root} and clear the "
            f"run from its first task on: what was done comes from the cache. (Meant? Remove {root / SEAL}.)"
        )


def lock_file(root: Path) -> Path:
    """What a step holds while it works in a workspace."""
    return root / ".dvc" / "tmp" / "ballast.lock"


@contextmanager
def owned(workspace: Workspace) -> Iterator[int]:
    """Hold the workspace alone; yield the lock's descriptor, for the step to inherit.

    A step that outlived its killed runner still holds the lock: its process group is ended first. Raises TryAgain if
    the lock is held by something that does not end.
    """
    path = lock_file(workspace.root)
    try:
        path.parent.parent.mkdir(exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        raise _removed(workspace.root) from None
    try:
        _take(descriptor, workspace.root)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def using() -> Iterator[None]:
    """Be in what ``ballast gc`` may not remove: waits for the seconds that a collection takes, and keeps others out."""
    with _collection(fcntl.LOCK_SH):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Have everything to oneself; raise TryAgain while somebody is ``using`` it, or collects."""
    with _collection(fcntl.LOCK_EX | fcntl.LOCK_NB):
        yield


@contextmanager
def _collection(how: int) -> Iterator[None]:
    """The lock lies with the checkout: whoever shares its DVC cache shares it, wherever his own state may be."""
    path = places.ROOT / ".dvc" / "tmp" / "ballast-gc.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            raise TryAgain("A step, a reproduction or another `ballast gc` runs. Wait for it to end.") from None
        yield


@contextmanager
def run_cache_alone(folder: str) -> Iterator[None]:
    """Have DVC's run cache (``repo.stage_cache.cache_dir``) to oneself, for the moment that an entry takes.

    DVC would take an entry that another process is writing for a corrupt one, and remove it.
    """
    with locked(Path(folder)):
        yield


def note_step(descriptor: int, process_group: int | None) -> None:
    """Write the step's process group into the lock, so that a later runner can end an orphan; None once it ended.

    With the host: in another worker's container the number is another process's.
    """
    os.ftruncate(descriptor, 0)
    if process_group is not None:
        os.pwrite(descriptor, f"{process_group} {socket.gethostname()}".encode(), 0)


def _take(descriptor: int, root: Path) -> None:
    deadline = time.monotonic() + ORPHAN_GRACE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not lock_file(root).exists():
                raise _removed(root)
            note_step(descriptor, None)  # what a killed step noted: the number may be another process's by now
            return
        except BlockingIOError:
            _end_orphan(descriptor, root)
            if time.monotonic() > deadline:
                raise TryAgain(f"Another step holds the workspace {root}. Wait for it to end.") from None
            time.sleep(0.1)


def _removed(root: Path) -> TryAgain:
    return TryAgain(f"The workspace {root} was removed just now: its run was over. Try again, and it is made anew.")


def _end_orphan(descriptor: int, root: Path) -> None:
    """End a step whose runner is gone (its parent is no longer a runner of this workspace)."""
    group, _, host = os.pread(descriptor, 300, 0).decode().partition(" ")
    if not group or host != socket.gethostname() or _runner_lives(int(group)):
        return
    log.warning("ending process group %s, left behind in %s by a killed runner", group, root)
    with suppress(ProcessLookupError):
        os.killpg(int(group), signal.SIGKILL)


def _runner_lives(process_group: int) -> bool:
    """Whether the leader of the group still has the parent that started it (an orphan is adopted by init)."""
    try:
        parent = int(Path(f"/proc/{process_group}/stat").read_text().rpartition(")")[2].split()[1])
        return b"pipelines.run" in Path(f"/proc/{parent}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def git(root: Path, *arguments: str, **environment: str) -> str:
    """What a git command prints in ``root``; raise BallastError with what it says if it fails, or does not end."""
    command, env = ["git", "-C", str(root), *arguments], {**os.environ, "GIT_TERMINAL_PROMPT": "0", **environment}
    said = f"`git {' '.join(arguments)}`"
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=GIT_WITHIN_S)
    except subprocess.TimeoutExpired:
        raise BallastError(f"{said} did not end within {GIT_WITHIN_S:g} s in {root}.") from None
    if done.returncode:
        raise BallastError(f"{said} failed in {root}: {done.stderr.strip()}")
    return done.stdout.rstrip()


def _pin(origin: Path, ref: str, anew: bool) -> str:
    """The run's commit: HEAD when it began, kept by a ref that ``git gc`` respects and later calls read.

    A ref whose workspace is gone is of an earlier life of the same run id (somebody removed var/): it is set anew.
    """
    if anew:
        git(origin, "update-ref", ref, "HEAD")
    return git(origin, "rev-parse", "--verify", ref)


def tell_uncommitted(origin: Path) -> None:
    """Say which changes a run that begins now leaves out."""
    if changed := uncommitted(origin):
        print("not part of this run (uncommitted in the checkout): " + ", ".join(changed))


def uncommitted(origin: Path) -> list[str]:
    """The files that are not as they were committed; dvc.lock does not count."""
    changed = [line[3:] for line in git(origin, "status", "--porcelain").splitlines()]
    return [name for name in changed if name != "dvc.lock"]


def clone(origin: Path, commit: str, into: Path) -> None:
    """Clone the project at a commit; the objects are shared with the origin."""
    git(origin, "clone", "--quiet", "--shared", "--no-checkout", str(origin), str(into))
    git(into, "-c", "advice.detachedHead=false", "checkout", "--quiet", commit)


def _refuse_foreign_lock(root: Path) -> None:
    """``make setup`` leaves the lock it installed from in the environment; a run must not use another."""
    installed = Path(sys.prefix) / "uv.lock"
    if installed.exists() and sha256(installed) != sha256(root / "uv.lock"):
        raise BallastError(
            "The commit's uv.lock is not the one that this environment was installed from. "
            "Run `make setup` on that commit, then start the run again."
        )


def share_cache(origin: Path, root: Path) -> None:
    """Share the origin's cache and remote: ``config.local`` does not travel, and relative paths would not hold."""
    config = configparser.ConfigParser()
    config["core"] = {"site_cache_dir": str(var() / "dvc-site")}
    config["cache"] = {"dir": str(cache_of(origin))}
    config[f"'remote \"{REMOTE}\"'"] = {"url": places.dvc_remote()}
    if os.environ.get("BALLAST_DVC_REMOTE"):
        config["core"]["remote"] = REMOTE
    with (root / ".dvc" / "config.local").open("w") as file:
        config.write(file)


def cache_of(origin: Path) -> Path:
    """Where the DVC cache of a checkout lies."""
    with cache.opened(origin) as repo:
        return Path(repo.cache.local.path.removesuffix("/files/md5"))


def _set_as_of(file: Path, as_of: date) -> None:
    """Set the date in place: the rest of the file, comments too, stays as it was committed."""
    text, count = re.subn(r"(?m)^as_of:[ \t]*\S+", f'as_of: "{as_of}"', file.read_text())
    if count != 1:
        raise BallastError(f'params.yaml must have one line `as_of: "<date>"` (found {count}).')
    file.write_text(text)


def _set_train_days(file: Path, train_days: str) -> None:
    """Set the length of the train window in place, likewise; ``all`` leaves it empty."""
    if train_days != "all" and not re.fullmatch(r"[1-9]\d*", train_days):
        raise BallastError(f"The days to train on must be a number above 0, or all (found {train_days!r}).")
    section = r"(?m)^(prepare:[^\n]*\n(?:(?:[ \t#][^\n]*)?\n)*?[ \t]+train_days:)(?:[ \t]+[^\s#]+)?"
    value = "" if train_days == "all" else f" {train_days}"
    text, count = re.subn(section, lambda found: found[1] + value, file.read_text())
    if count != 1:
        raise BallastError("params.yaml must have one line `train_days:` in its section `prepare`, empty for all days.")
    file.write_text(text)
