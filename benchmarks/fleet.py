"""Retrainings at once, one after the other, and what Airflow, workspaces and the registry add to a plain `dvc repro`.

    python -m benchmarks.fleet [--runs 8] [--slots 1]

Each leg starts with nothing: clones of HEAD, for the two of Airflow with a stack on free ports, and as many as-of
dates, a week apart, so that each run has data of its own and none takes another's from the cache. As shipped, one run
trains at a time (the pool `training`); ``--slots`` gives it more. `dvc repro` ends with `evaluate`: the steps after it
are told apart.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from benchmarks.bridge import free_port
from benchmarks.pipeline import clone, environment, seconds

FIRST = date(2013, 4, 1)
DAG = "retrain_on_alert"
STAGES = ("land", "ingest", "validate", "prepare", "train", "evaluate")
RUNS = """
import json, sys, time
from pipelines import embedded
from pipelines.errors import TryAgain
airflow, dag, at_once, days = embedded.airflow(120), sys.argv[1], sys.argv[2] == "at once", sys.argv[3:]
began, runs, unanswered = time.time(), [], []

def trigger(run, day):
    while True:
        try:
            return airflow.trigger(dag, run, {"as_of": day, "reason": "benchmark"})
        except TryAgain:  # now and then Airflow takes a request and does not answer
            unanswered.append(run)

for number, day in enumerate(days):
    runs.append(trigger(f"fleet-{number}", day))
    while not at_once and not (run := airflow.run(runs[-1].dag_id, runs[-1].run_id)).over:
        time.sleep(0.1)
found = []
for run in runs:
    while not (now := airflow.run(run.dag_id, run.run_id)).over:
        time.sleep(0.1)
    tasks = {task.task_id: task.seconds for task in airflow.tasks(now) if task.seconds}
    found.append({"state": now.state, "seconds": (now.ended - now.started).total_seconds(), "tasks": tasks})
print(json.dumps({"seconds": time.time() - began, "runs": found, "unanswered": len(unanswered)}))
"""


@dataclass(frozen=True)
class Leg:
    """How long all runs took together, and what each was made of."""

    seconds: float
    runs: list[dict[str, Any]]
    unanswered: int
    """How often Airflow took a request for a run and said nothing for 20 s."""

    @property
    def failed(self) -> list[str]:
        """The states of the runs that did not end well."""
        return [run["state"] for run in self.runs if run["state"] != "success"]

    def mean(self, *tasks: str) -> float:
        """Seconds of these tasks in a run, on average."""
        return float(sum(run["tasks"].get(task, 0.0) for run in self.runs for task in tasks)) / len(self.runs)


@contextmanager
def stack(root: Path, runs: int, slots: int) -> Iterator[dict[str, str]]:
    """The environment of a stack that lets so many runs go at once."""
    project = clone(root)
    dag = project / "dags" / f"{DAG}.py"
    dag.write_text(re.sub(r"max_active_runs=\d+", f"max_active_runs={runs}", dag.read_text()))
    names = ("AIRFLOW_PORT", "MLFLOW_PORT", "BALLAST_BRIDGE_PORT", "BALLAST_EXPORTER_PORT")
    env = environment() | {name: str(free_port()) for name in names}
    make_pool = f"from pipelines import embedded; embedded.airflow(30).make_pool('training', {slots}, 'a benchmark')"
    pool = f"from pipelines import stack; stack.POOLS.pop('training'); stack.up(); {make_pool}"
    try:
        python(project, env, pool)
        yield env
    finally:
        python(project, env, "from pipelines import stack; stack.down()")


def python(project: Path, env: dict[str, str], code: str, *arguments: str) -> str:
    """What a Python process in a project prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{project}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def airflow(root: Path, how: str, days: list[str], slots: int) -> Leg:
    """The runs in Airflow, ``at once`` or ``in turn``."""
    with stack(root, len(days), slots) as env:
        return Leg(**json.loads(python(root, env, RUNS, DAG, how, *days)))


def repro(root: Path, days: list[str]) -> float:
    """Seconds of as many `dvc repro`, one after the other, each in a clone of its own with a cache of its own."""
    took = 0.0
    for day in days:
        project = clone(root / day)
        params = project / "params.yaml"
        params.write_text(re.sub(r'(?m)^as_of: "[^"]+"', f'as_of: "{day}"', params.read_text()))
        took += seconds([sys.executable, "-m", "dvc", "repro"], project)
    return took


def main() -> None:
    """Measure, and print the three legs side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--slots", type=int, default=1, help="of the pool `training`")
    options = parser.parse_args()
    days = [(FIRST + timedelta(weeks=number)).isoformat() for number in range(options.runs)]
    with tempfile.TemporaryDirectory() as folder:
        root, count = Path(folder), len(days)
        plain = repro(root / "repro", days)
        print(f"{count} dvc repro in turn      {plain:6.1f} s   {plain / count:5.1f} s each", flush=True)
        turn = airflow(root / "turn", "in turn", days, options.slots)
        print(f"{count} retrainings in turn    {turn.seconds:6.1f} s   {turn.seconds / count:5.1f} s each", flush=True)
        once = airflow(root / "once", "at once", days, options.slots)
    ratio = once.seconds / turn.seconds
    print(f"{count} retrainings at once    {once.seconds:6.1f} s   {ratio:.2f} times the time in turn")
    print(f"failed: {len(turn.failed)} in turn, {len(once.failed)} at once")
    print(f"unanswered triggers, given again: {turn.unanswered} in turn, {once.unanswered} at once\n")
    stages, tasks = turn.mean(*STAGES), turn.mean(*{task for run in turn.runs for task in run["tasks"]})
    whole = turn.seconds / count
    print("one retraining in turn, beside one dvc repro")
    for name, value in (
        ("the six stages, as tasks", stages),
        ("  less dvc repro: Airflow's tasks, workspace, MLflow", stages - plain / count),
        ("admit, register, decide and the verdict, as tasks", tasks - stages),
        ("between tasks, and until the run is seen to be over", whole - tasks),
    ):
        print(f"  {name:<52} {value:5.1f} s   {value / whole:4.0%}")


if __name__ == "__main__":
    main()
