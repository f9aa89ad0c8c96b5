"""Why a version is as it is and where it is: its data, code, settings, environment, verdicts, when it served."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pipelines import approval, freeze, lineage, provenance, record, registry, tracking
from pipelines.errors import BallastError
from pipelines.registry import Version
from pipelines.state import Entry, State, frozen, moves, quarantined


def explain(number: int, state: State) -> dict[str, Any]:
    """All that the registry, the gate and the ledger know of version ``number``."""
    version = registry.version(number)
    run, tags, ledger = tracking.run_data(version.run_id), version.tags, state.ledger()
    kept = lineage.records(version, lineage.MANIFEST, lineage.VERDICT)
    trigger = json.loads(tags.get("ballast.trigger", "{}"))
    return {
        "model": registry.name(),
        "version": number,
        "digest": version.digest,
        "kind": tags.get("ballast.kind"),
        "registered_at": version.created_at.isoformat(),
        "champion": state.champion() == number,
        "served": served(number, ledger),
        "frozen": freeze.shown(frozen(ledger)),
        "quarantined": freeze.shown(quarantined(ledger).get(number)),
        "decisions": _decisions(number, state),
        "data": {
            "as_of": tags.get("ballast.as_of"),
            "windows": json.loads(tags.get("ballast.windows", "{}")),
            "lock": version.lock,
            "tables": lineage.tables(kept.manifest) if kept.manifest else None,
        },
        "validation": kept.files.get(lineage.VERDICT),
        "environment": _environment(version, kept),
        "missing": dict(kept.missing),
        "code": {"commit": tags.get("ballast.commit")},
        "started_by": {"actor": tags.get("ballast.actor"), **trigger},
        "alert": provenance.alert(trigger),
        "params": dict(run.params),
        "metrics": dict(run.metrics),
        "run_id": version.run_id,
    }


def _environment(version: Version, kept: lineage.Records) -> dict[str, Any]:
    """The hash that dvc.lock has of uv.lock, and what the training found: versions, threads, processor."""
    found = json.loads(registry.kept(version, tracking.ENVIRONMENT) or b"{}")
    return {"uv_lock_md5": kept.md5(lineage.UV_LOCK), **found}


def served(number: int, ledger: list[Entry]) -> list[dict[str, Any]]:
    """The times that a version was champion: from when to when, why, and which version came after."""
    times = []
    moved = moves(ledger)
    for place, entry in enumerate(moved, start=1):
        after = moved[place] if place < len(moved) else None
        if entry.to_version == number:
            times.append(
                {
                    "since": entry.at,
                    "until": after.at if after else None,
                    "by": entry.kind,
                    "reason": entry.reason,
                    "replaced_by": after.to_version if after else None,
                    "replaced_because": f"{after.kind}: {after.reason}" if after else None,
                }
            )
    return times


def _decisions(number: int, state: State) -> list[dict[str, Any]]:
    """What the gate said of the version, the oldest first, each with its record as far as that can be had."""
    made = []
    for decision in state.decisions():
        if decision.version == number:
            try:
                kept: dict[str, Any] = {"record": record.fetch(number, decision.record_sha256), "missing": None}
            except BallastError as error:
                kept = {"record": None, "missing": str(error)}
            said = [approval.words(word) for word in approval.said(decision.record_sha256, state.ledger())]
            made.append({**asdict(decision), **kept, "approval": said})
    return made
