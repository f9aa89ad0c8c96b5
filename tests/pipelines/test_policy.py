"""Policy: each verdict, on both sides of each bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.files import read_json, write_json
from pipelines.policy import PolicyParams, main, policy
from pipelines.state import Decision, State

SETTINGS = PolicyParams(min_labelled_rows=1000, max_log_loss_rise=0.03, max_drifted_share=0.5)


def verdict(**changes: dict[str, Any]) -> dict[str, Any]:
    """Drift's verdict on a quiet window, with changes per part."""
    quiet: dict[str, dict[str, Any]] = {
        "data": {"broken": False, "rejected": False, "empty": []},
        "inputs": {
            "moved": True,
            "moved_columns": ["temp"],
            "judged": 4,
            "share": 0.25,
            "columns": dict.fromkeys("abcd"),
        },
        "performance": {
            "measured": True,
            "labelled_rows": 5000,
            "rise": 0.01,
            "standard_error": 0.01,
            "standard_errors": 2.0,
            "worse": False,
        },
    }
    parts = {name: part | changes.get(name, {}) for name, part in quiet.items()}
    return {"version": 3, "start": "2013-04-01", "end": "2013-05-01", **parts}


def test_policy_quiet_window_waits_and_says_how_far_it_is():
    found = policy(verdict(), SETTINGS)
    assert found["verdict"] == "wait"
    assert found["summary"] == (
        "WAIT · performance: log loss worse by 0.010 ± 0.010, bound 0.03 · drift: 1 of 4 columns moved (25%), bound 50%"
    )
    assert (found["as_of"], found["interval"], found["version"]) == ("2013-05-01", "2013-04-01..2013-05-01", 3)


def test_policy_worse_than_its_bound_retrains_for_that_reason():
    found = policy(verdict(performance={"rise": 0.08, "worse": True}), SETTINGS)
    assert found["verdict"] == "retrain"
    assert found["reasons"] == ["performance: log loss worse by 0.080 ± 0.010, bound 0.03"]


def test_policy_certain_but_small_rise_waits():
    assert policy(verdict(performance={"rise": 0.025, "worse": True}), SETTINGS)["verdict"] == "wait"


def test_policy_large_but_uncertain_rise_waits_and_says_why():
    found = policy(verdict(performance={"rise": 0.08, "standard_error": 0.05}), SETTINGS)
    assert found["verdict"] == "wait"
    assert found["reasons"][0].endswith("± 0.050, bound 0.03, but within 2 standard errors")


def test_policy_few_labels_do_not_retrain():
    found = policy(verdict(performance={"labelled_rows": 999, "rise": 0.5, "worse": True}), SETTINGS)
    assert found["verdict"] == "wait"
    assert found["reasons"][0] == "performance: not judged, 999 labelled rows of at least 1,000"


def test_policy_one_labelled_day_does_not_retrain():
    one_day = {"rise": 0.5, "standard_error": None, "worse": None}
    found = policy(verdict(performance=one_day), SETTINGS)
    assert found["verdict"] == "wait"
    assert "from one day" in found["reasons"][0]


def test_policy_no_labels_and_no_columns_waits():
    nothing = {
        "inputs": {"share": None, "judged": 0, "moved_columns": [], "columns": {"a": None}},
        "performance": {"measured": False},
    }
    found = policy(verdict(**nothing), SETTINGS)
    assert found["verdict"] == "wait"
    assert found["reasons"][1] == "drift: not judged, 0 of 1 columns could be measured"


@pytest.mark.parametrize(("moved", "expected"), [(["a", "b"], "wait"), (["a", "b", "c"], "retrain")])
def test_policy_most_columns_moved_retrains(moved, expected):
    found = policy(verdict(inputs={"moved_columns": moved, "share": len(moved) / 4}), SETTINGS)
    assert found["verdict"] == expected
    assert f"drift: {len(moved)} of 4 columns moved" in found["summary"]


def test_policy_both_reasons_are_given():
    changes = {
        "inputs": {"moved_columns": ["a", "b", "c"], "share": 0.75},
        "performance": {"rise": 0.08, "worse": True},
    }
    assert len(policy(verdict(**changes), SETTINGS)["reasons"]) == 2


