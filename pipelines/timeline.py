"""What happened to the champion, told to the pages: retrainings, what the gate said of them, the ledger's entries."""

from __future__ import annotations

import logging
import os
from typing import Any
from urllib.parse import quote

from pipelines import page, places, registry
from pipelines.state import MOVES, Decision, Entry, Retraining, State
from pipelines.windows import Event

log = logging.getLogger(__name__)


def events(state: State) -> list[Event]:
    """All that the state store knows, by as-of date and then as it came; with a link where its address is known."""
    decisions = {decision.record_sha256: decision for decision in state.decisions()}
    said = [(decision.as_of, decision.decided_at, _gate(decision)) for decision in decisions.values()]
    said += [(one.as_of, one.asked_at, _retraining(one)) for one in state.retrainings()]
    said += [
        (entry.as_of or entry.at[:10], entry.at, _ledger(entry, decisions.get(entry.record_sha256 or "")))
        for entry in state.ledger()
    ]
    return [{"as_of": as_of, **event} for as_of, _, event in sorted(said, key=lambda one: one[:2])]


def show(state: State) -> None:
    """Bring the pages up to date. They are evidence: that they cannot be written is logged, and fails no step."""
    try:
        page.refresh(places.var() / "reports", events(state))
    except Exception:
        log.warning("The pages under %s are not up to date.", places.var() / "reports", exc_info=True)


def _retraining(one: Retraining) -> dict[str, Any]:
    """Who does it and how it ended; by its page in Airflow."""
    base = os.environ.get("AIRFLOW__API__BASE_URL")
    dag, _, run = (one.run or "").partition("/")
    href = f"{base.rstrip('/')}/dags/{quote(dag)}/runs/{quote(run)}" if base and run else None
    summary = f"{one.run}: {one.outcome or 'under way'}" if one.run else f"{one.asked_by} has asked for it"
    return {"kind": "retraining", "version": None, "summary": summary, "href": href}


def _gate(decision: Decision) -> dict[str, Any]:
    kind = {"promote": "passed", "refuse": "refused"}.get(decision.verdict, decision.verdict)
    return _event(kind, decision.version, decision.summary)


def _ledger(entry: Entry, decision: Decision | None) -> dict[str, Any]:
    """An entry; the one that follows a decision is of its version, and need not say again what that said."""
    version = entry.to_version if entry.kind in MOVES else decision.version if decision else None
    repeated = decision is not None and entry.reason == decision.summary
    return _event(entry.kind, version, "" if repeated else entry.reason)


def _event(kind: str, version: int | None, summary: str) -> dict[str, Any]:
    server = places.tracking_uri()
    known = version is not None and server.startswith("http")
    href = f"{server.rstrip('/')}/#/models/{registry.name()}/versions/{version}" if known else None
    return {"kind": kind, "version": version, "summary": summary, "href": href}
