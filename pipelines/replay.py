"""Replay: what retraining policies would have done with the past, by the very steps and decisions of the DAGs.

Each policy has a world of its own, ``var/replay/NAME/POLICY``: a clone of the project whose committed params.yaml has
that policy, and a ``BALLAST_VAR`` with the ledger, the registry (MLflow's file, no server), workspaces and results.
Only the landing store and the DVC cache are everybody's: a training that another policy has done comes from the cache.

The first champion is trained as of the first day. Then, for each month: the monitor at its end, and where the policy
says so, a retraining and its promotion before the next month begins. Killed at any moment, the same call goes on: a
step that has ended is not run again.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from pipelines import params, places, rows, worth
from pipelines.errors import EXIT_DATA_REJECTED, EXIT_TRY_AGAIN, BallastError, DataRejected, TryAgain
from pipelines.files import read_json, whole_folder, write_json
from pipelines.prepare import PrepareParams
from pipelines.processes import die_with_parent
from pipelines.run import RESULT
from pipelines.schema import Declared
from pipelines.workspace import git, share_cache, uncommitted

LOOK = ("land", "ingest", "validate")
MONITOR = ("settle", *LOOK, "score", "drift", "policy")
RETRAIN = (*LOOK, "admit", "prepare", "train", "evaluate", "register", "decide")
"""The steps in the order of the DAGs; a test holds them to it."""

# of triggers that a policy may be left with alone
KINDS = ("drift", "performance", "estimated_performance", "avoidable_loss")
POLICIES = ("never", "schedule", *KINDS, "params")
DETECTED = ("as_of", "interval", "reasons", "summary", "train_days", "asked_by")
READY = ("version", "record_sha256", "as_of", "summary")
"""What the events of a monitor's and of a retraining's run carry; likewise."""

UNLIMITED = 1000  # retrainings and days: a yardstick is held back by no budget

RETRIES = 3  # of a step that was killed, as the DAGs have them

Window = tuple[date, date]  # first day, day after the last
Result = dict[str, Any]


class Killed(BallastError):
    """A step was ended by a signal, from outside or by a library's own abort: it may go on from what is stored."""


class Show(NamedTuple):
    """How to tell a person: a line that stays, and what is going on just now."""

    say: Callable[[str], object]
    doing: Callable[[int, str], object]


@dataclass(frozen=True)
class Plan:
    """What determines a replay: the commit, and the months from ``first`` to the one that ends at ``end``."""

    commit: str
    first: date
    end: date

    @property
    def name(self) -> str:
        """Another commit or other months are another replay."""
        return f"{self.first:%Y-%m}..{self.end - timedelta(days=1):%Y-%m}-{self.commit[:12]}"

    @property
    def windows(self) -> list[Window]:
        """The months."""
        found, day = [], self.first
        while day < self.end:
            found.append((day, after := _next_month(day)))
            day = after
        return found


