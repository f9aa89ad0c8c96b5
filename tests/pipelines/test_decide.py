from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import SQL, Project, read
from pydantic import ValidationError

from pipelines import metrics, params, record, registry, tracking
from pipelines.decide import DecideParams, Side, Verdict, decide
from pipelines.errors import BallastError, ParamsError, TryAgain
from pipelines.files import sha256, write_json
from pipelines.freeze import freeze
from pipelines.model import Model, load
from pipelines.promote import promote
from pipelines.state import GENESIS, Decision, State

DEFAULT_BETTER = {"rule": "better", "severity": "block", "metric": "log_loss"}


def upside_down(seen: pd.DataFrame) -> np.ndarray[Any, Any]:
    return 1 - seen["label"].to_numpy("float32")


def side(project: Project, version: int = 1, **how: Any) -> Side:
    project.train(**how)
    return standing(load(project.root / "data" / "train" / "model"), version)


def standing(model: Model, version: int = 1) -> Side:
    return Side(version, model.digest, lambda: model)


def gate(
    project: Project,
    challenger: Side,
    champion: Side | None = None,
    trained: Collection[str] = (),
    rules: dict[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> Verdict:
    """Judge by the project's settings, with some of them changed; ``rules`` changes fields of rules by their kind."""
    path = project.root / "params.yaml"
    section = yaml.safe_load(path.read_text())["decide"] | settings
    section["rules"] = [rule | (rules or {}).get(rule["rule"], {}) for rule in section["rules"]]
    test = pd.read_parquet(project.root / "data" / "prepare" / "test.parquet")
    quarantine = project.root / "data" / "validate" / "quarantine"
    policy = DecideParams.model_validate(section)
    return decide(challenger, champion, test, project.tables, quarantine, policy, params.as_of(path), trained)


def failed(verdict: Verdict) -> list[str]:
    return [rule.rule for rule in verdict.rules if not rule.passed]


def test_decide_on_a_good_first_model_promotes_by_an_explicit_rule(project: Project) -> None:
    verdict = gate(project, side(project))
    assert verdict.summary == "PROMOTE · first model · 8 of 8 rules"
    assert (verdict.verdict, verdict.reasons) == ("promote", ["first model"])


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"min_test_rows": 841}, "test rows"),
        ({"min_test_days": 15}, "test days"),
        ({"rules": {"floor": {"at_least": 0.95}}}, "floor roc_auc"),
        ({"rules": {"ceiling": {"at_most": 0.2}}}, "ceiling log_loss"),
        ({"rules": {"calibration": {"max_error": 0.001}}}, "calibration"),
    ],
)
def test_decide_on_a_first_model_refuses_by_each_rule(project: Project, settings: dict[str, Any], rule: str) -> None:
    verdict = gate(project, side(project), **settings)
    assert (verdict.verdict, failed(verdict)) == ("refuse", [rule])
    assert verdict.summary.endswith("needed: at " + verdict.reasons[0].split("needed: at ")[1] + " · 7 of 8 rules")


def test_decide_on_a_better_challenger_promotes(project: Project) -> None:
    verdict = gate(project, side(project, 2), side(project, 1, iterations=10))
    assert verdict.verdict == "promote", verdict
    assert verdict.reasons[0].startswith("better by 0.0")
    assert verdict.reasons[0].endswith("log loss over 14 days")


def test_decide_in_a_hard_month_lets_ceilings_give_way_to_the_champion_only(project: Project) -> None:
    """Both are over the ceiling: the better one may pass; the worse one, and a first model, may not."""
    better, worse = side(project, 2), side(project, 1, iterations=10)
    hard: dict[str, Any] = {"rules": {"ceiling": {"at_most": 0.2}}}
    verdict = gate(project, better, worse, **hard)
    assert verdict.verdict == "promote", verdict
    assert any("or the champion's on these rows" in rule.words for rule in verdict.rules)
    assert "ceiling log_loss" in failed(gate(project, worse, better, **hard))
    assert failed(gate(project, better, **hard)) == ["ceiling log_loss"]
    strict: dict[str, Any] = {"rules": {"ceiling": {"at_most": 0.2, "or_champion": False}}}
    assert failed(gate(project, better, worse, **strict)) == ["ceiling log_loss"]


