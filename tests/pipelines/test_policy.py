"""Policy: each verdict on both sides of each bound, and what stands against a retraining."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import params, retraining
from pipelines.errors import ParamsError
from pipelines.files import read_json, write_json
from pipelines.policy import Past, PolicyParams, main, numbers, policy
from pipelines.state import Decision, State, Window

PERFORMANCE = {"kind": "performance", "max_rise": 0.03, "min_rows": 1000}
ESTIMATED = {"kind": "estimated_performance", "max_rise": 0.05, "min_rows": 1000}
AVOIDABLE = {"kind": "avoidable_loss", "min_gain": 0.001, "min_rows": 1000}
DRIFT = {"kind": "drift"}
SCHEDULE = {"kind": "schedule", "every_days": 92}
TWO_OF_THREE = {"windows": 2, "of": 3}
WORSE = {"performance": {"rise": 0.08, "worse": True}}
RAISED = {"inputs": {"raises": True, "weighted_share": 0.4, "critical_moved": ["dewp"], "moved_columns": ["dewp"]}}
QUIET: dict[str, dict[str, Any]] = {}
ALL = {"kind": "all"}


def settings(*triggers: dict[str, Any], **changes: Any) -> PolicyParams:
    """The section with these triggers, without cooldown unless it is changed."""
    budget = {"retrainings": 3, "days": 365}
    rest = {"cooldown_days": 0, "budget": budget, "training_window": ALL}
    return PolicyParams.model_validate({"triggers": triggers or (PERFORMANCE, DRIFT), **rest, **changes})


def verdict(version: int | None = 3, start: str = "2013-07-01", end: str = "2013-08-01", **changes: Any) -> Any:
    """Drift's verdict on a quiet window, with changes per part."""
    moved = {"moved": True, "moved_columns": ["temp"], "judged": 4, "share": 0.25, "raises": False}
    loss = {"measured": True, "rise": 0.01, "standard_error": 0.01, "standard_errors": 2.0, "worse": False}
    quiet: dict[str, dict[str, Any]] = {
        "data": {"broken": False, "rejected": False, "empty": []},
        "inputs": {**moved, "weighted_share": 0.1, "critical_moved": [], "columns": {name: {} for name in "abcd"}},
        "performance": {**loss, "labelled_rows": 5000, "calibration": {}, "windows": []},
        "estimate": {**loss, "rows": 5000, "tracked": []},
    }
    parts = {name: part | changes.get(name, {}) for name, part in quiet.items()}
    return {"version": version, "start": start, "end": end, "rows": 5000, "labelled_rows": 5000, **parts}


def window(month: int, version: int = 3, **changes: Any) -> Window:
    """A month of 2013 as the policy has kept it."""
    found = verdict(version, f"2013-{month:02}-01", f"2013-{month + 1:02}-01", **changes)
    return Window(found["start"], found["end"], version, "wait", numbers(found), "2026-11-01", "monitor/x")


def days(*texts: str) -> list[date]:
    return [date.fromisoformat(text) for text in texts]


# --- one window


def test_policy_quiet_window_waits_and_says_how_far_it_is():
    found = policy(verdict(), settings(), Past())
    assert found["summary"] == (
        "WAIT · performance: log loss worse by 0.010 ± 0.010, bound 0.03"
        " · drift: 1 of 4 columns moved, 10% by importance"
    )
    assert (found["verdict"], found["fired"], found["train_days"]) == ("wait", [], None)
    assert (found["as_of"], found["interval"], found["version"]) == ("2013-08-01", "2013-07-01..2013-08-01", 3)


def test_policy_worse_than_its_bound_retrains_for_that_reason():
    found = policy(verdict(**WORSE), settings(), Past())
    assert (found["verdict"], found["fired"]) == ("retrain", ["performance"])
    assert found["reasons"] == ["performance: log loss worse by 0.080 ± 0.010, bound 0.03"]


