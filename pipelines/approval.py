"""Approval: a person's word that a challenger which passed the gate may need (``decide.approval``).

It is asked for, given, refused and overtaken in the ledger, by the hash of the decision record, so that nobody can
change later who said what. The setting that counts is the one in the record: what was decided under it stays so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pipelines.errors import Conflict
from pipelines.state import Entry, State, Word, moves, said_by

Approval = Literal["never", "always", "on_warning"]
WORDS: tuple[Word, ...] = get_args(Word)


def needed(facts: Mapping[str, Any]) -> str | None:
    """Why this decision needs a person's word; None if it needs none."""
    setting, warnings = facts["params"].get("approval", "never"), len(facts["warnings"])
    if setting == "always":
        return "decide.approval is always"
    if setting == "on_warning" and warnings:
        return f"{warnings} warning{'s' if warnings > 1 else ''} of the gate"
    return None


def said(record_sha256: str, ledger: list[Entry]) -> list[Entry]:
    """What was said of this decision, the oldest first."""
    return [entry for entry in ledger if entry.kind in WORDS and entry.record_sha256 == record_sha256]


def last_word(record_sha256: str, ledger: list[Entry]) -> Entry | None:
    """The last that was said of this decision; None if nobody was asked."""
    return next(reversed(said(record_sha256, ledger)), None)


def missing(facts: Mapping[str, Any], record_sha256: str, ledger: list[Entry]) -> str | None:
    """What stands between this decision and promotion, in words; None if it is approved or needs no approval."""
    word = last_word(record_sha256, ledger)
    if not (why := needed(facts)) or (word and word.kind == "approve"):
        return None
    return (
        words(word)
        if word
        else f"needs a person's approval ({why}), and nobody was asked yet: start the DAG promote with it"
    )


def say(word: Word, record_sha256: str, state: State, *, reason: str, actor: str, after: Word | None) -> Entry:
    """Write a word on this decision, if the last one is ``after``; return the last word as it then stands."""

    def check(ledger: list[Entry]) -> None:
        last = last_word(record_sha256, ledger)
        if (last.kind if last else None) != after:
            raise Conflict("Another word came first.")

    try:
        return state.note(word, check, reason=reason, actor=actor, record_sha256=record_sha256)
    except Conflict:
        last = last_word(record_sha256, state.ledger())
        assert last is not None
        return last


def waiting(ledger: list[Entry]) -> list[Entry]:
    """The decisions that wait for an answer: asked, not answered, and the champion has not moved since."""
    last = {entry.record_sha256: entry for entry in ledger if entry.kind in WORDS}
    moved = max((entry.seq for entry in moves(ledger)), default=0)
    return [entry for entry in last.values() if entry.kind == "ask" and entry.seq > moved]


def words(entry: Entry) -> str:
    """One such entry in a line."""
    if entry.kind == "ask":
        return f"waits for approval: {entry.reason} ({said_by(entry)})"
    return f"{_DONE[entry.kind]} by {entry.actor}" + (f": {entry.reason}" if entry.reason else "")


_DONE = {"approve": "approved", "reject": "approval refused", "supersede": "superseded"}
