"""The alert bridge: the real app and a real inbox, with a stand-in for Airflow that is really away and comes back."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from benchmarks.bridge import BEARER, TOKEN, FakeAirflow, airflow
from pipelines import embedded
from pipelines import state as states
from pipelines.alerts import Trigger
from pipelines.bridge import _token, make_app
from pipelines.dagruns import Airflow
from pipelines.errors import BallastError, TryAgain
from pipelines.state import Alert, State


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(f"sqlite:///{tmp_path / 'state.db'}")


@pytest.fixture
def fake() -> Iterator[FakeAirflow]:
    with airflow() as one:
        yield one


@pytest.fixture
def serve(fake: FakeAirflow) -> Iterator[Callable[[State], httpx.Client]]:
    """Starts a bridge on a state store."""
    started: list[tuple[uvicorn.Server, threading.Thread, httpx.Client]] = []

    def start(state: State) -> httpx.Client:
        actions = frozenset({"retrain", "monitor", "freeze"})
        app = make_app(TOKEN, actions, lambda: Airflow(fake.url, "u", "p"), state)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30)
        started.append((server, thread, client))
        return client

    yield start
    for server, thread, client in started:
        client.close()
        server.should_exit = True
        thread.join()


@pytest.fixture
def bridge(serve: Callable[[State], httpx.Client], state: State) -> httpx.Client:
    return serve(state)


def delivery(*fingerprints: str, status: str = "firing", action: str = "monitor") -> dict[str, Any]:
    labels = {"alertname": "PerformanceDropped", "ballast_action": action}
    alert = {"status": status, "labels": labels, "annotations": {}, "startsAt": "2013-05-01T00:00:00Z"}
    return {"version": "4", "alerts": [{**alert, "fingerprint": one} for one in fingerprints]}


def outcomes(bridge: httpx.Client, body: dict[str, Any]) -> list[str]:
    answer = bridge.post("/alertmanager", json=body, headers=BEARER)
    assert answer.status_code == 202, answer.text
    return [one["outcome"] for one in answer.json()["alerts"]]


def wait_until_empty(state: State) -> None:
    wait_until(lambda: not state.alerts("waiting"))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def metric(bridge: httpx.Client, name: str) -> float:
    lines = bridge.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"ballast_bridge_{name} ")), 0.0)


def alert(run_id: str, received: int = 0, action: str = "monitor", **more: Any) -> Alert:
    at = (datetime.now(UTC) + timedelta(seconds=received)).isoformat(timespec="milliseconds")
    return Alert(run_id, action, {"reason": "r", "as_of": "2013-05-01"}, received_at=at, **more)


def test_bridge_alert_that_is_delivered_again_starts_one_run(
    bridge: httpx.Client, state: State, fake: FakeAirflow
) -> None:
    assert outcomes(bridge, delivery("a1", "a1", "b2")) == ["accepted", "known", "accepted"]
    wait_until_empty(state)
    assert outcomes(bridge, delivery("a1")) == ["known"]
    assert fake.runs == {"alert-a1-20130501T000000Z": 1, "alert-b2-20130501T000000Z": 1}


@pytest.mark.parametrize("mode", ["away", "faulty", "unknown", "broken"])
def test_bridge_airflow_that_cannot_take_it_keeps_the_alert_until_it_can(
    bridge: httpx.Client, state: State, fake: FakeAirflow, mode: Any
) -> None:
    fake.mode = mode
    assert outcomes(bridge, delivery("a1")) == ["accepted"]
    wait_until(lambda: fake.posts >= 2)
    assert [one.status for one in state.alerts()] == ["waiting"]
    assert metric(bridge, "airflow_reachable") == (mode != "away")
    fake.mode = "up"
    wait_until_empty(state)
    assert fake.runs == {"alert-a1-20130501T000000Z": 1}
    assert metric(bridge, "airflow_reachable") == 1


def test_bridge_airflow_away_is_tried_with_one_alert_for_all(
    bridge: httpx.Client, state: State, fake: FakeAirflow
) -> None:
    fake.mode = "away"
    for number in range(20):
        assert outcomes(bridge, delivery(f"a{number}")) == ["accepted"]
    time.sleep(0.5)
    tried = sum(one.tries for one in state.alerts("waiting"))
    assert tried <= fake.posts <= tried + 1 <= 5  # 0, 0.25 and 0.75 s after the first; one may be in hand
    fake.mode = "up"
    wait_until_empty(state)
    assert set(fake.runs.values()) == {1} and len(fake.runs) == 20


def test_bridge_airflow_that_fails_on_one_run_gets_the_others(
    bridge: httpx.Client, state: State, fake: FakeAirflow
) -> None:
    fake.mode = "faulty"
    assert outcomes(bridge, delivery("a1", "b2")) == ["accepted", "accepted"]
    wait_until(lambda: all(one.tries for one in state.alerts("waiting")))


def test_bridge_alert_that_airflow_refuses_is_given_up(bridge: httpx.Client, state: State, fake: FakeAirflow) -> None:
    fake.mode = "refuses"
    assert outcomes(bridge, delivery("a1", action="retrain")) == ["accepted"]
    wait_until_empty(state)
    assert [(one.status, one.outcome) for one in state.alerts()] == [
        ("failed", "Airflow refused POST /api/v2/dags/retrain_on_alert/dagRuns: 422 refuses")
    ]
    assert state.inbox().failed == 1
    assert state.retrainings() == []
    assert metric(bridge, 'runs_failed_total{action="retrain"}') == metric(bridge, "airflow_reachable") == 1


def test_bridge_login_that_is_refused_gives_nothing_up(
    bridge: httpx.Client, state: State, fake: FakeAirflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "take", lambda path, body: (422, {"detail": "no such user"}))
    assert outcomes(bridge, delivery("a1")) == ["accepted"]
    wait_until(lambda: state.alerts()[0].tries > 0)
    monkeypatch.undo()
    wait_until_empty(state)
    assert [one.status for one in state.alerts()] == ["started"]


def test_bridge_counts_as_started_only_what_airflow_has_newly_taken(
    bridge: httpx.Client, state: State, fake: FakeAirflow
) -> None:
    fake.runs["alert-a1-20130501T000000Z"] = 1  # posted before a kill
    outcomes(bridge, delivery("a1", "b2"))
    outcomes(bridge, delivery("c3", "d4", action="freeze"))
    wait_until(lambda: metric(bridge, 'freezes_total{outcome="known"}') == 1)
    assert metric(bridge, 'runs_started_total{action="monitor"}') == 1
    assert metric(bridge, 'runs_known_total{action="monitor"}') == 1
    assert metric(bridge, 'freezes_total{outcome="made"}') == metric(bridge, "queued_seconds_count") == 1
    assert metric(bridge, 'runs_started_total{action="freeze"}') == 0
    assert {one.run_id[:8]: one.status for one in state.alerts()} == {
        "alert-a1": "started",
        "alert-b2": "started",
        "alert-c3": "done",
        "alert-d4": "done",
    }


def test_bridge_second_retraining_is_held_while_one_waits(
    bridge: httpx.Client, state: State, fake: FakeAirflow
) -> None:
    fake.mode = "away"
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


def test_bridge_alert_that_is_too_long_or_of_tomorrow_is_refused_alone(bridge: httpx.Client, state: State) -> None:
    body = delivery("a1", "b2", "c3")
    body["alerts"][0]["annotations"] = {f"n{number}": "x" * 4000 for number in range(10)}
    body["alerts"][1]["annotations"] = {"ballast_as_of": "2999-01-01"}
    assert outcomes(bridge, body) == ["refused_size", "refused_as_of", "accepted"]


def test_bridge_alert_with_hardly_a_word_gets_a_reason_that_a_rollback_takes(
    bridge: httpx.Client, state: State
) -> None:
    body = delivery("a1")
    body["alerts"][0]["annotations"] = {"summary": " x "}
    assert outcomes(bridge, body) == ["accepted"]
    assert [one.payload["reason"] for one in state.alerts()] == ["alert PerformanceDropped"]
    asked = {"action": "monitor", "source": "ci", "key": "7", "reason": "x"}
    assert bridge.post("/trigger", json=asked, headers=BEARER).status_code == 422


def test_bridge_sender_that_never_ends_its_body_is_sent_away(
    monkeypatch: pytest.MonkeyPatch, bridge: httpx.Client, state: State
) -> None:
    monkeypatch.setattr("pipelines.bridge.MOST_BODY_S", 0.2)
    head = f"POST /alertmanager HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json"
    with socket.create_connection((bridge.base_url.host, bridge.base_url.port), timeout=20) as sender:
        sender.sendall(f'{head}\r\nContent-Length: 100\r\n\r\n{{"version"'.encode())
        assert sender.recv(100).startswith(b"HTTP/1.1 408 ")
    assert state.alerts() == []


def test_bridge_basic_auth_takes_its_user_and_token_and_no_other(bridge: httpx.Client) -> None:
    def status(user: str, password: str) -> int:
        said = base64.b64encode(f"{user}:{password}".encode()).decode()
        return bridge.post("/trigger", json={}, headers={"Authorization": f"Basic {said}"}).status_code

    assert status("ballast", TOKEN) == 422
    assert status("admin", TOKEN) == status("", TOKEN) == status("ballast", TOKEN[:-1]) == status("", "") == 401


class Broken(State):
    """A state store with a fault that nobody has thought of."""

    def take_alert(self, *_: Any) -> Any:
        raise RuntimeError("unforeseen")

    def inbox(self) -> Any:
        raise RuntimeError("unforeseen")


def test_bridge_fault_that_is_not_foreseen_asks_the_sender_to_come_again(
    serve: Callable[[State], httpx.Client], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = serve(Broken(f"sqlite:///{tmp_path / 'broken.db'}"))
    answer = bridge.post("/alertmanager", json=delivery("a1"), headers=BEARER)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "15")
    assert "asked to come again: unforeseen" in caplog.text
    assert 'deliveries_total{status="503"} 1.0' in bridge.get("/metrics").text
    assert "inbox_waiting NaN" in bridge.get("/metrics").text
    assert bridge.get("/healthz").status_code == 200


def test_trigger_schema_is_the_published_one() -> None:
    published = json.loads((embedded.ROOT / "docs" / "trigger.schema.json").read_text())
    assert published == Trigger.model_json_schema(), "python -m pipelines.alerts > docs/trigger.schema.json"


def test_bridge_openapi_says_how_a_sender_is_known(bridge: httpx.Client) -> None:
    found = bridge.get("/openapi.json").json()
    assert {name: one["scheme"] for name, one in found["components"]["securitySchemes"].items()} == {
        "bearer": "bearer",
        "basic": "basic",
    }
    for path in ("/alertmanager", "/trigger"):
        assert found["paths"][path]["post"]["security"] == [{"bearer": []}, {"basic": []}]


def test_alerts_page_shows_requests_that_are_taken(bridge: httpx.Client, state: State) -> None:
    page = (embedded.ROOT / "docs" / "alerts.md").read_text()
    bodies = [
        one.replace('\\"', '"').replace("\\%", "%")
        for one in re.findall(r"""-d ['"](\{\\?"action.*?\})['"]$""", page, re.M | re.S)
    ]
    assert len(bodies) == 4
    for body in bodies:
        answer = bridge.post("/trigger", content=body, headers={**BEARER, "Content-Type": "application/json"})
        assert answer.status_code == 202, answer.text
        assert answer.json()["alerts"][0]["outcome"] in ("accepted", "held")


