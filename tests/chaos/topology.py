"""The processes of the Compose stack on this machine, without containers: what is killed is started again.

PostgreSQL (Airflow's, MLflow's and the state store's databases), Redis, an S3 API, MLflow, Airflow's api-server,
scheduler and dag-processor, and a Celery worker that knows neither Airflow's database nor its keys. Each is a tree of
processes that carries a mark; all listen on loopback, on free ports, and keep what they write under one folder.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

import boto3
import psutil
import psycopg
import yaml
from moto.server import ThreadedMotoServer

from benchmarks.bridge import free_port
from pipelines.dagruns import Airflow
from pipelines.files import write_json
from pipelines.stack import POOLS
from tests.e2e.conftest import clean_environment, own_project
from tests.pipelines.postgresql import BIN
from tests.waiting import until

MARK = "BALLAST_CHAOS"
RESTART_S = 1.0  # until what has died is started again, as `restart: unless-stopped` does
READY_S = 600.0
DAYS, FLIPPED = 180, 40  # from that day on labels go the other way: each later challenger knows them better
PASSWORD = "chaos"
T = TypeVar("T")

# Those of docker-compose.yml, but shorter, so that what is dead is found in seconds; and what is stock there.
SHORTER: dict[str, tuple[object, str]] = {
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": (15, "60"),
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": (2, "10, stock"),
    "SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": (10, "30"),
    "SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": (10, "30, stock"),
    "SCHEDULER__TASK_QUEUED_TIMEOUT": (30, "600, stock"),
    "SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": (5, "120, stock"),
}


@dataclass
class Service:
    """One of the processes, by the name that it has in docker-compose.yml."""

    name: str
    command: Sequence[str]
    env: dict[str, str]
    log: Path
    user: str | None = None
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self) -> None:
        """Start it in a session of its own; its log goes on."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.env["BALLAST_ROOT"] if self.user is None else "/",
                env={**self.env, MARK: self.mark},
                user=self.user,
                start_new_session=True,
            )
        self.starts += 1

    @property
    def mark(self) -> str:
        """What its processes carry in their environment."""
        return f"{self.env['BALLAST_ROOT']}#{self.name}"

    @property
    def alive(self) -> bool:
        """Whether its first process lives."""
        return self.process is not None and self.process.poll() is None

    def members(self) -> list[psutil.Process]:
        """All its processes: those below the first, and those that carry the mark."""
        found = {process.pid: process for process in processes() if _environ(process).get(MARK) == self.mark}
        with suppress(psutil.NoSuchProcess):
            if self.process:
                leader = psutil.Process(self.process.pid)
                found |= {process.pid: process for process in [leader, *leader.children(recursive=True)]}
        return list(found.values())

    def kill(self) -> None:
        """SIGKILL to all of it at once, as when a container's first process is killed."""
        members = self.members()
        for process in members:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)  # so that none can tell another, or say goodbye
        for process in members:
            with suppress(psutil.NoSuchProcess):
                process.kill()


