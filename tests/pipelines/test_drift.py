"""Drift: real Evidently on small frames whose answers are known by construction."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.comparison import Column, Rule, column, compare
from pipelines.drift import (
    DriftParams,
    drift,
    inputs_verdict,
    is_out_of_scale,
    main,
    rules_of,
    weights_of,
)
from pipelines.errors import ParamsError
from pipelines.files import read_json, write_json
from pipelines.params import load
from pipelines.performance import PerformanceParams
from pipelines.policy import numbers
from pipelines.schema import Features
from pipelines.state import State, Window

WASSERSTEIN = {"method": "wasserstein", "floor": 0.3}
JENSENSHANNON = {"method": "jensenshannon", "floor": 0.1}
FEATURES = {"numeric": ["calm", "shifted", "silent", "sparse", "loud", "gone"], "categorical": ["carrier", "tail"]}
IMPORTANCE = {"calm": 0.06, "shifted": 0.03, "tail": 0.01, "carrier": -0.02}
ROWS = 1500
JUDGING = PerformanceParams(
    earlier_windows=1, min_rows=100, min_days=7, standard_errors=2, confidence=0.95, calibration_bins=10, seed=1
)


def settings(**changes: Any) -> DriftParams:
    stated = {
        "max_rows": 1000,
        "seed": 1,
        "min_rows": 100,
        "alpha": 0.05,
        "run_days": 1,
        "max_scale": 2,
        "critical_weight": 0.2,
        "max_weighted_share": 0.5,
        "numeric": WASSERSTEIN,
        "categorical": JENSENSHANNON,
        "columns": {},
        "prediction": WASSERSTEIN,
    }
    return DriftParams.model_validate(stated | changes)


def rows(seed: int, start: str, count: int = ROWS) -> pd.DataFrame:
    """Calibrated predictions over ten days; nothing depends on the seed but the draws."""
    random = np.random.default_rng(seed)
    probability = random.beta(2, 6, count)
    frame = pd.DataFrame(
        {
            "key": [f"{seed}-{i}" for i in range(count)],
            "time": pd.date_range(start, periods=count, freq=f"{10 * 86400 // max(count, 1)}s", tz="UTC"),
            "label": pd.array((random.random(count) < probability).astype(int), dtype="Int8"),
            "probability": probability,
            **{name: random.normal(size=count) for name in FEATURES["numeric"]},
            "carrier": random.choice(["AA", "B6", "UA"], count),
            "tail": random.choice(["N1", "N2"], count),
        }
    )
    return frame.astype({"carrier": "str", "tail": "str"})


def lay_out(folder: Path, batch: pd.DataFrame, reference: pd.DataFrame, **result: Any) -> Path:
    folder.mkdir(parents=True)
    batch.to_parquet(folder / "predictions.parquet")
    reference.to_parquet(folder / "reference.parquet")
    window = {"version": 3, "start": "2013-04-01", "end": "2013-04-11"}
    batch[["key", "time", "label", "probability"]].assign(**window).to_parquet(folder / "logged.parquet")
    scored = window | {"rows": len(batch), "labels_until": "2013-04-11", "features": FEATURES}
    scored |= {"importance": IMPORTANCE}
    write_json(folder / "result.json", scored | {"labelled_rows": int(batch["label"].notna().sum())} | result)
    return folder


def references() -> pd.DataFrame:
    return pd.concat([rows(1, "2013-01-01").assign(window="train"), rows(2, "2013-03-01").assign(window="test")])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batch in which one thing of each kind happened."""
    folder = tmp_path_factory.mktemp("drift")
    batch, reference = rows(3, "2013-04-01"), references()
    batch["shifted"] += 1
    batch["silent"] = np.nan
    batch.loc[20:, "sparse"] = np.nan
    batch.loc[:2, "loud"] = [np.inf, -np.inf, np.nan]
    batch["tail"] = batch["tail"].where(batch.index % 5 > 0)
    # Inputs answer to the train window and predictions to the test window: the other one is moved here.
    reference.loc[reference["window"] == "train", "probability"] /= 10
    reference.loc[reference["window"] == "test", "calm"] += 5
    score = lay_out(folder / "score", batch.drop(columns="gone"), reference)
    result = drift(score, folder / "none.json", folder / "out", settings(), JUDGING)
    write_json(folder / "out" / "result.json", result)
    return folder / "out"


