"""The operators in real DAG runs; the pipeline behind the process boundary is a script that does as told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.models import Connection
from airflow.sdk import DAG, Asset
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowRescheduleException
from airflow.utils.session import create_session
from airflow.utils.types import DagRunType

import ballast_calendar
import ballast_container
import ballast_operators
from ballast_operators import (
    StepOperator,
    answered,
    as_of_date,
    challenger,
    events,
    interval_start,
    train_days,
    trigger,
    way_back,
)

pytestmark = [
    pytest.mark.usefixtures("airflow_database"),
    pytest.mark.filterwarnings("default"),  # Airflow's in-process API server warns of its own libraries
]

DAGS = Path(__file__).resolve().parents[2] / "dags"
FAKE = """
import json, os, sys
step = sys.argv[1]
told = json.load(open("told.json"))[step]
answers = []
for line in told.get("asks", ()):
    print(line, flush=True)
    answers.append(sys.stdin.readline().strip())
call = {"argv": sys.argv[1:], "trigger": json.loads(os.environ["BALLAST_TRIGGER"]), "answers": answers}
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(call) + "\\n")
print(told.get("says", f"{step} speaks"))
if told.get("error"):
    print("error:", told["error"], file=sys.stderr)
if told.get("signal"):
    os.kill(os.getpid(), told["signal"])
if not told.get("code"):
    print("ballast-result", json.dumps(told["result"]))
sys.exit(told.get("code", 0))
"""


class Pipeline:
    """The other side of the boundary: what each step is told to do, and how it was called."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "pipelines").mkdir()
        (root / "pipelines" / "__init__.py").touch()
        (root / "pipelines" / "run.py").write_text(FAKE)

    def tell(self, **steps: dict[str, Any]) -> None:
        (self.root / "told.json").write_text(json.dumps(steps))

    def calls(self) -> list[dict[str, Any]]:
        file = self.root / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setattr(ballast_operators, "PROJECT", tmp_path)
    return Pipeline(tmp_path)


@pytest.fixture
def run(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run one of the project's DAGs for real, in this process, as an API call without a logical date starts it."""
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(DAGS))

    def run(name: str, **conf: Any) -> Any:
        for task in bag.dags[name].tasks:
            task.retries = 0  # a wrong step would wait for its retries
        land = bag.dags[name].get_task("land")
        monkeypatch.setattr(sys.modules[type(land).__module__], "PROJECT", pipeline.root)
        return bag.dags[name].test(logical_date=None, run_conf=conf)

    return run


def states(dag_run: Any) -> dict[str, str]:
    return {ti.task_id: str(ti.state) for ti in dag_run.get_task_instances()}


PINNED = {"result": {"as_of": "2013-04-01"}}
RETRAINING = dict.fromkeys(("land", "ingest", "validate", "prepare", "train", "evaluate", "register"), PINNED)


def decided(verdict: str) -> dict[str, Any]:
    record = {"version": 3, "record_sha256": "ab", "as_of": "2013-04-01", "summary": "words", "rows": "many"}
    admitted = {"result": {**PINNED["result"], "verdict": "go"}}
    return {**RETRAINING, "admit": admitted, "decide": {"result": {**record, "verdict": verdict}}}


def test_retraining_passed_challenger_is_announced_with_its_record(pipeline: Pipeline, run: Callable[..., Any]) -> None:
    pipeline.tell(**decided("promote"))
    dag_run = run("retrain_on_alert")
    assert dag_run.state == "success"
    assert states(dag_run)["refused"] == "skipped"
    (announced,) = [ti for ti in dag_run.get_task_instances() if ti.task_id == "challenger_ready"]
    payload = announced.xcom_pull(task_ids="challenger_ready", key="return_value")
    assert payload == {"version": 3, "record_sha256": "ab", "as_of": "2013-04-01", "summary": "words"}
    land, *others = pipeline.calls()
    assert "--as-of" not in land["argv"], "without a date the clock is asked"
    assert len(others) == 8
    assert all(call["argv"][-2:] == ["--as-of", "2013-04-01"] for call in others), "the first date is pinned"


