from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest
from conftest import Project

from pipelines import champion, registry
from pipelines.errors import BallastError, Conflict
from pipelines.freeze import freeze, unfreeze
from pipelines.promote import force, promote
from pipelines.rollback import rollback
from pipelines.state import Decision, State, quarantined


@pytest.fixture
def served(project: Project) -> Project:
    """v1, then v2, then v3 became champion."""
    for digest in ("a", "b", "c"):
        version = project.bare_version(digest)
        promote(version, project.decided(version, digest), State())
    return project


def test_promote_on_a_passing_record_moves_ledger_and_aliases(project: Project) -> None:
    version = project.bare_version("a")
    made = project.decided(version, "a")
    result = promote(version, made, State())
    assert result["summary"] == "champion: none → v1"
    assert (result["from"], result["to"], result["moved"]) == (None, 1, True)
    entry = State().ledger()[-1]
    assert (entry.kind, entry.to_version, entry.record_sha256, entry.as_of) == ("promote", 1, made, "2013-03-02")
    assert entry.reason == "PROMOTE · for the test"
    assert registry.aliases() == {"champion": 1}
    version = project.bare_version("b")
    assert promote(version, project.decided(version, "b"), State())["summary"] == "champion: v1 → v2"
    assert registry.aliases() == {"champion": 2, "previous": 1}


def test_promote_done_again_changes_nothing(project: Project) -> None:
    version = project.bare_version("a")
    made = project.decided(version, "a")
    promote(version, made, State())
    before = State().ledger()
    result = promote(version, made, State())
    assert (result["moved"], result["summary"]) == (False, "champion: none → v1 · already so")
    assert State().ledger() == before


def test_promote_on_a_refusing_record_is_refused(project: Project) -> None:
    version = project.bare_version("a")
    with pytest.raises(BallastError, match="The gate refused v1: for the test"):
        promote(version, project.decided(version, "a", "refuse"), State())
    assert (State().ledger(), registry.aliases()) == ([], {})


def test_promote_on_a_forged_record_is_refused(project: Project) -> None:
    """Whoever can write to MLflow can put a record there; the gate does not know it."""
    version = project.bare_version("a")
    refused = project.decided(version, "a", "refuse")
    forged = (project.root / "data" / "decide" / "record.json").read_bytes().replace(b"refuse", b"promote")
    digest = hashlib.sha256(forged).hexdigest()
    (project.root / f"{digest}.json").write_bytes(forged)
    registry.attach(version, project.root / f"{digest}.json", "decisions")
    registry.set_tags(version, {"ballast.verdict": "promote", "ballast.record": digest})
    with pytest.raises(BallastError, match=r"no decision .* the record is forged"):
        promote(version, digest, State())
    with pytest.raises(BallastError, match="The gate refused v1"):
        promote(version, refused, State())


def test_promote_on_a_record_that_was_changed_is_refused(project: Project) -> None:
    version = project.bare_version("a")
    made = project.decided(version, "a")
    stored = next((project.root / "var" / "mlflow" / "artifacts").rglob(f"{made}.json"))
    stored.write_text(stored.read_text().replace("for the test", "for money"))
    with pytest.raises(BallastError, match="was changed"):
        promote(version, made, State())


def test_promote_of_another_version_than_the_records_is_refused(project: Project) -> None:
    made = project.decided(project.bare_version("a"), "a")
    other = project.bare_version("b")
    with pytest.raises(BallastError, match="v2 has no decision record"):
        promote(other, made, State())


def test_promote_of_a_version_whose_model_changed_is_refused(project: Project) -> None:
    version = project.bare_version("a")
    made = project.decided(version, "a")
    registry.set_tags(version, {registry.DIGEST: "other"})
    with pytest.raises(BallastError, match="The record is of model a, and v1 is other now"):
        promote(version, made, State())


def test_promote_after_the_champion_moved_raises_conflict(project: Project) -> None:
    first, second = project.bare_version("a"), project.bare_version("b")
    records = [project.decided(first, "a"), project.decided(second, "b")]
    promote(first, records[0], State())
    with pytest.raises(Conflict, match=r"v2 was compared with no champion.*it is v1.*Run decide again"):
        promote(second, records[1], State())
    assert (State().champion(), registry.aliases()) == (1, {"champion": 1})


def test_promote_on_a_record_used_before_raises_conflict(project: Project) -> None:
    first, second = project.bare_version("a"), project.bare_version("b")
    made = project.decided(first, "a")
    promote(first, made, State())
    promote(second, project.decided(second, "b"), State())
    with pytest.raises(Conflict, match="was promoted by this record, and has been replaced since"):
        promote(first, made, State())