@pytest.fixture(scope="module")
def verdict(out: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((out / "verdict.json").read_text(), parse_constant=refuse)


def test_drift_shifted_column_is_moved_by_its_shift(verdict):
    found = verdict["inputs"]["columns"]["shifted"]
    assert found["moved"] is True
    assert found["score"] == pytest.approx(1, abs=0.15)
    assert (found["method"], found["threshold"], found["floor"]) == ("wasserstein", 0.3, 0.3)
    assert found["words"] == f"{found['score']:.2f} sd, bound 0.30"


def test_drift_other_draws_of_the_same_are_not_moved(verdict):
    assert [verdict["inputs"]["columns"][name]["moved"] for name in ("calm", "loud", "carrier")] == [False] * 3


def test_drift_predictions_are_compared_with_the_test_window(verdict):
    assert verdict["predictions"]["moved"] is False
    assert verdict["predictions"]["mean"] == pytest.approx(0.25, abs=0.02)
    assert verdict["predictions"]["reference_mean"] == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("name", ["silent", "gone"])
def test_drift_column_without_a_value_is_moved_and_breaks_the_batch(verdict, name):
    found = verdict["inputs"]["columns"][name]
    assert (found["moved"], found["score"], found["missing"]) == (True, None, 1.0)
    assert "empty in the batch" in found["words"]
    assert name in verdict["data"]["empty"]
    assert verdict["data"]["broken"] is True


def test_drift_few_values_are_not_measured_and_not_counted(verdict):
    found = verdict["inputs"]["columns"]["sparse"]
    assert (found["moved"], found["score"]) == (None, None)
    assert "100 needed" in found["words"]
    assert verdict["inputs"]["judged"] == 7
    assert verdict["inputs"]["share"] == pytest.approx(4 / 7)


def test_drift_column_counts_by_its_share_of_the_importance(verdict):
    inputs = verdict["inputs"]
    weights = {name: found["weight"] for name, found in inputs["columns"].items()}
    assert (weights["calm"], weights["shifted"], weights["carrier"]) == (pytest.approx(0.6), pytest.approx(0.3), 0)
    assert inputs["weighted_share"] == pytest.approx(0.4)  # shifted and tail
    assert (inputs["critical_moved"], inputs["raises"]) == (["shifted"], True)


def test_drift_categories_gone_missing_are_moved(verdict):
    found = verdict["inputs"]["columns"]["tail"]
    assert found["moved"] is True
    assert (found["missing"], found["reference_missing"]) == (pytest.approx(0.2), 0.0)


def test_drift_summary_names_what_moved_worst_first(out):
    summary = read_json(out / "result.json")["summary"]
    assert summary.startswith(
        "data BROKEN (empty: silent, gone) · "
        "inputs MOVED (silent, gone, shifted, tail), 40% by importance, shifted critical · "
    )
    assert "predictions not moved · model not worse: log loss 0.499, was 0.503" in summary


def test_drift_report_covers_the_measured_columns_by_the_stated_methods(out):
    stated = {metric["config"]["column"]: metric["config"] for metric in read_json(out / "report.json")["metrics"]}
    assert set(stated) == {"calm", "shifted", "loud", "carrier", "tail", "probability"}
    assert (stated["tail"]["method"], stated["tail"]["threshold"]) == ("jensenshannon", 0.1)
    assert (out / "report.html").stat().st_size > 100_000


def test_drift_sample_is_stated(verdict):
    assert verdict["sample"].startswith("1,000 of 1,500 rows of the batch, 1,000 of 1,500 rows of the train window")
    assert verdict["sample"].endswith("drawn with seed 1")


def test_drift_distances_are_those_of_all_rows(tmp_path, verdict):
    score = lay_out(tmp_path / "score", rows(3, "2013-04-01").assign(shifted=lambda f: f["shifted"] + 1), references())
    found = [
        drift(score, tmp_path / "none.json", tmp_path / f"{n}", settings(max_rows=n), JUDGING) for n in (150, 5000)
    ]
    scores = [[column["score"] for column in one["inputs"]["columns"].values()] for one in found]
    assert scores[0] == scores[1]
    assert found[1]["sample"].startswith("1,500 of 1,500 rows of the batch")


def test_drift_column_in_another_unit_is_broken_and_has_not_moved(tmp_path):
    batch = rows(3, "2013-04-01")
    batch["calm"] *= 1000
    result = drift(
        lay_out(tmp_path / "score", batch, references()), tmp_path / "no", tmp_path / "out", settings(), JUDGING
    )
    found = result["inputs"]["columns"]["calm"]
    assert (found["moved"], found["score"]) == (None, None)
    assert found["words"].startswith("broken: mean size over 2 times")
    assert (result["data"]["broken"], result["data"]["out_of_scale"]) == (True, ["calm"])
    assert result["summary"].startswith("data BROKEN (out of scale: calm) · inputs not moved")
    assert result["inputs"]["raises"] is None, "it might have, in its own unit"


@pytest.mark.parametrize(
    ("batch", "reference", "broken"),
    [
        ([0, 0, 0, 2], [0, 0, 0.4, 0.01], True),
        ([0, 0, 0, 0.8], [0, 0, 0.4, 0.01], False),
        ([-90.0] * 4, [-40.0, 0, 1, 2], True),
        ([1, 2, 3, 1e6], [0.0] * 4, False),
        ([1, 2, 3, 4], [np.nan] * 4, False),
        ([np.nan] * 4, [1, 2, 3, 4], False),
    ],
)
def test_scale_zeros_have_no_unit_and_what_is_unknown_is_not_broken(batch, reference, broken):
    sides = (pd.Series(side, dtype="float64") for side in (batch, reference))
    assert is_out_of_scale(Column("rain", True, Rule(**WASSERSTEIN), *sides), 2) is broken


def test_drift_alpha_is_shared_by_the_inputs_and_whole_for_the_predictions(tmp_path, monkeypatch):
    asked = {}

    def record(column, alpha, run_days, seed):
        asked[column.name] = alpha

    monkeypatch.setattr("pipelines.drift.threshold", record)
    score = lay_out(tmp_path / "score", rows(3, "2013-04-01"), references())
    result = drift(score, tmp_path / "none.json", tmp_path / "out", settings(alpha=0.08), JUDGING)
    assert asked == {name: 0.01 for name in (*FEATURES["numeric"], *FEATURES["categorical"])} | {"probability": 0.08}
    assert (result["inputs"]["moved"], result["inputs"]["raises"]) == (None, None)


def judged(moved: list[str], critical: str = "", weights: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)) -> dict[str, Any]:
    """Four columns, of which some have moved."""
    found = {"score": 0.5, "threshold": 0.4}
    return {
        name: found | {"moved": name in moved, "weight": weight, "critical": name == critical}
        for name, weight in zip("abcd", weights, strict=True)
    }


