"""Promote: make a version the champion, on a decision record that still holds. Around it leads only what
a person does by force, and that stays in the ledger with all that it went round.

While promotion is frozen, or the model in quarantine after a rollback, it is held: a result, not a failure, as the
gate's refusal is one.

The ledger first, then the aliases: killed in between, running it again (or ``ballast status``) completes it.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path
from typing import Any

from pipelines import approval, champion, provenance, record, registry, stage
from pipelines.errors import BallastError, Conflict, Held, exit_with
from pipelines.state import Entry, State, freeze_words, frozen, moves, quarantined, said_by, today
from pipelines.workspace import using


def promote(version: int, record_sha256: str, state: State) -> dict[str, Any]:
    """Move the champion to ``version`` if its record holds; done before by this record, change nothing.

    Raises BallastError if the record is not the gate's, was changed, is of another version or refuses; Conflict if
    the champion has moved since the decision.
    """
    facts = record.holding(version, record_sha256, state)
    ledger = state.ledger()
    moved = moves(ledger)
    done = bool(moved) and moved[-1].record_sha256 == record_sha256
    try:
        if not done and (away := _quarantine(version, facts["digest"], ledger)):
            raise Held(f"{away}. v{version} is not promoted; a person may: {by_force(version)}")
        if not done and (word := approval.missing(facts, record_sha256, ledger)):
            raise Held(f"{word}. v{version} is not promoted")
        entry = moved[-1] if done else _append(facts, record_sha256, state, ledger)
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


def force(version: int, reason: str, state: State, head: str | None = None) -> dict[str, Any]:
    """Make ``version`` champion on a person's word, round all that stands against it.

    ``head`` is the champion's move that the person saw; raises Conflict if it has moved since.
    """
    reason = provenance.stated(reason, "A promotion by force")
    with using():
        around = "; ".join(against(version, state)) or "nothing: its record holds"
        entry = state.append(
            "force",
            version,
            head=head or state.head(),
            reason=f"{reason} · went round: {around}",
            actor=provenance.actor(),
            as_of=today(state),
        )
    champion.project(state)
    registry.set_tags(version, {"ballast.forced": f"{entry.at} by {entry.actor}: {entry.reason}"})
    before = f"v{entry.from_version}" if entry.from_version else "none"
    return {
        "summary": f"FORCED · champion: {before} → v{version} · {entry.reason}",
        "verdict": "forced",
        "model": registry.name(),
        "version": version,
        "from": entry.from_version,
        "to": version,
        "moved": True,
    }


def against(version: int, state: State) -> list[str]:
    """What stands against promoting ``version``, in words; raise BallastError if it is champion or is not there."""
    digest, ledger = registry.whole(version).digest, state.ledger()
    if state.champion() == version:
        raise BallastError(f"v{version} is the champion already.")
    freeze = frozen(ledger)
    found = [freeze_words(freeze) if freeze else None, _quarantine(version, digest, ledger), _no_record(version, state)]
    return [words for words in found if words]


def by_force(version: int) -> str:
    """The command that goes round what stands against a version."""
    return f"`ballast promote {version} --force --reason TEXT`"


def _no_record(version: int, state: State) -> str | None:
    """Why the gate's newest decision on a version does not let it in, if so."""
    made = [decision for decision in state.decisions() if decision.version == version]
    if not made:
        return "the gate has made no decision on it"
    try:
        facts = record.holding(version, made[-1].record_sha256, state)
    except BallastError as error:
        return str(error).rstrip(".")
    if facts["champion"]["ledger_head"] != state.head():
        return record.outdated(facts, state).partition(". ")[0]
    return approval.missing(facts, made[-1].record_sha256, state.ledger())


def _held(version: int, now: int | None, why: str) -> dict[str, Any]:
    place = {"model": registry.name(), "version": version, "from": now, "to": now}
    return {"summary": why, "verdict": "held", **place, "moved": False}


def _quarantine(version: int, digest: str, ledger: list[Entry]) -> str | None:
    """Whether a person has rolled this model back, be it under another version's number, in words."""
    if not (away := quarantined(ledger)):
        return None
    digests = {known.number: known.digest for known in registry.versions()}
    for number, entry in away.items():
        if number == version or digests.get(number) == digest:
            same = "" if number == version else f" (v{version} is the same model)"
            return f"in quarantine: v{number} was rolled back: {entry.reason} ({said_by(entry)}){same}"
    return None


def _append(facts: dict[str, Any], record_sha256: str, state: State, ledger: list[Entry]) -> Entry:
    """Write the ledger's entry, on the head that the decision saw."""
    if any(entry.record_sha256 == record_sha256 for entry in moves(ledger)):
        raise Conflict(
            f"v{facts['version']} was promoted by this record, and has been replaced since. Run decide again."
        )
    word = approval.last_word(record_sha256, ledger)
    try:
        return state.append(
            "promote",
            facts["version"],
            head=facts["champion"]["ledger_head"],
            reason=facts["summary"] + (f" · {approval.words(word)}" if word else ""),
            actor=provenance.actor(),
            as_of=date.fromisoformat(facts["as_of"]),
            record_sha256=record_sha256,
        )
    except Conflict:
        raise Conflict(record.outdated(facts, state)) from None


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
