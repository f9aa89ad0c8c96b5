"""The alert bridge as a process: a storm of alerts, Airflow away, and SIGKILL wherever it hurts."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from benchmarks.bridge import (
    BEARER,
    TOKEN,
    Bridge,
    FakeAirflow,
    Storm,
    airflow,
    bridge,
    delivery,
    firing,
    free_port,
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


# --- how it starts


def certificate(root: Path) -> dict[str, str]:
    """A certificate for this machine, signed by itself, and its key, as the settings that name them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bridge")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
    made = made.add_extension(here, critical=False)
    (root / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (root / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return {f"BALLAST_BRIDGE_TLS_{name.upper()}": str(root / f"{name}.pem") for name in ("cert", "key")}


def test_bridge_with_a_certificate_speaks_tls_and_nothing_else(tmp_path: Path, fake: FakeAirflow) -> None:
    with bridge(tmp_path, fake.url, env=certificate(tmp_path)) as one:
        trusting = ssl.create_default_context(cafile=one.cert)
        with httpx.Client(base_url=one.url, verify=trusting, trust_env=False) as client:
            answer = client.post("/alertmanager", json=delivery(firing("a1")), headers=BEARER)
        assert answer.status_code == 202
        one.settled()
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{one.url}/healthz", trust_env=False)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{one.port}/healthz", trust_env=False)
    assert fake.runs == {"alert-a1-20130501T000000Z": 1}


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("TOKEN_FILE", "nowhere", r"has no token: nowhere cannot be read \(No such file.*`make up` makes one"),
        ("TOKEN_FILE", "short", r"token must have at least 16 characters \(found 5\)"),
        ("ACTIONS", "retrain,reboot", r"may name retrain, monitor, rollback, freeze \(found reboot\)"),
        ("TLS_CERT", "short", r"no certificate and key to serve with \(short, None: .*PEM"),
        ("TLS_KEY", "short", "TLS_KEY is set and BALLAST_BRIDGE_TLS_CERT is not"),
        ("PORT", "eighty", r"BALLAST_BRIDGE_PORT must be a port, 1 to 65535 \(found 'eighty'\)"),
    ],
)
def test_bridge_that_cannot_be_what_it_is_told_does_not_start_and_says_why(
    tmp_path: Path, setting: str, value: str, said: str
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "short").write_text("short")
    env = os.environ | {
        "BALLAST_VAR": str(tmp_path),
        "BALLAST_STATE_URI": f"sqlite:///{tmp_path / 'state.db'}",
        "BALLAST_BRIDGE_TOKEN_FILE": "token",
        "BALLAST_BRIDGE_PORT": str(free_port()),
        f"BALLAST_BRIDGE_{setting}": value,
    }
    command = [sys.executable, "-m", "pipelines.bridge"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: .*{said}.*\n", done.stderr), done.stderr
