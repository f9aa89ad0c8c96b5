"""The exporter: a process that shows the loop's facts to Prometheus, `/metrics`, and how it does itself, `/healthz`.

    python -m pipelines.exporter

Each source is read in a thread of its own, and a scrape is answered from memory: it waits for nobody. A source that
cannot be read keeps its last facts for KEEP_S, and then has none: absent says more than wrong. docs/metrics.md lists
every metric, docs/adr/0011 says why this is a process.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any, NamedTuple

from prometheus_client.core import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder

from pipelines import breaker, embedded, facts, params, places, refs, shared
from pipelines.errors import BallastError, ParamsError, exit_with
from pipelines.facts import gauge, gauges
from pipelines.files import read_json
from pipelines.policy import PolicyParams
from pipelines.runfacts import Watch
from pipelines.state import State
from pipelines.workspace import git

log = logging.getLogger(__name__)

STATE_EVERY_S = 3.0  # a look at the files; the store is read if they have changed, or after AGAIN_S
REMOTE_EVERY_S = 15.0
AGAIN_S = 60.0  # for what changes by the clock alone: a retraining that is dead by now
KEEP_S = 300.0  # as long as Prometheus itself goes on with the last value of a series
REQUEST_S = 10.0  # for a client to send its request and take the answer

Look = Callable[[], Sequence[Metric]]


class Read(NamedTuple):
    """What the last look at a source that succeeded found."""

    families: Sequence[Metric]
    at: float  # seconds since the epoch
    monotonic: float


class Source:
    """Something that is looked at again and again, in a thread of its own."""

    def __init__(self, name: str, look: Look, every_s: float) -> None:
        self.name = name
        self.every_s = every_s
        self.error: str | None = "not read yet"
        self.seconds = 0.0
        self.read: Read | None = None
        self._look = look
        self._said: str | None = None

    def look(self) -> None:
        """Look once. What is wrong is said once, not at every look."""
        began = time.monotonic()
        try:
            self.read = Read(self._look(), time.time(), time.monotonic())
            self.error = None
        except BallastError as error:
            self.error = str(error)
        except Exception as error:  # whatever it is: the other sources go on, and this one says that it is down
            self.error = f"{type(error).__name__}: {error}"
            log.debug("%s", self.name, exc_info=True)
        self.seconds = time.monotonic() - began
        if self.error != self._said:
            log.warning("%s: %s", self.name, self.error or "can be read again") if self._said or self.error else None
            self._said = self.error

    def families(self) -> Sequence[Metric]:
        """Its facts; none once they are too old."""
        return self.read.families if self.read and self.fresh else ()

    @property
    def fresh(self) -> bool:
        """Whether what was read may still be shown; not where a look does not come back either."""
        return self.read is not None and time.monotonic() - self.read.monotonic < KEEP_S

    def run(self, stop: Event) -> None:
        """Look until we are told to stop."""
        while not stop.is_set():
            self.look()
            stop.wait(self.every_s)


class Collector:
    """What a scrape is answered from: the facts of all sources, and how the exporter does."""

    def __init__(self, sources: Sequence[Source], example: Callable[[], tuple[bool, date | None]]) -> None:
        self.sources = sources
        self.seconds: float | None = None  # of the last scrape
        self._example = example

    def collect(self) -> Iterator[Metric]:
        """Every metric; of a source that was never read only that it was not."""
        for source in self.sources:
            yield from source.families()
        known, example = self._example()
        if known:
            yield from facts.clock(example, datetime.now(UTC))
        yield from self._own()

    def _own(self) -> Iterator[Metric]:
        up = [((source.name,), not source.error and source.fresh) for source in self.sources]
        read = [((source.name,), source.read.at if source.read else None) for source in self.sources]
        took = [((source.name,), source.seconds) for source in self.sources]
        yield gauges(
            "exporter_source_up",
            "1 if the last look at this source succeeded, and is not over 5 minutes old.",
            ("source",),
            up,
        )
        yield gauges("exporter_last_read_timestamp_seconds", "When one last succeeded.", ("source",), read)
        yield gauges("exporter_read_duration_seconds", "How long the last look took.", ("source",), took)
        yield gauge("exporter_scrape_duration_seconds", "How long the scrape before this one took.", self.seconds)


# --- the sources


class StateSource(Source):
    """The state store, read when its files or params.yaml have changed. One that nobody has made yet is empty."""

    def __init__(self, uri: str | None = None) -> None:
        super().__init__("state", self._facts, STATE_EVERY_S)
        self.uri = uri or places.state_uri()
        self.known = facts.Known()
        self._signature: Any = None
        self._read_at = 0.0
        self._unset: set[str] = set()

    def example(self) -> tuple[bool, date | None]:
        """Whether the clock is known, and the example's date if it is set."""
        return bool(self.families()), self.known.clock

    def _facts(self) -> Sequence[Metric]:
        now = self._files()
        fresh = time.monotonic() - self._read_at < AGAIN_S
        if now == self._signature and now and fresh and self.read:
            return self.read.families
        self.known = self._known()
        self._signature, self._read_at = now, time.monotonic()
        return facts.families(self.known)

    def _known(self) -> facts.Known:
        if (file := self._file()) and not file.exists():
            return facts.Known()
        limit = self._setting("breaker", breaker.BreakerParams)
        policy = self._setting("policy", PolicyParams)
        return facts.look(State(self.uri), limit.refusals if limit else None, policy)

    def _setting(self, section: str, cls: type[Any]) -> Any:
        """A section of params.yaml; None, said once, where it cannot be read: the rest is as true without it."""
        try:
            found = params.load(_settings(), section, cls)
            self._unset.discard(section)
        except (ParamsError, OSError) as error:
            if section not in self._unset:
                log.warning("params.yaml: %s", error)
            self._unset.add(section)
            return None
        return found

    def _file(self) -> Path | None:
        """The file of an SQLite store."""
        path = self.uri.removeprefix("sqlite:///")
        return Path(path.partition("?")[0]) if path != self.uri else None

    def _files(self) -> list[tuple[int, int]]:
        """What tells that something has changed; nothing where the store is no file, and is read at each look.

        SQLite makes an empty log beside its file for a reader too, and takes it away again.
        """
        if not (file := self._file()):
            return []
        found = [path.stat() for path in (file, Path(f"{file}-wal"), _settings()) if path.exists()]
        return [(one.st_mtime_ns, one.st_size) for one in found if one.st_size]