@pytest.mark.parametrize(
    ("moved", "critical", "raises"),
    [("", "a", False), ("a", "a", True), ("a", "", False), ("ab", "", True), ("bcd", "a", True), ("cd", "a", False)],
)
def test_inputs_critical_column_or_enough_weight_raises(moved, critical, raises):
    found = inputs_verdict(judged(list(moved), critical), 0.5)
    assert (found["raises"], found["moved"]) == (raises, bool(moved))


def test_inputs_columns_without_weight_move_and_raise_nothing():
    found = inputs_verdict(judged(list("bcd"), "a", (1.0, 0.0, 0.0, 0.0)), 0.5)
    assert (found["moved"], found["raises"], found["share"], found["weighted_share"]) == (True, False, 0.75, 0.0)


@pytest.mark.parametrize(
    ("unknown", "moved", "raises"),
    [("a", "", None), ("b", "", False), ("bc", "", None), ("bc", "d", None), ("b", "a", True)],
    ids=["critical", "light", "heavy together", "with what moved", "whatever else"],
)
def test_inputs_that_could_not_be_judged_leave_open_what_they_might_have_raised(unknown, moved, raises):
    columns = judged(list(moved), "a")
    for name in unknown:
        columns[name]["moved"] = None
    assert inputs_verdict(columns, 0.5)["raises"] is raises


def test_inputs_critical_column_that_came_empty_is_broken_and_raises_nothing():
    columns = judged(["a"], "a")
    columns["a"] |= {"score": None, "threshold": None}
    assert inputs_verdict(columns, 0.3)["raises"] is False


@given(st.dictionaries(st.sampled_from([*FEATURES["numeric"], *FEATURES["categorical"]]), st.floats(-1, 1)))
def test_weights_of_any_importance_add_up_to_one(importance):
    weights = weights_of(Features.model_validate(FEATURES), importance)
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) >= 0


def test_drift_empty_batch_is_a_finding(tmp_path):
    score = lay_out(tmp_path / "score", rows(3, "2013-04-01", 0), references())
    result = drift(score, tmp_path / "none.json", tmp_path / "out", settings(), JUDGING)
    assert result["data"]["empty"] == [*FEATURES["numeric"], *FEATURES["categorical"]]
    assert result["predictions"]["mean"] is None
    assert "model not judged: 0 labelled rows, 100 needed · not estimated: 0 rows" in result["summary"]
    assert not (tmp_path / "out" / "report.html").exists()