class Topology:
    """The stack, started on first use; ``close`` ends all of it and removes what it wrote."""

    def __init__(self, retry_delay_s: int = 10) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ballast-chaos-"))
        self.root.chmod(0o755)  # PostgreSQL runs as a user of its own
        for name in ("tmp", "logs", "redis", "airflow"):
            (self.root / name).mkdir()
        self.project = chaos_project(self.root / "project", retry_delay_s)
        self.ports = {name: free_port() for name in ("postgres", "redis", "s3", "mlflow", "airflow")}
        self.s3 = ThreadedMotoServer("127.0.0.1", self.ports["s3"], verbose=False)
        self.services: dict[str, Service] = {}
        self._closing = Event()
        self._supervisor = Thread(target=self._supervise, daemon=True)

    # --- settings

    @property
    def shared(self) -> dict[str, str]:
        """What every process of ours is started with."""
        return clean_environment(
            BALLAST_ROOT=str(self.project),
            BALLAST_VAR=str(self.var),
            BALLAST_STATE_URI=f"postgresql+psycopg://ballast@127.0.0.1:{self.ports['postgres']}/ballast",
            DVC_SITE_CACHE_DIR=str(self.var / "dvc-site"),
            MLFLOW_TRACKING_URI=f"http://127.0.0.1:{self.ports['mlflow']}",
            MLFLOW_DISABLE_TELEMETRY="true",
            MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
            MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD="false",
            MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD="false",
            PYTHONUNBUFFERED="1",
            SPT_NOENV="1",  # setproctitle leaves the mark readable
            NO_PROXY="127.0.0.1,localhost",
            no_proxy="127.0.0.1,localhost",
            DVC_NO_ANALYTICS="1",
            GX_ANALYTICS_ENABLED="false",
            DO_NOT_TRACK="1",
            BALLAST_AIRFLOW_URL=f"http://127.0.0.1:{self.ports['airflow']}",
            BALLAST_AIRFLOW_USER="admin",
            BALLAST_AIRFLOW_PASSWORD_FILE=str(self.root / "airflow" / "password"),
        )

    @property
    def var(self) -> Path:
        """Run-time state of the workers."""
        return self.project / "var"

    def _worker_env(self) -> dict[str, str]:
        broker = f"redis://127.0.0.1:{self.ports['redis']}"
        port = self.ports["airflow"]
        settings: dict[str, object] = {
            "CORE__EXECUTOR": "CeleryExecutor",
            "CORE__DAGS_FOLDER": self.project / "dags",
            "CORE__PLUGINS_FOLDER": self.project / "plugins",
            "CORE__LOAD_EXAMPLES": False,
            "CORE__PARALLELISM": 16,
            "CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
            "CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
            "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": self.root / "airflow" / "passwords.json",
            "CELERY__BROKER_URL": f"{broker}/0",
            "CELERY__RESULT_BACKEND": f"{broker}/1",
            "API__BASE_URL": f"http://127.0.0.1:{port}",
            "API__HOST": "127.0.0.1",
            "API__PORT": port,
            "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": 0.1,
            "WORKERS__MIN_HEARTBEAT_INTERVAL": 1,
            "DAG_PROCESSOR__REFRESH_INTERVAL": 30,
            "LOGGING__BASE_LOG_FOLDER": self.root / "airflow" / "logs",
            "LOGGING__COLORED_CONSOLE_LOG": False,
            **{name: value for name, (value, _) in SHORTER.items()},
        }
        words = {f"AIRFLOW__{name}": str(value) for name, value in settings.items()}
        own = {"AIRFLOW_HOME": str(self.root / "airflow"), "TMPDIR": str(self.root / "tmp")}
        return {**self.shared, **own, **words}

    def _airflow_env(self) -> dict[str, str]:
        """Of Airflow's own services: what the worker has, the database and the keys."""
        database = f"postgresql+psycopg2://airflow@127.0.0.1:{self.ports['postgres']}/airflow"
        return {
            **self._worker_env(),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": database,
            "AIRFLOW__CORE__FERNET_KEY": urlsafe_b64encode(b"k" * 32).decode(),
            "AIRFLOW__API__SECRET_KEY": "s" * 32,
            "AIRFLOW__API_AUTH__JWT_SECRET": "j" * 64,
        }

    def _s3_env(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL_S3": self.s3_url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "chaos",
            "AWS_SECRET_ACCESS_KEY": PASSWORD,
        }

    @property
    def s3_url(self) -> str:
        """The S3 API."""
        return f"http://127.0.0.1:{self.ports['s3']}"

    # --- start and stop

    def up(self) -> None:
        """Start everything and wait until it is ready."""
        (self.root / "airflow" / "password").write_text(PASSWORD)
        write_json(self.root / "airflow" / "passwords.json", {"admin": PASSWORD})
        (self.root / "airflow" / "airflow.cfg").write_text("# The environment has the settings.\n")
        self.s3.start()
        keys = {"aws_access_key_id": "chaos", "aws_secret_access_key": PASSWORD, "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=self.s3_url, **keys).create_bucket(Bucket="mlflow")
        self._add_stores()
        self._supervisor.start()
        self._make_databases()
        self._add_servers()
        self.wait()

    def _add_stores(self) -> None:
        assert BIN
        user = "postgres" if os.getuid() == 0 else getpass.getuser()
        data = self.root / "postgres"
        data.mkdir()
        shutil.chown(data, user)
        words = ["-D", str(data), "-U", "postgres", "-A", "trust", "-N"]
        subprocess.run([str(BIN / "initdb"), *words], check=True, user=user, cwd="/", capture_output=True)
        options = f"-p {self.ports['postgres']} -h 127.0.0.1 -k {data}"
        self._add("postgres", [str(BIN / "postgres"), "-D", str(data), *options.split()], {}, user)
        folder = ["--dir", str(self.root / "redis"), "--appendonly", "yes", "--save", ""]
        self._add("redis", ["redis-server", "--bind", "127.0.0.1", "--port", str(self.ports["redis"]), *folder], {})

    def _make_databases(self) -> None:
        url = f"postgresql://postgres@127.0.0.1:{self.ports['postgres']}/postgres"
        with until("PostgreSQL", lambda: _connected(url)) as connection:
            for name in ("airflow", "mlflow", "ballast"):
                connection.execute(f"CREATE ROLE {name} LOGIN")
                connection.execute(f"CREATE DATABASE {name} OWNER {name}")
        command = [sys.executable, "-m", "airflow", "db", "migrate"]
        done = subprocess.run(
            command, cwd=self.project, env=self._airflow_env(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _add_servers(self) -> None:
        port, python, airflow = self.ports["mlflow"], sys.executable, [sys.executable, "-m", "airflow"]
        address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        database = f"postgresql+psycopg://mlflow@127.0.0.1:{self.ports['postgres']}/mlflow"
        stores = ["--backend-store-uri", database, "--serve-artifacts", "--artifacts-destination", "s3://mlflow"]
        stores += ["--default-artifact-root", "mlflow-artifacts:/"]
        without = {"MLFLOW_TRACKING_URI", "BALLAST_STATE_URI"}
        own = {name: value for name, value in self.shared.items() if name not in without} | self._s3_env()
        own["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        self._add("mlflow", [python, "-m", "mlflow", "server", *address, *stores], own)
        self._add("api-server", [*airflow, "api-server", "--workers", "1"], self._airflow_env())
        self._add("scheduler", [*airflow, "scheduler", "--skip-serve-logs"], self._airflow_env())
        self._add("dag-processor", [*airflow, "dag-processor"], self._airflow_env())
        words = ["--queues", "default", "--concurrency", "4", "--skip-serve-logs"]
        self._add("worker", [*airflow, "celery", "worker", *words], self._worker_env())

    def _add(self, name: str, command: list[str], env: dict[str, str], user: str | None = None) -> None:
        full = {**clean_environment(), **env, "BALLAST_ROOT": str(self.project)}
        service = Service(name, command, full, self.root / "logs" / f"{name}.log", user)
        service.start()
        self.services[name] = service

    def _supervise(self) -> None:
        """Start again what has died."""
        while not self._closing.wait(0.2):
            for service in list(self.services.values()):
                if not service.alive:
                    self._closing.wait(RESTART_S)
                    service.kill()  # what is left of it
                    if not self._closing.is_set():
                        service.start()

    def kill(self, name: str) -> None:
        """kill -9 of a service."""
        self.services[name].kill()

    def close(self) -> None:
        """End everything, and remove what it wrote."""
        self._closing.set()
        self._supervisor.join()
        for name in ("scheduler", "worker", "dag-processor", "api-server", "mlflow", "redis", "postgres"):
            if name in self.services:
                self.services[name].kill()
        for service in self.services.values():
            if service.process:
                service.process.wait(30)
        self.s3.stop()
        if "CHAOS_KEEP" not in os.environ:
            shutil.rmtree(self.root, ignore_errors=True)

    # --- what it says

    @property
    def airflow(self) -> Airflow:
        """A client that waits for an api-server that is just coming back."""
        return Airflow(f"http://127.0.0.1:{self.ports['airflow']}", "admin", PASSWORD, patience_s=READY_S)

    def wait(self) -> None:
        """Wait until all of it answers, has shown a sign of life since it was started, and every DAG is known."""
        client, wanted = self.airflow, {file.stem for file in (self.project / "dags").glob("*.py")}
        until("MLflow", lambda: answers(f"http://127.0.0.1:{self.ports['mlflow']}/health"))
        until("the worker", lambda: b"ready." in self.services["worker"].log.read_bytes())
        until("the DAGs", lambda: wanted <= {dag["dag_id"] for dag in client.dags()})
        health = client.health
        until("Airflow", lambda: all(health()[name]["status"] == "healthy" for name in ("scheduler", "dag_processor")))
        for name, words in POOLS.items():
            client.make_pool(name, 1, words)

    def python(self, *arguments: str, **more: str) -> str:
        """What a Python process in the project prints that is told where everything is."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.project,
            env={**self.shared, **more},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def chaos_project(root: Path, retry_delay_s: int = 10) -> Path:
    """A project of small data, whose gate lets each later challenger in, and whose policy asks for nothing."""
    own_project(root, DAYS, candidates=("hgb",), flip_from=FLIPPED)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["decide"]["rules"] = [{"rule": "better", "margin": 0.0, "confidence": 0.75}]
    params["policy"]["triggers"] = []
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    chain = root / "plugins" / "ballast_chain.py"
    text, found = re.subn(r'("retry_delay": timedelta\(seconds=)10', rf"\g<1>{retry_delay_s}", chain.read_text())
    assert found == 1
    chain.write_text(text)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, "commit", "-qam", "Chaos"], cwd=root, check=True)
    return root


def processes() -> Iterator[psutil.Process]:
    """Every process that there is, but this one."""
    return (process for process in psutil.process_iter() if process.pid != os.getpid())


def _environ(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error, OSError):
        return process.environ()
    return {}


def _connected(url: str) -> Any:
    with suppress(psycopg.OperationalError):
        return psycopg.connect(url, autocommit=True)
    return None


def answers(url: str) -> bool:
    """Whether a web server does."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False
