import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pytest

from pipelines import workspace
from pipelines.errors import TryAgain
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
