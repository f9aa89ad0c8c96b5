"""The alert bridge: Alertmanager's webhook and generic senders on one side, Airflow's runs on the other.

``python -m pipelines.bridge``. A request is answered once what it asks for is in the state store; a thread of its own
brings it to Airflow, and tries again for as long as that is away. Settings come from the environment: docs/alerts.md.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import math
import os
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ValidationError

from pipelines import alerts, embedded
from pipelines.dagruns import Airflow, Faulty, Refused
from pipelines.errors import BallastError, exit_with
from pipelines.freeze import freeze
from pipelines.state import Alert, State, frozen

MOST_BYTES = 2 * 1024**2
MOST_BODY_S = 15.0  # that a sender may take for it: a hundred that never end would shut out all others
MOST_AT_ONCE = 100  # connections, beyond which uvicorn answers 503
LEAST_TOKEN = 16
USER = "ballast"  # of basic auth
MOST_WAIT_S = 15.0
LOOK_AGAIN_S = 5.0  # without being woken: what another process has left, or a clock that was set
LEASE = timedelta(seconds=30)  # on an alert in hand. Should it end too early, Airflow's 409 stops the second post
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
        self.started = self._counter("runs_started", "Runs that Airflow has newly taken, by action.", "action")
        self.known = self._counter("runs_known", "Alerts whose run Airflow had already, by action.", "action")
        self.freezes = self._counter("freezes", "Alerts that ask for a freeze, by what came of it.", "outcome")
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
    """Brings what waits in the inbox to Airflow, one alert after the other; each is claimed first, as others may do."""

    def __init__(self, state: State, connect: Callable[[], Airflow], counters: Counters) -> None:
        super().__init__(name="courier", daemon=True)
        self._state, self._connect, self._counters = state, connect, counters
        self._airflow: Airflow | None = None
        self._away = 0  # how often in a row Airflow was
        self._ended = threading.Event()
        self.woken = threading.Event()

    def run(self) -> None:
        """Work until ``end``."""
        while not self._ended.is_set():
            self.woken.clear()
            pause = LOOK_AGAIN_S
            try:
                pause = self._round()
            except Exception:  # it must outlive everything: alerts wait for it
                log.exception("A round of deliveries broke off; the next one tries again")
            (self._ended if self._away else self.woken).wait(pause)  # a new alert brings no Airflow back

    def end(self) -> None:
        """End after the delivery in hand."""
        self._ended.set()
        self.woken.set()

    def _round(self) -> float:
        """Deliver all that is due; if Airflow is away it is so for all. Return the seconds until the next round."""
        while not self._ended.is_set() and (alert := self._state.claim_alert(LEASE)):
            self._deliver(alert)
            if self._away:
                return _patience(self._away - 1)
        next_at = self._state.inbox().next_at
        return min(LOOK_AGAIN_S, max(0.05, -_seconds_since(next_at))) if next_at else LOOK_AGAIN_S

    def _deliver(self, alert: Alert) -> None:
        is_run = alert.action != "freeze"
        try:
            made, words = self._post(alert) if is_run else self._freeze(alert)
        except Exception as error:  # Airflow away, or an answer that is none: the same to who waits
            if is_run:
                self._note(error)
            if _is_hopeless(error):
                log.error("%s is given up: %s", alert.run_id, error)
                self._state.settle_alert(alert, "failed", str(error))
                self._counters.failed.labels(alert.action).inc()
            else:
                self._postpone(alert, error)
            return
        self._state.settle_alert(alert, "started" if is_run else "done", words)
        if not is_run:
            self._counters.freezes.labels("made" if made else "known").inc()
        elif made:
            self._counters.started.labels(alert.action).inc()
            self._counters.seconds.observe(_seconds_since(alert.received_at))
        else:
            self._counters.known.labels(alert.action).inc()

    def _post(self, alert: Alert) -> tuple[bool, str]:
        """Whether Airflow has made the run now, or had it already, and that in words."""
        self._airflow = self._airflow or self._connect()
        told = alert.payload
        conf = {"reason": told["reason"], "alert": {**told, "id": alert.run_id, "received_at": alert.received_at}}
        if alert.action != "rollback":
            conf["as_of"] = told["as_of"]
        dag = DAGS[alert.action]
        made = self._airflow.queue(dag, alert.run_id, conf) is not None
        self._note(None)
        return made, f"{dag}/{alert.run_id} {'was queued' if made else 'was there already'}"

    def _freeze(self, alert: Alert) -> tuple[bool, str]:
        if frozen(self._state.ledger()):
            return False, "promotion was frozen already"
        return True, str(freeze(self._state, alert.payload["reason"], f"alert/{alert.run_id}")["summary"])

    def _note(self, error: Exception | None) -> None:
        """Whether Airflow answers at all, and whether it is of use to go on asking: one DAG or run may be at fault."""
        answered = error is None or isinstance(error, Refused) or _status(error) == HTTPStatus.INTERNAL_SERVER_ERROR
        self._counters.reachable.set(answered)
        of_one = error is None or _status(error) in (*HOPELESS, HTTPStatus.NOT_FOUND, HTTPStatus.INTERNAL_SERVER_ERROR)
        self._away = 0 if of_one else self._away + 1
        if not of_one:
            self._airflow = None  # its address or password may have changed: read them anew

    def _postpone(self, alert: Alert, error: Exception) -> None:
        wait = _patience(alert.tries if not self._away else self._away - 1)
        log.warning("%s is tried again in %.2f s: %s", alert.run_id, wait, error)
        self._state.postpone_alert(alert, timedelta(seconds=wait), f"try {alert.tries + 1}: {error}"[:1000])


def _patience(tries: int) -> float:
    """Seconds until the next try."""
    return min(MOST_WAIT_S, 0.25 * 2.0 ** min(tries, 10))


def _is_hopeless(error: Exception) -> bool:
    """Whether Airflow will never take this alert. (A DAG file that does not import is a 400 too, and can be mended.)"""
    return isinstance(error, Refused) and error.status in HOPELESS and "import errors" not in str(error)


def _status(error: Exception) -> int | None:
    return error.status if isinstance(error, Refused | Faulty) else None


def make_app(
    token: str, actions: frozenset[str], connect: Callable[[], Airflow], state: State | None = None
) -> FastAPI:
    """The bridge as an ASGI app; its courier lives as long as it does."""
    if len(token) < LEAST_TOKEN:
        raise BallastError(f"The bridge's token must have at least {LEAST_TOKEN} characters (found {len(token)}).")
    state, counters, turn = state or State(pooled=True), Counters(), CapacityLimiter(1)
    courier = Courier(state, connect, counters)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        courier.start()
        yield
        courier.end()

    app = FastAPI(title="Ballast's alert bridge", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)

    async def answer(request: Request, model: type[Body], take: Callable[[Body], list[dict[str, str]]]) -> Response:
        async def one_by_one(asked: Body) -> list[dict[str, str]]:
            return await to_thread.run_sync(take, asked, limiter=turn)

        try:
            response = await _answer(request, token, model, one_by_one)
        except Exception as error:  # whatever it is: the sender keeps it and comes again
            log.warning("A delivery is asked to come again: %s", error, exc_info=not isinstance(error, BallastError))
            response = _refused(503, "It cannot be kept just now. Send it again.", {"Retry-After": "15"})
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

    @app.get("/healthz", responses={503: {"description": "It takes alerts and delivers none: start it anew"}})
    def healthz() -> Response:
        alive = courier.is_alive()
        return JSONResponse({"status": "ok" if alive else "the courier has ended"}, 200 if alive else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        try:
            inbox = state.inbox()
            counters.waiting.set(inbox.waiting)
            counters.oldest.set(_seconds_since(inbox.oldest) if inbox.oldest else 0)
        except Exception as error:  # the other numbers are as true without the store
            log.warning("The inbox cannot be counted: %s", error)
            counters.waiting.set(math.nan)
            counters.oldest.set(math.nan)
        return Response(generate_latest(counters.registry), media_type=CONTENT_TYPE_LATEST)

    app.openapi().setdefault("components", {})["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "basic": {"type": "http", "scheme": "basic", "description": f"The user is {USER}, the token its password."},
    }
    return app


ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"description": words}
    for status, words in {
        400: "The body broke off, or the media type is another than application/json",
        401: "No token, or a wrong one",
        408: "The body did not come in time",
        413: "Too large",
        415: "Not application/json",
        422: "Not as the schema says",
        503: "The state store is away, or the inbox is full: send it again",
    }.items()
}


async def _answer(
    request: Request, token: str, model: type[Body], take: Callable[[Body], Awaitable[list[dict[str, str]]]]
) -> Response:
    """Who asks is checked before what is asked is read."""
    if not _is_known(request.headers.get("authorization", ""), token):
        challenge = {"WWW-Authenticate": 'Bearer realm="ballast", Basic realm="ballast"'}
        return _refused(401, f"A bearer token, or basic auth of {USER} with it as password, is needed.", challenge)
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        return _refused(415, "The content type must be application/json.")
    body = bytearray()
    try:
        async with asyncio.timeout(MOST_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MOST_BYTES:
                    return _refused(413, f"The body has more than {MOST_BYTES} bytes. Send fewer alerts at once.")
    except TimeoutError:
        words = f"The body was not whole after {MOST_BODY_S:.0f} s. Send it again."
        return _refused(408, words, {"Connection": "close"})
    try:
        asked = model.model_validate_json(bytes(body))
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)[:10]
        faults = [{"where": ".".join(map(str, one["loc"]))[:200], "what": one["msg"][:300]} for one in found]
        return _refused(422, "The body is not what docs/alerts.md says.", faults=faults)
    return JSONResponse({"alerts": await take(asked)}, status_code=202)


def _refused(status: int, words: str, headers: dict[str, str] | None = None, **more: Any) -> Response:
    return JSONResponse({"error": words, **more}, status_code=status, headers=headers)


def _is_known(authorization: str, token: str) -> bool:
    scheme, _, said = authorization.partition(" ")
    found, needed = said.strip().encode(), token.encode()
    if scheme.lower() == "basic":
        try:
            found, needed = base64.b64decode(found, validate=True), f"{USER}:{token}".encode()
        except binascii.Error:
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(found, needed)


def _documented(model: type[BaseModel]) -> dict[str, Any]:
    """The body's schema for /openapi.json: it is read by hand, once the sender is known."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    inner = schema.pop("$defs", {})
    if inner:  # only Firing, in Delivery: written out in its place
        schema["properties"]["alerts"]["items"] = inner["Firing"]
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"requestBody": body, "security": [{"bearer": []}, {"basic": []}]}


