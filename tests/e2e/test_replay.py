"""A replay of a small table by the real steps: what it promises of its state, its trainings and its being killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from .conftest import clean_environment, own_project

pytestmark = pytest.mark.e2e
CALL = [sys.executable, "-m", "pipelines.cli", "replay", "--from", "2024-03", "--to", "2024-04", "--json"]
KILLS = 3


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five months of visits, and a candidate that is quick to train."""
    return own_project(tmp_path_factory.mktemp("replay") / "project", days=140, candidates=["logistic"])


@pytest.fixture(scope="module")
def unbroken(small: Path) -> dict[str, Any]:
    """What a replay finds that nothing disturbs."""
    return replay(small, "never", "schedule")


def begin(project: Path, *policies: str) -> subprocess.Popen[str]:
    command = [*CALL, *(f"--policy={policy}" for policy in policies)]
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=project, env=clean_environment(), **output)


def replay(project: Path, *policies: str) -> dict[str, Any]:
    process = begin(project, *policies)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def steps_under_way(project: Path) -> list[str]:
    """Processes that carry a world of the replay in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"BALLAST_VAR={project}/var/replay/".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_replay_by_the_real_steps_counts_trainings_and_leaves_the_state_alone(
    small: Path, unbroken: dict[str, Any]
) -> None:
    never, schedule = (unbroken["summary"][policy] for policy in ("never", "schedule"))
    assert (never["trainings"], schedule["trainings"]) == (0, 1)
    assert schedule["promoted"] + schedule["refused"] == 1
    assert schedule["cached_trainings"] >= 1, "the first champion's training is the same for both"
    first = [unbroken["policies"][policy]["first"]["digest"] for policy in ("never", "schedule")]
    assert first[0] == first[1]
    for one in unbroken["policies"].values():
        assert all(0.3 < month["log_loss"] < 0.7 for month in one["months"])
        assert all(month["labelled_rows"] == month["rows"] for month in one["months"]), "every label has arrived"
    kept = {path.name for path in (small / "var").iterdir()}
    assert kept <= {"replay", "landing", "dvc-site"}
    status = subprocess.run(["git", "status", "--porcelain"], cwd=small, check=True, capture_output=True, text=True)
    assert status.stdout == ""


def test_replay_killed_at_any_moment_goes_on_to_the_same_numbers(small: Path, unbroken: dict[str, Any]) -> None:
    rmtree(small / "var" / "replay")
    moments = random.Random(5)
    for _ in range(KILLS):
        process = begin(small, "schedule")
        time.sleep(moments.uniform(5, 25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for _ in range(100):
            if not (left := steps_under_way(small)):
                break
            time.sleep(0.1)
        assert left == [], "no step outlives the replay"
    again = replay(small, "schedule")
    assert again["policies"]["schedule"] == unbroken["policies"]["schedule"]
