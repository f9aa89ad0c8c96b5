"""The real stack in a clean clone: started, one turn of the loop taken, a rollback, all of it ended."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bridge import free_port

from .conftest import PROJECT, clean_environment

pytestmark = pytest.mark.e2e
STAGES = ("land", "ingest", "validate", "prepare", "train", "evaluate")


class Stack:
    """A clone of HEAD with a stack of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        subprocess.run(["git", "clone", "-q", str(PROJECT), str(root)], check=True)
        names = ("AIRFLOW_PORT", "MLFLOW_PORT", "BALLAST_BRIDGE_PORT", "BALLAST_EXPORTER_PORT")
        ports = {name: str(free_port()) for name in names}
        self.mlflow = f"http://127.0.0.1:{ports['MLFLOW_PORT']}"
        self.env = clean_environment(**ports)

    def make(self, target: str) -> str:
        """What a target of the Makefile prints; it must succeed."""
        done = subprocess.run(
            ["make", target], cwd=self.root, env=self.env, capture_output=True, text=True, check=False, timeout=1200
        )
        assert done.returncode == 0, f"make {target}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def with_mlflow(self, *arguments: str) -> str:
        """What a Python process prints that talks to the stack's MLflow server."""
        environment = {**self.env, "MLFLOW_TRACKING_URI": self.mlflow}
        command = [str(self.root / ".venv" / "bin" / "python"), *arguments]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ballast(self, *arguments: str) -> str:
        """A command of `ballast`."""
        return self.with_mlflow("-m", "pipelines.cli", *arguments)

    def told(self, *arguments: str) -> Any:
        """The same with `--json`, read."""
        return json.loads(self.ballast(*arguments, "--json"))

    def alias(self) -> int:
        """The version that the alias `champion` stands on."""
        find = "mlflow.MlflowClient().get_model_version_by_alias('flight_delays', 'champion')"
        return int(self.with_mlflow("-c", f"import mlflow; print({find}.version)"))

    def processes(self) -> list[str]:
        """Processes that work in the clone, or carry its Airflow home."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                mine = str(self.root) in str((process / "cwd").readlink())
                mine = mine or str(self.root) in (process / "environ").read_text(errors="replace")
                if mine:
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("loop") / "project")
    try:
        yield stack
    finally:
        stack.make("down")


@pytest.fixture(scope="module")
def turned(stack: Stack) -> str:
    """What `make run` prints, the first time."""
    return stack.make("run")


def airflow(stack: Stack) -> Any:
    """A client of the stack's Airflow, made in its environment."""
    code = (
        "import json, sys; from pipelines import embedded; client = embedded.airflow(30);"
        "run = client.trigger('retrain_on_alert', sys.argv[1], json.loads(sys.argv[2]));"
        "import time\n"
        "while not (run := client.run(run.dag_id, run.run_id)).over: time.sleep(0.5)\n"
        "tasks = {task.task_id: (task.state, client.result(run, task.task_id)) for task in client.tasks(run)};"
        "print(json.dumps([run.state, tasks], default=str))"
    )

    def retrain(run_id: str, conf: dict[str, Any]) -> Any:
        return json.loads(stack.with_mlflow("-c", code, run_id, json.dumps(conf)).splitlines()[-1])

    return retrain


def test_turn_trains_and_promotes_the_first_champion(stack: Stack, turned: str) -> None:
    assert "PROMOTE · first model" in turned
    assert "champion: none → v1" in turned
    assert "monitor · April 2013" in turned
    history = stack.told("history")
    first = history["entries"][0]
    assert (first["kind"], first["to_version"], first["as_of"]) == ("promote", 1, "2013-04-01")
    assert not history["problems"]


def test_turn_champion_is_what_the_ledger_and_the_alias_say(stack: Stack, turned: str) -> None:
    status = stack.told("status")
    assert status["registry"]["agrees"] is True
    assert f"v{status['champion']['version']} since" in turned
    assert stack.alias() == status["champion"]["version"]
    assert status["clock"] == "2013-07-01", "the monitor's runs advance the example's clock"


