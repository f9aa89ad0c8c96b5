"""Reproduce: a registered version made once more from its records alone, and compared with what was registered.

The code is the recorded commit in a clone of its own, the data what the recorded dvc.lock names by hash. The stages
that make the model are run by their commands: the run cache is neither asked nor filled, training logs to a store that
is thrown away, and nothing outside a folder under ``var/`` is written but data that the DVC cache lacked, or had
damaged.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pipelines import cache, places, refs, registry
from pipelines.errors import BallastError, TryAgain
from pipelines.files import md5, read_json, sha256
from pipelines.processes import die_with_parent
from pipelines.registry import Version
from pipelines.workspace import clone, share_cache, using

STAGES = ("prepare", "train", "evaluate")
"""What is run again. What was landed and validated is taken by its hash: the source may answer otherwise now."""

TOLERANCE = 0.01
EXIT_CODES = {"identical": 0, "equal": 3, "different": 4}
TEST, MODEL = "data/prepare/test.parquet", "data/train/model"

Outcome = Literal["identical", "equal", "different"]
Say = Callable[[str, str], object]
"""Called with a name and a line for a person, as it goes."""


@dataclass(frozen=True)
class Records:
    """What was kept of how a version was made."""

    commit: str
    lock: bytes
    params: bytes
    environment: Mapping[str, Any]

    @property
    def stages(self) -> Mapping[str, Any]:
        """The stages of dvc.lock: commands, and the hashes of what went in and came out."""
        stages: Mapping[str, Any] = yaml.safe_load(self.lock)["stages"]
        return stages


@dataclass(frozen=True)
class Comparison:
    """The reproduced model beside the registered one."""

    registered: str
    reproduced: str
    same_rows: bool
    """Whether the test rows are those that the version was measured on, to the byte."""
    rows: int
    differing: int
    max_difference: float

    def outcome(self, tolerance: float) -> Outcome:
        """Identical to the last bit, equal where no prediction differs by more than ``tolerance``, or different."""
        if not self.same_rows or self.max_difference > tolerance:
            return "different"
        return "identical" if self.registered == self.reproduced and not self.differing else "equal"


def reproduce(
    number: int, tolerance: float = TOLERANCE, build: bool = True, say: Say = lambda name, text: None
) -> dict[str, Any]:
    """Make version ``number`` again and compare; ``build`` allows to install another uv.lock than this environment's.

    Raises BallastError, with what is missing, if the records do not suffice, and TryAgain while another one runs.
    """
    began = time.monotonic()
    version = registry.version(number)
    records = _records(version)
    _check_consistent(number, records.stages)
    registered = registry.model(number)
    with using(), _scratch() as root:
        _lay_out(version, records, root)
        say("code", f"commit {records.commit[:12]} · {', '.join(STAGES)} are run again, nothing cached")
        taken = _take_data(number, records.stages, root)
        say("data", " · ".join(f"{path} {md5[:12]}" for path, md5 in taken.items()) + " · by hash")
        python = _python(root, build, say)
        other = {name: _run_stage(name, records.stages[name], root, python, say) for name in STAGES}
        found = _compare(version.digest, registered, root, python, same_rows=TEST not in other["prepare"])
        here = _environment_here(root)
    outcome = found.outcome(tolerance)
    return {
        "model": registry.name(),
        "version": number,
        "outcome": outcome,
        "reasons": [] if outcome == "identical" else reasons(records.environment, here, other),
        "tolerance": tolerance,
        "digest": {"registered": found.registered, "reproduced": found.reproduced},
        "predictions": {"rows": found.rows, "differing": found.differing, "max_difference": found.max_difference},
        "commit": records.commit,
        "stages": {name: {"other_bytes": paths} for name, paths in other.items()},
        "by_hash": taken,
        "environment": {"recorded": dict(records.environment), "here": here},
        "seconds": round(time.monotonic() - began, 1),
    }


# --- the records


def _records(version: Version) -> Records:
    """Raise BallastError if something that a reproduction needs was not kept, or is not what was kept."""
    kept = {name: registry.kept(version, name) for name in ("dvc.lock", "params.yaml", "environment.json")}
    if missing := [name for name in ("dvc.lock", "params.yaml") if kept[name] is None]:
        raise BallastError(
            f"With v{version.number} no {' and no '.join(missing)} was kept: what it was made of is not known by hash. "
            "It cannot be reproduced; train and register a version where `dvc repro` or Airflow has made it."
        )
    lock, settings = kept["dvc.lock"] or b"", kept["params.yaml"] or b""
    if (found := hashlib.sha256(lock).hexdigest()) != version.lock:
        raise BallastError(
            f"The dvc.lock kept with v{version.number} is {found[:12]}, and it was registered under "
            f"{version.lock[:12] or 'none'}: someone changed the file, or an older Ballast kept that of another "
            "version in its place. It cannot be reproduced; train and register again."
        )
    environment = json.loads(kept["environment.json"] or b"{}")
    return Records(version.tags.get("ballast.commit", "unknown"), lock, settings, environment)


def _check_consistent(number: int, stages: Mapping[str, Any]) -> None:
    """Raise BallastError if dvc.lock is not of one run: a stage read other bytes than the stage before wrote last."""
    if missing := [name for name in STAGES if name not in stages]:
        raise BallastError(f"The dvc.lock of v{number} has no {', '.join(missing)}: that stage was not made by DVC.")
    made = {out["path"]: out["md5"] for entry in stages.values() for out in entry.get("outs", [])}
    for name in STAGES:
        for dep in stages[name]["deps"]:
            if (wrote := made.get(dep["path"], dep["md5"])) != dep["md5"]:
                raise BallastError(
                    f"The dvc.lock of v{number} is not of one run: {name} read {dep['path']} {dep['md5'][:12]}, and "
                    f"{wrote[:12]} was written later. Train again with `dvc repro`, and register that version."
                )


# --- the workspace


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder under var/ for one reproduction; what a killed one left in it is removed first."""
    home = places.var() / "reproduce"
    home.mkdir(parents=True, exist_ok=True)
    held = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise TryAgain(f"Another reproduction runs in {home}. Wait for it to end.") from None
    root = home / "workspace"
    try:
        shutil.rmtree(root, ignore_errors=True)
        yield root
    finally:
        cache.forget(root)
        shutil.rmtree(root, ignore_errors=True)
        os.close(held)


