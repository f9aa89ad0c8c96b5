"""An alert from end to end: a model that gets worse, Debian's Prometheus and Alertmanager with the repository's files,
the bridge, the retraining that it starts, and the record that names it. Then Airflow is away for a minute.

Only addresses and waits are changed in those files: a scrape and an evaluation each second, and `for: 2s`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from benchmarks.bridge import free_port
from tests.waiting import until

from .conftest import PROJECT, clean_environment, own_project

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("prometheus-alertmanager")),
        reason="not run: install prometheus and prometheus-alertmanager",
    ),
]

DAYS, FLIPPED, WINDOW = 110, 20, 14
AWAY_S = 60
RUN = """
import json, sys
from pipelines import embedded
client = embedded.airflow(30)
"""


class Site:
    """A project of its own table on this machine, its stack, and a Prometheus and an Alertmanager that watch it."""

    def __init__(self, root: Path) -> None:
        self.today = datetime.now(UTC).date()
        first = self.today - timedelta(days=DAYS)
        self.root = own_project(root, DAYS, candidates=("hgb",), first=first.isoformat(), flip_from=DAYS - FLIPPED)
        self._settings()
        names = ("AIRFLOW_PORT", "MLFLOW_PORT", "BALLAST_BRIDGE_PORT", "BALLAST_EXPORTER_PORT")
        self.ports = {name: free_port() for name in (*names, "PROMETHEUS", "ALERTMANAGER")}
        ports = {name: str(self.ports[name]) for name in names}
        tracking = f"http://127.0.0.1:{self.ports['MLFLOW_PORT']}"
        self.env = clean_environment(**ports, BALLAST_BRIDGE_ACTIONS="retrain,monitor,freeze")
        self.told_env = {**self.env, "MLFLOW_TRACKING_URI": tracking}
        self.watchers: list[subprocess.Popen[bytes]] = []

    def _settings(self) -> None:
        """The policy asks for three bad windows in a row: the alert comes first."""
        file = self.root / "params.yaml"
        params = yaml.safe_load(file.read_text())
        performance = next(one for one in params["policy"]["triggers"] if one["kind"] == "performance")
        params["policy"]["triggers"] = [{**performance, "windows": 3, "of": 3}]
        params["policy"]["cooldown_days"] = 0
        params["performance"]["min_rows"] = 300
        file.write_text(yaml.safe_dump(params, sort_keys=False))
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, "commit", "-qam", "Patience"], cwd=self.root, check=True)

    def python(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        """What a Python process in the project prints."""
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=self.root, env=env or self.told_env, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def stack(self, order: str) -> None:
        self.python("-m", "pipelines.stack", order, env=self.env)

    def stop(self, *names: str) -> None:
        self.python("-c", f"from pipelines import stack; stack._stop(*{names!r})", env=self.env)

    def told(self, *arguments: str) -> Any:
        return json.loads(self.python("-m", "pipelines.cli", *arguments, "--json"))

    def airflow(self, code: str, *arguments: str) -> Any:
        """What an expression says that may use the Airflow ``client``."""
        return json.loads(self.python("-c", f"{RUN}\nprint(json.dumps({code}, default=str))", *arguments, env=self.env))

    def run(self, dag_id: str, run_id: str, conf: dict[str, Any]) -> None:
        """Start a run and wait until it has ended well."""
        self.airflow(
            "client.trigger(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])).run_id", dag_id, run_id, json.dumps(conf)
        )
        self.ended(dag_id, run_id)

    def state_of(self, dag_id: str, run_id: str) -> Any:
        return self.airflow("(lambda run: [run.state, run.over])(client.run(sys.argv[1], sys.argv[2]))", dag_id, run_id)

    def ended(self, dag_id: str, run_id: str) -> None:
        state, _ = until(f"{dag_id} {run_id}", lambda: (found := self.state_of(dag_id, run_id))[1] and found, 300, 1)
        assert state == "success", self.airflow(
            "[(task.task_id, task.state) for task in client.tasks(client.run(sys.argv[1], sys.argv[2]))]",
            dag_id,
            run_id,
        )

    def inbox(self) -> dict[str, dict[str, Any]]:
        """The bridge's inbox, by run id."""
        code = "import json; from pipelines.state import State; print(json.dumps([vars(a) for a in State().alerts()]))"
        return {one["run_id"]: one for one in json.loads(self.python("-c", code))}

    # --- Prometheus and Alertmanager

    def watch(self, place: Path) -> None:
        """Start both with the repository's files; only addresses and waits are others."""
        shutil.copytree(PROJECT / "monitoring" / "prometheus", place / "prometheus")
        shutil.copytree(PROJECT / "monitoring" / "alertmanager", place / "alertmanager")
        ports = self.ports
        moved = {
            ":9180": ports["BALLAST_EXPORTER_PORT"],
            ":9190": ports["BALLAST_BRIDGE_PORT"],
            ":9093": ports["ALERTMANAGER"],
        }
        for file in (place / "prometheus" / "prometheus.yml", place / "alertmanager" / "alertmanager.yml"):
            text = file.read_text()
            for old, new in moved.items():
                text = text.replace(old, f":{new}")
            text = re.sub(r"(scrape|evaluation)_(interval|timeout): \S+", r"\1_\2: 1s", text)
            text = re.sub(r"credentials_file: \S+", f"credentials_file: {self.root}/var/bridge/token", text)
            file.write_text(text)
        rules = place / "prometheus" / "rules" / "ballast.yml"
        rules.write_text(re.sub(r"\bfor: \S+", "for: 2s", rules.read_text()))
        storage = ["--storage.path", str(place / "a"), "--cluster.listen-address="]
        self._start(
            ["prometheus-alertmanager", "--config.file", str(place / "alertmanager" / "alertmanager.yml"), *storage],
            place / "alertmanager.log", ports["ALERTMANAGER"],
        )  # fmt: skip
        storage = ["--storage.tsdb.path", str(place / "p")]
        self._start(
            ["prometheus", "--config.file", str(place / "prometheus" / "prometheus.yml"), *storage],
            place / "prometheus.log", ports["PROMETHEUS"],
        )  # fmt: skip
        until(
            "scrapes",
            lambda: self.query('up{job="ballast-exporter"} == 1') and self.query('up{job="ballast-bridge"} == 1'),
        )

    def _start(self, command: list[str], log: Path, port: int) -> None:
        address = f"--web.listen-address=127.0.0.1:{port}"
        with log.open("wb") as output:
            self.watchers.append(subprocess.Popen([*command, address], stdout=output, stderr=subprocess.STDOUT))

    def query(self, query: str) -> list[Any]:
        """What Prometheus finds now."""
        try:
            return list(self._get(f"query?query={quote(query)}")["data"]["result"])
        except OSError:
            return []

    def first(self, query: str, since: float) -> float:
        """When Prometheus first found it, to the second, in seconds since the epoch."""
        path = f"query_range?query={quote(query)}&start={since}&end={time.time()}&step=0.25"
        return min(float(at) for series in self._get(path)["data"]["result"] for at, _ in series["values"])

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['PROMETHEUS']}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)

    def post(self, **asked: str) -> Any:
        """Ask the bridge for something, as a CI job would."""
        token = (self.root / "var" / "bridge" / "token").read_text().strip()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports['BALLAST_BRIDGE_PORT']}/trigger",
            json.dumps(asked).encode(),
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["alerts"][0]

    def close(self) -> None:
        for watcher in self.watchers:
            watcher.terminate()
            watcher.wait(30)
        self.stack("down")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    place = tmp_path_factory.mktemp("alerts")
    site = Site(place / "project")
    try:
        site.stack("up")
        site.watch(place)
        yield site
    finally:
        site.close()


def seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def ago(days: int) -> str:
    return (datetime.now(UTC).date() - timedelta(days=days)).isoformat()


def test_a_worse_model_raises_an_alert_that_retrains_and_is_on_the_record(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.run("retrain_on_alert", "first", {"as_of": ago(FLIPPED)})
    until("the first champion", lambda: (site.told("status")["champion"] or {}).get("version") == 1, 60, 1)
    assert not site.query("ALERTS{ballast_action='retrain'}")

    site.airflow("client.set_paused('monitor', False)")
    began = time.time()
    site.run("monitor", "flipped", {"as_of": site.today.isoformat(), "start": ago(WINDOW)})
    alert = until("the alert at the bridge", lambda: [a for a in site.inbox().values() if a["action"] == "retrain"])[0]
    alert = until("the run", lambda: (found := site.inbox()[alert["run_id"]])["status"] == "started" and found)
    labels = alert["payload"]["labels"]
    assert labels["ballast_action"] == "retrain"
    site.ended("retrain_on_alert", alert["run_id"])

    record = site.told("explain", "2")
    told = json.dumps(record)
    assert alert["payload"]["fingerprint"] in told
    assert labels["alertname"] in told
    shown = site.python("-m", "pipelines.cli", "explain", "2")
    assert labels["alertname"] in shown

    runs = site.airflow(
        "[run.run_id for run in client.runs(['success', 'running', 'queued', 'failed'], 'retrain_on_alert')]"
    )
    assert sorted(runs) == sorted(["first", alert["run_id"]]), "one run for the alert, and no other"

    name = labels["alertname"]
    started = site.airflow("client.run('retrain_on_alert', sys.argv[1]).started", alert["run_id"])
    decided = seconds(site.python("-c", WINDOW_SEEN).strip())
    hops = {
        "the window is in the state store": decided,
        "Prometheus has the metric": site.first('ballast_model_worse{kind="realised"} == 1', began),
        f"the rule {name} is pending": site.first(f'ALERTS{{alertname="{name}"}}', began),
        "it fires (for: 2s here)": seconds(alert["payload"]["startsAt"]),
        "the bridge has kept it": seconds(alert["received_at"]),
        "the run is queued in Airflow": seconds(alert["settled_at"]),
        "the run has started": seconds(started),
    }
    with capsys.disabled():
        print("\n\nseconds from the metric's change to the run, by hop")
        for (_, before), (what, at) in zip(list(hops.items()), list(hops.items())[1:], strict=False):
            print(f"  {at - before:6.2f}  {what}")
        print(f"  {hops['the run has started'] - decided:6.2f}  in all\n")
    assert decided <= hops["the bridge has kept it"] <= hops["the run is queued in Airflow"]


WINDOW_SEEN = "from pipelines.state import State; print(State().windows()[-1].decided_at)"


def test_airflow_away_for_a_minute_loses_no_alert_and_runs_none_twice(site: Site) -> None:
    site.airflow("client.set_paused('monitor', True)")  # it takes the runs and leaves them queued
    site.stop("scheduler", "api-server", "dag-processor")
    gone = time.monotonic()
    asked = [site.post(action="monitor", source="vendor", key=str(n), reason=f"file {n}") for n in range(5)]
    again = [site.post(action="monitor", source="vendor", key=str(n), reason=f"file {n}") for n in range(5)]
    assert [one["outcome"] for one in asked] == ["accepted"] * 5
    assert [one["outcome"] for one in again] == ["known"] * 5
    ids = {one["id"] for one in asked}
    time.sleep(max(0.0, AWAY_S - (time.monotonic() - gone)))
    assert {site.inbox()[run_id]["status"] for run_id in ids} == {"waiting"}
    site.stack("up")
    until("all are delivered", lambda: {site.inbox()[run_id]["status"] for run_id in ids} == {"started"}, 60, 0.5)
    runs = site.airflow("[run.run_id for run in client.runs(['success', 'running', 'queued', 'failed'], 'monitor')]")
    assert sorted(runs) == sorted(["flipped", *ids])
