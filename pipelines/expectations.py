"""The suite of expectations: its file, what Great Expectations makes of it, and what a table shows under it."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pipelines.errors import ParamsError
from pipelines.files import whole_folder
from pipelines.params import Params
from pipelines.schema import Table

ROW_COUNT = "expect_table_row_count_to_be_between"
FRESHNESS = "expect_column_max_to_be_between"
COLUMN_ARGUMENTS = ("column", "column_A", "column_B", "column_list", "column_set")
NOT_IN_SUITE = {"id", "meta", "result_format", "catch_exceptions", "rendered_content", "windows", "batch_id"}
NOT_IN_WORDS = {"column", "description", "notes"}
COMPLETE = {"result_format": "COMPLETE", "return_unexpected_index_query": False}
SOURCE = "tables"
EXAMPLES = 3  # of unexpected values, in a message


class Expected(Params):
    """One line of the suite: ``type: {severity: critical, column: origin, ...}``."""

    type: str
    severity: Literal["critical", "warning"]
    arguments: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _of_line(cls, line: Any) -> Any:
        pair = list(line.items()) if isinstance(line, dict) else []
        if len(pair) != 1 or not isinstance(pair[0][1], dict):
            raise ValueError("an expectation reads `expect_...: {severity: critical, ...}`")
        arguments = dict(pair[0][1])
        if "severity" not in arguments:
            raise ValueError(f"{pair[0][0]} must say `severity: critical` or `severity: warning`")
        return {"type": pair[0][0], "severity": arguments.pop("severity"), "arguments": arguments}

    @property
    def columns(self) -> list[str]:
        """The columns it names."""
        given = [self.arguments[name] for name in COLUMN_ARGUMENTS if name in self.arguments]
        names = [name for value in given for name in (value if isinstance(value, list) else [value])]
        return [name for name in names if name != "declared"]


class Suite(Params):
    """The expectations by table, as the suite's file has them."""

    tables: dict[str, list[Expected]] = Field(min_length=1)


@dataclass(frozen=True)
class Check:
    """An expectation of the suite: in words, and as Great Expectations has it."""

    line: Expected
    words: str
    expectation: Any


@dataclass(frozen=True)
class Finding:
    """An expectation that was not met; ``unexpected`` of ``of`` rows where it is about single rows."""

    table: str
    expectation: str
    column: str | None
    severity: str
    unexpected: int | None
    of: int | None
    message: str


@dataclass(frozen=True)
class Judged:
    """What one table showed; ``reasons`` says by its position why a row is set aside."""

    table: str
    rows: int
    expectations: int
    findings: Sequence[Finding]
    reasons: Mapping[int, Sequence[str]]


def read_suite(path: Path, declared: Mapping[str, Table]) -> dict[str, list[Expected]]:
    """The suite by table, checked as far as that needs no Great Expectations (whose import takes 2 s)."""
    try:
        suite = Suite.model_validate({"tables": yaml.safe_load(path.read_text(encoding="utf-8"))}).tables
    except FileNotFoundError:
        raise ParamsError(f"There is no {path}. Run from the root of the project, or pass --expectations.") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {error}") from None
    except ValidationError as error:
        raise ParamsError(f"{path}: " + "; ".join(map(_explain, error.errors()))) from None
    for name, lines in suite.items():
        if name not in declared:
            raise ParamsError(f"{path}: {_unknown(name, 'a table of params.yaml', declared)}")
        _check_lines(f"{path}: `{name}`", lines, declared[name])
    return suite


def _explain(detail: ErrorDetails) -> str:
    """A breach of the suite's shape in words, with the table and the number of the expectation in it."""
    steps = [f"`{step}`" if isinstance(step, str) else f"expectation {step + 1}" for step in detail["loc"][1:]]
    where = " ".join(steps) or "the suite"
    found = "" if detail["type"] == "value_error" else f" (found {detail['input']!r})"
    return f"{where}: {detail['msg'].removeprefix('Value error, ')}{found}"


def _check_lines(where: str, lines: Sequence[Expected], table: Table) -> None:
    for column in (column for line in lines for column in line.columns):
        if column not in list(table.columns):
            raise ParamsError(f"{where}: {_unknown(column, 'a column of it', table.columns)}")
    if "reason" in table.columns:
        raise ParamsError(f"{where} has a column `reason`, a name that the quarantine needs. Give it another.")
    begun = bool(lines) and (lines[0].type, lines[0].severity) == (ROW_COUNT, "critical")
    if not begun or not lines[0].arguments.get("min_value"):
        raise ParamsError(
            f"{where} must begin with `{ROW_COUNT}: {{min_value: 1, severity: critical}}`, or with more than 1: "
            f"an empty table passes nearly everything else."
        )


