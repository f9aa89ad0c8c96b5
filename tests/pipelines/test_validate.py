from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import ParamsError
from pipelines.expectations import build, read_suite
from pipelines.places import ROOT
from pipelines.schema import Table
from pipelines.validate import ValidateParams, Verdict, validate

AS_OF = date(2024, 5, 1)
TRIPS = Table(
    time="at",
    key=["id"],
    columns={"id": "int", "at": "timestamp", "fare": "float", "zone": "string", "rides": "int", "paid": "bool"},
)
ROWS = "  - expect_table_row_count_to_be_between: {min_value: 1, severity: critical}\n"
COLUMNS = "  - expect_table_columns_to_match_ordered_list: {column_list: declared, severity: critical}\n"
KEY = "  - expect_column_values_to_be_unique: {column: id, severity: critical}\n"
FRESH = "  - expect_column_max_to_be_between: {column: at, max_age_days: 3, severity: critical}\n"
FARE = "  - expect_column_values_to_be_between: {column: fare, min_value: 0, max_value: 100, severity: warning}\n"
ZONE = "  - expect_column_values_to_be_in_set: {column: zone, value_set: [A, B], severity: warning}\n"
FARE_REASON = "fare: expected values to be between (min_value 0, max_value 100)"
ZONE_REASON = "zone: expected values to be in set (value_set A, B)"


def trips(count: int = 4, **changed: list[Any]) -> dict[str, list[Any]]:
    """Rows that meet every expectation of this file, the last of them an hour before the as-of date."""
    last = datetime(2024, 4, 30, 23, tzinfo=UTC)
    good: dict[str, list[Any]] = {
        "id": list(range(count)),
        "at": [last - timedelta(hours=count - 1 - place) for place in range(count)],
        "fare": [10.0] * count,
        "zone": ["A"] * count,
        "rides": [1] * count,
        "paid": [True] * count,
    }
    return {**good, **changed}


def lay(tables: Path, rows: Mapping[str, list[Any]], partition: str = "2024-04-30", schema: pa.Schema = None) -> None:
    (tables / "trips").mkdir(parents=True, exist_ok=True)
    data = pa.table(dict(rows), schema=schema or TRIPS.arrow)
    pq.write_table(data, tables / "trips" / f"{partition}.parquet")


def judge(root: Path, suite: str, share: float = 1.0, declared: Table = TRIPS) -> Verdict:
    """Validate ``root/tables`` by a suite for ``trips``, into ``root/out``."""
    (root / "validate.yaml").write_text("trips:\n" + suite)
    params = ValidateParams(max_quarantine_share=share)
    return validate(root / "tables", root / "validate.yaml", root / "out", params, {"trips": declared}, AS_OF)


def quarantine(root: Path) -> list[dict[str, Any]]:
    return pq.read_table(root / "out" / "quarantine" / "trips.parquet").to_pylist()


def told(verdict: Verdict) -> list[tuple[str, str]]:
    return [(finding.severity, finding.message) for finding in verdict.findings]


def test_validate_good_table_passes_with_no_quarantine(tmp_path: Path) -> None:
    lay(tmp_path / "tables", trips(3))
    verdict = judge(tmp_path, ROWS + COLUMNS + KEY + FRESH + FARE + ZONE, share=0)
    assert verdict.result() == {
        "summary": "passed · 6 expectations",
        "passed": True,
        "expectations": 6,
        "critical": 0,
        "warnings": 0,
        "quarantined": 0,
    }
    assert list((tmp_path / "out" / "quarantine").iterdir()) == []
    assert json.loads((tmp_path / "out" / "verdict.json").read_text()) == {
        "passed": True,
        "as_of": "2024-05-01",
        "expectations": 6,
        "rows": {"trips": 3},
        "quarantined": {},
        "critical": [],
        "warnings": [],
    }