@pytest.mark.parametrize("how", [{"iterations": 10}, {"label": upside_down}])
def test_decide_on_a_worse_challenger_refuses(project: Project, how: dict[str, Any]) -> None:
    verdict = gate(project, side(project, 2, **how), side(project, 1))
    assert verdict.verdict == "refuse"
    assert "better" in failed(verdict)
    assert any(reason.startswith("worse by ") for reason in verdict.reasons)


def test_decide_on_a_challenger_better_by_chance_refuses(project: Project) -> None:
    """The same champion and challenger: what 14 days prove, the margin may still ask more than."""
    challenger, champion = side(project, 2), side(project, 1, iterations=10)
    proven = gate(project, challenger, champion).rules[-1].measured
    assert isinstance(proven, float)
    assert gate(project, challenger, champion, rules={"better": {"margin": proven * 0.9}}).verdict == "promote"
    verdict = gate(project, challenger, champion, rules={"better": {"margin": proven * 1.1}})
    assert failed(verdict) == ["better"]
    assert verdict.reasons[0].startswith("not surely better than the champion: better by ")


def test_decide_on_equal_predictions_keeps_the_champion(project: Project) -> None:
    champion, challenger = side(project, 1), side(project, 2, sql=SQL + " -- in other words")
    assert champion.model.digest != challenger.model.digest
    verdict = gate(project, challenger, champion)
    assert failed(verdict) == ["better"]
    assert verdict.reasons == ["equal in log loss over 14 days"]


def test_decide_on_the_champion_itself_refuses(project: Project) -> None:
    verdict = gate(project, side(project, 2), side(project, 1))
    assert verdict.reasons[0] == "the champion itself"


@pytest.mark.parametrize("side_trained", ["champion", "challenger"])
def test_decide_leaves_out_test_rows_that_a_side_was_trained_on(project: Project, side_trained: str) -> None:
    late, early = side(project, 1, windows=(0, 40, 52)), side(project, 2)
    champion, challenger = (late, early) if side_trained == "champion" else (early, late)
    verdict = gate(project, challenger, champion, min_test_rows=100)
    assert verdict.comparison is not None
    assert (len(verdict.comparison.test), verdict.comparison.left_out) == (8 * 60, 6 * 60)
    assert verdict.comparison.test["time"].min() == pd.Timestamp("2013-02-22", tz="UTC")
    assert failed(gate(project, challenger, champion, min_test_rows=8 * 60 + 1))[0] == "test rows"


def test_decide_without_any_row_new_to_both_refuses(project: Project) -> None:
    verdict = gate(project, side(project, 2), side(project, 1, windows=(0, 40, 60)))
    assert verdict.summary == "REFUSE · no test row is new to both models (840 were trained on) · 3 of 4 rules"


def test_decide_leaves_out_test_rows_whose_keys_the_challenger_was_trained_on(project: Project) -> None:
    """Whatever its windows say."""
    test = pd.read_parquet(project.root / "data" / "prepare" / "test.parquet")
    verdict = gate(project, side(project), trained=[*test["key"][:100], "no test row"])
    assert verdict.comparison is not None
    assert (len(verdict.comparison.test), verdict.comparison.left_out, verdict.comparison.left_out_by_key) == (740,) + (
        100,
    ) * 2
    assert not verdict.comparison.test["key"].isin(test["key"][:100]).any()


def test_decide_leaves_out_test_rows_that_the_champion_knew_under_another_time(project: Project) -> None:
    champion = side(project, 1, iterations=10, sql=SQL.replace(" time,", " time - INTERVAL 2 DAY AS time,"))
    verdict = gate(project, side(project, 2), champion)
    assert verdict.comparison is not None
    assert (verdict.comparison.left_out, verdict.comparison.left_out_by_key) == (120, 120)
    assert verdict.comparison.test["time"].min() == pd.Timestamp("2013-02-18", tz="UTC")


