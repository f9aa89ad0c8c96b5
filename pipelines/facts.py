"""The loop's facts as Prometheus metrics, from the state store: champion, model, drift, data, gate, people.

Everything is counted from stored rows, so it is as true after a restart as before. A counter (``_total``) counts rows
that are only ever added; what may become fewer again is a gauge. What is not known has no sample: it is never zero.
A date of the data or of the loop's clock is the timestamp of its midnight, UTC.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from itertools import takewhile
from typing import Any, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pipelines import approval, retraining
from pipelines.breaker import Breaker, read
from pipelines.policy import EstimatedPerformance, Performance, PolicyParams
from pipelines.state import MOVES, Decision, Entry, Retraining, State, Window, frozen, moves, quarantined

Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)
Samples = Iterable[tuple[tuple[str, ...], float | None]]  # the labels' values, and the sample's

VERDICTS = ("promote", "refuse")
POLICY_VERDICTS = ("retrain", "wait", "hold")
KINDS = (*MOVES, "freeze", "unfreeze", "reset", *approval.WORDS)
INTERVALS = {"daily": 1, "weekly": 7, "monthly": 31}  # in days
FAULTS = ("empty", "out_of_scale")


@dataclass(frozen=True)
class Known:
    """What one look at the state store found, and the settings that its numbers are held against."""

    ledger: list[Entry] = field(default_factory=list)
    problems: Sequence[str] = ()
    decisions: Sequence[Decision] = ()
    windows: Sequence[Window] = ()
    retrainings: Sequence[Retraining] = ()
    breaker: Breaker | None = None
    policy: PolicyParams | None = None
    clock: date | None = None


def look(state: State, limit: int | None, policy: PolicyParams | None) -> Known:
    """Read the state store; ``limit`` is the breaker's. None for settings that cannot be read."""
    return Known(
        ledger=state.ledger(),
        problems=state.verify(),
        decisions=state.decisions(),
        windows=state.windows(),
        retrainings=state.retrainings(),
        breaker=read(state, limit) if limit else None,
        policy=policy,
        clock=state.clock(),
    )


def families(known: Known) -> list[Metric]:
    """All of it, but for the clock, which must not stand still between two looks."""
    return [
        *_champion(known),
        *_window(known.windows),
        *_model(known.windows, known.policy),
        *_inputs(known.windows),
        *_predictions(_newest(known.windows)),
        *_data(_newest(known.windows)),
        *_gate(known.decisions),
        *_breaker(known.breaker),
        *_retrainings(known.retrainings),
        *_people(known.ledger, known.problems),
    ]


def clock(example: date | None, now: datetime) -> list[Metric]:
    """What the loop takes for now."""
    today = midnight(example.isoformat()) if example else now.timestamp()
    words = "1 while the example's clock is set; ages of data are then not those of today."
    return [
        gauge("clock_timestamp_seconds", "The loop's own now: the example's clock, else the wall clock.", today),
        gauge("clock_example", words, example is not None),
    ]


def interval_s() -> float | None:
    """The longest interval of the monitor (``BALLAST_MONITOR_INTERVAL``); None for one that nobody knows."""
    days = INTERVALS.get(os.environ.get("BALLAST_MONITOR_INTERVAL") or "monthly")
    return days * 86_400.0 if days else None


# --- families


def gauge(name: str, words: str, value: float | None) -> GaugeMetricFamily:
    """A gauge without labels; true is 1."""
    return gauges(name, words, (), [((), value)])


def gauges(name: str, words: str, labels: Sequence[str], samples: Samples) -> GaugeMetricFamily:
    """A gauge with labels; samples without a value are left out."""
    return _filled(GaugeMetricFamily(f"ballast_{name}", words, labels=labels), samples)


def counters(name: str, words: str, labels: Sequence[str], samples: Samples) -> CounterMetricFamily:
    """A counter with labels."""
    return _filled(CounterMetricFamily(f"ballast_{name}", words, labels=labels), samples)


