"""What can go: workspaces of runs that are over, models that were refused, Evidently's old reports, data nobody names.

What a champion, a past champion or the ledger refers to stays, and so does all that a run may still need: the landing
store, the commits of versions, the prediction log and every verdict are never touched. Steps, reproductions and a
collection keep out of each other's way by a lock (``workspace.using``, ``workspace.alone``). A collection that was
killed is done again: what names goes before what is named.

``python -m pipelines.gc`` removes workspaces only, as each new run asks for: beside the steps, without a word.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines import approval, cache, embedded, places, refs, registry, timeline, workspace
from pipelines.dagruns import ACTIVE, PAGE, Airflow
from pipelines.errors import BallastError, TryAgain, exit_with
from pipelines.files import md5
from pipelines.state import State, moves
from pipelines.workspace import git, lock_file, name_of

DAY_S = 86_400.0
MD5 = re.compile(rb"\bmd5: ([0-9a-f]{32}(?:\.dir)?)\b")

Kind = Literal["workspace", "ref", "model", "report", "data"]


@dataclass(frozen=True)
class Waste:
    """Something that can go: its paths here, the refs of the git remote, a version's artifacts in MLflow."""

    kind: Kind
    name: str
    why: str
    bytes: int
    paths: Sequence[Path] = field(default=(), repr=False)
    version: int | None = None
    refs: Mapping[str, str] = field(default_factory=dict, repr=False)
    """By name, what each pointed to."""


@dataclass(frozen=True)
class Runs:
    """Which runs are not over, and how those ended that Airflow knows, as ``dag/run``; None if it does not answer."""

    busy: set[str]
    ended: Mapping[str, str] | None

    def over(self, idle: Mapping[str, float], keep: int, days: int) -> Iterator[tuple[str, str]]:
        """Yield of the runs that were idle for so many days those that can go, and why."""
        ended_well = Counter[str]()
        for name in sorted(idle, key=lambda name: (name.partition("/")[0], idle[name])):
            if name in self.busy:
                continue
            if (how := (self.ended or {}).get(name, "not known to have ended well")) == "success":
                ended_well[dag := name.partition("/")[0]] += 1
                if ended_well[dag] > keep and idle[name] > 1:  # a person may work in it, step by step
                    yield name, f"over, and not among the last {keep}"
            elif idle[name] > days:
                yield name, f"{how}, untouched for {idle[name]:.0f} days"


def plan(keep: int, days: int, reports: int) -> list[Waste]:
    """What can go, in the order in which it goes; nothing is touched.

    The workspaces of the last ``keep`` runs of each DAG that ended well stay, and Evidently's reports on the last
    ``reports`` windows; those of runs that failed, refused models and data without a name stay for ``days``.
    """
    state, there, states = State(), _spaces(), refs.touched() if places.travels() else {}
    runs = _runs(state, {*there, *states})
    spaces = list(_workspaces(runs, there, keep, days))
    models = list(_models(state, days))
    gone = {path for waste in spaces for path in waste.paths}
    data = _data(gone, {waste.version for waste in models}, days)
    return [*spaces, *_refs(runs, states, keep, days), *models, *_reports(reports), *data]


def collect(keep: int, days: int, reports: int) -> list[Waste]:
    """Remove what can go, and return it. Raises TryAgain while a step, a reproduction or another collection runs."""
    with workspace.alone():
        found = plan(keep, days, reports)
        for waste in found:
            _remove(waste)
        if any(waste.kind == "report" for waste in found):
            timeline.show(State())
    return found


def tidy() -> None:
    """Remove the workspaces that can go, beside the steps; none if Airflow does not say which those are."""
    with workspace.using():
        spaces = _spaces()
        runs = _runs(State(), spaces)
        if runs.ended is None:
            return
        for waste in _workspaces(runs, spaces, *workspace.retention()):
            with suppress(FileNotFoundError, BlockingIOError), lock_file(waste.paths[0]).open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a step that comes now is told: workspace.owned
                _remove(waste)


def _remove(waste: Waste) -> None:
    if waste.version is not None:
        registry.collect(waste.version)
    if waste.refs:
        refs.move(places.ROOT, {ref: (commit, None) for ref, commit in waste.refs.items()})
    for path in waste.paths:
        if path.is_dir():
            cache.forget(path)
            gone = path if path.name.startswith(".") else path.with_name(f".{path.name}.old")
            if gone != path:
                shutil.rmtree(gone, ignore_errors=True)
                path.rename(gone)  # at once: half a workspace would be taken for one
            shutil.rmtree(gone)
        else:
            path.unlink(missing_ok=True)


