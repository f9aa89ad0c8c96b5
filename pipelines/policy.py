"""Is it time to retrain? The monitor's answers in, one of retrain, wait and hold out, with the reasons in numbers.

retrain   a trigger fires: the champion is worse, or is estimated to be, a correction of it does surely better, its
          inputs have moved, or it is time
wait      none does
hold      one does, and something stands against it: the breaker, a retraining under way, the cooldown, the budget;
          or nothing can be judged: there is no champion, or the batch is broken at its source

A window counts for the champion that it was scored with, and the count begins anew with the next one: what a model that
is gone did badly says nothing of the one that took its place.
"""

from __future__ import annotations

import argparse
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from pipelines import page, params, places, provenance, registry, retraining, stage, timeline
from pipelines.breaker import BreakerParams, read
from pipelines.errors import BallastError, exit_with
from pipelines.files import read_json
from pipelines.params import Params
from pipelines.state import State, Window, moves

log = logging.getLogger(__name__)

Numbers = Mapping[str, Any]  # drift's verdict, or what is kept of it for the windows to come
COLUMN = ("score", "threshold", "moved", "weight")  # what is kept of a column


class Judgement(NamedTuple):
    """Whether a trigger fires, None where that could not be judged, and why, in words and numbers."""

    fires: bool | None
    words: str


@dataclass(frozen=True)
class Past:
    """What counts beside the window itself. Dates are as-of dates."""

    windows: Sequence[Window] = ()  # the oldest first
    trained: Sequence[date] = ()  # of the retrainings before, the earliest first
    promoted: date | None = None  # of the champion
    against: Sequence[str] = ()  # what stands against any retraining now, in words


# --- the triggers


class Windowed(Params):
    """A trigger that fires if ``windows`` of the last ``of`` windows do, and the present one is not quiet.

    The present one is among them. One that could not be judged fires not, and is not quiet either: its labels may come
    later, as those of the windows before may have by now.
    """

    windows: PositiveInt = 1
    of: PositiveInt = 1
    min_rows: PositiveInt = 1

    @model_validator(mode="after")
    def _are_among_them(self) -> Self:
        if self.windows > self.of:
            raise ValueError(f"`windows` must be at most `of`: {self.windows} of {self.of} windows can never fire")
        return self

    @abstractmethod
    def judge(self, window: Numbers) -> Judgement:
        """Whether one window fires, taken alone."""

    def ask(self, now: Numbers, before: Sequence[Window], past: Past) -> Judgement:
        """Whether to retrain: ``before`` are the champion's windows before this one, the newest first."""
        judged = [self.judge(now), *(self.judge(window.numbers) for window in before[: self.of - 1])]
        fired = sum(one.fires is True for one in judged)
        words = judged[0].words
        if self.of > 1:
            words += f" ({fired} of the last {len(judged)} windows, needed: {self.windows} of {self.of})"
        return Judgement(judged[0].fires is not False and fired >= self.windows, words)


class Labelled(Windowed):
    """By labels: where they are late or windows short, two may be judged on the same rows, which count once."""

    def ask(self, now: Numbers, before: Sequence[Window], past: Past) -> Judgement:
        """Likewise, of windows that were judged on rows of their own."""
        return super().ask(now, _apart(now, before), past)


class Performance(Labelled):
    """The realised log loss has risen by more than this over the champion's test window, and by more than noise."""

    kind: Literal["performance"]
    max_rise: NonNegativeFloat

    def judge(self, window: Numbers) -> Judgement:
        """By the newest rows that have enough labels."""
        found = window.get("performance") or {}
        return _risen(
            "performance", "labelled rows", found, found.get("labelled_rows", 0), self.max_rise, self.min_rows
        )


class EstimatedPerformance(Windowed):
    """The same of the log loss that is estimated from the champion's own probabilities, before labels are known."""

    kind: Literal["estimated_performance"]
    max_rise: NonNegativeFloat

    def judge(self, window: Numbers) -> Judgement:
        """By all rows."""
        found = window.get("estimate") or {}
        return _risen("estimated performance", "rows", found, found.get("rows", 0), self.max_rise, self.min_rows)


