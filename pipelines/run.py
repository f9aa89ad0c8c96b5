"""The one way to run a step, whatever runs it: ask the run cache, else run its command, then record.

``python -m pipelines.run STEP --dag-id D --run-id R`` works in the run's workspace, streams the step's output, keeps
its exit code, and prints as its last line ``ballast-result`` and the step's result as JSON. Plain ``dvc repro`` would
turn every exit code into 255 and, on SIGTERM, die and leave the stage running. With ``BALLAST_STAGE_RUNNER=container``
it asks whoever runs it to run a stage's command instead: ``pipelines.container``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipelines import cache, container, travel
from pipelines.errors import BallastError, TryAgain, exit_with
from pipelines.files import dvc_md5, read_json
from pipelines.places import ROOT, landing, state_uri, tracking_uri, travels, var
from pipelines.processes import die_with_parent
from pipelines.workspace import SEAL, Workspace, broken_seal, check_seal, note_step, owned, run_cache_alone, seal, using

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

STAGES = ("land", "ingest", "validate", "prepare", "train", "evaluate")
STEPS = ("settle", "admit", "register", "decide", "review", "answer", "promote", "rollback", "score", "drift", "policy")
RESULT = "ballast-result "
CONNECTION = "ballast-connection "
# bash, as it makes way for a single command: the kernel's signal at our death then reaches it. Not its rc file, which
# it reads where stdin is a socket: that may put another python first on the PATH.
SHELL = ("bash", "--norc", "-c")
# Airflow kills a task 5 s after SIGTERM; the step has less, so that its checkpoint and our exit fit in.
TERM_GRACE_S = 4.0


def run(step: str, workspace: Workspace, arguments: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Run one step in its workspace; return its result with ``cached``, ``seconds``, ``as_of`` and ``commit``."""
    began = time.monotonic()
    with owned(workspace) as lock, travel.carried(step, workspace), _scratch(workspace.root) as scratch:
        env = {**env, "TMPDIR": str(scratch)}
        _heal(workspace.root)
        check_seal(workspace.root)
        if step in STAGES:
            cached = _run_stage(step, workspace.root, env, lock)
        else:
            if not travels():  # what is brought is whole, and all else may be of an earlier try
                _check_read(workspace.root, step)
                if step == "register":  # the data first, then the version that names it
                    travel.push(workspace.root)
            shutil.rmtree(workspace.root / "data" / step, ignore_errors=True)
            _run_command([sys.executable, "-m", f"pipelines.{step}", *arguments], workspace.root, env, lock)
            cached = False
        result = read_json(workspace.root / "data" / step / "result.json") | _links(env)
    seconds = round(time.monotonic() - began, 2)
    place = {"as_of": workspace.as_of.isoformat(), "commit": workspace.commit}
    return {**result, **place, "cached": cached, "seconds": seconds}


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A folder for the step's temporary files: what a killed one leaves there goes when it is tried again."""
    scratch = root / ".dvc" / "tmp" / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _links(env: dict[str, str]) -> dict[str, Any]:
    """Where else the step left something, such as its MLflow run: what differs between equal runs is in no out."""
    links = Path(env["BALLAST_LINKS"])
    return read_json(links) if links.exists() else {}


def _run_stage(name: str, root: Path, env: dict[str, str], lock: int) -> bool:
    """Run a DVC stage; return whether it was cached. Afterwards its outs are in the cache and in dvc.lock."""
    logging.getLogger("dvc").setLevel(logging.WARNING)
    os.chdir(root)  # DVC reads the names of stages relative to it
    with cache.opened(root) as repo:
        # One stage object for all: DVC takes a third of a second to read its files, which it does for each.
        stage = repo.stage.load_one(name=name)
        with repo.lock:
            _check_inputs(root, stage)
            unchanged = not stage.changed()
            cached = unchanged or _restore(repo, stage)
        if cached:
            print(f"{name} is cached: its code, settings and data are those of an earlier run", flush=True)
        else:
            for line in stage.cmd if isinstance(stage.cmd, list) else [stage.cmd]:
                _run_line(name, line, root, env, lock)
        if not unchanged:
            _record(repo, stage, root, cached)
    return cached


