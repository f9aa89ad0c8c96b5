"""The candidates, how the challenger is chosen, and that equal runs write equal bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipelines import baseline, model
from pipelines.errors import BallastError, DataRejected, ParamsError
from pipelines.files import read_json, write_json
from pipelines.params import load
from pipelines.train import TrainParams, train

FEATURES = {"numeric": ["age", "wind"], "categorical": ["carrier"]}
PARAMS: dict[str, Any] = {
    "seed": 1,
    "threads": 1,
    "device": "cpu",
    "candidates": ["tabm", "hgb"],
    "tabm": {
        "ensemble": 4,
        "blocks": 1,
        "width": 16,
        "dropout": 0.1,
        "embedding": 2,
        "epochs": 2,
        "patience": 2,
        "batch_size": 64,
        "learning_rate": 0.01,
        "weight_decay": 0.0,
    },
    "hgb": {"iterations": 12, "patience": 5, "learning_rate": 0.1, "max_leaf_nodes": 4},
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


@pytest.mark.parametrize("kind", ["tabm", "hgb"])
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
    assert score["log_loss"] == pytest.approx(history.min(), abs=1e-6)
    assert len(history) == score["epochs"] + 2 < 60


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
from pipelines.train import TrainParams, train
data, out = Path(sys.argv[1]), Path(sys.argv[2])
params = TrainParams.model_validate(json.loads(sys.argv[3]))
result = train(data, data / "prepare.sql", out, params)
(out / "result.json").write_text(json.dumps(result))
"""


@pytest.mark.parametrize("kind", ["tabm", "hgb"])
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
    assert len(files) == 7
    for file in files:
        assert (here / file).read_bytes() == (there / "out" / file).read_bytes(), f"{file} differs"


def test_train_other_seed_writes_another_model(data: Path, tmp_path: Path) -> None:
    digests = {run(data, tmp_path, candidates=["tabm"], seed=seed)["digest"] for seed in (1, 2)}
    assert len(digests) == 2


# --- what is refused --------------------------------------------------------------------------------------------------


def test_train_loss_that_is_no_number_names_batch_and_column(tmp_path: Path) -> None:
    data = lay_out(tmp_path / "data")
    frame = pd.read_parquet(data / "train.parquet")
    frame.loc[17, "wind"] = 1e9
    frame.to_parquet(data / "train.parquet", index=False)
    with pytest.raises(BallastError, match=r"not finite in epoch \d, batch \d+ of 7\..*(wind|age) .*learning_rate"):
        run(data, tmp_path / "out", tabm={"learning_rate": 1e30})


def test_train_infinite_value_is_rejected(tmp_path: Path) -> None:
    data = lay_out(tmp_path / "data")
    frame = pd.read_parquet(data / "validation.parquet")
    frame.loc[3, "wind"] = -np.inf
    frame.to_parquet(data / "validation.parquet", index=False)
    with pytest.raises(DataRejected, match="`wind` is infinite in 1 validation rows"):
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


def test_train_written_model_that_predicts_otherwise_is_an_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = baseline.loads
    monkeypatch.setattr(baseline, "loads", lambda content: lambda matrix: loads(content)(matrix) + 1e-3)
    with pytest.raises(BallastError, match=r"does not predict what the trained one did \(they differ by 0\.001"):
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
    from pipelines import registry
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
    [experiment] = [one for one in registry.client().search_experiments() if one.name != "Default"]
    [found] = registry.client().search_runs([experiment.experiment_id])
    history = pd.read_csv(tmp_path / "out" / "history.csv").query("candidate == 'tabm'")
    points = registry.client().get_metric_history(found.info.run_id, "tabm/validation_log_loss")
    assert [point.value for point in points] == history["validation_log_loss"].tolist()
    assert found.data.params["tabm.width"] == "16"
    assert found.info.status == "FINISHED"
    assert read_json(tmp_path / "out" / "result.json")["digest"] == model.load(tmp_path / "out" / "model").digest
