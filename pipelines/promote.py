"""Promote: make a version the champion, on a decision record that still holds. There is no other way in.

While promotion is frozen, or the model in quarantine after a rollback, it is held: a result, not a failure, as the
gate's refusal is one.

The ledger first, then the aliases: killed in between, running it again (or ``ballast status``) completes it.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path
from typing import Any

from pipelines import champion, provenance, record, registry, stage
from pipelines.errors import BallastError, Conflict, Held, exit_with
from pipelines.state import Entry, State, moves, quarantined, said_by


def promote(version: int, record_sha256: str, state: State) -> dict[str, Any]:
    """Move the champion to ``version`` if its record holds; done before by this record, change nothing.

    Raises BallastError if the record is not the gate's, was changed, is of another version or refuses; Conflict if
    the champion has moved since the decision.
    """
    facts = _holding(version, record_sha256, state)
    ledger = state.ledger()
    moved = moves(ledger)
    done = bool(moved) and moved[-1].record_sha256 == record_sha256
    try:
        if not done:
            _check_quarantine(version, facts["digest"], ledger)
        entry = moved[-1] if done else _append(facts, record_sha256, state, moved)
    except Held as held:
        return _held(version, state.champion(), str(held))
    champion.project(state)
    before = f"v{entry.from_version}" if entry.from_version else "none"
    return {
        "summary": f"champion: {before} → v{version}" + (" · already so" if done else ""),
        "verdict": "promoted",
        "model": registry.name(),
        "version": version,
        "from": entry.from_version,
        "to": version,
        "moved": not done,
    }


def promote_newest(version: int, state: State) -> dict[str, Any]:
    """Promote ``version`` on the newest decision of the gate on it, as a person asks for it who has no hash at hand."""
    made = [decision for decision in state.decisions() if decision.version == version]
    if not made:
        raise BallastError(f"The gate has made no decision on v{version}. `ballast status` shows the last ones.")
    return promote(version, made[-1].record_sha256, state)


def _held(version: int, now: int | None, why: str) -> dict[str, Any]:
    place = {"model": registry.name(), "version": version, "from": now, "to": now}
    return {"summary": why, "verdict": "held", **place, "moved": False}


def _holding(version: int, record_sha256: str, state: State) -> dict[str, Any]:
    """The record, if it is the gate's own, of this version and model, and passing."""
    if state.decision(record_sha256) is None:
        raise BallastError(
            f"The gate has made no decision {record_sha256[:12]}: the record is forged, or of another state store. "
            f"Run decide for v{version}."
        )
    facts = record.fetch(version, record_sha256)
    if (found := registry.version(version).digest) != facts["digest"]:
        raise BallastError(
            f"The record is of model {facts['digest'][:12]}, and v{version} is {found[:12]} now. Run decide again."
        )
    if facts["verdict"] != "promote":
        raise BallastError(f"The gate refused v{version}: {'; '.join(facts['reasons'])}. A refused version stays out.")
    return facts


def _check_quarantine(version: int, digest: str, ledger: list[Entry]) -> None:
    """Raise Held if a person has rolled this model back, be it under another version's number."""
    if not (away := quarantined(ledger)):
        return
    digests = {known.number: known.digest for known in registry.versions()}
    for number, entry in away.items():
        if number == version or digests.get(number) == digest:
            same = "" if number == version else f" (v{version} is the same model)"
            raise Held(
                f"in quarantine: v{number} was rolled back: {entry.reason} ({said_by(entry)}){same}. v{version} is not "
                f"promoted; a person may: `ballast rollback --to {number} --reason TEXT`"
            )


def _append(facts: dict[str, Any], record_sha256: str, state: State, moved: list[Entry]) -> Entry:
    """Write the ledger's entry, on the head that the decision saw."""
    if any(entry.record_sha256 == record_sha256 for entry in moved):
        raise Conflict(
            f"v{facts['version']} was promoted by this record, and has been replaced since. Run decide again."
        )
    seen = facts["champion"]
    try:
        return state.append(
            "promote",
            facts["version"],
            head=seen["ledger_head"],
            reason=facts["summary"],
            actor=provenance.actor(),
            as_of=date.fromisoformat(facts["as_of"]),
            record_sha256=record_sha256,
        )
    except Conflict:
        raise Conflict(
            f"v{facts['version']} was compared with {_name(seen['version'])}, and since then the champion has moved "
            f"(it is {_name(state.champion())}). Run decide again: it compares with the champion of today."
        ) from None


def _name(version: int | None) -> str:
    return f"v{version}" if version else "no champion"


def main() -> None:
    """Run the step in the root of a workspace."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.promote")
    parser.add_argument("--version", type=int, required=True)
    parser.add_argument("--record-sha256", required=True, help="the hash that decide gave its record")
    parser.add_argument("--out", type=Path, default=Path("data/promote"))
    given = parser.parse_args()
    stage.finish("promote", given.out, promote(given.version, given.record_sha256, State()))


if __name__ == "__main__":
    exit_with(main)
