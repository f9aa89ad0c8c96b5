"""The search: its folds, its study, what survives a kill, and the diff that comes out."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from conftest import Project, day
from optuna.distributions import FloatDistribution, IntDistribution

from pipelines import tracking, tune
from pipelines.errors import BallastError, DataRejected, TryAgain
from pipelines.files import write_json
from pipelines.folds import cut, encode
from pipelines.schema import Features
from pipelines.tune import Asked

SHIPPED = yaml.safe_load((Path(__file__).resolve().parents[2] / "params.yaml").read_text())["train"]
TABM = {"ensemble": 2, "blocks": 1, "width": 8, "embedding": 2, "bins": 4, "epochs": 2, "patience": 5000}
TABM |= {"batch_size": 64, "learning_rate": 0.01, "dropout": 0.0, "weight_decay": 0.0, "averaging": 0.0}
SETTINGS = {"threads": 1, "device": "cpu", "compile": False, "candidates": ["hgb", "tabm"]}
TRAIN = {name: value for name, value in SHIPPED.items() if name != "hgb"} | SETTINGS | {"tabm": SHIPPED["tabm"] | TABM}
PARAMS = f"""\
# The settings of the test.
train:
  hgb:
    iterations: 20
    patience: 20
    learning_rate: 0.001      # far too small
    max_leaf_nodes: 8
{textwrap.indent(yaml.safe_dump(TRAIN, default_flow_style=None), "  ")}
"""
SPACE: dict[str, Any] = {
    "hgb": {"learning_rate": {"low": 0.0005, "high": 0.5, "log": True}, "max_leaf_nodes": {"low": 2, "high": 16}},
    "tabm": {"learning_rate": {"choices": [0.01, 1e-9]}},
    "logistic": {"inverse_penalty": {"choices": [1e-6, 1.0]}},
}
DATA, FILE = Path("data/prepare"), Path("params.yaml")
FEATURES = {"numeric": ["x"], "categorical": ["c"]}


def rows(days: int = 60, a_day: int = 12) -> pd.DataFrame:
    """Rows whose label follows x, in no order of time."""
    random = np.random.default_rng(0)
    number = random.permutation(days * a_day)
    x = random.normal(size=len(number))
    time = pd.to_datetime([day(0)] * len(number)).as_unit("us") + pd.to_timedelta(number * 24 // a_day, unit="h")
    label = (random.random(len(number)) < 1 / (1 + np.exp(-2 * x))).astype("int8")
    c = np.where(random.random(len(number)) < 0.3, "b", "a")
    return pd.DataFrame({"key": number.astype("str"), "time": time, "label": label, "x": x, "c": c})


@pytest.fixture
def small(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """What prepare writes, without the test window: 46 days to train on, 7 to validate. MLflow is away."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (project.root / DATA / "test.parquet").unlink()
    project.root.joinpath(FILE).write_text(PARAMS)
    (project.root / "space.yaml").write_text(yaml.safe_dump(SPACE))
    put(rows())
    return project


def put(frame: pd.DataFrame) -> None:
    for name, start, end in (("train", 0, 46), ("validation", 46, 53)):
        frame[frame["time"].between(day(start), day(end), inclusive="left")].to_parquet(DATA / f"{name}.parquet")
    window = {"start": day(46).isoformat(), "end": day(53).isoformat()}
    write_json(DATA / "schema.json", {"as_of": "2013-03-02", "features": FEATURES, "windows": {"validation": window}})


def run(**asked: Any) -> dict[str, Any]:
    space = asked.pop("space", None)
    if space:
        Path("space.yaml").write_text(yaml.safe_dump(space))
    return tune.tune(DATA, FILE, Asked(**{"space": Path("space.yaml"), **asked}))


