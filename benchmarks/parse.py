"""What a look at `dags/` costs: parsing all of them beside the import of Airflow's own SDK.

python -m benchmarks.parse [--rounds 5]
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
SDK = "from airflow.sdk import DAG"
DAGS = (
    f"{SDK}; import glob, runpy; [runpy.run_path(file) for file in sorted(glob.glob({str(ROOT / 'dags' / '*.py')!r}))]"
)


def seconds(code: str, home: str) -> float:
    """How long a fresh interpreter takes for this code."""
    env = {**os.environ, "AIRFLOW_HOME": home, "PYTHONPATH": str(ROOT / "plugins")}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure both in turn, and print the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as home:
        seconds(DAGS, home)  # bytecode
        pairs = [(seconds(SDK, home), seconds(DAGS, home)) for _ in range(rounds)]
    sdk, dags = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"import airflow.sdk {sdk:.2f} s · with all of dags/ {dags:.2f} s · {dags / sdk:.2f} times ({rounds} rounds)")


if __name__ == "__main__":
    main()
