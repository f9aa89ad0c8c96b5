"""Where things are: read from the environment, with defaults that work on one machine."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def var() -> Path:
    """All run-time state (``BALLAST_VAR``, default ``var/`` beside params.yaml)."""
    return Path(os.environ.get("BALLAST_VAR") or ROOT / "var").resolve()


def source() -> Path:
    """Where relative paths of a source start (``BALLAST_SOURCE``, default: the working directory)."""
    return Path(os.environ.get("BALLAST_SOURCE") or "")


def landing() -> Path:
    """The landing store: partitions as they came, by content (``BALLAST_LANDING``)."""
    return Path(os.environ.get("BALLAST_LANDING") or var() / "landing").resolve()


def state_uri() -> str:
    """The state store (``BALLAST_STATE_URI``, an SQLAlchemy URL)."""
    return _absolute(os.environ.get("BALLAST_STATE_URI") or f"sqlite:///{var() / 'state.db'}")


def tracking_uri() -> str:
    """The MLflow server (``MLFLOW_TRACKING_URI``), else its SQLite file under var/."""
    return _absolute(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{var() / 'mlflow' / 'mlflow.db'}")


def travels() -> bool:
    """Whether workspaces travel between workers: either of the two remotes is set."""
    return bool(os.environ.get("BALLAST_GIT_REMOTE") or os.environ.get("BALLAST_DVC_REMOTE"))


def git_remote() -> str:
    """Where travelling workspaces are cloned from and keep their refs (``BALLAST_GIT_REMOTE``, else the checkout)."""
    remote = os.environ.get("BALLAST_GIT_REMOTE") or str(ROOT)
    return str(Path(remote).resolve()) if Path(remote).exists() else remote


def dvc_remote() -> str:
    """DVC's remote: a URL or a folder (``BALLAST_DVC_REMOTE``, default ``dvc-remote`` under ``BALLAST_VAR``)."""
    remote = os.environ.get("BALLAST_DVC_REMOTE") or str(var() / "dvc-remote")
    return remote if "://" in remote else str(Path(remote).resolve())


def _absolute(uri: str) -> str:
    """A SQLite URL with its path made absolute: a step works in another folder than the one who set it."""
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri or path in ("", ":memory:") else f"sqlite:///{Path(path).absolute()}"


def mlflow_artifacts() -> Path:
    """Where MLflow keeps artifacts when this machine is all there is."""
    return var() / "mlflow" / "artifacts"
