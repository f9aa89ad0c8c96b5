"""Judge the tables by the expectations in validate.yaml; reject the data, or put single rows in quarantine.

A critical finding rejects the data. A warning is recorded, and the single rows that it is about are set aside: the
full rows and the reasons, in ``quarantine/<table>.parquet``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pydantic import Field

from pipelines import stage
from pipelines.errors import DataRejected, exit_with
from pipelines.expectations import Finding, Judged, build, count, draw_docs, judge, new_context, one_line, read_suite
from pipelines.files import whole_folder, write_json
from pipelines.params import Params, load
from pipelines.params import as_of as read_as_of
from pipelines.schema import Declared, Table

NAMED_FINDINGS = 3  # in the error of a rejection
NEWEST = timedelta(days=30)
INGEST_AGAIN = "Ingest the tables again"


class ValidateParams(Params):
    """Section ``validate`` of params.yaml."""

    max_quarantine_share: float = Field(ge=0, le=1)


@dataclass(frozen=True)
class Verdict:
    """What all tables showed, in the order of the suite."""

    as_of: date
    tables: Sequence[Judged]

    @property
    def critical(self) -> list[Finding]:
        """The findings that reject the data."""
        return [finding for finding in self.findings if finding.severity == "critical"]

    @property
    def warnings(self) -> list[Finding]:
        """The findings that are only recorded."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    @property
    def findings(self) -> list[Finding]:
        """All findings."""
        return [finding for judged in self.tables for finding in judged.findings]

    @property
    def expectations(self) -> int:
        """How many expectations were looked at."""
        return sum(judged.expectations for judged in self.tables)

    def record(self) -> dict[str, Any]:
        """The content of verdict.json."""
        return {
            "passed": not self.critical,
            "as_of": self.as_of.isoformat(),
            "expectations": self.expectations,
            "rows": {judged.table: judged.rows for judged in self.tables},
            "quarantined": {judged.table: len(judged.reasons) for judged in self.tables if judged.reasons},
            "critical": [asdict(finding) for finding in self.critical],
            "warnings": [asdict(finding) for finding in self.warnings],
        }

    def result(self) -> dict[str, Any]:
        """The content of result.json."""
        aside = sum(len(judged.reasons) for judged in self.tables)
        parts = [f"REJECTED by {count(len(self.critical), 'critical finding')}" if self.critical else "passed"]
        parts.append(count(self.expectations, "expectation"))
        if self.warnings:
            parts.append(f"{count(len(self.warnings), 'warning')}, {count(aside, 'row')} in quarantine")
        return {
            "summary": " · ".join(parts),
            "passed": not self.critical,
            "expectations": self.expectations,
            "critical": len(self.critical),
            "warnings": len(self.warnings),
            "quarantined": aside,
        }


def validate(
    tables: Path,
    expectations: Path,
    out: Path,
    params: ValidateParams,
    declared: Mapping[str, Table],
    as_of: date,
) -> Verdict:
    """Write verdict.json, quarantine/ and docs/ under ``out``, whatever the verdict; the caller stops at a failed one.

    Raises ParamsError where the suite names a table, column, expectation or argument that there is not.
    """
    suite = read_suite(expectations, declared)
    checks = {name: build(f"{expectations}: `{name}`", lines, declared[name], as_of) for name, lines in suite.items()}
    context = new_context()
    judged: list[Judged] = []
    with whole_folder(out / "quarantine") as quarantine:
        for name in suite:
            try:
                data = read_table(tables / name, declared[name])
            except DataRejected as error:
                judged.append(_unreadable(name, error))
                continue
            seen = judge(context, name, data, checks[name], as_of)
            too_many = _too_many(seen, _newest(data, declared[name].time), params.max_quarantine_share)
            judged.append(replace(seen, findings=[*seen.findings, *too_many]))
            if seen.reasons:
                pq.write_table(_with_reasons(data, seen.reasons), quarantine / f"{name}.parquet")
    verdict = Verdict(as_of, judged)
    write_json(out / "verdict.json", verdict.record())
    draw_docs(context, out / "docs")
    return verdict


