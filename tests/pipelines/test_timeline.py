"""The timeline: what the pages are told of the gate and the ledger, in order, with links where they lead somewhere."""

from __future__ import annotations

import logging
from datetime import date
from pathlib import Path

import pytest

from pipelines import page, timeline
from pipelines.state import Decision, State


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """Two retrainings, one promoted on its record, the other refused; then a rollback on a person's word."""
    monkeypatch.setenv("BALLAST_VAR", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    state = State(f"sqlite:///{tmp_path / 'state.db'}")
    for version, verdict, day in ((4, "promote", "2013-05-01"), (5, "refuse", "2013-06-01")):
        state.remember(Decision(f"record {version}", version, verdict, f"said of v{version}", day, f"{day}T01:00:00"))
    about = {"actor": "me", "head": state.head()}
    state.append("promote", 4, reason="said of v4", as_of=date(2013, 5, 1), record_sha256="record 4", **about)
    state.append("rollback", 3, reason="it was wrong", as_of=date(2013, 7, 1), actor="me", head=state.head())
    return state


def test_events_tell_the_gate_and_the_ledger_in_order_and_nothing_twice(state):
    told = [tuple(event[key] for key in ("as_of", "kind", "version", "summary")) for event in timeline.events(state)]
    assert told == [
        ("2013-05-01", "passed", 4, "said of v4"),
        ("2013-05-01", "promote", 4, ""),
        ("2013-06-01", "refused", 5, "said of v5"),
        ("2013-07-01", "rollback", 3, "it was wrong"),
    ]


def test_events_have_a_link_only_where_mlflow_has_an_address(state, monkeypatch):
    assert {event["href"] for event in timeline.events(state)} == {None}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example/")
    assert timeline.events(state)[0]["href"] == "http://mlflow.example/#/models/flight_delays/versions/4"


def test_show_page_that_cannot_be_written_is_logged_and_fails_no_step(state, tmp_path, caplog):
    verdict = {"version": 3, "start": "2013-04-01", "end": "2013-05-01"}
    page.publish(tmp_path / "reports", verdict, {"verdict": "wait", "reasons": []}, tmp_path / "none.html")
    (tmp_path / "reports" / "index.html").unlink()
    (tmp_path / "reports" / "index.html" / "in the way").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        timeline.show(state)
    assert "are not up to date" in caplog.text


def test_show_window_whose_verdict_is_lost_leaves_the_others_their_pages(state, tmp_path, caplog):
    verdict = {"version": 3, "start": "2013-04-01", "end": "2013-05-01"}
    kept = page.publish(tmp_path / "reports", verdict, {"verdict": "wait", "reasons": []}, tmp_path / "none.html")
    lost = kept.parent / "2013-05-01..2013-06-01"
    lost.mkdir()
    (lost / "policy.json").write_text("{}")
    (kept / "index.html").unlink()
    with caplog.at_level(logging.WARNING):
        timeline.show(state)
    assert "The window 2013-05-01..2013-06-01 is left out" in caplog.text
    assert (kept / "index.html").exists()


def test_show_writes_what_has_happened_into_the_pages(state, tmp_path):
    verdict = {"version": 3, "start": "2013-04-01", "end": "2013-05-01"}
    decision = {"verdict": "retrain", "reasons": ["worse"]}
    folder = page.publish(tmp_path / "reports", verdict, decision, tmp_path / "none.html")
    assert "Nothing yet." in (folder / "index.html").read_text()
    timeline.show(state)
    assert "Passed the gate v4: said of v4" in (folder / "index.html").read_text()


def test_events_tell_a_retraining_from_the_asking_to_its_end(state, monkeypatch):
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "http://localhost:8080")
    state.ask_retraining("monitor/may", date(2013, 8, 1))
    told = [timeline.events(state)[-1]]
    state.begin_retraining("retrain_on_drift/r 1", date(2013, 8, 1), "drift", ["monitor/may"])
    told.append(timeline.events(state)[-1])
    state.end_retraining("retrain_on_drift/r 1", "refuse")
    told.append(timeline.events(state)[-1])
    assert [event["summary"] for event in told] == [
        "monitor/may has asked for it",
        "retrain_on_drift/r 1: under way",
        "retrain_on_drift/r 1: refuse",
    ]
    page = "http://localhost:8080/dags/retrain_on_drift/runs/r%201"
    assert [event["href"] for event in told] == [None, page, page]