def test_promote_after_a_rollback_to_the_same_champion_asks_for_a_new_decision(served: Project) -> None:
    """The champion is the one of the decision, but it has been away: somebody knows more."""
    rollback(State(), "to v2")
    version = served.bare_version("d")
    made = served.decided(version, "d")
    other = served.bare_version("e")
    promote(other, served.decided(other, "e"), State())
    rollback(State(), "to v2 again")
    with pytest.raises(Conflict, match="Run decide again"):
        promote(version, made, State())


def test_promote_killed_before_the_aliases_is_completed_by_the_next_call(project: Project) -> None:
    version = project.bare_version("a")
    made, state = project.decided(version, "a"), State()
    state.append("promote", 1, head=state.head(), reason="", actor="", as_of=date(2013, 3, 2), record_sha256=made)
    assert champion.behind(state)
    assert champion.moved_by_hand(state) is None
    assert promote(version, made, state)["moved"] is False
    assert registry.aliases() == {"champion": 1}
    assert not champion.behind(state)


def test_promote_by_many_at_once_lets_one_win_and_tells_the_others(project: Project) -> None:
    versions = {project.bare_version(digest): digest for digest in "abcdef"}
    records = {version: project.decided(version, digest) for version, digest in versions.items()}

    def attempt(version: int) -> str:
        try:
            return str(promote(version, records[version], State())["moved"])
        except Conflict as conflict:
            return str(conflict)

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(attempt, records))
    assert said.count("True") == 1
    assert sum("Run decide again" in one for one in said) == 5
    assert (len(State().ledger()), State().verify()) == (1, [])
    assert registry.aliases() == {"champion": State().champion()}


def test_promote_while_frozen_is_held_and_goes_through_once_thawed(served: Project) -> None:
    version = served.bare_version("d")
    made = served.decided(version, "d")
    freeze(State(), "peak season")
    result = promote(version, made, State())
    assert (result["verdict"], result["moved"], result["from"], result["to"]) == ("held", False, 3, 3)
    assert re.fullmatch(
        r"frozen: peak season \(by \w+, since .* UTC\)\. v4 waits for `ballast unfreeze --reason TEXT`",
        result["summary"],
    )
    assert (State().champion(), registry.aliases()["champion"]) == (3, 3)
    assert unfreeze(State(), "over")["passed_meanwhile"] is None, "its decision was made before"
    assert promote(version, made, State())["verdict"] == "promoted"
    assert State().verify() == []


def test_promote_while_frozen_of_a_forged_record_is_no_result(served: Project) -> None:
    freeze(State(), "peak season")
    with pytest.raises(BallastError, match="forged"):
        promote(3, "f" * 64, State())


def test_promote_done_before_the_freeze_is_still_done(served: Project) -> None:
    freeze(State(), "peak season")
    last = next(entry for entry in reversed(State().ledger()) if entry.kind == "promote")
    assert promote(3, last.record_sha256 or "", State())["summary"] == "champion: v2 → v3 · already so"


def test_rollback_while_frozen_goes_back(served: Project) -> None:
    seen = State().head()
    freeze(State(), "peak season")
    assert rollback(State(), "worse", head=seen)["to"] == 2
    assert not champion.behind(State())


def test_promote_of_what_was_rolled_back_is_held_until_a_person_brings_it_back(served: Project) -> None:
    rollback(State(), "complaints")
    made = served.decided(3, "c")
    result = promote(3, made, State())
    assert (result["verdict"], result["from"], result["to"]) == ("held", 2, 2)
    assert result["summary"].startswith("in quarantine: v3 was rolled back: complaints (by ")
    assert result["summary"].endswith("v3 is not promoted; a person may: `ballast promote 3 --force --reason TEXT`")
    assert (State().champion(), len(State().ledger())) == (2, 4)
    rollback(State(), "it was right after all", to=3)
    assert list(quarantined(State().ledger())) == [2]


def test_promote_of_a_model_that_was_rolled_back_under_another_number_is_held(served: Project) -> None:
    rollback(State(), "complaints")
    again = served.bare_version("c")
    result = promote(again, served.decided(again, "c"), State())
    assert (result["verdict"], State().champion()) == ("held", 2)
    assert "v3 was rolled back" in result["summary"]
    assert "(v4 is the same model)" in result["summary"]