class AvoidableLoss(Labelled):
    """So much log loss could surely have been avoided: a correction learnt from labels does better on those after."""

    kind: Literal["avoidable_loss"]
    min_gain: NonNegativeFloat

    def judge(self, window: Numbers) -> Judgement:
        """By the lower bound of what the correction saves on the newest rows that have enough labels."""
        found = (window.get("performance") or {}).get("avoidable") or {}
        if (rows := found.get("rows", 0)) < self.min_rows:
            return Judgement(None, f"avoidable loss: not judged, {rows:,} labelled rows of at least {self.min_rows:,}")
        surely = f"surely more than {found['lower']:.4f}, bound {self.min_gain:g}"
        words = f"avoidable loss: {found['loss']:.4f} ± {found['standard_error']:.4f} log loss, {surely}"
        return Judgement(found["lower"] > self.min_gain, words)


class Drift(Windowed):
    """Enough of the inputs have moved, by what the champion makes of them: `drift` in params.yaml says how much."""

    kind: Literal["drift"]

    def judge(self, window: Numbers) -> Judgement:
        """By the verdict on the inputs."""
        found, rows = window["inputs"], window.get("rows", 0)
        if rows < self.min_rows:
            return Judgement(None, f"drift: not judged, {rows:,} rows of at least {self.min_rows:,}")
        if found.get("raises") is None:
            return Judgement(None, f"drift: not judged, too few columns could be measured ({found.get('judged', 0)})")
        critical, share = found.get("critical_moved") or [], found.get("weighted_share")
        words = f"{len(found.get('moved_columns', ()))} of {found['judged']} columns moved"
        words += "" if share is None else f", {share:.0%} by importance"
        words += f", critical: {', '.join(critical)}" if critical else ""
        return Judgement(found["raises"], f"drift: {words}")


class Schedule(Params):
    """So many days have passed since the last retraining, or since the champion's promotion where none is known."""

    kind: Literal["schedule"]
    every_days: PositiveInt

    def ask(self, now: Numbers, before: Sequence[Window], past: Past) -> Judgement:
        """By as-of dates."""
        last = max(past.trained, default=past.promoted)
        if last is None:
            return Judgement(None, "schedule: not judged, the last retraining is not known")
        days = (date.fromisoformat(now["end"]) - last).days
        return Judgement(days >= self.every_days, f"schedule: {days} days since {last}, every {self.every_days}")


Trigger = Annotated[Performance | EstimatedPerformance | AvoidableLoss | Drift | Schedule, Field(discriminator="kind")]


# --- what a retraining trains on


class All(Params):
    """All days so far."""

    kind: Literal["all"]

    def length(self, as_of: date, change: date | None, held_out: int) -> int | None:
        """The length of the train window in days; None for all of them."""
        return None


class Last(Params):
    """The last days before the validation window."""

    kind: Literal["last"]
    days: PositiveInt

    def length(self, as_of: date, change: date | None, held_out: int) -> int | None:
        """As many as are set."""
        return self.days


class SinceChange(Params):
    """The days since the last change point, at least so many; all so far where no change is known."""

    kind: Literal["since_change"]
    min_days: PositiveInt

    def length(self, as_of: date, change: date | None, held_out: int) -> int | None:
        """From the change point to the validation window, which begins ``held_out`` days before the as-of date."""
        return max((as_of - change).days - held_out, self.min_days) if change else None


TrainingWindow = Annotated[All | Last | SinceChange, Field(discriminator="kind")]


class Budget(Params):
    """So many retrainings, whoever asked for them, in so many days."""

    retrainings: PositiveInt
    days: PositiveInt


class PolicyParams(Params):
    """The ``policy`` section of params.yaml."""

    triggers: tuple[Trigger, ...]
    cooldown_days: NonNegativeInt
    budget: Budget
    training_window: TrainingWindow


