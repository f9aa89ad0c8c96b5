"""The Compose stack with `deploy/containers.yml`: a retraining whose stages run in containers of an engine over TLS.

Needs a Docker engine and the public images (or stand-ins of their names). The engine is reached through an endpoint of
the test's own, which asks for a client's certificate as `dockerd --tlsverify` does.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_network
from itertools import pairwise
from pathlib import Path

import pytest

from tests import docker_engine
from tests.compose.stack import Stack, call

pytestmark = [
    pytest.mark.compose,
    # What a cut connection leaves is collected in any test.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
STAGES = ["land", "ingest", "validate", "prepare", "train", "evaluate"]
NAME = "host.docker.internal"


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


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    docker_engine.needed()
    folder = tmp_path_factory.mktemp("contained")
    certificates(folder / "certificates")
    subnet = call("docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}")
    endpoint = Endpoint(folder / "certificates", str(ip_network(subnet)[1]))  # what containers call host-gateway
    where = {
        "BALLAST_STAGE_IMAGE": "none yet",
        "BALLAST_DOCKER_HOST": f"tcp://{NAME}:{endpoint.port}",
        "BALLAST_DOCKER_CERTS": str(folder / "certificates"),
    }
    stack = Stack("ballast-contained", folder, 27100, "deploy/containers.yml", **where)
    stack.build()
    stack.env["BALLAST_STAGE_IMAGE"] = call("docker", "image", "inspect", "--format={{.Id}}", stack.image("worker"))
    try:
        stack.start()
        yield stack
    finally:
        stack.remove()
        endpoint.close()


@pytest.fixture
def created(tmp_path: Path) -> Iterator[Path]:
    """A file of the containers that the engine creates for tasks meanwhile, one JSON a line."""
    file = tmp_path / "events.jsonl"
    command = ["docker", "events", "--filter=event=create", "--filter=label=ballast.task", "--format={{json .}}"]
    with file.open("w") as out, subprocess.Popen(command, stdout=out) as events:
        yield file
        events.terminate()


def tasks(created: Path, dag_id: str) -> list[str]:
    """Those of a DAG whose containers were created."""
    made = [json.loads(line)["Actor"]["Attributes"] for line in created.read_text().splitlines()]
    ours = [one for one in made if one["ballast.var"].endswith("/ballast-contained_var/_data")]
    return [one["ballast.task"] for one in ours if one["ballast.dag"] == dag_id]


def test_retraining_runs_its_stages_in_containers_of_an_engine_over_tls(stack: Stack, created: Path) -> None:
    airflow = stack.airflow()
    airflow.set_paused("retrain_scheduled", False)
    run = airflow.trigger("retrain_scheduled", "turn", {"as_of": "2013-04-01"})
    stack.ended(run.dag_id, run.run_id)
    assert tasks(created, run.dag_id) == STAGES
    assert not call("docker", "ps", "--all", "--quiet", "--filter=label=ballast.run=turn")
    assert f"image {stack.env['BALLAST_STAGE_IMAGE']}" in stack.ballast("explain", "1")
    stack.followed(run, "promote")
    assert "champion   v1" in stack.status()


def test_drift_retrains_through_the_gate_and_rollback_goes_back(stack: Stack, created: Path) -> None:
    airflow = stack.airflow()
    for dag_id in ("monitor", "retrain_on_drift"):
        airflow.set_paused(dag_id, False)
    for start, end in pairwise(("2013-04-01", "2013-05-01", "2013-06-01", "2013-07-01")):
        run = airflow.trigger("monitor", f"to-{end}", {"start": start, "as_of": end})
        stack.ended(run.dag_id, run.run_id)
        if airflow.result(run, "policy")["verdict"] == "retrain":
            break
    retrained = stack.followed(run, "retrain_on_drift")
    made = [stage for stage in STAGES if not airflow.result(retrained, stage)["cached"]]  # by the monitor
    assert "train" in made and tasks(created, retrained.dag_id) == made
    assert not call("docker", "ps", "--all", "--quiet", "--filter=label=ballast.dag=retrain_on_drift")
    stack.followed(retrained, "promote")
    assert "champion   v2" in stack.status()
    assert json.loads(stack.ballast("explain", "2", "--json"))["started_by"]["kind"] == "drift"

    back = airflow.trigger("rollback", "back", {"reason": "a test"})
    stack.ended(back.dag_id, back.run_id)
    assert "champion   v1" in stack.status()
    moves = [(one["kind"], one["to_version"]) for one in json.loads(stack.ballast("history", "--json"))["entries"]]
    assert moves == [("promote", 1), ("promote", 2), ("rollback", 1)]