def test_promote_of_another_model_after_a_rollback_goes_through(served: Project) -> None:
    rollback(State(), "complaints")
    version = served.bare_version("d")
    assert promote(version, served.decided(version, "d"), State())["verdict"] == "promoted"
    assert list(quarantined(State().ledger())) == [3], "who was rolled back stays so"


def test_force_goes_round_all_that_stands_against_a_version_and_says_so(served: Project) -> None:
    rollback(State(), "complaints")
    served.decided(3, "c", "refuse")
    freeze(State(), "peak season")
    result = force(3, " v2 predicts NaN ", State())
    entry = State().ledger()[-1]
    assert (entry.kind, entry.from_version, entry.to_version, entry.record_sha256) == ("force", 2, 3, None)
    said = [
        r"v2 predicts NaN · went round: frozen: peak season \(by .*\)",
        r"in quarantine: v3 was rolled back: complaints \(by .*\)",
        r"The gate refused v3: for the test\. A refused version stays out",
    ]
    assert re.fullmatch("; ".join(said), entry.reason)
    assert result["summary"] == f"FORCED · champion: v2 → v3 · {entry.reason}"
    assert entry.reason in registry.version(3).tags["ballast.forced"]
    assert (State().champion(), registry.aliases()["champion"], quarantined(State().ledger())) == (3, 3, {})
    assert (State().verify(), rollback(State(), "no")["to"]) == ([], 2)


def test_force_of_a_version_that_the_gate_never_saw_says_so(project: Project) -> None:
    version = project.bare_version("a")
    force(version, "why not", State())
    assert State().ledger()[-1].reason == "why not · went round: the gate has made no decision on it"
    assert registry.aliases() == {"champion": 1}


def test_force_on_a_record_made_for_another_champion_says_so(project: Project) -> None:
    first, second = project.bare_version("a"), project.bare_version("b")
    records = [project.decided(first, "a"), project.decided(second, "b")]
    promote(first, records[0], State())
    force(second, "why not", State())
    said = "why not · went round: v2 was compared with no champion, and since then the champion has moved (it is v1)"
    assert State().ledger()[-1].reason == said
    third = project.bare_version("c")
    project.decided(third, "c")
    force(third, "in a hurry", State())
    assert State().ledger()[-1].reason == "in a hurry · went round: nothing: its record holds"


def test_force_without_a_reason_or_of_the_champion_or_late_changes_nothing(served: Project) -> None:
    served.bare_version("d")
    with pytest.raises(BallastError, match="A promotion by force needs a reason"):
        force(4, " ", State())
    with pytest.raises(BallastError, match="v3 is the champion already"):
        force(3, "why", State())
    with pytest.raises(BallastError, match="no late v9"):
        force(9, "why", State())
    seen = State().head()
    rollback(State(), "someone was faster")
    with pytest.raises(Conflict, match="moved meanwhile"):
        force(4, "late", State(), head=seen)
    assert State().champion() == 2


ATTEMPTS = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pipelines import registry
from pipelines.errors import Conflict
from pipelines.promote import promote
from pipelines.state import State

def attempt(one):
    try:
        return [one[0], promote(*one, State())["verdict"]]
    except Conflict as conflict:
        return [one[0], str(conflict)]

tasks = json.loads(sys.argv[1])
registry.versions()
Path(f"ready-{sys.argv[2]}").touch()
while not Path("go").exists():
    time.sleep(0.01)
with ThreadPoolExecutor(len(tasks)) as pool:
    print(json.dumps(list(pool.map(attempt, tasks))))