def test_turn_model_serves_raw_rows_as_pyfunc(stack: Stack, turned: str) -> None:
    code = """
import mlflow, pandas as pd, glob
rows = pd.read_parquet(glob.glob("var/runs/retrain_scheduled/*/data/prepare/test.parquet")[0])[:100]
model = mlflow.pyfunc.load_model("models:/flight_delays@champion")
wanted = model.metadata.get_input_schema().input_names()
print(model.predict(rows[wanted]).mean())
"""
    assert 0.05 < float(stack.with_mlflow("-c", code)) < 0.6


def test_turn_again_shows_the_same_and_starts_nothing(stack: Stack, turned: str) -> None:
    before = stack.told("history")
    began = time.monotonic()
    again = stack.make("run")
    assert time.monotonic() - began < 60, "a second turn trains nothing"
    assert "PROMOTE · first model" in again
    assert stack.told("history") == before


def read(file: Path) -> Any:
    """JSON but for the last digits: Evidently sums over a set of words, whose order is another in each process."""
    return json.loads(file.read_text(), parse_float=lambda text: float(f"{float(text):.9g}"))


def test_replay_of_the_same_months_decides_as_airflow_did(stack: Stack, turned: str) -> None:
    """Each monitor of the turn waited for what the one before it had started; so does the replay."""
    monitored = sorted(stack.root.glob("var/reports/monitor/*"))
    before = stack.told("history")
    end = monitored[-1].name.split("..")[1]  # the retraining that ended the turn is as of this day
    found = stack.told("replay", "--from", "2013-04", "--to", end[:7], "--policy", "params")
    played = found["policies"]["params"]

    theirs = Path(found["folder"]) / "params" / "reports" / "monitor"
    for folder in monitored:
        for name, parts in (("verdict.json", None), ("policy.json", ("verdict", "reasons", "version"))):
            ours, replayed = (read(at / folder.name / name) for at in (folder.parent, theirs))
            if parts:
                ours, replayed = ({part: one[part] for part in parts} for one in (ours, replayed))
            assert replayed == ours, f"{folder.name}: {name}"
    challengers = [played["first"], *filter(None, (month["retraining"] for month in played["months"]))]
    assert [one["as_of"] for one in challengers] == ["2013-04-01", end]
    for one in challengers:
        version = stack.told("explain", str(one["version"]))
        assert (version["digest"], version["data"]["as_of"]) == (one["digest"], one["as_of"])
        assert [made["record"]["verdict"] for made in version["decisions"]] == [one["outcome"]]
    assert stack.told("history") == before, "a replay has a state of its own"


def test_alert_retraining_on_known_data_is_cached_and_makes_no_second_version(stack: Stack, turned: str) -> None:
    state, tasks = airflow(stack)(
        "alert-f1", {"as_of": "2013-04-01", "alert": {"fingerprint": "f1"}, "reason": "it fell"}
    )
    assert state == "success"
    assert all(tasks[stage][1]["cached"] for stage in STAGES if stage != "land")
    assert tasks["register"][1]["version"] == 1
    assert tasks["register"][1]["created"] is False
    assert (tasks["refused"][0], tasks["challenger_ready"][0]) == ("success", "skipped")


def test_alert_delivered_twice_starts_one_run(stack: Stack, turned: str) -> None:
    """As an alert's sender calls: the bare API, with a run id made from the alert."""
    code = """
from pipelines import dagruns, embedded
body = {"dag_run_id": "alert-f2", "logical_date": None, "conf": {"as_of": "2013-05-01"}}
for _ in range(2):
    try:
        print(embedded.airflow(30)._call("POST", "/dags/retrain_on_alert/dagRuns", body)["state"])
    except dagruns.Refused as refused:
        print(refused.status)
"""
    assert stack.with_mlflow("-c", code).split() == ["queued", "409"]