@pytest.mark.parametrize(
    ("performance", "said"),
    [
        ({"rise": 0.025, "worse": True}, "bound 0.03"),
        ({"rise": 0.08, "standard_error": 0.05}, "± 0.050, bound 0.03, but within 2 standard errors"),
        ({"rise": 0.5, "worse": True, "labelled_rows": 999}, "not judged, 999 labelled rows of at least 1,000"),
        ({"rise": 0.5, "worse": None, "standard_error": None}, "bound 0.03, from too few days to judge"),
        ({"measured": False}, "performance: not judged, it was not measured"),
        ({"rise": -0.02}, "log loss better by 0.020 ± 0.010, bound 0.03"),
    ],
)
def test_policy_small_uncertain_or_unjudged_rise_waits_and_says_why(performance, said):
    found = policy(verdict(performance=performance), settings(PERFORMANCE), Past())
    assert found["verdict"] == "wait"
    assert found["reasons"][0].endswith(said)


def test_policy_estimated_loss_above_its_bound_retrains_before_labels_are_in():
    estimate = {"rise": 0.06, "worse": True}
    unlabelled = {"measured": False, "labelled_rows": 0}
    found = policy(verdict(estimate=estimate, performance=unlabelled), settings(PERFORMANCE, ESTIMATED), Past())
    assert found["reasons"] == ["estimated performance: log loss worse by 0.060 ± 0.010, bound 0.05"]


def test_policy_without_an_estimate_does_not_judge_it():
    found = policy({**verdict(), "estimate": None}, settings(ESTIMATED), Past())
    assert found["summary"] == "WAIT · estimated performance: not judged, 0 rows of at least 1,000"


def avoided(lower: float, **changes: Any) -> dict[str, Any]:
    """Performance as it is, with an avoidable loss that is surely above ``lower``."""
    part = {"measured": True, "rows": 5000, "loss": 0.006, "standard_error": 0.0021, "lower": lower}
    return {"performance": {"avoidable": part | changes}}


@pytest.mark.parametrize(("lower", "expected"), [(0.001, "wait"), (0.0011, "retrain")])
def test_policy_loss_that_could_surely_be_avoided_retrains_above_its_bound(lower, expected):
    found = policy(verdict(**avoided(lower)), settings(AVOIDABLE), Past())
    assert found["verdict"] == expected
    assert found["reasons"] == [
        f"avoidable loss: 0.0060 ± 0.0021 log loss, surely more than {lower:.4f}, bound 0.001",
    ]


@pytest.mark.parametrize("part", [avoided(0.5, rows=999), {"performance": {"avoidable": {"measured": False}}}, QUIET])
def test_policy_avoidable_loss_that_was_not_measured_or_on_few_rows_waits(part):
    found = policy(verdict(**part), settings(AVOIDABLE), Past())
    assert found["summary"].startswith("WAIT · avoidable loss: not judged, ")


def test_policy_daily_windows_that_were_judged_on_the_same_labelled_rows_count_once():
    """A day's window is judged with the six before it: the one of the day before shares six of its seven days."""

    def day(number: int) -> dict[str, Any]:
        judged = {"start": f"2013-07-{number - 6:02}", "end": f"2013-07-{number + 1:02}"}
        return {"start": f"2013-07-{number:02}", "end": f"2013-07-{number + 1:02}", "judged": judged}

    def seen(number: int) -> Window:
        one = day(number)
        found = verdict(3, one["start"], one["end"], performance={"worse": True, "rise": 0.08, **one["judged"]})
        return Window(one["start"], one["end"], 3, "wait", numbers(found), "", "")

    both, now = settings({**PERFORMANCE, "windows": 2, "of": 2}), day(29)
    last = verdict(3, now["start"], now["end"], performance={"worse": True, "rise": 0.08, **now["judged"]})
    assert policy(last, both, Past([seen(n) for n in range(23, 29)]))["verdict"] == "wait"
    assert policy(last, both, Past([seen(n) for n in range(22, 29)]))["verdict"] == "retrain"


