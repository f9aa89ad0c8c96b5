"""The Compose stack with `deploy/containers.yml`: a retraining whose stages run in containers of an engine over TLS.

Needs a Docker engine and the public images (or stand-ins of their names). The engine is reached through an endpoint of
the test's own, which asks for a client's certificate as `dockerd --tlsverify` does.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path

import pytest

from pipelines.dagruns import Airflow
from tests import docker_engine

pytestmark = [
    pytest.mark.compose,
    # What a cut connection leaves is collected in any test.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).parent.parent.parent
PORTS = {"AIRFLOW_PORT": "28180", "MLFLOW_PORT": "25100"}
TAG = os.environ.get("BALLAST_TAG", "test")
STAGES = ["land", "ingest", "validate", "prepare", "train", "evaluate"]
NAME = "host.docker.internal"
sys.path.insert(0, str(ROOT / "scripts"))
from make_secrets import make  # noqa: E402


def call(*command: str, **env: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout.strip()


def certificates(folder: Path) -> None:
    """A CA of its own, and by it the engine's certificate (``server``) and a client's (``cert`` and ``key``)."""
    folder.mkdir()
    make_key = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days=2",
    ]
    call(*make_key, "-subj=/CN=ca", f"-keyout={folder}/ca-key.pem", f"-out={folder}/ca.pem")
    by_ca = [*make_key, "-CA", f"{folder}/ca.pem", "-CAkey", f"{folder}/ca-key.pem"]
    names = ["-addext", f"subjectAltName=DNS:{NAME}"]
    call(*by_ca, "-subj=/CN=engine", *names, f"-keyout={folder}/server-key.pem", f"-out={folder}/server.pem")
    call(*by_ca, "-subj=/CN=worker", f"-keyout={folder}/key.pem", f"-out={folder}/cert.pem")
    for name in ("ca", "cert", "key"):
        (folder / f"{name}.pem").chmod(0o644)  # the worker's user reads them


class Endpoint:
    """The engine's socket over TLS, for whoever shows a certificate of the CA."""

    def __init__(self, folder: Path, address: str) -> None:
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.pem"))
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.load_cert_chain(folder / "server.pem", folder / "server-key.pem")
        self.address, self.port, self.ready = address, 0, threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()))
        self.thread.start()
        assert self.ready.wait(10)

    async def serve(self) -> None:
        self.loop, self.asked_to_end = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self.forward, self.address, 0, ssl=self.context) as server:
            self.port = server.sockets[0].getsockname()[1]
            self.ready.set()
            await self.asked_to_end.wait()

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection("/var/run/docker.sock")
        with suppress(asyncio.CancelledError):
            await asyncio.gather(
                self.pump(reader, inner_writer), self.pump(inner_reader, writer), return_exceptions=True
            )

    async def pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        finally:
            target.close()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.asked_to_end.set)
        self.thread.join()


class Stack:
    """The stack under test, and what was created for it meanwhile."""

    def __init__(self, folder: Path, image: str, port: int) -> None:
        self.secrets = folder / "secrets" / "stack.env"
        make(self.secrets)
        self.env = PORTS | {
            "BALLAST_TAG": TAG,
            "BALLAST_STAGE_IMAGE": image,
            "BALLAST_DOCKER_HOST": f"tcp://{NAME}:{port}",
            "BALLAST_DOCKER_CERTS": str(folder / "certificates"),
        }
        files = [
            f"--file={file}" for file in ("docker-compose.yml", "deploy/containers.yml", "tests/compose/override.yml")
        ]
        self.command = ["docker", "compose", "-p", "ballast-contained", "--env-file", str(self.secrets), *files]

    def run(self, *arguments: str) -> str:
        return call(*self.command, *arguments, **self.env)

    def airflow(self) -> Airflow:
        held = dict(line.split("=", 1) for line in self.secrets.read_text().splitlines())
        return Airflow(f"http://127.0.0.1:{PORTS['AIRFLOW_PORT']}", "admin", held["AIRFLOW_ADMIN_PASSWORD"], 60)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    docker_engine.needed()
    folder = tmp_path_factory.mktemp("contained")
    certificates(folder / "certificates")
    subnet = call("docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}")
    endpoint = Endpoint(folder / "certificates", str(ip_network(subnet)[1]))  # what containers call host-gateway
    stack = Stack(folder, "none yet", endpoint.port)
    if TAG == "test":
        call("git", "bundle", "create", "--quiet", "deploy/project.bundle", "HEAD")
        stack.run("build", "airflow-init", "project")
    image = call("docker", "image", "inspect", "--format", "{{.Id}}", f"ballast-pipeline:{TAG}")
    stack.env["BALLAST_STAGE_IMAGE"] = image
    try:
        stack.run("up", "--detach", "--no-build")
        call("sh", "scripts/compose_wait.sh", *stack.command, **stack.env, COMPOSE_WAIT_S="900")
        yield stack
    finally:
        stack.run("--profile", "*", "down", "--volumes", "--timeout", "10")
        endpoint.close()


@pytest.fixture
def created(tmp_path: Path) -> Iterator[Path]:
    """A file of the containers that the engine creates for tasks meanwhile, one JSON a line."""
    file = tmp_path / "events.jsonl"
    command = ["docker", "events", "--filter=event=create", "--filter=label=ballast.task", "--format={{json .}}"]
    with file.open("w") as out, subprocess.Popen(command, stdout=out) as events:
        yield file
        events.terminate()


def test_retraining_runs_its_stages_in_containers_of_an_engine_over_tls(stack: Stack, created: Path) -> None:
    airflow = stack.airflow()
    airflow.set_paused("retrain_scheduled", False)
    began = time.monotonic()
    run = airflow.trigger("retrain_scheduled", "turn", {"as_of": "2013-04-01"})
    while not run.over and time.monotonic() - began < 1800:
        time.sleep(2)
        run = airflow.run(run.dag_id, run.run_id)
    print("\n" + ", ".join(f"{task.task_id} {task.seconds:.0f} s" for task in airflow.tasks(run) if task.seconds))
    assert run.state == "success", [(task.task_id, task.state) for task in airflow.tasks(run)]
    made = [json.loads(line)["Actor"]["Attributes"] for line in created.read_text().splitlines()]
    ours = [one for one in made if one["ballast.var"].endswith("/ballast-contained_var/_data")]
    assert [one["ballast.task"] for one in ours] == STAGES
    assert not call("docker", "ps", "--all", "--quiet", "--filter=label=ballast.run=turn")
    assert f"image {stack.env['BALLAST_STAGE_IMAGE']}" in stack.run("exec", "-T", "worker", "ballast", "explain", "1")
