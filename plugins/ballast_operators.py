"""What Airflow needs to run a step: a process, its output, its exit code and one line of JSON.

Nothing of the pipeline is imported here: the boundary is the process ``python -m pipelines.run``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Asset, BaseOperator, BaseOperatorLink, BranchMixIn, Connection, Context
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowNotFoundException,
    AirflowRescheduleException,
)

from ballast_calendar import interval_before

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey

    from ballast_container import StageContainer

PROJECT = Path(__file__).resolve().parent.parent
RESULT = "ballast-result "
COMMAND = "ballast-command "
CONNECTION = "ballast-connection "
STAGES = ("land", "ingest", "validate", "prepare", "train", "evaluate")  # what may run in a container
EXIT_DATA_REJECTED = 65
EXIT_TRY_AGAIN = 75
LAST_LINES = 8

Arguments = Sequence[str] | Callable[[Context], Sequence[str]]


class MlflowLink(BaseOperatorLink):
    """A button on the task page: what this step left in MLflow."""

    name = "MLflow"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The page of the step's model version or run, empty until the step has ended well."""
        server = os.environ.get("BALLAST_MLFLOW_URL") or os.environ.get("MLFLOW_TRACKING_URI", "")
        result = getattr(operator, "result", {})
        if not server.startswith("http"):
            return ""
        if "run_id" in result and "experiment_id" in result:
            return f"{server}/#/experiments/{result['experiment_id']}/runs/{result['run_id']}/artifacts"
        if "model" in result and result.get("version"):
            return f"{server}/#/models/{result['model']}/versions/{result['version']}"
        return ""


class ReportLink(BaseOperatorLink):
    """A button on the task page: the page that a person reads, in MLflow's view of the run's artifacts."""

    name = "Report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The page that the step has logged to MLflow; empty where it has none."""
        run, page = MlflowLink().get_link(operator, ti_key=ti_key), getattr(operator, "result", {}).get("page")
        return f"{run}/{page.removeprefix('reports/')}" if page and run.endswith("/artifacts") else ""


