from __future__ import annotations

import json
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, read

from pipelines import provenance, registry, tracking
from pipelines.errors import BallastError
from pipelines.files import sha256, write_json


def test_register_ties_the_version_to_its_origin(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLAST_DAG", "retrain_scheduled")
    monkeypatch.setenv("BALLAST_RUN", "manual__1")
    monkeypatch.setenv("BALLAST_TRIGGER", '{"kind": "person", "reason": "a test"}')
    (project.root / "dvc.lock").write_text("lock")
    digest = project.train()
    version = registry.version(project.register())
    assert (version.digest, version.lock) == (digest, sha256(project.root / "dvc.lock"))
    assert version.tags["ballast.as_of"] == "2013-03-02"
    assert version.tags["ballast.train_end"] == "2013-02-02T00:00:00+00:00"
    assert json.loads(version.tags["ballast.trigger"])["reason"] == "a test"
    assert version.tags["ballast.actor"] == "retrain_scheduled/manual__1"
    assert (version.tags["ballast.kind"], version.tags["ballast.commit"]) == ("hgb", "unknown")


def test_register_after_cached_training_fills_a_run(project: Project) -> None:
    project.train()
    write_json(project.root / "data" / "validate" / "verdict.json", {"passed": True})
    version = project.register()
    run_id = registry.version(version).run_id
    run = tracking.run_data(run_id)
    assert run.params == {"seed": "1", "threads": "2", "tabm.width": "8"}
    assert {"hgb/log_loss": 0.5, "test_roc_auc": 0.81, "hgb/validation_log_loss": 0.62}.items() <= run.metrics.items()
    assert "test_pr_auc" not in run.metrics
    history = tracking.client().get_metric_history(run_id, "hgb/validation_log_loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.71), (2, 0.62)]
    for name in ("evaluate/metrics.json", "prepare/schema.json", "validate/verdict.json", "params.yaml"):
        assert registry.attached(version, name)
    environment = json.loads(registry.attached(version, "environment.json") or b"")
    assert environment["recorded_by"] == "register"


def test_register_puts_data_sets_importance_and_refit_with_run_and_version(project: Project) -> None:
    project.train()
    data = project.root / "data"
    trained = read(data / "train" / "result.json")
    write_json(data / "train" / "result.json", {**trained, "refit": False})
    plain = registry.version(project.register())
    assert "ballast.refit" not in {**plain.tags, **tracking.client().get_run(plain.run_id).data.tags}
    assert registry.attached(plain.number, "train/importance.csv") is None
    for window in ("train", "validation"):
        shutil.copy(data / "prepare" / "test.parquet", data / "prepare" / f"{window}.parquet")
    (data / "train" / "importance.csv").write_text("feature,importance,std\nx,0.1,0.01\n")
    write_json(data / "train" / "result.json", {**trained, "refit": True})
    (project.root / "dvc.lock").write_text("another")
    for _ in range(2):
        refit = registry.version(project.register())
    assert refit.number == plain.number + 1
    run = tracking.client().get_run(refit.run_id)
    assert (refit.tags["ballast.refit"], run.data.tags["ballast.refit"]) == ("true", "true")
    for name in ("importance.csv", "history.csv"):
        assert registry.attached(refit.number, f"train/{name}") == (data / "train" / name).read_bytes()
    names = [(one.dataset.name, one.tags[0].value) for one in run.inputs.dataset_inputs]
    assert sorted(names) == [(f"prepare/{name}.parquet", name) for name in ("test", "train", "validation")]


def test_register_after_live_training_takes_its_run_and_adds_what_it_lacks(project: Project) -> None:
    digest = project.train()
    with tracking.training_run(tracking.EXPERIMENT, {"seed": 1, "threads": 2}) as live:
        live.log(1, {"hgb/train_log_loss": 0.7, "hgb/validation_log_loss": 0.71})  # then the server was away
        live.trained(digest)
    version = project.register()
    assert registry.version(version).run_id == live.run_id
    history = tracking.client().get_metric_history(live.run_id, "hgb/validation_log_loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.71), (2, 0.62)]
    assert json.loads(registry.attached(version, "environment.json") or b"")["recorded_by"] == "train"


def test_register_in_a_later_dag_run_takes_the_environment_of_the_training(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is cached: what this process finds here says nothing of it."""
    digest = project.train()
    with tracking.training_run(tracking.EXPERIMENT, {"threads": 7}) as live:
        live.trained(digest)
    monkeypatch.setenv("BALLAST_RUN", "later")
    version = registry.version(project.register())
    assert version.run_id != live.run_id
    environment = json.loads(registry.attached(version.number, "environment.json") or b"")
    assert (environment["recorded_by"], environment["threads"]) == ("train", 7)


def test_register_again_gives_the_same_version(project: Project) -> None:
    project.train()
    first = project.register()
    assert read(project.root / "data" / "register" / "result.json")["created"] is True
    project.train()
    assert project.register() == first
    result = read(project.root / "data" / "register" / "result.json")
    assert (result["created"], result["summary"]) == (False, "late v1 · known: the same model of the same data")
    assert len(registry.versions()) == 1


def test_register_under_another_lock_gives_another_version(project: Project) -> None:
    project.train()
    first = project.register()
    (project.root / "dvc.lock").write_text("other data, by chance the same model")
    assert project.register() == first + 1
    assert len({version.digest for version in registry.versions()}) == 1


class Cut(BaseException):
    """The process is gone: nothing catches this."""


def test_register_cut_off_after_any_call_ends_in_one_version(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first of each kind of call to MLflow it ends; then it is run again."""
    client, count = tracking.client(), 0
    project.train()
    for name in _calls(project, client):
        (project.root / "dvc.lock").write_text(name)  # so that this is a version of its own
        with monkeypatch.context() as patch:
            patch.setattr(client, name, _cutting(getattr(client, name)))
            with pytest.raises(Cut):
                project.register()
        count += 1
        assert project.register() == count, name
    assert count > 10
    assert len(registry.versions()) == count


def _calls(project: Project, client: Any) -> list[str]:
    """The client's methods that a registration calls itself; the second one: the first also makes the experiment."""
    code = "".join(Path(str(module.__file__)).read_text() for module in (registry, tracking))
    called = [name for name in dir(client) if f"client().{name}(" in code]
    seen: list[str] = []
    project.register()
    (project.root / "dvc.lock").write_text("to see the calls")
    with pytest.MonkeyPatch.context() as patch:
        for name in called:
            patch.setattr(client, name, _noting(getattr(client, name), name, seen))
        project.register()
    client.delete_registered_model("late")
    return sorted(set(seen))


def _noting(call: Any, name: str, seen: list[str]) -> Any:
    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return call(*args, **kwargs)

    return noting


def _cutting(call: Any) -> Any:
    def cutting(*args: Any, **kwargs: Any) -> Any:
        with suppress(Exception):
            call(*args, **kwargs)
        raise Cut

    return cutting


def test_register_by_two_processes_on_a_fresh_machine_gives_one_version(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no MLflow database yet: its making is part of the race."""
    project.train()
    monkeypatch.setenv("BALLAST_VAR", str(project.root / "fresh"))
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(Project.register, [project, project])) == [1, 1]
    assert [version.number for version in registry.versions()] == [1]


def test_register_of_a_model_that_was_not_evaluated_says_so(project: Project) -> None:
    project.train()
    write_json(project.root / "data" / "evaluate" / "result.json", {"digest": "f" * 64})
    with pytest.raises(BallastError, match="Run evaluate again"):
        project.register()


def test_commit_of_changed_code_is_dirty_and_of_changed_settings_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert provenance.commit() == "unknown"
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "train.py").write_text("1")
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b.c commit -q -m one"):
        subprocess.run(["git", *command.split()], check=True)
    head = provenance.commit()
    assert len(head) == 40
    (tmp_path / "params.yaml").write_text("as_of: today")
    assert provenance.commit() == head
    (tmp_path / "pipelines" / "train.py").write_text("2")
    assert provenance.commit() == f"{head}-dirty"


def test_trigger_that_is_no_json_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLAST_TRIGGER", "because")
    with pytest.raises(BallastError, match="BALLAST_TRIGGER must be JSON"):
        provenance.trigger()