# --- workspaces


def _spaces() -> dict[str, Path]:
    """The workspaces here, by their runs."""
    found = sorted(path for path in (places.var() / "runs").glob("*/[!.]*") if path.is_dir())
    return {f"{space.parent.name}/{space.name}": space for space in found}


def _workspaces(runs: Runs, spaces: Mapping[str, Path], keep: int, days: int) -> Iterator[Waste]:
    for left in sorted((places.var() / "runs").glob("*/.*")):
        yield Waste("workspace", f"{left.parent.name}/{left.name}", "left behind by a kill", _size(left), [left])
    idle = {name: (time.time() - _touched(space)) / DAY_S for name, space in spaces.items() if not _is_held(space)}
    for name, why in runs.over(idle, keep, days):
        yield Waste("workspace", name, why, _size(spaces[name]), [spaces[name]])


def _refs(runs: Runs, states: Mapping[str, tuple[str, float]], keep: int, days: int) -> Iterator[Waste]:
    """The refs of runs in the git remote, where workspaces travel; a commit that a version names keeps its own."""
    if not states:
        return
    named = {version.tags.get("ballast.commit", "").removesuffix("-dirty") for version in registry.versions()}
    pins = refs.there(f"{workspace.RUNS}/*")
    idle = {name: (time.time() - at) / DAY_S for name, (_, at) in states.items()}
    for name, why in runs.over(idle, keep, days):
        pin, state = f"{workspace.RUNS}/{name}", f"{refs.STATES}/{name}"
        gone = {state: states[name][0]} | ({pin: pins[pin]} if pins.get(pin, "") not in {"", *named} else {})
        yield Waste("ref", name, why, 0, refs=gone)


def _runs(state: State, names: Collection[str]) -> Runs:
    """How these runs stand."""
    waiting = {entry.actor for entry in approval.waiting(state.ledger())}
    try:
        airflow = embedded.connect()
        unfinished = airflow.runs(ACTIVE)
        busy = {_named(f"{run.dag_id}/{run.run_id}") for run in unfinished} | {_named(run) for run in waiting}
        ended = _ended(airflow, set(names) - busy)
    except TryAgain:
        under_way = {one.run for one in state.retrainings() if one.run and not one.ended_at}
        return Runs({_named(run) for run in waiting | under_way}, None)
    if len(unfinished) == PAGE:
        raise TryAgain(f"{PAGE} runs or more are queued or running in Airflow. Wait until there are fewer.")
    return Runs(busy, ended)


def _ended(airflow: Airflow, names: set[str]) -> dict[str, str]:
    """How the runs ended; Airflow is asked back to the last one of each DAG. One that it has forgotten is not there."""
    found: dict[str, str] = {}
    for dag in {name.partition("/")[0] for name in names}:
        wanted = {name for name in names if name.startswith(f"{dag}/")}
        for run in airflow.ended(dag):
            found[_named(f"{run.dag_id}/{run.run_id}")] = run.state
            if wanted <= found.keys():
                break
    return found


def _named(run: str) -> str:
    dag, _, run_id = run.partition("/")
    return f"{name_of(dag)}/{name_of(run_id)}"


def _touched(space: Path) -> float:
    """When a step last began or ended there, in seconds since 1970."""
    times = [space, space / "dvc.lock", lock_file(space)]
    return max((path.stat().st_mtime for path in times if path.exists()), default=0.0)


def _is_held(space: Path) -> bool:
    """Whether a step works there, be it one that outlived its runner."""
    lock = lock_file(space)
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# --- refused models


def _models(state: State, days: int) -> Iterator[Waste]:
    """The models of versions that the gate refused, and that nothing has moved or asked for."""
    versions, refused = registry.versions(), _refused(state)
    needed = {one.digest for one in versions if one.number not in refused}
    for one in versions:
        age = (time.time() - one.created_at.timestamp()) / DAY_S
        if one.number in refused and age > days:
            local = places.var() / "models" / one.digest
            paths = [local] if local.exists() and one.digest not in needed else []
            if size := registry.size(one.number) + sum(map(_size, paths)):
                yield Waste("model", f"v{one.number}", f"refused {age:.0f} days ago", size, paths, one.number)


