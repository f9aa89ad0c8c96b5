"""Decide: may the challenger take the champion's place? Rule by rule, with a written record.

Both are scored here, side by side, on the same rows: those of the test window that neither was trained on, the
champion through its own preparation. Ties go to the champion. A refusal is a result, not an error.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from pipelines import metrics, params, provenance, record, registry, rows, stage, tracking
from pipelines.errors import BallastError, exit_with
from pipelines.files import read_json
from pipelines.params import Params
from pipelines.state import GENESIS, Decision, Entry, State

if TYPE_CHECKING:
    import pandas as pd

    from pipelines.metrics import Floats
    from pipelines.model import Model


class DecideParams(Params):
    """The ``decide`` section of params.yaml."""

    min_test_rows: int = Field(ge=1)
    min_test_days: int = Field(ge=2)
    min_auc: float = Field(ge=0, le=1)
    max_log_loss: float = Field(gt=0)
    max_calibration_error: float = Field(gt=0)
    calibration_bins: int = Field(ge=2)
    max_unmatched_share: float = Field(ge=0, lt=1)
    margin: float = Field(ge=0)
    confidence: float = Field(gt=0.5, lt=1)
    seed: int


@dataclass(frozen=True)
class Rule:
    """One rule of the gate: what was measured, what was needed, and both in words."""

    rule: str
    measured: float | str | None
    needed: float | str | None
    passed: bool
    words: str


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


@dataclass(frozen=True)
class Comparison:
    """What both sides showed on the same rows. Of the probabilities, ``champion`` is None if there is no champion."""

    test: pd.DataFrame
    left_out: int
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

    rules: list[Rule]
    comparison: Comparison | None

    @property
    def verdict(self) -> Literal["promote", "refuse"]:
        """Promotion takes every rule."""
        return "promote" if all(rule.passed for rule in self.rules) else "refuse"

    @property
    def reasons(self) -> list[str]:
        """Why: the rules that failed, or what the challenger has over the champion."""
        return [rule.words for rule in self.rules if not rule.passed] or [self.rules[-1].words]

    @property
    def summary(self) -> str:
        """One line for a person."""
        passed = sum(rule.passed for rule in self.rules)
        return f"{self.verdict.upper()} · {self.reasons[0]} · {passed} of {len(self.rules)} rules"


def decide(
    challenger: Side, champion: Side | None, test: pd.DataFrame, tables: Path, quarantine: Path, params: DecideParams
) -> Verdict:
    """Judge the challenger on the ``test`` rows that neither side was trained on."""
    if champion and challenger.digest == champion.digest:
        return Verdict([_another(challenger, champion)], None)
    try:
        comparison = _compare(challenger, champion, test, tables, quarantine)
    except BallastError as error:
        words = f"could not be scored: {error}"
        return Verdict([Rule("both sides can be scored", None, None, False, words)], None)
    if comparison.test.empty:
        return Verdict([_no_rows(comparison, params)], comparison)
    rules = [*_enough(comparison, params), *_absolute(comparison, params)]
    if champion is None:
        return Verdict([*rules, Rule("no champion to beat", None, None, True, "first model")], comparison)
    return Verdict([*rules, *_relative(comparison, challenger, champion, params)], comparison)


def _compare(challenger: Side, champion: Side | None, test: pd.DataFrame, tables: Path, quarantine: Path) -> Comparison:
    sides = [challenger, champion] if champion else [challenger]
    fresh = test[test["time"] >= max(_trained_until(side.model) for side in sides)]
    left_out = len(test) - len(fresh)
    if champion is None or not len(fresh):
        return Comparison(fresh, left_out, 0, challenger.model.predict(fresh), None)
    own = champion.model.prepare(tables, quarantine).set_index("key")
    matched = fresh[fresh["key"].isin(own.index)]
    return Comparison(
        test=matched,
        left_out=left_out,
        unmatched=len(fresh) - len(matched),
        challenger=challenger.model.predict(matched),
        champion=champion.model.predict(own.loc[matched["key"]]),
    )


def _trained_until(model: Model) -> datetime:
    """The end of what the model has seen: validation chose among its candidates and epochs."""
    windows = model.schema["windows"]
    return max(datetime.fromisoformat(windows[name]["end"]) for name in ("train", "validation"))


def _no_rows(found: Comparison, params: DecideParams) -> Rule:
    words = f"no test row is new to both models ({found.left_out:,} were trained on)"
    if found.unmatched:
        words = f"the champion's preparation has none of the {found.unmatched:,} test rows"
    return Rule("test rows", 0, params.min_test_rows, False, words)


def _enough(found: Comparison, params: DecideParams) -> Iterator[Rule]:
    count, days = len(found.test), found.days.nunique()
    words = f"{count:,} test rows that no side was trained on, needed: at least {params.min_test_rows:,}"
    if found.left_out:
        words += f" ({found.left_out:,} others left out)"
    yield Rule("test rows", count, params.min_test_rows, count >= params.min_test_rows, words)
    words = f"the test rows are of {days} days, needed: at least {params.min_test_days}"
    yield Rule("test days", days, params.min_test_days, days >= params.min_test_days, words)


def _absolute(found: Comparison, params: DecideParams) -> Iterator[Rule]:
    """A floor, and ceilings that give way to the champion's own value on the same rows.

    A month may be hard for every model: a ceiling that did not move with it would keep the worse of two in place.
    A metric that the rows do not define (NaN) passes none.
    """
    measured = _measure(found, found.challenger, params)
    theirs = _measure(found, found.champion, params) if found.champion is not None else {}
    auc = measured["roc_auc"]
    words = f"ROC AUC {auc:.3f}, needed: at least {params.min_auc:g}"
    yield Rule("ROC AUC", _number(auc), params.min_auc, auc >= params.min_auc, words)
    ceilings = {"log_loss": params.max_log_loss, "calibration_error": params.max_calibration_error}
    for key, ceiling in ceilings.items():
        name, value, champion = key.replace("_", " "), measured[key], theirs.get(key, 0.0)
        words = f"{name} {value:.3f}, needed: at most {ceiling:g}"
        if champion > ceiling:
            words += f", or the champion's on these rows: {champion:.3f}"
        limit = max(ceiling, champion)
        yield Rule(name, _number(value), limit, value <= limit, words)


def _measure(found: Comparison, probability: Floats, params: DecideParams) -> dict[str, float]:
    return metrics.binary(found.test["label"], probability, 0.5, params.calibration_bins)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _relative(found: Comparison, challenger: Side, champion: Side, params: DecideParams) -> Iterator[Rule]:
    yield _another(challenger, champion)
    total = len(found.test) + found.unmatched
    share = found.unmatched / total
    words = f"the champion's preparation lacks {found.unmatched:,} of {total:,} test rows, needed: at most "
    words += f"{params.max_unmatched_share:.1%}"
    yield Rule("matched rows", share, params.max_unmatched_share, share <= params.max_unmatched_share, words)
    if found.champion is not None:
        yield _better(found, found.champion, params)


def _another(challenger: Side, champion: Side) -> Rule:
    ours, theirs = challenger.digest, champion.digest
    words = "another model than the champion" if ours != theirs else "the champion itself"
    return Rule("another model", ours[:12], f"not {theirs[:12]}", ours != theirs, words)


def _better(found: Comparison, champion: Floats, params: DecideParams) -> Rule:
    """Better in log loss by more than the margin, at the lower bound of a paired bootstrap over days."""
    label, days = found.test["label"], found.days
    gain = metrics.log_loss_rows(label, champion) - metrics.log_loss_rows(label, found.challenger)
    draws = metrics.bootstrap_by_day(gain, days, params.seed)
    lower, mean = float(np.quantile(draws, 1 - params.confidence)), float(gain.mean())
    words = f"{'better' if mean > 0 else 'worse'} by {abs(mean):.3f} ± {draws.std():.3f} log loss"
    words = f"{words if mean else 'equal in log loss'} over {days.nunique()} days"
    if mean > 0 and lower <= params.margin:
        bound = f"{params.confidence:.1%} sure of {lower:.3f}, needed: more than {params.margin:g}"
        words = f"not surely better than the champion: {words} ({bound})"
    return Rule("better than the champion", lower, params.margin, lower > params.margin, words)


def judge(registered: Path, tables: Path, quarantine: Path, test: Path, out: Path, settings: Path) -> dict[str, Any]:
    """Decide on the registered version against the ledger's champion; keep the record; return the step's result."""
    state, found = State(), read_json(registered)
    ledger = state.ledger()
    gate = params.load(settings, "decide", DecideParams)
    challenger, champion = _side(found["version"]), _side(ledger[-1].to_version) if ledger else None
    verdict = decide(challenger, champion, rows.read(test), tables, quarantine, gate)
    as_of = params.as_of(settings)
    facts = _facts(verdict, challenger, champion, ledger, gate, as_of)
    digest = record.keep(out, facts)
    version = registry.version(challenger.version)
    state.remember(
        Decision(digest, version.number, verdict.verdict, verdict.summary, as_of.isoformat(), facts["decided_at"])
    )
    return {
        "summary": verdict.summary,
        "verdict": verdict.verdict,
        "reasons": verdict.reasons,
        "model": registry.name(),
        "version": version.number,
        "record_sha256": digest,
        "run_id": version.run_id,
        "experiment_id": tracking.run_data(version.run_id).experiment_id,
    }


def _side(version: int) -> Side:
    from pipelines.model import load

    return Side(version, registry.version(version).digest, lambda: load(registry.model(version)))


def _facts(
    verdict: Verdict,
    challenger: Side,
    champion: Side | None,
    ledger: list[Entry],
    gate: DecideParams,
    as_of: date,
) -> dict[str, Any]:
    """The decision record: all that is needed to judge the judgement, and to see whether it still holds."""
    found, version = verdict.comparison, registry.version(challenger.version)
    return {
        "schema": record.SCHEMA,
        "verdict": verdict.verdict,
        "summary": verdict.summary,
        "reasons": verdict.reasons,
        "model": registry.name(),
        "version": challenger.version,
        "digest": challenger.digest,
        "champion": {
            "version": champion.version if champion else None,
            "digest": champion.digest if champion else None,
            "ledger_head": ledger[-1].hash if ledger else GENESIS,
        },
        "as_of": as_of.isoformat(),
        "test": _test(found) if found else None,
        "rules": [asdict(rule) for rule in verdict.rules],
        "metrics": _metrics(found, gate) if found else {},
        "commit": version.tags.get("ballast.commit"),
        "lock": version.lock,
        "trigger": provenance.trigger(),
        "actor": provenance.actor(),
        "params": gate.model_dump(),
        "decided_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def _test(found: Comparison) -> dict[str, Any]:
    """The rows that both were judged on; their hash is over keys and labels, in order of time."""
    times, few = found.test["time"], found.test.empty
    return {
        "rows": len(found.test),
        "days": found.days.nunique(),
        "start": None if few else times.min().isoformat(),
        "end": None if few else times.max().isoformat(),
        "left_out": found.left_out,
        "unmatched": found.unmatched,
        "sha256": record.rows_sha256(found.test["key"], found.test["label"]),
    }


def _metrics(found: Comparison, gate: DecideParams) -> Mapping[str, Mapping[str, float | None]]:
    sides = {"challenger": found.challenger, "champion": found.champion}
    return {
        side: _shown(_measure(found, probability, gate))
        for side, probability in sides.items()
        if probability is not None and len(probability)
    }


def _shown(measured: Mapping[str, float]) -> dict[str, float | None]:
    """Those metrics that no threshold of ours goes into; None where the rows do not define one."""
    names = ("log_loss", "roc_auc", "pr_auc", "brier", "calibration_error", "label_rate")
    return {name: _number(measured[name]) for name in names}


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
