"""Notifications of real DAG runs to real receivers on this machine: a web server and a mail server."""

from __future__ import annotations

import json
import socket
import socketserver
import sys
from collections.abc import Callable, Iterator
from email import message_from_string, policy
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from test_operators import PINNED, Pipeline, decided

import ballast_notify
from ballast_notify import EVENTS, callbacks

pytestmark = [
    pytest.mark.usefixtures("airflow_database"),
    pytest.mark.filterwarnings("default"),  # Airflow's in-process API server warns of its own libraries
]

DAGS = Path(__file__).resolve().parents[2] / "dags"


class Slack(BaseHTTPRequestHandler):
    """Takes what a Slack webhook takes; answers as it is told."""

    posts: list[str]
    status: int

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).posts.append(json.loads(body)["text"])
        self.send_response(type(self).status)
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None: ...


class Mail(socketserver.StreamRequestHandler):
    """As much of SMTP as one letter needs."""

    letters: list[Any]

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline().decode().strip():
            if line.upper() == "DATA":
                self.wfile.write(b"354 go on\r\n")
                text = "".join(iter(lambda: self.rfile.readline().decode(), ".\r\n"))
                type(self).letters.append(message_from_string(text, policy=policy.default))
            if line.upper() == "QUIT":
                self.wfile.write(b"221 bye\r\n")
                return
            self.wfile.write(b"250 well\r\n")


@pytest.fixture
def slack() -> Iterator[type[Slack]]:
    class Here(Slack):
        posts: list[str] = []  # noqa: RUF012
        status = 200
        port = 0

    with HTTPServer(("127.0.0.1", 0), Here) as server:
        Here.port = server.server_port
        Thread(target=server.serve_forever, daemon=True).start()
        yield Here
        server.shutdown()


@pytest.fixture
def mail() -> Iterator[type[Mail]]:
    class Here(Mail):
        letters: list[Any] = []  # noqa: RUF012
        port = 0

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Here) as server:
        server.daemon_threads = True
        Here.port = server.server_address[1]
        Thread(target=server.serve_forever, daemon=True).start()
        yield Here
        server.shutdown()


Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slack: Any, mail: Any) -> Run:
    """Run a DAG for real with both receivers set; what each step says comes from a script."""
    pipeline = Pipeline(tmp_path)
    hook = {"conn_type": "slackwebhook", "password": f"http://127.0.0.1:{slack.port}/services/T/B/X"}
    letters = {"conn_type": "smtp", "host": "127.0.0.1", "port": mail.port}
    extra = {"disable_ssl": True, "disable_tls": True, "from_email": "ballast@example.com"}
    monkeypatch.setenv("AIRFLOW_CONN_CHAT", json.dumps(hook))
    monkeypatch.setenv("AIRFLOW_CONN_LETTERS", json.dumps({**letters, "extra": extra}))
    monkeypatch.setenv("BALLAST_NOTIFY_SLACK_CONN", "chat")
    monkeypatch.setenv("BALLAST_NOTIFY_SMTP_CONN", "letters")
    monkeypatch.setenv("BALLAST_NOTIFY_MAIL_TO", "team@example.com")

    def run(name: str, conf: dict[str, Any] | None = None, **steps: Any) -> Any:
        from airflow.dag_processing.dagbag import DagBag

        for module in ("ballast_chain", "ballast_notify"):  # the environment is read where a DAG file is parsed
            monkeypatch.delitem(sys.modules, module, raising=False)
        pipeline.tell(**steps)
        dag = DagBag(str(DAGS / f"{name}.py")).dags[name]
        for task in dag.tasks:
            task.retries = 0
        step = next(task for task in dag.tasks if hasattr(task, "step"))
        monkeypatch.setattr(sys.modules[type(step).__module__], "PROJECT", pipeline.root)
        return dag.test(logical_date=None, run_conf=conf or {})

    return run


MOVED = {"version": 3, "moved": True}
PAUSED = {**PINNED["result"], "verdict": "pause", "summary": "PAUSED <3 of 3>"}
CHALLENGER = {"version": 3, "record_sha256": "ab"}
TOLD: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    ("refusal", "retrain_on_alert", {}, decided("refuse"), "words"),
    ("breaker", "retrain_on_alert", {}, {**decided("promote"), "admit": {"result": PAUSED}}, "PAUSED <3 of 3>"),
    (
        "promotion",
        "promote",
        CHALLENGER,
        {
            "review": {"result": {**MOVED, "verdict": "promote", "summary": "needs no approval"}},
            "promote": {"result": {**MOVED, "verdict": "promoted", "summary": "champion: v2 → v3"}},
        },
        "champion: v2 → v3",
    ),
    (
        "rollback",
        "rollback",
        {"reason": "it is odd"},
        {"rollback": {"result": {"summary": "champion: v3 → v2 · rolled back: it is odd"}}},
        "champion: v3 → v2 · rolled back: it is odd",
    ),
    (
        "failure",
        "retrain_on_alert",
        {},
        {**decided("promote"), "validate": {"code": 65, "error": "no rows"}},
        "validate rejected the data: no rows",
    ),
]


