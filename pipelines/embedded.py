"""The embedded services as everyone sees them: their addresses, and the settings that they and their tasks run with."""

from __future__ import annotations

import os
import re
import secrets
import sys
from base64 import urlsafe_b64encode
from pathlib import Path

from pipelines.dagruns import Airflow
from pipelines.errors import BallastError, TryAgain
from pipelines.files import read_json, whole_file, write_json
from pipelines.places import ROOT, var

USER = "admin"
# Left out of what we start: settings of another Airflow, MLflow or run, and what slows Python down or misleads it.
FOREIGN = re.compile(
    r"AIRFLOW__.*|AIRFLOW_(HOME|CONFIG)|_?MLFLOW_(?!PORT).*|BALLAST_(RUN|DAG|TRIGGER)"
    r"|PYTHON(DONTWRITEBYTECODE|SAFEPATH|HOME|PATH)"
)


def airflow_port() -> int:
    """Where Airflow listens (``AIRFLOW_PORT``, 8080)."""
    return _port("AIRFLOW_PORT", 8080, "api-server")


def mlflow_port() -> int:
    """Where the MLflow server listens (``MLFLOW_PORT``, 5000)."""
    return _port("MLFLOW_PORT", 5000, "mlflow")


def bridge_port() -> int:
    """Where the alert bridge listens (``BALLAST_BRIDGE_PORT``, 9190)."""
    return _port("BALLAST_BRIDGE_PORT", 9190, "bridge")


def bridge_token_file() -> Path:
    """Where the alert bridge's token lies (``BALLAST_BRIDGE_TOKEN_FILE``)."""
    return Path(os.environ.get("BALLAST_BRIDGE_TOKEN_FILE") or var() / "bridge" / "token")


def make_bridge_token() -> None:
    """Make the bridge's token if there is none; only its owner may read it."""
    file = bridge_token_file()
    if not file.exists():
        with whole_file(file) as part:
            part.chmod(0o600)
            part.write_text(secrets.token_urlsafe(32) + "\n")


def exporter_port() -> int:
    """Where the exporter listens (``BALLAST_EXPORTER_PORT``, 9180)."""
    return _port("BALLAST_EXPORTER_PORT", 9180, "exporter")


def airflow_url() -> str:
    """Airflow's address for a person's browser."""
    return f"http://localhost:{airflow_port()}"


def people_s_airflow_url() -> str:
    """That of the Airflow of ``BALLAST_AIRFLOW_URL``, as Airflow itself is told it, else of the embedded one."""
    return (os.environ.get("BALLAST_AIRFLOW_URL") and os.environ.get("AIRFLOW__API__BASE_URL")) or airflow_url()


def mlflow_url() -> str:
    """The MLflow server's address for a person's browser."""
    return f"http://localhost:{mlflow_port()}"


def password_file() -> Path:
    """The JSON file that holds Airflow's users and their passwords."""
    return var() / "airflow" / "simple_auth_manager_passwords.json"


def airflow(patience_s: float = 0.0) -> Airflow:
    """A client of the embedded Airflow. Raises TryAgain if it was never started."""
    try:
        password = read_json(password_file())[USER]
    except FileNotFoundError:
        raise TryAgain("The embedded Airflow was never started here. `make run` starts it.") from None
    return Airflow(airflow_url(), USER, password, patience_s)


def connect() -> Airflow:
    """The Airflow of ``BALLAST_AIRFLOW_URL``, ``_USER`` and ``_PASSWORD_FILE``, else the embedded one."""
    if not (url := os.environ.get("BALLAST_AIRFLOW_URL")):
        return airflow()
    user, file = os.environ.get("BALLAST_AIRFLOW_USER"), os.environ.get("BALLAST_AIRFLOW_PASSWORD_FILE")
    if not user or not file:
        raise BallastError(
            f"BALLAST_AIRFLOW_URL is {url}, and BALLAST_AIRFLOW_USER or BALLAST_AIRFLOW_PASSWORD_FILE is not set. "
            "Set both, or none of the three for the embedded Airflow."
        )
    try:
        return Airflow(url, user, Path(file).read_text(encoding="utf-8").strip())
    except OSError as error:
        raise TryAgain(f"BALLAST_AIRFLOW_PASSWORD_FILE cannot be read: {error}.") from None