def test_policy_raised_inputs_retrain_and_name_the_critical_columns():
    found = policy(verdict(**RAISED), settings(DRIFT), Past())
    assert found["summary"] == "RETRAIN · drift: 1 of 4 columns moved, 40% by importance, critical: dewp"


@pytest.mark.parametrize("inputs", [{"raises": None, "judged": 1}, {"raises": True}])
def test_policy_inputs_that_were_not_judged_or_are_few_rows_wait(inputs):
    few = settings({**DRIFT, "min_rows": 1 if inputs["raises"] is None else 6000})
    assert policy(verdict(inputs=inputs), few, Past())["summary"].startswith("WAIT · drift: not judged")


@pytest.mark.parametrize(("last", "expected"), [("2013-05-01", "retrain"), ("2013-05-02", "wait")])
def test_policy_schedule_fires_once_its_days_have_passed(last, expected):
    found = policy(verdict(), settings(SCHEDULE), Past(trained=days("2013-01-01", last), promoted=date(2013, 7, 1)))
    assert found["verdict"] == expected
    assert f"days since {last}, every 92" in found["summary"]


def test_policy_schedule_without_known_retrainings_counts_from_the_promotion():
    past = Past(promoted=date(2013, 5, 1))
    assert policy(verdict(), settings(SCHEDULE), past)["verdict"] == "retrain"
    assert "not known" in policy(verdict(), settings(SCHEDULE), Past())["summary"]


def test_policy_without_triggers_never_retrains():
    empty = settings().model_copy(update={"triggers": ()})
    assert policy(verdict(**WORSE), empty, Past())["summary"] == "WAIT · no trigger is set"


def test_policy_gives_every_reason_that_fires_and_no_other():
    found = policy(verdict(**WORSE, **RAISED), settings(PERFORMANCE, DRIFT, ESTIMATED), Past())
    assert [reason.split(":")[0] for reason in found["reasons"]] == found["fired"] == ["performance", "drift"]


# --- so many of the last windows


@pytest.mark.parametrize(
    ("may", "june", "july", "expected"),
    [
        (QUIET, QUIET, RAISED, "wait"),
        (QUIET, RAISED, RAISED, "retrain"),
        (RAISED, QUIET, RAISED, "retrain"),
        (RAISED, RAISED, QUIET, "wait"),
        (RAISED, RAISED, {"inputs": {"raises": None}}, "retrain"),
    ],
    ids=["one", "two", "two-apart", "quiet-now", "not-judged-now"],
)
def test_policy_two_of_three_windows(may, june, july, expected):
    past = Past([window(4, **RAISED), window(5, **may), window(6, **june)])
    found = policy(verdict(**july), settings({**DRIFT, **TWO_OF_THREE}), past)
    assert found["verdict"] == expected
    fired = sum(month is RAISED for month in (may, june, july))
    assert f"({fired} of the last 3 windows, needed: 2 of 3)" in found["summary"]


@pytest.mark.parametrize(
    "windows",
    [
        [window(5, version=2, **RAISED), window(6, version=2, **RAISED)],
        [window(5, **RAISED), window(6, version=2)],
        [window(7, **RAISED), window(8, **RAISED)],
    ],
    ids=["another-champion", "before-another-champion", "this-and-later"],
)
def test_policy_windows_of_another_champion_or_not_before_this_one_do_not_count(windows):
    found = policy(verdict(**RAISED), settings({**DRIFT, **TWO_OF_THREE}), Past(windows))
    assert found["verdict"] == "wait"
    assert "(1 of the last 1 windows, needed: 2 of 3)" in found["summary"]


def test_policy_windows_whose_data_was_broken_do_not_count():
    past = Past([window(5, **RAISED), window(6, data={"empty": ["dewp"]}, **RAISED)])
    assert (
        "(2 of the last 2 windows"
        in policy(verdict(**RAISED), settings({**DRIFT, "windows": 3, "of": 3}), past)["summary"]
    )


