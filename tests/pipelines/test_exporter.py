"""The exporter over real HTTP, on a real state store; Airflow is away unless a test brings it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.exporter import FIRST, fill
from pipelines import embedded, exporter, facts, freeze, runfacts
from pipelines.errors import BallastError, TryAgain
from pipelines.files import write_json
from pipelines.places import ROOT
from pipelines.state import State

DAY = 86_400.0


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, with the project's params.yaml and nothing else."""
    for name in ("STATE_URI", "LANDING", "AIRFLOW_URL", "MONITOR_INTERVAL"):
        monkeypatch.delenv(f"BALLAST_{name}", raising=False)
    monkeypatch.setenv("BALLAST_VAR", str(tmp_path / "var"))
    monkeypatch.setattr(exporter, "STATE_EVERY_S", 0.05)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


class Client:
    """What Prometheus does."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def text(self, path: str = "/metrics") -> str:
        with urlopen(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def scrape(self) -> dict[str, float]:
        """Each sample by its name and labels' values."""
        families = text_string_to_metric_families(self.text())
        samples = [sample for family in families for sample in family.samples]
        return {
            " ".join([sample.name.removeprefix("ballast_"), *sample.labels.values()]): sample.value
            for sample in samples
        }

    def until(self, name: str, value: float | None) -> dict[str, float]:
        """A scrape in which this sample has come to this value."""
        deadline = time.monotonic() + 20
        while (found := self.scrape()).get(name) != value:
            assert time.monotonic() < deadline, f"{name} is {found.get(name)}, not {value}"
            time.sleep(0.02)
        return found


