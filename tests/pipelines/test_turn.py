from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines import turn
from pipelines.dagruns import Airflow, Run, Task
from pipelines.errors import BallastError
from pipelines.turn import RunFailed, Screen

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = date(2013, 4, 1)
RETRAIN = ["land", "train", "decide", "challenger_ready"]
MONITOR = ["settle", "land", "policy", "drift_detected"]
EXECUTE = [{"event": "::group::Pre Execute"}, {"event": "DAG bundles loaded"}, {"event": "::endgroup::"}]


def event(text: str, **more: Any) -> dict[str, Any]:
    return {"event": text, **more}


@dataclass
class FakeAirflow(Airflow):
    """Runs as Airflow tells of them. Each look lets the next task end; `fails` names tasks that fail once."""

    url: str = "http://localhost:8080"
    steps: dict[str, list[str]] = field(
        default_factory=lambda: {
            "retrain_scheduled": RETRAIN,
            "monitor": MONITOR,
            "retrain_on_drift": ["land", "train", "decide", "refused"],
            "promote": ["promote"],
        }
    )
    fails: set[str] = field(default_factory=set)
    runs: dict[tuple[str, str], Run] = field(default_factory=dict)
    ended: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    queued_looks: int = 1

    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, Any]) -> Run:
        if (dag_id, run_id) not in self.runs:
            self.calls.append(f"trigger {dag_id} {run_id} {dict(conf)}")
            self.runs[dag_id, run_id] = Run(dag_id, run_id, "running", START, START, None, conf)
            self.ended[dag_id, run_id] = []
        return self.runs[dag_id, run_id]

    def run(self, dag_id: str, run_id: str) -> Run:
        run = self.runs[dag_id, run_id]
        ended = self.ended[dag_id, run_id]
        waiting = [step for step in self.steps[dag_id] if step not in ended]
        if run.state == "running" and waiting and waiting[0] in self.fails:
            run = replace(run, state="failed")
        elif run.state == "running" and waiting:
            ended.append(waiting[0])
        elif run.state == "running":
            run = replace(run, state="success", ended=START + timedelta(seconds=30))
        self.runs[dag_id, run_id] = run
        return run

    def tasks(self, run: Run) -> list[Task]:
        ended = self.ended[run.dag_id, run.run_id]
        done = [Task(step, "success", 1, START, START + timedelta(seconds=3)) for step in ended]
        failed = [step for step in self.steps[run.dag_id] if step not in ended][: run.state == "failed"]
        return [*done, *(Task(step, "failed", 4, START, START) for step in failed)]

    def result(self, run: Run, task_id: str) -> Any:
        if task_id in ("challenger_ready", "drift_detected"):
            return {"summary": "PROMOTE", "version": 1}  # the payload of its event
        if task_id in ("refused", "no_retraining"):
            return None
        return {"summary": f"{task_id} of {run.dag_id}", "cached": task_id == "land", "seconds": 2.5}

    def log(self, run: Run, task: Task) -> list[dict[str, Any]]:
        self.calls.append(f"log {task.task_id}")
        return [
            event("::group::Log message source details"),
            event(str(turn.var() / "airflow" / "logs" / "attempt=4.log")),
            event("::endgroup::"),
            *EXECUTE,
            event("reading 52,100 rows"),
            event("Task failed", error_detail=[{"exc_value": "train failed (exit 1): the loss is not finite."}]),
            event("::group::Post Execute"),
            event("Pushing xcom"),
        ]

    def clear(self, run: Run) -> Run:
        self.calls.append(f"clear {run.dag_id}")
        self.fails.clear()
        self.runs[run.dag_id, run.run_id] = replace(run, state="running")
        return self.runs[run.dag_id, run.run_id]

    def started_by(self, run: Run) -> list[Run] | None:
        if self.queued_looks:
            self.queued_looks -= 1
            return None
        made = {"monitor": "retrain_on_drift"}.get(run.dag_id, "promote")
        return [self.trigger(made, f"asset__{run.run_id}", {})]


@pytest.fixture(autouse=True)
def fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLAST_VAR", str(tmp_path / "var"))
    monkeypatch.setattr(turn, "POLL_S", 0)


