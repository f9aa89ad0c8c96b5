"""What Airflow, workspaces and DVC cost: a retraining whose stages are all cached, on the warm stack of `make run`.

    make run && python -m benchmarks.chain [--rounds 3]

The run asks for the retraining that led to the champion once more: nothing is trained, registered or promoted. Beside
it stands a plain `dvc repro` with nothing to do, which is what the same look costs without any of this.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from pipelines import embedded
from pipelines.state import State, moves

ROOT = Path(__file__).resolve().parent.parent


def cached_run(number: int, as_of: str) -> tuple[float, dict[str, float]]:
    """Seconds from the request to the end of the run, and of each of its tasks."""
    airflow = embedded.airflow(30)
    began = time.perf_counter()
    run_id = f"benchmark-{datetime.now(UTC):%Y%m%dT%H%M%S}-{number}"
    run = airflow.trigger("retrain_on_alert", run_id, {"as_of": as_of, "reason": "benchmark"})
    while not (run := airflow.run(run.dag_id, run.run_id)).over:
        time.sleep(0.1)
    took = time.perf_counter() - began
    if run.state != "success":
        sys.exit(f"{run_id} ended as {run.state}: see {airflow.page(run)}")
    return took, {task.task_id: task.seconds for task in airflow.tasks(run)}


def noop_repro() -> float:
    """Seconds of a second `dvc repro` in the checkout."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", "repro", "-q"]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print where the seconds of the median run went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    ledger = moves(State().ledger())
    if not ledger:
        sys.exit("There is no champion yet: `make run` first.")
    found = sorted((cached_run(number, ledger[-1].as_of or "") for number in range(rounds)), key=lambda pair: pair[0])
    took, tasks = found[len(found) // 2]
    repro = noop_repro()
    print(f"retraining, all cached  {took:5.1f} s   (median of {rounds}: {', '.join(f'{t:.1f}' for t, _ in found)})")
    print("  " + " · ".join(f"{name} {seconds:.1f}" for name, seconds in tasks.items() if seconds))
    print(f"  between tasks {took - sum(tasks.values()):.1f}")
    print(f"dvc repro, no change    {repro:5.1f} s   the run takes {took / repro:.1f} times that")


if __name__ == "__main__":
    main()
