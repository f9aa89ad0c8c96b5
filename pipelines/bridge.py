"""The alert bridge: Alertmanager's webhook and generic senders on one side, Airflow's runs on the other.

``python -m pipelines.bridge``. A request is answered once what it asks for is in the state store; a thread of its own
brings it to Airflow, and tries again for as long as that is away. Settings come from the environment: docs/alerts.md.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from pipelines import alerts, embedded
from pipelines.dagruns import Airflow, Refused
from pipelines.errors import BallastError, exit_with
from pipelines.freeze import freeze
from pipelines.state import Alert, State, frozen

MOST_BYTES = 2 * 1024**2
LEAST_TOKEN = 16
MOST_WAIT_S = 15.0
LOOK_AGAIN_S = 5.0  # without being woken: what another process has left, or a clock that was set
DAGS = {"retrain": "retrain_on_alert", "monitor": "monitor", "rollback": "rollback"}
HOPELESS = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)
Body = TypeVar("Body", bound=BaseModel)
log = logging.getLogger(__name__)


class Counters:
    """What the bridge tells Prometheus, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.deliveries = self._counter("deliveries", "Requests by the status they were answered with.", "status")
        self.alerts = self._counter("alerts", "Alerts by what became of them on receipt.", "outcome")
        self.started = self._counter("runs_started", "Runs that Airflow has taken, by action.", "action")
        self.failed = self._counter("runs_failed", "Alerts that Airflow has refused for good, by action.", "action")
        name, words = "ballast_bridge_queued_seconds", "Seconds from an alert's receipt to its run being queued."
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 3600)
        self.seconds = Histogram(name, words, registry=self.registry, buckets=buckets)
        self.waiting = self._gauge("inbox_waiting", "Alerts that wait for Airflow.")
        self.oldest = self._gauge(
            "inbox_oldest_age_seconds", "Age of the alert that has waited longest; 0 without one."
        )
        self.reachable = self._gauge("airflow_reachable", "Whether Airflow answered when last asked; 1 at the start.")
        self.reachable.set(1)

    def _counter(self, name: str, words: str, label: str) -> Counter:
        return Counter(f"ballast_bridge_{name}", words, [label], registry=self.registry)

    def _gauge(self, name: str, words: str) -> Gauge:
        return Gauge(f"ballast_bridge_{name}", words, registry=self.registry)


