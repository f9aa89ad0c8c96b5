"""Another table, another question: `dvc repro` by changing params.yaml, one SQL file and one expectations file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

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
