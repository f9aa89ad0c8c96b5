"""A retraining from being asked for to its end, over a real state store: nothing is lost, nothing waits forever."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines import admit, retraining, settle
from pipelines.files import read_json
from pipelines.state import Decision, State, Word

AS_OF = date(2013, 8, 1)
PASSED = "a" * 64


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.setenv("BALLAST_STATE_URI", f"sqlite:///{tmp_path / 'state.db'}")
    monkeypatch.chdir(tmp_path)
    return State()


def within(monkeypatch: pytest.MonkeyPatch, run: str, kind: str = "drift", *asked_by: str) -> None:
    """Be a step of this run, which events of those who asked have started."""
    dag, _, run_id = run.partition("/")
    monkeypatch.setenv("BALLAST_DAG", dag)
    monkeypatch.setenv("BALLAST_RUN", run_id)
    events = [{"asked_by": asker, "as_of": "2013-08-01"} for asker in asked_by]
    monkeypatch.setenv("BALLAST_TRIGGER", json.dumps({"kind": kind, "events": events}))


def passed(state: State, at: datetime | None = None) -> None:
    decided_at = (at or datetime.now(UTC)).isoformat(timespec="milliseconds")
    state.remember(Decision(PASSED, 2, "promote", "PROMOTE", "2013-08-01", decided_at))


def test_retraining_asked_for_begun_and_ended_is_one(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    state.ask_retraining("monitor/july", AS_OF)
    assert [(one.run, one.began_at) for one in state.retrainings()] == [(None, None)]
    assert retraining.trained(state) == [], "it has not begun"
    within(monkeypatch, "retrain_on_drift/x", "drift", "monitor/july")
    for _ in range(2):  # admit was killed, and tried again
        retraining.begin(state, AS_OF)
    (begun,) = state.retrainings()
    assert (begun.run, begun.kind, begun.asked_by, begun.outcome) == (
        "retrain_on_drift/x",
        "drift",
        "monitor/july",
        None,
    )
    for _ in range(2):
        state.end_retraining("retrain_on_drift/x", "refuse")
    (ended,) = state.retrainings()
    assert (ended.outcome, ended.ended_at is not None, retraining.under_way(state)) == ("refuse", True, None)
    assert retraining.trained(state) == [AS_OF]


def test_retraining_of_several_askers_is_one_and_ends_as_one(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    state.ask_retraining("monitor/june", date(2013, 7, 1))
    state.ask_retraining("monitor/july", AS_OF)
    within(monkeypatch, "retrain_on_drift/x", "drift", "monitor/july", "monitor/june")
    retraining.begin(state, AS_OF)
    assert [one.as_of for one in state.retrainings()] == ["2013-08-01"]
    state.end_retraining("retrain_on_drift/x", "promote")
    assert (retraining.under_way(state), retraining.trained(state)) == (None, [AS_OF])


def test_retraining_nobody_asked_for_begins_one_of_its_own(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    state.ask_retraining("monitor/july", AS_OF)
    within(monkeypatch, "retrain_scheduled/y", "schedule")
    retraining.begin(state, date(2013, 5, 1))
    assert [(one.run, one.kind) for one in state.retrainings()] == [
        (None, "drift"),
        ("retrain_scheduled/y", "schedule"),
    ]


def test_retraining_asked_for_again_by_the_same_run_leaves_what_came_of_it(state: State) -> None:
    """A person clears the monitor's policy: its event starts a second run, which is a retraining of its own."""
    state.ask_retraining("monitor/july", AS_OF)
    state.begin_retraining("retrain_on_drift/x", AS_OF, "drift", ["monitor/july"])
    state.end_retraining("retrain_on_drift/x", "refuse")
    state.ask_retraining("monitor/july", AS_OF)
    state.begin_retraining("retrain_on_drift/z", AS_OF, "drift", ["monitor/july"])
    assert [(one.run, one.outcome) for one in state.retrainings()] == [
        ("retrain_on_drift/x", "refuse"),
        ("retrain_on_drift/z", None),
    ]


def test_under_way_leaves_out_what_this_run_itself_has_asked_for(state: State) -> None:
    state.ask_retraining("monitor/july", AS_OF)
    assert retraining.under_way(state) == state.retrainings()[0]
    assert retraining.under_way(state, apart_from="monitor/july") is None


