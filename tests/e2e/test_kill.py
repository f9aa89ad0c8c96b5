"""Any stage killed at any moment, and run again, ends as a run that nothing broke: in the same dvc.lock."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import clean_environment, own_project

pytestmark = pytest.mark.e2e
STAGES = ("land", "ingest", "validate", "prepare", "train", "evaluate")


class Site:
    """A project with run-time state of its own, so that nothing is shared but the installed packages."""

    def __init__(self, root: Path) -> None:
        self.root = own_project(root)

    def start(self, stage: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "pipelines.run",
            stage,
            "--dag-id",
            "d",
            "--run-id",
            "r",
            "--as-of",
            "2024-03-20",
        ]
        environment = clean_environment(DVC_SITE_CACHE_DIR=str(self.root / "var" / "dvc-site"))
        return subprocess.Popen(
            command, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def kill(self, runner: subprocess.Popen[str], moments: random.Random) -> None:
        """Kill the runner, as Airflow or a lost worker would, or the stage alone, as a want of memory would."""
        children = Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split()
        victim = int(moments.choice([str(runner.pid), *children]))
        os.kill(victim, moments.choice([signal.SIGKILL, signal.SIGTERM]))

    def finish(self, stage: str) -> float:
        began = time.monotonic()
        output, _ = (process := self.start(stage)).communicate(timeout=300)
        assert process.returncode == 0, output
        return time.monotonic() - began

    @property
    def lock(self) -> str:
        return (self.root / "var" / "runs" / "d" / "r" / "dvc.lock").read_text()

    def leftovers(self) -> list[str]:
        """Processes that still work in this project."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.root) in str((process / "cwd").readlink()):
                    found.append((process / "cmdline").read_text())
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, dict[str, float]]:
    """A run that nothing broke, and how long each stage took."""
    site = Site(tmp_path_factory.mktemp("unbroken") / "project")
    return site, {stage: site.finish(stage) for stage in STAGES}


@pytest.mark.parametrize("seed", range(2))
def test_every_stage_killed_and_run_again_ends_in_the_same_lock(
    tmp_path: Path, unbroken: tuple[Site, dict[str, float]], seed: int
) -> None:
    whole, seconds = unbroken
    moments, killed = random.Random(seed), 0
    site = Site(tmp_path / "project")
    for stage in STAGES:
        process = site.start(stage)
        try:
            process.wait(moments.uniform(0.05, 0.9) * seconds[stage])
        except subprocess.TimeoutExpired:
            site.kill(process, moments)
            killed += 1
        process.communicate(timeout=60)
        site.finish(stage)
    assert killed, "every stage ended before its time came: nothing was proven"
    assert site.lock == whole.lock
    assert not site.leftovers()
