"""Processes of this machine as /proc shows them: who is alive, who belongs to whom, who listens where (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import BallastError

PROC = Path("/proc")
KILL_WAIT_S = 5.0


@dataclass(frozen=True)
class Process:
    """A process by its id and birth, so that a later one with the same id is never taken for it."""

    pid: int
    born: int  # clock ticks since boot
    boot: str


@dataclass(frozen=True)
class Stat:
    """What /proc/PID/stat says of a process."""

    state: str
    session: int
    born: int


def find(pid: int) -> Process | None:
    """The living process with this id; a zombie is none."""
    stat = _stat(pid)
    if stat is None or stat.state in "ZX":
        return None
    return Process(pid, stat.born, this_boot())


def alive(process: Process) -> bool:
    """Whether this very process still lives."""
    return find(process.pid) == process


def this_boot() -> str:
    """The kernel's id of this boot: ids and births of an earlier one mean nothing."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def family(leader: Process | None, mark: str) -> set[int]:
    """All living processes of the session that ``leader`` began, and all that carry ``mark`` in their environment.

    The session finds those whose environment cannot be read (Airflow's supervisors hide theirs), the mark those that
    began a session of their own (the steps). This process itself is never among them.
    """
    session = leader if leader and _session_is_its_own(leader) else None
    found = set()
    for pid in _pids():
        stat = _stat(pid)
        if stat is None or stat.state in "ZX":
            continue
        inside = session is not None and stat.session == session.pid and stat.born >= session.born
        if inside or _carries(pid, mark):
            found.add(pid)
    return found - {os.getpid()}


def stop(members: Callable[[], set[int]], grace_s: float) -> None:
    """SIGTERM to all members, SIGKILL to those still there after ``grace_s``; raise BallastError if any remains."""
    _signal(members(), signal.SIGTERM)
    if _wait_until_gone(members, grace_s):
        return
    deadline = time.monotonic() + KILL_WAIT_S
    while (left := members()) and time.monotonic() < deadline:
        _signal(left, signal.SIGKILL)
        time.sleep(0.05)
    if left:
        names = ", ".join(f"{pid} ({command(pid)})" for pid in sorted(left))
        raise BallastError(f"These processes do not end: {names}. End them by hand: kill -9 {min(left)} …")


def command(pid: int) -> str:
    """The command line of a process, shortened; empty where it cannot be read."""
    with suppress(OSError):
        raw = (PROC / str(pid) / "cmdline").read_bytes()
        return raw.replace(b"\0", b" ").decode(errors="replace").strip()[:80]
    return ""


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Ask Linux for a signal when the parent ends (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal_number)


def listener(port: int) -> int | None:
    """The process that listens on a TCP port, where /proc tells (it does for processes of the same user)."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for pid in _pids() if sockets else ():
        with suppress(OSError):
            for handle in (PROC / str(pid) / "fd").iterdir():
                with suppress(OSError):
                    if str(handle.readlink()) in sockets:
                        return pid
    return None


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())


def _stat(pid: int) -> Stat | None:
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return Stat(state=fields[0], session=int(fields[3]), born=int(fields[19]))


def _session_is_its_own(leader: Process) -> bool:
    """Whether the leader's id still names its session: the kernel gives an id away again only when that is over."""
    return leader.boot == this_boot() and find(leader.pid) in (leader, None)


def _carries(pid: int, mark: str) -> bool:
    with suppress(OSError):
        return mark.encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    return False


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait_until_gone(members: Callable[[], set[int]], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while members():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("net/tcp", "net/tcp6"):
        with suppress(OSError):
            for line in (PROC / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]
