"""A version made again from its records, in a project with real DVC, git and MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from .conftest import clean_environment, own_project

pytestmark = pytest.mark.e2e


class Site:
    """A project with one registered version, committed with the uv.lock that this environment was installed from."""

    def __init__(self, root: Path) -> None:
        self.root = own_project(root)
        installed = Path(sys.prefix) / "uv.lock"
        if installed.exists() and installed.read_bytes() != (root / "uv.lock").read_bytes():
            shutil.copy(installed, root / "uv.lock")
            identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
            subprocess.run(["git", *identity, "commit", "-qam", "The lock of this environment"], cwd=root, check=True)
        self.python("-m", "dvc", "repro")
        self.python("-m", "pipelines.register")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.root,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def python(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, out + err
        return out, err

    def reproduce(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        return self.python("-m", "pipelines.cli", "reproduce", "1", *arguments, code=code)

    def state(self) -> dict[str, Any]:
        """All that a reproduction may not touch."""
        status = subprocess.run(["git", "status", "--porcelain"], cwd=self.root, capture_output=True, check=True)
        with closing(sqlite3.connect(self.root / "var" / "mlflow" / "mlflow.db")) as connection:
            runs = connection.execute("SELECT run_uuid, status, end_time FROM runs").fetchall()
            versions = connection.execute("SELECT version, last_updated_time FROM model_versions").fetchall()
        return {
            "git": status.stdout,
            "lock": (self.root / "dvc.lock").read_bytes(),
            "run cache": sorted(str(path) for path in (self.root / ".dvc" / "cache" / "runs").rglob("*")),
            "data": {path: path.stat().st_mtime_ns for path in (self.root / "data").rglob("*")},
            "checkpoints": list((self.root / "var" / "checkpoints").iterdir()),
            "mlflow": (runs, versions),
        }


def test_reproduce_gives_every_bit_again_and_touches_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path / "project")
    scratch = site.root / "var" / "reproduce"
    before = site.state()

    found = json.loads(site.reproduce("--json")[0])
    assert found["outcome"] == "identical"
    assert found["digest"]["registered"] == found["digest"]["reproduced"]
    assert found["predictions"] == {"rows": 615, "differing": 0, "max_difference": 0.0}
    assert [stage["other_bytes"] for stage in found["stages"].values()] == [[], [], []]
    assert found["environment"]["recorded"] == found["environment"]["here"]
    assert (site.state(), list(scratch.iterdir())) == (before, [])

    killed = site.start("-m", "pipelines.cli", "reproduce", "1")
    deadline = time.monotonic() + 60
    while not (scratch / "workspace" / "var" / "checkpoints").exists():
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert (site.state(), len(list(scratch.iterdir()))) == (before, 1)

    site.python("-m", "dvc", "push")
    for kept in (site.root / ".dvc" / "cache" / "files").glob("md5/*/*"):  # damaged, and write-protected as it was
        kept.chmod(0o644)
        os.truncate(kept, kept.stat().st_size // 2)
        kept.chmod(0o444)
    out, _ = site.reproduce()
    assert "IDENTICAL" in out
    assert list(scratch.iterdir()) == []

    shutil.rmtree(site.root / ".dvc" / "cache" / "files")
    shutil.rmtree(site.root / "var" / "dvc-remote")
    _, err = site.reproduce(code=1)
    assert "The data of v1 is in neither the DVC cache nor the remote, or is damaged in both: data/ingest" in err


def test_reproduce_of_a_champion_works_after_gc_where_only_its_record_names_the_data(tmp_path: Path) -> None:
    site = Site(tmp_path / "project")
    site.python("-m", "pipelines.cli", "promote", "1", "--force", "--reason", "the first", "--yes")
    (site.root / "dvc.lock").unlink()
    cache = site.root / ".dvc" / "cache" / "files" / "md5"
    (stray := cache / "aa" / ("b" * 30)).parent.mkdir(exist_ok=True)
    stray.write_text("of no stage")
    long_ago = time.time() - 60 * 86_400
    for path in cache.glob("*/*"):
        os.utime(path, (long_ago, long_ago))

    found = json.loads(site.python("-m", "pipelines.cli", "gc", "--yes", "--json")[0])
    assert [waste["name"] for waste in found["waste"]] == ["1 objects of the DVC cache"]
    assert not stray.exists()
    assert json.loads(site.reproduce("--json")[0])["outcome"] == "identical"