class HeldOut(Params):
    """What of the ``prepare`` section lies between the train window and the as-of date."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    label_delay_days: int
    validation_days: int
    test_days: int

    @property
    def days(self) -> int:
        """All together."""
        return self.label_delay_days + self.validation_days + self.test_days


# --- the decision


def policy(verdict: Numbers, settings: PolicyParams, past: Past, held_out: int = 0) -> dict[str, Any]:
    """Decide by drift's ``verdict`` on a window; what would have fired is among the reasons of a hold as well.

    ``held_out``: the days between the train window and the as-of date.
    """
    before = _before(verdict, past.windows)
    asked = {trigger: trigger.ask(verdict, before, past) for trigger in settings.triggers}
    fired = {trigger: one for trigger, one in asked.items() if one.fires and verdict["version"] is not None}
    unfit, as_of = _unfit(verdict), date.fromisoformat(verdict["end"])
    against = [*unfit, *past.against, *_spent(settings, past.trained, as_of)] if fired or unfit else []
    kind = "hold" if against else "retrain" if fired else "wait"
    reasons = [*against, *(one.words for one in (fired if fired or against else asked).values())]
    reasons = reasons or ["no trigger is set"]
    change = _change_point(verdict, before)
    return {
        "verdict": kind,
        "reasons": reasons,
        "fired": list(dict.fromkeys(trigger.kind for trigger in fired)),
        "train_days": settings.training_window.length(as_of, change, held_out) if kind == "retrain" else None,
        "as_of": verdict["end"],
        "interval": f"{verdict['start']}..{verdict['end']}",
        "version": verdict["version"],
        "summary": " · ".join([kind.upper(), *reasons]),
    }


def _unfit(verdict: Numbers) -> list[str]:
    """Why nothing can be judged, if so. Drift of broken data says nothing: it is mended at its source."""
    if verdict["version"] is None:
        return ["no champion yet: retrain_scheduled trains the first"]
    data = verdict["data"]
    if data["rejected"]:
        return ["data: validation rejected it; mend it at its source"]
    faults = {"empty": "came empty", "out_of_scale": "came in another unit"}
    found = [f"{', '.join(data[fault])} {words}" for fault, words in faults.items() if data.get(fault)]
    return [f"data: {' and '.join(found)}; mend it at its source, a retraining would learn it"] if found else []


def _spent(settings: PolicyParams, trained: Sequence[date], as_of: date) -> list[str]:
    """The cooldown and the budget, as far as they stand against a retraining as of this date."""
    budget = settings.budget
    return retraining.spent(trained, as_of, settings.cooldown_days, budget.retrainings, budget.days)


def _before(verdict: Numbers, windows: Sequence[Window]) -> list[Window]:
    """The windows before this one that its champion was watched in, the newest first.

    Those that overlap another are left out, as their rows would count twice, and so are those whose data was broken.
    """
    found: list[Window] = []
    for window in reversed(windows):
        if window.end > (found[-1].start if found else verdict["start"]):
            continue
        if window.version != verdict["version"]:
            break
        if not _unfit({**window.numbers, "version": window.version}):
            found.append(window)
    return found


def _change_point(verdict: Numbers, before: Sequence[Window]) -> date | None:
    """The start of the unbroken run of windows up to this one that raise; None if this one does not.

    A change lies somewhere in the first window of the run; its start keeps all that came after.
    """
    if not _raises(verdict):
        return None
    run = list(takewhile(lambda window: _raises(window.numbers), before))
    return date.fromisoformat(run[-1].start if run else verdict["start"])


def _apart(now: Numbers, before: Sequence[Window]) -> list[Window]:
    """Those of the windows ``before`` (the newest first) whose labelled rows no later one was judged on.

    One that was not judged by labels has none.
    """
    found: list[Window] = []
    first, _ = _judged_on(now)
    for window in before:
        start, end = _judged_on(window.numbers)
        if end is None or first is None or end <= first:
            found.append(window)
            first = start or first
    return found


def _judged_on(window: Numbers) -> tuple[str | None, str | None]:
    """The days of the rows that performance was judged on, the end exclusive, where drift's verdict says so."""
    found = window.get("performance") or {}
    return found.get("start"), found.get("end")


def _raises(window: Numbers) -> bool:
    return bool(window["inputs"].get("raises") or window.get("performance", {}).get("worse"))


