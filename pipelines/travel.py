"""Workspaces that travel: any worker goes on with a run, and all that the workers share is two remotes.

In the git remote, beside the code:

    refs/ballast/runs/<dag>/<run>     the commit that the run was begun on
    refs/ballast/states/<dag>/<run>   a commit on top of it: params.yaml, dvc.lock, a .dvc file for each further folder
    refs/ballast/shared/var           which files under var/ other runs need: shared.py

In the DVC remote all that these name, and DVC's run cache. Whoever does a step takes the state, brings what the step
reads, and sends what it made, objects before the ref that names them; a ref moves only from where it was when the step
began. So a killed step leaves the state before it, and of two workers that do the same step one moves on. Checked out
and pulled by hand (``git fetch``, ``dvc pull``) a state is the workspace, too.
"""

from __future__ import annotations

import configparser
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import cache, places, refs, shared, workspace
from pipelines.errors import BallastError, TryAgain
from pipelines.files import locked, whole_folder
from pipelines.refs import SHARED, STATES
from pipelines.remote import Remote
from pipelines.shared import Index
from pipelines.workspace import REMOTE, RUNS, Workspace, git

if TYPE_CHECKING:
    from dvc.output import Output

READS: Mapping[str, tuple[str, ...]] = {
    "settle": (),
    "admit": (),
    "register": ("land", "validate", "prepare", "train", "evaluate"),
    "decide": ("ingest", "validate", "prepare", "register"),
    "score": ("ingest", "validate"),
    "drift": ("validate", "score"),
    "policy": ("drift",),
    "review": (),
    "answer": (),
    "promote": (),
    "rollback": (),
}
"""Whose folders under data/ each step reads that is no DVC stage; dvc.yaml says it of those that are."""

KEPT = sorted(set(READS) & {name for names in READS.values() for name in names})
FILES = ("params.yaml", "dvc.lock", *(f"{step}.dvc" for step in KEPT))
ALONE = {"score": "predictions", "policy": "reports"}


def ensure(dag_id: str, run_id: str, as_of: date | None, train_days: str | None = None) -> Workspace:
    """``workspace.ensure``; where workspaces travel, the run may have begun on another machine.

    Raises TryAgain while the git remote does not serve.
    """
    if not places.travels():
        return workspace.ensure(dag_id, run_id, as_of, train_days=train_days)
    root = workspace.root_of(dag_id, run_id)
    if not root.exists():
        with whole_folder(root) as part:
            _lay_out(part, *_refs(root), as_of, train_days)
        workspace.tidy_beside(root)
    return workspace.found(root, git(root, "rev-parse", "HEAD"), run_id, as_of)


@contextmanager
def carried(step: str, space: Workspace) -> Iterator[None]:
    """Do a step of a run; where workspaces travel, what it reads is brought before, and what it made sent after.

    Raises TryAgain while a remote does not serve, or if another worker has moved the run on meanwhile.
    """
    if not places.travels():
        yield
        return
    # What is shared is brought over what is here: no other step of this machine may be about to send it.
    with locked(places.var() / ALONE[step]) if step in ALONE else nullcontext():
        index = _arrive(step, space)
        yield
        _leave(step, space, index)


def push(root: Path) -> None:
    """Send what a run's stages have made to the DVC remote that the project names as its own, as ``dvc push`` does.

    The one that it comes with lies beside the cache, and holds nothing that the cache does not.
    """
    config = configparser.ConfigParser()
    config.read(root / ".dvc" / "config")
    if config.get("core", "remote", fallback=REMOTE) != REMOTE:
        os.chdir(root)
        with Remote.of(root) as remote:
            remote.send([out for stage in remote.stages.values() for out in stage.outs])


def _refs(root: Path) -> tuple[str, str]:
    """The refs of the run whose workspace this is: of its commit, and of its state."""
    run = f"{root.parent.name}/{root.name}"
    return f"{RUNS}/{run}", f"{STATES}/{run}"


# --- a run


def _lay_out(root: Path, pin: str, state: str, as_of: date | None, train_days: str | None) -> None:
    """Fill a new workspace: begin the run, or go on with what another machine has begun."""
    git(root, "clone", "--quiet", "--shared", "--no-checkout", str(places.ROOT), str(root))
    while True:
        known = refs.there(pin, state, "HEAD")
        commit = refs.fetch_commit(root, pin if pin in known else _head(known))
        git(root, "checkout", "--quiet", "--force", "--detach", commit)
        workspace.settle_in(places.ROOT, root)
        if state in known:
            refs.fetch(root, state)
            _take(root, state)
            return
        workspace.begin(root, as_of, train_days)
        begun = refs.commit(root, _tree(root, commit), "The run begins", commit)
        if refs.move(root, {pin: (known.get(pin), commit), state: (None, begun)}):
            return


