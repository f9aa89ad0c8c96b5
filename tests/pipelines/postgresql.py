"""A real PostgreSQL server, for the tests that need one."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from benchmarks.bridge import free_port

PASSWORD = "s3cr&t w@rd"
URL_PASSWORD = "s3cr%26t%20w%40rd"
BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


class Server:
    """A PostgreSQL server of our own, that takes a password."""

    def __init__(self, root: Path) -> None:
        assert BIN
        self.root, self.data = root, root / "data"
        self.user = "postgres" if os.getuid() == 0 else None
        (root / "password").write_text(PASSWORD)
        if self.user:
            for path in (root, root / "password"):
                shutil.chown(path, self.user)
        self.port = free_port()
        words = ["-D", self.data, "-U", "me", "-A", "scram-sha-256", "--pwfile", root / "password", "-N"]
        self._run("initdb", *words)
        self.start()

    def _run(self, program: str, *words: object) -> None:
        assert BIN
        command = [str(BIN / program), *map(str, words)]
        with (self.root.parent / f"{self.root.name}.log").open("a") as log:
            subprocess.run(command, check=True, user=self.user, cwd="/", stdout=log, stderr=log, timeout=60)

    def start(self) -> None:
        settings = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.root} -c fsync=off"
        self._run("pg_ctl", "-D", self.data, "-w", "-o", settings, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self.data, "-w", "-m", "immediate", "stop")

    @property
    def url(self) -> str:
        return f"postgresql://me:{URL_PASSWORD}@127.0.0.1:{self.port}/postgres"

    def run(self, *statements: str) -> None:
        with psycopg.connect(self.url) as connection:
            for statement in statements:
                connection.execute(statement)  # type: ignore[call-overload]


@contextmanager
def serve() -> Iterator[Server]:
    """A server that is gone afterwards; the test is skipped where none is installed."""
    if BIN is None:
        pytest.skip("PostgreSQL's server is not installed (no /usr/lib/postgresql/*/bin)")
    root = Path(tempfile.mkdtemp(prefix="ballast-postgresql-"))
    made = Server(root)
    yield made
    made.stop()
    shutil.rmtree(root)
    root.with_name(f"{root.name}.log").unlink()
