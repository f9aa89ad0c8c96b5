"""Answer: write down what a person said of a decision that waits for approval, or that the time is up."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipelines import approval, provenance, record, registry, stage
from pipelines.errors import BallastError, exit_with
from pipelines.state import State


def answer(version: int, record_sha256: str, approved: bool, by: str, reason: str, state: State) -> dict[str, Any]:
    """Write the answer of ``by``, if the decision still waits; what was said before stands. No name: the time is up.

    Raises BallastError if the record is not the gate's, or nobody was asked.
    """
    facts = record.holding(version, record_sha256, state)
    if approval.last_word(record_sha256, state.ledger()) is None:
        raise BallastError(f"Nobody was asked to approve v{version}: its decision needs a review first.")
    word = approval.say(
        "approve" if approved and by else "reject",
        record_sha256,
        state,
        reason=reason if by else f"nobody answered within {facts['params']['approval_hours']:g} h",
        actor=f"{by} in {provenance.actor()}" if by else provenance.actor(),
        after="ask",
    )
    said = approval.words(word)
    registry.set_tags(version, {"ballast.approval": said})
    return {
        "verdict": "promote" if word.kind == "approve" else "refuse",
        "summary": f"v{version} {said}",
        "model": registry.name(),
        "version": version,
        "record_sha256": record_sha256,
    }


def main() -> None:
    """Run the step in the root of a workspace."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.answer")
    parser.add_argument("--version", type=int, required=True)
    parser.add_argument("--record-sha256", required=True, help="the hash that decide gave its record")
    parser.add_argument("--approved", action="store_true", help="without it, it was refused")
    parser.add_argument("--by", default="", help="who answered; empty if the time was up")
    parser.add_argument("--reason", default="")
    parser.add_argument("--out", type=Path, default=Path("data/answer"))
    given = parser.parse_args()
    result = answer(given.version, given.record_sha256, given.approved, given.by, given.reason, State())
    stage.finish("answer", given.out, result)


if __name__ == "__main__":
    exit_with(main)
