"""A round: one retraining, its promotion and a monitored window, in each of whose steps one component is killed.

Nine rounds are the whole matrix: in each of them every place of the chain has another component.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pandas as pd
import psutil
import yaml

from pipelines import places, workspace
from pipelines.dagruns import ENDED, Run
from pipelines.errors import BallastError, TryAgain
from pipelines.run import STAGES
from tests.e2e.conftest import clean_environment

from .topology import Topology, chaos_project, processes

RETRAIN = ("land", "ingest", "validate", "admit", "prepare", "train", "evaluate", "register", "decide")
PROMOTE = ("review", "promote")
MONITOR = ("settle", "land", "ingest", "validate", "score", "drift", "policy")
PLACES = [
    *(("retrain_on_alert", step) for step in RETRAIN),
    *(("promote", step) for step in PROMOTE),
    *(("monitor", step) for step in MONITOR),
]
PROCESSES = ("step", "pipelines.run")
SERVICES = ("worker", "scheduler", "dag-processor", "api-server", "mlflow", "postgres", "redis")
COMPONENTS = (*PROCESSES, *SERVICES)
FIRST, EVERY = date(2024, 3, 20), timedelta(days=5)  # the as-of dates of the rounds
WINDOW = timedelta(days=4)
LOST_S = 420.0  # nothing has happened for so long: it never will
LOOK_S, ASK_S = 0.05, 3.0
UNSAID = "its log has no error"


@dataclass
class Cell:
    """One kill, and what came of it."""

    component: str
    dag: str
    step: str
    after_s: float  # since the step began
    hit: bool  # else the step had just ended
    ended: str = "lost"
    tries: int = 0
    seconds: float = 0.0  # until the next step began, or the run had ended

    @property
    def well(self) -> bool:
        """Whether its run ended, be it after being cleared for a reason that its log gives."""
        return self.ended != "lost" and UNSAID not in self.ended

    def row(self) -> str:
        """As a line of the table."""
        moment = f"{self.after_s:.1f} s" if self.hit else "as it ended"
        cells = (self.component, self.dag, self.step, moment, self.ended, self.tries, f"{self.seconds:.0f} s")
        return "| " + " | ".join(map(str, cells)) + " |"


HEAD = "| killed | DAG | in its step | after | ended | tries | until it went on |\n|---|---|---|---|---|---|---|"


def plan(number: int, shuffled: Sequence[str]) -> list[str]:
    """Which component is killed at each place of a round."""
    return [shuffled[(place + number) % len(shuffled)] for place in range(len(PLACES))]


class Round:
    """One round on a topology; without ``kills`` nothing is broken, and the steps are timed."""

    def __init__(self, topology: Topology, number: int, kills: Sequence[str | None], chance: random.Random) -> None:
        self.topology, self.kills, self.chance = topology, kills, chance
        self.as_of = FIRST + number * EVERY
        self.name = f"round-{number}"
        self.cells: list[Cell] = []
        self.took: dict[int, float] = {}  # seconds of each step's process, by place
        self._open: tuple[Cell, float] | None = None
        self._failures: list[str] = []

    def play(self, typical: dict[int, float]) -> None:
        """Run it to its end; ``typical`` is how long each step takes."""
        place = 0
        for dag, steps in (("retrain_on_alert", RETRAIN), ("promote", PROMOTE), ("monitor", MONITOR)):
            since = time.time()
            if dag != "promote":
                self._trigger(dag)
            for step in steps:
                runner = self._wait_for(dag, step)
                if (component := self.kills[place]) is not None:
                    self._kill(component, dag, step, runner, typical.get(place, 0.0))
                else:
                    self.took[place] = self._lifetime(runner)
                place += 1
            self._finish(dag, since)

    def _trigger(self, dag: str) -> None:
        conf: dict[str, Any] = {"as_of": self.as_of.isoformat(), "reason": "chaos"}
        if dag == "monitor":
            conf = {"as_of": (self.as_of + WINDOW).isoformat(), "start": self.as_of.isoformat()}
            self._patiently(lambda: self.topology.airflow.set_paused(dag, False))
        self._patiently(lambda: self.topology.airflow.trigger(dag, self.name, conf))

    @staticmethod
    def _patiently(call: Any) -> Any:
        """The same call until a component that was killed is back."""
        deadline = time.monotonic() + LOST_S
        while True:
            try:
                return call()
            except TryAgain:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def _runners(self, dag: str, step: str) -> Iterator[psutil.Process]:
        """The runners of a step in this project."""
        for process in processes():
            with suppress(psutil.Error):
                if process.cmdline()[1:6] == ["-m", "pipelines.run", step, "--dag-id", dag] and self._ours(process):
                    yield process

    def _ours(self, process: psutil.Process) -> bool:
        return process.cwd().startswith(str(self.topology.root))

    def _wait_for(self, dag: str, step: str) -> psutil.Process:
        """The runner of the step, once there is one; a run that fails is noted and let go on."""
        last = asked = time.monotonic()
        while True:
            if runner := next(self._runners(dag, step), None):
                self._close("went on")
                return runner
            if time.monotonic() - asked > ASK_S:
                asked = time.monotonic()
                self._look(dag)
            if time.monotonic() - last > LOST_S:
                raise AssertionError(f"{dag} · {step} did not begin within {LOST_S:.0f} s of what came before")
            time.sleep(LOOK_S)

    def _run(self, dag: str) -> Run | None:
        client = self.topology.airflow
        if dag != "promote":
            return client.find(dag, self.name)
        found = client.runs(("queued", "running", *ENDED), dag, limit=5)
        return max(found, key=lambda run: run.queued.timestamp() if run.queued else 0.0, default=None)

    def _look(self, dag: str) -> Run | None:
        """How the run stands; one that has failed is cleared, as a person would."""
        with suppress(BallastError):
            run = self._run(dag)
            if run and run.state == "failed":
                self._failures.append(self._reason(run))
                self.topology.airflow.clear(run)
            return run
        return None

    def _reason(self, run: Run) -> str:
        client = self.topology.airflow
        for task in client.tasks(run):
            if task.state == "failed":
                said = [event for event in client.log(run, task) if event.get("level") == "error"]
                words = [
                    str(event.get("error_detail", [{}])[0].get("exc_value", "")) or event["event"] for event in said
                ]
                return f"{task.task_id}: {words[-1] if words else UNSAID}"
        return "no task failed"

    def _kill(self, component: str, dag: str, step: str, runner: psutil.Process, typical: float) -> None:
        began, moment = time.monotonic(), self.chance.uniform(0, 0.8) * typical
        victim: psutil.Process | None = runner
        while time.monotonic() - began < moment and runner.is_running():
            time.sleep(0.01)
        while component == "step" and (victim := self._step_of(runner, step)) is None and runner.is_running():
            time.sleep(0.01)
        hit = runner.is_running() and runner.status() != psutil.STATUS_ZOMBIE
        cell = Cell(component, dag, step, time.monotonic() - began, hit)
        if component in SERVICES:
            self.topology.kill(component)
        else:
            with suppress(psutil.NoSuchProcess):
                if victim:
                    os.kill(victim.pid, signal.SIGKILL)
        self.cells.append(cell)
        self._open = cell, time.monotonic()
        print(f"killed {component} in {dag} · {step} after {cell.after_s:.1f} s", flush=True)

    @staticmethod
    def _lifetime(runner: psutil.Process) -> float:
        began = time.monotonic()
        while runner.is_running() and runner.status() != psutil.STATUS_ZOMBIE:
            time.sleep(LOOK_S)
        return time.monotonic() - began

    @staticmethod
    def _step_of(runner: psutil.Process, step: str) -> psutil.Process | None:
        with suppress(psutil.Error):
            for child in runner.children(recursive=True):
                with suppress(psutil.Error):
                    if f"pipelines.{step}" in child.cmdline():
                        return child
        return None

    def _close(self, how: str) -> None:
        if self._open:
            cell, killed = self._open
            cell.ended = f"failed plainly, cleared: {self._failures[-1]}" if self._failures else how
            cell.seconds = time.monotonic() - killed
            self._open, self._failures = None, []

    def _finish(self, dag: str, since: float) -> None:
        deadline = time.monotonic() + LOST_S
        while not ((run := self._look(dag)) and run.state == "success"):
            assert time.monotonic() < deadline, f"{dag} {self.name} is {run.state if run else 'not there'}"
            time.sleep(0.5)
        self._close("went on")
        tries = {task.task_id: task.try_number for task in self._patiently(lambda: self.topology.airflow.tasks(run))}
        for cell in self.cells:
            if cell.dag == dag:
                cell.tries = tries[cell.step]
                if cell.ended == "went on" and cell.tries > 1:
                    cell.ended = "tried again"

    def rows_of_window(self) -> int:
        """How many rows the monitored window has, by the source."""
        visits = pd.concat(pd.read_csv(file) for file in sorted((self.topology.project / "inbox").glob("*.csv")))
        days = pd.to_datetime(visits["at"]).dt.date
        return int(((days >= self.as_of) & (days < self.as_of + WINDOW)).sum())


class Reference:
    """The same project with a state of its own, which nothing breaks: what its models are worth comparing with."""

    def __init__(self, root: Path) -> None:
        self.root = chaos_project(root)
        self.digest = ""
        self._thread: Thread | None = None

    def begin(self, as_of: date) -> None:
        """Make the model as of a date, beside all else."""
        file = self.root / "params.yaml"
        params = yaml.safe_load(file.read_text()) | {"as_of": as_of.isoformat()}
        file.write_text(yaml.safe_dump(params, sort_keys=False))
        self._thread = Thread(target=self._make)
        self._thread.start()

    def _make(self) -> None:
        env = clean_environment(TMPDIR=str(self.root.parent), DVC_SITE_CACHE_DIR=str(self.root / "var" / "site"))
        command = [sys.executable, "-m", "dvc", "repro", "-q", "train"]
        subprocess.run(command, cwd=self.root, env=env, check=True, capture_output=True, timeout=600)
        self.digest = json.loads((self.root / "data" / "train" / "result.json").read_text())["digest"]

    def made(self) -> str:
        """The digest of the model."""
        assert self._thread
        self._thread.join()
        return self.digest


def found(topology: Topology) -> dict[str, Any]:
    """What probe.py finds; each model is fetched anew."""
    told: dict[str, Any] = json.loads(topology.python("-m", "tests.chaos.probe").splitlines()[-1])
    return told


def residue(topology: Topology) -> list[str]:
    """Processes, locks and temporary files that nobody needs any more."""
    time.sleep(1)
    left = []
    for process in processes():
        with suppress(psutil.Error):
            words = process.cmdline()
            if any(word.startswith("pipelines.") for word in words) and process.cwd().startswith(str(topology.root)):
                left.append(f"process {' '.join(words[2:4])}")
    for path in topology.root.glob("project/**/*"):
        ours = path.name.endswith((".part", ".old", ".tmp")) or path.name == "dvc.lock.before"
        of_git = path.suffix == ".lock" and ".git" in path.parts
        of_dvc = path.name == "rwlock" and path.read_text() not in ("", "{}")
        if ours or of_git or of_dvc:
            left.append(str(path.relative_to(topology.project)))
    known = topology.airflow.runs(("queued", "running", *ENDED))
    theirs = {workspace.root_of(run.dag_id, run.run_id).relative_to(places.var()) for run in known}
    spaces = {path.relative_to(topology.var) for path in topology.var.glob("runs/*/*")}
    left += [f"{space} is of no run" for space in spaces - theirs]
    # Python's own for a server of several processes is no step's.
    left += [f"TMPDIR/{path.name}" for path in (topology.root / "tmp").iterdir() if not path.name.startswith("pymp-")]
    return left


def locks(topology: Topology, name: str, stages: Sequence[str]) -> list[str]:
    """What a run's dvc.lock does not hold."""
    wrong = []
    for lock in topology.var.glob(f"runs/*/{name}*/dvc.lock"):
        if lock.parent.parent.name != "promote":
            whole = yaml.safe_load(lock.read_text())
            wanted = stages if lock.parent.parent.name != "monitor" else STAGES[:3]
            wrong += [f"{lock} has no {stage}" for stage in wanted if stage not in whole["stages"]]
    return wrong