# --- the inbox


def test_inbox_alert_is_one_bridges_until_its_claim_ends(state: State, tmp_path: Path) -> None:
    other = State(f"sqlite:///{tmp_path / 'state.db'}")
    state.take_alert(alert("a"), lambda: None)
    state.take_alert(alert("b", 1), lambda: None)
    first, second = state.claim_alert(timedelta(seconds=30)), other.claim_alert(timedelta(0))
    assert first and second and (first.run_id, second.run_id) == ("a", "b")
    time.sleep(0.002)
    again = other.claim_alert(timedelta(seconds=30))
    assert again and again.run_id == "b"  # its first claim has ended, that of a has not
    assert state.claim_alert(timedelta(seconds=30)) is None


def test_inbox_many_bridges_each_alert_is_claimed_once(state: State, tmp_path: Path) -> None:
    for number in range(40):
        state.take_alert(alert(f"a{number}"), lambda: None)
    claimed: list[str] = []

    def work() -> None:
        own = State(f"sqlite:///{tmp_path / 'state.db'}", pooled=True)
        while one := own.claim_alert(timedelta(seconds=60)):
            claimed.append(one.run_id)
        own._engine.dispose()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(f"a{number}" for number in range(40))


def test_inbox_alert_withdrawn_before_its_turn_is_not_claimed(state: State) -> None:
    state.take_alert(alert("a"), lambda: None)
    state.withdraw_alert(alert("a"))
    assert state.claim_alert(timedelta(seconds=30)) is None