def study(name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///var/tune/{name}.db")


def states(name: str) -> list[str]:
    return [trial.state.name for trial in study(name).trials]


def tried(name: str) -> list[tuple[Any, Any]]:
    """The settings and values of the finished trials."""
    finished = [trial for trial in study(name).trials if trial.state.name in ("COMPLETE", "PRUNED")]
    return [(trial.user_attrs["settings"], trial.value) for trial in finished]


# --- the rows ---------------------------------------------------------------------------------------------------------


def test_tune_with_infinite_values_is_refused(small: Project) -> None:
    frame = rows()
    frame.loc[frame["time"] == day(1), "x"] = np.inf
    put(frame)
    with pytest.raises(DataRejected, match=r"`x` is infinite in 1 rows. Guard it in prepare.sql"):
        run()


def test_tune_without_prepared_rows_says_what_makes_them(small: Project) -> None:
    (DATA / "validation.parquet").unlink()
    with pytest.raises(BallastError, match=r"data/prepare has no validation.parquet.*dvc repro prepare"):
        run()


# --- the objective and what comes out ---------------------------------------------------------------------------------


def test_tune_measures_what_train_would_find_in_the_last_fold(small: Project) -> None:
    from pipelines.params import load
    from pipelines.train import TrainParams, fit, log_loss, reproducible

    result = run(trials=1)
    params, frame = load(FILE, "train", TrainParams), rows()
    last = {"start": day(46).isoformat(), "end": day(53).isoformat()}
    [last_fold] = cut(frame.sort_values(["time", "key"]), last, 1)
    fold = encode(last_fold, Features(**FEATURES))
    with reproducible(1, 1):
        candidate = fit("hgb", fold.train, fold.validation, fold.transform, params)
    expected = log_loss(fold.validation, candidate.predict(fold.validation.matrix))
    assert result["present"]["by_fold"][2] == pytest.approx(expected, abs=1e-12)
    assert result["present"]["log_loss"] == pytest.approx(np.mean(result["present"]["by_fold"]))


def test_tune_finds_better_settings_and_a_diff_that_applies(small: Project) -> None:
    result = run(trials=6)
    best = result["best"][0]
    assert result["trials"] == {"asked": 6, "before": 0, "complete": 6, "pruned": 0}
    assert result["gain"]["log_loss"] == pytest.approx(result["present"]["log_loss"] - best["log_loss"])
    assert result["gain"]["log_loss"] > 0.05
    assert len(result["gain"]["by_fold"]) == 3
    assert FILE.read_text() == PARAMS
    assert Path(result["diff_file"]).read_text() == result["diff"]
    subprocess.run(["git", "apply", result["diff_file"]], check=True)
    after = yaml.safe_load(FILE.read_text())["train"]["hgb"]
    assert after == {"iterations": 20, "patience": 20, **best["settings"]}
    assert "# far too small" in FILE.read_text()

    # the settings are the present ones now: their trial is known, and the study goes on from there
    again = run(trials=6)
    assert again["trials"]["before"] == 6
    assert again["present"] == again["best"][0]
    assert (again["gain"]["log_loss"], again["diff"], again["diff_file"]) == (0.0, "", None)
    assert not Path(result["diff_file"]).exists()


def test_tune_from_outside_the_space_goes_on_after_its_diff_is_applied(small: Project) -> None:
    space = {"hgb": {"learning_rate": {"low": 0.1, "high": 0.3}, "max_leaf_nodes": {"choices": [2, 16]}}}
    result = run(space=space, trials=4, folds=1)
    assert result["present"]["settings"] == {"learning_rate": 0.001, "max_leaf_nodes": 8}
    subprocess.run(["git", "apply", result["diff_file"]], check=True)
    again = run(trials=6, folds=1)
    assert (again["trials"]["before"], again["trials"]["complete"] + again["trials"]["pruned"]) == (4, 6)
    assert again["present"]["settings"] == result["best"][0]["settings"]
    FILE.write_text(
        FILE.read_text().replace(
            f"max_leaf_nodes: {again['present']['settings']['max_leaf_nodes']}", "max_leaf_nodes: 9"
        )
    )
    with pytest.raises(BallastError, match=r"has no choice for the present max_leaf_nodes.*--study hgb-2013-03-02-2"):
        run(trials=6, folds=1)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_tune_with_equal_seeds_is_equal(small: Project, sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "STARTUP", 2)
    for name, seed, at_once in (("one", 1, [5]), ("two", 1, [3, 5]), ("three", 2, [3])):
        for trials in at_once:
            run(study=name, sampler=sampler, seed=seed, trials=trials, folds=1)
    assert len({json.dumps(settings) for settings, _ in tried("one")}) == 5
    assert tried("one") == tried("two")
    assert tried("one")[0] == tried("three")[0]
    assert tried("one")[1:3] != tried("three")[1:]


def test_tune_by_grid_tries_every_point_once(small: Project) -> None:
    space = {"hgb": {"max_leaf_nodes": {"low": 2, "high": 8, "step": 3}, "iterations": {"choices": [5, 20]}}}
    result = run(sampler="grid", space=space, folds=1)
    points = [(one["max_leaf_nodes"], one["iterations"]) for one, _ in tried(result["study"])]
    assert sorted(points) == [(2, 5), (2, 20), (5, 5), (5, 20), (8, 5), (8, 20)]
    assert points[0] == (8, 20)
    assert run(sampler="grid", folds=1)["trials"]["before"] == 6
    assert len(tried(result["study"])) == 6


def test_tune_by_grid_after_other_trials_tries_every_point(small: Project) -> None:
    space = {"hgb": {"max_leaf_nodes": {"low": 2, "high": 14, "step": 3}}}
    run(sampler="random", space=space, folds=1, trials=4)
    result = run(sampler="grid", folds=1)
    points = {one["max_leaf_nodes"] for one, _ in tried(result["study"])}
    assert points == {2, 5, 8, 11, 14}
    assert (result["trials"]["asked"], result["trials"]["complete"]) == (5, 5)


def test_tune_fits_equal_settings_once(small: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, fit = [], tune.fit
    monkeypatch.setattr(tune, "fit", lambda kind, *rest: fitted.append(kind) or fit(kind, *rest))
    result = run(sampler="random", space={"hgb": {"max_leaf_nodes": {"choices": [2, 8]}}}, folds=2, trials=6)
    assert len(fitted) == 2 * 2
    assert result["trials"]["complete"] == 6
    assert len(result["best"]) == 2
    [first, *others] = [one for one in study(result["study"]).trials if one.params == {"max_leaf_nodes": 2}]
    for one in others:
        assert (one.value, one.intermediate_values) == (first.value, first.intermediate_values)
        assert one.user_attrs["said"].endswith(f", as trial {first.number} had the same settings")


def test_tune_ends_a_hopeless_trial_in_its_first_epochs(small: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "PRUNE_AFTER", 1)
    result = run(kind="tabm", sampler="grid")
    complete, pruned = study(result["study"]).trials
    assert (complete.state.name, sorted(complete.intermediate_values)) == ("COMPLETE", [1, 2, 3, 4, 5, 6])
    assert (pruned.state.name, sorted(pruned.intermediate_values)) == ("PRUNED", [1])
    assert pruned.user_attrs["said"].startswith("pruned in fold 1/3 epoch 1 at 0.")
    assert result["trials"]["pruned"] == 1
    result = run(sampler="grid", space={"hgb": {"learning_rate": {"choices": [0.1, 0.001, 1e-9]}}})
    assert [len(trial.intermediate_values) for trial in study(result["study"]).trials[1:]] in ([3, 1], [1, 3])


def test_pruner_compares_trials_at_their_step_alone() -> None:
    """A value that rises because the second fold is harder for everyone is no reason to end a trial."""
    made = optuna.create_study(pruner=tune.WorstQuarter())
    for shift in (0.0, 0.0, 0.01, 0.02, 0.03):
        values = {1: 0.30 + shift, 3: 0.60 + shift, 4: 0.50 + shift}  # the first fold ended a step early
        made.add_trial(optuna.trial.create_trial(value=0.5, intermediate_values=values))

    def ends(values: dict[int, float]) -> bool:
        trial = made.ask()
        for step, value in values.items():
            trial.report(value, step)
        ended = trial.should_prune()
        made.tell(trial, state=optuna.trial.TrialState.FAIL)
        return ended

    assert not ends({1: 0.31})
    assert ends({1: 0.33})
    assert not ends({2: 0.31})
    assert ends({2: 0.33})
    assert not ends({1: 0.31, 3: 0.61})
    assert ends({1: 0.30, 3: 0.65})


def test_tune_goes_on_after_settings_that_diverge(small: Project) -> None:
    small.root.joinpath(FILE).write_text(PARAMS.replace("[hgb, tabm]", "[tabm]"))
    result = run(space={"tabm": {"learning_rate": {"choices": [0.01, 1e38]}}}, sampler="grid")
    assert states(result["study"]) == ["COMPLETE", "PRUNED"]
    assert study(result["study"]).trials[1].user_attrs["said"].startswith("failed: The loss is not finite")


def test_tune_gives_up_on_settings_that_fail_twice(small: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = tune.fit

    def failing(kind: Any, *rest: Any) -> Any:
        if rest[3].hgb.max_leaf_nodes == 2:
            raise RuntimeError("no memory")
        return fit(kind, *rest)

    monkeypatch.setattr(tune, "fit", failing)
    result = run(sampler="grid", space={"hgb": {"max_leaf_nodes": {"choices": [2, 8, 16]}}}, folds=1)
    of_2 = [one for one in study(result["study"]).trials if one.params == {"max_leaf_nodes": 2}]
    assert [one.state.name for one in of_2] == ["FAIL", "FAIL", "PRUNED"]
    assert of_2[-1].user_attrs["said"] == "failed: RuntimeError('no memory'); given up after 2 attempts"
    assert (result["ended"], result["trials"]["complete"], result["trials"]["pruned"]) == ("trials", 2, 1)


def test_tune_gives_up_on_settings_whose_process_was_killed_twice(small: Project) -> None:
    run(trials=1, folds=1)
    for _ in range(2):
        left_running()
    run(trials=3, folds=1)
    assert states("hgb-2013-03-02") == ["COMPLETE", "FAIL", "FAIL", "PRUNED", "COMPLETE"]
    said = study("hgb-2013-03-02").trials[3].user_attrs["said"]
    assert said == "failed: its process was killed; given up after 2 attempts"


def test_tune_whose_present_settings_fail_says_so_each_time(small: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(kind: Any, *rest: Any) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(tune, "fit", failing)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="no memory"):
                run(trials=1, folds=1)
    assert run(trials=1, folds=1)["trials"]["complete"] == 1


# --- the study goes on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["data", "settings", "folds", "space", "code", "libraries"])
def test_tune_of_something_else_is_refused(small: Project, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(trials=1, folds=1)
    asked: dict[str, Any] = {"trials": 1, "folds": 1}
    if change == "data":
        put(rows().assign(x=1.0))
    elif change == "settings":
        FILE.write_text(PARAMS.replace("iterations: 20", "iterations: 21"))
    elif change == "folds":
        asked["folds"] = 2
    elif change == "code":
        monkeypatch.setattr(tune, "CODE", [FILE, *tune.CODE[1:]])
    elif change == "libraries":
        monkeypatch.setattr(tune, "LIBRARIES", ("torch", "optuna"))
    else:
        asked["space"] = {"hgb": {"max_leaf_nodes": {"low": 2, "high": 17}}}
        change = "settings and other space"  # what is no longer searched is fixed
    with pytest.raises(BallastError) as error:
        run(**asked)
    assert str(error.value).startswith(f"The study `hgb-2013-03-02` was made for other {change}: ")
    assert str(error.value).endswith("Name a new one: --study hgb-2013-03-02-2")


def test_tune_with_a_file_that_is_no_study_or_a_name_that_is_no_file(small: Project) -> None:
    Path("var/tune").mkdir(parents=True)
    Path("var/tune/x.db").write_text("this is no database, and long enough to be taken for one" * 50)
    with pytest.raises(BallastError, match=r"x.db holds no study: .*not a database"):
        run(study="x")
    with pytest.raises(BallastError, match=r"letters, digits, dots and dashes.*'\.\./x'"):
        run(study="../x")


def test_tune_beside_another_asks_to_wait(small: Project) -> None:
    Path("var/tune").mkdir(parents=True)
    with Path("var/tune/x.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # one that lets others read
        with pytest.raises(TryAgain, match="Another `ballast tune` works on the study `x`"):
            run(study="x")


SLOW = {"tabm": {"epochs": {"choices": [2, 5000]}}}
"""A grid of two points: the present one, and one that takes minutes."""


def test_tune_ends_with_its_budget_in_the_middle_of_a_trial(small: Project) -> None:
    run(kind="tabm", sampler="grid", space=SLOW, trials=1)
    began = time.monotonic()
    result = run(kind="tabm", sampler="grid", budget_s=6)  # a busy machine may need seconds to come to the trial
    assert time.monotonic() - began > 5.9
    assert (result["ended"], result["trials"]["complete"], result["diff"]) == ("budget", 1, "")
    broken_off = study(result["study"]).trials[-1]
    assert (broken_off.state.name, broken_off.user_attrs["settings"]) == ("FAIL", {"epochs": 5000})
    assert "out of time" in broken_off.user_attrs["said"]
    assert run(kind="tabm", sampler="grid", budget_s=1.0)["ended"] == "budget"
    assert study(result["study"]).trials[-1].params == {"epochs": 5000}


def test_tune_killed_in_the_middle_of_a_trial_ends_as_an_unbroken_one(small: Project) -> None:
    code = (
        "from pathlib import Path; from pipelines.tune import Asked, tune;"
        "tune(Path('data/prepare'), Path('params.yaml'), Asked(trials=3, study='killed', space=Path('space.yaml')))"
    )
    FILE.write_text(PARAMS.replace("iterations: 20", "iterations: 100").replace("patience: 20", "patience: 100"))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        while _states_in(Path("var/tune/killed.db")) != ["COMPLETE", "RUNNING"]:
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = states("killed").count("COMPLETE")
    assert done < 3
    result = run(study="killed", trials=3)
    run(study="unbroken", trials=3)
    assert result["trials"] == {"asked": 3, "before": done, "complete": 3, "pruned": 0}
    assert states("killed") == ["COMPLETE"] * done + ["FAIL"] + ["COMPLETE"] * (3 - done)
    assert tried("killed") == tried("unbroken")


def test_tune_tries_again_what_was_broken_off_whatever_the_seed(small: Project) -> None:
    run(trials=1, folds=1)
    left_running()
    run(trials=2, folds=1, seed=7)
    assert states("hgb-2013-03-02") == ["COMPLETE", "FAIL", "COMPLETE"]
    assert tried("hgb-2013-03-02")[1][0] == LEFT


LEFT = {"learning_rate": 0.2, "max_leaf_nodes": 5}


def left_running(**attributes: Any) -> None:
    """What stays in the study of the process that is killed in the middle of a trial."""
    left = study("hgb-2013-03-02")
    left.enqueue_trial(LEFT, user_attrs={"settings": LEFT, "params": LEFT, **attributes})
    left.ask({"learning_rate": FloatDistribution(0.0005, 0.5, log=True), "max_leaf_nodes": IntDistribution(2, 16)})


@pytest.mark.parametrize("begun", [False, True])
def test_tune_killed_before_a_trial_has_its_parameters_tries_every_point_once(small: Project, begun: bool) -> None:
    space = {"hgb": {"max_leaf_nodes": {"choices": [2, 8]}, "iterations": {"choices": [5, 20]}}}
    run(sampler="grid", space=space, folds=1, trials=1)
    left, point = study("hgb-2013-03-02"), {"max_leaf_nodes": 2, "iterations": 5}
    left.enqueue_trial(point, user_attrs={"settings": point, "params": point})
    if begun:
        left.ask().suggest_categorical("max_leaf_nodes", [2, 8])
    run(sampler="grid", folds=1)
    assert states("hgb-2013-03-02") == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    finished = [one for one in study("hgb-2013-03-02").trials if one.state.name == "COMPLETE"]
    assert len({json.dumps(one.params, sort_keys=True) for one in finished}) == 4
    assert all(one.params == one.user_attrs["settings"] for one in finished)


def _states_in(path: Path) -> list[str]:
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return [state for (state,) in connection.execute("SELECT state FROM trials ORDER BY number")]
    except sqlite3.OperationalError:
        return []


# --- MLflow -----------------------------------------------------------------------------------------------------------


def test_tune_is_a_parent_run_with_a_child_for_each_trial(small: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(tune, "PRUNE_AFTER", 1)
    result = run(kind="tabm", sampler="grid", trials=1)
    run(kind="tabm", sampler="grid")
    client = tracking.client()
    experiment = client.get_experiment_by_name(tracking.TUNING)
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    [parent] = [one for one in found if "mlflow.parentRunId" not in one.data.tags]
    complete, pruned = (one for one in found if "mlflow.parentRunId" in one.data.tags)
    assert {one.data.tags["mlflow.parentRunId"] for one in (complete, pruned)} == {parent.info.run_id}
    assert (parent.info.status, complete.info.status, pruned.info.status) == ("FINISHED", "FINISHED", "KILLED")
    assert {one.dataset.name for one in parent.inputs.dataset_inputs} == {
        "prepare/train.parquet",
        "prepare/validation.parquet",
    }
    assert parent.data.metrics["best_log_loss"] == result["best"][0]["log_loss"]
    assert complete.data.params["learning_rate"] == "0.01"
    assert complete.data.metrics["log_loss"] == result["best"][0]["log_loss"]
    assert [complete.data.metrics[f"fold_{n}_log_loss"] for n in (1, 2, 3)] == result["best"][0]["by_fold"]
    assert pruned.data.params["learning_rate"] == "1e-09"
    assert set(pruned.data.metrics) == {"running_log_loss"}


def test_tune_ends_the_mlflow_run_of_a_trial_that_was_killed(small: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run(trials=1, folds=1)
    client = tracking.client()
    experiment = client.get_experiment_by_name(tracking.TUNING)
    child = client.create_run(experiment.experiment_id).info.run_id
    left_running(run=child)
    run(trials=1, folds=1)
    assert client.get_run(child).info.status == "KILLED"
    of_trial = client.get_run(study("hgb-2013-03-02").trials[0].user_attrs["run"])
    assert of_trial.data.metrics["log_loss"] == study("hgb-2013-03-02").trials[0].value


def test_tune_does_without_mlflow(small: Project, caplog: pytest.LogCaptureFixture) -> None:
    assert run(kind="logistic", trials=2)["trials"]["complete"] == 2
    assert "tuning goes on, and nothing fills them in later" in caplog.text
    assert "register" not in caplog.text
    assert "http://127.0.0.1:9 does not answer" in caplog.text


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ballast(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``ballast tune`` as a user calls it: arguments in; exit code, output and errors out."""
    from pipelines import cli

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ballast", "tune", "--space", "space.yaml", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


def test_command_shows_the_trials_the_gain_and_the_diff(small: Project, ballast: Any) -> None:
    code, out, err = ballast("--trials", "3")
    assert code == 0
    lines = err.splitlines()
    assert lines[0].startswith("study hgb-2013-03-02 · hgb: learning_rate, max_leaf_nodes · 3 trials · 3 folds from")
    assert lines[1].startswith("trial 1/3 · log loss 0.6")
    assert lines[1].endswith("the present settings")
    assert len(lines) == 4
    assert "study      hgb-2013-03-02: 3 complete, 0 pruned, of 3" in out
    assert "result     better by 0." in out
    assert "\n-    learning_rate: 0.001      # far too small\n" in out
    assert "\n+    learning_rate: 0." in out
    assert "apply      git apply var/tune/hgb-2013-03-02.diff" in out
    code, out, err = ballast("--trials", "4", "--json")
    assert (code, json.loads(out)["trials"]["before"]) == (0, 3)
    assert "4 trials · 3 of them are there already" in err


def test_command_at_a_terminal_shows_a_bar_and_the_time_left(
    small: Project, ballast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, _, err = ballast("--kind", "tabm", "--trials", "1", "--budget", "1h", "--json")
    assert code == 0
    assert "━" in err
    assert re.search(r"0/1 · fold [123]/3 epoch [12] 0\.\d{4} · best none yet · 59:\d\d left", err)
    assert re.search(r"1/1 · best 0\.\d{4} · 59:\d\d left", err)


def test_command_says_when_nothing_better_was_found(small: Project, ballast: Any) -> None:
    code, out, _ = ballast("--kind", "logistic", "--sampler", "grid")
    assert code == 0
    assert "nothing better than the present settings was found" in out
    assert "---" not in out
    assert not list(Path("var/tune").glob("*.diff"))


def test_command_says_when_a_gain_is_hardly_one(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines import cli

    found = {"kind": "hgb", "competes": False, "diff": "--- a/params.yaml\n", "diff_file": "x.diff"}
    for gain, said in ((0.002, False), (0.0005, True)):
        cli._show_gain(
            cli._console(), found | {"gain": {"log_loss": gain, "standard_error": 0.001, "by_fold": [gain, gain]}}
        )
        out = capsys.readouterr().out
        assert ("hardly a difference" in out) is said
        assert "hgb does not compete yet: add it to `train.candidates`" in out


def test_command_interrupted_ends_with_the_best_so_far(small: Project, ballast: Any) -> None:
    Path("space.yaml").write_text(yaml.safe_dump(SLOW))
    ballast("--kind", "tabm", "--sampler", "grid", "--trials", "1")
    threading.Thread(target=signal_in_trial, args=(os.getpid(), signal.SIGINT)).start()
    code, out, _ = ballast("--kind", "tabm", "--sampler", "grid")
    assert code == 130
    assert "1 complete, 0 pruned, of 2; interrupted, the same call goes on" in out
    assert states("tabm-2013-03-02") == ["COMPLETE", "FAIL"]


def signal_in_trial(process: int, number: int) -> None:
    """Send the signal in the middle of the second trial."""
    while _states_in(Path("var/tune/tabm-2013-03-02.db")) != ["COMPLETE", "RUNNING"]:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process, number)


def test_command_terminated_ends_with_the_best_so_far(small: Project, ballast: Any) -> None:
    Path("space.yaml").write_text(yaml.safe_dump(SLOW))
    ballast("--kind", "tabm", "--sampler", "grid", "--trials", "1")
    command = [sys.executable, "-m", "pipelines.cli", "tune", "--space", "space.yaml", "--kind", "tabm"]
    process = subprocess.Popen(
        [*command, "--sampler", "grid"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        signal_in_trial(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "1 complete, 0 pruned, of 2; terminated, the same call goes on" in out
    assert states("tabm-2013-03-02") == ["COMPLETE", "FAIL"]
    assert study("tabm-2013-03-02").trials[1].user_attrs["said"].startswith("terminated")


def test_command_whose_budget_ends_before_the_present_settings_keeps_the_diff(small: Project, ballast: Any) -> None:
    Path("space.yaml").write_text(yaml.safe_dump(SLOW))
    ballast("--kind", "tabm", "--sampler", "grid", "--trials", "1")
    earlier = Path("var/tune/tabm-2013-03-02.diff")
    earlier.write_text("of an earlier run")
    FILE.write_text(FILE.read_text().replace("epochs: 2,", "epochs: 5000,"))
    code, out, err = ballast("--kind", "tabm", "--sampler", "grid", "--budget", "1s")
    assert (code, "1 complete" in out, earlier.exists()) == (1, True, True)
    assert err.endswith("error: The budget was used up before the present settings were measured. Give it more.\n")


def test_command_counts_its_budget_from_its_start(
    small: Project, ballast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.cli.monotonic", iter([0.0, 60.0]).__next__)
    assert ballast("--budget", "1m")[0] == 1
    assert not tried("hgb-2013-03-02")


def test_command_whose_budget_is_too_small_for_the_present_settings_fails(small: Project, ballast: Any) -> None:
    FILE.write_text(PARAMS.replace("epochs: 2,", "epochs: 5000,"))
    code, out, err = ballast("--kind", "tabm", "--budget", "1s")
    assert (code, "0 complete" in out) == (1, True)
    assert err.endswith("error: The budget was used up before the present settings were measured. Give it more.\n")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--budget", "soon"], 1, "--budget must be a time such as 90s, 10m or 1h30m (found 'soon')"),
        (["--budget", "1h1s", "--folds", "9"], 65, "9 folds of 7 days"),
        (["--sampler", "grid"], 1, "A grid needs `choices` or a `step`"),
        (["--space", "none.yaml"], 1, "There is no search space none.yaml"),
    ],
)
def test_command_that_cannot_be_says_why(
    small: Project, ballast: Any, arguments: list[str], code: int, said: str
) -> None:
    found = ballast(*arguments)
    assert (found[0], found[1]) == (code, "")
    assert found[2].startswith("error: ")
    assert said in found[2]