class LandingSource(Source):
    """The landing store's own indexes: here, or in the git remote where the workers share no disk."""

    def __init__(self) -> None:
        super().__init__("landing", self._facts, REMOTE_EVERY_S if places.travels() else STATE_EVERY_S)
        self._commit: str | None = None

    def _facts(self) -> Sequence[Metric]:
        if not places.travels():
            return landing_facts([read_json(index) for index in sorted((places.landing() / "index").glob("*.json"))])
        commit = refs.there(refs.SHARED).get(refs.SHARED)
        if self.read and commit == self._commit:
            return self.read.families
        indexes = []
        if commit:
            with TemporaryDirectory() as scratch:
                root = Path(scratch)
                git(root, "init", "--quiet", "--bare")
                refs.fetch(root, refs.SHARED)
                indexes = [json.loads(text) for text in shared.landing_indexes(root).values()]
        found, self._commit = landing_facts(indexes), commit
        return found


def landing_facts(indexes: Sequence[Any]) -> Sequence[Metric]:
    """How far the landing store goes: up to when each table was asked for, and its newest row before that."""
    until: dict[str, str] = {}
    newest: dict[str, str] = {}
    for index in indexes:
        for table, settings in index.items():
            pieces = [piece for pieces in settings.values() for piece in pieces.values() if piece.get("last")]
            if pieces:
                until[table] = max(piece["until"] for piece in pieces)
                newest[table] = max(min(piece["until"], piece["last"]) for piece in pieces)
    ends = [((table,), facts.stamp(at)) for table, at in newest.items()]
    asked = [((table,), facts.stamp(at)) for table, at in until.items()]
    return [
        gauges("landed_data_end_timestamp_seconds", "The newest row that was landed.", ("table",), ends),
        gauges("landed_asked_until_timestamp_seconds", "Up to when rows were asked for.", ("table",), asked),
    ]


class AirflowSource(Source):
    """Airflow's REST API. Whoever it is, and its password, are looked up again after a failure."""

    def __init__(self) -> None:
        super().__init__("airflow", self._facts, REMOTE_EVERY_S)
        self._watch: Watch | None = None

    def _facts(self) -> Sequence[Metric]:
        self._watch, watch = None, self._watch or Watch(embedded.connect())
        found = watch.look()
        self._watch = watch
        return found


# --- the server


class Server(ThreadingHTTPServer):
    """Answers `/metrics` and `/healthz`, from memory."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], sources: Sequence[Source], collector: Collector) -> None:
        self.sources, self.collector, self._stop = sources, collector, Event()
        self.registry = CollectorRegistry()
        super().__init__(address, Handler)
        self.registry.register(collector)

    def start(self) -> None:
        """Begin to look at the sources."""
        for source in self.sources:
            Thread(target=source.run, args=(self._stop,), name=source.name, daemon=True).start()

    def server_close(self) -> None:
        """Also ends the looking."""
        self._stop.set()
        super().server_close()

    def health(self) -> dict[str, Any]:
        """That it is up, and what is wrong with which source."""
        return {"status": "up", "sources": {source.name: source.error or "up" for source in self.sources}}


class Handler(BaseHTTPRequestHandler):
    """One connection; Prometheus keeps it open."""

    protocol_version = "HTTP/1.1"
    timeout = REQUEST_S
    disable_nagle_algorithm = True  # else the body waits 40 ms for the client to acknowledge the headers
    server: Server

    def do_GET(self) -> None:
        """Answer."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            began = time.perf_counter()
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            self._answer(encode(self.server.registry), kind)
            self.server.collector.seconds = time.perf_counter() - began
        elif path == "/healthz":
            self._answer(json.dumps(self.server.health()).encode(), "application/json")
        else:
            self._answer(b"Here are /metrics and /healthz.\n", "text/plain", HTTPStatus.NOT_FOUND)

    def _answer(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Prometheus asks every few seconds: nobody wants to read that."""


def serve(host: str, port: int) -> Server:
    """A server on this address, that looks at its sources already; raise BallastError if the port is taken."""
    state = StateSource()
    sources = [state, LandingSource(), AirflowSource()]
    try:
        server = Server((host, port), sources, Collector(sources, state.example))
    except OSError as error:
        raise BallastError(
            f"The exporter cannot listen on {host}:{port} ({error.strerror}). "
            "Stop what is there, or set BALLAST_EXPORTER_HOST and BALLAST_EXPORTER_PORT."
        ) from None
    server.start()
    return server


def _settings() -> Path:
    """The params.yaml here, else the one beside the code."""
    here = Path("params.yaml")
    return here if here.exists() else places.ROOT / here


def main() -> None:
    """Serve until the process is ended."""
    host = os.environ.get("BALLAST_EXPORTER_HOST") or "127.0.0.1"
    server = serve(host, embedded.exporter_port())
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


if __name__ == "__main__":
    exit_with(main)