def _risen(name: str, noun: str, found: Numbers, rows: int, bound: float, least: int) -> Judgement:
    """Whether a loss has risen above its bound, and by more than its uncertainty explains."""
    if rows < least:
        return Judgement(None, f"{name}: not judged, {rows:,} {noun} of at least {least:,}")
    if not found.get("measured") or found.get("rise") is None:
        return Judgement(None, f"{name}: not judged, it was not measured")
    change = f"log loss {'worse' if found['rise'] > 0 else 'better'} by {abs(found['rise']):.3f}"
    if found.get("standard_error") is None:
        return Judgement(None, f"{name}: {change}, bound {bound:g}, from too few days to judge")
    words = f"{name}: {change} ± {found['standard_error']:.3f}, bound {bound:g}"
    above = found["rise"] > bound
    if above and not found.get("worse"):
        errors = found.get("standard_errors")
        words += f", but within {errors:g} standard errors" if errors else ", but within its uncertainty"
    return Judgement(above and bool(found.get("worse")), words)


# --- the step


def _past(state: State, settings: Path) -> Past:
    """What is known when a window is judged. What this run itself has asked for before it was killed does not count."""
    me = provenance.actor()
    breaker = read(state, params.load(settings, "breaker", BreakerParams).refusals)
    running = retraining.under_way(state, apart_from=me)
    moved = moves(state.ledger())
    return Past(
        windows=state.windows(),
        trained=retraining.trained(state, apart_from=me),
        promoted=date.fromisoformat(moved[-1].as_of) if moved and moved[-1].as_of else None,
        against=[
            *([breaker.words] if breaker.stops(provenance.data()) else []),
            *([f"under way: {retraining.words(running)}"] if running else []),
        ],
    )


def _keep(state: State, verdict: Numbers, decision: Mapping[str, Any]) -> None:
    """What stays of it: the retraining it asks for first, so that nobody asks twice, then the window."""
    if decision["verdict"] == "retrain":
        state.ask_retraining(provenance.actor(), date.fromisoformat(decision["as_of"]))
    decided_at = datetime.now(UTC).isoformat(timespec="milliseconds")
    seen = (verdict["start"], verdict["end"], verdict["version"], decision["verdict"], numbers(verdict))
    state.remember_window(Window(*seen, decided_at, provenance.actor()))
    state.advance_clock(date.fromisoformat(decision["as_of"]))


def numbers(verdict: Numbers) -> dict[str, Any]:
    """What is kept of a window: the answers, and of each column how far it has moved; no curves, no other windows."""
    columns = {name: _only(found, *COLUMN) for name, found in verdict["inputs"]["columns"].items()}
    bulk = {"performance": ("calibration", "windows"), "estimate": ("tracked",)}
    parts = {
        name: {key: value for key, value in verdict[name].items() if key not in bulk.get(name, ())}
        for name in ("data", "inputs", "predictions", "performance", "estimate")
        if name in verdict
    }
    return {**_only(verdict, "rows", "labelled_rows"), **parts, "inputs": {**parts["inputs"], "columns": columns}}


def _only(found: Numbers, *names: str) -> dict[str, Any]:
    return {name: found[name] for name in names if name in found}


def _attach(version: int | None, folder: Path) -> dict[str, str]:
    """Put the page and the history with the champion's MLflow run, and return which that is.

    They are evidence, kept here already: MLflow away is no failure.
    """
    if version is None:
        return {}
    try:
        registry.attach(version, folder.parent.parent / "index.html", "monitor")
        return registry.attach(version, folder, f"monitor/{folder.name}")
    except BallastError as error:
        log.warning("The page of %s is not with version %d in MLflow: %s", folder.name, version, error)
        return {}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipelines.policy")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--drift", type=Path, default=Path("data/drift/verdict.json"))
    parser.add_argument("--out", type=Path, default=Path("data/policy"))
    return parser.parse_args()


def main() -> None:
    """Decide, keep what was decided, then lay out the page of this window and the index of all."""
    options, state = _options(), State()
    verdict, settings = read_json(options.drift), params.load(options.params, "policy", PolicyParams)
    held_out = params.load(options.params, "prepare", HeldOut).days
    decision = policy(verdict, settings, _past(state, options.params), held_out)
    _keep(state, verdict, decision)
    report, events = options.drift.parent / "report.html", timeline.events(state)
    folder = page.publish(places.var() / "reports", verdict, decision, report, events)
    run = _attach(verdict["version"], folder)
    where = (folder / "index.html").relative_to(places.var()).as_posix()
    stage.finish("policy", options.out, {**decision, **run, "asked_by": provenance.actor(), "page": where})


if __name__ == "__main__":
    exit_with(main)
