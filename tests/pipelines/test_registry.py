from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from socket import create_server
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Project

from pipelines import registry
from pipelines.errors import BallastError, TryAgain
from pipelines.files import whole_folder
from pipelines.model import load

SETTINGS = {"seed": 1, "threads": 2, "tabm": {"width": 8}}


def run_of(live: registry.LiveRun) -> Any:
    return registry.client().get_run(live.run_id)


def points(live: registry.LiveRun, name: str) -> list[tuple[int, float]]:
    history = registry.client().get_metric_history(live.run_id, name)
    return sorted((point.step, point.value) for point in history)


@pytest.fixture
def nobody_listens() -> str:
    with closing(create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_training_run_logs_parameters_history_and_environment(project: Project) -> None:
    with registry.training_run("late", SETTINGS) as live:
        live.log(1, {"tabm/loss": 0.7})
        live.log(2, {"tabm/loss": 0.6})
        live.trained("d" * 64)
    run = run_of(live)
    assert run.data.params == {"seed": "1", "threads": "2", "tabm.width": "8"}
    assert points(live, "tabm/loss") == [(1, 0.7), (2, 0.6)]
    assert (run.info.status, run.data.tags[registry.DIGEST]) == ("FINISHED", "d" * 64)
    found = json.loads(Path(registry.client().download_artifacts(live.run_id, "environment.json")).read_text())
    assert (found["recorded_by"], found["threads"]) == ("train", 2)
    assert found["cpu_capability"]


def test_training_run_of_a_repeated_dag_run_goes_on_in_the_same_run(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALLAST_DAG", "retrain_scheduled")
    monkeypatch.setenv("BALLAST_RUN", "manual__2013-04-01T00:00:00+00:00")
    with pytest.raises(KeyboardInterrupt), registry.training_run("late", SETTINGS) as first:
        first.log(1, {"loss": 0.7})
        raise KeyboardInterrupt
    assert run_of(first).info.status == "FAILED"
    with registry.training_run("late", SETTINGS) as second:
        second.log(1, {"loss": 0.7})
        second.log(2, {"loss": 0.6})
    assert second.run_id == first.run_id
    assert points(second, "loss") == [(1, 0.7), (2, 0.6)]
    assert run_of(second).info.status == "FINISHED"
    monkeypatch.setenv("BALLAST_DAG", "retrain_on_drift")
    with registry.training_run("late", SETTINGS) as other:
        assert other.run_id != first.run_id


def test_training_run_takes_the_run_that_is_handed_in(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with registry.training_run("late", {}) as first:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", str(first.run_id))
    with registry.training_run("late", {}) as second:
        assert second.run_id == first.run_id


def test_training_run_without_a_server_warns_once_and_goes_on(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nobody_listens: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody_listens)
    with registry.training_run("late", SETTINGS) as live:
        live.log(1, {"loss": 0.7})
        live.log(2, {"loss": 0.6})
    assert live.run_id is None
    assert len(caplog.records) == 1
    assert nobody_listens in caplog.text


def test_training_run_that_loses_its_server_warns_once_and_goes_on(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nobody_listens: str
) -> None:
    with registry.training_run("late", SETTINGS) as live:
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
        registry.versions()
    assert time.monotonic() - began < 3


def test_version_that_is_not_there_names_those_that_are(project: Project) -> None:
    with pytest.raises(BallastError, match=r"no late v3 .found none"):
        registry.version(3)
    project.bare_version("a")
    project.bare_version("b")
    with pytest.raises(BallastError, match=r"no late v3 .found v1, v2"):
        registry.version(3)


def test_model_is_what_was_registered(project: Project, rows: pd.DataFrame) -> None:
    digest = project.train()
    folder = registry.model(project.register())
    trained = load(project.root / "data" / "train" / "model")
    assert folder == project.root / "var" / "models" / digest
    np.testing.assert_array_equal(load(folder).predict(rows), trained.predict(rows))
    assert registry.model(1) == folder


def test_model_changed_in_the_registry_is_refused(project: Project) -> None:
    project.train()
    version = project.register()
    stored = next((project.root / "var" / "mlflow" / "artifacts").rglob("transform.json"))
    stored.write_text(stored.read_text().replace("0.", "1.", 1))
    with pytest.raises(BallastError, match=r"Changed since the model was written: transform.json"):
        registry.model(version)


def test_model_replaced_whole_in_the_registry_is_refused(project: Project) -> None:
    project.train()
    version = project.register()
    stored = next((project.root / "var" / "mlflow" / "artifacts").rglob("transform.json")).parent
    project.train(iterations=5)
    with whole_folder(stored) as part:
        for file in (project.root / "data" / "train" / "model").iterdir():
            (part / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BallastError, match="was registered as model"):
        registry.model(version)


def test_model_changed_in_the_cache_is_refused(project: Project) -> None:
    project.train()
    version = project.register()
    (registry.model(version) / "odd.py").write_text("print('hello')")
    with pytest.raises(BallastError, match=r"odd.py"):
        registry.model(version)


def test_pyfunc_of_the_champion_predicts_like_the_model(project: Project) -> None:
    import mlflow

    project.train()
    registry.project(project.register(), None)
    frame = pd.DataFrame({"c": ["a", None, "never seen"], "x": [1.5, float("nan"), -2], "other": [1, 2, 3]})
    served = mlflow.pyfunc.load_model("models:/late@champion")
    np.testing.assert_array_equal(served.predict(frame), load(registry.model(1)).predict(frame))
    names = [(column.name, column.type.name) for column in served.metadata.signature.inputs]
    assert names == [("x", "double"), ("c", "string")]


def test_registered_model_holds_no_pickle_and_no_code(project: Project) -> None:
    project.train()
    project.register()
    stored = {path.suffix for path in (project.root / "var" / "mlflow" / "artifacts").rglob("*") if path.is_file()}
    assert stored & {".pkl", ".pickle", ".py", ".pyc", ".joblib"} == set()


def test_project_done_again_changes_nothing(project: Project) -> None:
    assert registry.aliases() == {}
    first, second = project.bare_version("a"), project.bare_version("b")
    for _ in range(2):
        registry.project(second, first)
        assert registry.aliases() == {"champion": 2, "previous": 1}
    for _ in range(2):
        registry.project(first, None)
        assert registry.aliases() == {"champion": 1}


def test_aliases_read_from_the_file_are_those_of_the_client(project: Project) -> None:
    registry.project(project.bare_version("a"), None)
    registry.client().set_registered_model_alias("late", "mine", "1")
    found = registry.client().get_registered_model("late").aliases
    assert registry.aliases() == {alias: int(version) for alias, version in found.items()} == {"champion": 1, "mine": 1}


def test_attached_files_come_back_byte_by_byte(project: Project) -> None:
    version = project.bare_version("a")
    page = project.root / "page" / "index.html"
    page.parent.mkdir()
    page.write_bytes("· → \r\n".encode())
    registry.attach(version, page.parent, "monitor/2013-04")
    registry.attach(version, page, "alone")
    assert registry.attached(version, "monitor/2013-04/index.html") == page.read_bytes()
    assert registry.attached(version, "alone/index.html") == page.read_bytes()
    assert registry.attached(version, "alone/other.html") is None