@pytest.mark.parametrize("folder", ["no folder", "no file", "no row"])
def test_validate_empty_table_stops_at_its_row_count(tmp_path: Path, folder: str) -> None:
    if folder == "no file":
        (tmp_path / "tables" / "trips").mkdir(parents=True)
    if folder == "no row":
        lay(tmp_path / "tables", trips(0))
    verdict = judge(tmp_path, ROWS + FRESH + FARE)
    assert told(verdict) == [("critical", "trips: expected table row count to be between (min_value 1); found 0")]
    assert verdict.result()["summary"] == "REJECTED by 1 critical finding · 1 expectation"


def test_validate_value_out_of_range_sets_exactly_that_row_aside(tmp_path: Path) -> None:
    rows = trips(4, fare=[10.0, 100.5, None, 0.0], rides=[1, 2, None, 4])
    lay(tmp_path / "tables", rows)
    verdict = judge(tmp_path, ROWS + FARE)
    found = "not so in 1 of 4 rows, such as 100.5"
    assert told(verdict) == [("warning", f"trips.{FARE_REASON}; {found}")]
    assert verdict.result()["summary"] == "passed · 2 expectations · 1 warning, 1 row in quarantine"
    assert quarantine(tmp_path) == [{name: values[1] for name, values in rows.items()} | {"reason": FARE_REASON}]
    aside = pq.read_schema(tmp_path / "out" / "quarantine" / "trips.parquet")
    assert aside.equals(TRIPS.arrow.append(pa.field("reason", pa.string())))


def test_validate_several_faults_of_one_row_are_joined_in_the_order_of_the_suite(tmp_path: Path) -> None:
    lay(tmp_path / "tables", trips(3, fare=[-1.0, 10.0, -2.0], zone=["Q", "Q", "A"]))
    judge(tmp_path, ROWS + FARE + ZONE)
    assert [(row["id"], row["reason"]) for row in quarantine(tmp_path)] == [
        (0, f"{FARE_REASON}; {ZONE_REASON}"),
        (1, ZONE_REASON),
        (2, FARE_REASON),
    ]


def test_validate_partitions_are_one_table_in_the_order_of_their_names(tmp_path: Path) -> None:
    lay(tmp_path / "tables", trips(2, id=[5, 8], fare=[-1.0, 1.0]), "2024-04-30")
    lay(tmp_path / "tables", trips(2, id=[5, 7], fare=[1.0, -1.0]), "2024-04-29")
    verdict = judge(tmp_path, ROWS + KEY + FARE)
    assert verdict.record()["rows"] == {"trips": 4}
    assert [row["id"] for row in quarantine(tmp_path)] == [7, 5]
    assert told(verdict)[0] == (
        "critical",
        "trips.id: expected values to be unique; not so in 2 of 4 rows, such as 5",
    )


def test_validate_critical_finding_rejects_and_keeps_the_row_out_of_quarantine(tmp_path: Path) -> None:
    lay(tmp_path / "tables", trips(2, fare=[-1.0, 10.0]))
    verdict = judge(tmp_path, ROWS + FARE.replace("warning", "critical"))
    assert not verdict.record()["passed"]
    assert not list((tmp_path / "out" / "quarantine").iterdir())
    (finding,) = json.loads((tmp_path / "out" / "verdict.json").read_text())["critical"]
    assert finding == {
        "table": "trips",
        "expectation": "expect_column_values_to_be_between",
        "column": "fare",
        "severity": "critical",
        "unexpected": 1,
        "of": 2,
        "message": f"trips.{FARE_REASON}; not so in 1 of 2 rows, such as -1",
    }


def test_validate_compound_key_given_twice_is_critical(tmp_path: Path) -> None:
    rows = trips(3, id=[1, 1, 1], zone=["A", "B", "A"])
    lay(tmp_path / "tables", rows)
    verdict = judge(
        tmp_path, ROWS + "  - expect_compound_columns_to_be_unique: {column_list: [id, zone], severity: critical}\n"
    )
    words = "expected compound columns to be unique (column_list id, zone)"
    assert told(verdict) == [("critical", f"trips: {words}; not so in 2 of 3 rows, such as id 1, zone A")]
    assert verdict.findings[0].column == "id, zone"


