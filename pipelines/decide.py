"""Decide: may the challenger take the champion's place? Rule by rule, with a written record.

Both are scored here, side by side, on the same rows: those of the test window that neither was trained on, the
champion through its own preparation. What the gate needs in order to judge at all is checked here and cannot be
switched off; the rules of params.yaml (rules.py) come after it. A refusal is a result, not an error.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, field_validator

from pipelines import card, metrics, params, provenance, record, registry, rows, rules, stage, timeline, tracking
from pipelines.approval import Approval
from pipelines.breaker import BreakerParams, read
from pipelines.champion import refuse_strangers
from pipelines.errors import BallastError, ParamsError, TryAgain, exit_with
from pipelines.files import read_json
from pipelines.params import Params
from pipelines.record import Finding
from pipelines.rules import AnyRule, Evidence, Scored
from pipelines.state import Decision, Entry, State, champions, freeze_words, frozen, head_of

if TYPE_CHECKING:
    import pandas as pd

    from pipelines.metrics import Floats
    from pipelines.model import Model

log = logging.getLogger(__name__)

Result = TypeVar("Result")

TRIES, TIMED_ROWS = 15, 1000


class DecideParams(Params):
    """The ``decide`` section of params.yaml."""

    min_test_rows: int = Field(ge=1)
    min_test_days: int = Field(ge=2)
    max_unmatched_share: float = Field(ge=0, lt=1)
    threshold: float = Field(gt=0, lt=1)
    calibration_bins: int = Field(ge=2)
    seed: int
    approval: Approval
    approval_hours: float = Field(gt=0)
    rules: tuple[AnyRule, ...]

    @field_validator("rules")
    @classmethod
    def _keeps_the_champion(cls, given: tuple[AnyRule, ...]) -> tuple[AnyRule, ...]:
        if not any(isinstance(rule, rules.Better) for rule in given):
            raise ValueError("there must be a rule `better`: without it any model takes the champion's place")
        return given


@dataclass(frozen=True)
class Side:
    """A version that stands at the gate; its model is loaded when it is first asked for, which takes seconds."""

    version: int
    digest: str
    load: Callable[[], Model]

    @cached_property
    def model(self) -> Model:
        """The model, verified."""
        return self.load()

    @property
    def trained_until(self) -> datetime:
        """The end of what the model has seen: validation chose among its candidates and epochs."""
        windows = self.model.schema["windows"]
        return max(datetime.fromisoformat(windows[name]["end"]) for name in ("train", "validation"))


@dataclass(frozen=True)
class Comparison:
    """The test rows that both sides can be judged on, how many others there were, and what was predicted.

    ``own`` are the same rows as the champion's preparation makes them; None, as its predictions, without a champion.
    """

    test: pd.DataFrame
    own: pd.DataFrame | None
    left_out: int
    left_out_by_key: int
    unmatched: int
    challenger: Floats
    champion: Floats | None

    @property
    def days(self) -> pd.Series[Any]:
        """The day, UTC, of each row."""
        days: pd.Series[Any] = self.test["time"].dt.floor("D")
        return days


@dataclass(frozen=True)
class Verdict:
    """What the gate says, and what it looked at: None where a side could not be scored at all."""

    rules: list[Finding]
    comparison: Comparison | None

    @property
    def verdict(self) -> Literal["promote", "refuse"]:
        """Promotion takes every rule that blocks."""
        return "refuse" if self._failed("block") else "promote"

    @property
    def reasons(self) -> list[str]:
        """Why: the rules that refused it, or what the challenger has over the champion."""
        return self._failed("block") or [found.words for found in self.rules if found.rule == "better"]

    @property
    def warnings(self) -> list[str]:
        """The rules that did not pass and only warn."""
        return self._failed("warn")

    @property
    def summary(self) -> str:
        """One line for a person."""
        passed, warned = sum(found.passed for found in self.rules), len(self.warnings)
        said = f"{self.verdict.upper()} · {self.reasons[0]} · {passed} of {len(self.rules)} rules"
        return said + (f" · {warned} warning{'s' if warned > 1 else ''}" if warned else "")

    def _failed(self, severity: record.Severity) -> list[str]:
        return [found.words for found in self.rules if not found.passed and found.severity == severity]


def decide(
    challenger: Side,
    champion: Side | None,
    test: pd.DataFrame,
    tables: Path,
    quarantine: Path,
    params: DecideParams,
    as_of: date,
    trained: Collection[str] = (),
) -> Verdict:
    """Judge the challenger on the ``test`` rows that neither side was trained on.

    ``trained`` are the keys of the challenger's training rows, as far as they are known. Raises ParamsError if a rule
    names a column that the challenger's SQL does not give, and TryAgain while the registry is away.
    """
    found = [_another(challenger, champion)] if champion else []
    if found and not found[0].passed:
        return Verdict(found, None)
    loaded, models = _possible(
        "models load",
        "both models are as they were registered" if champion else "the model is as it was registered",
        lambda: [side.model for side in (challenger, champion) if side],
    )
    if not models:
        return Verdict([*found, loaded], None)
    scored, comparison = _possible(
        "models score",
        "every test row has a prediction of each side",
        lambda: _compare(challenger, champion, test, tables, quarantine, trained),
    )
    found += [loaded, scored]
    if not comparison:
        return Verdict(found, None)
    found += _enough(comparison, params)
    if comparison.test.empty:
        return Verdict(found, comparison)
    evidence = _evidence(comparison, challenger, champion, tables, quarantine, params, as_of)
    return Verdict([*found, *(rule.check(evidence) for rule in params.rules)], comparison)


# --- what no setting switches off


def _check(rule: str, measured: float | str | None, needed: float | str | None, passed: bool, words: str) -> Finding:
    return Finding(rule=rule, severity="block", measured=measured, needed=needed, passed=passed, words=words)


def _another(challenger: Side, champion: Side) -> Finding:
    ours, theirs = challenger.digest, champion.digest
    words = "another model than the champion" if ours != theirs else "the champion itself"
    return _check("another model", ours[:12], f"not {theirs[:12]}", ours != theirs, words)


def _possible(rule: str, words: str, attempt: Callable[[], Result]) -> tuple[Finding, Result | None]:
    """Whether the attempt succeeds, and its result. A registry that is away is not the challenger's fault: TryAgain."""
    try:
        result = attempt()
    except TryAgain:
        raise
    except BallastError as error:
        return _check(rule, None, None, False, f"could not be scored: {error}"), None
    return _check(rule, None, None, True, words), result