@pytest.mark.parametrize("kind", ["schedule", "drift", "alert", "person"])
def test_admit_begins_a_retraining_of_every_kind(state: State, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    run_admit(monkeypatch, kind)
    (begun,) = state.retrainings()
    assert (begun.run, begun.kind, begun.as_of, begun.ended_at) == ("d/r", kind, "2013-08-01", None)


def test_admit_that_pauses_ends_it(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    state.remember(Decision("b" * 64, 2, "refuse", "", "2013-08-01", "2026-11-01", data="a"))
    assert run_admit(monkeypatch, "drift")["verdict"] == "pause"
    assert [one.outcome for one in state.retrainings()] == ["paused"]
    assert (retraining.under_way(state), retraining.trained(state)) == (None, [])


def run_admit(monkeypatch: pytest.MonkeyPatch, kind: str) -> Any:
    Path("params.yaml").write_text('as_of: "2013-08-01"\nbreaker: {refusals: 1}\n')
    Path("dvc.lock").write_text("stages: {ingest: {outs: [{path: data/ingest/tables, md5: a}]}}\n")
    within(monkeypatch, "d/r", kind)
    monkeypatch.setattr("sys.argv", ["admit"])
    admit.main()
    return read_json(Path("data/admit/result.json"))


# --- settle


def test_settle_goes_on_while_nothing_is_under_way(state: State) -> None:
    assert settle.settle(state) == {"verdict": "go", "summary": "no retraining is under way"}


def test_settle_waits_until_the_retraining_and_its_promotion_are_done(state: State) -> None:
    state.ask_retraining("monitor/july", AS_OF)
    assert settle.settle(state)["verdict"] == "wait"
    state.begin_retraining("retrain_on_drift/x", AS_OF, "drift", ["monitor/july"])
    assert "retrain_on_drift/x retrains as of 2013-08-01, since 20" in settle.settle(state)["summary"]
    passed(state)
    state.end_retraining("retrain_on_drift/x", "promote")
    waiting = settle.settle(state)
    assert waiting == {"verdict": "wait", "summary": "waits: v2 has passed the gate and is about to be promoted"}
    state.append("promote", 2, head=state.head(), reason="", actor="me", as_of=AS_OF, record_sha256=PASSED)
    assert settle.settle(state)["verdict"] == "go"


@pytest.mark.parametrize("how", ["refused", "frozen", "superseded", "long ago"])
def test_settle_does_not_wait_for_a_promotion_that_will_not_come(state: State, how: str) -> None:
    passed(state, datetime.now(UTC) - retraining.PROMOTES_WITHIN if how == "long ago" else None)
    if how == "refused":
        state.remember(Decision("c" * 64, 3, "refuse", "", "2013-08-01", datetime.now(UTC).isoformat()))
    if how == "frozen":
        state.note("freeze", lambda ledger: None, reason="no", actor="ana")
    if how == "superseded":
        state.append("rollback", 1, head=state.head(), reason="", actor="ana", as_of=AS_OF)
    assert settle.settle(state)["verdict"] == "go"


@pytest.mark.parametrize(
    ("said", "verdict"),
    [(["ask"], "go"), (["ask", "approve"], "wait"), (["ask", "reject"], "go"), (["ask", "supersede"], "go")],
)
def test_settle_waits_for_no_person_but_for_what_an_approval_leads_to(
    state: State, said: list[Word], verdict: str
) -> None:
    passed(state, datetime.now(UTC) - timedelta(days=1 if "approve" in said else 0))
    for kind in said:
        state.note(kind, lambda ledger: None, reason="", actor="ana", record_sha256=PASSED)
    assert settle.settle(state)["verdict"] == verdict


def test_settle_ends_what_never_began_or_never_ended_and_says_so_once(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.ask_retraining("monitor/july", AS_OF)
    state.begin_retraining("retrain_scheduled/y", date(2013, 5, 1), "schedule")
    monkeypatch.setattr(retraining, "BEGINS_WITHIN", timedelta(seconds=-1))
    assert settle.settle(state)["summary"].startswith("waits: retrain_scheduled/y")
    monkeypatch.setattr(retraining, "ENDS_WITHIN", timedelta(seconds=-1))
    said = settle.settle(state)
    assert said["verdict"] == "go"
    assert "monitor/july has asked for a retraining as of 2013-08-01" in said["summary"]
    assert "unpause retrain_on_drift" in said["summary"]
    assert "retrain_scheduled/y retrains as of 2013-05-01" in said["summary"]
    assert [one.outcome for one in state.retrainings()] == ["failed", "failed"]
    assert settle.settle(state)["summary"] == "no retraining is under way"


def test_retraining_that_counted_as_dead_and_comes_after_all_is_under_way_again(state: State) -> None:
    state.ask_retraining("monitor/july", AS_OF)
    state.end_retraining("monitor/july", "failed")
    state.begin_retraining("retrain_on_drift/x", AS_OF, "drift", ["monitor/july"])
    assert [(one.run, one.outcome) for one in state.retrainings()] == [("retrain_on_drift/x", None)]
    assert retraining.under_way(state) is not None


def test_settle_main_writes_its_result(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["settle"])
    settle.main()
    assert read_json(Path("data/settle/result.json"))["verdict"] == "go"
