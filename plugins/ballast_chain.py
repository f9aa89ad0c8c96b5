"""The chain of steps, defined once: every DAG that retrains, monitors or promotes is drawn from here."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import Param, TriggerRule, chain

import ballast_notify
from ballast_assets import CHALLENGER_READY, DRIFT_DETECTED
from ballast_operators import (
    AnnounceOperator,
    ApproveOperator,
    StepOperator,
    answered,
    challenger,
    interval_start,
    way_back,
)

# One slot each, made with the stack: one training at a time on a GPU, one writer to the registry.
TRAINING_POOL = "training"
PROMOTION_POOL = "promotion"
# Which workers train, where there are several: those with a GPU listen to a queue of their own.
TRAIN_QUEUE = os.environ.get("BALLAST_TRAIN_QUEUE") or "default"

TELL = ballast_notify.callbacks()
TOLD: dict[str, Any] = {"on_success_callback": TELL}  # of the steps whose verdict a person may want to hear of

DEFAULT_ARGS: dict[str, Any] = {
    "owner": "ballast",
    "retries": 3,
    "retry_delay": timedelta(seconds=10),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=5),
    "execution_timeout": timedelta(minutes=30),
    "on_failure_callback": TELL,
}

AS_OF = Param(
    None,
    type=["null", "string"],
    format="date",
    title="As-of date",
    description="The “now” of this run: nothing on or after its midnight (UTC) is seen. Empty: the clock decides.",
)
REASON = Param(None, type=["null", "string"], title="Reason", description="Why; kept in the records.")


def look() -> list[StepOperator]:
    """What every run begins with: bring the data in and judge it."""
    return [StepOperator(step="land"), StepOperator(step="ingest"), StepOperator(step="validate")]


def retrain() -> None:
    """From the source to a verdict on the challenger. A refusal is a result, not a failure; so is a pause before it."""
    ready = AnnounceOperator(
        task_id="challenger_ready",
        asset=CHALLENGER_READY,
        step="decide",
        keys=["version", "record_sha256", "as_of", "summary"],
    )
    refused, paused = EmptyOperator(task_id="refused"), EmptyOperator(task_id="paused")
    prepare = StepOperator(step="prepare")
    chain(
        *look(),
        StepOperator(step="admit", branches={"go": prepare.task_id, "pause": paused.task_id}, **TOLD),
        [prepare, paused],
    )
    chain(
        prepare,
        StepOperator(step="train", queue=TRAIN_QUEUE, pool=TRAINING_POOL, execution_timeout=timedelta(hours=6)),
        StepOperator(step="evaluate"),
        StepOperator(step="register", pool=PROMOTION_POOL),
        StepOperator(step="decide", branches={"promote": ready.task_id, "refuse": refused.task_id}, **TOLD),
        [ready, refused],
    )


def monitor() -> None:
    """Let what the interval before led to come to its end; score with the champion, and let the policy decide."""
    detected = AnnounceOperator(
        task_id="drift_detected",
        asset=DRIFT_DETECTED,
        step="policy",
        keys=["as_of", "interval", "reasons", "summary", "train_days", "asked_by"],
    )
    nothing = EmptyOperator(task_id="no_retraining")
    chain(
        StepOperator(step="settle", ask_again=timedelta(seconds=20)),
        *look(),
        StepOperator(step="score", arguments=interval_start),
        StepOperator(step="drift"),
        StepOperator(
            step="policy",
            branches={"retrain": detected.task_id, "wait": nothing.task_id, "hold": nothing.task_id},
        ),
        [detected, nothing],
    )


def promote() -> None:
    """Make the challenger of a passing record the champion, after a person's approval where the record asks for it."""
    either: dict[str, Any] = {"trigger_rule": TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS}  # of review and answer
    promoted = StepOperator(step="promote", arguments=challenger, pool=PROMOTION_POOL, **either, **TOLD)
    refused = EmptyOperator(task_id="refused", **either)
    approve = ApproveOperator(
        task_id="approve",
        review="review",
        params={"note": Param(None, type=["null", "string"], title="Note", description="Why; kept in the ledger.")},
        execution_timeout=None,  # Airflow would take it for the time that a person has
    )
    ends = {"promote": promoted.task_id, "refuse": refused.task_id}
    review = StepOperator(
        step="review", arguments=challenger, pool=PROMOTION_POOL, branches={"ask": approve.task_id, **ends}, **TOLD
    )
    answer = StepOperator(step="answer", arguments=answered, pool=PROMOTION_POOL, branches=ends, **TOLD)
    chain(review, [approve, promoted, refused])
    chain(approve, answer, [promoted, refused])


def rollback() -> None:
    """Put the champion before, or an earlier one, back in its place."""
    StepOperator(step="rollback", arguments=way_back, pool=PROMOTION_POOL, **TOLD)
