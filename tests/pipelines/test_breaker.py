"""The circuit breaker and the step that asks it, over a real state store."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines import admit
from pipelines.breaker import read, reset
from pipelines.errors import BallastError
from pipelines.files import read_json
from pipelines.state import Decision, State

LIMIT = 3


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.setenv("BALLAST_STATE_URI", f"sqlite:///{tmp_path / 'state.db'}")
    monkeypatch.chdir(tmp_path)
    return State()


def decided(state: State, *made: tuple[str, str | None], hours: int = 0) -> None:
    """Decisions by verdict and data, a second apart, the last one now (or so many hours from now)."""
    for number, (verdict, data) in enumerate(made):
        known = len(state.decisions())
        at = datetime.now(UTC) + timedelta(hours=hours, seconds=number - len(made))
        state.remember(Decision(f"{known:064}", known + 1, verdict, "", "2013-04-01", at.isoformat(), data))


def refused(*data: str | None) -> list[tuple[str, str | None]]:
    return [("refuse", one) for one in data]


def test_breaker_opens_at_its_limit_and_not_before(state: State) -> None:
    assert read(state, LIMIT).words == "breaker closed: 0 of 3 refusals in a row"
    decided(state, *refused("a", "b"))
    assert (read(state, LIMIT).is_open, read(state, LIMIT).stops("a")) == (False, False)
    decided(state, *refused("b"))
    breaker = read(state, LIMIT)
    assert breaker.is_open
    assert breaker.words.startswith("breaker OPEN: 3 retrainings in a row were refused (v1, v2, v3). Automatic")
    assert breaker.shown() == {"open": True, "refusals": 3, "limit": 3, "versions": [1, 2, 3]}


def test_breaker_open_stops_refused_and_unknown_data_and_lets_new_data_through(state: State) -> None:
    decided(state, *refused("a", "b", "b"))
    assert [read(state, LIMIT).stops(data) for data in ("a", "b", None, "c")] == [True, True, True, False]
    decided(state, *refused("c"))
    assert read(state, LIMIT).stops("c"), "it was new, and it was refused as well"


def test_breaker_closes_once_a_challenger_passes(state: State) -> None:
    decided(state, *refused("a", "a", "a"), ("promote", "a"))
    assert not read(state, LIMIT).is_open
    decided(state, *refused("a"))
    assert read(state, LIMIT).words == "breaker closed: 1 of 3 refusals in a row"


def test_breaker_counts_a_decide_that_was_killed_and_tried_again_once(state: State) -> None:
    for number, run in enumerate(["drift/a", "drift/b", "drift/b", None, None]):
        at = datetime.now(UTC) + timedelta(seconds=number)
        state.remember(Decision(f"{number:064}", 2, "refuse", "", "2013-04-01", at.isoformat(), "a", run))
    assert [made.run for made in read(state, LIMIT).refused] == ["drift/a", "drift/b", None, None]


def test_breaker_reset_by_a_person_counts_anew_and_stays_in_the_ledger(state: State) -> None:
    with pytest.raises(BallastError, match="not open"):
        reset(state, "why", LIMIT)
    decided(state, *refused("a", "a", "a"))
    with pytest.raises(BallastError, match="needs a reason"):
        reset(state, " ", LIMIT)
    assert reset(state, " the features are mended ", LIMIT)["breaker"]["refusals"] == 0
    (entry,) = state.ledger()
    assert (entry.kind, entry.reason, entry.to_version, state.verify()) == (
        "reset",
        "the features are mended",
        None,
        [],
    )
    decided(state, *refused("a"), hours=1)
    assert read(state, LIMIT).words == "breaker closed: 1 of 3 refusals in a row"


@pytest.mark.parametrize(
    ("kind", "data", "verdict", "said"),
    [
        ("schedule", "a", "pause", "PAUSED · the data was refused before · breaker OPEN"),
        ("drift", "a", "pause", "PAUSED"),
        ("alert", "a", "pause", "PAUSED"),
        ("person", "a", "go", "asked for by: person"),
        ("laptop", "a", "go", "asked for by: laptop"),
        ("drift", "new", "go", "the data is new"),
    ],
)
def test_admit_while_open_pauses_what_a_machine_began_on_refused_data(
    state: State,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    data: str,
    verdict: str,
    said: str,
) -> None:
    decided(state, *refused("a", "a", "a"))
    result = step(monkeypatch, kind, data)
    assert (result["verdict"], result["breaker"]["open"]) == (verdict, True)
    assert said in result["summary"]
    assert ("Automatic retraining is paused" in caplog.text) == (verdict == "pause")


def test_admit_while_closed_lets_all_go_on(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    decided(state, *refused("a", "a"))
    result = step(monkeypatch, "drift", "a")
    assert (result["verdict"], result["summary"]) == ("go", "breaker closed: 2 of 3 refusals in a row")


def step(monkeypatch: pytest.MonkeyPatch, kind: str, data: str) -> dict[str, Any]:
    """Run the step in a workspace whose dvc.lock has this hash of the data."""
    Path("params.yaml").write_text(f"as_of: '2013-04-01'\nbreaker: {{refusals: {LIMIT}}}\n")
    Path("dvc.lock").write_text(f"stages: {{ingest: {{outs: [{{path: data/ingest/tables, md5: {data}}}]}}}}\n")
    monkeypatch.setenv("BALLAST_TRIGGER", json.dumps({"kind": kind}))
    monkeypatch.setattr("sys.argv", ["admit"])
    admit.main()
    result: dict[str, Any] = read_json(Path("data/admit/result.json"))
    return result