def test_retraining_refused_challenger_is_a_green_run_that_keeps_its_alert(
    pipeline: Pipeline, run: Callable[..., Any]
) -> None:
    pipeline.tell(**decided("refuse"))
    dag_run = run("retrain_on_alert", as_of="2013-04-01", alert={"fingerprint": "f1"}, reason="it fell")
    assert dag_run.state == "success"
    assert (states(dag_run)["refused"], states(dag_run)["challenger_ready"]) == ("success", "skipped")
    land = pipeline.calls()[0]
    assert land["argv"][-2:] == ["--as-of", "2013-04-01"]
    assert land["trigger"]["kind"] == "alert"
    assert land["trigger"]["reason"] == "it fell"
    assert land["trigger"]["conf"]["alert"] == {"fingerprint": "f1"}


def test_retraining_while_the_breaker_is_open_ends_green_in_a_branch_of_its_own(
    pipeline: Pipeline, run: Callable[..., Any]
) -> None:
    pipeline.tell(**{**decided("promote"), "admit": {"result": {**PINNED["result"], "verdict": "pause"}}})
    dag_run = run("retrain_on_alert")
    assert dag_run.state == "success"
    found = states(dag_run)
    assert (found["admit"], found["paused"]) == ("success", "success")
    others = ("prepare", "train", "evaluate", "register", "decide", "challenger_ready", "refused")
    assert {found[task] for task in others} == {"skipped"}
    assert [call["argv"][0] for call in pipeline.calls()] == ["land", "ingest", "validate", "admit"]


def test_retraining_rejected_data_stops_the_run_at_once(pipeline: Pipeline, run: Callable[..., Any]) -> None:
    pipeline.tell(**{**decided("promote"), "validate": {"code": 65, "error": "no rows"}})
    dag_run = run("retrain_on_alert")
    assert dag_run.state == "failed"
    assert states(dag_run)["validate"] == "failed"
    assert states(dag_run)["train"] == "upstream_failed"
    assert [call["argv"][0] for call in pipeline.calls()] == ["land", "ingest", "validate"]


@pytest.mark.parametrize(("verdict", "goes"), [("retrain", "drift_detected"), ("wait", "no_retraining")])
def test_monitor_policy_chooses_the_branch(
    pipeline: Pipeline, run: Callable[..., Any], verdict: str, goes: str
) -> None:
    steps = dict.fromkeys(("land", "ingest", "validate", "score", "drift"), PINNED)
    settled = {"result": {"as_of": "2013-05-01", "verdict": "go"}}
    said = {"as_of": "2013-05-01", "interval": "2013-04", "reasons": [], "summary": "words", "train_days": 90}
    policy = {**said, "asked_by": "monitor/x", "verdict": verdict, "page": "somewhere"}
    pipeline.tell(**steps, settle=settled, policy={"result": policy})
    dag_run = run("monitor", as_of="2013-05-01", start="2013-04-01")
    assert states(dag_run)[goes] == "success"
    if verdict == "retrain":
        (announced,) = [ti for ti in dag_run.get_task_instances() if ti.task_id == "drift_detected"]
        payload = announced.xcom_pull(task_ids="drift_detected", key="return_value")
        assert payload == {**said, "asked_by": "monitor/x"}
    (score,) = [call for call in pipeline.calls() if call["argv"][0] == "score"]
    assert score["argv"][-2:] == ["--start", "2013-04-01"]


def attempt(pipeline: Pipeline, again: timedelta | None = None, step: str = "land", **told: Any) -> None:
    """Execute one step outside a DAG run, to see which exception Airflow would get."""
    pipeline.tell(**{step: told})
    dag_run = SimpleNamespace(dag_id="d", run_id="r", run_type="manual", conf={}, data_interval_end=None)
    context: Any = {"dag_run": dag_run, "params": {}, "ti": None}
    with DAG("one"):
        operator = StepOperator(step=step, ask_again=again)
    context["ti"] = SimpleNamespace(task=operator, task_id=step, dag_id="d", run_id="r", try_number=1)
    operator.execute(context)


