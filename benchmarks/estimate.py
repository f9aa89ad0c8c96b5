"""What the estimate before labels is worth: estimated and realised log loss of one champion, month by month.

    python -m benchmarks.estimate [--as-of 2013-04-01] [--set train.candidates=[hgb]]

The stages `prepare` and `train` run as of the date with the settings of params.yaml; the champion that comes out
scores each month from there to the end of the year. `estimate` is what drift says of a month without its labels, ± one
standard error by day; `realised` what its labels said, all of them in. Beside it stand the same expectation without any
calibration, and by an isotonic one in place of Platt's. The tables are laid out once (see benchmarks/example.py).

Above the table is what the choice between them rests on, for champions of earlier dates and on no row of May or later:
the log loss of the calibrated probabilities on the test window, each day calibrated by the others, and the mean
distance of estimated and realised log loss over the weeks that follow until May.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

from benchmarks.example import SQL, Year, arguments, between, lay_out, next_month
from benchmarks.quality import quiet
from pipelines import metrics, model, train
from pipelines.errors import exit_with
from pipelines.estimate import calibrate, estimate_verdict, expected_losses, log_odds
from pipelines.fit import TrainParams
from pipelines.metrics import Floats
from pipelines.params import load
from pipelines.performance import PerformanceParams, Verdict, Window, days, performance_verdict

CHOSEN_ON = (date(2013, 2, 15), date(2013, 3, 1), date(2013, 3, 15), date(2013, 4, 1))
CHOSEN_UNTIL = date(2013, 5, 1)
WEEK = timedelta(days=7)

Calibration = Callable[[pd.DataFrame], Floats]  # rows to the chance of label 1


def platt(reference: pd.DataFrame) -> Calibration:
    intercept, slope = calibrate(log_odds(reference), reference["label"].to_numpy(dtype=np.float64))
    return lambda rows: np.asarray(expit(intercept + slope * log_odds(rows)))


def isotonic(reference: pd.DataFrame) -> Calibration:
    from sklearn.isotonic import IsotonicRegression

    bounds = {"y_min": 1e-3, "y_max": 1 - 1e-3, "out_of_bounds": "clip"}
    fitted = IsotonicRegression(**bounds).fit(reference["probability"], reference["label"].astype(float))
    return lambda rows: np.asarray(fitted.predict(rows["probability"]))


def none(_: pd.DataFrame) -> Calibration:
    return lambda rows: rows["probability"].to_numpy()


CALIBRATIONS = {"none": none, "platt": platt, "isotonic": isotonic}


def scored(year: Year, as_of: date) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The year's rows with the probability of the champion of a date, and those of its test window with a label."""
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = Path(name)
        year.prepare(as_of, folder)
        train.train(folder, SQL, folder, load(year.params, "train", TrainParams))
        champion = model.load(folder / "model")
    rows = year.rows
    rows["probability"] = champion.predict(rows)
    start, end = (datetime.fromisoformat(champion.schema["windows"]["test"][name]) for name in ("start", "end"))
    test = rows[rows["time"].between(start, end, inclusive="left") & rows["label"].notna()]
    return rows, test


def realised(rows: pd.DataFrame) -> float:
    labelled = rows[rows["label"].notna()]
    return float(metrics.log_loss_rows(labelled["label"].astype(float), labelled["probability"]).mean())


def expected(rows: pd.DataFrame, calibration: Calibration) -> float:
    return float(expected_losses(log_odds(rows), calibration(rows)).mean())


def held_out(reference: pd.DataFrame, fit: Callable[[pd.DataFrame], Calibration]) -> float:
    """The log loss of the calibrated probabilities, each day's by the other days' calibration."""
    day, chance = days(reference), np.empty(len(reference))
    for one in np.unique(day):
        chance[day == one] = fit(reference[day != one])(reference[day == one])
    return float(metrics.log_loss_rows(reference["label"].astype(float), chance).mean())


