"""One turn of the loop, shown as it happens: train and promote a champion, watch it month by month, retrain.

``python -m pipelines.turn``. Every run it starts has an id made of its date: a second turn finds the runs of the first,
shows them, lets a failed one go on from where it failed, and follows one that still runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from pipelines import embedded, params, stack
from pipelines.dagruns import Airflow, Run, Task
from pipelines.errors import BallastError, exit_with
from pipelines.places import ROOT, var
from pipelines.state import State, moves

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

CRON = ("retrain_scheduled", "monitor")
BY_EVENT = ("retrain_on_drift", "promote")
MONTHS = 6  # that are monitored at most, if the policy waits
POLL_S = 0.3
LOG_POLL_S = 1.0
EVENT_WITHIN_S = 60.0
PATIENCE_S = 20.0  # a machine that trains may leave Airflow little to answer with
LAST_LINES = 12
SILENT = ("settle",)  # steps whose result tells a person nothing that the next lines do not
WIDTH = 100
OUTPUT = ("task.stdout", "task.stderr")  # printed, rather than logged: it may arrive late, amid Airflow's own words
VERDICTS = r"\b(PROMOTE|REFUSE|PAUSED|RETRAIN|WAIT|HOLD|MOVED|WORSE)\b"


class RunFailed(BallastError):
    """A task of a followed run failed for good; the message is the report for a person."""


@dataclass(frozen=True)
class Outcome:
    """A run that ended well, and what its tasks returned."""

    run: Run
    results: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """From being asked for to its end."""
        begun = self.run.queued or self.run.started
        return (self.run.ended - begun).total_seconds() if self.run.ended and begun else 0.0


class Screen:
    """What a person sees: one line per finished step, and at a terminal what is going on now."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(highlight=False)
        self.width = min(self.console.width, WIDTH) if self.console.is_terminal else WIDTH
        self._status: Status | None = None

    @property
    def live(self) -> bool:
        """Whether someone watches who wants to see what is going on."""
        return self.console.is_terminal

    def title(self, text: str) -> None:
        """Begin the lines of a run."""
        self._print(f"\n{text}", style="bold")

    def step(self, name: str, text: str, took: str = "") -> None:
        """Show a step that has ended: its name, what it says, how long it took."""
        room = self.width - 20
        lines = [part for line in text.splitlines() or [""] for part in wrap(line, room) or [""]]
        self._print(f"  {name:<9} {lines[0]:<{room}}{took:>8}".rstrip())
        for line in lines[1:]:
            self._print(f"  {'':<9} {line}")

    def fact(self, name: str, text: str) -> None:
        """Show a line of the summary, unbroken: an address or a path is there to be copied."""
        self._print(f"  {name:<9} {text}")

    def say(self, text: str) -> None:
        """Show a line as it is."""
        self._print(text)

    def doing(self, text: str) -> None:
        """Show at a terminal, until the next call, what is going on now."""
        if self.live:
            if self._status is None:
                self._status = self.console.status("", spinner="dots")
                self._status.start()
            self._status.update(f"[dim]{_escape(text[: self.width - 4])}[/dim]")

    def done(self) -> None:
        """Nothing is going on any more."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _print(self, text: str, style: str = "") -> None:
        from rich.text import Text

        line = Text(text, style=style)
        line.highlight_regex(VERDICTS, "bold yellow")
        line.highlight_regex(r"\bPROMOTE\b", "bold green")
        self.console.print(line, soft_wrap=True)


def turn() -> None:
    """Take one turn of the loop, beginning at the as-of date of params.yaml; show it and sum it up."""
    day, screen, airflow = params.as_of(ROOT / "params.yaml"), Screen(), embedded.airflow(PATIENCE_S)
    if State().clock() is None:
        State().set_clock(day)
    paused = {dag["dag_id"] for dag in airflow.dags() if dag["is_paused"]}
    for dag_id in (*CRON, *BY_EVENT):
        airflow.set_paused(dag_id, False)
    try:
        took = take(airflow, day, screen)
    except KeyboardInterrupt:
        screen.done()
        screen.say(f"\nNo longer watching; what runs goes on in Airflow: {airflow.url}")
        screen.say("`make run` watches again, `make down` ends everything.")
        sys.exit(130)
    finally:
        screen.done()
    for dag_id in paused & set(CRON):  # a turn that failed leaves them, so that clearing a task in Airflow works
        airflow.set_paused(dag_id, True)
    sum_up(screen, took)


def take(airflow: Airflow, day: date, screen: Screen) -> dict[str, float]:
    """Train as of ``day``, monitor the months after it until the policy says so, then retrain; return DAGs' seconds."""
    first = airflow.trigger("retrain_scheduled", f"turn__{day}", {"as_of": str(day)})
    took = {first.dag_id: retraining(airflow, first, f"as of {day}", screen), "monitor": 0.0}
    for _ in range(MONTHS):
        end, month = _month_after(day), f"{day:%Y-%m}"
        run = airflow.trigger("monitor", f"turn__{month}", {"start": str(day), "as_of": str(end)})
        screen.title(f"monitor · {day:%B %Y}" if day.day == 1 else f"monitor · {day} to {end}")
        monitored = follow(airflow, run, screen)
        took["monitor"] += monitored.seconds
        if "drift_detected" in monitored.results:
            for retrained in started_by(airflow, run, "retrain_on_drift"):
                why = f"as of {end} · because of monitor {month}"
                took[retrained.dag_id] = retraining(airflow, retrained, why, screen)
            break
        day = end
    return took


