"""The real chains on two machines that share no disk, each step on the other one, beside one machine alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from .conftest import clean_environment, own_project

pytestmark = pytest.mark.e2e

RETRAIN = ("land", "ingest", "validate", "admit", "prepare", "train", "evaluate", "register", "decide")
MONITOR = ("settle", "land", "ingest", "validate", "score", "drift", "policy")
WINDOWS = (("2024-02-20", "2024-03-05"), ("2024-03-05", "2024-03-20"))
VOLATILE = {"seconds", "cached", "run_id", "experiment_id", "record_sha256", "commit"}


@dataclass(frozen=True, eq=False)
class Machine:
    """A clone of the code, with var/ and a DVC cache of its own."""

    root: Path
    environment: dict[str, str]

    def python(self, *arguments: str) -> str:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, dag: str, run: str, step: str, *arguments: str) -> dict[str, Any]:
        said = self.python("pipelines.run", step, "--dag-id", dag, "--run-id", run, *arguments)
        result: dict[str, Any] = json.loads(said.splitlines()[-1].removeprefix("ballast-result "))
        return result


@dataclass(frozen=True)
class Site:
    """The remotes, a state store and a registry that all machines reach."""

    home: Path
    project: Path

    def machine(self, name: str, travels: bool = True) -> Machine:
        remote, root, servers = self.home / "remote.git", self.home / name, self.home / "servers"
        if not remote.exists():
            subprocess.run(["git", "clone", "-q", "--bare", str(self.project), str(remote)], check=True)
            (self.home / "dvc").mkdir()
        subprocess.run(["git", "clone", "-q", str(remote), str(root)], check=True)
        servers = self.home / ("servers" if travels else f"servers-{name}")
        servers.mkdir(exist_ok=True)
        environment = clean_environment(
            BALLAST_VAR=str(root / "var"),
            BALLAST_SOURCE=str(self.project),
            BALLAST_STATE_URI=f"sqlite:///{servers}/state.db",
            MLFLOW_TRACKING_URI=f"sqlite:///{servers}/mlflow.db",
        )
        if travels:
            environment |= {"BALLAST_GIT_REMOTE": str(remote), "BALLAST_DVC_REMOTE": str(self.home / "dvc")}
        return Machine(root, environment)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    project = own_project(tmp_path / "project", candidates=["hgb"])
    installed = Path(sys.prefix) / "uv.lock"
    if installed.exists() and installed.read_bytes() != (project / "uv.lock").read_bytes():
        shutil.copy(installed, project / "uv.lock")
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, "commit", "-qam", "The lock of this environment"], cwd=project, check=True)
    return Site(tmp_path, project)


def chains(machines: Iterator[Machine]) -> dict[str, Any]:
    """A first champion, two windows of the monitor; what each step said, less what differs between equal runs."""
    found: dict[str, Any] = {}

    def step(dag: str, run: str, name: str, *arguments: str) -> dict[str, Any]:
        result = next(machines).run(dag, run, name, *arguments)
        found[f"{run} {name}"] = {key: value for key, value in result.items() if key not in VOLATILE}
        return result

    for name in RETRAIN:
        last = step("retrain", "r1", name, "--as-of", "2024-02-20")
    record = ("--version", "1", "--record-sha256", last["record_sha256"])
    for name in ("review", "promote"):
        step("promote", "p1", name, *record)
    for number, (start, end) in enumerate(WINDOWS):
        for name in MONITOR:
            step("monitor", f"m{number}", name, "--as-of", end, *(["--start", start] if name == "score" else []))
    return found


def kept(machine: Machine, *patterns: str) -> dict[str, bytes]:
    var = machine.root / "var"
    return {path.relative_to(var).as_posix(): path.read_bytes() for pattern in patterns for path in var.glob(pattern)}


def test_chains_with_each_step_on_the_other_machine_end_as_on_one_and_a_third_reproduces(site: Site) -> None:
    one, other, alone = site.machine("a"), site.machine("b"), site.machine("alone", travels=False)
    travelled, expected = chains(cycle([one, other])), chains(cycle([alone]))
    assert travelled == expected
    locks = "runs/*/*/dvc.lock"
    assert kept(other, locks).items() <= kept(alone, locks).items()
    # The last steps: policy was done by one, drift by the other, score by one.
    for machine, patterns in {
        one: ("predictions/*/*.parquet", "runs/monitor/m1/data/score/*.parquet"),
        other: ("runs/monitor/m1/data/drift/verdict.json",),
    }.items():
        assert (found := kept(machine, *patterns))
        assert found == kept(alone, *patterns)
    record = "runs/retrain/r1/data/decide/record.json"
    records = [json.loads(kept(machine, record)[record]) for machine in (one, alone)]
    for found in records:
        for volatile in ("decided_at", "commit", "champion"):
            found.pop(volatile)
    assert records[0] == records[1]

    third = site.machine("third")
    reproduced = json.loads(third.python("pipelines.cli", "reproduce", "1", "--json"))
    assert reproduced["outcome"] == "identical"