def test_drift_empty_reference_judges_nothing(tmp_path):
    score = lay_out(tmp_path / "score", rows(3, "2013-04-01"), references().iloc[:0])
    result = drift(score, tmp_path / "none.json", tmp_path / "out", settings(), JUDGING)
    assert (result["inputs"]["moved"], result["inputs"]["share"], result["data"]["broken"]) == (None, None, False)
    assert "inputs not measured · predictions not measured" in result["summary"]


def test_drift_without_champion_says_so_and_clears_the_last_report(tmp_path):
    folder, score = tmp_path / "out", tmp_path / "score"
    write_json(folder / "report.json", {})
    unscored = {"version": None, "start": "2013-04-01", "end": "2013-05-01", "rows": 0, "labelled_rows": 0}
    write_json(score / "result.json", unscored)
    result = drift(score, tmp_path / "none.json", folder, settings(), JUDGING)
    assert result["summary"] == "no champion yet: nothing to compare with"
    assert [path.name for path in folder.iterdir()] == ["verdict.json"]


def test_drift_rejected_data_is_broken(tmp_path):
    write_json(tmp_path / "score" / "result.json", dict.fromkeys(("version", "start", "end", "rows", "labelled_rows")))
    found = {"passed": False, "expectations": 14, "warnings": [{}], "quarantined": {"flights": 30, "weather": 1}}
    write_json(tmp_path / "validate.json", found)
    data = drift(tmp_path / "score", tmp_path / "validate.json", tmp_path / "out", settings(), JUDGING)["data"]
    assert (data["broken"], data["warnings"], data["quarantined"]) == (True, 1, 31)
    assert data["words"] == "data BROKEN (rejected by validation)"


def test_drift_labels_that_turn_round_are_told_by_the_labels_and_by_nothing_else(tmp_path):
    """Concept drift: inputs and predictions stay where they were, and so does what they let expect."""
    batch = rows(3, "2013-04-01")
    batch["label"] = 1 - batch["label"]
    score = lay_out(tmp_path / "score", batch, references())
    found = drift(score, tmp_path / "none.json", tmp_path / "out", settings(), JUDGING)
    assert found["performance"]["worse"] is True
    assert (found["inputs"]["moved"], found["predictions"]["moved"], found["estimate"]["worse"]) == (
        False,
        False,
        False,
    )
    assert "model WORSE" in found["summary"]
    assert "estimate" not in found["summary"]


def test_main_without_labels_estimates_and_later_says_how_good_that_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BALLAST_VAR", str(tmp_path / "var"))
    monkeypatch.setattr("sys.argv", ["drift"])
    sections = {"drift": settings().model_dump(), "performance": JUDGING.model_dump()}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(sections))
    april, score, reference = rows(3, "2013-04-01"), tmp_path / "data" / "score", references()
    lay_out(score, april.assign(label=pd.NA), reference, labels_until="2013-03-01")
    main()
    found = read_json(tmp_path / "data" / "drift" / "result.json")
    assert found["answers"]["estimate"].startswith("estimate not worse: log loss 0.")
    assert found["answers"]["estimate"] in found["summary"]
    before = read_json(tmp_path / "data" / "drift" / "verdict.json")
    about = {"start": "2013-04-01", "end": "2013-04-11", "version": before["version"], "verdict": "wait"}
    State().remember_window(Window(**about, numbers=numbers(before), decided_at="", actor=""))

    second = {"start": "2013-04-11", "end": "2013-04-21", "labels_until": "2013-04-11"}
    write_json(score / "result.json", read_json(score / "result.json") | second)
    earlier = pd.read_parquet(score / "logged.parquet").assign(label=april["label"])
    pd.concat([earlier, earlier.assign(**second, label=pd.NA)]).to_parquet(score / "logged.parquet")
    main()
    [tracked] = read_json(tmp_path / "data" / "drift" / "verdict.json")["estimate"]["tracked"]
    assert tracked["estimated"] == before["estimate"]["log_loss"]
    assert tracked["realised"] == pytest.approx(tracked["estimated"], abs=0.05)