def _enough(found: Comparison, params: DecideParams) -> Iterator[Finding]:
    count, days = len(found.test), found.days.nunique()
    words = f"{count:,} test rows that no side was trained on, needed: at least {params.min_test_rows:,}"
    if found.left_out:
        words += f" ({found.left_out:,} others left out)"
    if not count:
        words = f"no test row is new to both models ({found.left_out:,} were trained on)"
    if not count and found.unmatched:
        words = f"the champion's preparation has none of the {found.unmatched:,} test rows"
    yield _check("test rows", count, params.min_test_rows, count >= params.min_test_rows, words)
    if not count:
        return
    words = f"the test rows are of {days} days, needed: at least {params.min_test_days}"
    yield _check("test days", days, params.min_test_days, days >= params.min_test_days, words)
    if found.champion is not None:
        yield _matched(found, params.max_unmatched_share)


def _matched(found: Comparison, most: float) -> Finding:
    total = len(found.test) + found.unmatched
    share = found.unmatched / total
    words = f"the champion's preparation lacks {found.unmatched:,} of {total:,} test rows, needed: at most {most:.1%}"
    return _check("matched rows", share, most, share <= most, words)


# --- the comparison


def _compare(
    challenger: Side,
    champion: Side | None,
    test: pd.DataFrame,
    tables: Path,
    quarantine: Path,
    trained: Collection[str],
) -> Comparison:
    """Both sides on the rows that neither was trained on, by the windows of their schemas and by the rows' keys."""
    sides = [challenger, champion] if champion else [challenger]
    late = test[test["time"] >= max(side.trained_until for side in sides)]
    own = champion.model.prepare(tables, quarantine).set_index("key") if champion else None
    seen = set(trained)
    if champion and own is not None:  # its own preparation may have given a row another time
        seen |= set(own.index[own["time"] < champion.trained_until])
    fresh = late[~late["key"].isin(seen)]
    matched = fresh if own is None else fresh[fresh["key"].isin(own.index)]
    own = None if own is None else own.loc[matched["key"]]
    return Comparison(
        test=matched,
        own=own,
        left_out=len(test) - len(fresh),
        left_out_by_key=len(late) - len(fresh),
        unmatched=len(fresh) - len(matched),
        challenger=challenger.model.predict(matched),
        champion=champion.model.predict(own) if champion and own is not None else None,
    )


