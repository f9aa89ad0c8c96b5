from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import Project

from pipelines import registry
from pipelines.errors import BallastError
from pipelines.files import whole_folder
from pipelines.model import load


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