def _restore(repo: Repo, stage: PipelineStage) -> bool:
    """Take the stage's outs from the cache. What a killed run left of them must not be in the way."""
    from dvc.stage.cache import RunCacheNotFoundError

    stage.remove_outs(ignore_remove=False)
    with run_cache_alone(repo.stage_cache.cache_dir):
        promised = cache.promised(repo, stage)
    cache.whole(repo.cache.local, promised)  # DVC takes nothing in the place of what is removed
    try:
        with run_cache_alone(repo.stage_cache.cache_dir):
            repo.stage_cache.restore(stage)
    except RunCacheNotFoundError:
        return False
    return True


def _record(repo: Repo, stage: PipelineStage, root: Path, cached: bool) -> None:
    """What ``dvc commit`` does. DVC writes dvc.lock in place: a copy guards it meanwhile."""
    lock_file, guard = root / "dvc.lock", root / ".dvc" / "tmp" / "dvc.lock.before"
    part = guard.with_suffix(".part")
    part.write_bytes(lock_file.read_bytes() if lock_file.exists() else b"")
    part.replace(guard)
    with repo.lock:
        stage.save(run_cache=False)
        if not cached:  # what the cache has damaged of an equal out would stay
            cache.whole(repo.cache.local, cache.objects(out.obj for out in stage.outs))
        stage.commit()
        with run_cache_alone(repo.stage_cache.cache_dir):
            repo.stage_cache.save(stage)
        stage.dvcfile.dump_stages([stage], update_pipeline=False)
    seal(root)
    guard.unlink()


def _heal(root: Path) -> None:
    """Undo what a kill may have left of the files that DVC writes in place; nobody else works here now.

    A guard left behind means that a commit was killed: unless dvc.lock is as it was sealed, what it said before holds.
    DVC's own list of who reads and writes what may be half-written, or name a process id that another process has by
    now.
    """
    (root / ".dvc" / "tmp" / "rwlock").unlink(missing_ok=True)
    guard, lock = root / ".dvc" / "tmp" / "dvc.lock.before", root / "dvc.lock"
    if guard.exists():
        if not (root / SEAL).exists() or broken_seal(root) == lock:
            if guard.stat().st_size:
                guard.replace(lock)
            else:  # there was none
                lock.unlink(missing_ok=True)
        guard.unlink(missing_ok=True)


def _made(root: Path) -> dict[Path, dict[str, str]]:
    """The files and folders that the stages have left, by dvc.lock: of each DVC's hash, and whose it is.

    It may also have what a stage of another name, or an earlier one, has left there.
    """
    import yaml

    lock = root / "dvc.lock"
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.exists() else {}
    found: dict[Path, dict[str, str]] = {}
    for name, stage in stages.items():
        for out in stage.get("outs", ()):
            if "md5" in out:
                found.setdefault(root / out["path"], {})[out["md5"]] = name
    return found


def _check_inputs(root: Path, stage: PipelineStage) -> None:
    """Raise BallastError where an input of a stage is no longer as the stage that makes it left it."""
    made = _made(root)
    for dep in stage.deps:
        path = root / dep.def_path
        if path in made and path.exists() and dep.get_hash().value not in made[path]:
            raise _changed(path, made[path])


def _check_read(root: Path, step: str) -> None:
    """Raise BallastError where what a step reads that is no stage is not as the stage that made it left it."""
    for path, hashes in _made(root).items():
        read = path.exists() and not {*hashes.values()}.isdisjoint(travel.READS[step])
        # The first takes less time than to import DVC, which may ignore a file that it counts.
        if read and dvc_md5(path) not in hashes and cache.dvc_hash(root, path) not in hashes:
            raise _changed(path, hashes)


def _changed(path: Path, hashes: dict[str, str]) -> BallastError:
    [*_, stage] = hashes.values()
    return BallastError(
        f"{path} is not as `{stage}` left it: cut short, or changed by hand. Clear `{stage}` and what comes after it: "
        "it comes back from the cache."
    )