@pytest.mark.parametrize(
    ("told", "exception", "words"),
    [
        ({"code": 65, "error": "no rows"}, AirflowFailException, "land rejected the data: no rows"),
        ({"code": 75, "error": "server away"}, AirflowException, "land can be tried again: server away"),
        ({"code": 1, "error": "misspelt"}, AirflowFailException, r"land failed \(exit 1\): misspelt"),
        ({"signal": 9}, AirflowException, "land was killed"),
        ({"code": 0, "result": "gone"}, None, ""),
    ],
)
def test_step_exit_code_says_whether_to_try_again(
    pipeline: Pipeline, told: dict[str, Any], exception: type[Exception] | None, words: str
) -> None:
    if exception is None:
        attempt(pipeline, **told)
        return
    with pytest.raises(exception, match=words) as caught:
        attempt(pipeline, **told)
    assert type(caught.value) is exception


def test_step_that_is_no_stage_runs_here_whatever_runs_the_stages(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALLAST_STAGE_RUNNER", "container")
    monkeypatch.setenv("BALLAST_STAGE_IMAGE", f"sha256:{'a' * 64}")
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    attempt(pipeline, step="register", result="gone")
    with pytest.raises(AirflowException, match="No Docker engine answers"):
        attempt(pipeline, result="gone")
    assert [call["argv"][0] for call in pipeline.calls()] == ["register"], "the engine is asked first"


def test_land_has_a_connection_that_was_made_in_airflow(
    pipeline: Pipeline, run: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    made = Connection("shop", "postgres", host="db", login="me", password="hunter2", extra='{"sslmode": "require"}')
    with create_session() as session:
        session.add(made)
    pipeline.tell(**{**decided("promote"), "land": {**PINNED, "asks": ["ballast-connection shop"]}})
    assert run("retrain_on_alert").state == "success"
    with create_session() as session:
        session.query(Connection).filter_by(conn_id="shop").delete()
    land, *others = pipeline.calls()
    (answer,) = land["answers"]
    fields = {"conn_type": "postgres", "host": "db", "login": "me", "password": "hunter2"}
    assert json.loads(answer) == {**fields, "extra": {"sslmode": "require"}}
    assert "--ask-connection" in land["argv"]
    assert not [call for call in others if "--ask-connection" in call["argv"]]
    assert "hunter2" not in "".join([*land["argv"], *capfd.readouterr()])


def test_land_whose_connection_airflow_has_not_goes_on_without(pipeline: Pipeline) -> None:
    attempt(pipeline, asks=["ballast-connection nowhere"], result="gone")
    assert [call["answers"] for call in pipeline.calls()] == [[""]]


def test_step_other_than_land_is_given_no_connection(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[str]()
    monkeypatch.setattr(StepOperator, "_find", lambda _, conn_id: found.append(conn_id) or "")
    for step in ("train", "land"):
        attempt(pipeline, step=step, says="ballast-connection shop", result="gone")
    assert found == ["shop"]


def test_land_in_a_container_has_the_connection_in_its_environment(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = list[dict[str, Any]]()
    container = SimpleNamespace(image="i", run=lambda request: (requests.append(request), (0, []))[1])
    monkeypatch.setattr(ballast_container, "StageContainer", lambda context: container)
    monkeypatch.setenv("BALLAST_STAGE_RUNNER", "container")
    monkeypatch.setenv("AIRFLOW_CONN_SHOP", "postgres://me:hunter2@db")
    asks = ["ballast-connection shop", 'ballast-command {"env": {"BALLAST_RUN": "r"}}']
    attempt(pipeline, asks=asks, result={"cached": False})
    (held,) = (request["env"] for request in requests)
    assert json.loads(held.pop("AIRFLOW_CONN_SHOP"))["password"] == "hunter2"
    assert held == {"BALLAST_RUN": "r"}


def test_step_that_must_wait_asks_again_later_and_is_no_failure(pipeline: Pipeline) -> None:
    before = datetime.now(UTC)
    with pytest.raises(AirflowRescheduleException) as caught:
        attempt(pipeline, timedelta(seconds=20), result={"verdict": "wait"})
    assert timedelta(seconds=20) <= caught.value.reschedule_date - before < timedelta(seconds=60)
    attempt(pipeline, timedelta(seconds=20), result={"verdict": "go"})
    attempt(pipeline, None, result={"verdict": "wait"})


def context(run_type: str = DagRunType.MANUAL, extras: tuple[dict[str, Any], ...] = (), **params: Any) -> Any:
    """The parts of a task's context that choose dates and versions."""
    began = datetime(2013, 5, 1)
    found = [SimpleNamespace(extra=extra, timestamp=began + timedelta(hours=hour)) for hour, extra in enumerate(extras)]
    dag_run = SimpleNamespace(
        run_type=run_type, conf={}, data_interval_start=datetime(2013, 3, 1), data_interval_end=datetime(2013, 4, 1)
    )
    ti = SimpleNamespace(task=SimpleNamespace(upstream_task_ids=set()))
    asset = Asset("any", uri="ballast://any/")
    return {"dag_run": dag_run, "params": params, "ti": ti, "triggering_asset_events": {asset: list(reversed(found))}}


def test_as_of_scheduled_run_takes_its_data_interval() -> None:
    assert as_of_date(context(DagRunType.SCHEDULED)) == "2013-04-01"
    assert as_of_date(context(DagRunType.BACKFILL_JOB)) == "2013-04-01"


def test_as_of_run_by_hand_asks_the_clock() -> None:
    assert as_of_date(context(DagRunType.MANUAL)) is None


def test_as_of_coalesced_events_take_the_latest_date() -> None:
    extras = ({"as_of": "2013-06-01"}, {"as_of": "2013-05-01"})
    assert as_of_date(context(DagRunType.ASSET_TRIGGERED, extras)) == "2013-06-01"
    assert [event["as_of"] for event in events(context(DagRunType.ASSET_TRIGGERED, extras))] == [
        "2013-06-01",
        "2013-05-01",
    ]


def test_interval_start_without_a_date_is_the_month_before() -> None:
    assert interval_start(context(DagRunType.MANUAL, as_of="2013-05-01")) == ["--start", "2013-04-01"]
    assert interval_start(context(DagRunType.BACKFILL_JOB)) == ["--start", "2013-03-01"]
    assert interval_start(context(DagRunType.MANUAL, as_of="2013-05-01", start="2013-04-15")) == [
        "--start",
        "2013-04-15",
    ]
    assert date.fromisoformat(interval_start(context(DagRunType.MANUAL, as_of="2013-01-01"))[1]) == date(2012, 12, 1)


@pytest.mark.parametrize(
    ("interval", "first"), [("daily", "2013-04-30"), ("weekly", "2013-04-24"), ("monthly", "2013-04-01")]
)
def test_interval_start_without_a_date_is_one_interval_before(
    monkeypatch: pytest.MonkeyPatch, interval: str, first: str
) -> None:
    monkeypatch.setattr(ballast_calendar, "INTERVAL", interval)
    assert interval_start(context(DagRunType.MANUAL, as_of="2013-05-01")) == ["--start", first]


def test_train_days_of_coalesced_events_are_those_of_the_latest_as_of_date() -> None:
    extras = ({"as_of": "2013-06-01", "train_days": 90}, {"as_of": "2013-05-01", "train_days": 30})
    assert train_days(context(DagRunType.ASSET_TRIGGERED, extras)) == ["--train-days=90"]
    all_days = ({"as_of": "2013-06-01", "train_days": None},)
    assert train_days(context(DagRunType.ASSET_TRIGGERED, all_days)) == ["--train-days=all"]
    assert train_days(context(DagRunType.ASSET_TRIGGERED, ({"as_of": "2013-06-01", "version": 2},))) == []
    assert train_days(context(DagRunType.MANUAL)) == []


def test_challenger_newest_event_supersedes_the_others() -> None:
    extras = ({"version": 2, "record_sha256": "a"}, {"version": 3, "record_sha256": "b"})
    assert challenger(context(DagRunType.ASSET_TRIGGERED, extras)) == ["--version", "3", "--record-sha256", "b"]


def test_challenger_without_event_or_parameter_is_an_error_with_the_remedy() -> None:
    with pytest.raises(AirflowFailException, match="Give both parameters"):
        challenger(context(DagRunType.MANUAL))


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (
            {"chosen_options": ["Approve"], "params_input": {"note": "fine"}},
            ["--approved", "--by=ada", "--reason=fine"],
        ),
        ({"chosen_options": ["Reject"], "params_input": {"note": None}}, ["--by=ada", "--reason="]),
        (
            {"chosen_options": ["Approve"], "params_input": {}, "responded_by_user": {"id": "7", "name": " "}},
            ["--approved", "--by=7", "--reason="],
        ),
        ({"chosen_options": ["Reject"], "params_input": {}, "responded_by_user": None}, ["--by=", "--reason="]),
    ],
)
def test_answered_tells_what_was_chosen_by_whom_and_why(given: dict[str, Any], arguments: list[str]) -> None:
    asked = context(version=3, record_sha256="ab")
    asked["ti"].xcom_pull = lambda task_ids: {"responded_by_user": {"id": "1", "name": "ada"}, **given}
    assert answered(asked) == ["--version", "3", "--record-sha256", "ab", *arguments]


def test_way_back_names_a_version_only_if_a_person_did() -> None:
    assert way_back(context(reason="odd", to=None)) == ["--reason=odd"]
    assert way_back(context(reason="--odd", to=2)) == ["--reason=--odd", "--to=2"]


def test_trigger_keeps_reasons_of_all_events() -> None:
    found = trigger(context(DagRunType.ASSET_TRIGGERED, ({"summary": "worse in April"}, {"summary": "worse in May"})))
    assert found["kind"] == "drift"
    assert found["reason"] == "worse in April; worse in May"


def test_links_lead_to_the_page_in_mlflow_only_once_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    step = StepOperator(step="policy")
    mlflow, report = step.operator_extra_links
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    key: Any = None
    assert (mlflow.get_link(step, ti_key=key), report.get_link(step, ti_key=key)) == ("", "")
    step.result = {"run_id": "r", "experiment_id": "1", "page": "reports/monitor/2013-04-01..2013-05-01/index.html"}
    artifacts = "http://localhost:5000/#/experiments/1/runs/r/artifacts"
    assert mlflow.get_link(step, ti_key=key) == artifacts
    assert report.get_link(step, ti_key=key) == f"{artifacts}/monitor/2013-04-01..2013-05-01/index.html"
    step.result = {"model": "flights", "version": 3, "page": "reports/x.html"}
    assert report.get_link(step, ti_key=key) == ""
    monkeypatch.setenv("BALLAST_MLFLOW_URL", "https://mlflow.example.com")  # where people find it, not the tasks
    assert mlflow.get_link(step, ti_key=key) == "https://mlflow.example.com/#/models/flights/versions/3"


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, "plugins")
from ballast_operators import StepOperator

class Container:
    def on_kill(self):
        operator.log.info("Stopping docker container")
        os.write(2, b"asked to end")

class Written:
    "Where the log goes: whoever writes here holds its lock."
    signalled = False
    def write(self, text):
        if not Written.signalled:
            Written.signalled = True
            os.kill(os.getpid(), signal.SIGTERM)
        return len(text)
    def flush(self):
        pass

operator = StepOperator(step="train")
operator.container = Container()
signal.signal(signal.SIGTERM, lambda *_: operator.on_kill())
sys.stdout = Written()
operator.log.info("a line")
"""


def test_on_kill_while_a_line_is_being_logged_asks_the_container_to_end() -> None:
    command, env = [sys.executable, "-c", SIGNALLED], {**os.environ, "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO"}
    done = subprocess.run(command, cwd=DAGS.parent, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "asked to end" in done.stderr, done.stderr
