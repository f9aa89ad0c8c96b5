"""Airflow reads its settings when first imported: they are set here, before any test does."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
HOME = Path(tempfile.mkdtemp(prefix="ballast-airflow-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.update(
    AIRFLOW_HOME=str(HOME),
    AIRFLOW__CORE__DAGS_FOLDER=str(PROJECT / "dags"),
    AIRFLOW__CORE__PLUGINS_FOLDER=str(PROJECT / "plugins"),
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
    AIRFLOW__LOGGING__LOGGING_LEVEL="WARNING",
    DVC_NO_ANALYTICS="1",
    GX_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
)
sys.path.append(str(PROJECT / "plugins"))


@pytest.fixture(scope="session")
def airflow_database() -> None:
    """A migrated metadata database, for tests that run DAGs."""
    command = [sys.executable, "-m", "airflow", "db", "migrate"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