@pytest.mark.parametrize(("event", "name", "conf", "steps", "words"), TOLD, ids=[told[0] for told in TOLD])
def test_notification_tells_both_receivers_once_what_happened(
    run: Run, slack: Any, mail: Any, event: str, name: str, conf: dict[str, Any], steps: dict[str, Any], words: str
) -> None:
    dag_run = run(name, conf, **steps)
    (post,), (letter,) = slack.posts, mail.letters
    title = f"Ballast · {EVENTS[event]} · {name}" + (".validate" if event == "failure" else "")
    lines = post.splitlines()
    assert lines[0] == f"*{title}*"
    assert lines[1:3] == [words.replace("<", "&lt;").replace(">", "&gt;"), f"Run {dag_run.run_id}"]
    assert f"/dags/{name}/runs/" in lines[3]
    assert (letter["subject"], letter["to"], letter["from"]) == (title, "team@example.com", "ballast@example.com")
    body = letter.get_body().get_content()
    assert words.replace("<", "&lt;").replace(">", "&gt;") in body


def test_notification_of_a_passed_challenger_is_left_to_its_promotion(run: Run, slack: Any, mail: Any) -> None:
    assert run("retrain_on_alert", **decided("promote")).state == "success"
    assert (slack.posts, mail.letters) == ([], [])


def test_notification_only_of_the_events_that_are_wanted(run: Run, slack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLAST_NOTIFY_EVENTS", "promotion, failure")
    run("retrain_on_alert", **decided("refuse"))
    assert slack.posts == []


@pytest.mark.parametrize("fault", ["refuses", "gone", "no connection"])
def test_notification_that_is_not_taken_leaves_the_run_green_and_tells_the_other(
    run: Run, slack: Any, mail: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "refuses":
        slack.status = 500
    if fault == "gone":
        with socket.create_server(("127.0.0.1", 0)) as closed:
            gone = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        monkeypatch.setenv("AIRFLOW_CONN_CHAT", json.dumps({"conn_type": "slackwebhook", "password": gone}))
    if fault == "no connection":
        monkeypatch.setenv("BALLAST_NOTIFY_SLACK_CONN", "nobody_made_it")
    assert run("retrain_on_alert", **decided("refuse")).state == "success"
    assert len(mail.letters) == 1
    assert len(slack.posts) == (1 if fault == "refuses" else 0)


def test_notification_waits_for_no_mail_server_longer_than_its_patience(
    run: Run, slack: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        deaf = {"conn_type": "smtp", "host": "127.0.0.1", "port": silent.getsockname()[1]}
        extra = {"disable_ssl": True, "disable_tls": True, "from_email": "b@example.com", "timeout": 3000}
        monkeypatch.setenv("AIRFLOW_CONN_LETTERS", json.dumps({**deaf, "extra": extra}))
        monkeypatch.setattr(ballast_notify, "PATIENCE_S", 0.2)
        notifier = ballast_notify.BallastNotifier("", "letters", "team@example.com", frozenset(EVENTS))
        ti = SimpleNamespace(state="failed", task_id="land", task=SimpleNamespace(), log_url="")
        context: Any = {"ti": ti, "dag_run": SimpleNamespace(dag_id="d", run_id="r"), "exception": ValueError("odd")}
        notifier.notify(context)
    assert slack.posts == []
    assert "The notification by e-mail was not sent (AirflowException: Unable to connect" in capsys.readouterr().out


def test_notifications_are_off_until_a_receiver_is_named() -> None:
    assert callbacks({}) == []
    assert callbacks({"BALLAST_NOTIFY_EVENTS": "promotion"}) == []
    (both,) = callbacks({"BALLAST_NOTIFY_SLACK_CONN": "chat"})
    assert both.wanted == frozenset(EVENTS)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"BALLAST_NOTIFY_SMTP_CONN": "letters"}, "BALLAST_NOTIFY_MAIL_TO is '': set both, or neither"),
        ({"BALLAST_NOTIFY_EVENTS": "promotions"}, r"may name promotion, .* \(found promotions\)"),
    ],
)
def test_notifications_half_set_are_an_error_that_names_the_setting(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        callbacks(environment)