def _unknown(name: object, what: str, known: Collection[str]) -> str:
    near = get_close_matches(str(name), known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known))}"
    return f"`{name}` is not {what}; {hint}"


def build(where: str, lines: Sequence[Expected], table: Table, as_of: date) -> list[Check]:
    """The expectations of one table, each marked with its place; ParamsError where Great Expectations has none such."""
    built = [_built(where, place, line, _resolved(where, line, table, as_of)) for place, line in enumerate(lines)]
    return [Check(line, _words(line, as_of), expectation) for line, expectation in zip(lines, built, strict=True)]


def _built(where: str, place: int, line: Expected, arguments: Mapping[str, Any]) -> Any:
    registry = _great_expectations().expectations.registry
    types = registry.list_registered_expectation_implementations()
    if line.type not in types:
        raise ParamsError(f"{where}: {_unknown(line.type, 'an expectation of Great Expectations', types)}")
    expectation = registry.get_expectation_impl(line.type)
    known = set(expectation.__fields__) - NOT_IN_SUITE
    for name in arguments:
        if name not in known:
            raise ParamsError(f"{where}: {_unknown(name, f'an argument of {line.type}', known)}")
    try:
        return expectation(**arguments, severity=line.severity, meta={"place": place})
    except (ValueError, TypeError) as error:
        raise ParamsError(f"{where}: {line.type} cannot take these arguments: {one_line(error)}") from None


def _words(line: Expected, as_of: date) -> str:
    """``wind_speed: expected values to be between (min_value 0, max_value 120)``, or the suite's own words."""
    column = line.arguments.get("column")
    subject = f"{column}: " if column else ""
    if "description" in line.arguments:
        return f"{subject}expected that {line.arguments['description']}"
    if "max_age_days" in line.arguments:
        return f"{subject}expected the newest value within {line.arguments['max_age_days']} days before {as_of}"
    rest = [f"{name} {_shown(value)}" for name, value in line.arguments.items() if name not in NOT_IN_WORDS]
    told = line.type.removeprefix("expect_column_" if column else "expect_").replace("_", " ")
    return f"{subject}expected {told}" + f" ({', '.join(rest)})" * bool(rest)


def _resolved(where: str, line: Expected, table: Table, as_of: date) -> dict[str, Any]:
    """The arguments, with what the suite leaves to the declared table and the as-of date put in."""
    arguments: dict[str, Any] = dict(line.arguments)
    for name in ("column_list", "column_set"):
        if arguments.get(name) == "declared":
            arguments[name] = list(table.columns)
    if line.type != FRESHNESS or "max_age_days" not in arguments:
        return arguments
    days = arguments.pop("max_age_days")
    if type(days) not in (int, float) or days <= 0 or arguments.keys() & {"min_value", "max_value"}:
        raise ParamsError(f"{where}: max_age_days is a number above 0 (found {days!r}), without min_ and max_value.")
    midnight = datetime.combine(as_of, time(), UTC)
    return {**arguments, "min_value": midnight - timedelta(days=days), "max_value": midnight, "strict_max": True}


def judge(context: Any, name: str, data: pa.Table, checks: Sequence[Check], as_of: date) -> Judged:
    """Hold one table against its expectations; an empty one against its row count only."""
    checks = checks if data.num_rows else checks[:1]
    asset = context.data_sources.get(SOURCE).add_dataframe_asset(name)
    batch = asset.add_batch_definition_whole_dataframe(name).get_batch({"dataframe": data.to_pandas()})
    expectations = [check.expectation for check in checks]
    suite = context.suites.add(_great_expectations().ExpectationSuite(name=name, expectations=expectations))
    results = batch.validate(suite, result_format="SUMMARY")
    _keep_for_docs(context, name, results, as_of)
    in_order = sorted(results.results, key=lambda result: int(result.expectation_config.meta["place"]))
    failed = [(check, result) for check, result in zip(checks, in_order, strict=True) if not result.success]
    findings = [_finding(name, check, result) for check, result in failed]
    return Judged(name, data.num_rows, len(checks), findings, _reasons(batch, failed))


