"""The Compose stack for real: built, started, asked without credentials and with too few, and one turn through Celery.

Needs a Docker engine and the public images (or stand-ins of their names). Everything is a project of its own, with
secrets, ports and volumes of its own. ``TORCH_INDEX`` is handed on to the build.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from pipelines.dagruns import Airflow, Refused

pytestmark = [
    pytest.mark.compose,
    # An answer that refuses holds its socket until it is collected, which may be in another test.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).parent.parent.parent
AIRFLOW_PORT, MLFLOW_PORT = 28080, 25000
sys.path.insert(0, str(ROOT / "scripts"))
from make_secrets import make  # noqa: E402


class Stack:
    """The stack under test."""

    def __init__(self, folder: Path) -> None:
        self.env_file = folder / "secrets" / "stack.env"
        make(self.env_file)
        lines = self.env_file.read_text().splitlines()
        self.secrets = dict(line.split("=", 1) for line in lines)
        files = ["-f", "docker-compose.yml", "-f", "tests/compose/override.yml"]
        self.command = ["docker", "compose", "-p", "ballast-test", "--env-file", str(self.env_file), *files]

    def run(self, *arguments: str) -> str:
        """What Compose prints; raise with all it said if it fails."""
        return self.call(*self.command, *arguments)

    def call(self, *command: str) -> str:
        ports = {"AIRFLOW_PORT": str(AIRFLOW_PORT), "MLFLOW_PORT": str(MLFLOW_PORT), "BALLAST_TAG": "test"}
        env = os.environ | ports
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def airflow(self, user: str = "admin", password: str | None = None) -> Airflow:
        return Airflow(f"http://127.0.0.1:{AIRFLOW_PORT}", user, password or self.secrets["AIRFLOW_ADMIN_PASSWORD"], 60)

    def status(self) -> str:
        return self.run("exec", "-T", "worker", "ballast", "status")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine answers here")
    stack = Stack(tmp_path_factory.mktemp("compose"))
    stack.run("--profile", "*", "config", "--quiet")
    began = time.monotonic()
    stack.call("git", "bundle", "create", "--quiet", "deploy/project.bundle", "HEAD")
    stack.run("build", "airflow-init", "project")
    built = time.monotonic()
    print(f"\nbuilt in {built - began:.0f} s")
    try:
        stack.run("up", "--detach", "--no-build")
        stack.call("sh", "scripts/compose_wait.sh", *stack.command)
        print(f"all healthy {time.monotonic() - built:.0f} s after `up`")
        print(stack.call("docker", "stats", "--no-stream", "--format", "{{.Name}}\t{{.MemUsage}}\t{{.CPUPerc}}"))
        yield stack
    finally:
        stack.run("--profile", "*", "down", "--volumes", "--timeout", "10")


def test_user_interfaces_without_credentials_refuse(stack: Stack) -> None:
    for url in (
        f"http://127.0.0.1:{AIRFLOW_PORT}/api/v2/dags",
        f"http://127.0.0.1:{MLFLOW_PORT}/api/2.0/mlflow/experiments/search?max_results=1",
        f"http://127.0.0.1:{MLFLOW_PORT}/api/2.0/mlflow-artifacts/artifacts?path=1",
    ):
        with pytest.raises(HTTPError) as refused:
            urlopen(url, timeout=20)
        refused.value.close()
        assert refused.value.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN), url


def test_roles_viewer_cannot_trigger_and_operator_cannot_approve(stack: Stack) -> None:
    for name, role in (("viewer", "Viewer"), ("operator", "Operator"), ("approver", "Approver")):
        account = ["--username", name, "--password", f"{name}-password", "--role", role]
        person = ["--firstname", name, "--lastname", name, "--email", f"{name}@ballast.invalid"]
        stack.run("exec", "-T", "api-server", "airflow", "users", "create", *account, *person)
    conf = {"as_of": "2013-04-01", "reason": "a test of roles"}
    for name in ("viewer", "approver"):
        person_s = stack.airflow(name, f"{name}-password")
        assert person_s.dags()
        with pytest.raises(Refused) as refused:
            person_s.queue("retrain_scheduled", "by-a-viewer", conf)
        assert refused.value.status == HTTPStatus.FORBIDDEN
    with pytest.raises(Refused) as refused:
        stack.airflow("operator", "operator-password").answer("promote", "none", "approve", "Approve")
    assert refused.value.status == HTTPStatus.FORBIDDEN
    with pytest.raises(Refused) as refused:  # it may, and there is none of this name
        stack.airflow("approver", "approver-password").answer("promote", "none", "approve", "Approve")
    assert refused.value.status == HTTPStatus.NOT_FOUND


def test_containers_run_without_root_or_the_engine(stack: Stack) -> None:
    for service in ("api-server", "scheduler", "dag-processor", "triggerer", "worker", "mlflow"):
        said = stack.run(
            "exec", "-T", service, "sh", "-c", "id -u; ls /var/run/docker.sock 2>/dev/null; touch /opt/x || true"
        )
        assert said.split() == ["10001"], service
    held = stack.run("exec", "-T", "worker", "env")
    assert stack.secrets["AIRFLOW_DB_PASSWORD"] not in held and stack.secrets["AIRFLOW_JWT_SECRET"] not in held


def test_turn_through_celery_makes_the_first_champion(stack: Stack) -> None:
    airflow = stack.airflow("operator", "operator-password")
    airflow.set_paused("retrain_scheduled", False)
    began = time.monotonic()
    run = airflow.trigger("retrain_scheduled", "turn", {"as_of": "2013-04-01"})
    while not run.over and time.monotonic() - began < 600:
        time.sleep(2)
        run = airflow.run(run.dag_id, run.run_id)
    print("\n" + ", ".join(f"{task.task_id} {task.seconds:.0f} s" for task in airflow.tasks(run) if task.seconds))
    assert run.state == "success", [(task.task_id, task.state) for task in airflow.tasks(run)]
    while "champion   v1" not in (said := stack.status()) and time.monotonic() - began < 700:
        time.sleep(2)
    assert "champion   v1" in said, said
    print(f"first champion {time.monotonic() - began:.0f} s after the run was asked for")


def test_backup_and_restore_bring_everything_back(stack: Stack, tmp_path: Path) -> None:
    before = stack.status()
    folder = tmp_path / "backup"
    stack.call("sh", "scripts/compose_backup.sh", str(folder), *stack.command)
    stack.run("--profile", "*", "down", "--volumes", "--timeout", "10")
    stack.call("sh", "scripts/compose_restore.sh", str(folder), *stack.command)
    stack.run("up", "--detach", "--no-build")
    stack.call("sh", "scripts/compose_wait.sh", *stack.command)
    assert stack.status() == before
    assert stack.airflow().run("retrain_scheduled", "turn").state == "success"
    read = "import mlflow; mlflow.artifacts.download_artifacts('models:/flight_delays@champion', dst_path='/tmp/model')"
    stack.run("exec", "-T", "worker", "python", "-c", read)
    assert "model.skops" in stack.run("exec", "-T", "worker", "find", "/tmp/model") or "network.pt2" in stack.run(
        "exec", "-T", "worker", "find", "/tmp/model"
    )