def midnight(day: str | None) -> float | None:
    """The timestamp at which a day begins, UTC."""
    return stamp(day[:10]) if day else None


def stamp(text: str | None) -> float | None:
    """The timestamp of a moment; one without a zone is UTC."""
    if not text:
        return None
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _filled(made: Family, samples: Samples) -> Family:
    for labels, value in samples:
        if value is not None:
            made.add_metric(labels, float(value))
    return made


# --- the champion


def _champion(known: Known) -> list[Metric]:
    moved = moves(known.ledger)
    last = moved[-1] if moved else None
    version = last.to_version if last else None
    info = [((str(version), last.kind, last.as_of or ""), 1.0)] if last else []
    return [
        gauge("champion_version", "The version in production, by the ledger.", version),
        gauges("champion_info", "1: the champion, how it came to be it, and as of which date.", _INFO, info),
        gauge(
            "champion_promoted_timestamp_seconds",
            "When it took its place (wall time).",
            stamp(last.at if last else None),
        ),
        gauge("champion_as_of_timestamp_seconds", "The as-of date of that.", midnight(last.as_of if last else None)),
        gauge(
            "training_data_end_timestamp_seconds",
            "The end of the rows that the champion was trained and chosen on.",
            stamp(_trained_until(version, known.decisions)),
        ),
    ]


_INFO = ("version", "by", "as_of")


def _trained_until(version: int | None, decisions: Sequence[Decision]) -> str | None:
    """By the newest decision on this version that says so; those before schema 5 do not."""
    said = [made.facts["trained_until"] for made in decisions if made.version == version and made.facts]
    return next((until for until in reversed(said) if until), None)


# --- the newest window, and the four questions


def _newest(windows: Sequence[Window]) -> Window | None:
    return windows[-1] if windows else None


def _part(window: Window | None, name: str) -> Mapping[str, Any]:
    """The numbers of one answer; empty where there is none."""
    return (window.numbers.get(name) if window else None) or {}


def _in_a_row(windows: Sequence[Window], part: str, name: str) -> int:
    """How many of the newest windows, of the champion that was watched last, say so without a gap."""
    same = [one for one in reversed(windows) if one.version == windows[-1].version]
    return len(list(takewhile(lambda one: _part(one, part).get(name), same)))


_IN_A_ROW = "Newest windows in a row, of one champion, that {}."


def _window(windows: Sequence[Window]) -> list[Metric]:
    window = _newest(windows)
    numbers: Mapping[str, Any] = window.numbers if window else {}
    verdicts = [((verdict,), window.verdict == verdict) for verdict in POLICY_VERDICTS] if window else []
    start, end = (midnight(window.start), midnight(window.end)) if window else (None, None)
    return [
        gauge("windows", "Windows that the monitor has seen.", len(windows)),
        gauge("monitor_interval_seconds", "Between two of them at the most, by the monitor's schedule.", interval_s()),
        gauge("window_start_timestamp_seconds", "The first day of the newest window.", start),
        gauge("window_end_timestamp_seconds", "The day after the last of the newest window.", end),
        gauge(
            "window_seen_timestamp_seconds",
            "When it was seen (wall time).",
            stamp(window.decided_at if window else None),
        ),
        gauge("window_version", "The version that it was scored with.", window.version if window else None),
        gauge("window_rows", "Rows of the newest window.", numbers.get("rows")),
        gauge("window_labelled_rows", "Those that had a label when it was seen.", numbers.get("labelled_rows")),
        gauges("policy_verdict", "1 for what the policy said of the newest window.", ("verdict",), verdicts),
    ]


