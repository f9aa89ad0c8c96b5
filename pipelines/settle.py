"""Settle: has what the window before asked for come to its end? Each window is scored with the champion that it led to.

Waiting is for machines only: a challenger that waits for a person, or is held, is no reason to leave a month unseen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipelines import retraining, stage
from pipelines.errors import exit_with
from pipelines.retraining import BEGINS_WITHIN, ENDS_WITHIN
from pipelines.state import Retraining, State


def settle(state: State) -> dict[str, Any]:
    """Say whether to go on; a retraining that is dead by now is ended as failed, and said so."""
    if running := retraining.under_way(state):
        return {"verdict": "wait", "summary": f"waits: {retraining.words(running)}"}
    if coming := retraining.unpromoted(state):
        return {"verdict": "wait", "summary": f"waits: {coming}"}
    dead = [one for one in state.retrainings() if not one.ended_at]
    for one in dead:
        state.end_retraining(one.run or one.asked_by, "failed")
    return {"verdict": "go", "summary": " · ".join(map(_lost, dead)) or "no retraining is under way"}


def _lost(dead: Retraining) -> str:
    """What a person should know of a retraining that nobody waits for any longer."""
    if dead.run:
        return (
            f"waits no longer: {retraining.words(dead)}, over {_hours(ENDS_WITHIN)}: mend that run and clear its task"
        )
    remedy = "events for a paused DAG are lost: unpause retrain_on_drift, or start retrain_on_alert by hand"
    return f"waits no longer: {retraining.words(dead)}, and none began in {_hours(BEGINS_WITHIN)}; {remedy}"


def _hours(limit: Any) -> str:
    return f"{limit.total_seconds() / 3600:g} h"


def main() -> None:
    """Run the step in the root of a workspace."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.settle")
    parser.add_argument("--out", type=Path, default=Path("data/settle"))
    stage.finish("settle", parser.parse_args().out, settle(State()))


if __name__ == "__main__":
    exit_with(main)