@pytest.mark.parametrize(
    ("newest", "passed"),
    [
        (datetime(2024, 4, 28, 0, tzinfo=UTC), True),
        (datetime(2024, 4, 27, 23, tzinfo=UTC), False),
        (datetime(2024, 5, 1, 0, tzinfo=UTC), False),
    ],
)
def test_validate_newest_row_must_lie_within_max_age_before_the_as_of_date(
    tmp_path: Path, newest: datetime, passed: bool
) -> None:
    lay(tmp_path / "tables", trips(2, at=[newest - timedelta(days=9), newest]))
    verdict = judge(tmp_path, ROWS + FRESH)
    assert verdict.record()["passed"] is passed
    if not passed:
        words = "trips.at: expected the newest value within 3 days before 2024-05-01"
        assert told(verdict) == [("critical", f"{words}; found {newest.isoformat()}")]


def test_validate_missing_column_is_critical_even_for_a_warning(tmp_path: Path) -> None:
    rows = trips()
    del rows["fare"]
    kept = pa.schema([field for field in TRIPS.arrow if field.name != "fare"])
    lay(tmp_path / "tables", rows, schema=kept)
    verdict = judge(tmp_path, ROWS + COLUMNS + FARE)
    (_, columns), (severity, fare) = told(verdict)
    assert columns.endswith("; found id, at, zone, rides, paid")
    assert severity == "critical"
    assert fare.startswith(f"trips.{FARE_REASON}; could not be checked: ")
    assert '"fare"' in fare


def test_validate_partition_of_another_type_is_rejected_by_name(tmp_path: Path) -> None:
    lay(tmp_path / "tables", trips(1), "2024-04-29")
    other = TRIPS.arrow.set(TRIPS.arrow.get_field_index("fare"), pa.field("fare", pa.string()))
    lay(tmp_path / "tables", trips(1, fare=["10"]), schema=other)
    assert told(judge(tmp_path, ROWS)) == [
        ("critical", "trips: 2024-04-30.parquet holds `fare` as string, not double. Ingest the tables again.")
    ]


def test_validate_partitions_of_different_columns_are_rejected_by_name(tmp_path: Path) -> None:
    lay(tmp_path / "tables", trips(1), "2024-04-29")
    lay(tmp_path / "tables", trips(1) | {"tip": [1.0]}, schema=TRIPS.arrow.append(pa.field("tip", pa.float64())))
    assert told(judge(tmp_path, ROWS)) == [
        ("critical", "trips: 2024-04-30.parquet differs from the first partition in tip. Ingest the tables again.")
    ]


def test_validate_damaged_partition_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "tables" / "trips").mkdir(parents=True)
    (tmp_path / "tables" / "trips" / "2024-04-30.parquet").write_bytes(b"no parquet")
    ((severity, message),) = told(judge(tmp_path, ROWS))
    assert severity == "critical"
    assert message.startswith("trips: a partition cannot be read: ")


@pytest.mark.parametrize(("share", "passed"), [(0.5, True), (0.49, False)])
def test_validate_more_in_quarantine_than_the_bound_is_critical(tmp_path: Path, share: float, passed: bool) -> None:
    lay(tmp_path / "tables", trips(4, fare=[-1.0, -1.0, 1.0, 1.0], zone=["Q", "A", "A", "A"]))
    verdict = judge(tmp_path, ROWS + FARE + ZONE, share)
    assert verdict.record()["passed"] is passed
    assert verdict.record()["quarantined"] == {"trips": 2}
    if not passed:
        share_words = "2 of 4 rows would go to quarantine, a share of 0.5; validate.max_quarantine_share is 0.49"
        assert told(verdict)[-1] == ("critical", f"trips: {share_words}")