def _model(windows: Sequence[Window], policy: PolicyParams | None) -> list[Metric]:
    window = _newest(windows)
    version = str(window.version) if window else ""
    realised, estimated = _part(window, "performance"), _part(window, "estimate")
    reference = realised if realised.get("measured") else estimated
    estimates = _in_a_row(windows, "estimate", "worse")
    kinds = {"realised": realised, "estimated": estimated}

    def of(name: str, beside: str = "") -> Samples:
        found = [((kind, version), numbers.get(name)) for kind, numbers in kinds.items()]
        return [*found, (("reference", version), reference.get(beside))] if beside else found

    words = "of the version that was watched: realised, estimated before labels come, and on its own test window"
    starts = [(("realised",), midnight(realised.get("start")))]
    starts += [(("estimated",), midnight(window.start))] if window and estimated.get("measured") else []
    return [
        gauges("model_log_loss", f"Log loss {words}.", _MODEL, of("log_loss", "reference_log_loss")),
        gauges("model_auc", f"Area under the ROC curve {words}.", _MODEL, of("auc", "reference_auc")),
        gauges("model_log_loss_rise", "Log loss less that of the test window.", _MODEL, of("rise")),
        gauges("model_log_loss_rise_standard_error", "Of the rise, by day.", _MODEL, of("standard_error")),
        gauges("model_worse", "1 if the rise is more than its uncertainty explains.", _MODEL, of("worse")),
        gauge("model_estimated_worse_windows", _IN_A_ROW.format("are worse by estimate"), estimates),
        gauge("model_labelled_rows", "Labelled rows that the realised one is from.", realised.get("labelled_rows")),
        gauges("model_judged_start_timestamp_seconds", _JUDGED, ("kind",), starts),
        gauges("policy_max_rise", "The rise that the policy allows (params.yaml).", ("kind",), _bounds(policy)),
    ]


_MODEL = ("kind", "version")
_JUDGED = "The first day of the window that was judged; an earlier one where labels are late."


def _bounds(policy: PolicyParams | None) -> Samples:
    """The lowest bound of each kind that a trigger is set for."""
    kinds = {Performance: "realised", EstimatedPerformance: "estimated"}
    found: dict[str, float] = {}
    for trigger in policy.triggers if policy else ():
        if isinstance(trigger, Performance | EstimatedPerformance):
            kind = kinds[type(trigger)]
            found[kind] = min(trigger.max_rise, found.get(kind, trigger.max_rise))
    return [((kind,), bound) for kind, bound in found.items()]


def _inputs(windows: Sequence[Window]) -> list[Metric]:
    window = _newest(windows)
    inputs = _part(window, "inputs")
    columns: Mapping[str, Mapping[str, Any]] = inputs.get("columns") or {}

    def of(name: str) -> Samples:
        return [((column,), found.get(name)) for column, found in columns.items()]

    raised = _in_a_row(windows, "inputs", "raises")
    moved = len(inputs["moved_columns"]) if inputs.get("judged") else None
    return [
        gauges("drift_score", "Distance of a column from the training rows, by its method.", ("column",), of("score")),
        gauges("drift_threshold", "The distance from which on a column has moved.", ("column",), of("threshold")),
        gauges("drift_moved", "1 if the column has moved.", ("column",), of("moved")),
        gauges("drift_weight", "The column's share of the champion's importance.", ("column",), of("weight")),
        gauge("drift_columns_moved", "Columns that have moved.", moved),
        gauge("drift_columns_judged", "Columns that could be judged.", inputs.get("judged")),
        gauge("drift_weighted_share_ratio", "Share of importance that has moved.", inputs.get("weighted_share")),
        gauge("drift_raises", "1 if so much has moved that it raises.", inputs.get("raises")),
        gauge("drift_raised_windows", _IN_A_ROW.format("raise"), raised),
    ]


def _predictions(window: Window | None) -> list[Metric]:
    found = _part(window, "predictions")
    means = [(("batch",), found.get("mean")), (("reference",), found.get("reference_mean"))]
    return [
        gauge("prediction_drift_score", "Distance of the predictions from the test window's.", found.get("score")),
        gauge("prediction_drift_threshold", "From which on they have moved.", found.get("threshold")),
        gauge("prediction_drift_moved", "1 if they have moved.", found.get("moved")),
        gauges("prediction_mean", "Mean probability, now and on the test window.", ("of",), means),
    ]


