from __future__ import annotations

import os
import sys
from hashlib import md5
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Project

from pipelines import places, registry, reproduce
from pipelines.errors import BallastError, TryAgain
from pipelines.files import sha256
from pipelines.reproduce import Comparison

HERE = {"recorded_by": "train", "torch": "2.13.0", "threads": 1, "cpu_capability": "AVX2"}


def comparison(**other: Any) -> Comparison:
    same = {"registered": "a", "reproduced": "a", "same_rows": True, "rows": 9, "differing": 0, "max_difference": 0.0}
    return Comparison(**{**same, **other})


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (comparison(), "identical"),
        (comparison(reproduced="b"), "equal"),
        (comparison(differing=1, max_difference=1e-300), "equal"),
        (comparison(reproduced="b", differing=9, max_difference=0.01), "equal"),
        (comparison(reproduced="b", differing=9, max_difference=0.011), "different"),
        (comparison(same_rows=False), "different"),
    ],
)
def test_comparison_outcome_needs_every_bit_for_identical(found: Comparison, outcome: str) -> None:
    assert found.outcome(tolerance=0.01) == outcome


def test_reasons_name_what_the_environment_has_otherwise() -> None:
    recorded = {**HERE, "threads": 4, "cpu_capability": "AVX512"}
    found = reproduce.reasons(recorded, HERE, {"prepare": [], "train": ["data/train/importance.csv"]})
    assert found == [
        "train wrote other bytes: data/train/importance.csv",
        "cpu capability: AVX512 then, AVX2 here",
        "threads: 4 then, 1 here",
    ]


def test_reasons_where_nothing_differs_say_so() -> None:
    assert reproduce.reasons(HERE, HERE, {}) == ["nothing in the recorded environment explains it: it is the same here"]
    assert reproduce.reasons({}, HERE, {}) == ["the environment of the training was not recorded"]
    [found] = reproduce.reasons({**HERE, "recorded_by": "register"}, HERE, {})
    assert "of `register`" in found


def registered(project: Project, **stages: Any) -> int:
    """A version under a dvc.lock whose stages name nothing but what is given."""
    bare = {name: {"cmd": "true", "deps": [], "outs": []} for name in reproduce.STAGES}
    (project.root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {**bare, **stages}}))
    project.train()
    return project.register()


def test_reproduce_without_a_kept_lock_refuses(project: Project) -> None:
    project.train()
    version = project.register()
    with pytest.raises(BallastError, match=r"With v1 no dvc\.lock was kept"):
        reproduce.reproduce(version)


def test_reproduce_with_another_lock_than_the_registered_refuses(project: Project) -> None:
    version = registered(project)
    (project.root / "dvc.lock").write_text("stages: {}")
    registry.attach(version, project.root / "dvc.lock", registry.records(registry.version(version).lock))
    with pytest.raises(BallastError, match=r"The dvc\.lock kept with v1 is \w{12}, and it was registered under \w{12}"):
        reproduce.reproduce(version)


def test_records_are_the_versions_own_where_two_share_a_run(project: Project) -> None:
    """On a laptop: the same model under another lock, as after an edit of evaluate."""
    first = registry.version(registered(project))
    lock = (project.root / "dvc.lock").read_bytes()
    second = registry.version(registered(project, evaluate={"cmd": "false", "deps": [], "outs": []}))
    assert (first.run_id, first.number) == (second.run_id, second.number - 1)
    assert reproduce._records(first).lock == lock
    assert reproduce._records(second).stages["evaluate"]["cmd"] == "false"


def test_reproduce_of_a_commit_that_is_gone_refuses_and_leaves_nothing(project: Project) -> None:
    version = registered(project)
    with pytest.raises(BallastError, match=r"v1 was made by commit unknown, which the repository .* does not have"):
        reproduce.reproduce(version)
    assert list((places.var() / "reproduce").iterdir()) == []


def test_reproduce_of_a_lock_of_two_runs_refuses(project: Project) -> None:
    made = {"cmd": "true", "deps": [], "outs": [{"path": "data/prepare/train.parquet", "md5": "a" * 32}]}
    read = {"cmd": "true", "deps": [{"path": "data/prepare/train.parquet", "md5": "b" * 32}], "outs": []}
    version = registered(project, prepare=made, train=read)
    with pytest.raises(BallastError, match=r"not of one run: train read data/prepare/train\.parquet bbb"):
        reproduce.reproduce(version)