def test_rules_of_own_rule_of_a_column_wins():
    own = {"calm": {"method": "psi", "floor": 0.2}}
    rules = rules_of(Features.model_validate(FEATURES), settings(columns=own))
    assert rules["calm"] == Rule(method="psi", floor=0.2)
    assert rules["loud"] == Rule(**WASSERSTEIN)
    assert rules["carrier"] == Rule(**JENSENSHANNON)


def test_rules_of_wasserstein_of_categories_is_refused():
    with pytest.raises(ParamsError, match=r"`carrier` is categorical .* wasserstein.*jensenshannon"):
        rules_of(Features.model_validate(FEATURES), settings(columns={"carrier": WASSERSTEIN}))


def test_params_shipped_rules_fit_the_shipped_features(caplog):
    shipped = Path(__file__).parents[2] / "params.yaml"
    features = Features.model_validate(yaml.safe_load(shipped.read_text())["prepare"]["features"])
    rules = rules_of(features, load(shipped, "drift", DriftParams))
    assert set(rules) == set(features.names)
    assert caplog.text == ""  # a rule for a column that is not there would be named


@pytest.mark.parametrize("method", ["jensenshannon", "hellinger", "psi", "kl_div"])
def test_compare_every_method_tells_moved_from_unmoved(method):
    rule = Rule(method=method, floor=0.2)
    batch, reference = rows(3, "2013-04-01"), rows(1, "2013-01-01")
    batch["shifted"] += 1
    batch.loc[: ROWS // 2, "tail"] = "N9"
    columns = [
        column(name, name in FEATURES["numeric"], rule, batch, reference) for name in ("calm", "shifted", "tail")
    ]
    found = {one.name: compare(one, 100, lambda asked: asked.rule.floor).moved for one in columns}
    assert found == {"calm": False, "shifted": True, "tail": True}


def same(value: float) -> pd.DataFrame:
    times = pd.date_range("2013-01-01", periods=200, freq="h", tz="UTC")
    return pd.DataFrame({"time": times, "calm": np.full(200, value)})


def test_compare_constant_column_is_measured():
    finding = compare(column("calm", True, Rule(**WASSERSTEIN), same(1), same(1)), 100, lambda _: 0.3)
    assert (finding.moved, finding.score) == (False, 0.0)


@pytest.mark.parametrize(
    ("now", "then", "moved"),
    [(np.inf, 1.0, True), (np.nan, 1.0, True), (np.nan, np.nan, None), (1.0, np.inf, None)],
)
def test_compare_column_without_a_finite_value_is_not_measured(now, then, moved):
    finding = compare(column("calm", True, Rule(**WASSERSTEIN), same(now), same(then)), 100, lambda _: 0.3)
    assert (finding.moved, finding.score, finding.threshold) == (moved, None, None)


def test_compare_without_a_threshold_is_not_measured():
    finding = compare(column("calm", True, Rule(**WASSERSTEIN), same(1), same(1)), 100, lambda _: None)
    assert (finding.moved, finding.words) == (None, "not measured: too few days in the reference")


def test_comparison_import_leaves_evidently_alone():
    code = "import sys, pipelines.drift, pipelines.page, pipelines.policy; sys.exit('evidently' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("planted", "found"), [(1.5, True), (0.0, False)])
def test_drift_what_a_column_tells_that_the_champion_does_not_know_is_a_loss_to_avoid(tmp_path, planted, found):
    """Learnt from the labels of its test window and of this one."""
    random = np.random.default_rng(7)

    def labelled(frame: pd.DataFrame) -> pd.DataFrame:
        odds = np.log(frame["probability"] / (1 - frame["probability"])) + planted * frame["calm"]
        late = random.random(len(frame)) < 1 / (1 + np.exp(-odds))
        return frame.assign(label=pd.array(late.astype(int), dtype="Int8"))

    batch, test = labelled(rows(3, "2013-04-01", 10 * ROWS)), labelled(rows(2, "2013-03-01", 10 * ROWS))
    reference = pd.concat([rows(1, "2013-01-01").assign(window="train"), test.assign(window="test")])
    score = lay_out(tmp_path / "score", batch, reference)
    batch.assign(version=3, start="2013-04-01", end="2013-04-11").to_parquet(score / "logged.parquet")
    performance = drift(score, tmp_path / "none.json", tmp_path / "out", settings(), JUDGING)["performance"]
    assert performance["avoidable"]["days"] == 10
    assert (performance["avoidable"]["lower"] > 0.001) is found
    assert numbers(read_json(tmp_path / "out" / "verdict.json"))["performance"]["avoidable"] == performance["avoidable"]
