"""Airflow's REST API: start, follow and clear DAG runs, and read what their tasks said and returned."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from http.client import HTTPException
from itertools import count
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import ProxyHandler, Request, build_opener

from pipelines.errors import BallastError, TryAgain

TIMEOUT_S = 20.0
ASK_AGAIN_S = 0.5
ACTIVE = ("queued", "running")
ENDED = ("success", "failed")
PAGE = 100  # Airflow's own limit for a page


class Refused(BallastError):
    """Airflow answered, and said no."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Faulty(TryAgain):
    """Airflow answered with an error of its own (5xx)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Run:
    """One DAG run."""

    dag_id: str
    run_id: str
    state: str
    queued: datetime | None
    started: datetime | None
    ended: datetime | None
    conf: Mapping[str, Any]

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.state in ENDED


@dataclass(frozen=True)
class Task:
    """One task of a DAG run, as its last try stands."""

    task_id: str
    state: str | None
    try_number: int
    started: datetime | None
    ended: datetime | None

    @property
    def seconds(self) -> float:
        """How long the try took, or has taken so far."""
        if self.started is None:
            return 0.0
        return ((self.ended or datetime.now(UTC)) - self.started).total_seconds()


class Airflow:
    """A client of one Airflow. Raises TryAgain where it does not answer, Refused where it says no.

    With ``patience_s`` it asks again for so long before it gives up on a question (never on a command).
    """

    def __init__(self, url: str, user: str, password: str, patience_s: float = 0.0) -> None:
        self.url = url.rstrip("/")
        self._patience_s = patience_s
        self._login = {"username": user, "password": password}
        self._token: str | None = None
        self._open = build_opener(ProxyHandler({})).open  # no proxy: a proxy of the shell's cannot reach this machine

    def health(self) -> dict[str, Any]:
        """Each component's status and last heartbeat; needs no login."""
        return self._send("GET", "/api/v2/monitor/health", None, {})

    def wake_execution_api(self) -> None:
        """Let the API that tasks talk to build itself: it does so at its first request, and a task would wait 2 s."""
        self._patiently(lambda: self._send("GET", "/execution/health", None, {}))

    def dags(self) -> list[dict[str, Any]]:
        """Every DAG that was parsed, as Airflow describes it."""
        found: list[dict[str, Any]] = self._get("/dags", limit=PAGE)["dags"]
        return found

    def import_errors(self) -> list[dict[str, Any]]:
        """The DAG files that do not import, each with ``filename``, ``stack_trace`` and ``timestamp``."""
        found: list[dict[str, Any]] = self._get("/importErrors", limit=PAGE)["import_errors"]
        return found

    def plugin_errors(self) -> dict[str, str]:
        """The plugins that do not import, each with what is wrong; read once, when Airflow starts."""
        return {error["source"]: error["error"] for error in self._get("/plugins/importErrors")["import_errors"]}

    def make_pool(self, name: str, slots: int, description: str) -> None:
        """Make a pool unless there is one of this name; one that a person has changed stays as it is."""
        if name not in [pool["name"] for pool in self._get("/pools", limit=PAGE)["pools"]]:
            self._call("POST", "/pools", {"name": name, "slots": slots, "description": description})

    def set_paused(self, dag_id: str, paused: bool) -> None:
        """Pause a DAG or let it run: a paused one runs nothing, not even what a person starts."""
        self._call("PATCH", f"/dags/{quote(dag_id)}", {"is_paused": paused})

    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, Any]) -> Run:
        """Start a run; the one that has this id already is returned as it is."""
        if known := self.find(dag_id, run_id):
            return known
        made = self.queue(dag_id, run_id, conf)
        return _run(made) if made else self.run(dag_id, run_id)

    def queue(self, dag_id: str, run_id: str, conf: Mapping[str, Any]) -> dict[str, Any] | None:
        """Start a run in one call; None if there is one of this id already."""
        # SQLite's clock counts whole seconds, so the scheduler would let a run that may begin "now" wait for the next.
        run_after = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        body = {"dag_run_id": run_id, "logical_date": None, "run_after": run_after, "conf": dict(conf)}
        try:
            return self._call("POST", f"/dags/{quote(dag_id)}/dagRuns", body)
        except Refused as refusal:
            if refusal.status != HTTPStatus.CONFLICT:  # someone else was faster
                raise
            return None

    def run(self, dag_id: str, run_id: str) -> Run:
        """One run as it stands."""
        return _run(self._get(_path(dag_id, run_id)))

    def find(self, dag_id: str, run_id: str) -> Run | None:
        """One run as it stands, None if there is none of this id."""
        found = self._find(_path(dag_id, run_id))
        return _run(found) if found else None

    def last_run(self, dag_id: str) -> Run | None:
        """The run of a DAG that was begun last."""
        runs = self._get(f"/dags/{quote(dag_id)}/dagRuns", limit=1, order_by="-run_after")["dag_runs"]
        return _run(runs[0]) if runs else None

    def runs(self, states: Sequence[str], dag_id: str = "~", limit: int = PAGE) -> list[Run]:
        """The newest runs in one of these states, of all DAGs unless one is named; those that ended last come first."""
        query = {"state": list(states), "limit": limit, "order_by": "-end_date"}
        return [_run(fields) for fields in self._get(f"/dags/{quote(dag_id)}/dagRuns", **query)["dag_runs"]]

    def ended(self, dag_id: str) -> Iterator[Run]:
        """The runs of a DAG that have ended, those that ended last first, by the page; none if there is no such DAG."""
        path, query = f"/dags/{quote(dag_id)}/dagRuns", {"state": ENDED, "limit": PAGE, "order_by": "-end_date"}
        for offset in count(0, PAGE):
            page = (self._find(path, **query, offset=offset) or {"dag_runs": []})["dag_runs"]
            yield from map(_run, page)
            if len(page) < PAGE:
                return

    def failures(self, task_id: str) -> list[str]:
        """The DAGs of the instances of a task that are failed now, one entry each."""
        path = "/dags/~/dagRuns/~/taskInstances"
        found = self._get(path, task_id=task_id, state="failed", limit=PAGE)["task_instances"]
        return [fields["dag_id"] for fields in found]

    def tasks(self, run: Run) -> list[Task]:
        """The tasks of a run in the order in which they were begun; those that have not begun come last."""
        found = self._get(f"{_path(run.dag_id, run.run_id)}/taskInstances", limit=PAGE)["task_instances"]
        tasks = [_task(fields) for fields in found]
        return sorted(tasks, key=lambda task: task.started or datetime.max.replace(tzinfo=UTC))

    def result(self, run: Run, task_id: str) -> Any:
        """What a task returned (its XCom), None if it returned nothing."""
        path = f"{_path(run.dag_id, run.run_id)}/taskInstances/{quote(task_id)}/xcomEntries/return_value"
        found = self._find(path)
        return found["value"] if found else None

    def log(self, run: Run, task: Task) -> list[dict[str, Any]]:
        """The log of a task's last try, one dictionary an event (``event``, ``level``, ``logger``, ...)."""
        path = f"{_path(run.dag_id, run.run_id)}/taskInstances/{quote(task.task_id)}/logs/{task.try_number}"
        content = self._get(path, full_content="true")["content"]
        return [event for event in content if isinstance(event, dict)]

    def answer(self, dag_id: str, run_id: str, task_id: str, option: str) -> None:
        """Answer the form of a task that waits for a person; one that was answered before stays as it is."""
        path = f"{_path(dag_id, run_id)}/taskInstances/{quote(task_id)}/-1/hitlDetails"
        try:
            self._call("PATCH", path, {"chosen_options": [option]})
        except Refused as refusal:
            if refusal.status != HTTPStatus.CONFLICT:
                raise

    def clear(self, run: Run) -> Run:
        """Let a failed run go on from its failed tasks; what is done stays done."""
        self._call("POST", f"{_path(run.dag_id, run.run_id)}/clear", {"dry_run": False, "only_failed": True})
        return self.run(run.dag_id, run.run_id)

    def started_by(self, run: Run) -> list[Run] | None:
        """The runs that were started by asset events of this run; None while one of them is queued.

        Airflow 3.3 answers 500 for an event one of whose runs has not begun: it insists on a start date.
        """
        try:
            query = urlencode({"limit": PAGE, "source_dag_id": run.dag_id, "source_run_id": run.run_id})
            events = self._call("GET", f"/assets/events?{query}")
        except Faulty:
            return None
        created = {
            (made["dag_id"], made["run_id"]) for event in events["asset_events"] for made in event["created_dagruns"]
        }
        return [self.run(*made) for made in sorted(created)]

    def page(self, run: Run, task: Task | None = None) -> str:
        """The page of a run, or of one of its tasks, for a person's browser."""
        tail = f"/tasks/{quote(task.task_id)}" if task else ""
        return f"{self.url}/dags/{quote(run.dag_id)}/runs/{quote(run.run_id)}{tail}"

    def _get(self, path: str, **query: object) -> dict[str, Any]:
        return self._patiently(lambda: self._call("GET", f"{path}?{urlencode(query, doseq=True)}" if query else path))

    def _find(self, path: str, **query: object) -> dict[str, Any] | None:
        """What is there; None if there is no such thing."""
        try:
            return self._get(path, **query)
        except Refused as refusal:
            if refusal.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    def _patiently(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Ask, and ask again while our patience lasts."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return ask()
            except TryAgain:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(ASK_AGAIN_S)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call the API; a token that has run out is renewed once."""
        for last in (False, True):
            try:
                return self._send(method, f"/api/v2{path}", body, {"Authorization": f"Bearer {self._log_in()}"})
            except Refused as refusal:
                if last or refusal.status != HTTPStatus.UNAUTHORIZED:
                    raise
                self._token = None
        raise AssertionError("unreachable")

    def _log_in(self) -> str:
        if self._token is None:
            try:
                self._token = str(self._send("POST", "/auth/token", self._login, {})["access_token"])
            except Refused as refusal:  # however it says so: it knows us not, and has not judged what we came with
                raise Refused(str(refusal), HTTPStatus.UNAUTHORIZED) from None
        return self._token

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, headers: dict[str, str]) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json", **headers}, method=method)
        try:
            with self._open(request, timeout=TIMEOUT_S) as answer:
                found: dict[str, Any] = json.loads(answer.read())
                return found
        except HTTPError as error:
            words = f"{method} {path}: {error.code} {_detail(error)}"
            if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise Faulty(f"Airflow failed to answer {words}", error.code) from None
            raise Refused(f"Airflow refused {words}", error.code) from None
        except (OSError, HTTPException, ValueError) as error:  # away, or ended in the middle of its answer
            reason = getattr(error, "reason", error)
            raise TryAgain(f"Airflow does not answer at {self.url} ({reason}). `make run` starts it.") from None


def _path(dag_id: str, run_id: str) -> str:
    return f"/dags/{quote(dag_id)}/dagRuns/{quote(run_id)}"


def _run(fields: Mapping[str, Any]) -> Run:
    return Run(
        dag_id=fields["dag_id"],
        run_id=fields["dag_run_id"],
        state=fields["state"],
        queued=_time(fields["queued_at"]),
        started=_time(fields["start_date"]),
        ended=_time(fields["end_date"]),
        conf=fields["conf"] or {},
    )


def _task(fields: Mapping[str, Any]) -> Task:
    return Task(
        task_id=fields["task_id"],
        state=fields["state"],
        try_number=fields["try_number"],
        started=_time(fields["start_date"]),
        ended=_time(fields["end_date"]),
    )


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _detail(error: HTTPError) -> str:
    """What Airflow says of a refusal; its own words where it gives any."""
    text = error.read().decode(errors="replace")
    try:
        detail = json.loads(text).get("detail", text)
    except (ValueError, AttributeError):
        detail = text
    return str(detail)[:300]
