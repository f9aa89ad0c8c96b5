"""The alert bridge as a process: a storm of alerts, Airflow away, and SIGKILL wherever it hurts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.bridge import (
    BEARER,
    Bridge,
    FakeAirflow,
    Storm,
    airflow,
    bridge,
    delivery,
    firing,
    queued_seconds,
    unleash,
)

HASTY = "from datetime import timedelta as t; from pipelines import bridge as b; b.LEASE = t(seconds=1); b.main()"


@pytest.fixture
def fake() -> Iterator[FakeAirflow]:
    with airflow() as one:
        yield one


@pytest.fixture
def one(tmp_path: Path, fake: FakeAirflow) -> Iterator[Bridge]:
    with bridge(tmp_path, fake.url, program=HASTY) as one:
        yield one


def send(one: Bridge, *fingerprints: str) -> None:
    body = delivery(*map(firing, fingerprints))
    answer = httpx.post(f"{one.url}/alertmanager", json=body, headers=BEARER, trust_env=False)
    assert [told["outcome"] for told in answer.json()["alerts"]] == ["accepted"] * len(fingerprints)


def statuses(one: Bridge) -> set[str]:
    return {alert.status for alert in one.state.alerts()}


def test_storm_every_alert_is_answered_for_and_each_run_is_started_once(one: Bridge, fake: FakeAirflow) -> None:
    resident = []
    for number in range(2):
        storm, before = Storm(f"s{number}x", retrains=int(number == 0)), len(fake.runs)
        found = unleash(storm, one.url)
        one.settled()
        assert found.requests == storm.requests
        assert found.alerts == storm.alerts
        assert len(fake.runs) - before == storm.alerts["accepted"]
        assert storm.runs <= set(fake.runs) and set(fake.runs.values()) == {1}
        resident.append(one.resident_mib())
    assert resident[1] - resident[0] < 20
    assert sorted(queued_seconds(one.state, fake))[len(fake.runs) // 2] < 10  # benchmarks/bridge.py measures it


def test_storm_airflow_away_in_the_middle_loses_nothing_and_starts_nothing_twice(
    one: Bridge, fake: FakeAirflow
) -> None:
    storm = Storm("s", retrains=1)

    def weather() -> None:
        for mode in ("away", "up", "lost", "faulty"):
            time.sleep(0.2)
            fake.mode = mode  # type: ignore[assignment]
        fake.close()
        time.sleep(1)
        fake.mode = "up"
        fake.open(fake.port)

    changing = threading.Thread(target=weather)
    changing.start()
    found = unleash(storm, one.url)
    changing.join()
    one.settled()
    assert (found.requests, found.alerts) == (storm.requests, storm.alerts)
    assert len(fake.runs) == storm.alerts["accepted"] and storm.runs <= set(fake.runs)
    assert set(fake.runs.values()) == {1}


def test_bridge_killed_between_receipt_and_post_starts_each_run_once(one: Bridge, fake: FakeAirflow) -> None:
    fake.mode = "hangs"
    send(one, *(f"a{number}" for number in range(20)))
    while not fake.posts:  # one is claimed and on its way, the others are not
        time.sleep(0.01)
    one.kill()
    assert statuses(one) == {"waiting"} and not fake.runs
    fake.mode = "up"
    one.start()
    one.settled()
    assert len(fake.runs) == 20 and set(fake.runs.values()) == {1}
    assert statuses(one) == {"started"}


def test_bridge_killed_between_post_and_settling_starts_each_run_once(one: Bridge, fake: FakeAirflow) -> None:
    fake.made = lambda: one.kill() if len(fake.runs) == 7 else None
    send(one, *(f"a{number}" for number in range(20)))
    assert one.process
    one.process.wait(30)
    assert len(fake.runs) == 7
    assert [alert.status for alert in one.state.alerts()].count("started") == 6
    one.start()
    one.settled()
    assert len(fake.runs) == 20 and set(fake.runs.values()) == {1}
    assert fake.posts == 21  # the seventh is posted again, and known
    outcomes = [alert.outcome or "" for alert in one.state.alerts()]
    assert sum("was there already" in words for words in outcomes) == 1
