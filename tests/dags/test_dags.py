"""What every DAG here must have. A message says what to add."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DAGS = Path(__file__).resolve().parents[2] / "dags"
FILES = sorted(DAGS.glob("*.py"))
HEAVY = ("torch", "mlflow", "pandas", "evidently", "great_expectations", "sklearn", "numpy", "dvc", "pipelines")
WRITERS = ("register", "review", "answer", "promote", "rollback")
PARSE = """
import json, runpy, sys
for file in {files!r}:
    runpy.run_path(file)
print(json.dumps({{"modules": sorted(sys.modules)}}))
"""


@pytest.fixture(scope="module")
def dags() -> dict[str, Any]:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(DAGS))
    assert not bag.import_errors, f"these files do not import: {bag.import_errors}"
    return bag.dags


def test_dags_folder_holds_one_dag_a_file_named_as_the_file(dags: dict[str, Any]) -> None:
    assert sorted(dags) == [file.stem for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_dag_file_is_thin(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert lines <= 60, f"{file.name} has {lines} lines: move what is not schedule, graph or doc_md to plugins/"


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_dag_says_what_it_is_and_what_to_do_when_red(dags: dict[str, Any], name: str) -> None:
    dag = dags[name]
    assert dag.description, f"{name}: add a description"
    assert "ballast" in dag.tags, f"{name}: add the tag `ballast`"
    assert "**When it is red**" in (dag.doc_md or ""), f"{name}: doc_md lacks what to do when it is red"
    waiting = name == "promote"  # runs that wait for a person count
    assert dag.max_active_runs <= (16 if waiting else 2), f"{name}: bound max_active_runs"
    for task in dag.tasks:
        assert task.owner != "airflow", f"{name}.{task.task_id}: default_args lacks an owner"
        asks = task.task_id == "approve"  # a person has the hours that the decision record gives
        assert task.execution_timeout or asks, f"{name}.{task.task_id}: add an execution_timeout"
        assert task.retries, f"{name}.{task.task_id}: add retries; exit codes decide which failures use them"


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_dag_parameters_have_a_title_and_say_what_they_do(dags: dict[str, Any], name: str) -> None:
    for key in dags[name].params:
        schema = dags[name].params.get_param(key).schema
        assert schema.get("title"), f"{name}: the parameter {key} lacks a title for its form"


def test_retraining_dags_share_one_chain(dags: dict[str, Any]) -> None:
    graphs = {
        name: {task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks}
        for name, dag in dags.items()
        if name.startswith("retrain_")
    }
    assert len(graphs) == 3
    assert graphs["retrain_scheduled"] == graphs["retrain_on_drift"] == graphs["retrain_on_alert"]
    assert graphs["retrain_scheduled"]["decide"] == ["challenger_ready", "refused"]
    assert graphs["retrain_scheduled"]["admit"] == ["paused", "prepare"]


def test_promotion_is_reviewed_and_a_person_who_is_asked_is_heard_before_it(dags: dict[str, Any]) -> None:
    graph = {task.task_id: sorted(task.downstream_task_ids) for task in dags["promote"].tasks}
    assert graph == {
        "review": ["approve", "promote", "refused"],
        "approve": ["answer"],
        "answer": ["promote", "refused"],
        "promote": [],
        "refused": [],
    }


def test_replay_takes_the_same_steps_in_the_same_order(dags: dict[str, Any]) -> None:
    from pipelines import replay

    for name, steps in (("monitor", replay.MONITOR), ("retrain_on_drift", replay.RETRAIN), ("promote", ("promote",))):
        tasks = [task for task in dags[name].topological_sort() if hasattr(task, "branches")]
        asking = ("review", "answer")  # a replay asks nobody
        assert [task.step for task in tasks if task.step not in asking] == list(steps), (
            f"{name}: give pipelines/replay.py the same steps"
        )


def test_replay_hands_on_what_the_events_carry(dags: dict[str, Any]) -> None:
    from pipelines import replay

    for name, task, keys in (
        ("monitor", "drift_detected", replay.DETECTED),
        ("retrain_on_drift", "challenger_ready", replay.READY),
    ):
        assert dags[name].get_task(task).keys == list(keys), f"{name}: give pipelines/replay.py the same keys"


def test_train_goes_to_the_queue_that_the_environment_names() -> None:
    code = (
        "from airflow.sdk import DAG; from ballast_chain import retrain\n"
        "with DAG('any') as dag: retrain()\n"
        "print({task.task_id: task.queue for task in dag.tasks})"
    )
    env = os.environ | {"BALLAST_TRAIN_QUEUE": "gpu", "PYTHONPATH": str(DAGS.parent / "plugins")}
    done = subprocess.run([sys.executable, "-c", code], cwd=DAGS, env=env, capture_output=True, text=True, check=True)
    queues = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert {task for task, queue in queues.items() if queue == "gpu"} == {"train"}


def test_pools_of_one_slot_guard_training_and_the_registry(dags: dict[str, Any]) -> None:
    pools = {(name, task.task_id): task.pool for name, dag in dags.items() for task in dag.tasks}
    assert {pool for (_, task), pool in pools.items() if task == "train"} == {"training"}
    assert {pool for (_, task), pool in pools.items() if task in WRITERS} == {"promotion"}


def test_cron_dags_ship_paused_and_consumers_of_events_do_not(dags: dict[str, Any]) -> None:
    """An event for a paused consumer is lost; a cron run of today would find no flights."""
    paused = {name for name, dag in dags.items() if dag.is_paused_upon_creation}
    assert paused == {"retrain_scheduled", "monitor"}


def test_monitor_waits_before_it_looks_and_one_interval_at_a_time(dags: dict[str, Any]) -> None:
    monitor = dags["monitor"]
    assert [task.task_id for task in monitor.roots] == ["settle"]
    assert monitor.get_task("settle").ask_again, "without it a wait would be taken for an end"
    assert monitor.max_active_runs == 1


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ("daily", "0 0 * * *"),
        ("weekly", "0 0 * * 1"),
        ("", "0 0 1 * *"),
        ("hourly", "daily, weekly, monthly (found 'h"),
    ],
)
def test_monitor_interval_is_a_setting(interval: str, said: str) -> None:
    code = "import ballast_calendar as c; print(c.INTERVALS[c.INTERVAL])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"BALLAST_MONITOR_INTERVAL": interval, "PYTHONPATH": str(DAGS.parent / "plugins")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said in done.stdout + done.stderr


def test_parsing_dags_imports_nothing_heavy() -> None:
    code = PARSE.format(files=[str(file) for file in FILES])
    path = [str(DAGS.parent / "plugins")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    loaded = set(json.loads(done.stdout.splitlines()[-1])["modules"])
    assert not loaded & set(HEAVY), f"a DAG file imports {sorted(loaded & set(HEAVY))}: move that into a step"