def test_monitor_waits_for_a_retraining_under_way_and_then_goes_on(stack: Stack, turned: str) -> None:
    """Of March, which every retraining of the turn has seen already: whatever it finds, it asks for nothing."""
    code = """
import time
from datetime import date
from pipelines import embedded
from pipelines.state import State
state, client = State(), embedded.airflow(30)
state.begin_retraining("somebody/else", date(2013, 3, 1), "alert")
client.set_paused("monitor", False)
run = client.trigger("monitor", "waits", {"start": "2013-03-01", "as_of": "2013-04-01"})
def task(name):
    return next((task.state for task in client.tasks(run) if task.task_id == name), None)
while (found := task("settle")) not in ("up_for_reschedule", "success", "failed"): time.sleep(0.2)
print(found, task("land"))
state.end_retraining("somebody/else", "refuse")
while not (run := client.run(run.dag_id, run.run_id)).over: time.sleep(0.5)
print(run.state, task("settle"), state.windows()[0].verdict)
client.set_paused("monitor", True)
"""
    waits, ends = stack.with_mlflow("-c", code).splitlines()[-2:]
    assert waits == "up_for_reschedule None"
    assert ends.split()[:2] == ["success", "success"]
    assert ends.split()[2] in ("wait", "hold")


SET = """
import re, sys
from pathlib import Path
file = Path("params.yaml")
text = re.sub(r"approval: \\w+", f"approval: {sys.argv[1]}", file.read_text())
file.write_text(re.sub(r"approval_hours: [\\d.]+", f"approval_hours: {sys.argv[2]}", text))
"""
ASK = """
import json, sys, time
from pipelines import embedded
client = embedded.airflow(30)
before = {run["dag_run_id"] for run in client._get("/dags/promote/dagRuns", limit=100)["dag_runs"]}
run = client.trigger("retrain_on_alert", sys.argv[1], {"as_of": sys.argv[2]})
while not (run := client.run(run.dag_id, run.run_id)).over:
    time.sleep(0.5)
assert run.state == "success", run
deadline = time.monotonic() + 120
while time.monotonic() < deadline:
    runs = {run["dag_run_id"] for run in client._get("/dags/promote/dagRuns", limit=100)["dag_runs"]}
    if runs - before:
        promotion = client.run("promote", *(runs - before))
        tasks = {task.task_id: task.state for task in client.tasks(promotion)}
        if tasks.get("approve") == "awaiting_input" or promotion.over:
            break
    time.sleep(0.5)
print(promotion.run_id)
"""
END = """
import json, sys, time
from urllib.parse import quote
from pipelines import embedded
client = embedded.airflow(30)
path = f"/dags/promote/dagRuns/{quote(sys.argv[1])}/taskInstances/approve/-1/hitlDetails"
form = client._get(path)
if len(sys.argv) > 2:
    client._call("PATCH", path, {"chosen_options": [sys.argv[2]], "params_input": {"note": "a test"}})
deadline = time.monotonic() + 120
while not (run := client.run("promote", sys.argv[1])).over and time.monotonic() < deadline:
    time.sleep(0.5)
tasks = {task.task_id: task.state for task in client.tasks(run)}
print(json.dumps({"state": run.state, "tasks": tasks, "subject": form["subject"], "body": form["body"]}))
"""