@pytest.mark.parametrize(("bad", "passed"), [(2, True), (3, False)])
def test_validate_more_in_quarantine_of_the_newest_days_is_critical(tmp_path: Path, bad: int, passed: bool) -> None:
    """Three bad rows in four are few of a long past."""
    march = [datetime(2024, 3, 1, tzinfo=UTC)] * 96
    lay(tmp_path / "tables", trips(96) | {"at": march}, "2024-03-31")
    lay(tmp_path / "tables", trips(4, fare=[-1.0] * bad + [1.0] * (4 - bad)))
    verdict = judge(tmp_path, ROWS + FARE, share=0.5)
    assert verdict.record()["passed"] is passed
    if not passed:
        words = "of the newest 30 days, 3 of 4 rows would go to quarantine, a share of 0.75; "
        assert told(verdict)[-1] == ("critical", f"trips: {words}validate.max_quarantine_share is 0.5")


def test_validate_bad_rows_of_long_ago_reject_nothing(tmp_path: Path) -> None:
    march = [datetime(2024, 3, 1, tzinfo=UTC)] * 4
    lay(tmp_path / "tables", trips(4, fare=[-1.0] * 4) | {"at": march}, "2024-03-31")
    lay(tmp_path / "tables", trips(96))
    assert judge(tmp_path, ROWS + FARE, share=0.5).record()["passed"]


def test_validate_nan_and_null_are_both_missing_and_stay_what_they_were(tmp_path: Path) -> None:
    lay(tmp_path / "tables", trips(3, fare=[math.nan, None, 1.0]))
    verdict = judge(tmp_path, ROWS + "  - expect_column_values_to_not_be_null: {column: fare, severity: warning}\n")
    assert told(verdict) == [("warning", "trips.fare: expected values to not be null; not so in 2 of 3 rows")]
    nan, null = (row["fare"] for row in quarantine(tmp_path))
    assert math.isnan(nan)
    assert null is None


def test_validate_column_of_nulls_fails_what_needs_values_and_passes_ranges(tmp_path: Path) -> None:
    lay(tmp_path / "tables", trips(2, fare=[None, None], zone=[None, None]))
    share = (
        "  - expect_column_proportion_of_non_null_values_to_be_between: {column: fare, min_value: 0.9, severity: %s}\n"
    )
    mean = "  - expect_column_mean_to_be_between: {column: fare, min_value: 0, severity: critical}\n"
    verdict = judge(tmp_path, ROWS + FARE + ZONE + share % "warning" + mean)
    assert told(verdict) == [
        ("warning", "trips.fare: expected proportion of non null values to be between (min_value 0.9); found 0"),
        ("critical", "trips.fare: expected mean to be between (min_value 0); found null"),
    ]
    assert not list((tmp_path / "out" / "quarantine").iterdir())


def test_validate_label_rate_by_quantiles_is_told_in_the_words_of_the_suite(tmp_path: Path) -> None:
    suite = """  - expect_column_quantile_values_to_be_between:
      column: fare
      quantile_ranges: {quantiles: [0.4, 0.95], value_ranges: [[null, 15], [16, null]]}
      description: 5 % to 60 % of the fares are above 15
      severity: critical
"""
    lay(tmp_path / "tables", trips(10, fare=[10.0] * 5 + [20.0] * 5))
    assert not judge(tmp_path, ROWS + suite).findings
    lay(tmp_path / "tables", trips(10, fare=[10.0] * 3 + [20.0] * 7))
    assert told(judge(tmp_path, ROWS + suite)) == [
        (
            "critical",
            "trips.fare: expected that 5 % to 60 % of the fares are above 15; found quantiles 0.4, 0.95, values 20, 20",
        )
    ]


