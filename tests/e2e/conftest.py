"""A project of another table and another question, as a user has it who changed three files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
DAYS, VISITS = 80, 60

SQL = """
SELECT
    visits.visit AS key,
    visits.at AS time,
    visits.returned = 1 AS label,
    visits.basket,
    hour(visits.at) AS hour,
    shops.floor_space,
    visits.channel,
    shops.city
FROM visits
LEFT JOIN shops USING (shop)
"""

EXPECTATIONS = """
visits:
  - expect_table_row_count_to_be_between: {min_value: 1, severity: critical}
  - expect_compound_columns_to_be_unique: {column_list: [visit, at], severity: critical}
  - expect_column_values_to_be_between: {column: basket, min_value: 0, max_value: 1000, severity: warning}
shops:
  - expect_table_row_count_to_be_between: {min_value: 1, severity: critical}
"""

LAND = {
    "source": "files",
    "options": {"visits": "inbox/visits-*.csv", "shops": "inbox/shops.parquet"},
    "partition": "month",
    "tables": {
        "visits": {
            "time": "at",
            "key": ["visit"],
            "columns": {
                "visit": "string",
                "at": "timestamp",
                "shop": "string",
                "channel": "string",
                "basket": "float",
                "returned": "int",
            },
        },
        "shops": {"key": ["shop"], "columns": {"shop": "string", "city": "string", "floor_space": "int"}},
    },
}


RULES = [
    {"rule": "better", "margin": 0.0, "confidence": 0.975},
    {"rule": "ceiling", "metric": "log_loss", "at_most": 0.69},
    {"rule": "calibration", "max_error": 0.2},
    {"rule": "slices", "columns": ["channel"], "max_worse": 0.05, "min_rows": 100, "confidence": 0.975},
]


def write_source(inbox: Path, days: int = DAYS, first: str = "2024-01-01", flip_from: int | None = None) -> None:
    """Days of visits in two CSV files, and the shops; two baskets are impossible.

    From day ``flip_from`` on the label depends on the inputs the other way round, while the inputs stay as they were.
    """
    random = np.random.default_rng(3)
    n = days * VISITS
    after = np.sort(random.integers(0, days * 86_400, n))
    at = pd.Timestamp(first, tz="UTC") + pd.to_timedelta(after, unit="s")
    basket = random.gamma(2.0, 30.0, n)
    channel = random.choice(["app", "till"], n)
    sign = np.where(after >= (days if flip_from is None else flip_from) * 86_400, -1, 1)
    chance = 1 / (1 + np.exp(-sign * ((basket - 60) / 25 + (channel == "app"))))
    visits = pd.DataFrame(
        {
            "visit": [f"v{number}" for number in range(n)],
            "at": at.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "shop": random.choice(["a", "b", "c"], n),
            "channel": channel,
            "basket": basket.round(2),
            "returned": (random.random(n) < chance).astype(int),
        }
    )
    visits.loc[[100, 200], "basket"] = -5.0
    inbox.mkdir()
    visits[: n // 2].to_csv(inbox / "visits-1.csv", index=False)
    visits[n // 2 :].to_csv(inbox / "visits-2.csv", index=False)
    shops = pd.DataFrame({"shop": ["a", "b", "c"], "city": ["Rome", "Lyon", "Graz"], "floor_space": [300, 120, 80]})
    shops.to_parquet(inbox / "shops.parquet")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project with three files changed, nothing else, and its source."""
    return own_project(tmp_path / "project")


def own_project(root: Path, days: int = DAYS, candidates: Sequence[str] = ("tabm", "hgb"), **source: Any) -> Path:
    """Make such a project: a git repository with one commit. ``source`` goes to ``write_source``."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, root / name)
    params = yaml.safe_load((root / "params.yaml").read_text())
    features = {"numeric": ["basket", "hour", "floor_space"], "categorical": ["channel", "city"]}
    params |= {"as_of": "2024-03-20", "land": LAND}
    params["prepare"] |= {"features": features, "validation_days": 10, "test_days": 10}
    params["evaluate"]["slices"] = ["channel"]
    params["train"]["candidates"] = list(candidates)
    params["train"]["tabm"] |= {"epochs": 3}
    params["register"]["model"] = "returns"
    params["decide"] |= {"min_test_rows": 300, "threshold": 0.5, "rules": RULES}
    params["drift"] |= {"min_rows": 300, "columns": {}}
    for trigger in params["policy"]["triggers"]:
        trigger["min_rows"] = 300
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (root / "pipelines" / "prepare.sql").write_text(SQL)
    (root / "pipelines" / "validate.yaml").write_text(EXPECTATIONS)
    write_source(root / "inbox", days, **source)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "Our own data"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a person's shell, with our interpreter first on the PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BALLAST_", "AIRFLOW", "MLFLOW"))}
    kept.pop("PYTHONPATH", None)
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", **more}