def test_approval_waits_for_a_person_gives_way_to_a_newer_challenger_and_runs_out(stack: Stack, turned: str) -> None:
    """v2 wants its place back three times: overtaken while it waits, approved, and with nobody there."""

    def setting(approval: str, hours: str) -> None:
        stack.with_mlflow("-c", SET, approval, hours)
        commit = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qam", f"approval {approval}"]
        subprocess.run(commit, cwd=stack.root, check=True)

    def ask(name: str) -> str:
        return stack.with_mlflow("-c", ASK, name, "2013-07-01").splitlines()[-1]

    def end(*arguments: str) -> Any:
        return json.loads(stack.with_mlflow("-c", END, *arguments).splitlines()[-1])

    setting("always", "1")
    stack.ballast("promote", "1", "--force", "--reason", "to have v2 asked for", "--yes")
    first = ask("approval-1")
    (waits,) = stack.told("status")["waiting"]
    assert (waits["version"], waits["reason"]) == (2, "decide.approval is always")
    second = ask("approval-2")
    overtaken = end(first)
    assert (overtaken["state"], overtaken["tasks"]["refused"], overtaken["tasks"]["promote"]) == (
        "success",
        "success",
        "skipped",
    )
    assert stack.told("status")["champion"]["version"] == 1, "nobody has approved it"
    approved = end(second, "Approve")
    assert "# PROMOTE: flight_delays v2 may take the place of v1" in approved["body"]
    assert (approved["state"], approved["tasks"]["promote"], approved["tasks"]["refused"]) == (
        "success",
        "success",
        "skipped",
    )
    entries = stack.told("history")["entries"]
    assert [entry["kind"] for entry in entries[-5:]] == ["ask", "ask", "supersede", "approve", "promote"]
    assert entries[-1]["reason"].endswith("· approved by admin in promote/" + second + ": a test")
    stack.ballast("promote", "1", "--force", "--reason", "once more", "--yes")
    setting("always", "0.002")
    late = end(ask("approval-3"))
    assert (late["state"], late["tasks"]["refused"]) == ("success", "success")
    last = stack.told("history")["entries"][-1]
    assert (last["kind"], last["reason"]) == ("reject", "nobody answered within 0.002 h")
    stack.ballast("promote", "2", "--force", "--reason", "as it was", "--yes")


def test_rollback_puts_the_champion_before_back_for_everybody(stack: Stack, turned: str) -> None:
    """In June April's model lost what could be avoided; one that saw the spring is better: the turn ends with v2."""
    assert stack.told("status")["champion"]["version"] == 2
    stack.ballast("rollback", "--reason", "a test", "--yes")
    assert stack.told("status")["champion"]["version"] == 1
    last = stack.told("history")["entries"][-1]
    assert (last["kind"], last["from_version"], last["to_version"], last["reason"]) == ("rollback", 2, 1, "a test")
    assert stack.alias() == 1


BACKFILL = """
import json, time
from pipelines import embedded
client = embedded.airflow(30)
client.set_paused("monitor", False)
dates = {"from_date": "2013-08-01T00:00:00Z", "to_date": "2013-09-01T00:00:00Z"}
client._call("POST", "/backfills", {"dag_id": "monitor", "max_active_runs": 1, **dates})
def runs():
    return [run for run in client._get("/dags/monitor/dagRuns", limit=100)["dag_runs"] if run["run_type"] == "backfill"]
deadline = time.monotonic() + 600
while len(found := runs()) < 2 or not all(run["state"] in ("success", "failed") for run in found):
    assert time.monotonic() < deadline, found
    time.sleep(0.5)
client.set_paused("monitor", True)
keys = ("state", "data_interval_start", "data_interval_end", "start_date", "end_date")
print(json.dumps([{key: run[key] for key in keys} for run in sorted(found, key=lambda run: run["data_interval_end"])]))
"""


def test_backfill_in_airflow_takes_the_months_one_after_another(stack: Stack, turned: str) -> None:
    """As a person starts it in the UI, with Max Active Runs 1."""
    august, september = json.loads(stack.with_mlflow("-c", BACKFILL).splitlines()[-1])
    assert (august["state"], september["state"]) == ("success", "success")
    assert [august["data_interval_end"][:10], september["data_interval_end"][:10]] == ["2013-09-01", "2013-10-01"]
    assert august["end_date"] <= september["start_date"]
    for month in ("2013-08-01..2013-09-01", "2013-09-01..2013-10-01"):
        folder = stack.root / "var" / "reports" / "monitor" / month
        assert json.loads((folder / "policy.json").read_text())["verdict"] in ("retrain", "wait", "hold")
    assert stack.told("status")["clock"] == "2013-10-01"


def test_down_leaves_no_process(stack: Stack, turned: str) -> None:
    assert "stopped" in stack.make("down")
    assert stack.processes() == []