def _run_line(stage: str, line: str, root: Path, env: dict[str, str], lock: int) -> None:
    """Run a line of a stage's command here, or in a container; either ends this process where it fails."""
    if not container.asked():
        _run_command([*SHELL, line], root, env, lock)
    elif code := container.run(stage, line, root, env):
        sys.exit(code)


def _run_command(command: list[str], root: Path, env: dict[str, str], lock: int) -> None:
    """Run a command in its own process group; it dies with us, and what remains of its group dies with it.

    Exits this process with the command's code if it fails, so that the code's meaning reaches whoever runs us.
    """
    process = subprocess.Popen(
        command, cwd=root, env=env, pass_fds=(lock,), start_new_session=True, preexec_fn=die_with_parent
    )
    note_step(lock, process.pid)
    try:
        code = process.wait()
    except SystemExit:  # SIGTERM came: see main
        _stop(process)
        raise
    finally:
        _kill_group(process.pid)
        note_step(lock, None)
    if code:
        # Half of what was written on a full disk is taken for whole.
        for folder in root.glob("pipelines/**/__pycache__"):
            shutil.rmtree(folder, ignore_errors=True)
        sys.exit(code if code > 0 else 128 - code)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(TERM_GRACE_S)
    except subprocess.TimeoutExpired:
        print(f"the step did not end within {TERM_GRACE_S:.0f} s of SIGTERM: killed", flush=True)


def _terminated(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def environment(dag_id: str, run_id: str) -> dict[str, str]:
    """The environment of a step: where things are, by absolute path, and which run it belongs to."""
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONSAFEPATH", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    bin_path = str(Path(sys.executable).parent)
    return env | {
        "PATH": f"{bin_path}:{env.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "BALLAST_VAR": str(var()),
        "BALLAST_SOURCE": str((ROOT / (env.get("BALLAST_SOURCE") or "")).resolve()),
        "BALLAST_LANDING": str(landing()),
        "BALLAST_STATE_URI": state_uri(),
        "BALLAST_DAG": dag_id,
        "BALLAST_RUN": run_id,
        "MLFLOW_TRACKING_URI": tracking_uri(),
        "DVC_NO_ANALYTICS": "1",
    }


def _connection(root: Path) -> dict[str, str]:
    """The connection of Airflow that the source's options name, from whoever runs us: a line out, a line back."""
    import yaml

    with suppress(LookupError, TypeError, yaml.YAMLError):  # `land` says what is wrong with it
        name = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))["land"]["options"]["connection"]
        if re.fullmatch(r"\w+", name):
            print(CONNECTION + name, flush=True)
            found = sys.stdin.readline().strip()
            return {f"AIRFLOW_CONN_{name.upper()}": found} if found else {}
    return {}


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m pipelines.run", description=__doc__)
    parser.add_argument("step", choices=(*STAGES, *STEPS))
    parser.add_argument("--dag-id", required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--ask-connection", action="store_true", help="of the source; the answer comes by stdin")
    parser.add_argument("--as-of", help="a date; without one the clock is asked")
    parser.add_argument("--train-days", help="`prepare.train_days` of this run: a number, or all; else as committed")
    return parser.parse_known_args()


def _date(text: str | None) -> date | None:
    try:
        return date.fromisoformat(text[:10]) if text else None
    except ValueError:
        raise BallastError(f"The as-of date must look like 2013-04-01 (found {text!r}).") from None


def main() -> None:
    """Run one step for Airflow (or for a person who wants to see what Airflow would do)."""
    options, arguments = _parse()
    parent = os.getppid()
    signal.signal(signal.SIGTERM, _terminated)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        raise TryAgain("The process that asked for this step is gone. Nothing was done.")
    with using():
        workspace = travel.ensure(options.dag_id, options.run_id, _date(options.as_of), train_days=options.train_days)
        env = environment(options.dag_id, options.run_id)
        env["BALLAST_LINKS"] = str(workspace.root / ".dvc" / "tmp" / "links" / f"{options.step}.json")
        if options.ask_connection:
            env |= _connection(workspace.root)
        result = run(options.step, workspace, arguments, env)
    print("\n" + RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    exit_with(main)
