"""A small project with real models, and a real MLflow on SQLite, made once and copied for each test."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from postgresql import Server, serve
from threadpoolctl import threadpool_limits

from pipelines import cli, registry, tracking
from pipelines.files import write_json

FIRST = datetime(2013, 1, 1, tzinfo=UTC)
DAYS, ROWS_A_DAY = 60, 60
SQL = "SELECT CAST(id AS VARCHAR) AS key, time, y AS label, x, c FROM events"
FEATURES = {"numeric": ["x"], "categorical": ["c"]}
TABLES = {
    "events": {
        "columns": {"id": "int", "time": "timestamp", "x": "float", "c": "string", "y": "int"},
        "key": ["id"],
        "time": "time",
    }
}
PARAMS = """
as_of: "2013-03-02"
train: {seed: 1, threads: 2, tabm: {width: 8}}
register: {model: late}
breaker: {refusals: 3}
decide:
  min_test_rows: 500
  min_test_days: 7
  max_unmatched_share: 0.01
  threshold: 0.5
  calibration_bins: 10
  seed: 1
  approval: never
  approval_hours: 72
  rules:
    - {rule: floor, metric: roc_auc, at_least: 0.6}
    - {rule: ceiling, metric: log_loss, at_most: 0.69, or_champion: true}
    - {rule: calibration, max_error: 0.15, or_champion: true}
    - {rule: better, margin: 0.0, confidence: 0.975}