def test_policy_windows_that_overlap_count_once():
    june = window(6, **RAISED)
    weeks = [Window("2013-06-24", "2013-07-03", 3, "wait", june.numbers, "", ""), june]
    fortnight = Window("2013-06-15", "2013-07-01", 3, "wait", june.numbers, "", "")
    found = policy(verdict(**RAISED), settings({**DRIFT, "windows": 3, "of": 3}), Past([*weeks, fortnight]))
    assert "(2 of the last 2 windows, needed: 3 of 3)" in found["summary"]


def test_policy_windows_that_were_judged_on_the_same_labelled_rows_count_once():
    """Where labels are late, performance judges the newest window with enough of them, maybe a second time."""
    may = {"performance": {"rise": 0.08, "worse": True, "start": "2013-05-01", "end": "2013-06-01"}}
    april = {"performance": {"rise": 0.08, "worse": True, "start": "2013-04-01", "end": "2013-05-01"}}
    both = settings({**PERFORMANCE, "windows": 2, "of": 2})
    assert policy(verdict(**may), both, Past([window(6, **may)]))["verdict"] == "wait"
    assert policy(verdict(**may), both, Past([window(5, **april), window(6, **may)]))["verdict"] == "retrain"


# --- what stands against it


@pytest.mark.parametrize(("last", "expected"), [("2013-07-12", "hold"), ("2013-07-11", "retrain")])
def test_policy_within_the_cooldown_holds_what_would_have_fired(last, expected):
    found = policy(verdict(**WORSE), settings(cooldown_days=21), Past(trained=days("2013-01-01", last)))
    assert found["verdict"] == expected
    assert found["reasons"][-1].startswith("performance: log loss worse by 0.080")
    if expected == "hold":
        assert found["reasons"][0] == f"cooldown: retrained as of {last}, none is asked for before 2013-08-02"
        assert found["fired"] == ["performance"]


def test_policy_of_a_past_window_does_not_retrain_before_a_later_retraining():
    found = policy(verdict(**WORSE), settings(cooldown_days=21), Past(trained=days("2013-11-01")))
    assert (found["verdict"], "before 2013-11-22" in found["summary"]) == ("hold", True)


@pytest.mark.parametrize(("first", "expected"), [("2012-08-02", "hold"), ("2012-08-01", "retrain")])
def test_policy_budget_counts_the_retrainings_of_its_days(first, expected):
    found = policy(verdict(**WORSE), settings(), Past(trained=days(first, "2013-02-01", "2013-04-01")))
    assert found["verdict"] == expected
    assert ("budget: 3 retrainings within 365 days, at most 3" in found["reasons"]) == (expected == "hold")


def test_policy_quiet_window_waits_whatever_stands_against_retraining():
    past = Past(trained=days("2013-07-31"), against=["breaker OPEN"])
    assert policy(verdict(), settings(cooldown_days=21), past)["verdict"] == "wait"


def test_policy_without_champion_holds():
    found = policy(verdict(None, **WORSE), settings(), Past())
    assert found["summary"] == "HOLD · no champion yet: retrain_scheduled trains the first"


@pytest.mark.parametrize("broken", [{"empty": ["precip"]}, {"out_of_scale": ["precip"]}, {"rejected": True}])
def test_policy_broken_data_holds_whatever_else(broken):
    found = policy(verdict(data=broken, **WORSE), settings(), Past())
    assert found["verdict"] == "hold"
    assert "at its source" in found["reasons"][0]
    assert found["reasons"][1].startswith("performance: log loss worse")
    assert policy(verdict(data=broken), settings(), Past())["verdict"] == "hold"


# --- what a retraining trains on

SINCE = {"kind": "since_change", "min_days": 20}