@contextmanager
def serving(server: exporter.Server | None = None) -> Iterator[Client]:
    server = server or exporter.serve("127.0.0.1", 0)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Client(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@contextmanager
def of(*sources: exporter.Source) -> Iterator[Client]:
    """An exporter of these sources, looked at only when the test says."""
    with serving(
        exporter.Server(("127.0.0.1", 0), sources, exporter.Collector(sources, lambda: (False, None)))
    ) as client:
        yield client


def filled(**last: bool) -> State:
    state = State()
    fill(state, 3, 2, 5, **last)
    return state


def test_metrics_are_the_numbers_of_the_rows():
    state = filled(worse=True, raises=True)
    freeze.freeze(state, "for the test", "me")
    state.set_clock(date(2013, 7, 1))
    midnight = facts.midnight(FIRST.isoformat())
    with serving() as client:
        found = client.until("champion_version", 5)
    expected = {
        "champion_info 2013-04-05 promote 5": 1,
        "champion_as_of_timestamp_seconds": midnight + 4 * DAY,
        "training_data_end_timestamp_seconds": midnight + 4 * DAY,
        "windows": 3,
        "window_start_timestamp_seconds": midnight + 60 * DAY,
        "window_end_timestamp_seconds": midnight + 90 * DAY,
        "window_version": 5,
        "window_rows": 28353,
        "window_labelled_rows": 26619,
        "policy_verdict wait": 1,
        "policy_verdict retrain": 0,
        "policy_max_rise realised": 0.03,
        "policy_max_rise estimated": 0.05,
        "model_log_loss realised 5": 0.525,
        "model_log_loss reference 5": 0.445,
        "model_log_loss_rise estimated 5": 0.08,
        "model_worse realised 5": 1,
        "model_estimated_worse_windows": 1,
        "drift_score column_0": 0.2,
        "drift_moved column_1": 1,
        "drift_columns_moved": 2,
        "drift_raises": 1,
        "drift_raised_windows": 1,
        "prediction_drift_moved": 1,
        "prediction_mean reference": 0.25,
        "data_broken": 0,
        "data_quarantined_rows": 1,
        "gate_decisions_total promote": 3,
        "gate_decisions_total refuse": 2,
        "gate_rule_checks_total better block": 5,
        "gate_rule_failures_total better block": 2,
        "breaker_open": 0,
        "breaker_limit": 3,
        "retrainings refuse schedule": 2,
        "ledger_entries_total promote": 5,
        "ledger_entries_total freeze": 1,
        "ledger_whole": 1,
        "frozen": 1,
        "clock_timestamp_seconds": facts.midnight("2013-07-01"),
        "clock_example": 1,
        "exporter_source_up state": 1,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_metrics_are_the_same_after_a_restart():
    filled()
    with serving() as client:
        before = client.until("champion_version", 5)
    with serving() as client:
        after = client.until("champion_version", 5)
    stored = {name for name in before if not name.startswith(("exporter_", "clock_"))}
    assert {name: before[name] for name in stored} == {name: after.get(name) for name in stored}


def test_metrics_follow_the_store():
    state = filled()
    with serving() as client:
        client.until("frozen", 0)
        freeze.freeze(state, "for the test", "me")
        client.until("frozen", 1)


def test_metrics_two_windows_in_a_row_count_and_another_champion_begins_anew():
    known = facts.Known(windows=[*filled(worse=True).windows()])
    newest = known.windows[-1]

    def counted(*windows: Any) -> float:
        families = facts.families(facts.Known(windows=windows))
        return next(one.samples[0].value for one in families if one.name == "ballast_model_estimated_worse_windows")

    other = type(newest)(**{**vars(newest), "version": 4})
    assert [counted(newest), counted(newest, newest), counted(other, newest)] == [1, 2, 1]
    assert counted(newest, known.windows[0]) == 0


def test_metrics_without_a_store_know_nothing_and_do_not_make_one(place):
    with serving() as client:
        found = client.until("exporter_source_up state", 1)
        client.until("exporter_source_up airflow", 0)
        assert json.loads(client.text("/healthz"))["sources"]["airflow"].startswith("The embedded Airflow was never")
    assert found["windows"] == 0
    assert {"champion_version", "window_rows", "data_broken", "frozen_since_timestamp_seconds"}.isdisjoint(found)
    assert not (place / "var").exists()


def test_metrics_with_broken_params_leave_out_only_what_stands_there(place):
    filled()
    (place / "params.yaml").write_text("breaker: {refusals: none}\npolicy: {}\n")
    with serving() as client:
        found = client.until("champion_version", 5)
    assert found["exporter_source_up state"] == 1
    assert {"breaker_limit", "breaker_open", "policy_max_rise realised"}.isdisjoint(found)


def test_metrics_of_a_ledger_that_was_changed_say_so(place):
    filled()
    from sqlite3 import connect

    with connect(place / "var" / "state.db") as database:
        database.execute("UPDATE ledger SET reason = 'another' WHERE seq = 2")
    database.close()
    with serving() as client:
        client.until("ledger_whole", 0)


def test_landing_shows_the_newest_row_and_up_to_when_it_was_asked(place):
    ends = {"2013-03": ("2013-03-31T22:00:00+00:00", "2013-04-01T00:00:00+00:00")}
    pieces = {name: {"last": last, "until": until} for name, (last, until) in ends.items()}
    write_json(place / "var" / "landing" / "index" / "a.json", {"flights": {"s": pieces}, "planes": {"s": {"all": {}}}})
    with serving() as client:
        found = client.until("exporter_source_up landing", 1)
    assert found["landed_data_end_timestamp_seconds flights"] == facts.stamp("2013-03-31T22:00:00")
    assert found["landed_asked_until_timestamp_seconds flights"] == facts.stamp("2013-04-01T00:00:00")
    assert "landed_data_end_timestamp_seconds planes" not in found


def test_source_that_fails_keeps_its_facts_for_a_while_and_then_has_none(monkeypatch):
    away = False

    def look() -> list[Any]:
        if away:
            raise TryAgain("It is away.")
        return [facts.gauge("windows", "For the test.", 7)]

    source = exporter.Source("thing", look, 3600)
    with of(source) as client:
        source.look()
        assert client.scrape()["windows"] == 7
        away = True
        source.look()
        found = client.scrape()
        assert (found["windows"], found["exporter_source_up thing"]) == (7, 0)
        with monkeypatch.context() as later:
            later.setattr(exporter, "KEEP_S", 0.0)
            found = client.scrape()
        assert "windows" not in found
        assert found["exporter_last_read_timestamp_seconds thing"] == pytest.approx(time.time(), abs=60)
        away = False
        source.look()
        assert client.scrape()["windows"] == 7


def test_source_whose_look_does_not_come_back_has_no_facts_after_a_while(monkeypatch):
    begun, end = Event(), Event()

    def look() -> list[Any]:
        if source.read:
            begun.set()
            end.wait()
        return [facts.gauge("windows", "For the test.", 7)]

    source = exporter.Source("thing", look, 3600)
    source.look()
    hanging = Thread(target=source.look)
    hanging.start()
    with of(source) as client:
        assert begun.wait(20)
        found = client.scrape()
        assert (found["windows"], found["exporter_source_up thing"]) == (7, 1)
        monkeypatch.setattr(exporter, "KEEP_S", 0.0)
        found = client.scrape()
        assert ("windows" in found, found["exporter_source_up thing"]) == (False, 0)
    end.set()
    hanging.join()


def test_source_that_breaks_leaves_the_others_up():
    broken = exporter.Source("broken", lambda: 1 / 0, 3600)  # type: ignore[arg-type,return-value]
    good = exporter.Source("good", lambda: [facts.gauge("windows", "For the test.", 7)], 3600)
    with of(broken, good) as client:
        broken.look()
        good.look()
        assert client.scrape()["windows"] == 7
        assert json.loads(client.text("/healthz"))["sources"] == {
            "broken": "ZeroDivisionError: division by zero",
            "good": "up",
        }


def test_scrape_does_not_wait_for_a_source_that_is_being_looked_at():
    begun, go_on = Event(), Event()

    def look() -> list[Any]:
        begun.set()
        assert go_on.wait(60)
        return [facts.gauge("windows", "For the test.", 7)]

    slow = exporter.Source("slow", look, 3600)
    with of(slow) as client:
        thread = Thread(target=slow.look)
        thread.start()
        try:
            assert begun.wait(10)
            found = client.scrape()  # it would end in a timeout
            assert thread.is_alive()
            assert "windows" not in found
        finally:
            go_on.set()
            thread.join(10)
        assert client.scrape()["windows"] == 7


def test_airflow_that_never_answered_is_down_and_the_rest_is_there(monkeypatch, place):
    filled()
    (place / "password").write_text("secret\n")
    for name, value in {"URL": "http://127.0.0.1:1", "USER": "me", "PASSWORD_FILE": str(place / "password")}.items():
        monkeypatch.setenv(f"BALLAST_AIRFLOW_{name}", value)
    with serving() as client:
        client.until("champion_version", 5)
        found = client.until("exporter_source_up airflow", 0)
        assert "Airflow does not answer at http://127.0.0.1:1" in client.text("/healthz")
    assert found["exporter_source_up state"] == 1
    assert not [name for name in found if name.startswith(("dag_", "task_", "airflow_"))]


def test_airflow_needs_its_user_and_password_where_an_address_is_given(monkeypatch):
    monkeypatch.setenv("BALLAST_AIRFLOW_URL", "http://127.0.0.1:1")
    monkeypatch.delenv("BALLAST_AIRFLOW_PASSWORD_FILE", raising=False)
    with pytest.raises(BallastError, match="Set both, or none of the three"):
        embedded.connect()


def test_server_on_a_taken_port_says_what_to_do():
    server = exporter.serve("127.0.0.1", 0)
    try:
        with pytest.raises(BallastError, match="Stop what is there, or set BALLAST_EXPORTER_HOST"):
            exporter.serve("127.0.0.1", server.server_address[1])
    finally:
        server.server_close()


def test_server_knows_no_other_page():
    with of() as client, pytest.raises(HTTPError, match="404"):
        client.text("/")


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is missing (package prometheus)")
def test_metrics_are_named_as_prometheus_wants_them():
    state = filled(worse=True, raises=True)
    state.note("ask", lambda _: None, reason="a warning", actor="review/x", record_sha256="f" * 64)
    with serving() as client:
        client.until("champion_version", 5)
        text = client.text()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_components_are_those_that_airflow_calls_healthy():
    health = {
        "scheduler": {"status": "healthy"},
        "triggerer": {"status": "unhealthy"},
        "dag_processor": {"status": None},
    }
    nobody: Any = {}
    seen = runfacts.Seen(health, 2, nobody, nobody, nobody, nobody, nobody)
    found = {one.name: [(*s.labels.values(), s.value) for s in one.samples] for one in runfacts.families(seen)}
    assert found["ballast_airflow_component_up"] == [("scheduler", 1), ("triggerer", 0)]
    assert found["ballast_airflow_import_errors"] == [(2,)]
