"""The Compose stack as tests start it: a project of its own, with secrets, ports and volumes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipelines.dagruns import Airflow, Run
from tests.waiting import until

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from make_secrets import make  # noqa: E402

NAMES = ("AIRFLOW_PORT", "MLFLOW_PORT", "GRAFANA_PORT")


def call(*command: str, cwd: Path = ROOT, **env: str) -> str:
    """What a command prints; raise with all it said if it fails."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout.strip()


class Stack:
    """The stack under test; ``more`` are files beside docker-compose.yml, ``ports`` the first of those it publishes."""

    def __init__(self, name: str, folder: Path, ports: int, *more: str, profiles: tuple[str, ...] = (), **env: str):
        self.ports = {port: str(ports + 1000 * at) for at, port in enumerate(NAMES)}
        own = {"BALLAST_TAG": os.environ.get("BALLAST_TAG", "test"), "COMPOSE_WAIT_S": "900"}
        self.env = self.ports | own | env
        self.env_file = folder / "secrets" / "stack.env"
        make(self.env_file)
        self.secrets = dict(line.split("=", 1) for line in self.env_file.read_text().splitlines())
        self.files = ["docker-compose.yml", *more, "tests/compose/override.yml"]
        self._ends = [f"--project-name={name}", f"--env-file={self.env_file}"]
        self._profiles = [f"--profile={profile}" for profile in profiles]

    @property
    def command(self) -> list[str]:
        """Compose, as it is called from a checkout."""
        return ["docker", "compose", *self._ends, *(f"--file={file}" for file in self.files), *self._profiles]

    def url(self, port: str) -> str:
        return f"http://127.0.0.1:{self.ports[port]}"

    def run(self, *arguments: str) -> str:
        """What Compose prints; raise with all it said if it fails."""
        return self.call(*self.command, *arguments)

    def call(self, *command: str, cwd: Path = ROOT) -> str:
        return call(*command, cwd=cwd, **self.env)

    def services(self) -> dict[str, Any]:
        """Each, as Compose reads the files."""
        services: dict[str, Any] = json.loads(self.run("config", "--format", "json"))["services"]
        return services

    def image(self, service: str) -> str:
        return str(self.services()[service]["image"])

    def build(self, *services: str) -> None:
        """Build both images from the commit that is checked out, unless BALLAST_TAG names others."""
        if self.env["BALLAST_TAG"] == "test":
            self.call("git", "bundle", "create", "--quiet", "deploy/project.bundle", "HEAD")
            self.run("build", "--quiet", *(services or ("airflow-init", "project")))

    def start(self, *arguments: str) -> None:
        self.run("up", "--detach", "--no-build", *arguments)
        self.call("sh", "scripts/compose_wait.sh", *self.command)

    def remove(self) -> None:
        self.run("--profile", "*", "down", "--volumes", "--timeout", "10")

    def airflow(self, user: str = "admin", password: str | None = None) -> Airflow:
        return Airflow(self.url("AIRFLOW_PORT"), user, password or self.secrets["AIRFLOW_ADMIN_PASSWORD"], 60)

    def ballast(self, *arguments: str) -> str:
        return self.run("exec", "-T", "worker", "ballast", *arguments)

    def status(self) -> str:
        return self.ballast("status")

    def followed(self, run: Run, dag_id: str) -> Run:
        """The run of ``dag_id`` that an event of ``run`` starts, once it has ended well."""
        airflow = self.airflow()
        (begun,) = until(dag_id, lambda: [one for one in airflow.started_by(run) or () if one.dag_id == dag_id])
        self.ended(begun.dag_id, begun.run_id)
        return begun

    def ended(self, dag_id: str, run_id: str, within_s: float = 1800) -> None:
        """Wait until a run has ended well."""
        airflow = self.airflow()
        until(run_id, lambda: (run := airflow.find(dag_id, run_id)) and run.over, within_s)
        run = airflow.run(dag_id, run_id)
        tasks = airflow.tasks(run)
        print(f"\n{dag_id}: " + ", ".join(f"{task.task_id} {task.seconds:.0f} s" for task in tasks if task.seconds))
        assert run.state == "success", [(task.task_id, task.state) for task in tasks]
