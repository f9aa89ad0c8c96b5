import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pytest

from pipelines import workspace
from pipelines.errors import BallastError, TryAgain
from pipelines.workspace import Workspace, note_step, owned


@contextmanager
def held_by_a_step(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A step that outlived its runner: it holds the lock, and nobody is its runner."""
    with owned(Workspace(root, "", date(2013, 4, 1))) as lock:
        code = [sys.executable, "-c", "import time; time.sleep(60)"]
        with subprocess.Popen(code, pass_fds=(lock,), start_new_session=True) as step:
            note_step(lock, step.pid)
            try:
                yield step
            finally:
                step.kill()


def test_owned_of_an_orphan_in_another_container_waits_and_kills_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "ORPHAN_GRACE_S", 0.3)
    with held_by_a_step(tmp_path) as step:
        monkeypatch.setattr("socket.gethostname", lambda: "another-container")
        with pytest.raises(TryAgain), owned(Workspace(tmp_path, "", date(2013, 4, 1))):
            pass
        assert step.poll() is None


def test_owned_of_an_orphan_of_this_host_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "ORPHAN_GRACE_S", 0.3)
    with held_by_a_step(tmp_path) as step:
        with pytest.raises(TryAgain), owned(Workspace(tmp_path, "", date(2013, 4, 1))):  # we hold it ourselves
            pass
        assert step.wait(5) == -9


def test_owned_forgets_what_a_killed_step_noted(tmp_path: Path) -> None:
    """Its number may be another process's by now, which the next who waits would end."""
    space = Workspace(tmp_path, "", date(2013, 4, 1))
    with owned(space) as lock:
        note_step(lock, 57)
    with owned(space):
        assert workspace.lock_file(tmp_path).read_bytes() == b""


def test_git_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "GIT_WITHIN_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"git://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(BallastError, match=r"`git ls-remote git://.*` did not end within 0\.5 s"):
            workspace.git(tmp_path, "ls-remote", url)


def test_owned_of_a_workspace_that_was_just_removed_asks_to_try_again_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Workspace(tmp_path / "space", "", date(2013, 4, 1))
    with pytest.raises(TryAgain, match="was removed just now"), owned(space):
        pass
    assert not space.root.exists()
    space.root.mkdir()
    flock = workspace.fcntl.flock

    def late(*given: int) -> None:
        space.root.rename(tmp_path / "gone")
        flock(*given)

    monkeypatch.setattr(workspace.fcntl, "flock", late)
    with pytest.raises(TryAgain, match="was removed just now"), owned(space):
        pass
    assert not space.root.exists()


def test_tidy_beside_starts_a_collection_only_where_more_workspaces_are_than_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(workspace.subprocess, "Popen", lambda command, **_: started.append(command))
    monkeypatch.setenv("BALLAST_KEEP_RUNS", "2")
    for name in (".r0.part", "r1", "r2", "r3"):
        (tmp_path / name).mkdir()
        workspace.tidy_beside(tmp_path / name)
    assert started == [[sys.executable, "-m", "pipelines.gc"]]


def test_retention_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workspace.retention() == (3, 14)
    monkeypatch.setenv("BALLAST_KEEP_FAILED_DAYS", "a week")
    with pytest.raises(BallastError, match=r"BALLAST_KEEP_FAILED_DAYS must be a whole number.* \(found 'a week'\)"):
        workspace.retention()