def _unreadable(table: str, error: DataRejected) -> Judged:
    return Judged(table, 0, 0, [Finding(table, "readable", None, "critical", None, None, f"{table}: {error}")], {})


def _too_many(judged: Judged, newest: set[int], max_share: float) -> Iterator[Finding]:
    """A finding of its own if more rows would go to quarantine than may: of the whole table, else of its newest days.

    A change of unit spoils the new rows alone, which are ever fewer of all so far.
    """
    shares = {"": (len(judged.reasons), judged.rows)}
    shares[f"of the newest {NEWEST.days} days, "] = (len(newest & set(judged.reasons)), len(newest))
    for where, (bad, of) in shares.items():
        if bad > max_share * of:
            share = f"{where}{bad:,} of {count(of, 'row')} would go to quarantine, a share of {bad / of:.3g}"
            message = f"{judged.table}: {share}; validate.max_quarantine_share is {max_share:g}"
            yield Finding(judged.table, "max_quarantine_share", None, "critical", bad, of, message)
            return


def _newest(data: pa.Table, time: str | None) -> set[int]:
    """The positions of the rows of the newest days; none where the table has no time."""
    if time not in data.column_names or (last := pc.max(data[time]).as_py()) is None:
        return set()
    found: set[int] = set(np.flatnonzero(pc.fill_null(pc.greater(data[time], last - NEWEST), False)).tolist())
    return found


def _with_reasons(data: pa.Table, reasons: Mapping[int, Sequence[str]]) -> pa.Table:
    """The rows at the positions in ``reasons``, in their order, and why they are set aside."""
    positions = sorted(reasons)
    column = pa.array(["; ".join(reasons[position]) for position in positions], pa.string())
    return data.take(positions).append_column("reason", column)


def read_table(folder: Path, table: Table) -> pa.Table:
    """All partitions of a table in the order of their names; DataRejected where they do not fit together.

    Declared columns that are not there, and others that are, are for the suite to judge.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        return table.arrow.empty_table()
    try:
        schemas = {file.name: pq.read_schema(file) for file in files}
        first = schemas[files[0].name]
        for name, found in schemas.items():
            _check_partition(name, found, first, table)
        return ds.dataset([str(file) for file in files], schema=first, format="parquet").to_table()
    except (pa.ArrowException, OSError) as error:
        raise DataRejected(f"a partition cannot be read: {one_line(error)}. {INGEST_AGAIN}.") from None


def _check_partition(name: str, found: pa.Schema, first: pa.Schema, table: Table) -> None:
    if found.names != first.names:
        differ = sorted(set(found.names) ^ set(first.names)) or found.names
        raise DataRejected(f"{name} differs from the first partition in {', '.join(differ)}. {INGEST_AGAIN}.")
    for field in table.arrow:
        if field.name in found.names and (kind := found.field(field.name).type) != field.type:
            raise DataRejected(f"{name} holds `{field.name}` as {kind}, not {field.type}. {INGEST_AGAIN}.")


def main() -> None:
    """Validate what was ingested; a critical finding ends it with exit code 65, the verdict being written."""
    args = stage.options("validate", "tables", "expectations", "out")
    params = load(args.params, "validate", ValidateParams)
    declared = load(args.params, "land", Declared).tables
    verdict = validate(args.tables, args.expectations, args.out, params, declared, read_as_of(args.params))
    stage.finish("validate", args.out, verdict.result())
    for finding in verdict.findings:
        print(f"{'':<10} {finding.severity} · {finding.message}", flush=True)
    if verdict.critical:
        raise DataRejected(_rejection(verdict.critical, args.out, args.expectations))


def _rejection(critical: Sequence[Finding], out: Path, expectations: Path) -> str:
    named = " | ".join(finding.message for finding in critical[:NAMED_FINDINGS])
    more = f" | and {len(critical) - NAMED_FINDINGS} more" if len(critical) > NAMED_FINDINGS else ""
    remedy = f"Correct the source, or {expectations} if the data is right"
    return f"The data was rejected: {named}{more}. {remedy}; all findings: {out}/verdict.json, {out}/docs/index.html."


if __name__ == "__main__":
    exit_with(main)
