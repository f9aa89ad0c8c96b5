"""Who and what is behind a step: the run that started it, the code, the data. For the records."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import BallastError
from pipelines.files import sha256

CODE = ("pipelines", "dvc.yaml", "uv.lock")  # what a model is made by; settings and data are in dvc.lock


def actor() -> str:
    """The DAG run this process belongs to, as ``dag/run``, else the user."""
    return run() or getpass.getuser()


def run() -> str | None:
    """The DAG run this process belongs to; None outside of one. Within one it may be a retry of what was killed."""
    dag, run_id = os.environ.get("BALLAST_DAG"), os.environ.get("BALLAST_RUN")
    return f"{dag}/{run_id}" if dag and run_id else None


def stated(reason: str, what: str) -> str:
    """The reason that a person gives for something that stays in the ledger; raise BallastError if it is blank."""
    if not reason.strip():
        raise BallastError(f"{what} needs a reason: it stays in the ledger. Pass --reason TEXT.")
    return reason.strip()


def trigger() -> dict[str, Any]:
    """Who or what asked (``BALLAST_TRIGGER``): its kind, its reason, and what came with it."""
    text = os.environ.get("BALLAST_TRIGGER")
    if not text:
        return {"kind": "laptop", "reason": None}
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise BallastError(f'BALLAST_TRIGGER must be JSON such as {{"kind": "person"}} (found {text[:80]!r}).')
    return found


def alert(trigger: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a person wants to know of the alert that a run's conf holds; None if it holds none."""
    told = (trigger.get("conf") or {}).get("alert")
    if not isinstance(told, dict):
        return None
    words, labels = (told[name] if isinstance(told.get(name), dict) else {} for name in ("annotations", "labels"))
    texts = {
        "name": labels.get("alertname") or told.get("source"),
        "fingerprint": told.get("fingerprint") or told.get("key"),
        "started_at": told.get("startsAt"),
        "summary": words.get("summary") or told.get("reason"),
    }
    named = {str(name): _line(value) for name, value in labels.items()}
    return {**{name: _line(value) if value else None for name, value in texts.items()}, "labels": named}


def _line(text: Any) -> str:
    """Text from outside on one line."""
    return " ".join(str(text).split())


def commit() -> str:
    """The commit of the code here; ``-dirty`` behind it if the code is not what was committed."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return f"{head}-dirty" if _git("status", "--porcelain", "--", *CODE) else head


def data_lock() -> str:
    """The SHA-256 of dvc.lock: every hash of data, settings and code of this workspace; empty without one."""
    lock = Path("dvc.lock")
    return sha256(lock) if lock.exists() else ""


def data() -> str | None:
    """The hash that dvc.lock has of the ingested tables: equal ones mean the same data. None if it has none."""
    lock = Path("dvc.lock")
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {}) if lock.exists() else {}
    outs = {out["path"]: out.get("md5") for out in stages.get("ingest", {}).get("outs", [])}
    return outs.get("data/ingest/tables")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