@pytest.mark.parametrize(
    ("kind", "windows", "now", "expected"),
    [
        (ALL, [], WORSE, None),
        ({"kind": "last", "days": 90}, [], WORSE, 90),
        (SINCE, [window(4), window(5, **RAISED), window(6, **WORSE)], WORSE, 92 - 29),
        (SINCE, [window(4, **WORSE), window(5), window(6)], WORSE, 20),
        (SINCE, [window(5, version=2, **WORSE), window(6, **RAISED)], WORSE, 61 - 29),
        (SINCE, [window(6, **WORSE)], QUIET, None),
    ],
    ids=["all", "last", "since-may", "at-least", "since-the-champion", "no-change-known"],
)
def test_policy_training_window(kind, windows, now, expected):
    both = settings(PERFORMANCE, {**SCHEDULE, "every_days": 1}, training_window=kind)
    found = policy(verdict(**now), both, Past(windows, promoted=date(2013, 1, 1)), held_out=29)
    assert (found["verdict"], found["train_days"]) == ("retrain", expected)


def test_policy_that_does_not_retrain_names_no_training_window():
    assert policy(verdict(), settings(training_window={"kind": "last", "days": 90}), Past())["train_days"] is None


# --- settings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"triggers": [{**DRIFT, "windows": 3, "of": 2}]}, "`windows` must be at most `of`: 3 of 2 windows"),
        ({"triggers": [{"kind": "performence", "max_rise": 0.1}]}, "did you mean `performance`"),
        ({"triggers": [{**DRIFT, "every_days": 3}]}, "`policy.triggers.0.drift.every_days` is not a setting"),
        ({"training_window": {"kind": "last"}}, "`policy.training_window.last.days`: Field required"),
    ],
)
def test_policy_params_that_are_wrong_say_so(tmp_path, change, said):
    section = settings().model_dump(mode="json") | change
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"policy": section}))
    with pytest.raises(ParamsError, match=r"params\.yaml") as caught:
        params.load(tmp_path / "params.yaml", "policy", PolicyParams)
    assert said in str(caught.value)


def test_numbers_keep_what_the_policy_asks_of_a_window_and_no_bulk():
    column = {"score": 0.2, "threshold": 0.1, "moved": True, "weight": 0.3, "words": "long", "method": "psi"}
    kept = numbers(verdict(inputs={"columns": {"a": column}}))
    assert kept["inputs"]["columns"] == {"a": {"score": 0.2, "threshold": 0.1, "moved": True, "weight": 0.3}}
    assert {"calibration", "windows"}.isdisjoint(kept["performance"])
    assert "tracked" not in kept["estimate"]
    assert policy({**verdict(), **kept}, settings(), Past()) == policy(verdict(), settings(), Past())


# --- the step


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace of a monitor's run, apart from any MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BALLAST_VAR", str(tmp_path / "var"))
    monkeypatch.setenv("BALLAST_STATE_URI", f"sqlite:///{tmp_path / 'state.db'}")
    monkeypatch.setenv("BALLAST_DAG", "monitor")
    monkeypatch.setenv("BALLAST_RUN", "july")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("sys.argv", ["policy"])
    sections = {
        "policy": settings(cooldown_days=21).model_dump(mode="json"),
        "prepare": {"label_delay_days": 1, "validation_days": 14, "test_days": 14, "features": {}},
        "register": {"model": "flight_delays"},
        "breaker": {"refusals": 2},
    }
    (tmp_path / "params.yaml").write_text(json.dumps(sections))
    return tmp_path


def run(found: Any, workspace: Path) -> Any:
    """Run main() beside what drift wrote."""
    write_json(workspace / "data" / "drift" / "verdict.json", found)
    main()
    return read_json(workspace / "data" / "policy" / "result.json")


def shown(version: int | None = 3, **changes: Any) -> Any:
    """A verdict with all that its page shows."""
    losses = {"log_loss": 0.58, "reference_log_loss": 0.5, "auc": None, "reference_auc": None, "words": ""}
    found = verdict(version, **changes) | {"predictions": {"moved": None, "words": ""}, "sample": ""}
    found["data"] |= {"validated": False}
    found["inputs"] |= {"moved": None, "columns": {}}
    found["performance"] |= {**losses, "calibration": None}
    found["estimate"] = {"measured": False, "words": "", **found.get("estimate", {})}
    return found