def retraining(airflow: Airflow, run: Run, why: str, screen: Screen) -> float:
    """Follow a retraining, and the promotion that it leads to if its challenger passes the gate; return its seconds."""
    before = f" · taken {ago(run.ended)}" if run.state == "success" and run.ended else ""
    screen.title(f"{run.dag_id} · {why}{before}")
    trained = follow(airflow, run, screen)
    promotions = started_by(airflow, run, "promote") if "challenger_ready" in trained.results else []
    return trained.seconds + sum(follow(airflow, promotion, screen).seconds for promotion in promotions)


def started_by(airflow: Airflow, run: Run, dag_id: str) -> list[Run]:
    """The runs of a DAG that an event of ``run`` started; the scheduler needs a moment to start them."""
    deadline = time.monotonic() + EVENT_WITHIN_S
    while True:
        found = airflow.started_by(run)
        if runs := [begun for begun in found or () if begun.dag_id == dag_id]:
            return runs
        _check_services()
        if found is not None and time.monotonic() > deadline:
            raise BallastError(
                f"{run.dag_id} announced its event, but {EVENT_WITHIN_S:.0f} s later no run of {dag_id} has begun: "
                "events for a DAG that is paused or does not import are lost. "
                f"Start {dag_id} in Airflow: {airflow.url}/dags/{dag_id}"
            )
        time.sleep(POLL_S)


def follow(airflow: Airflow, run: Run, screen: Screen) -> Outcome:
    """Show each step of a run as it ends, after letting a failed run go on; raise RunFailed if it fails."""
    if run.state == "failed":
        run = airflow.clear(run)
    results: dict[str, Any] = {}
    tries: set[tuple[str, int]] = set()
    progress = Progress(airflow, screen)
    while True:
        run = airflow.run(run.dag_id, run.run_id)  # before its tasks: those of a run that is over are as they ended
        tasks = airflow.tasks(run)
        for task in tasks:
            if task.state == "success" and task.task_id not in results:
                results[task.task_id] = airflow.result(run, task.task_id)
                _show(screen, task, results[task.task_id])
            elif task.state == "up_for_retry" and (task.task_id, task.try_number) not in tries:
                tries.add((task.task_id, task.try_number))
                screen.step(
                    task.task_id, f"try {task.try_number} failed, another follows: {cause(airflow.log(run, task))}"
                )
        if run.state == "failed":
            raise RunFailed(report(airflow, run, tasks))
        if run.over:
            return Outcome(run, results)
        progress.show(run, tasks)
        _check_services()
        time.sleep(POLL_S)


def _check_services() -> None:
    """Nothing goes on without the services: raise BallastError if one of them has ended."""
    if gone := stack.ended():
        logs = ", ".join(str(_near(var() / "logs" / f"{name}.log")) for name in gone)
        raise BallastError(
            f"Ended meanwhile: {', '.join(gone)}; see {logs}. `make run` starts it and goes on from here."
        )


class Progress:
    """What a run does just now, with the last line that its running task has said."""

    def __init__(self, airflow: Airflow, screen: Screen) -> None:
        self._airflow = airflow
        self._screen = screen
        self._said = ""
        self._asked = 0.0

    def show(self, run: Run, tasks: list[Task]) -> None:
        """Show it at a terminal; elsewhere nothing is asked."""
        if not self._screen.live:
            return
        running = [task for task in tasks if task.state == "running"]
        if not running:
            self._said = ""
            self._screen.doing(_waiting(run, tasks))
            return
        task = running[0]
        if task.seconds > LOG_POLL_S and time.monotonic() - self._asked > LOG_POLL_S:
            self._asked = time.monotonic()
            self._said = (said(self._airflow.log(run, task)) or [""])[-1]
        words = self._said.removeprefix(task.task_id).strip()
        self._screen.doing(f"{task.task_id:<9} {words}  {clock(task.seconds)}")


