"""What a scrape of the exporter takes, on a state store of a year and on a large one.

    python -m benchmarks.exporter [--scrapes 500]

The exporter runs as the process that it is. Airflow is left out of it (it does not answer): a scrape does not ask it.
Beside the scrapes stands what a look at the store takes, in the exporter's background, and its memory.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from datetime import UTC, date, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.state import Decision, State, Window

SIZES = {  # windows, columns, ledger entries
    "a year, monthly": (12, 20, 30),
    "large": (400, 20, 2000),
}
FIRST = date(2013, 4, 1)
RULES = ("another model", "models load", "models score", "test rows", "test days", "better", "floor roc_auc", "slices")


def numbers(at: int, columns: int, worse: bool = False, raises: bool = False) -> dict[str, Any]:
    """What the policy keeps of a window; as it stands in the state store."""
    rise = 0.08 if worse else 0.01
    found = {
        f"column_{number}": {"score": 0.2, "threshold": 0.1 if raises else 0.3, "moved": raises, "weight": 1 / columns}
        for number in range(columns)
    }
    moved = list(found) if raises else []
    loss: dict[str, Any] = {"measured": True, "log_loss": 0.445 + rise, "reference_log_loss": 0.445, "rise": rise}
    loss |= {"standard_error": 0.02, "standard_errors": 2, "worse": worse, "words": "w"}
    aucs = {"auc": 0.75, "auc_standard_error": 0.01, "reference_auc": 0.76, "reference_auc_standard_error": 0.01}
    start = (FIRST + timedelta(days=30 * at)).isoformat()
    return {
        "rows": 28353,
        "labelled_rows": 26619,
        "data": {"broken": False, "rejected": False, "validated": True, "expectations": 45, "warnings": 1}
        | {"quarantined": 1, "empty": [], "out_of_scale": [], "words": ""},
        "inputs": {"moved": raises, "raises": raises, "columns": found, "moved_columns": moved, "judged": columns}
        | {"share": float(raises), "weighted_share": float(raises), "critical_moved": moved, "words": "w"},
        "predictions": {"moved": raises, "score": 0.1, "threshold": 0.2, "mean": 0.23, "reference_mean": 0.25},
        "performance": loss | aucs | {"present": True, "labelled_rows": 26619, "start": start, "end": start},
        "estimate": loss | {"rows": 28353, "auc": 0.75, "log_loss_standard_error": 0.02, "bias": 0.01},
    }


def fill(state: State, windows: int, columns: int, entries: int, **last: bool) -> None:
    """A store as the loop leaves it; ``last`` is what the newest window shows (``worse``, ``raises``)."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    for number in range(entries):
        as_of = FIRST + timedelta(days=number)
        rules = {rule: {"severity": "block", "passed": number % 3 > 0 or rule != "better"} for rule in RULES}
        verdict = "promote" if number % 3 else "refuse"
        facts = {"rules": rules, "trained_until": f"{as_of.isoformat()}T00:00:00+00:00"}
        made = (f"{number:064}", number + 1, verdict, f"{verdict.upper()} · better", as_of.isoformat(), now)
        state.remember(Decision(*made, data="a.dir", run=f"retrain_scheduled/{number}", facts=facts))
        state.begin_retraining(f"retrain_scheduled/{number}", as_of, "schedule")
        state.end_retraining(f"retrain_scheduled/{number}", verdict)
        told = {"reason": "because", "actor": "promote/x", "as_of": as_of, "record_sha256": f"{number:064}"}
        state.append("promote", number + 1, head=state.head(), **told)  # type: ignore[arg-type]
    for at in range(windows):
        start, end = (FIRST + timedelta(days=30 * (at + more)) for more in (0, 1))
        told = numbers(at, columns, **(last if at == windows - 1 else {}))
        state.remember_window(Window(start.isoformat(), end.isoformat(), entries, "wait", told, now, f"monitor/{at}"))


def scrape(connection: HTTPConnection) -> tuple[float, str]:
    """Seconds of one scrape, over a connection that stays open as Prometheus' does, and the answer."""
    began = time.perf_counter()
    connection.request("GET", "/metrics")
    answer = connection.getresponse().read()
    return time.perf_counter() - began, answer.decode()


def measure(size: tuple[int, int, int], scrapes: int) -> None:
    """Fill a store, start the exporter on it, scrape it while the store is written to, and print what that took."""
    with TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/state.db"
        state = State(uri)
        fill(state, *size)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = os.environ | {"BALLAST_VAR": folder, "BALLAST_STATE_URI": uri, "BALLAST_EXPORTER_PORT": str(port)}
        with subprocess.Popen(
            [sys.executable, "-m", "pipelines.exporter"], env=env, stderr=subprocess.DEVNULL
        ) as process:
            try:
                _scrapes(state, process.pid, port, scrapes)
            finally:
                process.terminate()


def _scrapes(state: State, pid: int, port: int, scrapes: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    answer = ""
    while "ballast_champion_version " not in answer:  # its first look
        time.sleep(0.2)
        try:
            answer = scrape(connection)[1]
        except OSError:
            connection.close()
    quiet: list[float] = []
    busy: list[float] = []
    for at in range(2 * scrapes):
        if at >= scrapes and at % 25 == 0:
            state.set_clock(date(2013, 4, 1) + timedelta(days=at))  # a change: the exporter reads the whole store
        seconds, answer = scrape(connection)
        (busy if at >= scrapes else quiet).append(seconds)
        time.sleep(0.02)
    read = re.findall(r'^ballast_exporter_read_duration_seconds\{source="state"\} (\S+)', answer, re.M)
    size = len(answer), sum(not line.startswith("#") for line in answer.splitlines())
    memory = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]
    print(f"  answer {size[0] / 1000:.0f} kB, {size[1]} samples · memory at most {int(memory) / 1000:.0f} MB")
    print(f"  last look at the store {float(read[0]) * 1000:.0f} ms, in the background")
    for name, taken in (("nothing changes", quiet), ("the store changes every 0.5 s", busy)):
        ordered = sorted(taken)
        p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
        said = ", ".join(f"{x * 1000:.1f}" for x in (statistics.median(ordered), p95, ordered[-1]))
        print(f"  {len(ordered)} scrapes, {name}: p50, p95, max {said} ms")


def main() -> None:
    """Measure both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scrapes", type=int, default=500)
    scrapes = parser.parse_args().scrapes
    for name, size in SIZES.items():
        print(f"{name}: {size[0]} windows, {size[1]} columns, {size[2]} ledger entries")
        measure(size, scrapes)


if __name__ == "__main__":
    main()
