"""The alert bridge: the real app and a real inbox, with a stand-in for Airflow that is really away and comes back."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from pipelines.bridge import make_app
from pipelines.dagruns import Airflow
from pipelines.state import State

TOKEN = "a-token-long-enough"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PORT = 18217


@contextmanager
def airflow(runs: Counter[str]) -> Iterator[None]:
    """Something that takes runs as Airflow does: each id once, 409 after that."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = 200, {"access_token": "x"}
            if "dag_run_id" in body:
                status = 409 if runs[body["dag_run_id"]] else 200
                runs[body["dag_run_id"]] += status == 200
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(f"sqlite:///{tmp_path / 'state.db'}")


@pytest.fixture
def bridge(state: State) -> Iterator[httpx.Client]:
    actions = frozenset({"retrain", "monitor", "freeze"})
    app = make_app(TOKEN, actions, lambda: Airflow(f"http://127.0.0.1:{PORT}", "u", "p"), state)
    server = uvicorn.Server(uvicorn.Config(app, port=PORT + 1, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT + 1}", trust_env=False) as client:
        yield client
    server.should_exit = True
    thread.join()


def delivery(*fingerprints: str, status: str = "firing", action: str = "monitor") -> dict[str, Any]:
    labels = {"alertname": "PerformanceDropped", "ballast_action": action}
    alert = {"status": status, "labels": labels, "annotations": {}, "startsAt": "2013-05-01T00:00:00Z"}
    return {"version": "4", "alerts": [{**alert, "fingerprint": one} for one in fingerprints]}


def outcomes(bridge: httpx.Client, body: dict[str, Any]) -> list[str]:
    answer = bridge.post("/alertmanager", json=body, headers=BEARER)
    assert answer.status_code == 202, answer.text
    return [one["outcome"] for one in answer.json()["alerts"]]


def wait_until_empty(state: State) -> None:
    deadline = time.monotonic() + 10
    while state.alerts("waiting"):
        assert time.monotonic() < deadline, state.alerts("waiting")
        time.sleep(0.02)


def test_bridge_alert_that_is_delivered_again_starts_one_run(bridge: httpx.Client, state: State) -> None:
    runs: Counter[str] = Counter()
    with airflow(runs):
        assert outcomes(bridge, delivery("a1", "a1", "b2")) == ["accepted", "known", "accepted"]
        wait_until_empty(state)
        assert outcomes(bridge, delivery("a1")) == ["known"]
    assert runs == {"alert-a1-20130501T000000Z": 1, "alert-b2-20130501T000000Z": 1}


def test_bridge_airflow_away_keeps_the_alert_until_it_is_back(bridge: httpx.Client, state: State) -> None:
    assert outcomes(bridge, delivery("a1")) == ["accepted"]
    time.sleep(0.5)
    assert [alert.status for alert in state.alerts()] == ["waiting"]
    runs: Counter[str] = Counter()
    with airflow(runs):
        wait_until_empty(state)
    assert runs == {"alert-a1-20130501T000000Z": 1}


def test_bridge_second_retraining_is_held_while_one_waits(bridge: httpx.Client, state: State) -> None:
    assert outcomes(bridge, delivery("a1", "b2", action="retrain")) == ["accepted", "held"]
    assert [(one.asked_by, one.kind) for one in state.retrainings()] == [
        ("retrain_on_alert/alert-a1-20130501T000000Z", "alert")
    ]
    assert outcomes(bridge, delivery("a1", status="resolved", action="retrain")) == ["withdrawn"]
    assert state.retrainings() == []
    assert outcomes(bridge, delivery("b2", action="retrain")) == ["accepted"]  # held, asked again


def test_bridge_resolved_before_its_firing_starts_nothing(bridge: httpx.Client, state: State) -> None:
    assert outcomes(bridge, delivery("a1", status="resolved")) == ["withdrawn"]
    assert outcomes(bridge, delivery("a1")) == ["known"]
    assert state.alerts("waiting") == []


def test_bridge_freeze_is_written_into_the_ledger(bridge: httpx.Client, state: State) -> None:
    asked = {"action": "freeze", "source": "ci", "key": "7", "reason": "a bad release"}
    assert bridge.post("/trigger", json=asked, headers=BEARER).status_code == 202
    wait_until_empty(state)
    assert [(entry.kind, entry.reason) for entry in state.ledger()] == [("freeze", "a bad release")]


@pytest.mark.parametrize("path", ["/alertmanager", "/trigger"])
def test_bridge_refuses_what_is_wrong_and_keeps_nothing_of_it(bridge: httpx.Client, state: State, path: str) -> None:
    def status(body: bytes, **headers: str) -> int:
        sent = {**BEARER, "Content-Type": "application/json", **headers}
        return bridge.post(path, content=body, headers=sent).status_code

    good = json.dumps(delivery("a1")).encode()
    assert status(good, Authorization="Bearer wrong-token-long-enough") == 401
    assert status(good, Authorization="Basic !!!") == 401
    assert status(good, **{"Content-Type": "text/plain"}) == 415
    assert status(b"x" * (2 * 1024**2 + 1)) == 413
    assert status(b'{"version": "3"}') == status(b"[") == status(b"\xff") == 422
    assert state.alerts() == []


def test_bridge_action_that_is_not_allowed_or_named_starts_nothing(bridge: httpx.Client, state: State) -> None:
    assert outcomes(bridge, delivery("a1", action="rollback")) == ["refused_action"]
    assert state.alerts() == []