def test_main_lays_out_the_page_and_says_where(workspace):
    result = run(shown(None), workspace)
    assert result["verdict"] == "hold"
    assert "HOLD" in (workspace / "var" / result["page"]).read_text()
    assert (workspace / "var" / "reports" / "index.html").exists()


def test_main_keeps_the_window_and_what_it_asks_for_once(workspace):
    for _ in range(2):  # killed before its end, and tried again
        result = run(shown(**WORSE), workspace)
        assert (result["verdict"], result["asked_by"], result["train_days"]) == ("retrain", "monitor/july", None)
    (kept,), (asked,) = State().windows(), State().retrainings()
    assert (kept.start, kept.end, kept.version, kept.verdict, kept.actor) == (
        "2013-07-01",
        "2013-08-01",
        3,
        "retrain",
        "monitor/july",
    )
    assert (asked.asked_by, asked.as_of, asked.run, asked.ended_at) == ("monitor/july", "2013-08-01", None, None)


def test_main_counts_the_windows_that_were_kept(workspace):
    section = settings({**PERFORMANCE, **TWO_OF_THREE}).model_dump(mode="json")
    file = workspace / "params.yaml"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"policy": section}))
    assert run(shown(start="2013-06-01", end="2013-07-01", **WORSE), workspace)["verdict"] == "wait"
    assert run(shown(**WORSE), workspace)["verdict"] == "retrain"


def test_main_while_a_retraining_is_under_way_holds_and_asks_for_none(workspace, monkeypatch):
    State().begin_retraining("retrain_scheduled/x", date(2013, 5, 1), "schedule")
    result = run(shown(**WORSE), workspace)
    assert result["verdict"] == "hold"
    assert result["reasons"][0].startswith("under way: retrain_scheduled/x retrains as of 2013-05-01, since 20")
    assert "log loss worse by 0.080" in result["summary"]
    assert [one.run for one in State().retrainings()] == ["retrain_scheduled/x"]
    monkeypatch.setattr(retraining, "ENDS_WITHIN", timedelta(seconds=-1))  # it began too long ago
    assert run(shown(**WORSE), workspace)["verdict"] == "retrain"


def test_main_after_a_retraining_holds_until_the_cooldown_is_over(workspace):
    state = State()
    state.begin_retraining("retrain_on_alert/x", date(2013, 7, 20), "alert")
    state.end_retraining("retrain_on_alert/x", "paused")
    assert run(shown(**WORSE), workspace)["verdict"] == "retrain", "what was paused has trained nothing"
    state.end_retraining("retrain_on_alert/x", "refuse")
    assert "cooldown: retrained as of 2013-07-20" in run(shown(**WORSE), workspace)["summary"]


def test_main_while_the_breaker_is_open_holds_and_says_why(workspace):
    for number in range(2):
        State().remember(Decision(f"{number:064}", 4, "refuse", "", "2013-05-01", f"2026-11-0{number + 1}", data="a"))
    (workspace / "dvc.lock").write_text("stages: {ingest: {outs: [{path: data/ingest/tables, md5: a}]}}")
    result = run(shown(**WORSE), workspace)
    assert result["verdict"] == "hold"
    assert result["summary"].startswith("HOLD · breaker OPEN: 2 retrainings in a row were refused (v4).")
    assert "log loss worse by 0.080" in result["summary"]
    (workspace / "dvc.lock").write_text("stages: {ingest: {outs: [{path: data/ingest/tables, md5: new}]}}")
    assert run(shown(**WORSE), workspace)["verdict"] == "retrain"


def test_main_mlflow_away_keeps_the_page_and_warns(workspace, caplog):
    result = run(shown(), workspace)
    assert result["verdict"] == "wait"
    assert (workspace / "var" / result["page"]).exists()
    assert "is not with version 3 in MLflow" in caplog.text
