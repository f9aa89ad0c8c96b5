"""A freeze: no machine promotes a version until a person lifts it. It never stands in the way of a rollback."""

from __future__ import annotations

from typing import Any

from pipelines import provenance
from pipelines.errors import BallastError
from pipelines.state import Entry, State, freeze_words, frozen


def freeze(state: State, reason: str, actor: str | None = None) -> dict[str, Any]:
    """Stop automatic promotion; raise BallastError if it is stopped already."""
    why, who = provenance.stated(reason, "A freeze"), actor or provenance.actor()
    entry = state.note("freeze", _not_frozen, reason=why, actor=who)
    until = "nothing is promoted until `ballast unfreeze --reason TEXT`"
    return {"summary": f"{freeze_words(entry)} · {until}", "frozen": shown(entry)}


def unfreeze(state: State, reason: str) -> dict[str, Any]:
    """Let versions be promoted again; raise BallastError if nothing stops it. What was held waits for a person."""
    since = frozen(state.ledger())
    entry = state.note("unfreeze", _frozen, reason=provenance.stated(reason, "An unfreeze"), actor=provenance.actor())
    made = [made for made in state.decisions() if since and made.decided_at > since.at and made.verdict == "promote"]
    held = f" · passed the gate meanwhile: `ballast promote {made[-1].version}`" if made else ""
    said = f"no longer frozen: {entry.reason} (by {entry.actor}){held}"
    return {"summary": said, "frozen": None, "passed_meanwhile": made[-1].version if made else None}


def shown(entry: Entry | None) -> dict[str, Any] | None:
    """What holds, a freeze or a quarantine, as `--json` has it; None where nothing does."""
    return {"reason": entry.reason, "actor": entry.actor, "since": entry.at} if entry else None


def _not_frozen(ledger: list[Entry]) -> None:
    if there := frozen(ledger):
        raise BallastError(f"Promotion is {freeze_words(there)} already. `ballast unfreeze --reason TEXT` lifts it.")


def _frozen(ledger: list[Entry]) -> None:
    if not frozen(ledger):
        raise BallastError("Promotion is not frozen: there is nothing to lift. `ballast status` shows what holds.")
