"""Admit: may this retraining go on to train? Not on refused data while the breaker is open, unless a person asked.

From here on it is under way (retraining.py), until `decide` ends it, or the pause here.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from pipelines import params, provenance, retraining, stage
from pipelines.breaker import Breaker, BreakerParams, read
from pipelines.errors import exit_with
from pipelines.state import State

log = logging.getLogger(__name__)

AUTOMATIC = ("schedule", "drift", "alert")


def admit(breaker: Breaker, kind: str, data: str | None) -> dict[str, Any]:
    """Let a retraining of this ``kind`` of trigger go on with this data, or pause it: a result, no failure."""
    stopped = breaker.stops(data)
    if stopped and kind in AUTOMATIC:
        log.warning("Automatic retraining is paused: %s", breaker.words)
        return {"verdict": "pause", "summary": f"PAUSED · the data was refused before · {breaker.words}"}
    why = f" · asked for by: {kind}" if stopped else " · the data is new" if breaker.is_open else ""
    return {"verdict": "go", "summary": breaker.words + why}


def main() -> None:
    """Run the step in the root of a workspace whose data has been validated."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.admit")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--out", type=Path, default=Path("data/admit"))
    given = parser.parse_args()
    state = State()
    retraining.begin(state, params.as_of(given.params))
    breaker = read(state, params.load(given.params, "breaker", BreakerParams).refusals)
    result = admit(breaker, str(provenance.trigger().get("kind")), provenance.data())
    if result["verdict"] == "pause":
        state.end_retraining(provenance.actor(), "paused")
    stage.finish("admit", given.out, {**result, "breaker": breaker.shown()})


if __name__ == "__main__":
    exit_with(main)