def _lay_out(version: Version, records: Records, root: Path) -> None:
    """Clone the recorded commit, and put the recorded settings and dvc.lock into it."""
    commit = records.commit.removesuffix("-dirty")
    if places.travels() and not _has_commit(commit):
        with suppress(TryAgain):
            refs.fetch_commit(places.ROOT, commit)
        refs.there("HEAD")  # it says if the remote is away; else the commit is not there
    if not _has_commit(commit):
        raise BallastError(
            f"v{version.number} was made by commit {commit}, which the repository {places.ROOT} does not have. "
            "Fetch it from where the version was made (`git fetch`), or restore a backup."
        )
    clone(places.ROOT, commit, root)
    (root / "dvc.lock").write_bytes(records.lock)
    (root / "params.yaml").write_bytes(records.params)
    _check_code(version.number, records, root)
    share_cache(places.ROOT, root)


def _has_commit(commit: str) -> bool:
    command = ["git", "-C", str(places.ROOT), "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _check_code(number: int, records: Records, root: Path) -> None:
    """Raise BallastError if a file that the stages read is not what dvc.lock saw: it was changed, and not committed."""
    made = {out["path"] for entry in records.stages.values() for out in entry.get("outs", [])}
    deps = {dep["path"]: dep["md5"] for name in STAGES for dep in records.stages[name]["deps"]}
    files = {path: md5 for path, md5 in deps.items() if path not in made and not md5.endswith(".dir")}
    if other := sorted(path for path, was in files.items() if _md5(root / path) != was):
        raise BallastError(
            f"v{number} was made by code that commit {records.commit} does not hold: {', '.join(other)} had "
            "uncommitted changes. It cannot be reproduced; commit first, then train and register again."
        )
    if other := _other_settings(records.stages, yaml.safe_load(records.params)):
        raise BallastError(
            f"The params.yaml kept with v{number} is not what it was made with ({', '.join(other)} differ from its "
            "dvc.lock): someone changed it, or registered again with other settings. It cannot be reproduced."
        )


def _other_settings(stages: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The settings that the stages read, by their dotted names, and that params.yaml has otherwise."""
    read: dict[str, Any] = {}
    for name in STAGES:
        read |= stages[name].get("params", {}).get("params.yaml", {})
    return sorted(name for name, value in read.items() if _at(settings, name) != value)


def _at(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _md5(path: Path) -> str | None:
    """DVC's hash of a file; None if there is none."""
    return md5(path) if path.is_file() else None


def _take_data(number: int, stages: Mapping[str, Any], root: Path) -> dict[str, str]:
    """Check out what the stages read and no stage here makes, from the cache, else the remote; return the hashes."""
    made = {out["path"]: out["md5"] for name, entry in stages.items() if name not in STAGES for out in entry["outs"]}
    deps = {dep["path"]: dep["md5"] for name in STAGES for dep in stages[name]["deps"]}
    wanted = {path: md5 for path, md5 in deps.items() if path in made}
    failed, tries = "", 2  # the damaged list of a folder hides which of its files are damaged
    while (missing := cache.lacking(root, wanted.values())) and tries:
        failed, tries = _dvc(root, "fetch", *wanted), tries - 1
    if missing or (failed := _dvc(root, "checkout", "--force", *wanted)):
        listed = ", ".join(f"{path} ({md5})" for path, md5 in wanted.items())
        raise BallastError(
            f"The data of v{number} is in neither the DVC cache nor the remote, or is damaged in both: {listed}. "
            f"{f'DVC says: {failed.strip()} ' if failed else ''}"
            "Pull it into the cache where it still is (`dvc push` there, or copy .dvc/cache)."
        )
    return wanted


def _dvc(root: Path, *arguments: str) -> str:
    """Run DVC of this environment in the clone; return what it says if it fails, else nothing."""
    words = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(
        words, cwd=root, env=_environment(root), capture_output=True, text=True, check=False, preexec_fn=die_with_parent
    )
    return (done.stderr or done.stdout or f"exit code {done.returncode}") if done.returncode else ""


# --- the environment


def _python(root: Path, build: bool, say: Say) -> Path:
    """The interpreter of the recorded uv.lock: this one, or one that scripts/setup.sh makes in the clone."""
    installed, wanted = Path(sys.prefix) / "uv.lock", sha256(root / "uv.lock")
    if not installed.exists():
        say(
            "environment",
            "this one; `make setup` did not make it, so whether it is of the recorded uv.lock is not known",
        )
        return Path(sys.executable)
    if sha256(installed) == wanted:
        say("environment", f"this one, of the recorded uv.lock {wanted[:12]}")
        return Path(sys.executable)
    if not build:
        raise BallastError(
            f"The recorded uv.lock is {wanted[:12]}, and this environment was installed from {sha256(installed)[:12]}. "
            "Leave out --no-build to install the recorded one for this reproduction (some 8 GB, some minutes)."
        )
    _execute(["sh", "scripts/setup.sh"], root, Path(sys.executable), "Installing the recorded environment")
    say("environment", f"built from the recorded uv.lock {wanted[:12]}")
    return root / ".venv" / "bin" / "python"


def _environment(root: Path, python: Path = Path(sys.executable)) -> dict[str, str]:
    """The environment of a stage: all of its state within the clone, and no word of a DAG run or an MLflow server."""
    ours = ("BALLAST_", "MLFLOW_", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = f"{python.parent}:{env.get('PATH', '')}"
    return env | {"PATH": path, "BALLAST_VAR": str(root / "var"), "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}


def _environment_here(root: Path) -> dict[str, Any]:
    """What `train` found in the reproduction, as it logged it to its own store; empty if it logged nothing."""
    for file in (root / "var" / "mlflow" / "artifacts").rglob("environment.json"):
        found: dict[str, Any] = read_json(file)
        return found
    return {}


def reasons(recorded: Mapping[str, Any], here: Mapping[str, Any], other_bytes: Mapping[str, list[str]]) -> list[str]:
    """What may explain a difference: stages that wrote other bytes, and what of the environment is not as recorded."""
    found = [f"{name} wrote other bytes: {', '.join(paths)}" for name, paths in other_bytes.items() if paths]
    names = sorted({*recorded, *here} - {"recorded_by"})
    for name in names if recorded and here else ():
        if recorded.get(name) != here.get(name):
            found.append(f"{name.replace('_', ' ')}: {recorded.get(name)} then, {here.get(name)} here")
    if not recorded:
        found.append("the environment of the training was not recorded")
    elif recorded.get("recorded_by") != "train":
        found.append("the recorded environment is that of `register`, which may be another than the training's")
    elif not here:
        found.append("the environment here could not be compared with the recorded one")
    elif all(recorded.get(name) == here.get(name) for name in names):
        found.append("nothing in the recorded environment explains it: it is the same here")
    return found


# --- the run


def _run_stage(name: str, entry: Mapping[str, Any], root: Path, python: Path, say: Say) -> list[str]:
    """Run the command of a stage; return those of its outs whose bytes are not the recorded ones."""
    began = time.monotonic()
    for line in entry["cmd"] if isinstance(entry["cmd"], list) else [entry["cmd"]]:
        _execute(["bash", "--norc", "-c", line], root, python, f"`{line}`")
    files = {out["path"]: out["md5"] for out in entry["outs"] if not out["md5"].endswith(".dir")}
    other = sorted(path for path, was in files.items() if _md5(root / path) != was)
    summary = read_json(root / "data" / name / "result.json")["summary"]
    bytes_ = f"other bytes: {', '.join(other)}" if other else "the recorded bytes"
    say(name, f"{summary} · {bytes_}  {time.monotonic() - began:.0f} s")
    return other


def _execute(command: list[str], root: Path, python: Path, what: str) -> None:
    """Run a command in the clone; raise BallastError with the last of its output if it fails. It dies with us."""
    done = subprocess.run(
        command,
        cwd=root,
        env=_environment(root, python),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        preexec_fn=die_with_parent,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-10:])
        raise BallastError(f"{what} failed in the reproduction (exit code {done.returncode}). It said last:\n{tail}")


# By the recorded code, in the recorded environment: what today's code makes of an old model is another question.
_PREDICT = """
import sys
from pathlib import Path
import numpy
from pipelines import model, rows
test = rows.read(Path(sys.argv[1]))
numpy.savez(sys.argv[2], *(model.load(Path(folder)).predict(test) for folder in sys.argv[3:]))
"""


def _compare(digest: str, registered: Path, root: Path, python: Path, same_rows: bool) -> Comparison:
    """Let both models predict the test window, in one process."""
    import numpy as np

    from pipelines.model import _verified

    predictions = root / "predictions.npz"
    command = [str(python), "-c", _PREDICT, TEST, str(predictions), str(registered), MODEL]
    _execute(command, root, python, "Predicting the test window")
    with np.load(predictions) as both:
        difference = np.abs(both["arr_0"] - both["arr_1"])
    return Comparison(
        registered=digest,
        reproduced=_verified(root / MODEL)[1],
        same_rows=same_rows,
        rows=len(difference),
        differing=int((difference > 0).sum()),
        max_difference=float(difference.max(initial=0.0)),
    )