class Courier(threading.Thread):
    """Brings what waits in the inbox to Airflow. One thread: no alert is ever posted twice at the same time."""

    def __init__(self, state: State, connect: Callable[[], Airflow], counters: Counters) -> None:
        super().__init__(name="courier", daemon=True)
        self._state, self._connect, self._counters = state, connect, counters
        self._airflow: Airflow | None = None
        self._ended = False
        self.woken = threading.Event()

    def run(self) -> None:
        """Work until ``end``."""
        while not self._ended:
            self.woken.clear()
            pause = LOOK_AGAIN_S
            try:
                pause = self._round()
            except Exception:  # it must outlive everything: alerts wait for it
                log.exception("A round of deliveries broke off; the next one tries again")
            self.woken.wait(pause)

    def end(self) -> None:
        """End after the delivery in hand."""
        self._ended = True
        self.woken.set()

    def _round(self) -> float:
        """Deliver all that is due; return the seconds until something else is."""
        for alert in self._state.alerts("waiting"):
            if not self._ended and (alert.next_at or "") <= _now():
                self._deliver(alert)
        later = [_seconds_since(alert.next_at) for alert in self._state.alerts("waiting") if alert.next_at]
        return min([LOOK_AGAIN_S, *(max(0.05, -seconds) for seconds in later)])

    def _deliver(self, alert: Alert) -> None:
        try:
            status, words = self._freeze(alert) if alert.action == "freeze" else self._post(alert)
        except Refused as refusal:
            if refusal.status in HOPELESS:
                log.error("%s is given up: %s", alert.run_id, refusal)
                self._state.settle_alert(alert, "failed", str(refusal))
                self._counters.failed.labels(alert.action).inc()
                return
            self._postpone(alert, refusal)
        except Exception as error:  # Airflow away, or an answer that is none: the same to who waits
            self._counters.reachable.set(0)
            self._postpone(alert, error)
        else:
            self._state.settle_alert(alert, status, words)
            self._counters.started.labels(alert.action).inc()
            self._counters.seconds.observe(_seconds_since(alert.received_at))

    def _post(self, alert: Alert) -> tuple[str, str]:
        self._airflow = self._airflow or self._connect()
        told = alert.payload
        conf = {"reason": told["reason"], "alert": {**told, "id": alert.run_id, "received_at": alert.received_at}}
        if alert.action != "rollback":
            conf["as_of"] = told["as_of"]
        dag = DAGS[alert.action]
        made = self._airflow.queue(dag, alert.run_id, conf)
        self._counters.reachable.set(1)
        return "started", f"{dag}/{alert.run_id} {'was queued' if made else 'was there already'}"

    def _freeze(self, alert: Alert) -> tuple[str, str]:
        if frozen(self._state.ledger()):
            return "done", "promotion was frozen already"
        return "done", str(freeze(self._state, alert.payload["reason"], f"alert/{alert.run_id}")["summary"])

    def _postpone(self, alert: Alert, error: Exception) -> None:
        self._airflow = None  # its address or password may have changed: read them anew
        wait = min(MOST_WAIT_S, 0.25 * 2 ** min(alert.tries, 10))
        log.warning("%s is tried again in %.1f s: %s", alert.run_id, wait, error)
        self._state.postpone_alert(alert, timedelta(seconds=wait), f"try {alert.tries + 1}: {error}"[:1000])


def make_app(
    token: str, actions: frozenset[str], connect: Callable[[], Airflow], state: State | None = None
) -> FastAPI:
    """The bridge as an ASGI app; its courier lives as long as it does."""
    if len(token) < LEAST_TOKEN:
        raise BallastError(f"The bridge's token must have at least {LEAST_TOKEN} characters (found {len(token)}).")
    state, counters = state or State(), Counters()
    courier = Courier(state, connect, counters)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        courier.start()
        yield
        courier.end()

    app = FastAPI(title="Ballast's alert bridge", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)

    async def answer(request: Request, model: type[Body], take: Callable[[Body], list[dict[str, str]]]) -> Response:
        response = await _answer(request, token, model, take)
        counters.deliveries.labels(str(response.status_code)).inc()
        return response

    def count(taken: list[dict[str, str]]) -> list[dict[str, str]]:
        for one in taken:
            counters.alerts.labels(one["outcome"]).inc()
        courier.woken.set()
        return taken

    @app.post("/alertmanager", status_code=202, openapi_extra=_documented(alerts.Delivery), responses=ANSWERS)
    async def alertmanager(request: Request) -> Response:
        return await answer(request, alerts.Delivery, lambda delivery: count(alerts.take(state, delivery, actions)))

    @app.post("/trigger", status_code=202, openapi_extra=_documented(alerts.Trigger), responses=ANSWERS)
    async def trigger(request: Request) -> Response:
        return await answer(request, alerts.Trigger, lambda asked: count([alerts.take_trigger(state, asked, actions)]))

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok" if courier.is_alive() else "the courier has ended"}

    @app.get("/metrics")
    def metrics() -> Response:
        waiting = state.alerts("waiting")
        counters.waiting.set(len(waiting))
        counters.oldest.set(_seconds_since(waiting[0].received_at) if waiting else 0)
        return Response(generate_latest(counters.registry), media_type=CONTENT_TYPE_LATEST)

    return app


ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"description": words}
    for status, words in {
        400: "The body broke off, or the media type is another than application/json",
        401: "No token, or a wrong one",
        413: "Too large",
        415: "Not application/json",
        422: "Not as the schema says",
        503: "The state store is away, or the inbox is full: send it again",
    }.items()
}


