"""What deploy/ does at each start, run for real without an engine: on folders and servers of the test's own."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.pipelines.postgresql import PASSWORD, serve

ROOT = Path(__file__).parent.parent.parent
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
BIN = Path(sys.executable).parent


def test_mlflow_database_of_an_older_release_is_brought_forward_before_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic.command import downgrade
    from mlflow.store.db.utils import _get_alembic_config, _get_latest_schema_revision
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    *command, url = SERVICES["mlflow-migrate"]["command"]
    assert url in SERVICES["mlflow"]["command"] and "mlflow-migrate" in SERVICES["mlflow"]["depends_on"]
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    with serve() as server:
        url = f"postgresql+psycopg://me@127.0.0.1:{server.port}/postgres"

        def revision() -> str:
            with psycopg.connect(server.url) as connection:
                (found,) = connection.execute("SELECT version_num FROM alembic_version").fetchall()
            return str(found[0])

        def migrate() -> str:
            subprocess.run([BIN / command[0], *command[1:], url], check=True, capture_output=True, timeout=300)
            return revision()

        newest = _get_latest_schema_revision()
        assert migrate() == newest, "of an empty database"
        store = SqlAlchemyStore(url, str(tmp_path))
        store.create_experiment("kept")
        store.engine.dispose()
        downgrade(_get_alembic_config(url), "-3")
        assert revision() != newest
        assert migrate() == newest
        assert migrate() == newest, "of one that is as it should be"
        store = SqlAlchemyStore(url, str(tmp_path))
        assert store.get_experiment_by_name("kept")
        store.engine.dispose()


# --- the checkout

KILLED = """#!/bin/sh
# git, whose clone is killed when half of it is there, and whoever called it.
/usr/bin/git "$@" || exit
[ "$1" = clone ] || exit 0
for into; do :; done
rm -rf "$into/.git/objects"
kill -9 $PPID
"""


class Volume:
    """An image with a repository of two commits, and the volume that is to have it."""

    def __init__(self, root: Path) -> None:
        self.image, self.root, self.bin = root / "image", root / "volume", root / "bin"
        for folder in (self.image, self.root, self.bin):
            folder.mkdir()
        self.git("init", "--quiet", at=self.image)
        self.commit("first")

    def git(self, *arguments: str, at: Path | None = None) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(at or self.root), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, text: str) -> None:
        (self.image / "file").write_text(text)
        self.git("add", "file", at=self.image)
        self.git("commit", "--quiet", "--message", text, at=self.image)

    def check_out(self) -> subprocess.CompletedProcess[str]:
        """Run the script; first on the PATH is what the test has put into ``bin``."""
        command = ["sh", str(ROOT / "deploy" / "checkout.sh"), str(self.image), str(self.root)]
        env = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    def is_at(self, text: str) -> bool:
        here = sorted(path.name for path in self.root.iterdir())
        return here == [".git", "file"] and (self.root / "file").read_text() == text and not self.git("status", "-s")


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path)


def test_checkout_follows_the_image_and_keeps_the_refs_of_runs(volume: Volume) -> None:
    assert volume.check_out().returncode == 0 and volume.is_at("first")
    volume.git("update-ref", "refs/ballast/runs/d/r", "HEAD")
    began = volume.git("rev-parse", "HEAD")
    volume.commit("second")
    assert volume.check_out().returncode == 0 and volume.is_at("second")
    assert volume.git("rev-parse", "refs/ballast/runs/d/r") == began != volume.git("rev-parse", "HEAD")


def test_checkout_after_a_clone_that_was_killed_is_whole(volume: Volume) -> None:
    (volume.bin / "git").write_text(KILLED)
    (volume.bin / "git").chmod(0o755)
    assert volume.check_out().returncode == -9
    (volume.bin / "git").unlink()
    done = volume.check_out()
    assert done.returncode == 0, done.stderr
    assert volume.is_at("first")


def test_checkout_removes_the_lock_of_a_git_that_was_killed_and_no_other(volume: Volume) -> None:
    volume.check_out()
    volume.commit("second")
    lock = volume.root / ".git" / "index.lock"
    lock.touch()
    done = volume.check_out()
    assert done.returncode and "index.lock" in done.stderr and lock.exists(), "somebody may hold it"
    os.utime(lock, (time.time() - 60,) * 2)
    done = volume.check_out()
    assert done.returncode == 0, done.stderr
    assert volume.is_at("second")


# --- the bridge's certificate


def make_certificate(root: Path) -> tuple[bytes, bytes]:
    """Run the script; return key and certificate, which fit together."""
    own, shown = root / "own", root / "shown"
    for folder in (own, shown):
        folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, ROOT / "deploy" / "bridge_init.py", own, shown], check=True, capture_output=True)
    key, certificate = (own / "key.pem").read_bytes(), (shown / "cert.pem").read_bytes()
    public = load_pem_private_key(key, None).public_key()
    assert x509.load_pem_x509_certificate(certificate).public_key() == public
    assert [path.name for folder in (own, shown) for path in folder.iterdir()] == ["key.pem", "cert.pem"]
    return key, certificate


def test_certificate_that_is_whole_stays(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    assert make_certificate(tmp_path) == made
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("own/key.pem", "shown/cert.pem")]
    assert modes == [0o600, 0o644]


@pytest.mark.parametrize("name", ["own/key.pem", "shown/cert.pem"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda file, other: file.unlink(),
        lambda file, other: file.write_bytes(file.read_bytes()[:60]),
        lambda file, other: file.write_bytes(other),
    ],
)
def test_certificate_that_cannot_be_used_is_made_anew(
    tmp_path: Path, name: str, spoil: Callable[[Path, bytes], object]
) -> None:
    made = make_certificate(tmp_path / "ours")
    make_certificate(tmp_path / "other")
    spoil(tmp_path / "ours" / name, (tmp_path / "other" / name).read_bytes())
    assert not set(make_certificate(tmp_path / "ours")) & set(made)


# --- make compose-…

DOCKER = """#!/bin/sh
# An engine that writes down what it is told.
echo "$*" >>calls
case "$*" in
*"config --services") printf '%s\\n' postgres worker worker-gpu bridge mlflow s3 ;;
*" ps --all "*) echo worker running healthy 0 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A commit with the Makefile and what it calls."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "deploy").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").write_text(DOCKER)
    (tmp_path / "bin" / "docker").chmod(0o755)
    for command in ("init --quiet", "add Makefile", "-c user.name=t -c user.email=t@e.org commit --quiet -m x"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    return tmp_path


def make(checkout: Path, *arguments: str) -> list[str]:
    """What the engine is told, each without the secrets file."""
    (checkout / "calls").unlink(missing_ok=True)
    env = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"}
    for name in ("WORKERS", "PROFILES", "COMPOSE_FILES", "COMPOSE", "MAKEFLAGS", "MAKEOVERRIDES"):
        env.pop(name, None)
    done = subprocess.run(["make", *arguments], cwd=checkout, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = (checkout / "calls").read_text().splitlines()
    return [line.removeprefix("compose --env-file deploy/secrets/stack.env -f docker-compose.yml ") for line in told]


def test_compose_targets_mean_the_stack_that_was_started(checkout: Path) -> None:
    assert "up --detach --no-build --scale worker=1" in make(checkout, "compose-up")
    as_told = "-f more.yml -f gpu.yml --profile monitoring --profile gpu"
    told = ["WORKERS=3", "PROFILES=monitoring gpu", "COMPOSE_FILES=-f more.yml -f gpu.yml"]
    first = make(checkout, "compose-up", *told)
    assert f"{as_told} up --detach --no-build --scale worker=3" in first
    upgraded = make(checkout, "compose-upgrade", "BACKUP=backup")
    assert all(line.startswith(as_told) for line in upgraded)
    assert upgraded[-len(first) :] == first, "it ends as the start did"
    assert make(checkout, "compose-up", "PROFILES=")[-2] == (
        "-f more.yml -f gpu.yml up --detach --no-build --scale worker=3"
    )


def test_compose_upgrade_stops_all_but_the_stores_after_the_backup(checkout: Path) -> None:
    told = make(checkout, "compose-upgrade", "BACKUP=backup")
    stop = told.index("--profile * stop worker worker-gpu bridge mlflow")
    assert all("pg_dump" not in line and "tar" not in line for line in told[stop:])
    assert told[stop + 1 :] and (checkout / "backup" / "SHA256SUMS").exists()


def test_compose_clean_removes_old_logs_and_asks_airflow_for_the_rest(tmp_path: Path) -> None:
    logs, calls = tmp_path / "logs", tmp_path / "calls"
    here = tmp_path / "compose"  # runs what it is to run in a container, on the test's own folder
    here.write_text(f"""#!/bin/sh
shift 3
[ "$1" = find ] || {{ shift 2; sh -c "airflow() {{ echo \\"\\$@\\" >>{calls}; }}; $1" "$2"; exit; }}
shift 2
exec find {logs} "$@"
""")
    here.chmod(0o755)
    for name, days in {"dag_id=d/run_id=old/attempt=1.log": 91, "dag_id=d/run_id=new/attempt=1.log": 89}.items():
        (logs / name).parent.mkdir(parents=True)
        (logs / name).touch()
        os.utime(logs / name, (time.time() - 86400 * days - 60,) * 2)

    def clean(days: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(ROOT / "scripts" / "compose_clean.sh"), days, str(here)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def left() -> list[str]:
        return sorted(str(path.relative_to(logs)) for path in logs.rglob("*"))

    for wrong in ("0", "", "-1", "1 -o -true"):
        assert clean(wrong).returncode == 1
    assert len(left()) == 5 and not calls.exists()
    assert clean("90").returncode == 0
    assert left() == ["dag_id=d", "dag_id=d/run_id=new", "dag_id=d/run_id=new/attempt=1.log", "dag_id=d/run_id=old"]
    os.utime(logs / "dag_id=d" / "run_id=old", (time.time() - 3700,) * 2)
    assert clean("90").returncode == 0
    assert left() == ["dag_id=d", "dag_id=d/run_id=new", "dag_id=d/run_id=new/attempt=1.log"]
    before = (datetime.now(UTC) - timedelta(days=90)).date()
    assert calls.read_text().splitlines() == 2 * [
        f"db clean --clean-before-timestamp {before} --skip-archive --yes --error-on-cleanup-failure"
    ]