"""


def day(number: int) -> datetime:
    return FIRST + timedelta(days=number)


def events(seed: int = 0) -> pd.DataFrame:
    """Rows whose label follows x; days have a weather of their own."""
    random = np.random.default_rng(seed)
    n = DAYS * ROWS_A_DAY
    number = np.arange(n)
    x = random.normal(size=n)
    weather = random.normal(scale=0.4, size=DAYS)[number // ROWS_A_DAY]
    chance = 1 / (1 + np.exp(-(2 * x + weather)))
    minutes = pd.to_timedelta(number % ROWS_A_DAY * 20, unit="min")
    time = pd.to_datetime([FIRST] * n).as_unit("us") + pd.to_timedelta(number // ROWS_A_DAY, unit="D") + minutes
    c = np.where(random.random(n) < 0.3, "b", "a")
    return pd.DataFrame({"id": number, "time": time, "x": x, "c": c, "y": (random.random(n) < chance).astype("int64")})


@dataclass(frozen=True)
class Project:
    """The root of a workspace: params.yaml, tables, and whatever the steps write to data/."""

    root: Path

    @property
    def tables(self) -> Path:
        return self.root / "data" / "ingest" / "tables"

    def lay_out(self, rows: pd.DataFrame) -> None:
        """Write the tables, and the last 14 days as the test window."""
        (self.tables / "events").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(self.tables / "events" / "all.parquet", index=False)
        test = rows[rows["time"] >= day(46)].rename(columns={"y": "label"})
        test = test.assign(key=test["id"].astype("str"), label=test["label"].astype("int8"))
        (self.root / "data" / "prepare").mkdir(parents=True, exist_ok=True)
        test[["key", "time", "label", "x", "c"]].to_parquet(
            self.root / "data" / "prepare" / "test.parquet", index=False
        )

    def prepare(self, sql: str = SQL, windows: tuple[int, int, int] = (0, 32, 46), learned: int | None = None) -> None:
        """Write the windows' rows as the stage does; ``learned``: what was trained on went on to this day in truth."""
        from pipelines import rows
        from pipelines.schema import Table

        selected = rows.select(
            self.tables, None, sql, {name: Table.model_validate(one) for name, one in TABLES.items()}
        )
        days = {"train": windows[:2], "validation": windows[1:], "test": (46, DAYS)}
        if learned:
            days["train"] = (windows[0], learned)
        for name, (start, end) in days.items():
            within = selected[selected["time"].between(day(start), day(end), inclusive="left")]
            within.astype({"label": "int8"}).to_parquet(self.root / "data" / "prepare" / f"{name}.parquet", index=False)

    def train(
        self,
        iterations: int = 25,
        sql: str = SQL,
        windows: tuple[int, int, int] = (0, 32, 46),
        label: Callable[[pd.DataFrame], np.ndarray[Any, Any]] = lambda seen: seen["label"].to_numpy("float32"),
        seed: int = 1,
        learned: int | None = None,
        rate: float = 0.1,
        features: Mapping[str, list[str]] = MappingProxyType(FEATURES),
        more: Mapping[str, Any] = MappingProxyType({}),
        spoil: Callable[[Any], object] = lambda fitted: None,
    ) -> str:
        """Write data/{prepare,train,evaluate} as the stages do, with a small model; return its digest.

        ``label`` makes the labels that it learns, ``more`` goes into its schema, and ``spoil`` has the fitted
        classifier before it is written.
        """
        import sklearn.ensemble  # noqa: F401 (a limit of threads holds for what is loaded by then)

        from pipelines import baseline, model, rows
        from pipelines.schema import Features, Table

        start, middle, end = map(day, windows)
        schema = {
            "as_of": "2013-03-02",
            "features": dict(features),
            "tables": TABLES,
            "windows": {
                "train": {"start": start.isoformat(), "end": middle.isoformat(), "rows": 1, "label_rate": 0.5},
                "validation": {"start": middle.isoformat(), "end": end.isoformat(), "rows": 1, "label_rate": 0.5},
                "test": {"start": end.isoformat(), "end": day(DAYS).isoformat(), "rows": 1, "label_rate": 0.5},
            },
            **more,
        }
        declared = {name: Table.model_validate(table) for name, table in TABLES.items()}
        selected = rows.select(self.tables, None, sql, declared)
        seen = selected[selected["time"].between(start, day(learned) if learned else middle, inclusive="left")]
        transform = model.Transform.fit(seen, Features.model_validate(dict(features)))
        x, y = transform.encode(seen), label(seen)
        settings = baseline.HgbParams(iterations=iterations, patience=iterations, learning_rate=rate, max_leaf_nodes=8)
        categories = {len(transform.numeric): 3} if transform.categorical else {}
        with threadpool_limits(1):  # threads that wait for each other on a busy machine take longer than one
            fitted = baseline.fit_hgb((x, y), (x, y), categories, settings, seed)
        spoil(fitted)
        data = self.root / "data"
        write_json(data / "prepare" / "schema.json", schema)
        model.save(data / "train" / "model", "hgb", baseline.dumps(fitted), transform, schema, sql.encode())
        digest = model.load(data / "train" / "model").digest
        scores = {"hgb": {"log_loss": 0.5, "auc": 0.8}}
        write_json(data / "train" / "result.json", {"summary": "", "candidates": scores, "digest": digest})
        lines = ["candidate,epoch,train_log_loss,validation_log_loss", "hgb,1,0.7,0.71", "hgb,2,0.6,0.62"]
        (data / "train" / "history.csv").write_text("\n".join(lines) + "\n")
        write_json(data / "evaluate" / "metrics.json", {"roc_auc": 0.81, "log_loss": 0.49, "pr_auc": None})
        write_json(data / "evaluate" / "result.json", {"summary": "", "digest": digest})
        return digest

    def register(self) -> int:
        """Register what was trained last; return the version."""
        from pipelines.register import register

        data = self.root / "data"
        result = register(data / "train", data / "evaluate", data / "prepare", self.root / "params.yaml")
        write_json(data / "register" / "result.json", result)
        return int(result["version"])

    def decide(self) -> dict[str, Any]:
        """Judge what was registered last; return the step's result."""
        from pipelines.decide import judge

        data = self.root / "data"
        return judge(
            data / "register" / "result.json",
            self.tables,
            data / "validate" / "quarantine",
            data / "prepare" / "test.parquet",
            data / "decide",
            self.root / "params.yaml",
        )

    def bare_version(self, digest: str) -> int:
        """A registered version without a model, for what only moves it."""
        client = tracking.client()
        if not (experiments := client.search_experiments(filter_string="name = 'ballast'")):
            artifacts = (self.root / "var" / "mlflow" / "artifacts").as_uri()
            client.create_experiment(tracking.EXPERIMENT, artifact_location=artifacts)
            client.create_registered_model(registry.name())
            experiments = client.search_experiments(filter_string="name = 'ballast'")
        run_id = client.create_run(experiments[0].experiment_id).info.run_id
        tags = {tracking.DIGEST: digest, registry.LOCK: ""}
        return int(client.create_model_version(registry.name(), "nowhere", run_id, tags=tags).version)

    def decided(
        self,
        version: int,
        digest: str,
        verdict: str = "promote",
        approval: str = "never",
        warnings: tuple[str, ...] = (),
    ) -> str:
        """A decision of the gate on a version against the champion of now; return the record's hash."""
        from pipelines import record
        from pipelines.state import Decision, State

        state = State()
        facts = {
            "schema": record.SCHEMA,
            "verdict": verdict,
            "summary": f"{verdict.upper()} · for the test",
            "reasons": ["for the test"],
            "warnings": list(warnings),
            "model": registry.name(),
            "version": version,
            "digest": digest,
            "champion": {"version": state.champion(), "digest": None, "ledger_head": state.head()},
            "as_of": "2013-03-02",
            "test": None,
            "rules": [
                {
                    "rule": "test",
                    "severity": "block",
                    "measured": 1,
                    "needed": 1,
                    "passed": True,
                    "words": "for [the] test",
                }
            ],
            "metrics": {},
            "commit": "unknown",
            "lock": "",
            "trigger": {"kind": "laptop"},
            "actor": "me",
            "params": {"approval": approval, "approval_hours": 72.0},
            "decided_at": datetime.now(UTC).isoformat(),
        }
        made = record.keep(self.root / "data" / "decide", facts)
        state.remember(Decision(made, version, verdict, facts["summary"], facts["as_of"], facts["decided_at"]))
        return made


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A PostgreSQL server, where its programs are installed."""
    with serve() as made:
        yield made


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: MLflow takes seconds to make one."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        tracking.client().search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def rows() -> pd.DataFrame:
    return events()


@pytest.fixture
def project(tmp_path: Path, mlflow_template: Path, rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> Project:
    return project_in(tmp_path, mlflow_template, rows, monkeypatch)


def project_in(root: Path, mlflow_template: Path, rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project in the working directory, with its own state store and MLflow, apart from any DAG run."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "BALLAST_RUN", "BALLAST_DAG", "BALLAST_TRIGGER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("BALLAST_STATE_URI", raising=False)
    monkeypatch.setenv("BALLAST_VAR", str(root / "var"))
    monkeypatch.chdir(root)
    (root / "var" / "mlflow").mkdir(parents=True)
    shutil.copy(mlflow_template, root / "var" / "mlflow" / "mlflow.db")
    (root / "params.yaml").write_text(PARAMS)
    made = Project(root)
    made.lay_out(rows)
    return made


@pytest.fixture
def ballast(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command as a user calls it: arguments in; exit code, output and errors out."""

    def call(*arguments: str, answer: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ballast", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{answer}\n"))
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


def read(path: Path) -> Any:
    return json.loads(path.read_text())