def test_decide_while_the_registry_is_away_is_tried_again(project: Project) -> None:
    """And does not refuse a challenger for it."""

    def away() -> Model:
        raise TryAgain("The MLflow server does not answer.")

    with pytest.raises(TryAgain):
        gate(project, side(project, 2), Side(1, "other", away))


def test_decide_with_a_failed_rule_that_warns_promotes_with_a_warning(project: Project) -> None:
    warn = {"floor": {"at_least": 0.95, "severity": "warn"}}
    verdict = gate(project, side(project), rules=warn)
    assert verdict.summary == "PROMOTE · first model · 7 of 8 rules · 1 warning"
    assert (verdict.verdict, verdict.reasons, len(verdict.warnings)) == ("promote", ["first model"], 1)
    verdict = gate(project, side(project), rules={**warn, "ceiling": {"at_most": 0.2}})
    assert verdict.summary.startswith("REFUSE · log loss 0.")
    assert (len(verdict.reasons), len(verdict.warnings)) == (1, 1)


def test_decide_with_a_rule_on_a_column_that_is_no_feature_takes_it_from_the_sql(project: Project) -> None:
    sql = SQL.replace(" x, c", " x, c, CASE WHEN id % 2 = 0 THEN 'even' ELSE 'odd' END AS parity")
    rule = {"rule": "slices", "columns": ["parity"], "max_worse": 0.05, "min_rows": 100, "confidence": 0.975}
    path = project.root / "params.yaml"
    path.write_text(path.read_text() + f"    - {json.dumps(rule)}\n")
    verdict = gate(project, side(project, 2, sql=sql), side(project, 1, iterations=10))
    assert "none of 2 slices surely worse" in verdict.rules[-1].words
    path.write_text(path.read_text().replace("parity", "partiy"))
    with pytest.raises(ParamsError, match=r"`decide.rules.4` names `partiy`.*did you mean `parity`"):
        gate(project, side(project, 2, sql=sql), side(project, 1, iterations=10))


def test_decide_measures_latency_where_a_rule_asks(project: Project) -> None:
    path = project.root / "params.yaml"
    path.write_text(path.read_text() + "    - {rule: latency, max_seconds: 1.0e-9, severity: warn}\n")
    (found,) = [one for one in gate(project, side(project)).rules if one.rule == "latency"]
    assert isinstance(found.measured, float)
    assert 0 < found.measured < 5
    assert not found.passed


def test_decide_scores_the_champion_through_its_own_preparation(project: Project) -> None:
    champion = side(project, 1, sql=SQL.replace("y AS label, x,", "y AS label, 3 - x / 2 AS x,"))
    verdict = gate(project, side(project, 2), champion)
    assert verdict.comparison is not None
    test = verdict.comparison.test
    own = test.assign(x=3 - test["x"] / 2)
    np.testing.assert_array_equal(verdict.comparison.champion, champion.model.predict(own))
    loss = metrics.log_loss_rows(test["label"], champion.model.predict(test)).mean()
    assert loss > metrics.log_loss_rows(test["label"], verdict.comparison.champion).mean() + 0.1


@pytest.mark.parametrize(("share", "verdict"), [(1 / 14, "promote"), (1 / 15, "refuse")])
def test_decide_where_the_champion_lacks_rows_refuses_above_the_share(
    project: Project, share: float, verdict: str
) -> None:
    champion = side(project, 1, iterations=10, sql=SQL + " WHERE time < '2013-03-01T00:00:00Z'")
    found = gate(project, side(project, 2), champion, max_unmatched_share=share)
    assert found.verdict == verdict, found.reasons
    assert found.comparison is not None
    assert (len(found.comparison.test), found.comparison.unmatched) == (780, 60)


def test_decide_where_the_champion_has_no_row_refuses(project: Project) -> None:
    champion = side(project, 1, sql=SQL + " WHERE time < '2013-02-10T00:00:00Z'")
    verdict = gate(project, side(project, 2), champion)
    assert verdict.reasons == ["the champion's preparation has none of the 840 test rows"]


