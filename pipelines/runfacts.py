"""Airflow's side of the loop as Prometheus metrics: its health, the DAGs, their runs and tasks; by its REST API.

One look takes seven requests, whatever the number of runs, and two more for each DAG that has run since. What Airflow's
people clear or delete is gone from here too, so everything is a gauge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from prometheus_client.core import Metric

from pipelines.dagruns import ACTIVE, PAGE, Airflow, Run, Task
from pipelines.facts import gauge, gauges, stamp

TAG = "ballast"  # that every DAG of ours has
JUDGES = "validate"  # the task that fails where a batch is rejected
HEALTHY = "healthy"
COMPONENTS = ("metadatabase", "scheduler", "dag_processor", "triggerer")
_DAG, _TASK = ("dag_id",), ("dag_id", "task_id")


@dataclass
class Seen:
    """What one look at Airflow found: of each DAG, by its id, the run that ended last, well and not."""

    health: Mapping[str, Any]
    import_errors: int
    dags: Mapping[str, Mapping[str, Any]]
    succeeded: Mapping[str, Run]
    failed: Mapping[str, Run]
    active: Counter[tuple[str, str]]
    rejected: Counter[str]
    tasks: Mapping[str, list[Task]] = field(default_factory=dict)

    @property
    def last(self) -> dict[str, Run]:
        """Of each DAG the run that ended last."""
        runs = [*self.succeeded.values(), *self.failed.values()]
        return {run.dag_id: run for run in sorted(runs, key=lambda run: run.ended or datetime.min.replace(tzinfo=UTC))}


class Watch:
    """Looks at one Airflow again and again; the tasks of a run that has ended are asked for once."""

    def __init__(self, client: Airflow) -> None:
        self.client = client
        self._tasks: dict[tuple[str, str, datetime | None], list[Task]] = {}

    def look(self) -> list[Metric]:
        """Ask Airflow; raises BallastError where it does not answer."""
        client = self.client
        dags = {dag["dag_id"]: dag for dag in client.dags() if TAG in [tag["name"] for tag in dag.get("tags") or ()]}
        seen = Seen(
            health=client.health(),
            import_errors=len(client.import_errors()),
            dags=dags,
            succeeded=self._newest("success", dags),
            failed=self._newest("failed", dags),
            active=Counter((run.dag_id, run.state) for run in client.runs(ACTIVE)),
            rejected=Counter(client.failures(JUDGES)),
        )
        known = {(run.dag_id, run.run_id, run.ended): run for run in seen.last.values()}
        self._tasks = {key: self._tasks.get(key) or client.tasks(run) for key, run in known.items()}
        seen.tasks = {dag_id: tasks for (dag_id, _, _), tasks in self._tasks.items()}
        return families(seen)

    def _newest(self, state: str, dags: Mapping[str, Any]) -> dict[str, Run]:
        """Of each DAG the run that ended last in this state; those beyond the first page are asked for one by one."""
        runs = self.client.runs([state])
        found = {run.dag_id: run for run in reversed(runs) if run.dag_id in dags}
        missing = [dag_id for dag_id in dags if dag_id not in found] if len(runs) >= PAGE else []
        more = [run for dag_id in missing for run in self.client.runs([state], dag_id, limit=1)]
        return found | {run.dag_id: run for run in more}


def families(seen: Seen) -> list[Metric]:
    """All of it."""
    return [*_airflow(seen), *_dags(seen), *_runs(seen), *_tasks(seen)]


def _airflow(seen: Seen) -> list[Metric]:
    up = [
        ((name,), part["status"] == HEALTHY)
        for name in COMPONENTS
        if (part := seen.health.get(name)) and part.get("status")
    ]
    return [
        gauges("airflow_component_up", "1 if Airflow calls this part of itself healthy.", ("component",), up),
        gauge("airflow_import_errors", "Files of DAGs that do not import.", seen.import_errors),
    ]


def _dags(seen: Seen) -> list[Metric]:
    paused = [((dag_id,), bool(dag["is_paused"])) for dag_id, dag in seen.dags.items()]
    due = [((dag_id,), stamp(dag.get("next_dagrun_run_after"))) for dag_id, dag in seen.dags.items()]
    rejected = [((dag_id,), seen.rejected[dag_id]) for dag_id in seen.dags]
    return [
        gauges("dag_paused", "1 if the DAG is paused: it runs nothing.", _DAG, paused),
        gauges("dag_next_run_timestamp_seconds", "When its schedule is due next (wall time).", _DAG, due),
        gauges("rejected_batches", "Runs whose data validation did not pass, and stands so.", _DAG, rejected),
    ]


def _runs(seen: Seen) -> list[Metric]:
    active = [((dag_id, state), seen.active[dag_id, state]) for dag_id in seen.dags for state in ACTIVE]
    last = {dag_id: run for dag_id, run in seen.last.items() if run.started and run.ended}
    took = [((dag_id,), (run.ended - run.started).total_seconds()) for dag_id, run in last.items()]  # type: ignore[operator]
    failed = [((dag_id,), run.state == "failed") for dag_id, run in seen.last.items()]

    def ended(runs: Mapping[str, Run]) -> Any:
        return [((dag_id,), run.ended.timestamp() if run.ended else None) for dag_id, run in runs.items()]

    return [
        gauges("dag_runs_active", "Runs that are queued or running.", ("dag_id", "state"), active),
        gauges(
            "dag_last_success_timestamp_seconds", "End of the last run that succeeded.", _DAG, ended(seen.succeeded)
        ),
        gauges("dag_last_failure_timestamp_seconds", "End of the last run that failed.", _DAG, ended(seen.failed)),
        gauges("dag_last_run_failed", "1 if the run that ended last failed.", _DAG, failed),
        gauges("dag_last_run_duration_seconds", "How long that run took.", _DAG, took),
    ]


def _tasks(seen: Seen) -> list[Metric]:
    ran = [(dag_id, task) for dag_id, tasks in seen.tasks.items() for task in tasks if task.started]
    took = [((dag_id, task.task_id), task.seconds) for dag_id, task in ran if task.ended]
    failed = [((dag_id, task.task_id), task.state == "failed") for dag_id, task in ran]
    tries = [((dag_id, task.task_id), task.try_number) for dag_id, task in ran]
    return [
        gauges("task_duration_seconds", "Seconds of a task in its DAG's last run.", _TASK, took),
        gauges("task_failed", "1 if it failed there.", _TASK, failed),
        gauges("task_tries", "How often it was tried there.", _TASK, tries),
    ]
