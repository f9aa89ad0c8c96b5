"""What the model is worth: the challenger as of the first of each month, on the flights of that month.

    python -m benchmarks.quality [--months 4,7,12] [--only tabm] [--set train.tabm.width=32] [--jobs 2]

For each month the stages `prepare` and `train` run as of its first day with the settings of params.yaml: the windows,
the candidates, the choice between them, the temperature and the refit are theirs. The model folder that comes out is
loaded and asked for the whole month, two hours before each departure; the rows with a label are scored. The tables are
laid out once for all months (see benchmarks/example.py).

Beside it stands what one would use otherwise: HistGradientBoosting with the settings of `train.hgb` on the same
features and on all flights so far. Their last `prepare.validation_days` say how many iterations; it is then fitted to
all of them. It has no test window to leave out, so it sees two weeks more than the challenger.

The columns `alone` are each candidate on the month as it was validated, with its temperature. `refit` is what fitting
the picked one again did to its log loss on the month: below 0 it helped (always 0 where `train.refit` is false).
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd

from benchmarks.example import SQL, Year, arguments, between, lay_out, next_month
from pipelines import metrics, model, train
from pipelines.errors import exit_with
from pipelines.fit import Candidate, TrainParams, Window, fit, reproducible
from pipelines.model import Kind, Probabilities, Transform, tempered
from pipelines.params import load
from pipelines.prepare import PrepareParams

GOAL_LOG_LOSS, GOAL_AUC = 0.475, 0.735


@dataclass(frozen=True)
class Score:
    """Log loss and AUC on a month."""

    log_loss: float
    auc: float

    def __str__(self) -> str:
        """As a cell of the table."""
        return f"{self.log_loss:.4f} {self.auc:.4f}"


@dataclass(frozen=True)
class Month:
    """What was found for a month."""

    first: date
    rows: int
    late: float
    picked: Kind
    challenger: Score
    alone: dict[Kind, Score]
    boosting: Score
    temperatures: dict[Kind, float]
    lengths: dict[Kind, int]
    seconds: float


def measure(first: date, year: Year) -> Month:
    """Train as of ``first``, and score on its month."""
    params = load(year.params, "train", TrainParams)
    frame = between(year.labelled, first, next_month(first))
    label = frame["label"].to_numpy(np.float32)
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = Path(name)
        year.prepare(first, folder)
        began = time.perf_counter()
        with recording() as fitted:
            result = train.train(folder, SQL, folder, params)
        seconds = time.perf_counter() - began
        challenger = model.load(folder / "model")
        probability = challenger.predict(frame)
        boosting = boosted(year, first, params, frame)
    found = result["candidates"]
    matrix = challenger.transform.encode(frame)
    alone = {
        one.kind: score(label, tempered(one.predict(matrix), found[one.kind]["temperature"]))
        for one in fitted[: len(found)]  # a refit comes after them
    }
    return Month(
        first,
        len(frame),
        float(label.mean()),
        challenger.kind,
        score(label, probability),
        alone,
        score(label, boosting),
        {kind: scores["temperature"] for kind, scores in found.items()},
        {one.kind: next(iter(one.length.values())) for one in fitted[: len(found)]},
        seconds,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the stages' own lines."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def recording() -> Iterator[list[Candidate]]:
    """Yield a list that gets every candidate that the stage fits, which keeps only the best."""
    fitted: list[Candidate] = []

    def record(*args: Any, **kwargs: Any) -> Candidate:
        fitted.append(fit(*args, **kwargs))
        return fitted[-1]

    with patch.object(train, "fit", record):
        yield fitted


def score(label: Any, probability: Probabilities) -> Score:
    """The two figures that the goals are set in."""
    found = metrics.binary(label, probability, threshold=0.5, bins=10)
    return Score(found["log_loss"], found["roc_auc"])


def boosted(year: Year, as_of: date, params: TrainParams, frame: pd.DataFrame) -> Probabilities:
    """HistGradientBoosting's probabilities for a frame, learnt from all rows with a label before the as-of date."""
    prepared = load(year.params, "prepare", PrepareParams)
    known = year.known(as_of)
    transform = Transform.fit(known, prepared.features)
    everything = Window.of(known, transform)
    held_out = (known["time"] >= known["time"].max() - timedelta(days=prepared.validation_days)).to_numpy()
    past, recent = (Window(everything.matrix[part], everything.label[part]) for part in (~held_out, held_out))
    with reproducible(params.seed, params.threads):
        [iterations] = fit("hgb", past, recent, transform, params).length.values()
        last = fit("hgb", everything, None, transform, params, length=iterations)
    return last.predict(transform.encode(frame))