def _head(known: Mapping[str, str]) -> str:
    """What a run begins on."""
    if "HEAD" not in known:
        raise BallastError(
            f"The git remote {refs.name()} has no HEAD to begin a run on. Push the branch that its HEAD names, or name "
            "another there: `git symbolic-ref HEAD refs/heads/main`."
        )
    return "HEAD"


# --- a step


def _arrive(step: str, space: Workspace) -> Index:
    """Make the workspace what the run's state says, with all that the step reads; return the index of the shared."""
    root, (pin, state) = space.root, _refs(space.root)
    known = refs.there(pin, state, *([SHARED] if step in shared.STEPS else []))
    if known.get(pin) != space.commit or state not in known:
        cache.forget(root)
        shutil.rmtree(root)
        raise TryAgain(f"The workspace {root} was of an earlier life of this run, and is removed. Try again.")
    for left in (*(root / ".git").rglob("*.lock"), *(root / ".dvc" / "tmp").glob("*.index.lock")):
        left.unlink()  # of a git that was killed: nobody else works here now
    refs.fetch(root, *known)
    _take(root, state)
    index = shared.fetched(root) if SHARED in known else Index()
    if READS.get(step) != ():
        os.chdir(root)  # DVC reads the names of stages relative to it
        with Remote.of(root) as remote:
            remote.bring(_read_by(step, remote))
            if stage := remote.stages.get(step):
                remote.bring_cached(stage)
            if step in shared.STEPS:
                shared.bring(step, root, index, remote)
    return index


def _leave(step: str, space: Workspace, index: Index) -> None:
    """Send what the step made, then move the refs."""
    root, (_, state) = space.root, _refs(space.root)
    if step in READS and step not in {*KEPT, *shared.STEPS}:
        return
    with Remote.of(root) as remote:
        if step in shared.STEPS:
            shared.send(step, root, index, remote)
        if step in KEPT:
            remote.add(f"data/{step}", f"{step}.dvc")
        stage = remote.stages.get(step)
        if stage or step in KEPT:
            remote.send(_made_by(step, remote))  # also what was made before, and has been lost there
        if stage:
            remote.send_cached(stage)
        tree, before = _tree(root, space.commit), git(root, "rev-parse", state)
        if tree == git(root, "rev-parse", f"{state}^{{tree}}"):
            return
    if not refs.move(root, {state: (before, refs.commit(root, tree, f"After {step}", space.commit))}):
        raise TryAgain(f"Another worker has moved this run on while {step} ran here. Try again, from what it left.")


def _read_by(step: str, remote: Remote) -> list[Output]:
    """The outs of other steps that a step reads."""
    if step in READS:
        return [out for name in READS[step] for out in _made_by(name, remote)]
    made = {str(out): out for stage in remote.stages.values() for out in stage.outs}
    return [made[str(dep)] for dep in remote.stages[step].deps if str(dep) in made]


def _made_by(step: str, remote: Remote) -> list[Output]:
    """The outs of a stage, or the folder of another step."""
    stages = remote.stages
    return list(stages[step].outs) if step in stages else remote.added(f"{step}.dvc")


def _take(root: Path, state: str) -> None:
    """Make the files of the state what it says; what a killed step would go back to is of no use then."""
    there = git(root, "ls-tree", "--name-only", state, "--", *FILES).splitlines()
    git(root, "restore", f"--source={state}", "--worktree", "--", *there)
    for name in (*(name for name in FILES if name not in there), ".dvc/tmp/dvc.lock.before", ".dvc/tmp/rwlock"):
        (root / name).unlink(missing_ok=True)
    workspace.share_cache(places.ROOT, root)
    workspace.seal(root)


def _tree(root: Path, commit: str) -> str:
    """The files of the state as they are now, on top of a commit."""
    stage = {"GIT_INDEX_FILE": str(root / ".dvc" / "tmp" / "state.index")}
    (root / ".dvc" / "tmp").mkdir(exist_ok=True)
    git(root, "read-tree", commit, **stage)
    git(root, "add", "--force", "--", *(name for name in FILES if (root / name).exists()), **stage)
    return git(root, "write-tree", **stage)