def _data(window: Window | None) -> list[Metric]:
    found = _part(window, "data")
    faults = [((fault,), len(found[fault])) for fault in FAULTS if fault in found]
    return [
        gauge("data_broken", "1 if the newest window's data is broken.", found.get("broken")),
        gauge("data_expectations", "Expectations it was held against.", found.get("expectations")),
        gauge("data_expectations_failed", "Those that failed, as warnings.", found.get("warnings")),
        gauge("data_quarantined_rows", "Rows that were set aside.", found.get("quarantined")),
        gauges("data_faulty_columns", "Columns that came empty or in another unit.", ("fault",), faults),
    ]


# --- the gate, retrainings, people


def _gate(decisions: Sequence[Decision]) -> list[Metric]:
    verdicts = Counter(made.verdict for made in decisions)
    last = {made.verdict: made.decided_at for made in decisions}
    rules = [(rule, found) for made in decisions if made.facts for rule, found in made.facts["rules"].items()]
    looked = Counter((rule, found["severity"]) for rule, found in rules)
    failed = Counter((rule, found["severity"]) for rule, found in rules if not found["passed"])
    return [
        counters("gate_decisions", "Decisions of the gate.", ("verdict",), [((v,), verdicts[v]) for v in VERDICTS]),
        counters("gate_rule_checks", "Decisions that looked at a rule.", _RULE, looked.items()),
        counters("gate_rule_failures", "Decisions that a rule failed in.", _RULE, [(r, failed[r]) for r in looked]),
        gauges(
            "gate_last_decision_timestamp_seconds",
            "When the gate last said so (wall time).",
            ("verdict",),
            [((verdict,), stamp(at)) for verdict, at in last.items()],
        ),
    ]


_RULE = ("rule", "severity")


def _breaker(found: Breaker | None) -> list[Metric]:
    stands = (found.is_open, len(found.refused), found.limit) if found else (None, None, None)
    return [
        gauge("breaker_open", "1 while no machine retrains on refused data.", stands[0]),
        gauge("breaker_refusals", "Refused retrainings in a row.", stands[1]),
        gauge("breaker_limit", "So many in a row open the breaker (params.yaml).", stands[2]),
    ]


def _retrainings(found: Sequence[Retraining]) -> list[Metric]:
    counts = Counter((one.kind, one.outcome or ("under_way" if one.run else "asked")) for one in found)
    dead = sum(not one.ended_at and retraining.is_dead(one) for one in found)
    last = max((one.as_of for one in found if one.run), default=None)
    return [
        gauges("retrainings", "Retrainings, by what asked for them and how they ended.", _ASKED, counts.items()),
        gauge("retrainings_dead", "Those that should have begun, or ended, long ago.", dead),
        gauge("retraining_as_of_timestamp_seconds", "The newest as-of date of one that has begun.", midnight(last)),
    ]


_ASKED = ("trigger", "outcome")


def _people(ledger: list[Entry], problems: Sequence[str]) -> list[Metric]:
    kinds, freeze, waiting = Counter(entry.kind for entry in ledger), frozen(ledger), approval.waiting(ledger)
    since = min((entry.at for entry in waiting), default=None)
    return [
        counters("ledger_entries", "Entries of the ledger.", ("kind",), [((kind,), kinds[kind]) for kind in KINDS]),
        gauge("ledger_whole", "0 if somebody has changed the ledger's history.", not problems),
        gauge("frozen", "1 while promotion is frozen.", freeze is not None),
        gauge("frozen_since_timestamp_seconds", "Since when (wall time).", stamp(freeze.at if freeze else None)),
        gauge("quarantined_versions", "Versions that a rollback has put in quarantine.", len(quarantined(ledger))),
        gauge("approvals_waiting", "Challengers that wait for a person.", len(waiting)),
        gauge("approval_waiting_since_timestamp_seconds", "Since when the longest has waited.", stamp(since)),
    ]
