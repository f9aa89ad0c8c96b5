"""Tune: search better settings for one kind of candidate, by rolling-origin cross-validation in time.

::

    fold 1   ── train ───────────┬─ validation ─┤
    fold 2   ── train ──────────────────────────┬─ validation ─┤
    fold 3   ── train ─────────────────────────────────────────┬─ validation ─┤  the end of the validation window

A trial fits the candidate in every fold as `train` does; its value is the mean of the folds' validation log losses.
The test window is not read. The first trial has the present settings, so what comes out is never worse on the folds.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import math
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from pipelines import patch, places, space, tracking
from pipelines.checkpoint import asked_to_end
from pipelines.errors import BallastError, DataRejected, TryAgain
from pipelines.files import canonical_json, sha256, whole_file
from pipelines.fit import TrainParams, fit, log_loss, reproducible
from pipelines.folds import Encoded, Fold, cut, encode, read
from pipelines.model import Kind
from pipelines.params import Params, load
from pipelines.schema import Features
from pipelines.space import Axes, Axis

Sampler = Literal["tpe", "random", "grid"]
Settings = dict[str, Any]

SPACE = Path(__file__).with_name("tune.yaml")
TRIALS = 30  # unless asked otherwise; a grid has as many as it has points
STARTUP = 10  # finished trials that TPE draws at random before it learns
PRUNE_AFTER = 5  # complete trials, before any is ended early
IMPORTANCE_AFTER = 10  # complete trials: fewer say nothing of the settings
DONE = TrialState.COMPLETE, TrialState.PRUNED
ATTEMPTS = 2  # that failed, not for lack of time, before settings are given up on
BEST = 5  # trials in the result
CODE = [Path(__file__).with_name(f"{name}.py") for name in ("fit", "network", "baseline", "model", "metrics")]
LIBRARIES = "torch", "scikit-learn"


@dataclass(frozen=True)
class Asked:
    """What the user asks for; ``kind`` is by default the first of `train.candidates`."""

    kind: Kind | None = None
    sampler: Sampler = "tpe"
    trials: int | None = None
    budget_s: float = math.inf
    folds: int = 3
    study: str | None = None
    space: Path = SPACE
    seed: int = 1


def tune(data: Path, params_file: Path, asked: Asked) -> dict[str, Any]:
    """Search until the trials or the budget are used up, or a signal comes; return the result with params.yaml's diff.

    ``data`` is what prepare wrote. Equal data, settings, seed and number of trials give an equal result, also where
    the study was killed and went on. Raises BallastError where the study of this name was made for something else.
    """
    deadline = time.monotonic() + asked.budget_s
    params = load(params_file, "train", TrainParams)
    kind = asked.kind or params.candidates[0]
    written = space.read(asked.space, kind, getattr(params, kind))
    if asked.sampler == "grid":
        space.grid(written)  # before the rows are read: whether it can be one
    frame, schema = read(data)
    folds = cut(frame, schema["windows"]["validation"], asked.folds)
    name = _checked(asked.study or f"{kind}-{schema['as_of']}")
    path = places.var() / "tune" / f"{name}.db"
    with _alone(path):
        study = _open(path, name, _made_for(data, schema, params, kind, written, folds))
        axes = _axes(study, written, getattr(params, kind))
        points = space.grid(axes) if asked.sampler == "grid" else None
        with _progress(name, deadline) as show, asked_to_end() as signalled:
            encoded = [encode(fold, Features.model_validate(schema["features"])) for fold in folds]
            search = Search(study, params, kind, axes, points, encoded, asked, deadline, signalled, show)
            before = len(_counted(search, *DONE))
            show.line(_opening(search, folds, before))
            inputs = {window: data / f"{window}.parquet" for window in ("train", "validation")}
            settings = {**params.model_dump(), "kind": kind, "folds": len(folds)}
            with (
                tracking.parent_run(study.user_attrs["run"], settings, inputs) as parent,
                reproducible(params.seed, params.threads),
            ):
                ended = _search(search, parent)
        return _result(search, folds, before, ended, params_file, path)


# --- the study --------------------------------------------------------------------------------------------------------


class WorstQuarter(optuna.pruners.BasePruner):
    """End a trial whose value at a step is among the worst quarter of what complete trials had at that step.

    Optuna's own MedianPruner takes a trial's best value over all steps: as folds differ in difficulty, after an easy
    first one it would end nothing in a harder second. And half of the trials are too many where they differ by little.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to end the trial after the last step that it has reported."""
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.last_step is None or len(complete) < PRUNE_AFTER:
            return False
        others = [_value_at(other, trial.last_step) for other in complete]
        return bool(trial.intermediate_values[trial.last_step] > np.quantile(others, 0.75))


def _value_at(trial: FrozenTrial, step: int) -> float:
    """A trial's value at a step; where a fold has ended early, it stays as it is until the next one begins."""
    return trial.intermediate_values[max(reached for reached in trial.intermediate_values if reached <= step)]


