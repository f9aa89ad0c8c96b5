"""The example's year of flights as the pipeline lays it out, for benchmarks that train as of many dates.

Its tables are landed, ingested and validated once, as of 2014-01-01, and the SQL makes their rows once. `prepare` cuts
its windows before any earlier as-of date out of these: no row sees what was not known at its time (the law that
tests/pipelines/test_prepare.py holds), so they are the rows that the tables of that date would have given.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import yaml

from pipelines import rows
from pipelines.ingest import ingest
from pipelines.land import LandParams, land
from pipelines.params import load
from pipelines.prepare import PrepareParams, prepare
from pipelines.sources import connect
from pipelines.validate import ValidateParams, validate

ROOT = Path(__file__).resolve().parent.parent
SQL = ROOT / "pipelines" / "prepare.sql"
END = date(2014, 1, 1)


@dataclass(frozen=True)
class Year:
    """A folder with params.yaml, the year's tables and what validation put aside, and all rows that the SQL makes."""

    folder: Path

    @property
    def params(self) -> Path:
        """The settings: those of params.yaml, with what the command line set."""
        return self.folder / "params.yaml"

    @property
    def rows(self) -> pd.DataFrame:
        """Every row of the year, as ``rows.select`` gave them."""
        return pd.read_parquet(self.folder / "rows.parquet")

    @property
    def labelled(self) -> pd.DataFrame:
        """Those with a label."""
        frame = self.rows
        return frame[frame["label"].notna()]

    def prepare(self, as_of: date, out: Path) -> None:
        """The stage `prepare` as of a date, with the rows as they are."""
        params, declared = load(self.params, "prepare", PrepareParams), load(self.params, "land", LandParams).tables
        with patch.object(rows, "select", lambda *_: self.rows):
            prepare(self.folder / "tables", self.folder / "quarantine", SQL, out, params, declared, as_of)

    def known(self, as_of: date) -> pd.DataFrame:
        """All rows with a label that is known on the as-of date."""
        delay = load(self.params, "prepare", PrepareParams).label_delay_days
        frame = self.labelled
        return frame[frame["time"] < midnight(as_of - timedelta(days=delay))]


def lay_out(folder: Path, overrides: Iterable[str] = ()) -> Year:
    """Land, ingest, validate and select the year into ``folder``; ``overrides`` are what ``--set`` was given."""
    year = Year(folder)
    year.params.write_text(yaml.safe_dump(overridden(overrides), sort_keys=False))
    params = load(year.params, "land", LandParams)
    land(connect(params.source, params.options), END, folder / "landing", folder, params)
    ingest(folder / "manifest.json", folder / "landing", folder, params.tables)
    suite = ROOT / "pipelines" / "validate.yaml"
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        validate(folder / "tables", suite, folder, load(year.params, "validate", ValidateParams), params.tables, END)
    frame = rows.select(folder / "tables", folder / "quarantine", SQL.read_text(encoding="utf-8"), params.tables)
    frame.to_parquet(folder / "rows.parquet", index=False)
    return year


def between(frame: pd.DataFrame, start: date, end: date) -> pd.DataFrame:
    """The rows from midnight UTC of ``start`` to midnight UTC of ``end``."""
    return frame[frame["time"].between(midnight(start), midnight(end), inclusive="left")]


def midnight(day: date) -> datetime:
    """Its beginning, UTC."""
    return datetime.combine(day, time(), tzinfo=UTC)


def next_month(first: date) -> date:
    """The first day of the month after."""
    return (first + timedelta(days=31)).replace(day=1)


def overridden(overrides: Iterable[str]) -> dict[str, Any]:
    """The values of params.yaml, with each ``section.name=value`` in its place; what they mean, `load` checks."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for override in overrides:
        path, _, value = override.partition("=")
        *above, name = path.split(".")
        place = values
        for step in above:
            if not isinstance(place.get(step), dict):
                sys.exit(f"--set {override}: params.yaml has no section `{step}` there.")
            place = place[step]
        place[name] = yaml.safe_load(value)
    return values


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with ``--set``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="a setting, as in params.yaml"
    )
    return parser