def _refused(state: State) -> set[int]:
    """The versions that the gate refused last, less those that an alias, or an entry of the ledger, speaks of."""
    decisions, ledger = state.decisions(), state.ledger()
    last = {decision.version: decision for decision in decisions}
    records = {entry.record_sha256 for entry in ledger}
    spoken_of = {decision.version for decision in decisions if decision.record_sha256 in records}
    spoken_of |= {number for entry in moves(ledger) for number in (entry.from_version, entry.to_version) if number}
    spoken_of |= set(registry.aliases().values())
    return {number for number, decision in last.items() if decision.verdict == "refuse"} - spoken_of


# --- reports


def _reports(keep: int) -> Iterator[Waste]:
    """Evidently's report is most of what a window takes; verdicts and pages are small, and the history needs them."""
    folders = sorted(
        (places.var() / "reports" / "monitor").glob("[!.]*..*"), key=lambda path: path.name.split("..")[::-1]
    )
    for folder in folders[: len(folders) - keep] if keep < len(folders) else []:
        if (file := folder / "evidently.html").exists():
            why = f"Evidently's report, not among the last {keep}"
            yield Waste("report", folder.name, why, file.stat().st_size, [file])


# --- data


def _data(gone: set[Path], without: set[int | None], days: int) -> list[Waste]:
    """The objects of DVC's cache that no dvc.lock names; the youngest may be of a stage that is yet to record them."""
    objects = workspace.cache_of(places.ROOT) / "files" / "md5"
    needed = _needed(objects, gone, without)
    born_before = time.time() - max(days, 1) * DAY_S
    idle = [
        path
        for path in objects.glob("[0-9a-f][0-9a-f]/*")
        if path.parent.name + path.name not in needed and path.stat().st_mtime < born_before
    ]
    idle += cache.set_aside(objects).glob("*.dir")  # made anew, or needed by nobody
    # Lists of files first: one that is still there promises its files.
    idle.sort(key=lambda path: (path.suffix != ".dir", path))
    size = sum(path.stat().st_size for path in idle)
    why = f"no dvc.lock names them, untouched for {max(days, 1)} days"
    return [Waste("data", f"{len(idle):,} objects of the DVC cache", why, size, idle)] if idle else []


def _needed(objects: Path, gone: set[Path], without: set[int | None]) -> set[str]:
    """What a dvc.lock names, of a workspace that stays, a version or a commit; and the files of its folders."""
    texts = [path.read_bytes() for path in _locks() if not gone & set(path.parents)]
    texts += [kept for one in registry.versions() if one.number not in without and (kept := _kept(one))]
    texts += list(_committed())
    found = {name.decode() for text in texts for name in MD5.findall(text)}
    for folder in [name for name in found if name.endswith(".dir")]:
        listed, damaged = objects / folder[:2] / folder[2:], cache.set_aside(objects) / folder
        if listed.exists() and md5(listed) == folder.removesuffix(".dir"):
            found |= {entry["md5"] for entry in json.loads(listed.read_bytes())}
        elif left := [path for path in (listed, damaged) if path.exists()]:
            raise BallastError(
                f"{left[0]} is damaged: which files are needed cannot be told, so nothing is removed. A new run of the "
                "stage that made it makes it anew. (Is its data of no use any more? Delete it.)"
            )
    return found


def _kept(version: registry.Version) -> bytes | None:
    return None if registry.COLLECTED in version.tags else registry.kept(version, "dvc.lock")


def _locks() -> Iterator[Path]:
    """The dvc.lock of the checkout and of every workspace, and what a killed commit left to go back to."""
    roots = [places.ROOT, *(places.var() / "runs").glob("*/*"), *(places.var() / "replay").glob("**/runs/*/*")]
    for root in roots:
        files = (root / "dvc.lock", root / ".dvc" / "tmp" / "dvc.lock.before", *root.glob("*.dvc"))
        yield from (path for path in files if path.is_file())


def _committed() -> Iterator[bytes]:
    """What is committed of DVC's own files, in the commit of every ref."""
    for commit in {"HEAD", *git(places.ROOT, "for-each-ref", "--format=%(objectname)").split()}:
        for path in git(places.ROOT, "ls-tree", "-r", "--name-only", commit).splitlines():
            if path == "dvc.lock" or path.endswith((".dvc", "/dvc.lock")):
                yield git(places.ROOT, "show", f"{commit}:{path}").encode()


def _size(path: Path) -> int:
    """The bytes of a file, or of all in a folder; what goes meanwhile counts for nothing."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file() and not one.is_symlink()]
    total = 0
    for one in files:
        with suppress(FileNotFoundError):
            total += one.stat().st_size
    return total


def main() -> None:
    """Tidy up, giving way to all else."""
    os.nice(10)
    tidy()


if __name__ == "__main__":
    exit_with(main)