def _sampler(name: Sampler, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """A sampler with the seed of the trial ``number``: a study that goes on draws what an unbroken one would."""
    seed = (100_003 * seed + number) % 2**32
    if name == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the study; the kernel lets go of it when the process ends, however it ends. Raises TryAgain."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TryAgain(
                f"Another `ballast tune` works on the study `{path.stem}`. Wait for it, or name another --study."
            ) from None
        yield


def _checked(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BallastError(f"--study must be letters, digits, dots and dashes: it names a file (found {name!r}).")
    return name


def _open(path: Path, name: str, made_for: Mapping[str, str]) -> optuna.Study:
    """The study in the file, new or as it was left; raise BallastError if it was made for something else."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name=name,
            direction="minimize",
            pruner=WorstQuarter(),
            load_if_exists=True,
        )
    except Exception as error:  # whatever SQLAlchemy, alembic or Optuna raise at a file that is none of theirs
        first = str(error).splitlines()[0]
        raise BallastError(f"{path} holds no study: {first}. Move it away, or name another --study.") from None
    known = study.user_attrs.get("made_for") or made_for
    if other := [part for part, value in made_for.items() if known.get(part) != value]:
        raise BallastError(
            f"The study `{name}` was made for other {' and other '.join(other)}: its trials compare with no new ones. "
            f"Name a new one: --study {name}-2"
        )
    study.set_user_attr("made_for", dict(made_for))
    if "run" not in study.user_attrs:  # a name in MLflow, which another project may share, and which outlives the file
        study.set_user_attr("run", f"{name} {secrets.token_hex(3)}")
    _bury(study)
    return study


def _bury(study: optuna.Study) -> None:
    """Let those trials fail whose process was killed: no other one can be at work here."""
    for killed in _trials(study, TrialState.RUNNING):
        if child := killed.user_attrs.get("run"):
            tracking.end_killed(child)
        study.tell(killed.number, state=TrialState.FAIL)
    while _trials(study, TrialState.WAITING):  # enqueued and not begun: the next trial would take its place
        trial = study.ask()
        trial.set_user_attr("said", "not begun; the next run of this study tries it")
        study.tell(trial, state=TrialState.FAIL)


def _axes(study: optuna.Study, written: Axes, present: Params) -> Axes:
    """The axes as the study has them from earlier on, widened to hold the present value too."""
    kept = study.user_attrs.get("axes")
    before = {name: Axis.model_validate(axis) for name, axis in kept.items()} if kept else written
    axes = space.widened(before, present)
    if kept and (other := [name for name, axis in axes.items() if axis.choices and axis != before[name]]):
        raise BallastError(
            f"The study `{study.study_name}` has no choice for the present {' and '.join(other)}, and takes no further "
            f"ones. Name a new one: --study {study.study_name}-2"
        )
    study.set_user_attr("axes", {name: axis.model_dump(exclude_unset=True) for name, axis in axes.items()})
    return axes


def _made_for(
    data: Path, schema: Mapping[str, Any], params: TrainParams, kind: Kind, written: Axes, folds: list[Fold]
) -> dict[str, str]:
    """What trials must share to be compared, by its name in messages, as hashes."""
    present = getattr(params, kind).model_dump()
    fixed = {name: value for name, value in present.items() if name not in written}
    shared = params.model_dump(exclude={"candidates", "temperature", "refit", *space.KINDS})
    parts = {
        "data": [*(sha256(data / f"{name}.parquet") for name in ("train", "validation")), schema["features"]],
        "settings": [kind, shared, fixed],
        "folds": [fold.name for fold in folds],
        "space": {name: axis.model_dump() for name, axis in written.items()},
        "code": [sha256(path) for path in CODE],
        "libraries": [version(name) for name in LIBRARIES],
    }
    return {part: hashlib.sha256(canonical_json(value).encode()).hexdigest() for part, value in parts.items()}


def _trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


# --- the search -------------------------------------------------------------------------------------------------------


Outcome = tuple[TrialState, list[float], str]
"""What came of a trial: its state, its losses by fold, and what there is to say."""

KILLED = "failed: its process was killed"


class BrokenOff(optuna.TrialPruned):
    """The search is to end: out of time, interrupted or terminated."""


@dataclass(frozen=True)
class Show:
    """How the search is told to a person: a line that stays, and the state of now."""

    line: Callable[[str], None]
    state: Callable[[int, int, str], None]


@dataclass(frozen=True)
class Search:
    """Everything that a trial needs."""

    study: optuna.Study
    params: TrainParams
    kind: Kind
    axes: Axes
    points: list[Settings] | None
    folds: list[Encoded]
    asked: Asked
    deadline: float
    signalled: Callable[[], int]
    show: Show

    @property
    def present(self) -> Settings:
        """The present values of the settings that are searched."""
        found: Params = getattr(self.params, self.kind)
        return {name: getattr(found, name) for name in self.axes}

    @property
    def total(self) -> int:
        """How many trials there are to be in the end."""
        if self.points is None:
            return self.asked.trials or TRIALS
        everything = len(self.points) + (self.present not in self.points)
        return min(self.asked.trials or everything, everything)

    @property
    def epochs(self) -> int:
        """The most steps that a fold reports: its epochs, where a candidate tells of them while it learns."""
        if self.kind != "tabm":
            return 1
        epochs = self.axes.get("epochs")
        bounds = [self.params.tabm.epochs] if epochs is None else [*(epochs.choices or []), epochs.high or 0]
        return max(int(bound) for bound in bounds)


def _search(search: Search, parent: tracking.LiveRun) -> str:
    """Try settings until there is a reason to end; return it."""
    try:
        while len(_counted(search, *DONE)) < search.total or _present(search) is None:
            _check_time(search)
            _try(search, _next(search), parent)
    except BrokenOff as why:
        return str(why)
    return "trials"


def _present(search: Search) -> FrozenTrial | None:
    """The complete trial of the present settings."""
    complete = _trials(search.study, TrialState.COMPLETE)
    return next((trial for trial in complete if _settings(trial) == search.present), None)


def _counted(search: Search, *states: TrialState) -> list[FrozenTrial]:
    """The trials in these states that count towards the total: for a grid those of its points, each once."""
    found = _trials(search.study, *states)
    if search.points is None:
        return found
    points = [*search.points, search.present]
    return [trial for trial in _distinct(found) if _settings(trial) in points]


def _distinct(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Without those that repeat the settings of an earlier one."""
    settings = [_settings(trial) for trial in trials]
    return [trial for number, trial in enumerate(trials) if settings[number] not in settings[:number]]


def _settings(trial: FrozenTrial) -> Settings:
    """The settings that a trial was run with: what was drawn, rounded."""
    found: Settings = trial.user_attrs["settings"]
    return found


def _next(search: Search) -> Trial:
    """The present settings first; then what was broken off; then a new point."""
    study, done = search.study, _trials(search.study, *DONE)
    study.sampler = _sampler(search.asked.sampler, search.asked.seed, len(done))
    if waiting := _waiting(search, [_settings(trial) for trial in done]):
        params, settings = waiting
        study.enqueue_trial(params, user_attrs={"settings": settings, "params": params})
    trial = study.ask({name: axis.distribution() for name, axis in search.axes.items()})
    if "settings" not in trial.user_attrs:
        trial.set_user_attr("settings", space.drawn(search.axes, trial.params))
    return trial


def _waiting(search: Search, tried: list[Settings]) -> tuple[Settings, Settings] | None:
    """What comes before any draw: parameters as the study has them, and the settings that they stand for."""
    if _present(search) is None:
        return search.present, search.present
    failed = [trial for trial in _trials(search.study, TrialState.FAIL) if "settings" in trial.user_attrs]
    points = _shuffled(search.points or [], search.asked.seed)
    again = [(trial.user_attrs.get("params", trial.params), _settings(trial)) for trial in failed]
    waiting = again + [(point, point) for point in points]
    return next(((params, settings) for params, settings in waiting if settings not in tried), None)


def _shuffled(points: list[Settings], seed: int) -> list[Settings]:
    """A part of a grid should not be one of its corners."""
    return [points[place] for place in np.random.default_rng(seed).permutation(len(points))]


def _try(search: Search, trial: Trial, parent: tracking.LiveRun) -> None:
    """Run one trial, and keep what came of it."""
    began = time.monotonic()
    state, losses, said = _known(search, trial) or _run(search, trial, parent, began)
    _tell(search, trial, state, losses, said, began)
    if state in DONE:
        done = len(_trials(search.study, *DONE))
        parent.log(done, ({"log_loss": mean(losses)} if losses else {}) | {"best_log_loss": search.study.best_value})


def _known(search: Search, trial: Trial) -> Outcome | None:
    """What came of these settings before, if another fit would tell no more; the present ones have to be measured."""
    settings = trial.user_attrs["settings"]
    before = [one for one in search.study.get_trials(deepcopy=False) if one.user_attrs.get("settings") == settings]
    for one in sorted(before, key=lambda one: one.state is not TrialState.COMPLETE):
        if one.state is TrialState.COMPLETE or (one.state is TrialState.PRUNED and settings != search.present):
            for step, value in one.intermediate_values.items():
                trial.report(value, step)
            losses = one.user_attrs["losses"]
            said = f"log loss {mean(losses):.4f}" if losses else one.user_attrs["said"]
            return one.state, losses, f"{said}, as trial {one.number} had the same settings"
    reasons = [one.user_attrs.get("said", KILLED) for one in before if one.state is TrialState.FAIL]
    failed = [reason for reason in reasons if reason.startswith("failed")]
    if len(failed) < ATTEMPTS or settings == search.present:
        return None
    return TrialState.PRUNED, [], f"{failed[-1]}; given up after {len(failed)} attempts"


def _run(search: Search, trial: Trial, parent: tracking.LiveRun, began: float) -> Outcome:
    """Measure the settings. Whatever goes wrong with others than the present ones, the search goes on."""
    settings = trial.user_attrs["settings"]
    name = f"{search.study.study_name} {trial.number}"
    try:
        with tracking.child_run(parent.run_id, name, settings, pruned=optuna.TrialPruned) as child:
            trial.set_user_attr("run", child.run_id)
            losses = _measure(search, trial, settings, child)
            child.log(0, {"log_loss": mean(losses)} | {f"fold_{n}_log_loss": x for n, x in enumerate(losses, 1)})
        return TrialState.COMPLETE, losses, ""
    except BrokenOff as why:
        said = "out of time" if str(why) == "budget" else str(why)
        _tell(search, trial, TrialState.FAIL, [], f"{said}; the next run of this study tries it again", began)
        raise
    except optuna.TrialPruned as pruned:
        return TrialState.PRUNED, [], str(pruned)
    except Exception as error:
        lasting = isinstance(error, BallastError)  # a loss that is not finite; no memory may be there another time
        said = f"failed: {error if lasting else repr(error)}"
        if isinstance(error, DataRejected) or settings == search.present:  # which all others are compared with
            _tell(search, trial, TrialState.FAIL, [], said, began)
            raise
        return TrialState.PRUNED if lasting else TrialState.FAIL, [], said


def mean(losses: list[float]) -> float:
    """The mean over folds: every origin of time counts the same."""
    return math.fsum(losses) / len(losses)


def _measure(search: Search, trial: Trial, settings: Settings, child: tracking.LiveRun) -> list[float]:
    """The validation log loss of each fold. Raises TrialPruned where the trial is not worth going on with.

    What is reported is the mean over the folds so far, of which the last one is still learning: at an equal step, all
    trials have seen the same folds.
    """
    changed = getattr(search.params, search.kind).model_copy(update=settings)
    params = search.params.model_copy(update={search.kind: changed})
    losses: list[float] = []
    done, best = len(_counted(search, *DONE)), _best_words(search)

    def report(epoch: int, loss: float) -> None:
        value = mean([*losses, loss])
        step = len(losses) * search.epochs + epoch
        _check_time(search)
        trial.report(value, step)
        child.log(step, {"running_log_loss": value})
        where = f"fold {len(losses) + 1}/{len(search.folds)}" + (f" epoch {epoch}" if search.kind == "tabm" else "")
        search.show.state(done, search.total, f"{where} {value:.4f} · best {best}")
        if trial.should_prune() and settings != search.present:
            raise optuna.TrialPruned(f"pruned in {where} at {value:.4f}, among the worst quarter there")

    for number, fold in enumerate(search.folds, 1):
        _check_time(search)
        loss = _fold_loss(search.kind, fold, params, report if search.kind == "tabm" else None)
        if search.kind != "tabm":
            if number < len(search.folds):
                report(1, loss)
            else:
                trial.report(mean([*losses, loss]), number)
        losses.append(loss)
    return losses


def _check_time(search: Search) -> None:
    if number := search.signalled():
        raise BrokenOff("terminated" if number == signal.SIGTERM else "interrupted")
    if time.monotonic() >= search.deadline:
        raise BrokenOff("budget")


def _fold_loss(kind: Kind, fold: Encoded, params: TrainParams, report: Callable[[int, float], None] | None) -> float:
    """Fit the candidate in a fold; ``report`` is called with each epoch and the best log loss up to it."""
    best = math.inf

    def log(epoch: int, values: Mapping[str, float]) -> None:
        nonlocal best
        best = min(best, values[f"{kind}/validation_log_loss"])
        if report:
            report(epoch, best)

    with redirect_stdout(io.StringIO()):  # the trial speaks for its fits
        candidate = fit(kind, fold.train, fold.validation, fold.transform, params, log)
        return log_loss(fold.validation, candidate.predict(fold.validation.matrix))


def _tell(search: Search, trial: Trial, state: TrialState, losses: list[float], said: str, began: float) -> None:
    took = time.monotonic() - began
    for name, value in {"losses": losses, "said": said, "seconds": took}.items():
        trial.set_user_attr(name, value)
    search.study.tell(trial, mean(losses) if losses else None, state=state)
    done = len(_counted(search, *DONE))
    settings = words(_changed(search, trial.user_attrs["settings"]))
    what = said or f"log loss {mean(losses):.4f} · best {_best_words(search)}"
    search.show.line(f"trial {done}/{search.total} · {what} · {took:.0f} s · {settings}")
    search.show.state(done, search.total, f"best {_best_words(search)}")


# --- what comes out ---------------------------------------------------------------------------------------------------


def _result(
    search: Search, folds: list[Fold], before: int, ended: str, params_file: Path, path: Path
) -> dict[str, Any]:
    """The best trials beside the present settings, and the diff that leads to them, if they are better."""
    complete = sorted(
        _distinct(_trials(search.study, TrialState.COMPLETE)),
        key=lambda trial: (trial.value, bool(_changed(search, _settings(trial)))),
    )
    present, best = _present(search), complete[0] if complete else None
    gain = _gain(present, best) if present and best else None
    diff = ""
    if best and gain and gain["log_loss"] > 0:
        text = params_file.read_bytes().decode()
        diff = patch.diff(text, params_file.name, ("train", search.kind), _changed(search, _settings(best)))
    return {
        "study": search.study.study_name,
        "kind": search.kind,
        "competes": search.kind in search.params.candidates,
        "ended": ended,
        "folds": [{"start": fold.start.isoformat(), "end": fold.end.isoformat()} for fold in folds],
        "trials": {
            "asked": search.total,
            "before": before,
            "complete": len(_counted(search, TrialState.COMPLETE)),
            "pruned": len(_counted(search, TrialState.PRUNED)),
        },
        "present": _public(search, present) if present else None,
        "best": [_public(search, trial) for trial in complete[:BEST]],
        "gain": gain,
        "importance": _importance(search, len(complete)),
        "diff": diff,
        "diff_file": _keep(path.with_suffix(".diff"), diff) if present else None,
        "study_file": _short(path),
    }


def _gain(present: FrozenTrial, best: FrozenTrial) -> dict[str, Any]:
    """By how much the best trial's log loss is lower than the present settings', fold by fold."""
    pairs = zip(present.user_attrs["losses"], best.user_attrs["losses"], strict=True)
    by_fold = [before - after for before, after in pairs]
    error = float(np.std(by_fold, ddof=1) / math.sqrt(len(by_fold))) if len(by_fold) > 1 else None
    return {"log_loss": mean(by_fold), "by_fold": by_fold, "standard_error": error}


def _importance(search: Search, complete: int) -> dict[str, float]:
    """The share of the variance between complete trials that each setting explains by itself (fANOVA)."""
    if complete < IMPORTANCE_AFTER:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    try:
        return get_param_importances(search.study, evaluator=FanovaImportanceEvaluator(seed=search.asked.seed))
    except RuntimeError:  # all trials came to the same
        return {}


def _keep(path: Path, diff: str) -> str | None:
    """Write the diff beside the study; what an earlier run found goes."""
    if not diff:
        path.unlink(missing_ok=True)
        return None
    with whole_file(path) as part:
        part.write_bytes(diff.encode())
    return _short(path)


def _short(path: Path) -> str:
    """The path from here, where it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _public(search: Search, trial: FrozenTrial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "log_loss": trial.value,
        "by_fold": trial.user_attrs["losses"],
        "seconds": trial.user_attrs["seconds"],
        "settings": _settings(trial),
        "changed": _changed(search, _settings(trial)),
    }


def _changed(search: Search, settings: Settings) -> Settings:
    """What differs from the present settings."""
    return {name: value for name, value in settings.items() if value != search.present[name]}


def words(changed: Mapping[str, Any]) -> str:
    """Settings for a person."""
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "the present settings"


def _best_words(search: Search) -> str:
    complete = _trials(search.study, TrialState.COMPLETE)
    return f"{min(trial.value or 0.0 for trial in complete):.4f}" if complete else "none yet"


def _opening(search: Search, folds: list[Fold], before: int) -> str:
    there = f" · {before} of them are there already" if before else ""
    first, last = folds[0], folds[-1]
    return (
        f"study {search.study.study_name} · {search.kind}: {', '.join(search.axes)} · {search.total} trials{there} · "
        f"{len(folds)} folds from {first.start:%Y-%m-%d} to {last.end:%Y-%m-%d}, "
        f"{len(first.train):,} to {len(last.train):,} rows to train on"
    )


@contextmanager
def _progress(name: str, deadline: float) -> Iterator[Show]:
    """A bar at a terminal, on stderr, beneath the lines; elsewhere the lines alone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield Show(lambda text: print(text, file=sys.stderr, flush=True), lambda done, total, text: None)
        return

    def state(done: int, total: int, text: str) -> None:
        progress.update(task, completed=done, total=total, description=f"{done}/{total} · {text}{_left(deadline)}")

    columns = TextColumn(name), BarColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("", total=None)
        yield Show(lambda text: console.print(text, markup=False), state)


def _left(deadline: float) -> str:
    if deadline == math.inf:
        return ""
    seconds = max(0, int(deadline - time.monotonic()))
    return f" · {seconds // 60}:{seconds % 60:02} left"
