"""A disk that is full when a step writes: it says so, nothing half-written counts, and with room made it goes on."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .site import LOOP, Site

pytestmark = pytest.mark.chaos
SIZE_MB, LEFT_KB = 400, 8
FULL = re.compile(r"No space left on device|disk is full|disk I/O error")
# The others write so little that what is left may do.
MUST_FAIL = {"land", "ingest", "validate", "prepare", "train", "evaluate", "score", "drift"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "ballast-chaos", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Leave a few kB."""
    stats = os.statvfs(disk)
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, stats.f_bavail * stats.f_frsize - LEFT_KB * 1024)
    try:
        yield
    finally:
        filler.unlink()


def test_full_disk_is_said_and_room_made_is_enough(tmp_path: Path, small_disk: Path) -> None:
    """All run-time state on the small disk: landing store, workspaces, checkpoints, models, predictions, registry."""
    unbroken, site = Site.make(tmp_path / "unbroken"), Site.make(tmp_path / "project", small_disk / "var")
    failed = []
    for run, step, as_of in LOOP:
        unbroken.step(run, run, step, str(as_of))
        with full(small_disk):
            done = site.attempt(run, run, step, str(as_of))
        if done.returncode:
            failed.append(step)
            assert FULL.search(done.stdout + done.stderr), f"{step}\n{done.stdout}\n{done.stderr}"
        site.step(run, run, step, str(as_of))
    assert set(failed) >= MUST_FAIL

    for run in ("retrain", "monitor"):
        ours, theirs = ((one.workspace(run, run) / "dvc.lock").read_text() for one in (site, unbroken))
        assert ours == theirs
    told = "from tests.chaos import probe; probe.main()"
    ours, theirs = site.python(told), unbroken.python(told)
    assert ours == theirs
    assert not ours["problems"]
    left = [path for path in site.var.rglob("*") if path.name.endswith((".part", ".old", ".tmp", ".before"))]
    assert not left
