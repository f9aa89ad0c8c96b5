"""The circuit breaker: after so many refused retrainings in a row, no machine trains on the same data again.

It is read from the gate's decisions and the ledger, and has no state of its own. A challenger that passes the gate
closes it, and so does a person's word; data that no refusal has seen goes through while it is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines import params, places, provenance
from pipelines.errors import BallastError
from pipelines.params import Params
from pipelines.state import Decision, Entry, State


class BreakerParams(Params):
    """The ``breaker`` section of params.yaml."""

    refusals: int = Field(ge=1)


@dataclass(frozen=True)
class Breaker:
    """The decisions since the last one that passed, or the last reset: all refusals, the oldest first."""

    refused: tuple[Decision, ...]
    limit: int

    @property
    def is_open(self) -> bool:
        """Whether there are too many."""
        return len(self.refused) >= self.limit

    def stops(self, data: str | None) -> bool:
        """Whether an automatic retraining on this data (``provenance.data()``) may not go on."""
        return self.is_open and (data is None or data in {made.data for made in self.refused})

    @property
    def words(self) -> str:
        """How it stands, in one line."""
        if not self.is_open:
            return f"breaker closed: {len(self.refused)} of {self.limit} refusals in a row"
        versions = ", ".join(dict.fromkeys(f"v{made.version}" for made in self.refused))
        return (
            f"breaker OPEN: {len(self.refused)} retrainings in a row were refused ({versions}). Automatic retraining "
            "goes on with new data, or after `ballast breaker reset --reason TEXT`"
        )

    def shown(self) -> dict[str, Any]:
        """The same as `--json` has it."""
        versions = [made.version for made in self.refused]
        return {"open": self.is_open, "refusals": len(versions), "limit": self.limit, "versions": versions}


def settings() -> BreakerParams:
    """The section of the params.yaml here, else of the one beside the code."""
    here = Path("params.yaml")
    return params.load(here if here.exists() else places.ROOT / here, "breaker", BreakerParams)


def read(state: State, limit: int) -> Breaker:
    """How the breaker stands now."""
    resets = [datetime.fromisoformat(entry.at) for entry in state.ledger() if entry.kind == "reset"]
    refused: list[Decision] = []
    for made in state.decisions():
        if resets and datetime.fromisoformat(made.decided_at) <= resets[-1]:
            continue
        # A decide that was killed and tried again is one refusal: the last of its run counts.
        refused = [one for one in refused if made.run is None or one.run != made.run]
        refused = [*refused, made] if made.verdict == "refuse" else []
    return Breaker(tuple(refused), limit)


def reset(state: State, reason: str, limit: int) -> dict[str, Any]:
    """Close it on a person's word; raise BallastError if it is not open."""

    def check(_: list[Entry]) -> None:
        if not read(state, limit).is_open:
            raise BallastError("The breaker is not open: there is nothing to reset.")

    stated = provenance.stated(reason, "A reset of the breaker")
    entry = state.note("reset", check, reason=stated, actor=provenance.actor())
    return {"summary": f"breaker closed: {entry.reason} (by {entry.actor})", "breaker": read(state, limit).shown()}