def test_inbox_alert_withdrawn_on_its_way_says_what_came_of_it(state: State) -> None:
    state.take_alert(alert("a", action="retrain"), lambda: None)
    claimed = state.claim_alert(timedelta(seconds=30))
    assert claimed
    gone = state.withdraw_alert(alert("a"))
    assert (gone.status, gone.outcome) == ("withdrawn", "resolved while it was on its way: it may still start")
    assert state.retrainings() == []
    state.postpone_alert(claimed, timedelta(0), "away")
    assert state.claim_alert(timedelta(0)) is None
    state.settle_alert(claimed, "started", "it was queued")
    assert [one.status for one in state.alerts()] == ["started"]
    assert [one.asked_by for one in state.retrainings()] == ["retrain_on_alert/a"]


def test_inbox_held_alert_that_is_let_through_is_received_then(state: State) -> None:
    state.take_alert(alert("a", -60), lambda: "cooldown")
    state.take_alert(alert("a", 0), lambda: "cooldown")
    held = state.alerts()[0]
    taken, new = state.take_alert(alert("a", 0), lambda: None)
    assert new and taken.received_at > held.received_at


def test_inbox_forgets_what_is_settled_and_old_or_too_much(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "MOST_ALERTS_KEPT", 5)
    state.take_alert(alert("waits", -1000), lambda: None)
    for number in range(20):
        state.withdraw_alert(alert(f"never{number:02}", number))
    assert [one.run_id for one in state.alerts()] == ["waits", *(f"never{number}" for number in range(15, 20))]
    state.withdraw_alert(alert("old", -91 * 86400))
    state.withdraw_alert(alert("new", 30))
    assert "old" not in {one.run_id for one in state.alerts()}


