"""Review: does a decision need a person's word before promotion? Then ask; older ones that wait give way."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from pipelines import approval, embedded, provenance, record, registry, stage
from pipelines.errors import BallastError, Conflict, exit_with
from pipelines.state import State

log = logging.getLogger(__name__)

FORM = "approve"  # the task of the DAG `promote` that shows the form


def review(version: int, record_sha256: str, state: State) -> dict[str, Any]:
    """Say whether to promote at once, to ask, or that there is nothing to ask any more: a result, no failure.

    ``overtaken`` are the runs whose forms need no answer any more. Raises BallastError if the record is not the gate's
    or does not pass, and Conflict if the champion has moved since.
    """
    facts, ledger = record.holding(version, record_sha256, state), state.ledger()
    done = any(entry.kind == "promote" and entry.record_sha256 == record_sha256 for entry in ledger)
    if not done and facts["champion"]["ledger_head"] != state.head():
        raise Conflict(record.outdated(facts, state))
    why = None if done else approval.needed(facts)
    if why:
        approval.say("ask", record_sha256, state, reason=why, actor=provenance.actor(), after=None)
    overtaken = overtake(state)
    word = approval.last_word(record_sha256, state.ledger()) if why else None
    place = {"model": registry.name(), "version": version, "record_sha256": record_sha256, "overtaken": overtaken}
    if word is None:
        return {"verdict": "promote", "summary": f"v{version} needs no approval", **place}
    summary = f"v{version} {approval.words(word)}"
    registry.set_tags(version, {"ballast.approval": approval.words(word)})
    if word.kind == "ask":
        return {"verdict": "ask", "summary": summary, **place, **_form(facts, word.reason)}
    return {"verdict": "promote" if word.kind == "approve" else "refuse", "summary": summary, **place}


def overtake(state: State) -> list[str]:
    """Let what waits give way to the newest decision that passed; return the runs that wait for nothing now."""
    passed = {made.record_sha256: made for made in state.decisions() if made.verdict == "promote"}
    newest = next(reversed(passed.values()))
    runs = []
    for entry in approval.waiting(state.ledger()):
        made = passed[str(entry.record_sha256)]
        if made is newest:
            continue
        reason = f"v{newest.version} passed the gate after it"
        word = approval.say(
            "supersede", made.record_sha256, state, reason=reason, actor=provenance.actor(), after="ask"
        )
        registry.set_tags(made.version, {"ballast.approval": approval.words(word)})
        runs.append(entry.actor)
    return runs


def _form(facts: dict[str, Any], why: str) -> dict[str, Any]:
    """What a person is shown, and for how long."""
    champion = facts["champion"]["version"]
    instead = f"in the place of v{champion}" if champion else "as the first champion"
    return {
        "subject": f"Promote {facts['model']} v{facts['version']} {instead}? Asked because of: {why}",
        "body": record.markdown(facts),
        "hours": facts["params"]["approval_hours"],
    }


def close(run: str) -> None:
    """Answer the form of an overtaken run in Airflow, so that nobody is asked in vain. Airflow away: it stays open."""
    dag_id, _, run_id = run.partition("/")
    try:
        embedded.connect().answer(dag_id, run_id, FORM, "Reject")
    except BallastError as error:
        log.warning("The form of %s stays open, though its answer changes nothing now: %s", run, error)


def main() -> None:
    """Run the step in the root of a workspace."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.review")
    parser.add_argument("--version", type=int, required=True)
    parser.add_argument("--record-sha256", required=True, help="the hash that decide gave its record")
    parser.add_argument("--out", type=Path, default=Path("data/review"))
    given = parser.parse_args()
    result = review(given.version, given.record_sha256, State())
    for run in result["overtaken"]:
        if run != provenance.actor():
            close(run)
    stage.finish("review", given.out, result)


if __name__ == "__main__":
    exit_with(main)
