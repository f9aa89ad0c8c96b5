"""What deploy/ does at each start, run for real without an engine: on folders and servers of the test's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
import yaml

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