def weekly(rows: pd.DataFrame, as_of: date, calibration: Calibration) -> list[float]:
    """Estimated less realised log loss of each whole week from the date until May."""
    starts = (as_of + n * WEEK for n in range((CHOSEN_UNTIL - as_of) // WEEK))
    weeks = [between(rows, start, start + WEEK) for start in starts]
    return [expected(week, calibration) - realised(week) for week in weeks]


def month(rows: pd.DataFrame, test: pd.DataFrame, first: date, params: PerformanceParams) -> tuple[Verdict, Verdict]:
    """Drift's two verdicts on a month: performance with all labels, the estimate without."""
    batch, end = between(rows, first, next_month(first)), next_month(first)
    window = Window(first.isoformat(), end.isoformat(), 1)
    performance = performance_verdict({window: batch}, window, test, window.end, params)
    return performance, estimate_verdict(batch, test, {"tracked": [], "bias": None}, params)


def line(rows: pd.DataFrame, test: pd.DataFrame, first: date, params: PerformanceParams) -> list[str]:
    """A month of the table."""
    found, guess = month(rows, test, first, params)
    batch, [entry] = between(rows, first, next_month(first)), found["windows"]
    others = [expected(batch, CALIBRATIONS[name](test)) - found["log_loss"] for name in ("none", "isotonic")]
    return [
        f"{first:%Y-%m}",
        f"{found['log_loss']:.4f} ± {entry['standard_error']:.4f}",
        f"{guess['log_loss']:.4f} ± {guess['log_loss_standard_error']:.4f}",
        *(f"{error:+.4f}" for error in (guess["log_loss"] - found["log_loss"], *others)),
        *(f"{one['rise']:+.4f} ± {one['standard_error']:.4f}{' WORSE' * one['worse']}" for one in (found, guess)),
        f"{found['auc']:.4f}",
        f"{guess['auc']:.4f}",
    ]


def table(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(f"{c:<{w}}" for c, w in zip(one, widths, strict=True)) + " |" for one in ruled)


def choice(year: Year) -> str:
    """The table that the choice of the calibration rests on."""
    lines = [["champion of", "test window", *(f"{name}: held out, weeks" for name in CALIBRATIONS)]]
    errors: dict[str, list[float]] = {name: [] for name in CALIBRATIONS}
    for as_of in CHOSEN_ON:
        rows, test = scored(year, as_of)
        cells = []
        for name, fit in CALIBRATIONS.items():
            errors[name] += (weeks := weekly(rows, as_of, fit(test)))
            cells.append(f"{held_out(test, fit):.4f}, {np.abs(weeks).mean():.4f}")
        lines.append([f"{as_of}", f"{realised(test):.4f}", *cells])
    lines.append(["all", "", *(f"{np.abs(found).mean():.4f} in {len(found)} weeks" for found in errors.values())])
    return table(lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--as-of", type=date.fromisoformat, default=date(2013, 4, 1), help="of the champion")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            year = lay_out(Path(folder), args.set)
        params = load(year.params, "performance", PerformanceParams)
        print(f"the calibration, chosen on rows before {CHOSEN_UNTIL}\n\n{choice(year)}\n")
        rows, test = scored(year, args.as_of)
    firsts = [date(2013, number, 1) for number in range(args.as_of.month, 13)]
    head = ["month", "realised", "estimate", "error", "uncalibrated", "isotonic"]
    head += ["realised rise", "estimated rise", "AUC", "estimated"]
    lines = [line(rows, test, first, params) for first in firsts]
    print(
        f"the champion of {args.as_of}, log loss {realised(test):.4f} on its test window\n\n{table([head, *lines])}\n"
    )
    for name, place in (("estimate", 3), ("uncalibrated", 4), ("isotonic", 5)):
        errors = np.array([float(one[place]) for one in lines])
        print(f"{name:<13} mean error {errors.mean():+.4f}, mean distance {np.abs(errors).mean():.4f}")


if __name__ == "__main__":
    exit_with(main)