@pytest.fixture
def screen() -> Screen:
    return Screen(Console(file=io.StringIO(), width=120))


def shown(screen: Screen) -> list[str]:
    assert isinstance(screen.console.file, io.StringIO)
    return screen.console.file.getvalue().splitlines()


def test_take_first_turn_shows_every_step_once_and_in_order(screen: Screen) -> None:
    airflow = FakeAirflow()

    took = turn.take(airflow, DAY, screen)

    assert [" ".join(line.split()) for line in shown(screen)] == [
        "",
        "retrain_scheduled · as of 2013-04-01",
        "land land of retrain_scheduled cached",
        "train train of retrain_scheduled 3 s",
        "decide decide of retrain_scheduled 3 s",
        "promote promote of promote 3 s",
        "",
        "monitor · April 2013",
        "land land of monitor cached",
        "policy policy of monitor 3 s",
        "",
        "retrain_on_drift · as of 2013-05-01 · because of monitor 2013-04",
        "land land of retrain_on_drift cached",
        "train train of retrain_on_drift 3 s",
        "decide decide of retrain_on_drift 3 s",
    ]
    assert took == {"retrain_scheduled": 60.0, "monitor": 30.0, "retrain_on_drift": 30.0}


def test_take_starts_runs_with_ids_and_dates_of_the_turn(screen: Screen) -> None:
    airflow = FakeAirflow()

    turn.take(airflow, DAY, screen)

    assert airflow.calls[0] == "trigger retrain_scheduled turn__2013-04-01 {'as_of': '2013-04-01'}"
    assert "trigger monitor turn__2013-04 {'start': '2013-04-01', 'as_of': '2013-05-01'}" in airflow.calls


def test_take_second_turn_starts_nothing_and_shows_the_same_steps(screen: Screen) -> None:
    airflow = FakeAirflow()
    turn.take(airflow, DAY, Screen(Console(file=io.StringIO())))
    airflow.calls.clear()

    turn.take(airflow, DAY, screen)

    assert airflow.calls == []
    assert len([line for line in shown(screen) if line.startswith("  ")]) == 9
    assert "retrain_scheduled · as of 2013-04-01 · taken " in shown(screen)[1]


def test_take_policy_waits_ends_after_the_monitor(screen: Screen) -> None:
    airflow = FakeAirflow()
    airflow.steps["monitor"] = ["land", "policy", "no_retraining"]

    assert list(turn.take(airflow, DAY, screen)) == ["retrain_scheduled", "monitor"]


def test_follow_failed_task_reports_cause_lines_log_and_what_to_do(screen: Screen) -> None:
    airflow = FakeAirflow(fails={"train"})

    with pytest.raises(RunFailed) as error:
        turn.take(airflow, DAY, screen)

    lines = str(error.value).splitlines()
    assert lines[0] == "train failed (exit 1): the loss is not finite."
    assert lines[2] == "    reading 52,100 rows"
    assert "  run       retrain_scheduled · turn__2013-04-01 · try 4" in lines
    assert f"  log       {turn.var() / 'airflow' / 'logs' / 'attempt=4.log'}" in lines
    assert lines[-2].endswith("/dags/retrain_scheduled/runs/turn__2013-04-01/tasks/train")
    assert "`make run` goes on from here" in lines[-1]
    assert not [word for word in ("DAG bundles loaded", "Task failed", "Pushing xcom") if word in str(error.value)]


def test_follow_failed_run_is_cleared_and_goes_on(screen: Screen) -> None:
    airflow = FakeAirflow(fails={"train"})
    with pytest.raises(RunFailed):
        turn.take(airflow, DAY, Screen(Console(file=io.StringIO())))

    turn.take(airflow, DAY, screen)

    assert airflow.calls.count("clear retrain_scheduled") == 1
    assert "  train     train of retrain_scheduled" in "\n".join(shown(screen))