def environment() -> dict[str, str]:
    """The whole environment of the embedded services and of the tasks that they run."""
    inherited = {name: value for name, value in os.environ.items() if not FOREIGN.fullmatch(name)}
    return inherited | _ballast_settings(inherited) | _airflow_settings() | _mlflow_settings()


def _ballast_settings(inherited: dict[str, str]) -> dict[str, str]:
    here = ",".join(filter(None, [inherited.get("NO_PROXY") or inherited.get("no_proxy"), "127.0.0.1,localhost"]))
    return {
        "PATH": f"{Path(sys.executable).parent}:{inherited.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "SPT_NOENV": "1",  # setproctitle leaves /proc/PID/environ readable: we know our processes by it
        "NO_PROXY": here,
        "no_proxy": here,
        "BALLAST_VAR": str(var()),
        "GX_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
    }


def _airflow_settings() -> dict[str, str]:
    home, port = var() / "airflow", airflow_port()
    made = _secrets()
    settings = {
        "CORE__DAGS_FOLDER": ROOT / "dags",
        "CORE__PLUGINS_FOLDER": ROOT / "plugins",
        "CORE__LOAD_EXAMPLES": False,
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": 8,
        "CORE__FERNET_KEY": made["fernet_key"],
        "CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": password_file(),
        "CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db?timeout=30",
        "API__HOST": "127.0.0.1",
        "API__PORT": port,
        "API__BASE_URL": airflow_url(),
        "API__INSTANCE_NAME": "Ballast",
        "API__SECRET_KEY": made["secret_key"],
        "API_AUTH__JWT_SECRET": made["jwt_secret"],
        # Stock it sleeps for 1 s when idle: most of what a chain of short tasks takes. Costs a tenth of a core.
        "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": 0.1,
        # A supervisor that misses the end of its task looks again only after this long, and keeps its slot meanwhile.
        "WORKERS__MIN_HEARTBEAT_INTERVAL": 1,
        # After a kill -9 the run goes on within a minute, rather than after five.
        "SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": 30,
        "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": 60,
        "DAG_PROCESSOR__REFRESH_INTERVAL": 30,
        "LOGGING__BASE_LOG_FOLDER": home / "logs",
        "LOGGING__DAG_PROCESSOR_CHILD_PROCESS_LOG_DIRECTORY": home / "logs" / "dag_processor",
        "LOGGING__COLORED_CONSOLE_LOG": False,
        "LOGGING__NAMESPACE_LEVELS": "http.access=WARNING",
    }
    return {"AIRFLOW_HOME": str(home)} | {f"AIRFLOW__{name}": str(value) for name, value in settings.items()}


def _mlflow_settings() -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port()}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }


def _secrets() -> dict[str, str]:
    """Keys that are made once and stay: tokens and encrypted connections outlive a restart."""
    home = var() / "airflow"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not password_file().exists():
        write_json(password_file(), {USER: secrets.token_urlsafe(12)})
    if not (home / "airflow.cfg").exists():  # else Airflow writes one that fixes today's defaults and paths
        with whole_file(home / "airflow.cfg") as part:
            part.write_text("# Settings come from the environment: pipelines/embedded.py.\n")
    file = home / "secrets.json"
    if not file.exists():
        fernet_key = urlsafe_b64encode(secrets.token_bytes(32)).decode()
        write_json(
            file,
            {"fernet_key": fernet_key, "secret_key": secrets.token_hex(32), "jwt_secret": secrets.token_hex(64)},
        )
    found: dict[str, str] = read_json(file)
    return found


def _port(variable: str, default: int, service: str) -> int:
    """The port that the environment asks for, else that of the running service, else the default."""
    text = os.environ.get(variable) or str(_started_on(service) or default)
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise BallastError(f"{variable} must be a port, 1 to 65535 (found {text!r}). Unset it for {default}.")
    return int(text)


def _started_on(service: str) -> int | None:
    try:
        port: int = read_json(var() / "run" / f"{service}.json")["port"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return port
