"""What the alert bridge makes of requests that fit its schema, nearly fit it, or do not; and which ids it gives out."""

from __future__ import annotations

import re
import string
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from benchmarks.bridge import BEARER, TOKEN, FakeAirflow, airflow
from pipelines.alerts import alert_id, trigger_id
from pipelines.bridge import make_app
from pipelines.dagruns import Airflow
from pipelines.state import State

DOCUMENTED = {202, 400, 401, 413, 415, 422, 503}
AIRFLOWS_RUN_ID = r"^[A-Za-z0-9_.~:+-]+$"  # [scheduler] allowed_run_id_pattern


class Running:
    """A bridge that listens, its description, its inbox and its Airflow."""

    def __init__(self, root: Path, fake: FakeAirflow) -> None:
        self.fake, self.state = fake, State(f"sqlite:///{root / 'state.db'}", pooled=True)
        app = make_app(TOKEN, frozenset({"monitor"}), lambda: Airflow(fake.url, "u", "p"), self.state)
        self.schema = schemathesis.openapi.from_dict(app.openapi())
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.state._engine.dispose()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with airflow() as fake:
        one = Running(tmp_path, fake)
        yield one
        one.close()


def fuzz(running: Running, path: str, mode: GenerationMode, headers: dict[str, str], cases: int) -> set[int]:
    """The statuses that so many cases were answered with."""
    found: set[int] = set()

    @given(case=running.schema[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def send(case: Any) -> None:
        case.headers = {name: text for name, text in (case.headers or {}).items() if name.lower() != "authorization"}
        answer = case.call(base_url=running.url, headers=headers)
        assert answer.status_code in DOCUMENTED, (answer.status_code, answer.text)
        found.add(answer.status_code)

    send()
    return found


def fuzz_all(running: Running, cases: int) -> None:
    for path in ("/alertmanager", "/trigger"):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            for headers in ({}, {"Authorization": f"Bearer {TOKEN[:-1]}"}, {"Authorization": "Basic " + "QQ=="}):
                assert fuzz(running, path, mode, headers, cases // 4) == {401}
    assert running.state.alerts() == [] and not running.fake.runs
    for path in ("/alertmanager", "/trigger"):
        assert 202 in fuzz(running, path, GenerationMode.POSITIVE, BEARER, cases)
        assert 422 in fuzz(running, path, GenerationMode.NEGATIVE, BEARER, cases)


def test_bridge_answers_whatever_comes_and_nothing_comes_of_it_without_the_token(running: Running) -> None:
    fuzz_all(running, 40)


@pytest.mark.e2e
def test_bridge_answers_thousands_of_whatever_comes(running: Running) -> None:
    fuzz_all(running, 300)


# --- ids

moments = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)).map(
    lambda at: at.replace(microsecond=0)
)
prints = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=80)
prints |= st.text(string.ascii_letters + string.digits + "_.:-~", min_size=1, max_size=70)


@given(prints, prints, moments, moments)
def test_alert_id_is_one_for_each_alert_and_what_airflow_takes(
    one: str, other: str, first: datetime, second: datetime
) -> None:
    made = alert_id(one, first)
    elsewhere = first.astimezone(timezone(timedelta(hours=5, minutes=45)))
    assert made == alert_id(one, first) == alert_id(one, elsewhere)
    assert (made == alert_id(other, second)) == ((one, first) == (other, second))
    assert (made == alert_id(other, first)) == (one == other)
    assert re.fullmatch(AIRFLOWS_RUN_ID, made) and len(made) <= 250


@given(prints, prints, prints, prints)
def test_trigger_id_is_one_for_each_request_and_what_airflow_takes(source: str, key: str, a: str, b: str) -> None:
    made = trigger_id(source, key)
    assert made == trigger_id(source, key)
    assert (made == trigger_id(a, b)) == ((source, key) == (a, b))
    assert (made == trigger_id(key, source)) == (source == key)
    assert re.fullmatch(AIRFLOWS_RUN_ID, made) and len(made) <= 250


def test_run_ids_are_held_against_airflows_own_pattern() -> None:
    from airflow.configuration import conf

    assert conf.get("scheduler", "allowed_run_id_pattern") == AIRFLOWS_RUN_ID