def test_inbox_counts_without_the_payloads(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state.inbox() == states.Inbox(0, None, None, None, 0)
    first, second = alert("a"), alert("b", 1, "retrain")
    state.take_alert(first, lambda: None)
    state.take_alert(second, lambda: None)
    assert state.inbox() == states.Inbox(2, first.received_at, None, "b", 0)
    state.settle_alert(first, "failed", "422")
    assert state.inbox() == states.Inbox(1, second.received_at, None, "b", 1)
    monkeypatch.setattr(states, "FAILED_SHOWN", timedelta(0))
    time.sleep(0.002)
    assert state.inbox().failed == 0


# --- which Airflow


def test_connect_takes_the_airflow_of_the_environment_or_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BALLAST_VAR", str(tmp_path))
    with pytest.raises(TryAgain, match="never started here"):
        embedded.connect()
    monkeypatch.setenv("BALLAST_AIRFLOW_URL", "https://airflow.example/")
    with pytest.raises(BallastError, match="BALLAST_AIRFLOW_USER or BALLAST_AIRFLOW_PASSWORD_FILE is not set"):
        embedded.connect()
    monkeypatch.setenv("BALLAST_AIRFLOW_USER", "bridge")
    monkeypatch.setenv("BALLAST_AIRFLOW_PASSWORD_FILE", str(tmp_path / "password"))
    with pytest.raises(TryAgain, match=r"cannot be read: .*No such file"):
        embedded.connect()
    (tmp_path / "password").write_text("secret\n")
    client = embedded.connect()
    assert (client.url, client._login) == ("https://airflow.example", {"username": "bridge", "password": "secret"})


def test_token_file_that_is_empty_is_refused_as_it_would_let_everybody_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("\n")
    monkeypatch.setenv("BALLAST_BRIDGE_TOKEN_FILE", str(file))
    with pytest.raises(BallastError, match=f"{file} is empty"):
        _token()
