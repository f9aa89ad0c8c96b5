"""What reaches the Docker engine: an engine that writes down what it is asked for, and refuses to make containers."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

import ballast_operators
from ballast_container import StageContainer
from pipelines import run

pytestmark = [
    pytest.mark.usefixtures("airflow_database"),
    pytest.mark.filterwarnings("default"),  # Airflow warns of its own libraries
]
PROJECT = Path(__file__).resolve().parents[2]
IMAGE = f"sha256:{'a' * 64}"
REQUEST = {
    "command": ["bash", "-c", "it"],
    "cwd": "/var/lib/ballast/runs/d/r",
    "reads": ["/var/lib/ballast/runs/d/r"],
    "writes": [],
    "hides": "/var/lib/ballast",
    "env": {"BALLAST_RUN": "r"},
    "names": ["MLFLOW_*"],
    "network": "mlflow",
    "gpu": True,
}


class Engine(BaseHTTPRequestHandler):
    """Knows one volume and one image; what it is asked to create is kept, and answered with ``verdict``."""

    asked: list[dict[str, Any]]
    started: list[str]
    verdict: int
    known = (
        ("/version", {"ApiVersion": "1.41"}),
        ("/_ping", "OK"),
        ("/containers/json", []),
        ("/volumes/ballast_var", {"Mountpoint": "/engine/volumes/var"}),
        (f"/images/{IMAGE}/json", {}),
        ("/containers/one/json", {"State": {"ExitCode": 0, "OOMKilled": False}}),
    )

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        found = [answer for end, answer in self.known if path.endswith(end)]
        self.answer(200 if found else 404, found[0] if found else {"message": f"no {path}"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path.endswith("/create"):
            self.asked.append(json.loads(body))
            self.answer(self.verdict, {"Id": "one", "message": "not today"})
            return
        self.started += [self.path] if self.path.endswith("/start") else []
        self.answer(HTTPStatus.OK, {})

    def do_DELETE(self) -> None:
        self.answer(HTTPStatus.OK, {})

    def answer(self, status: int, body: Any) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Engine]]:
    for name in list(os.environ):
        if name.startswith(("BALLAST_", "DOCKER_")):
            monkeypatch.delenv(name)
    handler: type[Engine] = type("One", (Engine,), {"asked": [], "started": [], "verdict": HTTPStatus.BAD_REQUEST})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("BALLAST_STAGE_IMAGE", IMAGE)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler
        server.shutdown()


def container() -> StageContainer:
    ti = SimpleNamespace(task_id="train", dag_id="d", run_id="r", try_number=1)
    return StageContainer(context={"ti": ti})  # type: ignore[arg-type]


def asked(engine: type[Engine], **request: Any) -> dict[str, Any]:
    """What the engine is asked to create."""
    made = container()
    with pytest.raises(AirflowFailException, match="The Docker engine refuses it: not today"):
        made.run({**REQUEST, **request})
    made.cli.close()
    return engine.asked[-1]


@pytest.mark.parametrize(("setting", "count"), [("all", -1), ("2", 2)])
def test_gpus_are_requested_where_the_stage_can_use_one(
    engine: type[Engine], monkeypatch: pytest.MonkeyPatch, setting: str, count: int
) -> None:
    assert asked(engine)["HostConfig"].get("DeviceRequests") is None
    monkeypatch.setenv("BALLAST_STAGE_GPUS", setting)
    (request,) = asked(engine)["HostConfig"]["DeviceRequests"]
    assert (request["Count"], request["Capabilities"]) == (count, [["gpu"]])
    assert asked(engine, gpu=False)["HostConfig"].get("DeviceRequests") is None


def test_network_is_none_where_the_stage_needs_none(engine: type[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(engine)["HostConfig"]["NetworkMode"] == "bridge"
    monkeypatch.setenv("BALLAST_STAGE_MLFLOW_NETWORK", "ballast_tracking")
    modes = [asked(engine, network=need)["HostConfig"]["NetworkMode"] for need in ("mlflow", "source", None)]
    assert modes == ["ballast_tracking", "bridge", "none"]


def test_environment_is_what_the_stage_needs(engine: type[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"MLFLOW_TRACKING_PASSWORD": "p", "BALLAST_STATE_URI": "s", "AIRFLOW_CONN_SHOP": "c", "AWS_SECRET": "a"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BALLAST_STAGE_ENV", "AIRFLOW_CONN_SHOP,AWS_*")
    held = dict(pair.split("=", 1) for pair in asked(engine)["Env"])
    assert {name: held.get(name) for name in given} == {**given, "BALLAST_STATE_URI": None}
    assert (held["BALLAST_RUN"], held["BALLAST_IMAGE"]) == ("r", IMAGE)
    assert not {"PATH", "AIRFLOW_HOME"} & set(held)


def test_mounts_are_found_where_the_engine_has_them(engine: type[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLAST_STAGE_MOUNTS", "/var/lib/ballast=ballast_var,/var/lib/ballast/landing=/mnt/landing")
    reads = ["/var/lib/ballast/runs/d/r", "/var/lib/ballast/landing", "/var/lib/ballast-other"]
    hidden, *mounts = asked(engine, reads=reads)["HostConfig"]["Mounts"]
    assert (hidden["Type"], hidden["Target"]) == ("tmpfs", "/var/lib/ballast")
    assert all((mount["Type"], mount["ReadOnly"]) == ("bind", True) for mount in mounts)
    assert {mount["Target"]: mount["Source"] for mount in mounts} == {
        "/var/lib/ballast/runs/d/r": "/engine/volumes/var/runs/d/r",
        "/var/lib/ballast/landing": "/mnt/landing",
        "/var/lib/ballast-other": "/var/lib/ballast-other",
    }


def test_user_of_a_worker_that_is_not_root_is_the_worker_s(
    engine: type[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr(os, "getegid", lambda: 5)
    assert asked(engine)["User"] == "1234:5"
    monkeypatch.setenv("BALLAST_STAGE_USER", "10001:10001")
    with pytest.raises(AirflowFailException, match="must be unset, or the worker's own 1234:5"):
        container()


@pytest.mark.parametrize("found", ["0:0", "root", "10001"])
def test_user_is_never_root(engine: type[Engine], monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert asked(engine)["User"] == "10001:10001"
    monkeypatch.setenv("BALLAST_STAGE_USER", found)
    with pytest.raises(AirflowFailException, match=f"a user that is not root .* .found '{found}'"):
        container()


@pytest.mark.parametrize("found", ["", "ballast-pipeline", "ballast-pipeline:1.0", "sha256:abc", f"a@{IMAGE}@{IMAGE}"])
def test_image_that_is_not_pinned_is_refused(engine: type[Engine], monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setenv("BALLAST_STAGE_IMAGE", found)
    with pytest.raises(
        AirflowFailException, match=r"`docker image inspect --format '\{\{.RepoDigests\}\} \{\{.Id\}\}'"
    ):
        container()


def test_engine_that_fails_is_tried_again(engine: type[Engine]) -> None:
    engine.verdict = HTTPStatus.INTERNAL_SERVER_ERROR
    made = container()
    with pytest.raises(AirflowException, match="can be tried again") as caught:
        made.run(REQUEST)
    assert type(caught.value) is AirflowException
    made.cli.close()


def test_container_of_a_task_that_was_asked_to_end_does_not_start(engine: type[Engine]) -> None:
    engine.verdict = HTTPStatus.CREATED
    made = container()
    made.on_kill()
    with pytest.raises(AirflowException, match="asked to end before its container had started"):
        made.run(REQUEST)
    assert (len(engine.asked), engine.started) == (1, [])
    made.cli.close()


def test_engine_by_tls_takes_docker_s_own_variables(engine: type[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", "/nowhere")
    with pytest.raises(AirflowFailException, match="Path to a certificate and key files must be provided"):
        container()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("BALLAST_STAGE_CPUS", "BALLAST_STAGE_CPUS must be a number such as 1.5 .found 'many'"),
        ("BALLAST_STAGE_GPUS", "BALLAST_STAGE_GPUS must be all or a number .found 'many'"),
        ("BALLAST_STAGE_MEMORY", "The Docker client cannot use a setting: The specified value for memory .many."),
        ("BALLAST_STAGE_MOUNTS", "BALLAST_STAGE_MOUNTS must be pairs such as .* .found 'many'"),
    ],
)
def test_setting_that_means_nothing_fails_at_once(
    engine: type[Engine], monkeypatch: pytest.MonkeyPatch, setting: str, said: str
) -> None:
    monkeypatch.setenv(setting, "many")
    with pytest.raises(AirflowFailException, match=said):
        container().run(REQUEST)


def test_stages_that_run_in_containers_are_the_pipeline_s() -> None:
    assert ballast_operators.STAGES == run.STAGES


def test_settings_stand_in_the_operations_page_and_in_compose() -> None:
    setting = re.compile(r"BALLAST_STAGE_[A-Z_]+|BALLAST_DOCKER_CONN")
    read = set(setting.findall((PROJECT / "plugins" / "ballast_container.py").read_text()))
    in_compose = set(setting.findall((PROJECT / "deploy" / "containers.yml").read_text()))
    assert read - in_compose == {"BALLAST_STAGE_USER"}, "add it to deploy/containers.yml; no worker is root there"
    assert not read - set(setting.findall((PROJECT / "docs" / "operations.md").read_text()))


def test_compose_holds_the_engine_s_certificates_and_no_socket() -> None:
    text = (PROJECT / "deploy" / "containers.yml").read_text()
    assert "docker.sock" not in text
    assert 'DOCKER_TLS_VERIFY: "1"' in text
