from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from socket import create_server
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from conftest import Project

from pipelines import tracking
from pipelines.errors import TryAgain

SETTINGS = {"seed": 1, "threads": 2, "tabm": {"width": 8}}


def run_of(live: tracking.LiveRun) -> Any:
    return tracking.client().get_run(live.run_id)


def points(live: tracking.LiveRun, name: str) -> list[tuple[int, float]]:
    history = tracking.client().get_metric_history(live.run_id, name)
    return sorted((point.step, point.value) for point in history)


@pytest.fixture
def nobody_listens() -> str:
    with closing(create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_training_run_logs_parameters_history_and_environment(project: Project) -> None:
    with tracking.training_run("late", SETTINGS) as live:
        live.log(1, {"tabm/loss": 0.7})
        live.log(2, {"tabm/loss": 0.6})
        live.trained("d" * 64)
    run = run_of(live)
    assert run.data.params == {"seed": "1", "threads": "2", "tabm.width": "8"}
    assert points(live, "tabm/loss") == [(1, 0.7), (2, 0.6)]
    assert (run.info.status, run.data.tags[tracking.DIGEST]) == ("FINISHED", "d" * 64)
    found = json.loads(Path(tracking.client().download_artifacts(live.run_id, "environment.json")).read_text())
    assert (found["recorded_by"], found["threads"]) == ("train", 2)
    assert found["cpu_capability"]
    assert "gpu" in found


def test_training_run_of_a_repeated_dag_run_goes_on_in_the_same_run(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALLAST_DAG", "retrain_scheduled")
    monkeypatch.setenv("BALLAST_RUN", "manual__2013-04-01T00:00:00+00:00")
    with pytest.raises(KeyboardInterrupt), tracking.training_run("late", SETTINGS) as first:
        first.log(1, {"loss": 0.7})
        raise KeyboardInterrupt
    assert run_of(first).info.status == "KILLED"
    with tracking.training_run("late", SETTINGS) as second:
        second.log(1, {"loss": 0.7})
        second.log(2, {"loss": 0.6})
    assert second.run_id == first.run_id
    assert points(second, "loss") == [(1, 0.7), (2, 0.6)]
    assert run_of(second).info.status == "FINISHED"
    monkeypatch.setenv("BALLAST_DAG", "retrain_on_drift")
    with tracking.training_run("late", SETTINGS) as other:
        assert other.run_id != first.run_id


def test_training_run_takes_the_run_that_is_handed_in(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking.training_run("late", {}) as first:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", str(first.run_id))
    with tracking.training_run("late", {}) as second:
        assert second.run_id == first.run_id


def test_training_run_without_a_server_warns_once_and_goes_on(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nobody_listens: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody_listens)
    with tracking.training_run("late", SETTINGS) as live:
        live.log(1, {"loss": 0.7})
        live.log(2, {"loss": 0.6})
    assert live.run_id is None
    assert len(caplog.records) == 1
    assert nobody_listens in caplog.text


def test_training_run_that_loses_its_server_warns_once_and_goes_on(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nobody_listens: str
) -> None:
    with tracking.training_run("late", SETTINGS) as live:
        live.log(1, {"loss": 0.7})
        monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody_listens)
        live.log(2, {"loss": 0.6})
        live.log(3, {"loss": 0.5})
    assert len(caplog.records) == 1


def test_client_without_its_server_says_so_at_once(
    project: Project, monkeypatch: pytest.MonkeyPatch, nobody_listens: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody_listens)
    began = time.monotonic()
    with pytest.raises(TryAgain, match=f"{nobody_listens} does not answer"):
        tracking.client()
    assert time.monotonic() - began < 3


def test_client_killed_while_it_makes_its_database_leaves_none_and_the_next_one_works(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    file = project.root / "var" / "mlflow" / "mlflow.db"
    file.unlink()

    def killed(uri: str) -> None:
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as half:
            half.execute("CREATE TABLE experiments (half INTEGER)")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "MlflowClient", killed)
        with pytest.raises(KeyboardInterrupt):
            tracking.client()
    assert not file.exists()
    assert tracking.client().search_experiments()
    assert file.exists()


def test_client_switches_mlflow_to_our_settings_before_its_import(project: Project) -> None:
    """It reads them, telemetry's too, when it is imported: also where a process begins with a training."""
    code = """
from pipelines import tracking
with tracking.training_run("late", {}, run_id="f" * 32) as live:
    assert live.run_id
import logging
from mlflow.telemetry.client import get_telemetry_client
assert get_telemetry_client() is None
assert logging.getLogger("mlflow").level == logging.WARNING
"""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MLFLOW_", "DO_NOT_TRACK", "CI", "PYTEST"))
    }
    root = Path(tracking.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env={**env, "PYTHONPATH": str(root)}, timeout=60)


# --- which run, and how it ends


@pytest.mark.parametrize(
    ("error", "status"), [(SystemExit(143), "KILLED"), (KeyboardInterrupt(), "KILLED"), (ValueError("x"), "FAILED")]
)
def test_training_run_that_breaks_off_says_how(project: Project, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), tracking.training_run("late", SETTINGS) as live:
        raise error
    assert run_of(live).info.status == status


def test_training_run_of_a_run_id_goes_on_in_it(project: Project) -> None:
    with suppress(KeyboardInterrupt), tracking.training_run("late", SETTINGS) as first:
        first.log(1, {"loss": 0.7})
        raise KeyboardInterrupt
    with tracking.training_run("late", SETTINGS, run_id=first.run_id) as second:
        assert run_of(second).info.status == "RUNNING"
        second.log(1, {"loss": 0.7})
        second.log(2, {"loss": 0.6})
    assert second.run_id == first.run_id
    assert points(second, "loss") == [(1, 0.7), (2, 0.6)]
    assert run_of(second).info.status == "FINISHED"


def test_training_run_of_a_run_id_that_is_gone_begins_another(project: Project) -> None:
    with tracking.training_run("late", SETTINGS) as deleted:
        pass
    tracking.client().delete_run(deleted.run_id)
    for gone in (deleted.run_id, "f" * 32):
        with tracking.training_run("late", SETTINGS, run_id=gone) as live:
            pass
        assert live.run_id not in (None, gone)


def test_training_run_of_a_dag_run_takes_no_other_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking.training_run("late", {}) as laptop:
        pass
    monkeypatch.setenv("BALLAST_RUN", "manual__1")
    with tracking.training_run("late", {}, run_id=laptop.run_id) as dag:
        assert dag.run_id != laptop.run_id
    with tracking.training_run("late", {}, run_id=laptop.run_id) as again:
        assert again.run_id == dag.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", str(laptop.run_id))
    with tracking.training_run("late", {}, run_id=dag.run_id) as named:
        assert named.run_id == laptop.run_id


# --- data sets


@pytest.fixture
def prepared(project: Project) -> dict[str, Path]:
    """Two windows as prepare writes them, in the working directory."""
    folder = Path("data/prepare")
    test = pd.read_parquet(folder / "test.parquet")
    for name, part in {"train": test[:300], "validation": test[300:]}.items():
        part.to_parquet(folder / f"{name}.parquet", index=False)
    return {name: folder / f"{name}.parquet" for name in ("train", "validation")}


def datasets(live: tracking.LiveRun) -> dict[str, Any]:
    """The data sets of a run by their context, each once."""
    inputs = run_of(live).inputs.dataset_inputs
    found = {tag.value: one.dataset for one in inputs for tag in one.tags if tag.key == "mlflow.data.context"}
    assert len(found) == len(inputs)
    return found


def test_training_run_names_its_data_sets(prepared: dict[str, Path]) -> None:
    from mlflow.types import Schema

    with tracking.training_run("late", {}, inputs=prepared) as live:
        pass
    found = datasets(live)
    assert list(found) == ["train", "validation"]
    assert [one.name for one in found.values()] == ["prepare/train.parquet", "prepare/validation.parquet"]
    train = found["train"]
    assert json.loads(train.source) == {"path": "data/prepare/train.parquet", "md5": train.digest}
    assert (train.source_type, json.loads(train.profile)) == ("dvc", {"num_rows": 300})
    columns = Schema.from_json(json.dumps(json.loads(train.schema)["mlflow_colspec"])).input_dict()
    types = {name: column.type.name for name, column in columns.items()}
    assert types == {"key": "string", "time": "datetime", "label": "integer", "x": "double", "c": "string"}


def test_data_set_has_the_hash_that_dvc_has(prepared: dict[str, Path]) -> None:
    stage = {"cmd": "true", "outs": [str(path) for path in prepared.values()]}
    Path("dvc.yaml").write_text(json.dumps({"stages": {"prepare": stage}}))
    for command in ("init --no-scm -q", "commit -f -q"):
        subprocess.run([sys.executable, "-m", "dvc", *command.split()], check=True, timeout=60)
    outs = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["prepare"]["outs"]
    with tracking.training_run("late", {}, inputs=prepared) as live:
        pass
    found = {json.loads(one.source)["path"]: one.digest for one in datasets(live).values()}
    assert found == {out["path"]: out["md5"] for out in outs}


def test_training_run_that_goes_on_has_its_data_sets_once(prepared: dict[str, Path]) -> None:
    with tracking.training_run("late", {}, inputs={"train": prepared["train"]}) as first:
        pass
    with tracking.training_run("late", {}, run_id=first.run_id, inputs=prepared) as second:
        pass
    assert list(datasets(second)) == ["train", "validation"]
    with tracking.training_run("late", {}, inputs={**prepared, "test": Path("not/there.parquet")}) as other:
        pass
    assert {name: one.digest for name, one in datasets(other).items()} == {
        name: one.digest for name, one in datasets(second).items()
    }


# --- system metrics


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")


@pytest.mark.usefixtures("sampled")
def test_training_run_shows_the_system_and_goes_on_where_it_was_cut_off(project: Project) -> None:
    with suppress(SystemExit), tracking.training_run("late", SETTINGS) as first:
        time.sleep(1)
        assert len(watchers()) == 1
        sys.exit()
    assert not watchers()
    before = points(first, "system/cpu_utilization_percentage")
    assert len(before) > 2
    with tracking.training_run("late", SETTINGS, run_id=first.run_id) as second:
        time.sleep(1)
    steps = [step for step, _ in points(second, "system/cpu_utilization_percentage")]
    assert steps == list(range(len(steps)))
    assert len(steps) > len(before) + 2
    names = set(run_of(second).data.metrics)
    assert {"system/system_memory_usage_percentage", "system/disk_usage_percentage"} <= names


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("call", ["net_io_counters", "virtual_memory"])
def test_training_run_goes_on_where_the_system_cannot_be_read(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """The first is called in the beginning, the second for each sample."""

    def denied() -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, call, denied)
    with tracking.training_run("late", SETTINGS) as live:
        time.sleep(0.5)
        assert not watchers()
        live.log(1, {"loss": 0.7})
    assert run_of(live).info.status == "FINISHED"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "AccessDenied" in caplog.text


@pytest.mark.usefixtures("sampled")
def test_training_run_whose_store_hangs_waits_only_shortly_for_the_system_metrics(project: Project) -> None:
    with tracking.training_run("late", SETTINGS) as live:
        pass
    tracking.client().update_run(live.run_id, status="RUNNING")
    with closing(sqlite3.connect(project.root / "var" / "mlflow" / "mlflow.db", isolation_level=None)) as other:
        with tracking._system_metrics(live.run_id):
            time.sleep(0.3)
            other.execute("BEGIN EXCLUSIVE")
            time.sleep(0.3)
            [watcher] = watchers()
            began = time.monotonic()
        assert time.monotonic() - began < tracking.END_S + 1
        other.execute("ROLLBACK")
    watcher.join()


# --- studies


def test_child_runs_lie_under_their_study_and_end_each_in_its_way(project: Project) -> None:
    class Pruned(Exception):
        pass

    with tracking.parent_run("it's late", {"sampler": "tpe"}) as parent:
        children = []
        for error in (None, Pruned(), ValueError("x"), KeyboardInterrupt()):
            with (
                suppress(BaseException),
                tracking.child_run(parent.run_id, f"trial {len(children)}", {"tabm": {"width": 8}}, Pruned) as child,
            ):
                children.append(child)
                child.log(1, {"log_loss": 0.5})
                if error:
                    raise error
    experiment = tracking.client().get_experiment_by_name(tracking.TUNING)
    where = f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    found = tracking.client().search_runs([experiment.experiment_id], where, order_by=["attributes.start_time"])
    assert [run.info.run_id for run in found] == [child.run_id for child in children]
    assert [run.info.status for run in found] == ["FINISHED", "KILLED", "FAILED", "KILLED"]
    assert [run.info.run_name for run in found] == ["trial 0", "trial 1", "trial 2", "trial 3"]
    assert found[0].data.params == {"tabm.width": "8"}
    assert found[0].data.metrics == {"log_loss": 0.5}


def test_parent_run_of_a_study_that_goes_on_is_its_run(project: Project, prepared: dict[str, Path]) -> None:
    with suppress(KeyboardInterrupt), tracking.parent_run("it's late", {"sampler": "tpe"}, prepared) as first:
        first.log(1, {"best": 0.5})
        raise KeyboardInterrupt
    assert run_of(first).info.status == "KILLED"
    with tracking.parent_run("it's late", {"sampler": "tpe"}, prepared) as second:
        second.log(1, {"best": 0.5})
        second.tag({"ballast.best": "trial 7"})
    assert second.run_id == first.run_id
    assert points(second, "best") == [(1, 0.5)]
    assert list(datasets(second)) == ["train", "validation"]
    run = run_of(second)
    assert (run.info.run_name, run.data.tags["ballast.best"]) == ("it's late", "trial 7")
    with tracking.parent_run("later", {}) as other:
        assert other.run_id != first.run_id


def test_child_run_of_a_study_without_mlflow_is_none(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nobody_listens: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody_listens)
    with tracking.parent_run("late", {}) as parent, tracking.child_run(parent.run_id, "trial 0", {}) as child:
        child.log(1, {"log_loss": 0.5})
    assert (parent.run_id, child.run_id) == (None, None)
    assert len(caplog.records) == 1
