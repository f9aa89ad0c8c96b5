"""The same project without services, step by step as Airflow would run it: MLflow and the state store are SQLite."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipelines.run import RESULT
from tests.e2e.conftest import clean_environment

from .rounds import FIRST, MONITOR, RETRAIN, WINDOW
from .topology import chaos_project


@dataclass
class Site:
    """A project, and what the steps of its runs have said so far."""

    root: Path
    var: Path
    results: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path, var: Path | None = None) -> Site:
        """A new project under ``root``; its run-time state lies in it unless ``var`` is elsewhere."""
        project = chaos_project(root)
        return cls(project, var or project / "var")

    def environment(self) -> dict[str, str]:
        """Where things are, for any process of the project."""
        return clean_environment(
            BALLAST_VAR=str(self.var), DVC_SITE_CACHE_DIR=str(self.root / "site"), BALLAST_TRIGGER='{"kind": "person"}'
        )

    def attempt(
        self, dag: str, run: str, step: str, as_of: str | None, under: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run one step as its task would, ``under`` another command."""
        runner = [sys.executable, "-m", "pipelines.run", step, "--dag-id", dag, "--run-id", run]
        command = [*under, *runner, *(["--as-of", as_of] if as_of else []), *self._arguments(run, step)]
        done = subprocess.run(
            command, cwd=self.root, env=self.environment(), capture_output=True, text=True, check=False, timeout=600
        )
        if done.returncode == 0:
            self.results[run, step] = json.loads(done.stdout.splitlines()[-1].removeprefix(RESULT))
        return done

    def step(self, dag: str, run: str, step: str, as_of: str | None, under: Sequence[str] = ()) -> dict[str, Any]:
        """The result of a step that must end well."""
        done = self.attempt(dag, run, step, as_of, under)
        assert done.returncode == 0, f"{step}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return self.results[run, step]

    def _arguments(self, run: str, step: str) -> list[str]:
        if step == "score":
            return [f"--start={FIRST}"]
        if step in ("review", "promote"):
            decided = self.results[run, "decide"]
            return [f"--version={decided['version']}", f"--record-sha256={decided['record_sha256']}"]
        return []

    def workspace(self, dag: str, run: str) -> Path:
        """Where a run works."""
        return self.var / "runs" / dag / run

    def python(self, code: str) -> Any:
        """What a process in the project says as JSON."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])


LOOP = [
    *(("retrain", step, FIRST) for step in (*RETRAIN, "review", "promote")),
    *(("monitor", step, FIRST + WINDOW) for step in MONITOR),
]
LATER = FIRST + timedelta(days=5)