def _evidence(
    found: Comparison,
    challenger: Side,
    champion: Side | None,
    tables: Path,
    quarantine: Path,
    params: DecideParams,
    as_of: date,
) -> Evidence:
    """What the rules may look at; what only some of them need is had only if one of them is there."""
    timed = any(isinstance(rule, rules.Latency) for rule in params.rules)
    frames = {"challenger": (challenger, found.test)}
    if champion and found.own is not None:
        frames["champion"] = (champion, found.own)
    seconds = _clocked(frames) if timed else {}
    theirs = None
    if champion and found.champion is not None:
        theirs = _scored(champion, found.champion, seconds.get("champion"))
    return Evidence(
        test=_with_columns(found.test, challenger.model, tables, quarantine, params),
        challenger=_scored(challenger, found.challenger, seconds.get("challenger")),
        champion=theirs,
        as_of=as_of,
        threshold=params.threshold,
        bins=params.calibration_bins,
        seed=params.seed,
    )


def _scored(side: Side, probability: Floats, seconds: float | None) -> Scored:
    rates = {name: window["label_rate"] for name, window in side.model.schema["windows"].items()}
    return Scored(probability, side.trained_until, rates, side.model.size, seconds)


def _clocked(frames: Mapping[str, tuple[Side, pd.DataFrame]]) -> dict[str, float]:
    """Seconds of each side for 1,000 rows, the median of a few tries on one thread.

    In turn, so that a busy machine slows both; and threads that wait for each other there would tell of it alone.
    """
    from threadpoolctl import threadpool_limits

    tries: dict[str, list[float]] = {name: [] for name in frames}
    with threadpool_limits(1):
        for _ in range(TRIES + 1):
            for name, (side, frame) in frames.items():
                few = frame.iloc[:TIMED_ROWS]
                began = time.perf_counter()
                side.model.predict(few)
                tries[name].append((time.perf_counter() - began) * TIMED_ROWS / len(few))
    return {name: statistics.median(taken[1:]) for name, taken in tries.items()}  # the first warms up


def _with_columns(
    test: pd.DataFrame, model: Model, tables: Path, quarantine: Path, params: DecideParams
) -> pd.DataFrame:
    """The test rows with every column that a rule reads: one that is no feature is in the challenger's SQL only."""
    wanted = {name: place for place, rule in enumerate(params.rules) for name in rule.reads if name not in test}
    if not wanted:
        return test
    made = model.prepare(tables, quarantine).set_index("key")
    for name, place in wanted.items():
        if name not in made:
            near = get_close_matches(name, list(made.columns), n=1)
            remedy = f"did you mean `{near[0]}`?" if near else f"it gives {', '.join(made.columns)}."
            raise ParamsError(f"`decide.rules.{place}` names `{name}`, which prepare.sql does not give; {remedy}")
    return test.join(made[list(wanted)], on="key")


# --- the step


def judge(registered: Path, tables: Path, quarantine: Path, test: Path, out: Path, settings: Path) -> dict[str, Any]:
    """Decide on the registered version against the ledger's champion; keep the record; return the step's result."""
    state, found = State(), read_json(registered)
    refuse_strangers(state)
    ledger = state.ledger()
    gate = params.load(settings, "decide", DecideParams)
    limit = params.load(settings, "breaker", BreakerParams).refusals
    challenger, champion = _side(found["version"]), next(map(_side, champions(ledger)[-1:]), None)
    as_of, trained = params.as_of(settings), _trained_keys(test.parent)
    verdict = decide(challenger, champion, rows.read(test), tables, quarantine, gate, as_of, trained)
    facts = _facts(verdict, challenger, champion, ledger, gate, as_of, bool(trained))
    digest = record.keep(out, facts)
    version = registry.version(challenger.version)
    made = (digest, version.number, verdict.verdict, verdict.summary, as_of.isoformat(), facts["decided_at"])
    counted = _counted(verdict, challenger)
    state.remember(Decision(*made, data=provenance.data(), run=provenance.run(), facts=counted))
    state.end_retraining(provenance.actor(), verdict.verdict)
    card.keep(version.number, state)
    timeline.show(state)
    said = [verdict.summary, *_standing(state, version.number, limit)]
    return {
        "summary": " · ".join(said),
        "verdict": verdict.verdict,
        "reasons": verdict.reasons,
        "warnings": verdict.warnings,
        "model": registry.name(),
        "version": version.number,
        "record_sha256": digest,
        "run_id": version.run_id,
        "experiment_id": tracking.run_data(version.run_id).experiment_id,
    }


def _counted(verdict: Verdict, challenger: Side) -> dict[str, Any]:
    """What metrics count of a decision: how each rule came out, and up to when the challenger has learned."""
    rules = {found.rule: {"severity": found.severity, "passed": found.passed} for found in verdict.rules}
    # A model that was not looked at for the decision is not loaded for a metric.
    return {"rules": rules, "trained_until": challenger.trained_until.isoformat() if verdict.comparison else None}