def said(events: list[dict[str, Any]]) -> list[str]:
    """What the step itself said in a task's log: all that is outside the groups in which Airflow speaks of itself."""
    lines: list[str] = []
    airflows = False
    for event in events:
        text = str(event.get("event", "")).rstrip()
        if text.startswith("::"):
            airflows = text.startswith("::group::")
        elif text and (not airflows or event.get("logger") in OUTPUT) and "error_detail" not in event:
            lines.append(text)
    return lines


def cause(events: list[dict[str, Any]]) -> str:
    """Why a task failed, in words: its exception's message, else the last error it said."""
    raised = [detail.get("exc_value") for event in events for detail in event.get("error_detail") or ()]
    errors = [line.removeprefix("error: ") for line in said(events) if line.startswith("error: ")]
    words = [*(said(events) or ["its log says nothing"])[-1:], *errors[-1:], *filter(None, raised[:1])]
    return str(words[-1])


def report(airflow: Airflow, run: Run, tasks: list[Task]) -> str:
    """What a person needs of a failed run: the task, the cause, the last lines, where the rest is, what to do."""
    failed = [task for task in tasks if task.state == "failed"]
    if not failed:
        return f"{run.dag_id} failed, though none of its tasks did. See {airflow.page(run)}"
    task = failed[0]
    events = airflow.log(run, task)
    why = cause(events)
    files = [Path(event["event"]) for event in events if str(event.get("event", "")).endswith(".log")]
    return "\n".join(
        [
            why if why.startswith(task.task_id) else f"{task.task_id} failed: {why}",
            "",
            *(f"    {line[:200]}" for line in said(events)[-LAST_LINES:]),
            "",
            f"  run       {run.dag_id} · {run.run_id} · try {task.try_number}",
            f"  log       {_near((files or [var() / 'airflow' / 'logs'])[0])}",
            f"  Airflow   {airflow.page(run, task)}",
            "  then      `make run` goes on from here: what is done is kept, and the services stay up",
        ]
    )


def sum_up(screen: Screen, took: Mapping[str, float]) -> None:
    """The end of a turn: who is champion, where to look, how to stop."""
    state = State()
    champion, moved = state.champion(), moves(state.ledger())
    parts = " · ".join(f"{dag_id} {clock(seconds)}" for dag_id, seconds in took.items())
    screen.say("")
    if champion is None:
        screen.fact("champion", "none: no challenger has passed the gate yet")
    else:
        screen.fact(
            "champion", f"v{champion} since {ago(datetime.fromisoformat(moved[-1].at))}     ballast explain {champion}"
        )
    screen.fact("took", f"{clock(sum(took.values()))}: {parts}")
    screen.fact("Airflow", f"{embedded.airflow_url()}  (user and password: {_near(embedded.password_file())})")
    screen.fact("MLflow", embedded.mlflow_url())
    if (index := var() / "reports" / "index.html").exists():
        screen.fact("reports", str(_near(index)))
    screen.fact("stop", "make down")


def ago(at: datetime) -> str:
    """How long ago that was, in the unit that a person would use."""
    seconds = (datetime.now(UTC) - at).total_seconds()
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def clock(seconds: float) -> str:
    """Seconds as a person reads them."""
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60} s"


def _show(screen: Screen, task: Task, result: Any) -> None:
    """One line for a step; branches and announcements have none, and neither has waiting for what was shown before."""
    if isinstance(result, dict) and "seconds" in result and task.task_id not in SILENT:
        screen.step(task.task_id, str(result["summary"]), "cached" if result.get("cached") else clock(task.seconds))


def _waiting(run: Run, tasks: list[Task]) -> str:
    retried = [task.task_id for task in tasks if task.state == "up_for_retry"]
    waiting = [task.task_id for task in tasks if task.state == "up_for_reschedule"]
    queued = [task.task_id for task in tasks if task.state in ("queued", "scheduled")]
    if any(task.state == "awaiting_input" for task in tasks):
        return "approve   waits for a person: Airflow, Required Actions; `ballast status` has the address"
    if retried:
        return f"{retried[0]:<9} waits before its next try"
    if waiting:
        return f"{waiting[0]:<9} waits for a retraining that is under way"
    return f"{queued[0]:<9} is about to begin" if queued else f"{run.dag_id} is {run.state}"


def _month_after(day: date) -> date:
    """The same day a month later; a month's last day stays within the month."""
    first = (day.replace(day=1) + timedelta(days=31)).replace(day=1)
    last = (first + timedelta(days=31)).replace(day=1) - timedelta(days=1)
    return min(first.replace(day=min(day.day, last.day)), last)


def _near(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    exit_with(turn)