def test_policy_improvement_is_called_that():
    assert "log loss better by 0.020 ± 0.010" in policy(verdict(performance={"rise": -0.02}), SETTINGS)["summary"]


def test_policy_without_champion_holds():
    found = policy(verdict() | {"version": None}, SETTINGS)
    assert (found["verdict"], found["summary"][:22]) == ("hold", "HOLD · no champion yet")


@pytest.mark.parametrize("broken", [{"empty": ["precip"]}, {"rejected": True}])
def test_policy_broken_data_holds_whatever_else(broken):
    worse = {"rise": 0.5, "worse": True}
    found = policy(verdict(data=broken, performance=worse), SETTINGS)
    assert found["verdict"] == "hold"
    assert "at its source" in found["summary"]


def test_policy_few_columns_judged_is_no_ground_to_retrain():
    few = {"moved_columns": ["a"], "judged": 1, "share": 1.0}
    found = policy(verdict(inputs=few), SETTINGS)
    assert found["verdict"] == "wait"
    assert found["reasons"][1] == "drift: not judged, 1 of 4 columns could be measured"


def test_policy_params_share_above_one_is_refused():
    with pytest.raises(ValidationError, match="max_drifted_share"):
        PolicyParams(min_labelled_rows=1, max_log_loss_rise=0, max_drifted_share=50)


def run_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> dict[str, Any]:
    """Run main() in a workspace of its own, beside what drift wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BALLAST_VAR", str(tmp_path / "var"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("sys.argv", ["policy"])
    (tmp_path / "params.yaml").write_text(
        "policy: {min_labelled_rows: 1000, max_log_loss_rise: 0.03, max_drifted_share: 0.5}\n"
        "register: {model: flight_delays}\n"
        "breaker: {refusals: 2}\n"
    )
    write_json(tmp_path / "data" / "drift" / "verdict.json", found)
    main()
    result: dict[str, Any] = read_json(tmp_path / "data" / "policy" / "result.json")
    return result


def without_champion() -> dict[str, Any]:
    quiet = verdict(performance={"measured": False, "labelled_rows": 0, "words": ""})
    quiet["data"] |= {"validated": False}
    quiet["inputs"] |= {"moved": None, "columns": {}, "share": None}
    quiet["predictions"] = {"moved": None, "words": ""}
    return quiet | {"version": None, "rows": 0, "labelled_rows": 0, "sample": ""}


def test_main_lays_out_the_page_and_says_where(tmp_path, monkeypatch):
    result = run_main(tmp_path, monkeypatch, without_champion())
    assert result["verdict"] == "hold"
    assert "HOLD" in (tmp_path / "var" / result["page"]).read_text()
    assert (tmp_path / "var" / "reports" / "index.html").exists()


def test_main_while_the_breaker_is_open_holds_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("BALLAST_STATE_URI", f"sqlite:///{tmp_path / 'state.db'}")
    losses = {"rise": 0.08, "worse": True, "log_loss": 0.58, "reference_log_loss": 0.5}
    worse = without_champion() | {"version": 3}
    worse["performance"] = verdict()["performance"] | losses | {"auc": None, "reference_auc": None, "words": ""}
    for number in range(2):
        State().remember(Decision(f"{number:064}", 4, "refuse", "", "2013-05-01", f"2026-11-0{number + 1}", data="a"))
    (tmp_path / "dvc.lock").write_text("stages: {ingest: {outs: [{path: data/ingest/tables, md5: a}]}}")
    result = run_main(tmp_path, monkeypatch, worse)
    assert result["verdict"] == "hold"
    assert result["summary"].startswith("HOLD · breaker OPEN: 2 retrainings in a row were refused (v4).")
    assert "log loss worse by 0.080" in result["summary"]
    (tmp_path / "dvc.lock").write_text("stages: {ingest: {outs: [{path: data/ingest/tables, md5: new}]}}")
    assert run_main(tmp_path, monkeypatch, worse)["verdict"] == "retrain"


def test_main_mlflow_away_keeps_the_page_and_warns(tmp_path, monkeypatch, caplog):
    result = run_main(tmp_path, monkeypatch, without_champion() | {"version": 3})
    assert result["verdict"] == "wait"
    assert (tmp_path / "var" / result["page"]).exists()
    assert "is not with version 3 in MLflow" in caplog.text
