"""How many cells, from which seed, and the table of what came of them."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.e2e.conftest import PROJECT
from tests.pipelines.postgresql import BIN

from .rounds import COMPONENTS, HEAD, PLACES, Cell, plan
from .topology import Topology

SEED = int(os.environ.get("CHAOS_SEED") or 1)
CELLS = int(os.environ.get("CHAOS_CELLS") or len(PLACES) * len(COMPONENTS))
REPORT: list[Cell] = []
LINES: list[str] = []
BEGAN = time.monotonic()

logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the S3 API's word on each request


def kills() -> list[list[str | None]]:
    """What is killed at each place of each round, by the seed; the last round has what is left of CELLS."""
    chance = random.Random(SEED)
    shuffled = chance.sample(COMPONENTS, len(COMPONENTS))
    rounds: list[list[str | None]] = []
    left = CELLS
    for number in range(len(COMPONENTS)):
        chosen = set(chance.sample(range(len(PLACES)), min(left, len(PLACES))))
        if chosen:
            whole = plan(number, shuffled)
            rounds.append([whole[place] if place in chosen else None for place in range(len(PLACES))])
            left -= len(chosen)
    return rounds


def needed() -> None:
    """Skip where Debian's servers are not installed."""
    if BIN is None or not shutil.which("redis-server"):
        pytest.skip("needs PostgreSQL's server and redis-server (apt-get install postgresql redis-server)")


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The stack; a task that fails is tried again after 4 s and more, not after 10 s and more."""
    needed()
    made = Topology(retry_delay_s=4)
    try:
        made.up()
        yield made
    finally:
        made.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if REPORT or LINES:
        terminalreporter.section("chaos")
        terminalreporter.write_line(write_report())


def write_report() -> str:
    """The table so far, also written where CHAOS_REPORT says."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=PROJECT, capture_output=True, text=True, check=False).stdout.strip()
    well, minutes = sum(cell.well for cell in REPORT), (time.monotonic() - BEGAN) / 60
    head = (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}, seed {SEED}: {len(REPORT)} kills, {well} without a loss; "
        f"{minutes:.0f} min in all, load {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores"
    )
    text = "\n".join([head, "", HEAD, *(cell.row() for cell in REPORT), "", *LINES])
    if file := os.environ.get("CHAOS_REPORT"):
        Path(file).write_text(text + "\n", encoding="utf-8")
    return text