def test_reproduce_twice_at_once_asks_to_wait(project: Project) -> None:
    with reproduce._scratch(), pytest.raises(TryAgain, match="Another reproduction runs"), reproduce._scratch():
        pass


def test_scratch_removes_what_a_killed_reproduction_left(project: Project) -> None:
    left = places.var() / "reproduce" / "workspace" / "data"
    left.mkdir(parents=True)
    with reproduce._scratch() as root:
        assert not root.exists()


def test_other_settings_are_named_by_their_dotted_names() -> None:
    read = {"params": {"params.yaml": {"as_of": "2013-04-01", "land.tables": {"t": 1}, "train": {"seed": 1}}}}
    stages = {name: read for name in reproduce.STAGES}
    settings = {"as_of": "2013-04-01", "land": {"tables": {"t": 1}}, "train": {"seed": 1}, "decide": {}}
    assert reproduce._other_settings(stages, settings) == []
    assert reproduce._other_settings(stages, {**settings, "land": {"tables": {"t": 2}}}) == ["land.tables"]
    assert reproduce._other_settings(stages, {"as_of": "2013-04-01", "train": {"seed": 2}}) == ["land.tables", "train"]


def test_environment_of_a_stage_keeps_all_state_in_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BALLAST_RUN", "BALLAST_STATE_URI", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "PYTHONPATH"):
        monkeypatch.setenv(name, "somewhere")
    found = reproduce._environment(tmp_path)
    assert found["BALLAST_VAR"] == str(tmp_path / "var")
    assert "somewhere" not in found.values()
    assert found["PATH"].endswith(os.environ["PATH"])


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose uv.lock is not the one that this environment was installed from, with a setup of its own."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "uv.lock").write_text("this environment's")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "here"))
    root = tmp_path / "clone"
    (root / "scripts").mkdir(parents=True)
    (root / "uv.lock").write_text("the recorded one")
    (root / "scripts" / "setup.sh").write_text("mkdir -p .venv/bin && echo made > .venv/bin/python")
    return root


def test_python_of_another_lock_is_built_by_the_projects_setup(elsewhere: Path) -> None:
    said: list[str] = []
    python = reproduce._python(elsewhere, True, lambda name, text: said.append(f"{name}: {text}"))
    assert (python, python.read_text()) == (elsewhere / ".venv" / "bin" / "python", "made\n")
    assert said == [f"environment: built from the recorded uv.lock {sha256(elsewhere / 'uv.lock')[:12]}"]


def test_python_of_another_lock_is_refused_where_none_may_be_built(elsewhere: Path) -> None:
    with pytest.raises(BallastError, match=r"The recorded uv.lock is \w{12}, and this .* Leave out --no-build"):
        reproduce._python(elsewhere, False, lambda name, text: None)


def test_python_whose_setup_fails_says_what_it_said(elsewhere: Path) -> None:
    (elsewhere / "scripts" / "setup.sh").write_text("echo no network; exit 3")
    with pytest.raises(BallastError, match=r"(?s)recorded environment failed .* \(exit code 3\).*no network"):
        reproduce._python(elsewhere, True, lambda name, text: None)


def test_python_of_the_recorded_lock_is_this_one(elsewhere: Path, tmp_path: Path) -> None:
    (elsewhere / "uv.lock").write_text("this environment's")
    assert reproduce._python(elsewhere, False, lambda name, text: None) == Path(sys.executable)


def test_check_code_names_what_was_not_committed(tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "train.py").write_text("committed")
    dep = {"path": "pipelines/train.py", "md5": md5(b"committed").hexdigest()}
    stages = {name: {"cmd": "true", "deps": [dep], "outs": []} for name in reproduce.STAGES}

    def records() -> reproduce.Records:
        lock = yaml.safe_dump({"stages": stages}).encode()
        return reproduce.Records("abc-dirty", lock, b"{}", {})

    reproduce._check_code(1, records(), tmp_path)
    dep["md5"] = md5(b"edited").hexdigest()
    with pytest.raises(BallastError, match=r"commit abc-dirty does not hold: pipelines/train\.py had uncommitted"):
        reproduce._check_code(1, records(), tmp_path)