@dataclass(frozen=True)
class World:
    """All that one policy has to itself, and how steps run in it."""

    policy: str
    root: Path

    @property
    def project(self) -> Path:
        """The clone that the runs of this policy begin from."""
        return self.root / "project"

    def workspace(self, dag_id: str, as_of: date) -> Path:
        """Where the run of a DAG as of a date works."""
        return self.root / "runs" / dag_id / _run_id(as_of)

    def step(
        self, dag_id: str, as_of: date, step: str, *arguments: str, trigger: Mapping[str, Any] | None = None
    ) -> Result:
        """Run a step as Airflow does and keep its result; one that has ended before is not run again."""
        kept = self.root / "results" / dag_id / _run_id(as_of) / f"{step}.json"
        if not kept.exists():
            for last in (*[False] * RETRIES, True):
                try:
                    write_json(kept, self._run(dag_id, as_of, step, arguments, trigger or {"kind": "schedule"}))
                    break
                except Killed:
                    if last:
                        raise
        result: Result = read_json(kept)
        return result

    def _run(self, dag_id: str, as_of: date, step: str, arguments: Sequence[str], trigger: Mapping[str, Any]) -> Result:
        """Raise what the step's exit code means if it fails. It dies with us."""
        command = [sys.executable, "-m", "pipelines.run", step, "--dag-id", dag_id, "--run-id", _run_id(as_of)]
        command += ["--as-of", str(as_of), *arguments]
        log = self.root / "logs" / dag_id / _run_id(as_of) / f"{step}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("w+") as said:
            done = subprocess.run(
                command,
                cwd=self.project,
                env=self._environment(trigger),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
                check=False,
            )
            said.seek(0)
            lines = [line for line in said.read().splitlines() if line.strip()]
        if done.returncode or not lines or not lines[-1].startswith(RESULT):
            raise _failure(f"{self.policy}: {step} of {dag_id} as of {as_of}", done.returncode, lines, log)
        result: Result = json.loads(lines[-1].removeprefix(RESULT))
        return {**result, "seconds": round(time.monotonic() - began, 2)}  # what the process took to begin as well

    def _environment(self, trigger: Mapping[str, Any]) -> dict[str, str]:
        """The policy's own state, and what is shared; no word of the servers and the run that we may be in."""
        ours = ("BALLAST_", "MLFLOW_", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return env | {
            "PYTHONUNBUFFERED": "1",
            "BALLAST_VAR": str(self.root),
            "BALLAST_LANDING": str(places.landing()),
            "BALLAST_SOURCE": str((places.ROOT / places.source()).resolve()),
            "BALLAST_KEEP_RUNS": str(sys.maxsize),  # what a month has left is read again in the end
            "BALLAST_TRIGGER": json.dumps(trigger),
        }


def replay(first: date, last: date, policies: Sequence[str], show: Show) -> dict[str, Any]:
    """Replay the months of ``first`` to ``last``, both included, under each policy, and write what it was worth.

    Raises BallastError, with the place of its log, if a step fails; the same call then goes on from there.
    """
    if last < first:
        raise BallastError(f"--to must not lie before --from (found {first:%Y-%m} to {last:%Y-%m}).")
    if unknown := [policy for policy in policies if policy not in POLICIES]:
        raise BallastError(f"--policy must be one of {', '.join(POLICIES)} (found {unknown[0]}).")
    plan = Plan(git(places.ROOT, "rev-parse", "HEAD"), first.replace(day=1), _next_month(last))
    home = places.var() / "replay" / plan.name
    if changed := uncommitted(places.ROOT):
        show.say("not part of this replay (uncommitted in the checkout): " + ", ".join(changed))
    with _alone(home):
        worlds = [_world(home, plan, policy) for policy in dict.fromkeys(policies)]
        steps = len(plan.windows) + 2  # of the bar: the first champion, the months, the labels
        played = {world.policy: _played(world, plan, show, n * steps) for n, world in enumerate(worlds)}
        show.doing(len(worlds) * steps, "table and figure")
        return worth.publish(home, plan.commit, played)


def overridden(section: Mapping[str, Any], policy: str, windows: Sequence[Window]) -> dict[str, Any]:
    """The section ``policy`` of params.yaml as a replayed policy has it.

    ``never`` has no trigger, ``params`` is the section as it is, and the name of a kind leaves the triggers of that
    kind alone. ``schedule`` retrains at the end of each window; neither a pause nor a budget holds it back, as it is
    what the others are measured by.
    """
    if policy == "params":
        return dict(section)
    if policy == "never":
        return {**section, "triggers": []}
    if policy == "schedule":
        shortest = min((end - start).days for start, end in windows)
        budget = {"retrainings": UNLIMITED, "days": UNLIMITED}
        trigger = {"kind": "schedule", "every_days": shortest}
        return {**section, "triggers": [trigger], "cooldown_days": 0, "budget": budget}
    triggers = [trigger for trigger in section["triggers"] if trigger["kind"] == policy]
    if not triggers:
        found = ", ".join(trigger["kind"] for trigger in section["triggers"]) or "none"
        raise BallastError(f"`policy.triggers` of params.yaml has none of the kind {policy} (found {found}). Add one.")
    return {**section, "triggers": triggers}


# --- one policy


def _played(world: World, plan: Plan, show: Show, before: int) -> worth.Played:
    """Play all windows of one policy; ``before``: how many steps of the bar other policies have taken."""

    def doing(done: int, text: str) -> None:
        show.doing(before + done, f"{world.policy} · {text}")

    doing(0, f"first champion as of {plan.first}")
    first = _retrain(world, "retrain_scheduled", plan.first, {"kind": "schedule"})
    if first.outcome != "promote":
        why = f"{world.policy}: no champion as of {plan.first} ({first.words})"
        raise BallastError(f"{why}. Begin where the gate lets the first one in.")
    months = []
    for number, (start, end) in enumerate(plan.windows, 1):
        doing(number, f"{start:%Y-%m}")
        months.append(_month(world, start, end, last=end == plan.end))
        show.say(months[-1].line(world.policy))
    doing(len(months) + 1, "all labels")
    labels = _labels(world, plan.end)
    months = [month.measured(_predictions(world, month.end), labels) for month in months]
    return worth.Played(first, months, _seconds(world), _cached_trainings(world))


def _month(world: World, start: date, end: date, last: bool) -> worth.Month:
    """Monitor a month, and retrain at its end if the policy says so; after the last one nothing would serve."""
    found: dict[str, Result] = {}
    for step in MONITOR:
        found[step] = world.step("monitor", end, step, *_arguments(step, start))
        if step == "settle" and found[step]["verdict"] == "wait":  # one after another, nothing is ever under way
            raise BallastError(f"{world.policy}: monitor as of {end} would wait for ever: {found[step]['summary']}")
    verdict = read_json(world.workspace("monitor", end) / "data" / "drift" / "verdict.json")
    decision, retraining = found["policy"], None
    if decision["verdict"] == "retrain" and not last:
        event = {name: decision[name] for name in DETECTED}
        trained_on = f"--train-days={event['train_days'] or 'all'}"
        retraining = _retrain(world, "retrain_on_drift", end, _by_event(event), trained_on)
    return worth.Month(
        start=start,
        end=end,
        champion=found["score"]["version"],
        verdict=decision["verdict"],
        words=decision["summary"],
        estimated_log_loss=(verdict.get("estimate") or {}).get("log_loss"),
        retraining=retraining,
    )


def _arguments(step: str, start: date) -> list[str]:
    return ["--start", str(start)] if step == "score" else []


def _retrain(world: World, dag_id: str, as_of: date, trigger: Mapping[str, Any], *arguments: str) -> worth.Retraining:
    """From the source to a verdict on the challenger, and its promotion if the gate lets it pass."""
    found: dict[str, Result] = {}
    for step in RETRAIN:
        found[step] = world.step(dag_id, as_of, step, *arguments, trigger=trigger)
        if step == "admit" and found[step]["verdict"] == "pause":
            return worth.Retraining(as_of, "paused", found[step]["summary"])
    decided = found["decide"]
    outcome = decided["verdict"]
    if outcome == "promote":
        challenger = ["--version", str(decided["version"]), "--record-sha256", decided["record_sha256"]]
        event = {name: decided[name] for name in READY}
        promoted = world.step("promote", as_of, "promote", *challenger, trigger=_by_event(event))
        outcome = "promote" if promoted["verdict"] == "promoted" else promoted["verdict"]
    return worth.Retraining(as_of, outcome, decided["summary"], decided["version"], found["train"]["digest"])


def _by_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """What started a run that an asset's event has started, as the operator tells its steps."""
    return {"kind": "drift", "reason": event["summary"], "conf": {}, "events": [event]}


def _labels(world: World, end: date) -> pd.DataFrame:
    """``key`` and ``label`` of all rows, as they are known once those of the last day have arrived."""
    settings = world.project / "params.yaml"
    as_of = end + timedelta(days=params.load(settings, "prepare", PrepareParams).label_delay_days)
    for step in LOOK:
        world.step("labels", as_of, step)
    root = world.workspace("labels", as_of)
    sql = (root / "pipelines" / "prepare.sql").read_text(encoding="utf-8")
    tables, quarantine = root / "data" / "ingest" / "tables", root / "data" / "validate" / "quarantine"
    return rows.select(tables, quarantine, sql, params.load(settings, "land", Declared).tables)[["key", "label"]]


def _predictions(world: World, end: date) -> pd.DataFrame:
    """``key`` and ``probability`` of the rows of the month that ends at ``end``, by the champion that served it."""
    return pd.read_parquet(world.workspace("monitor", end) / "data/score/predictions.parquet")[["key", "probability"]]


def _seconds(world: World) -> dict[str, float]:
    """The seconds that went into each step, all its runs together."""
    total: Counter[str] = Counter()
    for kept in world.root.glob("results/*/*/*.json"):
        total[kept.stem] += read_json(kept)["seconds"]
    return {step: round(seconds, 1) for step, seconds in total.most_common()}


def _cached_trainings(world: World) -> int:
    return sum(read_json(kept)["cached"] for kept in world.root.glob("results/*/*/train.json"))


# --- its world


def _world(home: Path, plan: Plan, policy: str) -> World:
    """Make a policy's world, or find it as it was left."""
    world = World(policy, home / policy)
    if not world.project.exists():
        with whole_folder(world.project) as part:
            # Not shared with the origin: a commit that a rebase there leaves behind may be gone the next day.
            git(places.ROOT, "clone", "--quiet", "--no-checkout", str(places.ROOT), str(part))
            git(part, "-c", "advice.detachedHead=false", "checkout", "--quiet", plan.commit)
            share_cache(places.ROOT, part)
            _commit_policy(part, policy, plan.windows)
    return world


def _commit_policy(project: Path, policy: str, windows: Sequence[Window]) -> None:
    """Commit params.yaml with another policy in it, and nobody asked to approve; the rest of it stays as it is."""
    file = project / "params.yaml"
    text = file.read_text(encoding="utf-8")
    section = yaml.safe_load(text)["policy"]
    written = re.sub(r"(?m)^(  approval:) \S+", r"\1 never", text)
    if (other := overridden(section, policy, windows)) != section:
        policy_text = yaml.safe_dump({"policy": other}, sort_keys=False) + "\n"
        written = re.sub(r"(?ms)^policy:.*?(?=^\S|\Z)", lambda _: policy_text, written)
    if written == text:
        return
    file.write_text(written, encoding="utf-8")
    identity = ("-c", "user.name=ballast replay", "-c", "user.email=replay@localhost", "-c", "commit.gpgsign=false")
    git(project, *identity, "commit", "--quiet", "--no-verify", "-am", f"Replay the policy {policy}")


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Hold the replay alone; raise TryAgain while another process plays it."""
    home.mkdir(parents=True, exist_ok=True)
    held = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise TryAgain(f"This replay is being played by another process. Wait for it to end: {home}") from None
    finally:
        os.close(held)


def _failure(what: str, code: int, lines: Sequence[str], log: Path) -> BallastError:
    said = [line for line in lines if line.startswith("error: ")] or lines or ["it said nothing"]
    kind = {EXIT_DATA_REJECTED: DataRejected, EXIT_TRY_AGAIN: TryAgain}.get(code, BallastError)
    if code < 0 or code > 128:
        kind = Killed
    cause = said[-1].removeprefix("error: ")
    return kind(f"{what} failed (exit {code}): {cause} Its log: {log}. The same call goes on from here.")


def _run_id(as_of: date) -> str:
    return f"replay-{as_of}"


def _next_month(day: date) -> date:
    return (day.replace(day=1) + timedelta(days=31)).replace(day=1)


# --- for a person


def month(text: str) -> date:
    """The first day of a month such as 2013-04."""
    try:
        return date.fromisoformat(f"{text}-01")
    except ValueError:
        raise BallastError(f"A month must look like 2013-04 (found {text!r}).") from None


@contextmanager
def watched(first: date, last: date, policies: Sequence[str]) -> Iterator[Show]:
    """A bar at a terminal, on stderr, beneath a line for each month that has been played; elsewhere the lines alone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield Show(lambda text: print(text, file=sys.stderr, flush=True), lambda done, text: None)
        return
    columns = TextColumn("replay"), BarColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as progress:
        months = (last.year - first.year) * 12 + last.month - first.month + 1
        task = progress.add_task("", total=len(policies) * (months + 2))
        yield Show(
            lambda text: console.print(text, markup=False),
            lambda done, text: progress.update(task, completed=done, description=text),
        )
