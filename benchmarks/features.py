"""What each feature is worth: how much log loss rises when a model has to do without it.

    python -m benchmarks.features [--months 4,8,12] [--only weather,dest] [--write docs/features.md]

As of the first of each month, HistGradientBoosting with the settings of `train.hgb` learns from the train and the
validation window as `prepare` cuts them, and predicts the month. Nothing is held out to stop it early: it takes all of
`train.hgb.iterations`. It does so with all features, without each of them, and without each group whose members can
stand in for one another. Below that stand features that are not in the SQL, added one by one: those that can be had
from a row's time alone. A rise is the mean over all flights of the months, with a standard error by day. It includes
the luck of one fit: features of no worth rise and fall by about half a thousandth.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from pandas.tseries.holiday import USFederalHolidayCalendar

from benchmarks.example import Year, arguments, between, lay_out, next_month
from pipelines import metrics, rows
from pipelines.errors import exit_with
from pipelines.files import whole_file
from pipelines.fit import TrainParams, Window, fit, reproducible
from pipelines.model import Transform
from pipelines.params import load
from pipelines.prepare import PrepareParams
from pipelines.schema import Features

GROUPS = {
    "the weather": ["dewp", "wind_from_east", "wind_from_north", "precip", "visib"],
    "the wind": ["wind_from_east", "wind_from_north"],
    "the aircraft's flight before": ["aircraft_previous_hours", "aircraft_previous_delay_min", "aircraft_spare_min"],
    "the origin's operations": ["origin_mean_delay_3h", "origin_overdue"],
    "the carrier's operations": ["carrier_mean_delay_3h", "carrier_overdue"],
    "the destination's operations": ["dest_mean_delay_3h", "dest_overdue"],
}
GROUPS["all operations"] = [name for group in list(GROUPS)[-3:] for name in GROUPS[group]]
TRIED = {
    "weekday": ["weekday"],
    "the hour as sine and cosine": ["hour_sin", "hour_cos"],
    "the day of the year": ["day_of_year"],
    "days to the nearest holiday": ["holiday_days"],
}
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Month:
    """What a month is predicted from, and its own rows with a label."""

    past: pd.DataFrame
    rows: pd.DataFrame


@dataclass(frozen=True)
class Result:
    """The losses of all rows of the months, one after another, and the mean AUC of the months."""

    losses: Floats
    auc: float


def months_of(year: Year, numbers: list[int]) -> Iterator[Month]:
    """The months, each with the two windows that lie before it."""
    for number in numbers:
        first = date(2013, number, 1)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            year.prepare(first, Path(folder))
            past = pd.concat(rows.read(Path(folder) / f"{name}.parquet") for name in ("train", "validation"))
        yield Month(with_times(past), with_times(between(year.labelled, first, next_month(first))))


def with_times(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the columns of ``TRIED``."""
    local = frame["time"].dt.tz_convert("America/New_York").dt.tz_localize(None)
    angle = 2 * np.pi * (local.dt.hour + local.dt.minute / 60) / 24
    holidays = USFederalHolidayCalendar().holidays("2012-12-01", "2014-01-31").to_numpy()
    days = (local.dt.normalize().to_numpy()[:, None] - holidays[None]) / np.timedelta64(1, "D")
    nearest = days[np.arange(len(days)), np.abs(days).argmin(axis=1)]
    return frame.assign(
        weekday=local.dt.weekday.astype(float),
        hour_sin=np.sin(angle),
        hour_cos=np.cos(angle),
        day_of_year=local.dt.dayofyear.astype(float),
        holiday_days=nearest.clip(-7, 7),
    )


def result_of(months: list[Month], features: Features, params: TrainParams) -> Result:
    """Fit and predict every month with these features."""
    losses, areas = [], []
    for month in months:
        transform = Transform.fit(month.past, features)
        past = Window.of(month.past, transform)
        with reproducible(params.seed, params.threads), contextlib.redirect_stdout(io.StringIO()):
            candidate = fit("hgb", past, None, transform, params)
            probability = candidate.predict(transform.encode(month.rows))
        label = month.rows["label"].astype(float)
        losses.append(metrics.log_loss_rows(label, probability))
        areas.append(metrics.binary(label, probability, threshold=0.5, bins=10)["roc_auc"])
    return Result(np.concatenate(losses), float(np.mean(areas)))


def without(features: Features, dropped: list[str]) -> Features:
    """The features that are left."""
    kinds = {kind: [n for n in names if n not in dropped] for kind, names in features.model_dump().items()}
    return Features.model_validate(kinds)


def trials(features: Features) -> dict[str, Features]:
    """What is measured, in the order of the table: all, less each group, less each feature, more than there is."""
    return (
        {"all": features}
        | {f"without {name}": without(features, members) for name, members in GROUPS.items()}
        | {f"without `{name}`": without(features, [name]) for name in features.names}
        | {
            f"with {name}": features.model_copy(update={"numeric": features.numeric + columns})
            for name, columns in TRIED.items()
        }
    )


def table(results: dict[str, Result], days: npt.NDArray[np.datetime64], features: dict[str, Features]) -> str:
    """A line for each trial, as Markdown."""
    lines = ["| features | columns | log loss | rise, in thousandths | AUC |", "|---|---|---|---|---|"]
    reference = results["all"]
    for name, result in results.items():
        difference = 1000 * (result.losses - reference.losses)
        error = np.std(metrics.bootstrap_by_day(difference, days, seed=1))
        rise = "" if result is reference else f"{difference.mean():+.2f} ± {error:.2f}"
        cells = [name, f"{len(features[name].names)}", f"{result.losses.mean():.4f}", rise, f"{result.auc:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(page: Path, measured: str) -> None:
    """Put the table between the two marks of the page."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{page} has no place for the table: it needs one line {BEGIN} and one {END}.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    with whole_file(page) as part:
        part.write_text(f"{before}{BEGIN}\n{measured}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Measure, print the table, and write it where asked."""
    parser = arguments(__doc__)
    parser.add_argument("--months", default="4,5,6,7,8,9,10,11,12", help="of 2013, by number")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the lines that hold one of these words")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    args = parser.parse_args()
    if args.write and args.only:
        parser.error("--write puts the whole table into the page: leave --only out")
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            year = lay_out(Path(folder), args.set)
        params = load(year.params, "train", TrainParams)
        asked = trials(load(year.params, "prepare", PrepareParams).features)
        months = list(months_of(year, [int(number) for number in args.months.split(",")]))
    words = args.only.split(",")
    asked = {name: features for name, features in asked.items() if name == "all" or any(word in name for word in words)}
    results = {}
    for name, features in asked.items():
        results[name] = result_of(months, features, params)
        print(f"{name:50} {results[name].losses.mean():.4f}", file=sys.stderr, flush=True)
    days = np.concatenate([month.rows["time"].dt.floor("D").to_numpy() for month in months])
    changed = "".join(f" --set {override}" for override in args.set)
    command = f"python -m benchmarks.features --months {args.months}{changed}"
    measured = f"`{command}`, {date.today()}, {len(days):,} flights of {len(months)} months of 2013:\n\n" + table(
        results, days, asked
    )
    print(f"\n{measured}")
    if args.write:
        write(args.write, measured)


if __name__ == "__main__":
    exit_with(main)