def test_follow_task_tried_again_says_why_once(screen: Screen) -> None:
    class Retrying(FakeAirflow):
        looks = 0

        def tasks(self, run: Run) -> list[Task]:
            self.looks += 1
            tasks = super().tasks(run)
            return [Task("train", "up_for_retry", 1, START, START), *tasks[1:]] if self.looks < 4 else tasks

    airflow = Retrying()
    run = airflow.trigger("promote", "x", {})
    airflow.steps["promote"] = ["train", "promote", "after", "later", "last"]

    turn.follow(airflow, run, screen)

    said = [line for line in shown(screen) if "try 1 failed" in line]
    assert said == ["  train     try 1 failed, another follows: train failed (exit 1): the loss is not finite."]


def test_started_by_lost_event_names_the_dag(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(FakeAirflow):
        def started_by(self, run: Run) -> list[Run] | None:
            return []

    monkeypatch.setattr(turn, "EVENT_WITHIN_S", 0)
    airflow = Deaf()

    with pytest.raises(BallastError, match=r"no run of promote has begun: .*http://localhost:8080/dags/promote"):
        turn.started_by(airflow, airflow.trigger("retrain_scheduled", "x", {}), "promote")


def test_started_by_queued_run_is_waited_for_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "EVENT_WITHIN_S", 0)
    airflow = FakeAirflow(queued_looks=3)

    runs = turn.started_by(airflow, airflow.trigger("retrain_scheduled", "x", {}), "promote")

    assert [run.dag_id for run in runs] == ["promote"]


def test_said_printed_line_that_came_late_still_counts() -> None:
    late = event("error: no space left", logger="task.stdout")

    assert turn.said([*EXECUTE, event("::group::Post Execute"), event("Pushing xcom"), late]) == [
        "error: no space left"
    ]


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([*EXECUTE, event("error: the disk is full"), event("bye")], "the disk is full"),
        ([*EXECUTE, event("killed")], "killed"),
        ([], "its log says nothing"),
    ],
)
def test_cause_without_an_exception_is_what_was_said_last(events: list[dict[str, Any]], words: str) -> None:
    assert turn.cause(events) == words


def test_step_long_summary_wraps_under_itself(screen: Screen) -> None:
    screen.step("drift", "moved " * 20, "2 s")

    first, second = shown(screen)
    assert first.endswith(" 2 s")
    assert len(first) == turn.WIDTH
    assert second.startswith(" " * 12 + "moved")


def test_progress_at_no_terminal_asks_for_no_log(screen: Screen) -> None:
    airflow = FakeAirflow()
    run = airflow.trigger("promote", "x", {})

    turn.Progress(airflow, screen).show(run, [Task("train", "running", 1, START, None)])

    assert "log train" not in airflow.calls
    assert shown(screen) == []


def test_progress_while_a_step_waits_says_for_what() -> None:
    run = Run("monitor", "turn__2013-04", "running", START, START, None, {})
    assert turn._waiting(run, [Task("settle", "up_for_reschedule", 1, START, None)]) == (
        "settle    waits for a retraining that is under way"
    )


def test_progress_at_a_terminal_shows_the_last_line_of_the_task_as_it_is() -> None:
    class Training(FakeAirflow):
        def log(self, run: Run, task: Task) -> list[dict[str, Any]]:
            return [*EXECUTE, event("train     epoch 1"), event("train     epoch [bold] 9/30")]

    screen = Screen(Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None))
    airflow = Training()

    turn.Progress(airflow, screen).show(airflow.trigger("promote", "x", {}), [Task("train", "running", 1, START, None)])
    screen.done()

    assert "train     epoch [bold] 9/30" in "\n".join(shown(screen))


def test_sum_up_before_any_promotion_says_so(screen: Screen) -> None:
    turn.sum_up(screen, {"retrain_scheduled": 130.2, "monitor": 20.0})

    said = "\n".join(shown(screen))
    assert "none: no challenger has passed the gate yet" in said
    assert "2 min 30 s: retrain_scheduled 2 min 10 s · monitor 20 s" in said
    assert "make down" in said


@pytest.mark.parametrize(
    ("day", "end"),
    [
        (date(2013, 4, 1), date(2013, 5, 1)),
        (date(2013, 12, 1), date(2014, 1, 1)),
        (date(2013, 3, 31), date(2013, 4, 30)),
    ],
)
def test_month_after_stays_within_the_next_month(day: date, end: date) -> None:
    assert turn._month_after(day) == end
