"""What DVC costs: `dvc repro` beside one plain script that calls the same stages in one process.

    python -m benchmarks.pipeline [--rounds 3]

Each round takes a fresh clone of HEAD for either, in turn, so that both meet the same machine. The plain script is the
floor: one interpreter, each library imported once, nothing hashed, nothing stored. The no-op is `dvc repro` once more,
which runs only `land`'s look at the source.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Every stage's own main, with the arguments that stand in dvc.yaml, one after another.
PLAIN = """
import importlib, shlex, sys, yaml
for name, stage in yaml.safe_load(open("dvc.yaml"))["stages"].items():
    sys.argv = shlex.split(stage["cmd"])[2:]
    importlib.import_module(f"pipelines.{name}").main()
"""


def clone(into: Path) -> Path:
    """A clone of HEAD, with bytecode, as `make setup` leaves the installed environment."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(into)], check=True)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(into / "pipelines")], check=True)
    return into


def environment() -> dict[str, str]:
    """The environment of somebody who has set nothing of ours, with this interpreter first on the PATH."""
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONSAFEPATH", "MLFLOW_TRACKING_URI")
    env = {name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("BALLAST_")}
    return env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


def seconds(command: list[str], cwd: Path) -> float:
    """How long a command takes; it must succeed."""
    env = environment()
    began = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} failed in {cwd}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return took


def main() -> None:
    """Measure, and print a line per round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    dvc = [sys.executable, "-m", "dvc"]
    found: dict[str, list[float]] = {"plain": [], "repro": [], "no-op": []}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            plain, repro = clone(Path(folder) / "plain"), clone(Path(folder) / "repro")
            found["plain"].append(seconds([sys.executable, "-c", PLAIN], plain))
            found["repro"].append(seconds([*dvc, "repro"], repro))
            found["no-op"].append(seconds([*dvc, "repro"], repro))
        print(f"round {number + 1}   " + "   ".join(f"{name} {times[-1]:5.1f} s" for name, times in found.items()))
    plain_s, repro_s, noop_s = (statistics.median(times) for times in found.values())
    print(f"\nmedian of {rounds}, as of params.yaml, on {os.cpu_count()} cores")
    print(f"  one plain script      {plain_s:6.1f} s")
    print(f"  dvc repro             {repro_s:6.1f} s   {repro_s / plain_s:.2f} times, {repro_s - plain_s:+.1f} s")
    print(f"  dvc repro, no change  {noop_s:6.1f} s   {noop_s / repro_s:.2f} times")


if __name__ == "__main__":
    main()