class StepOperator(BaseOperator, BranchMixIn):
    """Run one step of the pipeline in the workspace of this DAG run; its result is the XCom.

    With ``branches`` the step's verdict chooses the task that follows. With ``ask_again`` the verdict ``wait`` has the
    step run again after so long, which holds no slot meanwhile and is no retry. A rejection of the data (exit 65) and a
    bug fail at once; a server that is away (75) and a killed step are tried again. Where ``BALLAST_STAGE_RUNNER`` is
    ``container``, the step of a DVC stage asks for a container for the stage's command. `land` asks for the connection
    that its source names, and has it in its environment.
    """

    template_fields = ("step",)
    inherits_from_skipmixin = True
    ui_color = "#eef4fb"

    def __init__(
        self,
        *,
        step: str,
        arguments: Arguments = (),
        branches: Mapping[str, str] | None = None,
        ask_again: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(task_id=kwargs.pop("task_id", step), **kwargs)
        self.step = step
        self.arguments = arguments
        self.branches = branches
        self.ask_again = ask_again
        self.operator_extra_links = (MlflowLink(), ReportLink())
        self.result: dict[str, Any] = {}
        self.process: subprocess.Popen[str] | None = None
        self.container: StageContainer | None = None
        self.connection: dict[str, str] = {}

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the step; return its result: names, hashes, versions and verdicts, never rows."""
        if self.step in STAGES and os.environ.get("BALLAST_STAGE_RUNNER") == "container":
            from ballast_container import StageContainer

            self.container = StageContainer(context=context)
        arguments = self.arguments(context) if callable(self.arguments) else self.arguments
        code, lines = self._stream(self._command(context, arguments), self._environment(context))
        results = [line for line in lines if line.startswith(RESULT)]
        if code or not results:
            self._fail(code, [line for line in lines if line.strip()])
        self.result = json.loads(results[-1].removeprefix(RESULT))
        if self.container and not self.result["cached"]:
            self.result["image"] = self.container.image
        if self.ask_again and self.result["verdict"] == "wait":
            raise AirflowRescheduleException(datetime.now(UTC) + self.ask_again)  # type: ignore[no-untyped-call]
        if self.branches:
            # Airflow leaves execute by an exception where it skips tasks: what is returned would be lost.
            context["ti"].xcom_push(key="return_value", value=self.result)
            self.do_branch(context, self.branches[self.result["verdict"]])
        return self.result

    def on_kill(self) -> None:
        """Pass SIGTERM on: the step has until Airflow's own kill to write its checkpoint.

        By a thread: the signal may have come while this one held the log's lock, and ending a container is logged.
        """
        Thread(target=self._pass_on).start()

    def _pass_on(self) -> None:
        if self.container:
            self.container.on_kill()
        self._terminate()

    def _terminate(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def _command(self, context: Context, arguments: Sequence[str]) -> list[str]:
        run = context["dag_run"]
        command = [sys.executable, "-m", "pipelines.run", self.step, "--dag-id", run.dag_id, "--run-id", run.run_id]
        command += ["--ask-connection"] if self.step == "land" else []
        as_of = as_of_date(context)
        return [*command, *(["--as-of", as_of] if as_of else []), *train_days(context), *arguments]

    def _environment(self, context: Context) -> dict[str, str]:
        return {**os.environ, "PYTHONUNBUFFERED": "1", "BALLAST_TRIGGER": json.dumps(trigger(context), default=str)}

    def _stream(self, command: list[str], env: dict[str, str]) -> tuple[int, list[str]]:
        """Run a command in its own process group, its output line by line in the task's log."""
        last: deque[str] = deque(maxlen=LAST_LINES)
        output: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        text: dict[str, Any] = {"text": True, "errors": "replace"}
        with subprocess.Popen(command, cwd=PROJECT, env=env, start_new_session=True, **output, **text) as self.process:
            try:
                for line in self.process.stdout or ():
                    if self.container and line.startswith(COMMAND):
                        last.extend(self._contain(self.container, json.loads(line.removeprefix(COMMAND))))
                        continue
                    if self.step == "land" and line.startswith(CONNECTION):
                        self._answer(self._find(line.removeprefix(CONNECTION).strip()))
                        continue
                    last.append(line.rstrip("\n"))
                    if not line.startswith(RESULT):
                        self.log.info("%s", last[-1])
                self.process.wait()
            finally:  # a timeout raises in the loop: the step must not go on without us
                self._terminate()
        return self.process.returncode, list(last)

    def _contain(self, container: StageContainer, request: Mapping[str, Any]) -> list[str]:
        """Run what the step asks for in a container and tell it the exit code; return what a failure said."""
        code, said = container.run({**request, "env": {**request["env"], **self.connection}})
        self._answer(str(code))
        return said

    def _find(self, conn_id: str) -> str:
        """A connection as JSON, wherever Airflow has it: its environment, a secrets backend or its database."""
        try:
            found = Connection.get(conn_id).as_json()
        except AirflowNotFoundException:
            return ""
        self.connection = {f"AIRFLOW_CONN_{conn_id.upper()}": found}
        return str(found)

    def _answer(self, line: str) -> None:
        with suppress(BrokenPipeError):  # the step was killed: its own exit code says so
            os.write(self.process.stdin.fileno(), f"{line}\n".encode())  # type: ignore[union-attr]

    def _fail(self, code: int, lines: list[str]) -> None:
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        cause = (errors or lines or ["it said nothing"])[-1]
        if code == EXIT_DATA_REJECTED:
            raise AirflowFailException(f"{self.step} rejected the data: {cause}")
        if code == EXIT_TRY_AGAIN:
            raise AirflowException(f"{self.step} can be tried again: {cause}")
        if code < 0 or code > 128:
            why = f": {errors[-1]}" if errors else ";"
            raise AirflowException(f"{self.step} was killed (exit {code}){why} A retry goes on from what is stored.")
        raise AirflowFailException(f"{self.step} failed (exit {code}): {cause}")


class ApproveOperator(HITLOperator):
    """Ask a person, in the words and for the hours that the step ``review`` gives; no answer in time is a refusal."""

    APPROVE = "Approve"
    REJECT = "Reject"

    def __init__(self, *, review: str, **kwargs: Any) -> None:
        super().__init__(subject="", options=[self.APPROVE, self.REJECT], defaults=self.REJECT, **kwargs)
        self.review = review

    def execute(self, context: Context) -> Any:
        """Show the form and make way: a waiting run holds no slot."""
        asked = context["ti"].xcom_pull(task_ids=self.review)
        self.subject, self.body = asked["subject"], asked["body"]
        self.response_timeout = timedelta(hours=asked["hours"])
        return super().execute(context)


class AnnounceOperator(BaseOperator):
    """Emit an asset event that carries the named parts of an earlier step's result."""

    ui_color = "#e8f6ec"

    def __init__(self, *, asset: Asset, step: str, keys: Sequence[str], **kwargs: Any) -> None:
        super().__init__(outlets=[asset], **kwargs)
        self.asset = asset
        self.step = step
        self.keys = keys

    def execute(self, context: Context) -> dict[str, Any]:
        """Attach the payload to the event that Airflow emits when this task succeeds."""
        result = context["ti"].xcom_pull(task_ids=self.step)
        payload = {key: result[key] for key in self.keys}
        context["outlet_events"][self.asset].extra = payload
        return payload


def events(context: Context) -> list[dict[str, Any]]:
    """The payloads of the asset events that started this run, oldest first; several may have coalesced."""
    found = [event for group in (context.get("triggering_asset_events") or {}).values() for event in group]
    return [dict(event.extra) for event in sorted(found, key=lambda event: event.timestamp)]


def as_of_date(context: Context) -> str | None:
    """The as-of date of the run, or None: then the clock is asked.

    In this order: what an earlier step of the run pinned, the run's parameter, the events that started it, the data
    interval of a scheduled or backfilled run.
    """
    ti, run = context["ti"], context["dag_run"]
    for task_id in ti.task.upstream_task_ids:
        if pinned := (ti.xcom_pull(task_ids=task_id) or {}).get("as_of"):
            return str(pinned)
    if given := context["params"].get("as_of"):
        return str(given)
    if dates := [str(event["as_of"]) for event in events(context) if "as_of" in event]:
        return max(dates)
    if run.run_type in ("scheduled", "backfill") and run.data_interval_end:
        return str(run.data_interval_end.date())
    return None


def train_days(context: Context) -> list[str]:
    """``--train-days`` of a retraining: what the newest of the events that started it asks for, if one does."""
    asked = [event for event in events(context) if "train_days" in event]
    newest = sorted(asked, key=lambda event: str(event["as_of"]))[-1:]
    return [f"--train-days={event['train_days'] or 'all'}" for event in newest]


def interval_start(context: Context) -> list[str]:
    """``--start`` of a monitored interval: by the parameter, the data interval, else one before the as-of date."""
    run, given = context["dag_run"], context["params"].get("start")
    if not given and run.run_type in ("scheduled", "backfill") and run.data_interval_start:
        given = run.data_interval_start.date().isoformat()
    if not given:
        given = interval_before(date.fromisoformat(as_of_date(context) or "")).isoformat()
    return ["--start", given]


def challenger(context: Context) -> list[str]:
    """Which version to promote: the parameters', else the newest of the events (a newer one supersedes the others)."""
    given = {key: context["params"].get(key) for key in ("version", "record_sha256")}
    chosen = given if any(given.values()) else (events(context) or [{}])[-1]
    if not (chosen.get("version") and chosen.get("record_sha256")):
        raise AirflowFailException("No version to promote. Give both parameters, or let a retraining ask.")
    return ["--version", str(chosen["version"]), "--record-sha256", str(chosen["record_sha256"])]


def answered(context: Context) -> list[str]:
    """What a person chose in the form, who that was, and why; nobody where the time was up."""
    given = context["ti"].xcom_pull(task_ids="approve")
    user, note = given["responded_by_user"] or {}, given["params_input"].get("note") or ""
    by = (user.get("name") or "").strip() or user.get("id", "")
    chosen = ["--approved"] if given["chosen_options"] == [ApproveOperator.APPROVE] else []
    return [*challenger(context), *chosen, f"--by={by}", f"--reason={note}"]


def way_back(context: Context) -> list[str]:
    """Why the champion goes, and to which version, if a person has named one."""
    reason, to = context["params"]["reason"], context["params"].get("to")
    return [f"--reason={reason}", *([f"--to={to}"] if to else [])]


def trigger(context: Context) -> dict[str, Any]:
    """Who or what started this run, for the records."""
    run = context["dag_run"]
    kinds = {"scheduled": "schedule", "backfill": "schedule", "asset_triggered": "drift"}
    conf = dict(run.conf or {})
    run_type = str(getattr(run.run_type, "value", run.run_type))
    kind = "alert" if conf.get("alert") else kinds.get(run_type, "person")
    reason = context["params"].get("reason") or "; ".join(str(event.get("summary")) for event in events(context))
    return {"kind": kind, "reason": reason or None, "conf": conf, "events": events(context)}