def test_validate_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    lay(tmp_path / "tables", trips(5, fare=[-1.0, 1.0, 200.0, 1.0, None], zone=["A", "Q", "Q", "B", None]))

    def outs() -> dict[str, str]:
        judge(tmp_path, ROWS + KEY + FARE + ZONE, share=0.1)
        files = [file for file in (tmp_path / "out").rglob("*") if file.is_file() and "docs" not in file.parts]
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}

    first = outs()
    assert [Path(file).name for file in first] == ["trips.parquet", "verdict.json"]
    assert outs() == first
    assert str(tmp_path) not in (tmp_path / "out" / "verdict.json").read_text()


def test_validate_draws_data_docs_over_those_of_an_earlier_run(tmp_path: Path) -> None:
    stale = tmp_path / "out" / "docs" / "validations" / "old.html"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    lay(tmp_path / "tables", trips(2, fare=[-1.0, 1.0]))
    judge(tmp_path, ROWS + FARE)
    assert not stale.exists()
    assert (tmp_path / "out" / "docs" / "index.html").exists()
    (page,) = (tmp_path / "out" / "docs" / "validations").rglob("*.html")
    assert "1 unexpected values found" in page.read_text()


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (ROWS + KEY.replace("unique", "uniqe"), "did you mean `expect_column_values_to_be_unique`?"),
        (ROWS + FARE.replace("max_value", "max_vlaue"), "did you mean `max_value`?"),
        (ROWS + FARE.replace("fare", "fair"), "`fair` is not a column of it; did you mean `fare`?"),
        (ROWS + ZONE.replace("[A, B]", "7"), "expect_column_values_to_be_in_set cannot take these arguments"),
        (ROWS + FARE.replace("warning", "fatal"), "`trips` expectation 2 `severity`: Input should be 'critical' or"),
        (ROWS + "  - expect_column_to_exist: {column: id}\n", "must say `severity: critical` or `severity: warning`"),
        (ROWS + "  - expect_column_to_exist\n", "an expectation reads `expect_...: {severity: critical, ...}`"),
        (ROWS + FRESH.replace("3", "soon"), "max_age_days is a number above 0 (found 'soon')"),
        (ROWS + FARE.replace("min_value: 0", "max_age_days: 3"), "`max_age_days` is not an argument of"),
        (KEY, "must begin with `expect_table_row_count_to_be_between: {min_value: 1, severity: critical}`"),
        (ROWS.replace("min_value: 1", "max_value: 9"), "must begin with `expect_table_row_count_to_be_between"),
        (ROWS.replace("critical", "warning"), "must begin with `expect_table_row_count_to_be_between"),
        (ROWS + "trip:\n" + ROWS, "`trip` is not a table of params.yaml; did you mean `trips`?"),
        ("  - [\n", "is not YAML"),
    ],
)
def test_validate_wrong_suite_names_what_is_wrong_and_the_nearest_right_name(
    tmp_path: Path, suite: str, message: str
) -> None:
    with pytest.raises(ParamsError) as raised:
        judge(tmp_path, suite)
    assert message in str(raised.value)
    assert "validate.yaml" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_validate_suite_of_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "validate.yaml").write_text("# nothing yet\n")
    with pytest.raises(ParamsError, match="the suite: Input should be a valid dictionary"):
        read_suite(tmp_path / "validate.yaml", {"trips": TRIPS})
    with pytest.raises(ParamsError, match=r"There is no .*other\.yaml"):
        read_suite(tmp_path / "other.yaml", {"trips": TRIPS})


def test_validate_table_with_a_column_of_the_quarantine_is_refused(tmp_path: Path) -> None:
    taken = Table(key=["id"], columns={"id": "int", "reason": "string"})
    with pytest.raises(ParamsError, match="has a column `reason`"):
        judge(tmp_path, ROWS, declared=taken)


