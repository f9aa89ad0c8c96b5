"""Start and stop the embedded services: Airflow (LocalExecutor on SQLite) and an MLflow server, all under var/.

``python -m pipelines.stack up`` and ``down``. Airflow's parts are started one by one rather than by ``airflow
standalone``: that opens log servers to the network, hides which part has died, and starts a triggerer that nothing
here needs. Each part leads a session of its own, so that whatever it starts can be found and ended with it.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import processes
from pipelines.embedded import (
    airflow,
    airflow_port,
    bridge_port,
    environment,
    exporter_port,
    make_bridge_token,
    mlflow_port,
)
from pipelines.errors import BallastError, exit_with
from pipelines.files import read_json, write_json
from pipelines.places import ROOT, mlflow_artifacts, var

if TYPE_CHECKING:
    from pipelines.dagruns import Airflow

POOLS = {
    "training": "One training at a time: the machine's cores or its GPU are one resource.",
    "promotion": "One writer to the registry and the ledger at a time.",
}
MARK = "BALLAST_STACK"
START_WITHIN_S = 180.0
STOP_WITHIN_S = 10.0
PATIENCE_S = 60.0  # with an API server that is up: its first answers take long on a busy machine
LEAST_FREE_BYTES = 10**9
LAST_LINES = 12
_children: list[subprocess.Popen[bytes]] = []  # kept, as Python warns of a child that is forgotten while it lives


@dataclass(frozen=True)
class Service:
    """One process that the stack is made of."""

    name: str
    command: Sequence[str]
    port: int | None = None


@dataclass(frozen=True)
class Started:
    """What is remembered of a service that was started: which process it is, since when, on which port."""

    process: processes.Process
    at: float  # seconds since the epoch
    port: int | None


def services() -> list[Service]:
    """The processes of the stack. No triggerer: nothing here defers, and approvals need none since Airflow 3.3."""
    state, python = var(), sys.executable
    tracking = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow_port()), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{state}/mlflow/mlflow.db", "--default-artifact-root"]
    airflow = [python, "-m", "airflow"]
    return [
        Service("mlflow", [*tracking, *stores, str(mlflow_artifacts()), "--no-serve-artifacts"], mlflow_port()),
        Service("api-server", [*airflow, "api-server"], airflow_port()),
        Service("bridge", [python, "-m", "pipelines.bridge"], bridge_port()),
        Service("scheduler", [*airflow, "scheduler", "--skip-serve-logs"]),
        Service("dag-processor", [*airflow, "dag-processor"]),
        Service("exporter", [python, "-m", "pipelines.exporter"], exporter_port()),
    ]


def up() -> None:
    """Start what is not running and wait until all of it is healthy and every DAG is parsed."""
    began = time.monotonic()
    with _locked():
        wanted = services()
        _check_ports(wanted)
        missing = [service for service in wanted if running(service.name) is None]
        try:
            _start_all(missing)
            _wait(wanted, [service.name for service in missing])
        except BaseException:
            _stop(*(service.name for service in missing))
            raise
        _wait_for_dags()
        client = airflow(PATIENCE_S)
        client.wake_execution_api()
        for name, description in POOLS.items():
            client.make_pool(name, 1, description)
    _say_up(began)


def down() -> None:
    """End all services and whatever they started; nothing remains. Does nothing where nothing runs."""
    with _locked():
        names = {service.name for service in services()}
        # The scheduler first, with its tasks: they can still tell the API server how they ended.
        ended = _stop("scheduler") | _stop(*names - {"scheduler"})
    print("stopped: " + ", ".join(sorted(ended)) if ended else "nothing was running")


def running(name: str) -> Started | None:
    """The service of this name, if it lives."""
    started = _remembered(name)
    return started if started and processes.alive(started.process) else None


def ended() -> list[str]:
    """The services that were started, not stopped, and yet run no more."""
    return [service.name for service in services() if _remembered(service.name) and not running(service.name)]


@contextmanager
def _locked() -> Iterator[None]:
    """One start or stop at a time in this tree; a second one waits."""
    (var() / "run").mkdir(parents=True, exist_ok=True)
    with (var() / "run" / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another start or stop of this stack to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remembered(name: str) -> Started | None:
    try:
        fields = read_json(var() / "run" / f"{name}.json")
        return Started(processes.Process(**fields["process"]), fields["at"], fields["port"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _check_ports(wanted: list[Service]) -> None:
    """Raise BallastError if a port is someone else's, or if the stack runs on another than is asked for."""
    for service in wanted:
        live = running(service.name)
        if live and live.port != service.port:
            raise BallastError(
                f"The stack is up with {service.name} on port {live.port} (asked for: {service.port}). "
                "`make down` first, then start it again."
            )
        if service.port and not live and not _is_free(service.port):
            _stop(service.name)  # a rest of our own may hold it
            if not _is_free(service.port):
                raise BallastError(_taken(service.port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _taken(port: int) -> str:
    variables = {
        airflow_port(): "AIRFLOW_PORT",
        mlflow_port(): "MLFLOW_PORT",
        bridge_port(): "BALLAST_BRIDGE_PORT",
        exporter_port(): "BALLAST_EXPORTER_PORT",
    }
    variable = variables[port]
    holder = processes.listener(port)
    by = f"by process {holder} ({processes.command(holder)})" if holder else "by a process of another user"
    return f"Port {port} is taken {by}. Stop that process, or choose another port: make run {variable}={port + 1}"


def _start_all(missing: list[Service]) -> None:
    """Start services; MLflow comes up while Airflow's database is made."""
    if not missing:
        return
    for folder in ("logs", "mlflow/artifacts"):
        (var() / folder).mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(var()).free) < LEAST_FREE_BYTES:
        raise BallastError(f"Only {free / 1e9:.1f} GB are free in {var()}; a turn needs about 1 GB. Make room.")
    make_bridge_token()
    env = environment()
    for service in missing:
        if service.name == "api-server":
            _migrate(env)
        _start(service, env)


def _migrate(env: dict[str, str]) -> None:
    """Make Airflow's database, or bring it to this version; skipped (2.5 s) where that has been done."""
    stamp = var() / "airflow" / "migrated.json"
    now = {package: version(package) for package in ("apache-airflow-core", "apache-airflow-providers-fab")}
    if stamp.exists() and read_json(stamp) == now and (var() / "airflow" / "airflow.db").exists():
        return
    log = _log("airflow-migrate")
    with log.open("wb") as file:
        command = [sys.executable, "-m", "airflow", "db", "migrate"]
        code = subprocess.run(command, stdout=file, stderr=file, env=env, cwd=ROOT, check=False).returncode
    if code:
        raise BallastError(_crash("Airflow's database cannot be made", log))
    write_json(stamp, now)


def _start(service: Service, env: dict[str, str]) -> None:
    """Start a service in a session of its own, and remember which process it is."""
    _stop(service.name)
    log = _log(service.name)
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    with log.open("wb") as file:
        process = subprocess.Popen(
            service.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=ROOT,
            env=env | {MARK: _mark(service.name)},
            start_new_session=True,
        )
    _children.append(process)
    identity = processes.find(process.pid)
    if identity is None:
        raise BallastError(_crash(f"{service.name} ended at once", log))
    started = Started(identity, time.time(), service.port)
    write_json(var() / "run" / f"{service.name}.json", asdict(started))


def _stop(*names: str) -> set[str]:
    """End services with all they started, side by side; return those of which anything was there."""
    found = {name for name in names if _members(name)}
    processes.stop(lambda: set().union(*map(_members, names)), STOP_WITHIN_S)
    for name in names:
        (var() / "run" / f"{name}.json").unlink(missing_ok=True)
    return found


def _members(name: str) -> set[int]:
    """The processes of a service: its session, and whatever carries its mark."""
    started = _remembered(name)
    return processes.family(started.process if started else None, f"{MARK}={_mark(name)}")


def _mark(name: str) -> str:
    return f"{var()}#{name}"


def _log(name: str) -> Path:
    return var() / "logs" / f"{name}.log"


def _crash(what: str, log: Path) -> str:
    return f"{what}. The last lines:\n\n{_last_lines(log)}\n\nThe whole log: {log}"


def _last_lines(log: Path) -> str:
    """What a log says up to its last error, or at its end where it names none."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    lines = [line.rstrip() for line in plain.splitlines() if line.strip()][-60:]
    trouble = [
        at for at, line in enumerate(lines) if re.search(r"(?<!uvicorn\.)error|exception|critical", line, re.IGNORECASE)
    ]
    last = trouble[-1] + 1 if trouble else len(lines)
    return "\n".join("    " + line[:200] for line in lines[max(0, last - LAST_LINES) : last])


def _wait(wanted: list[Service], missing: list[str]) -> None:
    """Wait until every service answers and has shown a sign of life since it was started."""
    deadline = time.monotonic() + START_WITHIN_S
    with _busy() as say:
        while lacking := _lacking():
            say("waiting for " + ", ".join(lacking))
            for service in wanted:
                if running(service.name) is None:
                    how = "ended while starting" if service.name in missing else "has ended"
                    raise BallastError(_crash(f"{service.name} {how}", _log(service.name)))
            if time.monotonic() > deadline:
                raise BallastError(
                    f"Not ready after {START_WITHIN_S:.0f} s: {', '.join(lacking)}. The logs are in {var() / 'logs'}."
                )
            time.sleep(0.1)


def _lacking() -> list[str]:
    """The services that do not answer yet, or have shown no sign of life since they were started."""
    pages = {
        "MLflow": f"{mlflow_port()}/health",
        "alert bridge": f"{bridge_port()}/healthz",
        "exporter": f"{exporter_port()}/healthz",
    }
    lacking = [name for name, page in pages.items() if not _answers(f"http://127.0.0.1:{page}")]
    try:
        health = airflow().health()
    except BallastError:
        return [*lacking, "Airflow"]
    for name in ("scheduler", "dag-processor"):
        key = name.replace("-", "_")
        beat, started = health[key].get(f"latest_{key}_heartbeat"), running(name)
        if started is None or beat is None or datetime.fromisoformat(beat).timestamp() < started.at:
            lacking.append(name)
    return lacking


def _answers(url: str) -> bool:
    from urllib.request import ProxyHandler, build_opener

    try:
        with build_opener(ProxyHandler({})).open(url, timeout=5):
            return True
    except OSError:
        return False


def _wait_for_dags() -> None:
    """Wait until each file of dags/ is parsed as it now stands; raise BallastError with what does not import."""
    client, deadline = airflow(PATIENCE_S), time.monotonic() + START_WITHIN_S
    started = running("dag-processor")
    since = started.at if started else 0.0
    with _busy() as say:
        while unparsed := _unparsed(client, since):
            say(f"waiting for the DAGs {', '.join(unparsed)}")
            if broken := _broken(client, since):
                raise BallastError(broken)
            if time.monotonic() > deadline:
                raise BallastError(
                    f"Airflow has not parsed {', '.join(unparsed)} after {START_WITHIN_S:.0f} s. "
                    f"See {_log('dag-processor')} and {var() / 'airflow' / 'logs' / 'dag_processor'}."
                )
            time.sleep(0.2)


def _unparsed(client: Airflow, since: float) -> list[str]:
    """The DAGs that Airflow has not parsed since it was started. A DAG's id is its file's name."""
    parsed = {
        dag["dag_id"]
        for dag in client.dags()
        if not dag["has_import_errors"] and datetime.fromisoformat(dag["last_parsed_time"]).timestamp() >= since
    }
    return sorted({file.stem for file in (ROOT / "dags").glob("*.py")} - parsed)


def _broken(client: Airflow, since: float) -> str:
    """What does not import, and what to do; a broken plugin breaks the DAGs that need it, so it is named alone."""
    if plugins := client.plugin_errors():
        said = "\n\n".join(f"{source}:\n{error}" for source, error in plugins.items())
        return (
            f"Airflow cannot import its plugins:\n\n{said}\n\nMend them, then `make down` and the same command again."
        )
    current = [error for error in client.import_errors() if _is_current(error, since)]
    said = "\n\n".join(f"dags/{error['filename']}:\n{error['stack_trace'].strip()}" for error in current)
    return f"Airflow is up, but cannot import:\n\n{said}\n\nMend it, then the same command again." if said else ""


def _is_current(error: dict[str, Any], since: float) -> bool:
    """Whether an import error is of the file as it now stands, and of this start."""
    file = ROOT / "dags" / error["filename"]
    changed = file.stat().st_mtime if file.exists() else 0.0
    return datetime.fromisoformat(error["timestamp"]).timestamp() >= max(since, changed)


@contextmanager
def _busy() -> Iterator[Any]:
    """A line that shows at a terminal what is waited for; nothing elsewhere."""
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(f"[dim]{text}[/dim]")


def _say_up(began: float) -> None:
    ports = f"Airflow :{airflow_port()}   MLflow :{mlflow_port()}"
    more = f"alerts :{bridge_port()}   metrics :{exporter_port()}"
    print(f"  {'services':<13} {ports:<43} {time.monotonic() - began:>3.0f} s", flush=True)
    print(f"  {'':<13} {more}", flush=True)


def main() -> None:
    """``up`` or ``down``."""
    actions = {"up": up, "down": down}
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        raise BallastError("Usage: python -m pipelines.stack up|down")
    try:
        actions[sys.argv[1]]()
    except KeyboardInterrupt:
        print("\ninterrupted: what this call had started is stopped; `make down` stops the rest", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    exit_with(main)
