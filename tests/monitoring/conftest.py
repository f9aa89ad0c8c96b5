"""What the exporter and the bridge expose, by name, with the labels of each: from sources that know everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import prometheus_client
import pytest
from prometheus_client.core import Metric

from benchmarks.exporter import fill
from pipelines import exporter, facts, freeze, params, runfacts
from pipelines.bridge import Counters
from pipelines.dagruns import Run, Task
from pipelines.files import write_json
from pipelines.places import ROOT
from pipelines.policy import PolicyParams
from pipelines.state import State


class Exposed(NamedTuple):
    """One metric."""

    kind: str
    words: str
    labels: frozenset[str]


def airflow() -> list[Metric]:
    """The families of an Airflow that has run everything."""
    at = datetime(2026, 11, 1, tzinfo=UTC)
    good = Run("monitor", "a", "success", at, at, at + timedelta(minutes=1), {})
    bad = Run("retrain_on_drift", "b", "failed", at, at, at + timedelta(minutes=2), {})
    seen = runfacts.Seen(
        health={name: {"status": "healthy"} for name in runfacts.COMPONENTS},
        import_errors=0,
        dags={run.dag_id: {"is_paused": False, "next_dagrun_run_after": at.isoformat()} for run in (good, bad)},
        succeeded={good.dag_id: good},
        failed={bad.dag_id: bad},
        active=Counter(),
        rejected=Counter(),
        tasks={run.dag_id: [Task("validate", run.state, 1, run.started, run.ended)] for run in (good, bad)},
    )
    return runfacts.families(seen)


def landed(var: Path) -> None:
    """A landing store that has one partition of one table."""
    piece = {"last": "2013-03-31T22:00:00+00:00", "until": "2013-04-01T00:00:00+00:00"}
    write_json(var / "landing" / "index" / "one.json", {"flights": {"settings": {"2013-03": piece}}})


def bridge() -> Iterable[Metric]:
    """The bridge's families, each label used once."""
    counters = Counters()
    for counter in [found for found in vars(counters).values() if isinstance(found, prometheus_client.Counter)]:
        counter.labels("x").inc()
    counters.seconds.observe(1)
    return counters.registry.collect()


@pytest.fixture(scope="session")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exposed]:
    """Each series' name, as rules and dashboards write it."""
    folder = tmp_path_factory.mktemp("exposed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BALLAST_VAR", str(folder))
        patch.setenv("BALLAST_LANDING", str(folder / "landing"))
        patch.delenv("BALLAST_MONITOR_INTERVAL", raising=False)
        landed(folder)
        state = State(f"sqlite:///{folder}/state.db")
        fill(state, 3, 3, 5, worse=True, raises=True)
        state.note("ask", lambda _: None, reason="a warning", actor="review/x", record_sha256="f" * 64)
        freeze.freeze(state, "for the test", "me")
        state.set_clock(date(2013, 4, 1))
        known = facts.look(state, 3, params.load(ROOT / "params.yaml", "policy", PolicyParams))
        source = exporter.Source("state", lambda: facts.families(known), 1)
        sources = [source, exporter.LandingSource(), exporter.Source("airflow", airflow, 1)]
        collector = exporter.Collector(sources, lambda: (True, known.clock))
        for one in sources:
            one.look()
            assert one.error is None
        collector.seconds = 0.001
        return {name: found for metric in [*collector.collect(), *bridge()] for name, found in _series(metric)}


def _series(metric: Metric) -> Iterable[tuple[str, Exposed]]:
    names: dict[str, set[str]] = {}
    samples: list[Any] = metric.samples
    for sample in samples:
        if not sample.name.endswith("_created"):
            names.setdefault(sample.name, set()).update(sample.labels)
    assert names, f"{metric.name} has no sample here: fill in what it is made from."
    return [(name, Exposed(metric.type, metric.documentation, frozenset(labels))) for name, labels in names.items()]
