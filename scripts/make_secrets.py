"""Make the secrets of the Compose stack: deploy/secrets/stack.env, which only its owner may read.

``python3 scripts/make_secrets.py``. What is there stays as it is; only what is missing is added, so that it can be run
again after an upgrade. Every value is random and of characters that need no quoting, in a URL or elsewhere.
"""

from __future__ import annotations

import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "deploy" / "secrets" / "stack.env"


def _password() -> str:
    return secrets.token_hex(24)


def _fernet_key() -> str:
    return urlsafe_b64encode(secrets.token_bytes(32)).decode()


SECRETS: dict[str, Callable[[], str]] = {
    "POSTGRES_PASSWORD": _password,  # its superuser
    "AIRFLOW_DB_PASSWORD": _password,
    "MLFLOW_DB_PASSWORD": _password,
    "BALLAST_DB_PASSWORD": _password,  # the state store
    "REDIS_PASSWORD": _password,
    "S3_ACCESS_KEY": lambda: secrets.token_hex(10),
    "S3_SECRET_KEY": _password,
    "S3_DATA_ACCESS_KEY": lambda: secrets.token_hex(10),  # of the store that workspaces travel by
    "S3_DATA_SECRET_KEY": _password,
    "AIRFLOW_FERNET_KEY": _fernet_key,  # encrypts connections and variables: without it a backup's are lost
    "AIRFLOW_SECRET_KEY": _password,
    "AIRFLOW_JWT_SECRET": lambda: secrets.token_hex(64),
    "AIRFLOW_ADMIN_PASSWORD": _password,  # of the person `admin`; the three below are of services
    "AIRFLOW_BRIDGE_PASSWORD": _password,
    "AIRFLOW_EXPORTER_PASSWORD": _password,
    "AIRFLOW_WORKER_PASSWORD": _password,
    "MLFLOW_ADMIN_PASSWORD": _password,
    "MLFLOW_WORKER_PASSWORD": _password,
    "MLFLOW_SECRET_KEY": _password,
    "BRIDGE_TOKEN": _password,
    "GRAFANA_ADMIN_PASSWORD": _password,
}


def make(file: Path) -> list[str]:
    """Add what is missing to the file; return its names."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.parent.chmod(0o700)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    there = {line.partition("=")[0] for line in text.splitlines()}
    missing = [name for name in SECRETS if name not in there]
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    part.write_text(text + "".join(f"{name}={SECRETS[name]()}\n" for name in missing), encoding="utf-8")
    part.replace(file)
    return missing


if __name__ == "__main__":
    added = make(FILE)
    print(f"{FILE}: {len(added)} secrets made, {len(SECRETS) - len(added)} were there")
