from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipelines.dagruns import Airflow, Faulty, Refused
from pipelines.errors import TryAgain

RUN = {
    "dag_id": "monitor",
    "dag_run_id": "turn__1",
    "state": "running",
    "queued_at": "2026-01-01T00:00:00Z",
    "start_date": "2026-01-01T00:00:01Z",
    "end_date": None,
    "conf": {"as_of": "2013-05-01"},
}
RUNS = "/api/v2/dags/monitor/dagRuns"


class FakeAirflow:
    """Answers by method and path; a path that is not in its book is a 404, as Airflow's is. Tokens can be revoked."""

    def __init__(self) -> None:
        self.book: dict[tuple[str, str], tuple[int, Any]] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.token = 1
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, found = fake.answer(self.command, self.path, body, self.headers.get("Authorization"))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(found).encode())

            do_GET = do_POST = do_PATCH = answer  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, method: str, target: str, body: bytes, authorization: str | None) -> tuple[int, Any]:
        path = target.partition("?")[0]
        self.asked.append((method, target, json.loads(body) if body else None))
        if path == "/auth/token":
            return 201, {"access_token": f"token-{self.token}"}
        if authorization != f"Bearer token-{self.token}":
            return 401, {"detail": "Invalid token"}
        answers = self.book.get((method, path), (404, {"detail": "no such thing"}))
        return answers.pop(0) if isinstance(answers, list) else answers

    def targets(self, method: str) -> list[str]:
        return [target for asked, target, _ in self.asked if asked == method and target != "/auth/token"]


@pytest.fixture
def fake() -> Iterator[FakeAirflow]:
    made = FakeAirflow()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def airflow(fake: FakeAirflow) -> Airflow:
    return Airflow(fake.url, "admin", "secret")


def test_trigger_new_run_may_begin_at_once(fake: FakeAirflow, airflow: Airflow) -> None:
    fake.book["POST", RUNS] = (200, RUN)

    run = airflow.trigger("monitor", "turn__1", {"as_of": "2013-05-01"})

    body = fake.asked[-1][2]
    assert (run.run_id, run.state, run.over) == ("turn__1", "running", False)
    assert body["logical_date"] is None
    assert body["conf"] == {"as_of": "2013-05-01"}
    assert body["dag_run_id"] == "turn__1"


def test_trigger_known_run_is_returned_and_not_posted(fake: FakeAirflow, airflow: Airflow) -> None:
    fake.book["GET", f"{RUNS}/turn__1"] = (200, {**RUN, "state": "success"})

    assert airflow.trigger("monitor", "turn__1", {}).state == "success"
    assert fake.targets("POST") == []


def test_trigger_lost_race_returns_the_other_run(fake: FakeAirflow, airflow: Airflow) -> None:
    fake.book["GET", f"{RUNS}/turn__1"] = [(404, {}), (200, {**RUN, "state": "queued"})]  # type: ignore[assignment]
    fake.book["POST", RUNS] = (409, {"detail": "exists"})

    assert airflow.trigger("monitor", "turn__1", {}).state == "queued"


def test_call_token_ran_out_is_renewed(fake: FakeAirflow, airflow: Airflow) -> None:
    fake.book["GET", f"{RUNS}/turn__1"] = (200, RUN)
    airflow.run("monitor", "turn__1")
    fake.token = 2

    assert airflow.run("monitor", "turn__1").state == "running"


def test_call_wrong_password_is_refused_with_airflows_words(fake: FakeAirflow, airflow: Airflow) -> None:
    fake.token = -1
    fake.answer = lambda *_: (401, {"detail": "Invalid credentials"})  # type: ignore[method-assign]

    with pytest.raises(Refused, match="401 Invalid credentials"):
        airflow.dags()


def test_call_airflow_away_names_the_remedy() -> None:
    with pytest.raises(TryAgain, match=r"does not answer at http://127.0.0.1:9 .*make run"):
        Airflow("http://127.0.0.1:9", "admin", "secret").dags()