def test_decide_where_the_champion_cannot_be_prepared_refuses(project: Project) -> None:
    champion, challenger = side(project, 1), side(project, 2, iterations=10)
    tables = pd.read_parquet(project.tables / "events" / "all.parquet")
    tables.drop(columns="c").to_parquet(project.tables / "events" / "all.parquet")
    verdict = gate(project, challenger, champion)
    assert failed(verdict) == ["models score"]
    assert "lacks the declared columns c" in verdict.summary


def test_decide_on_a_challenger_that_gives_no_numbers_refuses(project: Project) -> None:
    from dataclasses import replace

    good = side(project)
    broken = replace(good.model, classify=lambda matrix: np.full(len(matrix), np.nan))
    verdict = gate(project, standing(broken))
    assert verdict.verdict == "refuse"
    assert "gives no probability for 840 of 840 rows" in verdict.summary


def test_decide_on_constant_predictions_refuses(project: Project) -> None:
    from dataclasses import replace

    constant = replace(side(project).model, classify=lambda matrix: np.full(len(matrix), 0.5))
    assert "floor roc_auc" in failed(gate(project, standing(constant)))


def test_decide_on_one_class_refuses_without_a_number(project: Project) -> None:
    path = project.root / "data" / "prepare" / "test.parquet"
    pd.read_parquet(path).assign(label=np.int8(1)).to_parquet(path)
    verdict = gate(project, side(project))
    auc = next(rule for rule in verdict.rules if rule.rule == "floor roc_auc")
    assert (auc.passed, auc.measured) == (False, None)


def test_decide_again_gives_the_same_verdict(project: Project) -> None:
    challenger, champion = side(project, 2), side(project, 1, iterations=10)
    assert gate(project, challenger, champion).rules == gate(project, challenger, champion).rules


def test_judge_while_promotion_is_frozen_says_so_beside_its_verdict(project: Project) -> None:
    freeze(State(), "peak season")
    project.train()
    project.register()
    result = project.decide()
    assert result["verdict"] == "promote"
    assert "PROMOTE · first model" in result["summary"]
    assert "· frozen: peak season (by " in result["summary"]
    assert "frozen" not in read(project.root / "data" / "decide" / "record.json")["summary"], "it is not why"