async def _answer(
    request: Request, token: str, model: type[Body], take: Callable[[Body], list[dict[str, str]]]
) -> Response:
    """Who asks is checked before what is asked is read."""
    if not _is_known(request.headers.get("authorization", ""), token):
        challenge = {"WWW-Authenticate": 'Bearer realm="ballast", Basic realm="ballast"'}
        return _refused(401, "A bearer token, or basic auth with it as password, is needed.", challenge)
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        return _refused(415, "The content type must be application/json.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            return _refused(413, f"The body has more than {MOST_BYTES} bytes. Send fewer alerts at once.")
    try:
        asked = model.model_validate_json(bytes(body))
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)[:10]
        faults = [{"where": ".".join(map(str, one["loc"]))[:200], "what": one["msg"][:300]} for one in found]
        return _refused(422, "The body is not what docs/alerts.md says.", faults=faults)
    try:
        taken = await run_in_threadpool(take, asked)
    except BallastError as error:
        log.warning("A delivery is asked to come again: %s", error)
        return _refused(503, "It cannot be kept just now. Send it again.", {"Retry-After": "15"})
    return JSONResponse({"alerts": taken}, status_code=202)


def _refused(status: int, words: str, headers: dict[str, str] | None = None, **more: Any) -> Response:
    return JSONResponse({"error": words, **more}, status_code=status, headers=headers)


def _is_known(authorization: str, token: str) -> bool:
    scheme, _, said = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            _, _, said = base64.b64decode(said, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(said.strip().encode(), token.encode())


def _documented(model: type[BaseModel]) -> dict[str, Any]:
    """The body's schema for /openapi.json: it is read by hand, once the sender is known."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    inner = schema.pop("$defs", {})
    if inner:  # only Firing, in Delivery: written out in its place
        schema["properties"]["alerts"]["items"] = inner["Firing"]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _token() -> str:
    try:
        return embedded.bridge_token_file().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise BallastError(
            f"The bridge has no token: {embedded.bridge_token_file()} cannot be read ({error.strerror}). "
            "`make up` makes one, or set BALLAST_BRIDGE_TOKEN_FILE."
        ) from None


def _actions() -> frozenset[str]:
    text = os.environ.get("BALLAST_BRIDGE_ACTIONS", "retrain,monitor")
    named = {name.strip() for name in text.split(",") if name.strip()}
    if wrong := sorted(named - set(alerts.ACTIONS)):
        known = ", ".join(alerts.ACTIONS)
        raise BallastError(f"BALLAST_BRIDGE_ACTIONS may name {known} (found {', '.join(wrong)}).")
    return frozenset(named)


def _connect() -> Airflow:
    """The Airflow that the environment names, else the embedded one."""
    url = os.environ.get("BALLAST_AIRFLOW_URL")
    if not url:
        return embedded.airflow()
    file = Path(os.environ.get("BALLAST_AIRFLOW_PASSWORD_FILE") or "")
    try:
        password = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise BallastError(f"BALLAST_AIRFLOW_PASSWORD_FILE cannot be read ({file}: {error.strerror}).") from None
    return Airflow(url, os.environ.get("BALLAST_AIRFLOW_USER") or embedded.USER, password)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _seconds_since(at: str) -> float:
    return time.time() - datetime.fromisoformat(at).timestamp()


def main() -> None:
    """Serve until a signal ends it."""
    import uvicorn

    env = os.environ
    app = make_app(_token(), _actions(), _connect)
    uvicorn.run(
        app,
        host=env.get("BALLAST_BRIDGE_HOST") or "127.0.0.1",
        port=embedded.bridge_port(),
        ssl_certfile=env.get("BALLAST_BRIDGE_TLS_CERT") or None,
        ssl_keyfile=env.get("BALLAST_BRIDGE_TLS_KEY") or None,
        log_level="warning",
        ws="none",
    )


if __name__ == "__main__":
    exit_with(main)
