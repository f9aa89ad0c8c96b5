"""Roll back: the champion before takes its place again, with a reason, in the ledger for good.

The version that it replaces is in quarantine from then on: no machine promotes that model again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipelines import champion, provenance, registry, stage
from pipelines.errors import BallastError, exit_with
from pipelines.state import Entry, State, champions, head_of, moves, today


def target(ledger: list[Entry], to: int | None = None) -> int:
    """The version to go back to: the champion before, or ``to`` if it was ever one."""
    if not (standing := champions(ledger)):
        raise BallastError("There is no champion to roll back: no version was ever promoted.")
    now = standing[-1]
    if to is None:
        if len(standing) < 2:
            raise BallastError(f"There is no champion before v{now} to go back to. `ballast history` shows the ledger.")
        return standing[-2]
    if to == now:
        raise BallastError(f"v{to} is the champion already.")
    served = sorted({entry.to_version for entry in moves(ledger) if entry.to_version})
    if to not in served:
        known = ", ".join(f"v{version}" for version in served)
        raise BallastError(f"v{to} was never champion (these were: {known}). A new version comes in by the gate only.")
    return to


def rollback(state: State, reason: str, to: int | None = None, head: str | None = None) -> dict[str, Any]:
    """Go back; ``head`` is the champion's move that the decision to do so was made on. Raises Conflict if it moved.

    In a DAG run a second call changes nothing: the first may have been killed after it wrote the ledger.
    """
    reason = provenance.stated(reason, "A rollback")
    ledger = state.ledger()
    before = [entry for entry in ledger if _ours(entry)] if provenance.run() else []
    entry = before[-1] if before else _append(state, ledger, reason, to, head)
    champion.project(state)
    return {
        "summary": f"champion: v{entry.from_version} → v{entry.to_version} · rolled back: {entry.reason}"
        f" · v{entry.from_version} is in quarantine",
        "model": registry.name(),
        "version": entry.to_version,
        "from": entry.from_version,
        "to": entry.to_version,
        "moved": not before,
    }


def _ours(entry: Entry) -> bool:
    return entry.kind == "rollback" and entry.actor == provenance.actor()


def _append(state: State, ledger: list[Entry], reason: str, to: int | None, head: str | None) -> Entry:
    goal = registry.version(target(ledger, to)).number  # it is still there
    head = head or head_of(ledger)
    return state.append("rollback", goal, head=head, reason=reason, actor=provenance.actor(), as_of=today())


def main() -> None:
    """Run the step in the root of a workspace."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.rollback")
    parser.add_argument("--reason", required=True)
    parser.add_argument("--to", type=int, help="a version that was champion once")
    parser.add_argument("--out", type=Path, default=Path("data/rollback"))
    given = parser.parse_args()
    stage.finish("rollback", given.out, rollback(State(), given.reason, given.to))


if __name__ == "__main__":
    exit_with(main)