def test_judge_that_refuses_once_too_often_says_that_the_breaker_is_open(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    settings = project.root / "params.yaml"
    settings.write_text(settings.read_text().replace("refusals: 3", "refusals: 2").replace("0.69", "0.01"))
    project.train()
    project.register()
    assert "breaker" not in project.decide()["summary"]
    result = project.decide()
    assert result["verdict"] == "refuse"
    assert "· breaker OPEN: 2 retrainings in a row were refused (v1)." in result["summary"]
    assert "Automatic retraining pauses: breaker OPEN" in caplog.text
    assert registry.version(1).tags["ballast.breaker"].startswith("breaker OPEN: 2")
    assert tracking.run_data(registry.version(1).run_id).metrics["refusals_in_a_row"] == 2


def test_judge_ends_the_retraining_of_its_run_however_often_it_is_tried(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALLAST_DAG", "retrain_on_drift")
    monkeypatch.setenv("BALLAST_RUN", "x")
    state = State()
    state.begin_retraining("retrain_on_drift/x", date(2013, 3, 2), "drift", ["monitor/feb"])
    project.train()
    project.register()
    for _ in range(2):
        project.decide()
    assert [(one.run, one.outcome) for one in state.retrainings()] == [("retrain_on_drift/x", "promote")]
    assert [made.run for made in state.decisions()] == ["retrain_on_drift/x"] * 2


def test_judge_keeps_a_record_that_says_what_was_compared_with_what(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALLAST_TRIGGER", '{"kind": "alert", "reason": "the loss is high | low"}')
    lock = (
        "stages: {ingest: {outs: [{path: data/ingest/tables, md5: 5e.dir}, {path: data/ingest/result.json, md5: 1}]}}"
    )
    (project.root / "dvc.lock").write_text(lock)
    digest = project.train()
    project.register()
    result = project.decide()
    assert State().decisions()[-1].data == "5e.dir"
    out = project.root / "data" / "decide"
    facts = read(out / "record.json")
    assert result["record_sha256"] == hashlib.sha256((out / "record.json").read_bytes()).hexdigest()
    assert (facts["version"], facts["digest"], facts["as_of"]) == (1, digest, "2013-03-02")
    assert facts["champion"] == {"version": None, "digest": None, "ledger_head": GENESIS}
    assert (facts["test"]["rows"], facts["test"]["days"]) == (840, 14)
    assert (facts["test"]["start"][:10], facts["test"]["end"][:10]) == ("2013-02-16", "2013-03-01")
    assert (facts["trigger"]["kind"], facts["lock"]) == ("alert", registry.version(1).lock)
    assert facts["params"]["rules"][-1] == {**DEFAULT_BETTER, "margin": 0.0, "confidence": 0.975}
    assert facts["test"]["checked"] == {"challenger": "windows"}
    assert record.fetch(1, result["record_sha256"]) == facts
    assert registry.version(1).tags["ballast.verdict"] == "promote"
    assert registry.version(1).tags["ballast.warnings"] == "0"
    assert registry.version(1).tags["ballast.record"] == result["record_sha256"]
    kept = State().decision(result["record_sha256"])
    assert kept is not None
    assert (kept.version, kept.verdict, kept.summary) == (1, "promote", result["summary"])


def test_judge_against_a_champion_names_it_and_the_head_of_the_ledger(project: Project) -> None:
    first = project.train(iterations=10)
    project.register()
    made = project.decide()
    assert made["verdict"] == "promote", made
    promote(made["version"], made["record_sha256"], State())
    project.train()
    project.register()
    made = project.decide()
    facts = record.fetch(2, made["record_sha256"])
    assert facts["champion"] == {"version": 1, "digest": first, "ledger_head": State().head()}
    assert facts["metrics"]["champion"]["log_loss"] > facts["metrics"]["challenger"]["log_loss"]
    assert made["summary"].startswith("PROMOTE · better by ")


def test_judge_of_the_champion_itself_leaves_it_the_tags_of_its_promotion(project: Project) -> None:
    project.train()
    project.register()
    made = project.decide()
    promote(made["version"], made["record_sha256"], State())
    assert project.decide()["reasons"] == ["the champion itself"]
    tags = registry.version(1).tags
    assert (tags["ballast.verdict"], tags["ballast.record"]) == ("promote", made["record_sha256"])


def test_record_in_markdown_has_every_rule_in_its_table(project: Project) -> None:
    project.train(iterations=2)
    project.register()
    result = project.decide()
    text = (project.root / "data" / "decide" / "record.md").read_text()
    assert text.startswith("# REFUSE: late v1 does not take the place that no model had yet\n")
    table = [line for line in text.splitlines() if line.startswith("| ") and line.count(" | ") == 4]
    assert len(table) == 8
    assert sum("**blocked**" in line for line in table) == len(result["reasons"]) > 0


def test_record_text_with_a_bar_does_not_break_its_table() -> None:
    rule = {"rule": "a|b", "severity": "block", "measured": 1, "needed": None, "passed": True, "words": "c|d"}
    line = record._rules({"rules": [rule]}).splitlines()[-3]
    assert line == "| a\\|b | 1 | – | passed | c\\|d |"


def test_record_with_a_warning_shows_it_as_such(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project.root / "params.yaml"
    path.write_text(path.read_text().replace("at_least: 0.6", "at_least: 0.95, severity: warn"))
    alert = {"kind": "alert", "reason": "it fell", "alert": {"fingerprint": "f1"}, "by": None}
    monkeypatch.setenv("BALLAST_TRIGGER", json.dumps(alert))
    project.train()
    project.register()
    made = project.decide()
    assert (made["verdict"], len(made["warnings"])) == ("promote", 1)
    assert registry.version(1).tags["ballast.warnings"] == "1"
    text = (project.root / "data" / "decide" / "record.md").read_text()
    assert f"Warnings, which alone refuse nothing:\n\n- {made['warnings'][0]}\n" in text
    assert text.count("**warned**") == 1 and "**blocked**" not in text
    assert '- asked by: alert · it fell · alert {"fingerprint": "f1"}\n' in text


def test_record_schema_is_the_published_one(project: Project) -> None:
    from jsonschema import Draft202012Validator

    published = read(Path(__file__).parents[2] / "docs" / "decision-record.schema.json")
    assert published == record.Record.model_json_schema(), (
        "python -m pipelines.record > docs/decision-record.schema.json"
    )
    project.train(iterations=10)
    for _ in range(2):
        made = project.register() and project.decide()
        facts = read(project.root / "data" / "decide" / "record.json")
        Draft202012Validator(published).validate(facts)
        if made["verdict"] == "promote":
            promote(made["version"], made["record_sha256"], State())
    assert facts["verdict"] == "refuse"
    with pytest.raises(ValidationError, match="verdict"):
        record.keep(project.root / "data" / "decide", {**facts, "verdict": "perhaps"})


def test_record_of_the_first_form_is_still_read_and_promoted(project: Project) -> None:
    """What a Ballast before the policy wrote: no severity, no warnings, no keys."""
    version = project.bare_version("a")
    project.decided(version, "a")
    facts = read(project.root / "data" / "decide" / "record.json")
    del facts["warnings"], facts["rules"][0]["severity"]
    test = {
        "rows": 9,
        "days": 7,
        "start": "2013-02-16",
        "end": "2013-03-01",
        "left_out": 0,
        "unmatched": 0,
        "sha256": "ab",
    }
    facts |= {"schema": "ballast.decision/1", "test": test}
    write_json(project.root / "old.json", facts)
    digest = sha256(project.root / "old.json")
    (project.root / "old.json").rename(project.root / f"{digest}.json")
    registry.attach(version, project.root / f"{digest}.json", record.FOLDER)
    State().remember(Decision(digest, version, "promote", facts["summary"], "2013-03-02", facts["decided_at"]))
    found = record.fetch(version, digest)
    record.Record.model_validate(found)
    assert (found["rules"][0]["severity"], found["warnings"]) == ("block", [])
    assert found["test"]["checked"] == {"challenger": "windows"}
    assert "checked by windows for the challenger" in record.markdown(found)
    assert promote(version, digest, State())["moved"]


def test_rows_hash_follows_keys_labels_and_order() -> None:
    hashes = {
        record.rows_sha256(*rows)
        for rows in [(["a", "b"], [0, 1]), (["a", "b"], [1, 0]), (["b", "a"], [0, 1]), (["ab", ""], [0, 1])]
    }
    assert len(hashes) == 4
    assert record.rows_sha256(["a"], np.array([1], dtype="int8")) == record.rows_sha256(["a"], [1])


def test_fetch_of_a_changed_record_says_so(project: Project) -> None:
    version = project.bare_version("a")
    made = project.decided(version, "a", "refuse")
    stored = next((project.root / "var" / "mlflow" / "artifacts").rglob(f"{made}.json"))
    stored.write_text(stored.read_text().replace("refuse", "promote"))
    with pytest.raises(BallastError, match="was changed"):
        record.fetch(version, made)


def test_fetch_of_a_record_of_another_version_or_form_says_so(project: Project) -> None:
    first = project.bare_version("a")
    made = project.decided(first, "a")
    second = project.bare_version("b")
    with pytest.raises(BallastError, match="has no decision record"):
        record.fetch(second, made)
    registry.attach(second, project.root / "data" / "decide" / "record.json", "decisions")
    foreign = project.root / f"{made}.json"
    foreign.write_bytes((project.root / "data" / "decide" / "record.json").read_bytes())
    registry.attach(second, foreign, "decisions")
    with pytest.raises(BallastError, match="is of v1, not of v2"):
        record.fetch(second, made)
    other = json.dumps({"schema": "another/1"}).encode()
    digest = hashlib.sha256(other).hexdigest()
    (project.root / f"{digest}.json").write_bytes(other)
    registry.attach(second, project.root / f"{digest}.json", "decisions")
    with pytest.raises(BallastError, match=r"is no ballast.decision/2"):
        record.fetch(second, digest)
