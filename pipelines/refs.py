"""The git remote, where runs keep their refs: read them, fetch them, move them by compare-and-swap.

While it does not answer, everything here raises TryAgain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipelines import places
from pipelines.errors import BallastError, TryAgain
from pipelines.workspace import git

STATES = "refs/ballast/states"  # /<dag>/<run>: travel.py
SHARED = "refs/ballast/shared/var"  # shared.py
US = ("-c", "user.name=Ballast", "-c", "user.email=ballast@localhost")

Moves = Mapping[str, tuple[str | None, str | None]]  # by ref, from where and to where; None: there is none


def there(*patterns: str) -> dict[str, str]:
    """The refs that the remote has of these (``git ls-remote``'s patterns), and what they point to."""
    lines = _ask(places.ROOT, "ls-remote", "--quiet", places.git_remote(), *patterns).splitlines()
    return {ref: commit for commit, _, ref in (line.partition("\t") for line in lines)}


def touched() -> dict[str, tuple[str, float]]:
    """By run, as ``dag/run``: the commit of its state, and when that was made, in seconds since 1970."""
    _ask(places.ROOT, "fetch", "--quiet", "--no-tags", "--prune", places.git_remote(), f"+{STATES}/*:{STATES}/*")
    lines = git(places.ROOT, "for-each-ref", "--format=%(objectname) %(committerdate:unix) %(refname)", STATES)
    found = (line.split() for line in lines.splitlines())
    return {ref.removeprefix(f"{STATES}/"): (commit, float(at)) for commit, at, ref in found}


def fetch(root: Path, *refs: str) -> None:
    """Fetch refs into those of the same name in ``root``."""
    _ask(root, "fetch", "--quiet", "--no-tags", places.git_remote(), *(f"+{ref}:{ref}" for ref in refs))


def fetch_commit(root: Path, name: str) -> str:
    """Fetch a commit by its hash, or that of ``HEAD``; return its hash."""
    _ask(root, "fetch", "--quiet", "--no-tags", places.git_remote(), name)
    return git(root, "rev-parse", "FETCH_HEAD")


def move(root: Path, moves: Moves) -> bool:
    """Move refs of the remote to objects of ``root``, all or none; False if one was not where it was thought to be."""
    leases = [f"--force-with-lease={ref}:{old or ''}" for ref, (old, _) in moves.items()]
    specs = [f"{new or ''}:{ref}" for ref, (_, new) in moves.items()]
    try:
        _ask(root, "push", "--quiet", "--atomic", *leases, places.git_remote(), *specs)
    except TryAgain:
        now = there(*moves)
        if all(now.get(ref) == old for ref, (old, _) in moves.items()):
            raise
        return all(now.get(ref) == new for ref, (_, new) in moves.items())
    return True


def commit(root: Path, tree: str, message: str, *parents: str) -> str:
    """Make a commit of a tree; return its hash."""
    return git(root, *US, "commit-tree", "-m", message, *(f"-p{parent}" for parent in parents), tree)


def name() -> str:
    """The remote for a person: without the password that its URL may hold."""
    return _shown(places.git_remote())


def _ask(root: Path, *arguments: str) -> str:
    try:
        return git(root, *arguments)
    except BallastError as error:
        raise TryAgain(f"The git remote {name()} (BALLAST_GIT_REMOTE) does not serve: {_shown(str(error))}") from None


def _shown(text: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//***@", text)
