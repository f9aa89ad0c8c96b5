"""A person's word between the gate and promotion: asked, given, refused, overtaken, and never got round."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import Project
from typer.testing import CliRunner

from pipelines import approval, registry
from pipelines.answer import answer
from pipelines.cli import app
from pipelines.errors import BallastError, Conflict
from pipelines.explain import explain
from pipelines.promote import force, promote
from pipelines.review import close, review
from pipelines.state import State


@pytest.fixture
def asked(project: Project, monkeypatch: pytest.MonkeyPatch) -> tuple[Project, int, str]:
    """v1, whose decision waits for a person in the run promote/one."""
    monkeypatch.setenv("BALLAST_DAG", "promote")
    monkeypatch.setenv("BALLAST_RUN", "one")
    version = project.bare_version("a")
    made = project.decided(version, "a", approval="always")
    assert review(version, made, State())["verdict"] == "ask"
    return project, version, made


def kinds() -> list[str]:
    return [entry.kind for entry in State().ledger()]


@pytest.mark.parametrize(
    ("setting", "warnings", "why"),
    [
        ("never", ("slow",), None),
        ("on_warning", (), None),
        ("on_warning", ("slow",), "1 warning of the gate"),
        ("on_warning", ("slow", "odd"), "2 warnings of the gate"),
        ("always", (), "decide.approval is always"),
    ],
)
def test_approval_is_needed_by_the_setting_and_the_warnings(
    setting: str, warnings: tuple[str, ...], why: str | None
) -> None:
    assert approval.needed({"params": {"approval": setting}, "warnings": warnings}) == why


def test_approval_of_a_record_from_before_there_was_any_is_not_needed() -> None:
    assert approval.needed({"params": {}, "warnings": ["slow"]}) is None


def test_review_of_a_decision_that_needs_nobody_lets_it_through(project: Project) -> None:
    version = project.bare_version("a")
    result = review(version, project.decided(version, "a", approval="on_warning"), State())
    assert (result["verdict"], result["summary"]) == ("promote", "v1 needs no approval")
    assert kinds() == []


def test_review_asks_with_the_record_in_its_form(asked: tuple[Project, int, str]) -> None:
    _, version, made = asked
    again = review(version, made, State())
    assert again["verdict"] == "ask"
    assert again["subject"].startswith("Promote late v1 as the first champion?")
    assert "# PROMOTE: late v1 may take" in again["body"]
    assert again["hours"] == 72
    assert kinds() == ["ask"], "asked once, however often the step is run"
    assert (
        registry.version(version).tags["ballast.approval"].startswith("waits for approval: decide.approval is always")
    )


def test_promote_while_a_person_is_asked_is_held(asked: tuple[Project, int, str]) -> None:
    _, version, made = asked
    result = promote(version, made, State())
    assert (result["verdict"], result["moved"]) == ("held", False)
    assert result["summary"].startswith("waits for approval: decide.approval is always (by promote/one, since")
    assert State().champion() is None


def test_promote_that_nobody_was_asked_about_is_held(project: Project) -> None:
    version = project.bare_version("a")
    result = promote(version, project.decided(version, "a", approval="always"), State())
    assert result["summary"].startswith("needs a person's approval (decide.approval is always), and nobody was asked")
    assert State().champion() is None


def test_answer_approved_is_promoted_and_the_ledger_says_by_whom(asked: tuple[Project, int, str]) -> None:
    _, version, made = asked
    assert answer(version, made, True, "ada", "looks right", State())["verdict"] == "promote"
    assert promote(version, made, State())["verdict"] == "promoted"
    entry = State().ledger()[-1]
    assert entry.reason == "PROMOTE · for the test · approved by ada in promote/one: looks right"
    assert kinds() == ["ask", "approve", "promote"]
    assert State().verify() == []
    assert registry.version(version).tags["ballast.approval"] == "approved by ada in promote/one: looks right"
    (decision,) = explain(version, State())["decisions"]
    assert [words.partition(" ")[0] for words in decision["approval"]] == ["waits", "approved"]
    assert review(version, made, State())["verdict"] == "promote", "a retry after a kill goes on"


def test_answer_refused_keeps_the_version_out_for_good(asked: tuple[Project, int, str]) -> None:
    _, version, made = asked
    assert answer(version, made, False, "ada", "not before Monday", State())["verdict"] == "refuse"
    late = answer(version, made, True, "bob", "", State())
    assert (late["verdict"], late["summary"]) == (
        "refuse",
        "v1 approval refused by ada in promote/one: not before Monday",
    )
    assert promote(version, made, State())["verdict"] == "held"
    assert review(version, made, State())["verdict"] == "refuse"
    assert kinds() == ["ask", "reject"]


def test_answer_of_nobody_in_time_is_a_refusal_whatever_the_form_had_chosen(asked: tuple[Project, int, str]) -> None:
    _, version, made = asked
    result = answer(version, made, True, "", "", State())
    assert result["summary"] == "v1 approval refused by promote/one: nobody answered within 72 h"
    assert promote(version, made, State())["verdict"] == "held"


def test_answer_that_nobody_asked_for_is_an_error(project: Project) -> None:
    version = project.bare_version("a")
    with pytest.raises(BallastError, match="Nobody was asked to approve v1"):
        answer(version, project.decided(version, "a"), True, "ada", "", State())


@pytest.mark.parametrize("setting", ["always", "never"])
def test_review_of_a_newer_challenger_supersedes_the_one_that_waits(
    asked: tuple[Project, int, str], monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    project, older, made = asked
    monkeypatch.setenv("BALLAST_RUN", "two")
    newer = project.bare_version("b")
    result = review(newer, project.decided(newer, "b", approval=setting), State())
    assert result["overtaken"] == ["promote/one"]
    assert result["verdict"] == ("ask" if setting == "always" else "promote")
    late = answer(older, made, True, "ada", "", State())
    assert late["verdict"] == "refuse"
    assert late["summary"] == "v1 superseded by promote/two: v2 passed the gate after it"
    assert registry.version(older).tags["ballast.approval"] == "superseded by promote/two: v2 passed the gate after it"
    assert promote(older, made, State())["verdict"] == "held"


def test_review_of_an_older_challenger_gives_way_though_it_comes_late(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALLAST_DAG", "promote")
    monkeypatch.setenv("BALLAST_RUN", "late")
    older, newer = project.bare_version("a"), project.bare_version("b")
    records = [project.decided(older, "a", approval="always"), project.decided(newer, "b", approval="always")]
    assert review(newer, records[1], State())["verdict"] == "ask"
    assert review(older, records[0], State())["verdict"] == "refuse"
    assert [entry.record_sha256 for entry in approval.waiting(State().ledger())] == [records[1]]


def test_review_after_the_champion_moved_asks_nobody(asked: tuple[Project, int, str]) -> None:
    """What waits is about the champion of its day; once another serves, no answer can promote it."""
    project, version, made = asked
    other = project.bare_version("b")
    force(other, "an emergency", State())
    assert approval.waiting(State().ledger()) == []
    with pytest.raises(Conflict, match="v1 was compared with no champion"):
        review(version, made, State())
    answer(version, made, True, "ada", "", State())
    with pytest.raises(Conflict, match="Run decide again"):
        promote(version, made, State())


def test_force_round_a_missing_approval_says_so_in_the_ledger(asked: tuple[Project, int, str]) -> None:
    _, version, _ = asked
    force(version, "the house is on fire", State())
    assert "went round: waits for approval: decide.approval is always" in State().ledger()[-1].reason


def test_status_shows_what_waits_and_where_it_is_answered(asked: tuple[Project, int, str]) -> None:
    shown = CliRunner().invoke(app, ["status"]).output
    assert "APPROVAL   v1 waits since" in shown
    assert "/dags/promote/runs/one/tasks/approve/required_actions" in shown
    (waits,) = json.loads(CliRunner().invoke(app, ["status", "--json"]).output)["waiting"]
    assert (waits["version"], waits["reason"]) == (1, "decide.approval is always")


def test_close_of_a_form_with_airflow_away_only_warns(project: Project, caplog: Any) -> None:
    close("promote/one")
    assert "The form of promote/one stays open" in caplog.text
