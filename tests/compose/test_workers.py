"""The Compose stack with `deploy/travel.yml`: workers that share no disk, and two remotes that the stack brings along.

Needs a Docker engine and the public images (or stand-ins of their names).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import docker_engine
from tests.compose.stack import Stack
from tests.waiting import until

pytestmark = [
    pytest.mark.compose,
    # What a cut connection leaves is collected in any test.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
LIST_REFS = ("exec", "-T", "worker", "git", "ls-remote", "git://git/", "refs/ballast/*")
SCRAPE = "from urllib.request import urlopen as ask; print(ask('http://127.0.0.1:9180/metrics').read().decode())"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    docker_engine.needed()
    stack = Stack("ballast-apart", tmp_path_factory.mktemp("apart"), 26200, "deploy/travel.yml")
    stack.build()
    try:
        stack.start("--scale=worker=2")
        yield stack
    finally:
        stack.remove()


def runs_on(stack: Stack, *worker: str) -> set[str]:
    """The DAGs of whose runs a worker has a workspace: the one named by ``--index=…``, or the only one."""
    look = ["sh", "-c", "cd /var/lib/ballast && ls runs 2>/dev/null || true"]
    return set(stack.run("exec", "-T", *worker, "worker", *look).split())


def test_workers_share_no_volume_but_that_of_logs(stack: Stack) -> None:
    services = stack.services()
    assert [one["source"] for one in services["worker"]["volumes"]] == ["logs"]
    assert "objects" not in services["worker"]["networks"] and "remotes" not in services["mlflow"]["networks"]


def test_first_champion_is_made_by_both_workers(stack: Stack) -> None:
    airflow = stack.airflow()
    airflow.set_paused("retrain_scheduled", False)
    run = airflow.trigger("retrain_scheduled", "turn", {"as_of": "2013-04-01"})
    stack.ended(run.dag_id, run.run_id)
    until("the first champion", lambda: "champion   v1" in stack.status())
    assert [run.dag_id in runs_on(stack, f"--index={worker}") for worker in (1, 2)] == [True, True]


def test_worker_that_has_nothing_goes_on(stack: Stack) -> None:
    stack.start("--scale=worker=1", "--force-recreate", "--no-deps", "worker")
    assert not runs_on(stack)
    airflow = stack.airflow()
    airflow.set_paused("monitor", False)
    run = airflow.trigger("monitor", "april", {"as_of": "2013-05-01"})
    stack.ended(run.dag_id, run.run_id)
    assert airflow.result(run, "score")["version"] == 1
    assert runs_on(stack) == {"monitor"}


def test_exporter_sees_what_was_landed(stack: Stack) -> None:
    stack.start("--no-deps", "exporter")
    found = until(
        "the metric",
        lambda: [
            line
            for line in stack.run("exec", "-T", "exporter", "python", "-c", SCRAPE).splitlines()
            if line.startswith('ballast_landed_data_end_timestamp_seconds{table="flights"}')
        ],
    )
    assert len(found) == 1


def test_backup_put_back_has_all_that_a_version_is_made_again_from(stack: Stack, tmp_path: Path) -> None:
    history, refs = stack.ballast("history"), stack.run(*LIST_REFS)
    assert "refs/ballast/shared/var" in refs
    stack.call("sh", "scripts/compose_backup.sh", str(tmp_path / "backup"), *stack.command)
    stack.remove()
    stack.call("sh", "scripts/compose_restore.sh", str(tmp_path / "backup"), *stack.command)
    stack.start()
    assert not runs_on(stack)
    assert (stack.ballast("history"), stack.run(*LIST_REFS)) == (history, refs)
    assert "IDENTICAL" in stack.ballast("reproduce", "1")
