"""Evaluate: a real model, real rows, and the files that DVC and the next steps read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from pipelines import baseline, metrics, model, params
from pipelines.errors import BallastError, ParamsError
from pipelines.evaluate import EvaluateParams, evaluate, slices
from pipelines.files import read_json, sha256
from pipelines.schema import Features

ROOT = Path(__file__).resolve().parents[2]
FILES = ("metrics.json", "slices.csv", "calibration.csv", "roc.csv", "precision_recall.csv")


def params_of(**others: Any) -> EvaluateParams:
    known = {"threshold": 0.5, "slices": ["shop", "size"], "min_slice_rows": 50, "calibration_bins": 5}
    return EvaluateParams.model_validate(known | others)


def window(rows: int, seed: int) -> pd.DataFrame:
    """Rows whose label follows x; shop "c" is rare, some shops are unknown."""
    random = np.random.default_rng(seed)
    x = random.normal(size=rows)
    shop = random.choice(np.array(["a", "b", "c", None], dtype=object), p=[0.6, 0.27, 0.03, 0.1], size=rows)
    return pd.DataFrame(
        {
            "key": [f"{number:05}" for number in range(rows)],
            "time": pd.date_range("2013-01-01", periods=rows, freq="min", tz="UTC", unit="us"),
            "label": (random.random(rows) < 1 / (1 + np.exp(-2 * x))).astype("int8"),
            "x": x,
            "size": random.integers(0, 2, rows).astype("float64"),
            "shop": pd.Series(shop, dtype="str"),
        }
    )


@pytest.fixture(scope="module")
def challenger(tmp_path_factory) -> Path:
    train = window(1500, seed=1)
    transform = model.Transform.fit(train, Features(numeric=["x", "size"], categorical=["shop"]))
    matrix, label = transform.encode(train), train["label"].to_numpy("float32")
    settings = baseline.HgbParams(iterations=20, patience=20, learning_rate=0.1, max_leaf_nodes=8)
    fitted = baseline.fit_hgb((matrix, label), (matrix, label), {2: 4}, settings, seed=1)
    folder = tmp_path_factory.mktemp("train") / "model"
    model.save(folder, "hgb", baseline.dumps(fitted), transform, {"tables": {}}, b"SELECT 1")
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    window(1000, seed=2).to_parquet(tmp_path / "test.parquet", index=False)
    return tmp_path / "test.parquet"


def test_evaluate_test_window_writes_the_metrics_of_the_models_predictions(data, challenger, tmp_path):
    result = evaluate(data, challenger, tmp_path / "out", params_of())
    rows, loaded = window(1000, seed=2), model.load(challenger)
    expected = metrics.binary(rows["label"], loaded.predict(rows), threshold=0.5, bins=5)
    written = read_json(tmp_path / "out" / "metrics.json")
    assert written == pytest.approx(expected, abs=5e-7)
    assert list(written) == list(expected)
    assert 0.8 < written["roc_auc"] < 0.95
    assert result == {
        "summary": f"test: AUC {written['roc_auc']:.3f} · log loss {written['log_loss']:.3f} "
        f"· Brier {written['brier']:.3f}",
        "digest": loaded.digest,
        "metrics": written,
    }


def test_evaluate_curves_are_what_dvc_yaml_plots(data, challenger, tmp_path):
    evaluate(data, challenger, tmp_path / "out", params_of())
    for plot in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["evaluate"]["plots"]:
        [(path, axes)] = plot.items()
        curve = pd.read_csv(tmp_path / "out" / Path(path).name)
        assert {axes["x"], axes["y"]} <= set(curve.columns)
        assert 2 <= len(curve) <= 200
        assert curve.select_dtypes("float64").stack().between(0, 1).all()
    assert pd.read_csv(tmp_path / "out" / "calibration.csv")["rows"].sum() == 1000


def test_evaluate_writes_short_numbers(data, challenger, tmp_path):
    evaluate(data, challenger, tmp_path / "out", params_of())
    for name in FILES:
        assert max(len(word.split(".")[-1]) for word in _numbers(tmp_path / "out" / name)) <= 6


def test_evaluate_twice_gives_equal_bytes(data, challenger, tmp_path):
    for out in ("a", "b"):
        evaluate(data, challenger, tmp_path / out, params_of())
    for name in FILES:
        assert sha256(tmp_path / "a" / name) == sha256(tmp_path / "b" / name)


def test_evaluate_one_class_is_refused_and_leaves_nothing(challenger, tmp_path):
    window(200, seed=2).assign(label=np.int8(0)).to_parquet(tmp_path / "test.parquet", index=False)
    with pytest.raises(BallastError, match="both classes"):
        evaluate(tmp_path / "test.parquet", challenger, tmp_path / "out", params_of())
    assert not (tmp_path / "out").exists()


def test_evaluate_unknown_slice_names_the_nearest_feature(data, challenger, tmp_path):
    with pytest.raises(ParamsError, match=r"`evaluate\.slices` names `shops`, .* did you mean `shop`"):
        evaluate(data, challenger, tmp_path / "out", params_of(slices=["shops"]))


def test_slices_column_gives_values_by_rows_and_the_rest_as_others():
    rows = window(1000, seed=2)
    found = slices(rows, np.full(1000, 0.4), params_of(slices=["shop"]))
    counts = rows["shop"].value_counts(dropna=False)
    assert found["value"].to_list() == ["a", "b", "(none)", "(others)"]
    assert found["rows"].to_list() == [counts["a"], counts["b"], rows["shop"].isna().sum(), counts["c"]]
    assert found["rows"].sum() == 1000
    assert set(found["column"]) == {"shop"}


def test_slices_value_gives_the_metrics_of_its_own_rows():
    rows = window(1000, seed=2)
    probability = np.random.default_rng(3).random(1000)
    found = slices(rows, probability, params_of(slices=["size", "shop"])).set_index(["column", "value"])
    for column, value, mask in (("shop", "b", rows["shop"] == "b"), ("size", "1.0", rows["size"] == 1)):
        expected = metrics.binary(rows["label"][mask], probability[mask], threshold=0.5, bins=5)
        assert found.loc[(column, value)].to_dict() == pytest.approx(expected, abs=5e-7)


def test_slices_value_with_just_enough_rows_is_shown():
    rows = window(1000, seed=2)
    rare = int((rows["shop"] == "c").sum())
    shown = [
        slices(rows, np.full(1000, 0.4), params_of(slices=["shop"], min_slice_rows=least))["value"].to_list()
        for least in (rare, rare + 1)
    ]
    assert shown == [["a", "b", "(none)", "c"], ["a", "b", "(none)", "(others)"]]


def test_slices_of_one_class_has_no_auc_but_a_log_loss():
    rows = window(1000, seed=2)
    rows.loc[rows["shop"] == "b", "label"] = 0
    found = slices(rows, np.full(1000, 0.4), params_of(slices=["shop"])).set_index("value").loc["b"]
    assert np.isnan(found["roc_auc"])
    assert found["log_loss"] == pytest.approx(-np.log(0.6), abs=1e-6)


def test_slices_none_asked_gives_the_header_only(data, challenger, tmp_path):
    evaluate(data, challenger, tmp_path / "out", params_of(slices=[]))
    assert (tmp_path / "out" / "slices.csv").read_text().startswith("column,value,rows,label_rate,roc_auc,log_loss,")


@pytest.mark.parametrize(
    ("section", "fact"),
    [
        ({"threshold": 1.0}, r"`evaluate\.threshold`: .*less than 1"),
        ({"calibration_bins": 1}, r"`evaluate\.calibration_bins`: .*greater than or equal to 2"),
        ({"slice": []}, "did you mean `slices`"),
    ],
)
def test_params_wrong_evaluate_section_is_refused(tmp_path, section, fact):
    known = yaml.safe_load((ROOT / "params.yaml").read_text())["evaluate"] | section
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"evaluate": known}))
    with pytest.raises(ParamsError, match=fact):
        params.load(tmp_path / "params.yaml", "evaluate", EvaluateParams)


def test_params_shipped_evaluate_section_is_accepted():
    assert params.load(ROOT / "params.yaml", "evaluate", EvaluateParams).slices == ["carrier", "origin"]


def _numbers(path: Path) -> list[str]:
    return [word for word in path.read_text().replace(",", " ").split() if word.replace(".", "").isdigit()]
