"""What the alert bridge makes of a storm of alerts, and how long it takes from an alert's receipt to its run.

    python -m benchmarks.bridge [--rounds 3] [--threads 8] [--airflow-seconds 0.0]

The bridge runs as the process that it is, on a state store of its own. Airflow is played by a small HTTP server that
takes each run once and answers 409 after that; what a run takes there is set by ``--airflow-seconds``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import httpx

from pipelines import alerts
from pipelines.state import State

TOKEN = "a-token-long-enough"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
# `lost`: it makes the run and hangs up before it has said so; `hangs`: it says nothing until it is freed
Mode = Literal["up", "lost", "hangs", "away", "faulty", "refuses", "unknown", "broken"]
STATUS: dict[Mode, int] = {"away": 503, "faulty": 500, "refuses": 422, "unknown": 404, "broken": 400}


class FakeAirflow:
    """Takes runs as Airflow's REST API does: each id once, 409 after that. ``mode`` says how else it answers."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.mode: Mode = "up"
        self.seconds = seconds
        self.posts = 0
        self.runs: Counter[str] = Counter()  # by id, how often one was made
        self.at: dict[str, float] = {}  # when it was
        self.confs: dict[str, Any] = {}
        self.made: Callable[[], None] = lambda: None  # called once a run is made, before that is said
        self.freed = threading.Event()
        self._one = threading.Lock()
        self.open(0)
        self.url = f"http://127.0.0.1:{self.port}"

    def open(self, port: int) -> None:
        """Listen."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                status, answer = fake.take(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if not status:
                    self.close_connection = True
                    return
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port: int = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def take(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The status and body for a POST; status 0 hangs up."""
        if path == "/auth/token":
            return 201, {"access_token": "x"}
        time.sleep(self.seconds)
        with self._one:
            self.posts += 1
            mode, run_id = self.mode, body["dag_run_id"]
            if mode in ("up", "lost"):
                if self.runs[run_id]:
                    return 409, {"detail": "it is there already"}
                self.runs[run_id] += 1
                self.at[run_id], self.confs[run_id] = time.time(), body["conf"]
        if mode in ("up", "lost"):
            self.made()
            return (200, body) if mode == "up" else (0, {})
        if mode == "hangs":
            self.freed.wait(30)
        words = "Dag with dag_id: 'monitor' has import errors" if mode == "broken" else mode
        return STATUS.get(mode, 503), {"detail": words}

    def close(self) -> None:
        """Listen no more."""
        self.freed.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def airflow(seconds: float = 0.0) -> Iterator[FakeAirflow]:
    """A stand-in for Airflow."""
    fake = FakeAirflow(seconds)
    try:
        yield fake
    finally:
        fake.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Bridge:
    """The bridge as a process, with all that it lives on under ``root``; it may be killed and started again."""

    root: Path
    airflow_url: str
    port: int = field(default_factory=free_port)
    actions: str = "retrain,monitor"
    program: str = "from pipelines import bridge; bridge.main()"
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def state(self) -> State:
        """Its inbox."""
        return State(f"sqlite:///{self.root / 'state.db'}")

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http{'s' if self.cert else ''}://127.0.0.1:{self.port}"

    @property
    def cert(self) -> str | None:
        """The certificate that it shows, which is to be trusted."""
        return self.env.get("BALLAST_BRIDGE_TLS_CERT")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        for name, text in (("token", TOKEN), ("password", "secret")):
            (self.root / name).write_text(text)
        env = {name: value for name, value in os.environ.items() if not name.startswith("BALLAST_")} | {
            "BALLAST_STATE_URI": f"sqlite:///{self.root / 'state.db'}",
            "BALLAST_VAR": str(self.root),
            "BALLAST_BRIDGE_PORT": str(self.port),
            "BALLAST_BRIDGE_TOKEN_FILE": str(self.root / "token"),
            "BALLAST_BRIDGE_ACTIONS": self.actions,
            "BALLAST_AIRFLOW_URL": self.airflow_url,
            "BALLAST_AIRFLOW_USER": "admin",
            "BALLAST_AIRFLOW_PASSWORD_FILE": str(self.root / "password"),
            **self.env,
        }
        with (self.root / "bridge.log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-c", self.program], env=env, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The bridge does not start: {(self.root / 'bridge.log').read_text()[-2000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            verify = ssl.create_default_context(cafile=self.cert) if self.cert else True
            return httpx.get(f"{self.url}/healthz", trust_env=False, timeout=5, verify=verify).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it with no warning."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def resident_mib(self) -> float:
        """What it holds in memory."""
        assert self.process
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return int(found[1]) / 1024

    def settled(self, timeout_s: float = 60.0) -> None:
        """Wait until nothing waits for Airflow."""
        deadline = time.monotonic() + timeout_s
        while self.state.inbox().waiting:
            if time.monotonic() > deadline:
                raise TimeoutError(f"After {timeout_s} s there waits {self.state.inbox()}")
            time.sleep(0.05)


@contextmanager
def bridge(root: Path, airflow_url: str, **more: Any) -> Iterator[Bridge]:
    """A bridge that runs."""
    one = Bridge(root, airflow_url, **more)
    try:
        one.start()
        yield one
    finally:
        one.kill()


# --- the storm


def firing(fingerprint: str, status: str = "firing", action: str = "monitor") -> dict[str, Any]:
    """One alert of Alertmanager's."""
    labels = {"alertname": "PerformanceDropped", "severity": "page", "ballast_action": action}
    told = {"labels": labels, "annotations": {"summary": "the model is worse"}, "startsAt": "2013-05-01T00:00:00Z"}
    return {"status": status, "fingerprint": fingerprint, **told}


def delivery(*alerts: dict[str, Any]) -> dict[str, Any]:
    """Alertmanager's webhook."""
    return {"version": "4", "receiver": "ballast", "alerts": list(alerts)}


Post = tuple[str, bytes, dict[str, str]]  # path, body, headers


class Storm:
    """560 alerts and 155 requests that say nothing valid, and what must come of each whichever comes first."""

    def __init__(self, prefix: str, retrains: int) -> None:
        self.tasks: list[list[Post]] = []  # the posts of a task go in their order, the tasks in any
        self.alerts: Counter[str] = Counter()  # by outcome
        self.requests: Counter[int] = Counter()  # by status
        self.runs: set[str] = set()  # those of the retrainings left out: which one is first is luck
        self._new(prefix)
        self._again(prefix)
        self._resolved(prefix)
        self._asked(prefix, retrains)
        self._refused(prefix)
        random.Random(1).shuffle(self.tasks)

    def _send(self, status: int, *posts: Post, **outcomes: int) -> None:
        self.tasks.append(list(posts))
        self.requests[status] += len(posts)
        self.alerts.update(outcomes)

    def _new(self, prefix: str) -> None:
        for name in _names(prefix):
            self.runs.add(f"alert-{name}-20130501T000000Z")
            self._send(202, post(delivery(firing(name))), accepted=1)

    def _again(self, prefix: str) -> None:
        """Each may come before its first delivery, which then is the repetition: the sum is the same."""
        names = _names(prefix)
        for name in names[:50]:
            self._send(202, post(delivery(firing(name))), known=1)
        for first in range(0, 150, 5):
            self._send(202, post(delivery(*map(firing, names[first : first + 5]))), known=5)

    def _resolved(self, prefix: str) -> None:
        """Its end first, then its firing, late, and once more twice."""
        for number in range(30):
            late = f"{prefix}late{number}"
            firings = post(delivery(firing(late))), post(delivery(firing(late), firing(late)))
            self._send(202, post(delivery(firing(late, "resolved"))), *firings, withdrawn=1, known=3)

    def _asked(self, prefix: str, retrains: int) -> None:
        for number in range(20):
            asked = {"action": "monitor", "source": "ci", "key": f"{prefix}{number}", "reason": "new features"}
            self.runs.add(alerts.trigger_id("ci", f"{prefix}{number}"))
            self._send(202, post(asked, path="/trigger"), post(asked, path="/trigger"), accepted=1, known=1)
        for number in range(10):
            self._send(202, post(delivery(firing(f"{prefix}retrain{number}", action="retrain"))))
        self.alerts.update(accepted=retrains, held=10 - retrains)

    def _refused(self, prefix: str) -> None:
        for number in range(20):
            action = "rollback" if number % 2 else "rm -rf"
            self._send(202, post(delivery(firing(f"{prefix}bad{number}", action=action))), refused_action=1)
            mute = firing(f"{prefix}mute{number}")
            del mute["labels"]["ballast_action"]
            self._send(202, post(delivery(mute)), ignored=1)
        whole = json.dumps(delivery(firing(f"{prefix}never"))).encode()
        for number in range(40):
            self._send(422, post(whole[: number * len(whole) // 41]))
            wrong = {"Authorization": "Bearer wrong-token-long-enough"}
            self._send(401, post(whole, {} if number % 2 else wrong))
        for _ in range(70):
            self._send(422, post({**delivery(firing(f"{prefix}never")), "version": "3"}))
        for _ in range(5):
            self._send(413, post(whole + b" " * 2 * 1024**2))


def post(body: Any, headers: dict[str, str] | None = None, path: str = "/alertmanager") -> Post:
    """A request with the right token, unless other headers are given."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return path, content, {"Content-Type": "application/json", **(BEARER if headers is None else headers)}


def _names(prefix: str) -> list[str]:
    return [f"{prefix}{number:03}" for number in range(150)]


@dataclass
class Outcome:
    """What came of a storm."""

    alerts: Counter[str] = field(default_factory=Counter)
    requests: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # that a request took


def unleash(storm: Storm, url: str, threads: int = 8) -> Outcome:
    """Send it from several threads at once."""
    found = Outcome()

    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client, ThreadPoolExecutor(threads) as pool:

        def work(task: list[Post]) -> None:
            for path, body, headers in task:
                began = time.monotonic()
                answer = client.post(path, content=body, headers=headers)
                found.seconds.append(time.monotonic() - began)
                found.requests.update([answer.status_code])
                if answer.status_code == 202:
                    found.alerts.update(one["outcome"] for one in answer.json()["alerts"])

        list(pool.map(work, storm.tasks))
    return found


def queued_seconds(state: State, fake: FakeAirflow) -> list[float]:
    """From an alert's receipt to its run being made, of each run."""
    received = {alert.run_id: datetime.fromisoformat(alert.received_at).timestamp() for alert in state.alerts()}
    return [at - received[run_id] for run_id, at in fake.at.items()]


def spread(seconds: list[float]) -> str:
    """Median, 99th percentile and largest."""
    ordered = sorted(seconds)
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return f"p50 {ordered[len(ordered) // 2]:.3f} s, p99 {p99:.3f} s, max {ordered[-1]:.3f} s"


def calm(one: Bridge, fake: FakeAirflow, alerts_sent: int = 50) -> list[float]:
    """The seconds from receipt to run of alerts that come one by one, five a second."""
    before = set(fake.at)
    for number in range(alerts_sent):
        path, body, headers = post(delivery(firing(f"calm{number}")))
        httpx.post(one.url + path, content=body, headers=headers, trust_env=False).raise_for_status()
        time.sleep(0.2)
    one.settled()
    received = {alert.run_id: datetime.fromisoformat(alert.received_at).timestamp() for alert in one.state.alerts()}
    return [at - received[run_id] for run_id, at in fake.at.items() if run_id not in before]


def main() -> None:
    """Print what was sent and what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridge")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--airflow-seconds", type=float, default=0.0, help="that Airflow takes for a run")
    options = parser.parse_args()
    with TemporaryDirectory() as root, airflow(options.airflow_seconds) as fake, bridge(Path(root), fake.url) as one:
        print(f"one by one, {50} alerts: receipt to run {spread(calm(one, fake))}")
        fake.at.clear()
        for number in range(options.rounds):
            storm, began, runs = Storm(f"r{number}x", int(number == 0)), time.monotonic(), len(fake.runs)
            found = unleash(storm, one.url, options.threads)
            sent = time.monotonic() - began
            one.settled(300)
            _show(number + 1, storm, found, len(fake.runs) - runs)
            print(f"  sent in {sent:.1f} s by {options.threads} threads; an answer took {spread(found.seconds)}")
            print(f"  receipt to run {spread(queued_seconds(one.state, fake))}; bridge {one.resident_mib():.0f} MiB")
            fake.at.clear()


def _show(number: int, storm: Storm, found: Outcome, runs: int) -> None:
    print(f"storm {number}: {found.requests.total()} requests, {found.alerts.total()} alerts in those that were valid")
    for title, needed, got in (("answered", storm.requests, found.requests), ("alerts", storm.alerts, found.alerts)):
        sent, came = ({str(name): count for name, count in one.items()} for one in (needed, got))
        for name in sorted(sent | came):
            wrong = "" if sent.get(name) == came.get(name) else f"  WRONG: {sent.get(name, 0)} expected"
            print(f"  {title:<9} {name:<15} {came.get(name, 0):>5}{wrong}")
    expected = storm.alerts["accepted"]
    print(f"  {'runs':<9} {'started':<15} {runs:>5}{'' if runs == expected else f'  WRONG: {expected} expected'}")


if __name__ == "__main__":
    main()