"""


@pytest.mark.parametrize(("processes", "each"), [(3, 8), pytest.param(8, 25, marks=pytest.mark.e2e)], ids=["24", "200"])
def test_promote_by_many_processes_at_once_keeps_one_champion_and_tells_the_others(
    project: Project, processes: int, each: int
) -> None:
    first = project.bare_version("first")
    promote(first, project.decided(first, "first"), State())
    versions = {project.bare_version(f"{number}"): f"{number}" for number in range(processes * each)}
    tasks = [(version, project.decided(version, digest)) for version, digest in versions.items()]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ATTEMPTS, json.dumps(tasks[number::processes]), str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    while len(list(project.root.glob("ready-*"))) < processes and all(one.poll() is None for one in running):
        time.sleep(0.05)
    (project.root / "go").touch()
    said = [pair for one in running for pair in json.loads(one.communicate(timeout=300)[0])]
    assert [one.returncode for one in running] == [0] * processes
    (winner,) = [version for version, words in said if words == "promoted"]
    told = [words for version, words in said if version != winner]
    assert len(told) == processes * each - 1
    assert all(f"the champion has moved (it is v{winner}). Run decide again" in words for words in told)
    assert ([entry.to_version for entry in State().ledger()], State().verify()) == ([first, winner], [])
    assert registry.aliases() == {"champion": winner, "previous": first}
    assert not champion.behind(State())


def test_rollback_goes_back_by_champions_each_time_further(served: Project) -> None:
    said = "champion: v3 → v2 · rolled back: bad weather · v3 is in quarantine"
    assert rollback(State(), " bad weather ")["summary"] == said
    assert registry.aliases() == {"champion": 2, "previous": 1}
    rollback(State(), "worse")
    assert registry.aliases() == {"champion": 1}
    with pytest.raises(BallastError, match="no champion before v1"):
        rollback(State(), "still")
    assert [entry.kind for entry in State().ledger()] == ["promote"] * 3 + ["rollback"] * 2


def test_rollback_to_a_version_takes_one_that_served(served: Project) -> None:
    assert rollback(State(), "far back", to=1)["to"] == 1
    assert rollback(State(), "it was right after all", to=3)["to"] == 3
    never = served.bare_version("d")
    with pytest.raises(BallastError, match=r"v4 was never champion .these were: v1, v2, v3."):
        rollback(State(), "why not", to=never)
    with pytest.raises(BallastError, match="v3 is the champion already"):
        rollback(State(), "again", to=3)


def test_rollback_without_a_champion_or_a_reason_says_so(project: Project) -> None:
    with pytest.raises(BallastError, match="no version was ever promoted"):
        rollback(State(), "why")
    with pytest.raises(BallastError, match="needs a reason"):
        rollback(State(), "  ")


def test_rollback_retried_by_its_dag_run_goes_back_once(served: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLAST_DAG", "rollback")
    monkeypatch.setenv("BALLAST_RUN", "manual__1")
    assert rollback(State(), "first")["moved"] is True
    assert rollback(State(), "first")["moved"] is False
    assert (State().champion(), len(State().ledger())) == (2, 4)
    monkeypatch.setenv("BALLAST_RUN", "manual__2")
    assert rollback(State(), "second")["to"] == 1


def test_rollback_decided_on_an_older_ledger_raises_conflict(served: Project) -> None:
    seen = State().head()
    rollback(State(), "someone was faster")
    with pytest.raises(Conflict, match="moved meanwhile"):
        rollback(State(), "late", to=1, head=seen)


def test_rollback_to_a_version_that_the_registry_lost_changes_nothing(served: Project) -> None:
    registry.client().delete_model_version("late", "2")
    with pytest.raises(BallastError, match="no late v2"):
        rollback(State(), "back")
    assert State().champion() == 3


def test_alias_moved_by_hand_is_told_apart_from_a_promotion_cut_off(served: Project) -> None:
    assert champion.moved_by_hand(State()) is None
    registry.client().set_registered_model_alias("late", "champion", "1")
    said = champion.moved_by_hand(State())
    assert said == "the registry says champion v1, previous v2, and the ledger champion v3, previous v2"
    champion.project(State())
    assert champion.moved_by_hand(State()) is None


def test_decision_of_another_state_store_is_not_promoted(project: Project) -> None:
    version = project.bare_version("a")
    made = project.decided(version, "a")
    other = State(f"sqlite:///{project.root / 'other.db'}")
    with pytest.raises(BallastError, match="of another state store"):
        promote(version, made, other)
    other.remember(Decision(made, version, "promote", "", "2013-03-02", ""))
    assert promote(version, made, other)["moved"] is True


def test_ledger_or_registry_that_is_not_the_others_is_refused(
    served: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    champion.refuse_strangers(State())
    with pytest.raises(BallastError, match="says that late v3 is the champion, and the ledger knows of none"):
        champion.refuse_strangers(State(f"sqlite:///{tmp_path}/emptied.db"))
    registry_of_ours = registry.versions()
    monkeypatch.setattr(registry, "versions", lambda: registry_of_ours[:2])
    with pytest.raises(BallastError, match="says that late v3 is the champion, and the registry has no such version"):
        champion.refuse_strangers(State())


def test_ledger_that_moves_while_it_is_looked_at_is_no_stranger(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first champion of all comes between two looks."""
    version, whole = project.bare_version("a"), registry.aliases
    record = project.decided(version, "a")

    def aliases() -> dict[str, int]:
        before = whole()
        monkeypatch.setattr(registry, "aliases", whole)
        promote(version, record, State())
        return before

    monkeypatch.setattr(registry, "aliases", aliases)
    champion.refuse_strangers(State())
    assert State().champion() == version