def _token() -> str:
    file = embedded.bridge_token_file()
    try:
        token = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise BallastError(
            f"The bridge has no token: {file} cannot be read ({error.strerror}). "
            "`make up` makes one, or set BALLAST_BRIDGE_TOKEN_FILE."
        ) from None
    if not token:
        raise BallastError(f"The bridge has no token: {file} is empty. Delete it, and `make up` makes one.")
    return token


def _actions() -> frozenset[str]:
    text = os.environ.get("BALLAST_BRIDGE_ACTIONS", "retrain,monitor")
    named = {name.strip() for name in text.split(",") if name.strip()}
    if wrong := sorted(named - set(alerts.ACTIONS)):
        known = ", ".join(alerts.ACTIONS)
        raise BallastError(f"BALLAST_BRIDGE_ACTIONS may name {known} (found {', '.join(wrong)}).")
    return frozenset(named)


def _tls() -> tuple[str | None, str | None]:
    """The certificate and key to speak TLS with, tried; None and None for plain HTTP."""
    cert, key = (os.environ.get(f"BALLAST_BRIDGE_TLS_{name}") or None for name in ("CERT", "KEY"))
    if key and not cert:
        raise BallastError("BALLAST_BRIDGE_TLS_KEY is set and BALLAST_BRIDGE_TLS_CERT is not. Set both, or neither.")
    if cert:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")  # asks nobody for one
        except OSError as error:
            raise BallastError(
                f"BALLAST_BRIDGE_TLS_CERT and _KEY are no certificate and key to serve with ({cert}, {key}: {error}). "
                "Give PEM files that belong together, the key without a password."
            ) from None
    return cert, key


def _seconds_since(at: str) -> float:
    return time.time() - datetime.fromisoformat(at).timestamp()


def main() -> None:
    """Serve until a signal ends it."""
    import uvicorn

    cert, key = _tls()
    app = make_app(_token(), _actions(), embedded.connect)
    uvicorn.run(
        app,
        host=os.environ.get("BALLAST_BRIDGE_HOST") or "127.0.0.1",
        port=embedded.bridge_port(),
        ssl_certfile=cert,
        ssl_keyfile=key,
        log_level="warning",
        limit_concurrency=MOST_AT_ONCE,
        ws="none",
    )


if __name__ == "__main__":
    exit_with(main)
