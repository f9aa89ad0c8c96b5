"""Another table, another question: `dvc repro` by changing params.yaml, one SQL file and one expectations file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import clean_environment

pytestmark = pytest.mark.e2e


def dvc(project: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(
        command, cwd=project, env=clean_environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_repro_on_another_table_ends_with_a_measured_model(project: Path) -> None:
    dvc(project, "repro")

    verdict = json.loads((project / "data" / "validate" / "verdict.json").read_text())
    assert verdict["passed"]
    assert verdict["quarantined"] == {"visits": 2}
    metrics = json.loads((project / "data" / "evaluate" / "metrics.json").read_text())
    assert metrics["roc_auc"] > 0.7
    assert metrics["rows"] > 400

    again = dvc(project, "repro")
    assert "Running stage 'land'" in again
    assert all(f"Stage '{stage}' didn't change" in again for stage in ("ingest", "validate", "prepare", "train"))

    assert "roc_auc" in dvc(project, "metrics", "show")
    assert (project / "var" / "mlflow" / "mlflow.db").exists()
    dvc(project, "push")
    shutil.rmtree(project / ".dvc" / "cache")
    shutil.rmtree(project / "data" / "evaluate")
    dvc(project, "pull")
    assert json.loads((project / "data" / "evaluate" / "metrics.json").read_text()) == metrics


def test_steps_on_another_table_end_with_a_champion_and_a_verdict_on_its_next_days(project: Path) -> None:
    def step(name: str, as_of: str, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "pipelines.run", name, "--dag-id", "d", "--run-id", as_of, "--as-of", as_of]
        done = subprocess.run(
            [*command, *arguments],
            cwd=project,
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout.splitlines()[-1].removeprefix("ballast-result "))

    for name in ("land", "ingest", "validate", "prepare", "train", "evaluate", "register"):
        step(name, "2024-03-10")
    decided = step("decide", "2024-03-10")
    assert decided["verdict"] == "promote", decided["summary"]
    step("promote", "2024-03-10", "--version", "1", "--record-sha256", decided["record_sha256"])
    again = step("register", "2024-03-10")
    assert (again["version"], again["created"]) == (1, False), "equal model and data: one version"

    for name in ("land", "ingest", "validate"):
        step(name, "2024-03-20")
    assert step("score", "2024-03-20", "--start", "2024-03-10")["version"] == 1
    step("drift", "2024-03-20")
    assert step("policy", "2024-03-20")["verdict"] in ("wait", "hold")
    assert (project / "var" / "reports" / "index.html").exists()