@pytest.mark.parametrize("answer", [b'{"cut": ', b""])
def test_call_answer_that_was_cut_short_is_to_be_tried_again(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TryAgain, match="does not answer"):
            Airflow(f"http://127.0.0.1:{server.getsockname()[1]}", "admin", "x").health()
        thread.join()


def test_call_error_of_airflows_own_is_to_be_tried_again(fake: FakeAirflow, airflow: Airflow) -> None:
    fake.book["GET", f"{RUNS}/turn__1"] = (500, {"detail": "database is locked"})

    with pytest.raises(Faulty, match="500 database is locked"):
        airflow.run("monitor", "turn__1")


def test_call_with_patience_asks_again(fake: FakeAirflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.dagruns.ASK_AGAIN_S", 0)
    fake.book["GET", f"{RUNS}/turn__1"] = [(500, {}), (503, {}), (200, RUN)]  # type: ignore[assignment]

    assert Airflow(fake.url, "admin", "secret", patience_s=60).run("monitor", "turn__1").state == "running"


def test_call_behind_a_proxy_of_the_shell_goes_direct(fake: FakeAirflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    fake.book["GET", f"{RUNS}/turn__1"] = (200, RUN)

    assert Airflow(fake.url, "admin", "secret").run("monitor", "turn__1").run_id == "turn__1"


def test_result_task_returned_nothing_is_none(airflow: Airflow, fake: FakeAirflow) -> None:
    fake.book["GET", f"{RUNS}/turn__1"] = (200, RUN)

    assert airflow.result(airflow.run("monitor", "turn__1"), "refused") is None


def test_tasks_come_in_the_order_they_began(airflow: Airflow, fake: FakeAirflow) -> None:
    def task(name: str, began: str | None) -> dict[str, Any]:
        return {"task_id": name, "state": None, "try_number": 1, "start_date": began, "end_date": None}

    fake.book["GET", f"{RUNS}/turn__1"] = (200, RUN)
    fake.book["GET", f"{RUNS}/turn__1/taskInstances"] = (
        200,
        {
            "task_instances": [
                task("drift", None),
                task("score", "2026-01-01T00:00:09Z"),
                task("land", "2026-01-01T00:00:02Z"),
            ]
        },
    )

    tasks = airflow.tasks(airflow.run("monitor", "turn__1"))

    assert [found.task_id for found in tasks] == ["land", "score", "drift"]


def test_started_by_while_a_run_is_queued_is_none(airflow: Airflow, fake: FakeAirflow) -> None:
    fake.book["GET", f"{RUNS}/turn__1"] = (200, RUN)
    run = airflow.run("monitor", "turn__1")
    fake.book["GET", "/api/v2/assets/events"] = (500, {"detail": "Internal Server Error"})
    assert airflow.started_by(run) is None

    fake.book["GET", "/api/v2/assets/events"] = (200, {"asset_events": []})
    assert airflow.started_by(run) == []


def test_started_by_coalesced_events_name_their_run_once(airflow: Airflow, fake: FakeAirflow) -> None:
    made = {"created_dagruns": [{"dag_id": "promote", "run_id": "asset__1+00:00"}]}
    fake.book["GET", f"{RUNS}/turn__1"] = (200, RUN)
    fake.book["GET", "/api/v2/assets/events"] = (200, {"asset_events": [made, made]})
    fake.book["GET", "/api/v2/dags/promote/dagRuns/asset__1%2B00%3A00"] = (200, {**RUN, "dag_id": "promote"})

    started = airflow.started_by(airflow.run("monitor", "turn__1"))

    assert [run.dag_id for run in started or ()] == ["promote"]
    assert "source_run_id=turn__1" in fake.targets("GET")[1]


def test_make_pool_changed_by_a_person_stays(airflow: Airflow, fake: FakeAirflow) -> None:
    fake.book["GET", "/api/v2/pools"] = (200, {"pools": [{"name": "training", "slots": 3}]})

    airflow.make_pool("training", 1, "")

    assert fake.targets("POST") == []