# --- the table --------------------------------------------------------------------------------------------------------


def table(months: list[Month]) -> str:
    """A line for each month, and one for the mean of months."""
    kinds = list(months[0].alone)
    head = ["month", "rows", "late", "picked", "challenger", *(f"{kind} alone" for kind in kinds), "refit"]
    head += ["HGB, all so far", *(f"{kind} length, T" for kind in kinds), "train s"]
    lines = [head, *(cells(month, kinds) for month in months), mean_cells(months, kinds)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruler = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (lines[0], ruler, *lines[1:])
    )


def cells(month: Month, kinds: list[Kind]) -> list[str]:
    """A month's line."""
    refit = month.challenger.log_loss - month.alone[month.picked].log_loss
    return [
        f"{month.first:%Y-%m}",
        f"{month.rows:,}",
        f"{month.late:.1%}",
        month.picked,
        str(month.challenger),
        *(str(month.alone[kind]) for kind in kinds),
        f"{refit:+.4f}",
        str(month.boosting),
        *(f"{month.lengths[kind]} {month.temperatures[kind]:.2f}" for kind in kinds),
        f"{month.seconds:.0f}",
    ]


def mean_cells(months: list[Month], kinds: list[Kind]) -> list[str]:
    """The last line: means of months."""
    refits = [month.challenger.log_loss - month.alone[month.picked].log_loss for month in months]
    picked = " ".join(f"{kind} {sum(month.picked == kind for month in months)}" for kind in kinds)
    return [
        "mean",
        f"{statistics.mean(month.rows for month in months):,.0f}",
        f"{statistics.mean(month.late for month in months):.1%}",
        picked,
        str(mean([month.challenger for month in months])),
        *(str(mean([month.alone[kind] for month in months])) for kind in kinds),
        f"{statistics.mean(refits):+.4f}",
        str(mean([month.boosting for month in months])),
        *("" for _ in kinds),
        f"{statistics.mean(month.seconds for month in months):.0f}",
    ]


def mean(scores: list[Score]) -> Score:
    """The mean of months: a month counts as much as another."""
    return Score(statistics.mean(one.log_loss for one in scores), statistics.mean(one.auc for one in scores))


def verdict(months: list[Month]) -> str:
    """The two goals, and the distance from what stands beside."""
    ours, theirs = mean([month.challenger for month in months]), mean([month.boosting for month in months])
    better = sum(month.challenger.log_loss < month.boosting.log_loss for month in months)
    return (
        f"mean log loss {ours.log_loss:.4f} (goal: at most {GOAL_LOG_LOSS}), HistGradientBoosting on all months so far "
        f"{theirs.log_loss:.4f}: {ours.log_loss - theirs.log_loss:+.4f}, less in {better} of {len(months)} months\n"
        f"mean AUC      {ours.auc:.4f} (goal: at least {GOAL_AUC}), HistGradientBoosting {theirs.auc:.4f}: "
        f"{ours.auc - theirs.auc:+.4f}"
    )


def main() -> None:
    """Measure the months, one or more at a time, and print the table."""
    parser = arguments(__doc__)
    parser.add_argument("--months", default="4,5,6,7,8,9,10,11,12", help="of 2013, by number")
    parser.add_argument("--only", default="", metavar="KIND", help="the same as --set train.candidates=[KIND]")
    parser.add_argument("--jobs", type=int, default=1, help="months at a time; their seconds are then no measure")
    args = parser.parse_args()
    only = [f"train.candidates=[{args.only}]"] if args.only else []
    firsts = [date(2013, int(month), 1) for month in args.months.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            year = lay_out(Path(folder), [*args.set, *only])
        load(year.params, "train", TrainParams)
        months = []
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            for month in pool.map(partial(measure, year=year), firsts):
                months.append(month)
                print(
                    f"{month.first:%Y-%m}  {month.picked} {month.challenger}   HGB {month.boosting}   "
                    f"{month.seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    print(f"\nlog loss and AUC on each month, as of its first day{' · '.join(['', *args.set, *only])}\n")
    print(table(months))
    print(f"\n{verdict(months)}")


if __name__ == "__main__":
    exit_with(main)