def _reasons(batch: Any, failed: Sequence[tuple[Check, Any]]) -> dict[int, list[str]]:
    """By its position, what is wrong with a row: by the failed checks that are warnings and about single rows."""
    reasons: dict[int, list[str]] = defaultdict(list)
    for check, result in failed:
        if check.line.severity == "warning" and "element_count" in result.result:
            complete = batch.validate(check.expectation, result_format=COMPLETE)
            for row in complete.result["unexpected_index_list"]:
                reasons[row].append(check.words)
    return reasons


def _finding(table: str, check: Check, result: Any) -> Finding:
    """A failed expectation in words. One that could not be evaluated is critical, whatever the suite says."""
    line, seen, error = check.line, result.result, _error(result.exception_info)
    subject = f"{table}.{check.words}" if "column" in line.arguments else f"{table}: {check.words}"
    message = f"{subject}; could not be checked: {error}" if error else f"{subject}; {_found(seen)}"
    severity = "critical" if error else line.severity
    column = ", ".join(line.columns) or None
    return Finding(table, line.type, column, severity, seen.get("unexpected_count"), seen.get("element_count"), message)


def _found(seen: Mapping[str, Any]) -> str:
    """What was there instead: how many rows and examples, or the value that was observed."""
    values = [_shown(value) for value in seen.get("partial_unexpected_list", []) if not _is_null(value)]
    examples = f", such as {' or '.join(list(dict.fromkeys(values))[:EXAMPLES])}" if values else ""
    if "element_count" in seen:
        return f"not so in {seen['unexpected_count']:,} of {count(seen['element_count'], 'row')}{examples}"
    return f"found {_shown(seen.get('observed_value'))}{examples}"


def _shown(value: Any) -> str:
    """A value in a message: no numpy types, no quotes, few digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    if _is_null(value):
        return "null"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value) in ("NaT", "<NA>")


def _error(info: Mapping[str, Any]) -> str | None:
    """Why an expectation could not be evaluated; Great Expectations nests this by metric, or does not."""
    entries = [info] if "raised_exception" in info else info.values()
    raised = [entry["exception_message"] for entry in entries if entry["raised_exception"]]
    return one_line(raised[0]) if raised else None


def one_line(text: object) -> str:
    """``text`` without line breaks."""
    return " ".join(str(text).split())


def count(number: int, noun: str) -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def _great_expectations() -> Any:
    """Great Expectations, imported when it is needed (2 s): no telemetry, no logs and warnings of its own loading."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read at import
    logging.getLogger("great_expectations").setLevel(logging.ERROR)  # else hundreds of lines at import
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import great_expectations
    return great_expectations


def new_context() -> Any:
    """A context in memory, with no progress bars and no documentation site of its own in a temporary folder."""
    gx = _great_expectations()
    base = gx.data_context.types.base
    stores = base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
    config = base.DataContextConfig(
        store_backend_defaults=stores, progress_bars=base.ProgressBarsConfig(globally=False), analytics_enabled=False
    )
    context = gx.get_context(mode="ephemeral", project_config=config)
    context.data_sources.add_pandas(SOURCE)
    return context


def _keep_for_docs(context: Any, name: str, judged: Any, as_of: date) -> None:
    """Store the results of a table under the as-of date instead of the run's id and time.

    Great Expectations leaves numpy values in some results, which its own store and pages cannot write.
    """
    gx = _great_expectations()
    for result in judged.results:
        result.success = bool(result.success)
        result.result = gx.util.convert_to_json_serializable(result.result)
    identifiers = gx.data_context.types.resource_identifiers
    run = gx.RunIdentifier(run_name=str(as_of), run_time=datetime.combine(as_of, time(), UTC))
    key = identifiers.ValidationResultIdentifier(identifiers.ExpectationSuiteIdentifier(name), run, name)
    context.validation_results_store.store_validation_results(judged, key)


def draw_docs(context: Any, folder: Path) -> None:
    """Great Expectations' own pages about all results kept (0.3 s)."""
    with whole_folder(folder) as part:
        backend = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(part.resolve())}
        index = {"class_name": "DefaultSiteIndexBuilder"}
        site = {"class_name": "SiteBuilder", "store_backend": backend, "site_index_builder": index}
        context.add_data_docs_site("docs", {**site, "show_how_to_buttons": False})
        context.build_data_docs(["docs"])