def _standing(state: State, version: int, limit: int) -> list[str]:
    """What else a person must know of now: a freeze, and the breaker that this refusal opens or keeps open."""
    freeze, breaker = frozen(state.ledger()), read(state, limit)
    registry.measure(version, "refusals_in_a_row", len(breaker.refused))
    if breaker.is_open:
        log.warning("Automatic retraining pauses: %s", breaker.words)
        registry.set_tags(version, {"ballast.breaker": breaker.words})
    return [*([freeze_words(freeze)] if freeze else []), *([breaker.words] if breaker.is_open else [])]


def _side(version: int) -> Side:
    from pipelines.model import load

    return Side(version, registry.version(version).digest, lambda: load(registry.model(version)))


def _trained_keys(prepared: Path) -> set[str]:
    """The keys of the rows that the challenger was trained and chosen on, where they lie beside the test rows."""
    import pyarrow.parquet as pq

    files = [file for name in ("train", "validation") if (file := prepared / f"{name}.parquet").exists()]
    return {key for file in files for key in pq.read_table(file, columns=["key"])["key"].to_pylist()}


def _facts(
    verdict: Verdict,
    challenger: Side,
    champion: Side | None,
    ledger: list[Entry],
    gate: DecideParams,
    as_of: date,
    keys_known: bool,
) -> dict[str, Any]:
    """The decision record: all that is needed to judge the judgement, and to see whether it still holds."""
    found, version = verdict.comparison, registry.version(challenger.version)
    return {
        "schema": record.SCHEMA,
        "verdict": verdict.verdict,
        "summary": verdict.summary,
        "reasons": verdict.reasons,
        "warnings": verdict.warnings,
        "model": registry.name(),
        "version": challenger.version,
        "digest": challenger.digest,
        "champion": {
            "version": champion.version if champion else None,
            "digest": champion.digest if champion else None,
            "ledger_head": head_of(ledger),
        },
        "as_of": as_of.isoformat(),
        "test": _test(found, keys_known) if found else None,
        "rules": [rule.model_dump() for rule in verdict.rules],
        "metrics": _metrics(found, gate) if found else {},
        "commit": version.tags.get("ballast.commit"),
        "lock": version.lock,
        "trigger": (trigger := provenance.trigger()),
        "alert": provenance.alert(trigger),
        "actor": provenance.actor(),
        "params": gate.model_dump(mode="json"),
        "decided_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def _test(found: Comparison, keys_known: bool) -> dict[str, Any]:
    """The rows that both were judged on; their hash is over keys and labels, in order of time."""
    times, few = found.test["time"], found.test.empty
    checked = {"challenger": "windows and keys" if keys_known else "windows"}
    if found.own is not None:
        checked["champion"] = "windows and keys"
    return {
        "rows": len(found.test),
        "days": found.days.nunique(),
        "start": None if few else times.min().isoformat(),
        "end": None if few else times.max().isoformat(),
        "sha256": record.rows_sha256(found.test["key"], found.test["label"]),
        "left_out": found.left_out,
        "left_out_by_key": found.left_out_by_key,
        "unmatched": found.unmatched,
        "checked": checked,
    }


def _metrics(found: Comparison, gate: DecideParams) -> Mapping[str, Mapping[str, float | None]]:
    sides = {"challenger": found.challenger, "champion": found.champion}
    return {
        side: _shown(metrics.binary(found.test["label"], probability, gate.threshold, gate.calibration_bins))
        for side, probability in sides.items()
        if probability is not None and len(probability)
    }


def _shown(measured: Mapping[str, float]) -> dict[str, float | None]:
    """Those metrics that no threshold of ours goes into; None where the rows do not define one."""
    names = ("log_loss", "roc_auc", "pr_auc", "brier", "calibration_error", "label_rate")
    return {name: None if math.isnan(measured[name]) else measured[name] for name in names}


def main() -> None:
    """Run the step in the root of a workspace."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.decide")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--registered", type=Path, default=Path("data/register/result.json"))
    parser.add_argument("--tables", type=Path, default=Path("data/ingest/tables"))
    parser.add_argument("--quarantine", type=Path, default=Path("data/validate/quarantine"))
    parser.add_argument("--test", type=Path, default=Path("data/prepare/test.parquet"))
    parser.add_argument("--out", type=Path, default=Path("data/decide"))
    given = parser.parse_args()
    result = judge(given.registered, given.tables, given.quarantine, given.test, given.out, given.params)
    stage.finish("decide", given.out, result)


if __name__ == "__main__":
    exit_with(main)