def test_validate_shipped_suite_fits_the_shipped_params() -> None:
    settings_ = yaml.safe_load((ROOT / "params.yaml").read_text())
    declared = {name: Table.model_validate(table) for name, table in settings_["land"]["tables"].items()}
    suite = read_suite(ROOT / "pipelines" / "validate.yaml", declared)
    assert list(suite) == list(declared)
    for name, lines in suite.items():
        assert len(build(name, lines, declared[name], AS_OF)) == len(lines)


def test_validate_as_a_process_rejects_with_65_and_writes_what_it_found(tmp_path: Path) -> None:
    lay(tmp_path / "tables", trips(3, id=[1, 1, None], fare=[-1.0, 1.0, 1.0]))
    keyed = KEY + "  - expect_column_values_to_not_be_null: {column: id, severity: critical}\n"
    (tmp_path / "validate.yaml").write_text("trips:\n" + ROWS + keyed + FARE)
    params = {
        "as_of": "2024-05-01",
        "land": {"source": "files", "tables": {"trips": TRIPS.model_dump()}},
        "validate": {"max_quarantine_share": 0.5},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    options = ["--params", "params.yaml", "--tables", "tables", "--expectations", "validate.yaml", "--out", "out"]
    # With every log line on: Great Expectations must not be heard.
    loud = "import logging, sys; logging.basicConfig(level=0); from pipelines import errors, validate; "
    command = [sys.executable, "-c", loud + "errors.exit_with(validate.main)", *options]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 65
    summary = "REJECTED by 2 critical findings · 4 expectations · 1 warning, 1 row in quarantine"
    unique = "trips.id: expected values to be unique; not so in 2 of 3 rows, such as 1"
    null = "trips.id: expected values to not be null; not so in 1 of 3 rows"
    assert done.stdout.splitlines() == [
        f"validate   {summary}",
        f"           critical · {unique}",
        f"           critical · {null}",
        f"           warning · trips.{FARE_REASON}; not so in 1 of 3 rows, such as -1",
    ]
    assert [line for line in done.stderr.splitlines() if "great_expectations" in line] == []
    assert done.stderr.splitlines()[-1] == (
        f"error: The data was rejected: {unique} | {null}. Correct the source, or validate.yaml if the data is right; "
        "all findings: out/verdict.json, out/docs/index.html."
    )
    assert json.loads((tmp_path / "out" / "result.json").read_text())["summary"] == summary
    assert [row["id"] for row in quarantine(tmp_path)] == [1]
    assert (tmp_path / "out" / "docs" / "index.html").exists()


fares = st.one_of(st.none(), st.floats(allow_infinity=True), st.sampled_from([0.0, 100.0, 100.1, -0.1]))
zones = st.sampled_from(["A", "B", "Q", "", None])


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(fares, zones), min_size=1, max_size=12), st.integers(min_value=0, max_value=12))
def test_validate_quarantine_and_the_rest_are_the_table(
    faults: list[tuple[float | None, str | None]], cut: int
) -> None:
    rows = trips(len(faults), fare=[fare for fare, _ in faults], zone=[zone for _, zone in faults])
    wrong = [
        number
        for number, (fare, zone) in enumerate(faults)
        if (fare is not None and not math.isnan(fare) and not 0 <= fare <= 100) or zone in ("Q", "")
    ]
    with TemporaryDirectory() as folder:
        root = Path(folder)
        lay(root / "tables", {name: values[:cut] for name, values in rows.items()}, "2024-04-29")
        lay(root / "tables", {name: values[cut:] for name, values in rows.items()}, "2024-04-30")
        verdict = judge(root, ROWS + FARE + ZONE)
        aside = pq.read_table(root / "out" / "quarantine" / "trips.parquet") if wrong else TRIPS.arrow.empty_table()
    expected = pa.table(rows, schema=TRIPS.arrow).take(pa.array(wrong, pa.int64()))
    assert repr(aside.select(TRIPS.arrow.names).to_pylist()) == repr(expected.to_pylist())  # NaN is not equal to NaN
    assert verdict.record()["quarantined"] == ({"trips": len(wrong)} if wrong else {})
