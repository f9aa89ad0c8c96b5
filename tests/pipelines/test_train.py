"""The candidates, how the challenger is chosen, and that equal runs write equal bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipelines import baseline, fit, model
from pipelines.checkpoint import Checkpoint, Checkpoints
from pipelines.errors import BallastError, DataRejected, ParamsError
from pipelines.files import read_json, write_json
from pipelines.fit import TrainParams, Window
from pipelines.params import load
from pipelines.train import fit_temperature, train

FEATURES = {"numeric": ["age", "wind"], "categorical": ["carrier"]}
PARAMS: dict[str, Any] = {
    "seed": 1,
    "threads": 1,
    "device": "cpu",
    "compile": "auto",
    "candidates": ["tabm", "hgb"],
    "temperature": True,
    "refit": False,
    "tabm": {
        "ensemble": 4,
        "blocks": 1,
        "width": 16,
        "dropout": 0.1,
        "embedding": 2,
        "bins": 4,
        "epochs": 2,
        "patience": 2,
        "batch_size": 64,
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "averaging": 0.0,
    },
    "hgb": {"iterations": 12, "patience": 5, "learning_rate": 0.1, "max_leaf_nodes": 4},
    "logistic": {"iterations": 50, "inverse_penalty": 1.0},
}


def settings(**changes: Any) -> TrainParams:
    """The parameters above; ``tabm`` and ``hgb`` are merged into their own."""
    merged = {
        name: {**PARAMS[name], **value} if isinstance(value, Mapping) else value for name, value in changes.items()
    }
    return TrainParams.model_validate({**PARAMS, **merged})


def flights(rows: int, seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    age, wind = random.normal(10, 3, rows), random.exponential(5, rows)
    carrier = random.choice(np.array(["AA", "B6", "UA"], dtype=object), rows)
    chance = 1 / (1 + np.exp(-(age - 10) / 2 - (carrier == "UA") + (wind > 5)))
    age[::5], carrier[::7] = np.nan, None
    times = pd.date_range("2013-01-01", periods=rows, freq="h", tz="UTC", unit="us")
    label = (random.random(rows) < chance).astype("int8")
    key = [f"{seed}-{row}" for row in range(rows)]
    return pd.DataFrame({"key": key, "time": times, "label": label, "age": age, "wind": wind, "carrier": carrier})


def lay_out(folder: Path, **columns: Any) -> Path:
    """Prepared windows, the columns given here replacing those of both."""
    folder.mkdir()
    for name, rows, seed in (("train", 400, 0), ("validation", 200, 1)):
        frame = flights(rows, seed).assign(**columns)
        frame.to_parquet(folder / f"{name}.parquet", index=False)
    write_json(folder / "schema.json", {"as_of": "2013-04-01", "features": FEATURES, "tables": {}, "windows": {}})
    (folder / "prepare.sql").write_text("SELECT 1")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("prepare") / "data")


def run(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return train(data, data / "prepare.sql", out, settings(**changes))


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_train_two_candidates_makes_the_better_one_challenger(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path)
    losses = {kind: score["log_loss"] for kind, score in result["candidates"].items()}
    assert set(losses) == {"tabm", "hgb"}
    assert result["challenger"] == min(losses, key=losses.__getitem__)
    written = model.load(tmp_path / "model")
    assert (written.kind, written.digest) == (result["challenger"], result["digest"])
    assert result["summary"].endswith(f"challenger is {result['challenger']}")


def test_train_other_candidate_better_makes_that_one_challenger(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "a", tabm={"learning_rate": 1e-9})["challenger"] == "hgb"
    assert run(data, tmp_path / "b", hgb={"learning_rate": 1e-9}, tabm={"epochs": 5})["challenger"] == "tabm"


@pytest.mark.parametrize("kind", ["tabm", "hgb", "logistic"])
def test_train_scores_are_those_of_the_written_model(data: Path, tmp_path: Path, kind: str) -> None:
    score = run(data, tmp_path, candidates=[kind])["candidates"][kind]
    rows = pd.read_parquet(data / "validation.parquet")
    probability = model.load(tmp_path / "model").predict(rows)
    said = np.where(rows["label"] == 1, probability, 1 - probability)
    assert score["log_loss"] == pytest.approx(-np.log(said).mean(), abs=1e-6)
    assert score["brier"] == pytest.approx(np.square(1 - said).mean(), abs=1e-6)
    assert 0.5 < score["auc"] < 1


def test_train_history_is_logged_as_it_is_written(data: Path, tmp_path: Path) -> None:
    logged: dict[tuple[int, str], float] = {}

    def log(step: int, values: Mapping[str, float]) -> None:
        logged.update({(step, name): value for name, value in values.items()})

    result = train(data, data / "prepare.sql", tmp_path, settings(), log)
    history = pd.read_csv(tmp_path / "history.csv")
    assert list(history) == ["candidate", "epoch", "train_log_loss", "validation_log_loss"]
    assert history.groupby("candidate")["epoch"].apply(list).to_dict() == {"tabm": [1, 2], "hgb": [10, 12]}
    for row in history.itertuples():
        assert logged[row.epoch, f"{row.candidate}/validation_log_loss"] == row.validation_log_loss
        assert logged[row.epoch, f"{row.candidate}/train_log_loss"] == row.train_log_loss
    assert logged[0, "tabm/auc"] == result["candidates"]["tabm"]["auc"]
    assert logged[1, "tabm/rows_per_s"] > 0


def test_train_tabm_keeps_its_best_epoch_and_stops_after_patience(data: Path, tmp_path: Path) -> None:
    score = run(data, tmp_path, candidates=["tabm"], tabm={"epochs": 60, "learning_rate": 0.05})["candidates"]["tabm"]
    history = pd.read_csv(tmp_path / "history.csv").set_index("epoch")["validation_log_loss"]
    assert score["epochs"] == history.idxmin()
    assert score["log_loss"] <= history.min() < score["log_loss"] + 0.05  # the temperature helps a little
    assert len(history) == score["epochs"] + 2 < 60


def test_train_hgb_is_as_long_as_was_best_on_validation(data: Path, tmp_path: Path) -> None:
    settings = {"iterations": 60, "patience": 8, "learning_rate": 0.5}
    score = run(data, tmp_path, candidates=["hgb"], hgb=settings)["candidates"]["hgb"]
    last = pd.read_csv(tmp_path / "history.csv")["epoch"].iloc[-1]
    assert score["iterations"] == last - 8  # what came after it was patience


def test_train_column_of_one_value_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = lay_out(tmp_path / "data", wind=7.0)
    result = run(data, tmp_path / "out", candidates=["tabm"])
    assert result["dropped"] == {"wind": "always 7.0"}
    assert "wind is left out: always 7.0" in capsys.readouterr().out
    assert len(model.load(tmp_path / "out" / "model").predict(flights(5, 2).drop(columns="wind"))) == 5


def test_train_more_categories_than_the_baseline_takes_is_no_error(tmp_path: Path) -> None:
    data = lay_out(tmp_path / "data")
    frame = pd.read_parquet(data / "train.parquet")
    frame.assign(carrier=[f"C{row % 300}" for row in range(400)]).to_parquet(data / "train.parquet", index=False)
    assert run(data, tmp_path / "out", candidates=["hgb"])["challenger"] == "hgb"


# --- bit for bit ------------------------------------------------------------------------------------------------------

TRAIN = """
import json, sys
from pathlib import Path
from pipelines.checkpoint import Checkpoint, Checkpoints
from pipelines.fit import TrainParams, Window
from pipelines.train import fit_temperature, train
data, out = Path(sys.argv[1]), Path(sys.argv[2])
params = TrainParams.model_validate(json.loads(sys.argv[3]))
result = train(data, data / "prepare.sql", out, params)
(out / "result.json").write_text(json.dumps(result))
"""


@pytest.mark.parametrize("kind", ["tabm", "hgb", "logistic"])
def test_train_again_in_another_process_and_folder_writes_equal_bytes(data: Path, tmp_path: Path, kind: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there" / "deeper"
    result = run(data, here, candidates=[kind], threads=2)
    (here / "result.json").write_text(json.dumps(result))
    shutil.copytree(data, there / "data")
    params = settings(candidates=[kind], threads=2).model_dump_json()
    subprocess.run(
        [sys.executable, "-c", TRAIN, str(there / "data"), str(there / "out"), params],
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},  # noqa: PTH109
        cwd=there,
        check=True,
    )
    files = sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file())
    assert len(files) == 8
    for file in files:
        assert (here / file).read_bytes() == (there / "out" / file).read_bytes(), f"{file} differs"


def test_train_other_seed_writes_another_model(data: Path, tmp_path: Path) -> None:
    digests = {run(data, tmp_path, candidates=["tabm"], seed=seed)["digest"] for seed in (1, 2)}
    assert len(digests) == 2


def test_train_refit_adds_the_validation_window_and_marks_the_model(data: Path, tmp_path: Path) -> None:
    for kind in ("tabm", "hgb", "logistic"):
        once = run(data, tmp_path / "once", candidates=[kind])
        again = run(data, tmp_path / "again", candidates=[kind], refit=True)
        assert (once["refit"], again["refit"]) == (False, True)
        assert once["candidates"] == again["candidates"]  # what chose is what was not refitted
        models = [model.load(tmp_path / name / "model") for name in ("once", "again")]
        assert [found.schema["refit"] for found in models] == [False, True]
        assert models[0].temperature == models[1].temperature
        seen = pd.read_parquet(data / "validation.parquet")
        losses = [-np.log(np.abs(found.predict(seen) - 1 + seen["label"])).mean() for found in models]
        assert losses[1] < losses[0], kind  # it learnt from these rows


def test_train_without_temperature_leaves_the_log_odds_alone(data: Path, tmp_path: Path) -> None:
    scaled, plain = (run(data, tmp_path, candidates=["hgb"], temperature=asked) for asked in (True, False))
    assert plain["candidates"]["hgb"]["temperature"] == 1.0 != scaled["candidates"]["hgb"]["temperature"]
    assert scaled["candidates"]["hgb"]["log_loss"] < plain["candidates"]["hgb"]["log_loss"]


def test_fit_temperature_finds_what_the_log_odds_were_multiplied_by() -> None:
    random = np.random.default_rng(1)
    odds = random.normal(size=200_000)
    label = (random.random(200_000) < 1 / (1 + np.exp(-odds))).astype(np.float32)
    window = Window(np.empty((0, 0), np.float32), label)
    assert fit_temperature(window, 1 / (1 + np.exp(-2 * odds))) == pytest.approx(2, abs=0.03)


def test_train_importance_ranks_what_the_label_follows(tmp_path: Path) -> None:
    noise = pd.Series(np.random.default_rng(3).normal(size=400))
    data = lay_out(tmp_path / "data", wind=noise)
    run(data, tmp_path / "out", candidates=["hgb"])
    table = pd.read_csv(tmp_path / "out" / "importance.csv")
    assert table["feature"].tolist()[0] == "age"
    assert table["importance"].is_monotonic_decreasing
    importance = table.set_index("feature")["importance"]
    assert importance["age"] > 0.05 > abs(importance["wind"])
    assert model.load(tmp_path / "out" / "model").schema["importance"] == pytest.approx(importance.to_dict())


def test_train_averaged_weights_are_another_model_that_learnt(data: Path, tmp_path: Path) -> None:
    plain = run(data, tmp_path / "plain", candidates=["tabm"], tabm={"epochs": 6})
    averaged = run(data, tmp_path / "averaged", candidates=["tabm"], tabm={"epochs": 6, "averaging": 0.9})
    assert plain["digest"] != averaged["digest"]
    assert averaged["candidates"]["tabm"]["auc"] > 0.6


# --- ended, and taken up again ----------------------------------------------------------------------------------------


LONG = {"epochs": 6, "patience": 6}


@pytest.fixture
def kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    monkeypatch.setenv("BALLAST_VAR", str(tmp_path / "var"))
    return Checkpoints([data / "train.parquet"], {})


@pytest.mark.parametrize(("averaging", "refit"), [(0.0, False), (0.9, True)])
def test_train_asked_to_end_goes_on_to_the_same_model(
    data: Path, tmp_path: Path, kept: Checkpoints, averaging: float, refit: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    params = settings(candidates=["tabm"], tabm={**LONG, "averaging": averaging}, refit=refit)
    unbroken = train(data, data / "prepare.sql", tmp_path / "unbroken", params)

    def end(step: int, values: Mapping[str, float]) -> None:
        if step in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
        with pytest.raises(SystemExit) as exit:
            train(data, data / "prepare.sql", tmp_path / "out", params, end, kept)
        assert exit.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    result = train(data, data / "prepare.sql", tmp_path / "out", params, checkpoints=kept)
    assert "goes on at epoch 5, step 1" in capsys.readouterr().out
    assert result == unbroken
    for name in ("history.csv", "importance.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_train_ended_in_the_refit_goes_on_to_the_same_model(
    data: Path, tmp_path: Path, kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = settings(candidates=["tabm"], tabm=LONG, refit=True)
    unbroken = train(data, data / "prepare.sql", tmp_path / "unbroken", params)
    set_rate, calls = fit._set_learning_rate, iter(range(10**6))

    def end(*arguments: Any) -> None:
        set_rate(*arguments)
        if next(calls) == 36 + 11:  # six epochs of six steps, and the second of the refit, which has nine
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(fit, "_set_learning_rate", end)
    with pytest.raises(SystemExit):
        train(data, data / "prepare.sql", tmp_path / "out", params, checkpoints=kept)
    assert next(calls) == 36 + 12
    assert train(data, data / "prepare.sql", tmp_path / "out", params, checkpoints=kept) == unbroken


def test_train_killed_at_any_step_goes_on_from_its_last_checkpoint(
    data: Path, tmp_path: Path, kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = settings(candidates=["tabm"], tabm=LONG)
    unbroken = train(data, data / "prepare.sql", tmp_path / "unbroken", params)
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)  # at every step
    set_rate, calls = fit._set_learning_rate, iter(range(10**6))

    def break_off(*arguments: Any) -> None:
        if next(calls) in (8, 15):
            raise MemoryError("as good as any end")
        set_rate(*arguments)

    monkeypatch.setattr(fit, "_set_learning_rate", break_off)
    for _ in range(2):
        with pytest.raises(MemoryError):
            train(data, data / "prepare.sql", tmp_path / "out", params, checkpoints=kept)
    assert train(data, data / "prepare.sql", tmp_path / "out", params, checkpoints=kept) == unbroken
    assert next(calls) == 6 * 6 + 2  # no step was done twice


def test_train_ended_after_the_network_does_not_train_it_again(
    data: Path, tmp_path: Path, kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(baseline, "fit_hgb", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        train(data, data / "prepare.sql", tmp_path / "out", settings(), checkpoints=kept)
    monkeypatch.setattr(fit, "_gradients", None)
    result = train(data, data / "prepare.sql", tmp_path / "out", settings(), checkpoints=kept)
    assert set(result["candidates"]) == {"tabm", "hgb"}


def test_checkpoints_of_other_inputs_are_others(data: Path, kept: Checkpoints) -> None:
    kept.of("tabm").save({"step": 7})
    kept.run_id = "r1"
    same = Checkpoints([data / "train.parquet"], {})
    others = Checkpoints([data / "validation.parquet"], {}), Checkpoints([data / "train.parquet"], {"seed": 2})
    assert (same.of("tabm").load(), same.run_id) == ({"step": 7}, "r1")
    assert all((other.of("tabm").load(), other.run_id) == (None, None) for other in others)
    same.clear()
    assert (kept.of("tabm").load(), kept.run_id) == (None, None)


def test_checkpoints_that_nobody_took_up_are_forgotten(data: Path, tmp_path: Path, kept: Checkpoints) -> None:
    kept.of("tabm").save({"step": 7})
    [file] = (tmp_path / "var" / "checkpoints").glob("*/tabm.pt")
    Checkpoints([data / "validation.parquet"], {})
    assert file.exists()
    os.utime(file, (0, 0))
    os.utime(file.parent, (0, 0))
    Checkpoints([data / "validation.parquet"], {})
    assert not file.exists()


def test_checkpoint_is_due_after_its_interval_and_holds_no_code(tmp_path: Path) -> None:
    assert not Checkpoint(tmp_path / "a.pt").due()
    assert Checkpoint(tmp_path / "a.pt", every_s=0).due()
    assert not Checkpoint(None, every_s=0).due()
    torch.save({"step": Path()}, tmp_path / "a.pt")
    assert Checkpoint(tmp_path / "a.pt").load() is None


# --- a device that is too small ---------------------------------------------------------------------------------------


def _with_memory_for(rows: int, monkeypatch: pytest.MonkeyPatch, fail_at: set[int] | None = None) -> list[int]:
    """Let every loss of more than so many rows fail as a full GPU does; return the sizes that went through."""
    whole, taken, fail_at = fit._loss, [], fail_at or set()

    def loss(net: Any, device: torch.device) -> Any:
        loss_of = whole(net, device)

        def limited(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if len(x) > rows or len(taken) in fail_at:
                fail_at.discard(len(taken))
                raise torch.OutOfMemoryError("CUDA out of memory.")
            taken.append(len(x))
            return loss_of(x, y)

        return limited

    monkeypatch.setattr(fit, "_loss", loss)
    return taken


def test_train_out_of_memory_takes_batches_in_parts_to_the_same_effect(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"candidates": ["tabm"], "tabm": {"dropout": 0.0, "learning_rate": 0.001}}
    whole = run(data, tmp_path / "whole", **changes)
    taken = _with_memory_for(20, monkeypatch)
    parts = run(data, tmp_path / "parts", **changes)
    assert set(taken) == {16}
    assert len(taken) == 2 * 6 * 4
    out = capsys.readouterr().out
    assert "out of memory: each batch of 64 rows is taken in 2 parts" in out
    assert "taken in 4 parts" in out
    assert "8 parts" not in out
    # the gradients of the parts add up to the batch's but for the last bits
    assert parts["candidates"]["tabm"]["log_loss"] == pytest.approx(whole["candidates"]["tabm"]["log_loss"], abs=1e-4)


def test_train_out_of_memory_in_a_later_part_adds_no_gradient_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"candidates": ["tabm"], "tabm": {"dropout": 0.0, "learning_rate": 0.001}}
    whole = run(data, tmp_path / "whole", **changes)
    _with_memory_for(40, monkeypatch, fail_at={1})  # the second half of the first batch
    parts = run(data, tmp_path / "parts", **changes)
    assert parts["candidates"]["tabm"]["log_loss"] == pytest.approx(whole["candidates"]["tabm"]["log_loss"], abs=1e-4)


def test_train_out_of_memory_for_one_row_is_an_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_memory_for(0, monkeypatch)
    with pytest.raises(BallastError, match="no memory for a single row"):
        run(data, tmp_path, candidates=["tabm"])


# --- what is refused --------------------------------------------------------------------------------------------------


def test_train_loss_that_is_no_number_names_batch_and_column(tmp_path: Path) -> None:
    data = lay_out(tmp_path / "data")
    frame = pd.read_parquet(data / "train.parquet")
    frame.loc[17, "wind"] = 1e9
    frame.to_parquet(data / "train.parquet", index=False)
    with pytest.raises(BallastError, match=r"not finite in epoch \d, batch \d+ of 6\..*(wind|age) .*learning_rate"):
        run(data, tmp_path / "out", tabm={"learning_rate": 1e30})


def test_train_weights_thrown_by_the_last_batch_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(BallastError, match="weights are not finite after the last batch of epoch 1"):
        run(data, tmp_path, candidates=["tabm"], tabm={"epochs": 1, "batch_size": 400, "learning_rate": 1e38})


@pytest.mark.parametrize("value", [-np.inf, 1e39])
def test_train_infinite_value_is_rejected(tmp_path: Path, value: float) -> None:
    data = lay_out(tmp_path / "data")
    frame = pd.read_parquet(data / "validation.parquet")
    frame.loc[3, "wind"] = value
    frame.to_parquet(data / "validation.parquet", index=False)
    with pytest.raises(DataRejected, match="`wind` is infinite in 1 validation rows"):
        run(data, tmp_path / "out")


@pytest.mark.parametrize(("rows", "found"), [(slice(0, 0), "no rows"), (slice(None), "only label 1")])
def test_train_window_without_both_classes_is_rejected(tmp_path: Path, rows: slice, found: str) -> None:
    data = lay_out(tmp_path / "data")
    frame = pd.read_parquet(data / "validation.parquet")
    frame[frame["label"] == 1][rows].to_parquet(data / "validation.parquet", index=False)
    with pytest.raises(DataRejected, match=f"validation window needs rows of both classes .found {found}"):
        run(data, tmp_path / "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_train_gpu_demanded_where_there_is_none_is_an_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(BallastError, match=r"`train.device` is cuda.*Set it to auto or cpu"):
        run(data, tmp_path, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_train_auto_without_gpu_says_cpu_and_writes_the_same(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = run(data, tmp_path / "auto", candidates=["tabm"], device="auto")["digest"]
    assert "400 rows on cpu" in capsys.readouterr().out
    assert digest == run(data, tmp_path / "cpu", candidates=["tabm"], device="cpu")["digest"]


@pytest.mark.parametrize(
    ("wanted", "tools", "cc", "compiled"),
    [
        ("auto", ["gcc", "Python.h"], None, True),
        ("auto", ["clang", "Python.h"], None, True),
        ("auto", ["mycc", "Python.h"], "mycc", True),
        ("auto", ["gcc", "Python.h"], "mycc", False),
        ("auto", ["gcc"], None, False),
        ("auto", ["Python.h"], None, False),
        (True, [], None, True),
        (False, ["gcc", "Python.h"], None, False),
    ],
)
def test_compile_auto_on_a_gpu_asks_for_what_triton_builds_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wanted: Any,
    tools: list[str],
    cc: str | None,
    compiled: bool,
) -> None:
    for tool in tools:
        (tmp_path / tool).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", cc) if cc else monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda loss, mode, dynamic: f"compiled, {mode}")
    found = fit._compiled(loss := lambda x, y: x, wanted, torch.device("cuda"))
    assert found == ("compiled, reduce-overhead" if compiled else loss)
    said = capsys.readouterr().out
    assert ("trains uncompiled, which takes longer: there is no" in said) == (wanted == "auto" and not compiled)


def test_compile_auto_on_a_cpu_is_off_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit._compiled(loss := lambda x, y: x, "auto", torch.device("cpu")) is loss
    assert capsys.readouterr().out == ""


def test_train_written_model_that_predicts_otherwise_is_an_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = baseline.loads
    monkeypatch.setattr(baseline, "loads", lambda content: lambda matrix: loads(content)(matrix) + 1e-3)
    with pytest.raises(BallastError, match=r"does not predict what the trained one did \(they differ by 0\.00\d"):
        run(data, tmp_path, candidates=["hgb"])


def test_params_misspelt_setting_names_the_right_one(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(json.dumps({"train": {**PARAMS, "tabm": {**PARAMS["tabm"], "epoch": 3}}}))
    with pytest.raises(ParamsError, match=r"`train\.tabm\.epoch` is not a setting; did you mean `epochs`"):
        load(file, "train", TrainParams)


def test_params_as_shipped_are_valid() -> None:
    assert load(Path(__file__).parents[2] / "params.yaml", "train", TrainParams).candidates == ["tabm", "hgb"]


# --- the stage --------------------------------------------------------------------------------------------------------


def test_main_logs_to_mlflow_what_history_says(
    data: Path, tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import tracking
    from pipelines.train import main

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "BALLAST_RUN", "BALLAST_DAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BALLAST_VAR", str(tmp_path / "var"))
    (tmp_path / "var" / "mlflow").mkdir(parents=True)
    shutil.copy(mlflow_template, tmp_path / "var" / "mlflow" / "mlflow.db")
    (tmp_path / "params.yaml").write_text(json.dumps({"train": PARAMS, "register": {"model": "late"}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["train", "--data", str(data), "--sql", str(data / "prepare.sql"), "--out", str(tmp_path / "out")]
    )
    main()
    [experiment] = [one for one in tracking.client().search_experiments() if one.name != "Default"]
    [found] = tracking.client().search_runs([experiment.experiment_id])
    history = pd.read_csv(tmp_path / "out" / "history.csv").query("candidate == 'tabm'")
    points = tracking.client().get_metric_history(found.info.run_id, "tabm/validation_log_loss")
    assert [point.value for point in points] == history["validation_log_loss"].tolist()
    assert found.data.params["tabm.width"] == "16"
    assert found.info.status == "FINISHED"
    assert read_json(tmp_path / "out" / "result.json")["digest"] == model.load(tmp_path / "out" / "model").digest


def test_main_ended_by_sigterm_goes_on_in_the_same_mlflow_run(
    data: Path, tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import tracking

    monkeypatch.setenv("BALLAST_VAR", str(tmp_path / "var"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "BALLAST_RUN", "BALLAST_DAG"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "var" / "mlflow").mkdir(parents=True)
    shutil.copy(mlflow_template, tmp_path / "var" / "mlflow" / "mlflow.db")
    long = {**PARAMS, "candidates": ["tabm"], "tabm": {**PARAMS["tabm"], "epochs": 60, "patience": 60}}
    (tmp_path / "params.yaml").write_text(json.dumps({"train": long, "register": {"model": "late"}}))
    paths = ["--data", str(data), "--sql", str(data / "prepare.sql"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "pipelines.train", "--params", str(tmp_path / "params.yaml"), *paths]

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        for line in first.stdout:
            if " epoch 5/60" in line:
                break
        asked = time.time()
        first.terminate()
        first.stdout.read()
    assert first.returncode == 128 + signal.SIGTERM
    [kept] = (tmp_path / "var" / "checkpoints").glob("*/tabm.pt")
    assert kept.stat().st_mtime - asked < 5  # Airflow waits no longer
    assert not (tmp_path / "out").exists()
    second = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert "goes on at epoch" in second.stdout
    assert not list((tmp_path / "var" / "checkpoints").iterdir())

    [experiment] = [one for one in tracking.client().search_experiments() if one.name != "Default"]
    [found] = tracking.client().search_runs([experiment.experiment_id])
    points = tracking.client().get_metric_history(found.info.run_id, "tabm/validation_log_loss")
    assert (found.info.status, [point.step for point in points]) == ("FINISHED", list(range(1, 61)))
    unbroken = train(data, data / "prepare.sql", tmp_path / "unbroken", TrainParams.model_validate(long))
    assert read_json(tmp_path / "out" / "result.json")["digest"] == unbroken["digest"]
