"""How often the monitor raises for nothing, and how small a shift it finds, beside Evidently's default preset.

    python -m benchmarks.drift [--draws 1000] [--write docs/drift.md]

The reference is the train window of the champion as of the date in params.yaml (the first two months of 2013), the
settings are those of params.yaml, and the weights are the champion's own. A window is so many of the reference's days,
drawn with replacement, rows and all. Evidently's `DataDriftPreset` gets the same windows, with the same columns called
numeric and categorical and nothing else set: on a reference of more than 1,000 rows it takes the normed Wasserstein
distance for numbers and the Jensen-Shannon distance for categories, each with the threshold 0.1, and raises where half
of the columns have moved. It takes seconds a window, so it is run for a few, and for the others its rule is applied to
the distances that are measured anyway; that it says the same where it is run is checked.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from scipy.special import expit

from benchmarks.example import SQL, Year, arguments, lay_out
from benchmarks.features import write
from pipelines import model, rows, train
from pipelines.avoidable import avoidable_verdict
from pipelines.comparison import Column, Finding, column, compare
from pipelines.drift import (
    PREDICTION,
    DriftParams,
    inputs_verdict,
    is_out_of_scale,
    rules_of,
    weights_of,
)
from pipelines.errors import exit_with
from pipelines.estimate import log_odds
from pipelines.fit import TrainParams
from pipelines.land import LandParams
from pipelines.model import Model
from pipelines.params import as_of, load
from pipelines.performance import PerformanceParams, Window, days, performance_verdict
from pipelines.policy import AvoidableLoss, PolicyParams
from pipelines.thresholds import distance, histogram, threshold
from pipelines.validate import ValidateParams, validate

SIZES = (1, 3, 7, 14, 30)
SHIFTED = (7, 14, 30)
STEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5)
CHUNK = 16  # windows at a time: few enough for the processor's cache
PRESET_THRESHOLD, PRESET_SHARE = 0.1, 0.5
DAY_LEVEL = 0.6  # the standard deviation of a day's level in log odds, as the champion's test window and April have it
UNSEEN = {1: 30, 7: 20, 30: 10}  # windows of days that their reference has not, by their length
RAW = {
    "flights": ["sched_dep_time", "minute", "dep_delay", "arr_delay", "distance", "year"],
    "weather": ["dewp", "wind_dir", "wind_speed", "precip", "visib"],
}

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pool:
    """A column counted by value: the reference, (1, values), and days that windows are drawn from, (days, values)."""

    column: Column
    then: Floats
    days: Floats
    points: Floats

    @classmethod
    def of(cls, column: Column, pool: pd.Series, bins: int | None = None) -> Pool:
        """``column`` has the reference; ``pool`` is the same column, as it is or shifted, on the reference's days."""
        names = column.reference.index.unique().sort_values()
        both = pd.concat([column.reference.set_axis(np.full(len(column.reference), -1)), pool])
        both.index = np.where(np.arange(len(both)) < len(column.reference), -1, names.get_indexer(both.index))
        whole = Column(column.name, column.numeric, column.rule, column.batch, both)
        found = histogram(whole, bins)
        counts = np.zeros((len(names) + 1, found.counts.shape[1]))
        counts[np.unique(whole.values(both).index) + 1] = found.counts  # a day may have no value
        return cls(column, counts[:1], counts[1:], found.points)

    def shifted(self, by: float) -> Pool:
        """The days moved by so much, the reference as it is."""
        points = np.concatenate([self.points, self.points + by])
        order, nothing = np.argsort(points, kind="stable"), np.zeros_like
        then = np.hstack([self.then, nothing(self.then)])[:, order]
        days = np.hstack([nothing(self.days), self.days])[:, order]
        return Pool(self.column, then, days, points[order])

    def distances(self, times: Floats) -> Floats:
        """Of windows that have each day so many times, (windows, days); (windows,)."""
        parts = (times[start : start + CHUNK] @ self.days for start in range(0, len(times), CHUNK))
        with np.errstate(invalid="ignore"):  # a day without a value: no distance, which is not moved
            return np.concatenate([distance(self.column.rule.method, self.then, part, self.points) for part in parts])


@dataclass(frozen=True)
class Example:
    """The champion, its train and test rows, and what params.yaml says of drift."""

    year: Year
    champion: Model
    train: pd.DataFrame
    test: pd.DataFrame
    params: DriftParams

    @cached_property
    def by_day(self) -> list[pd.DataFrame]:
        """The train rows of each day."""
        return [part for _, part in self.train.groupby(self.train["time"].dt.floor("D"))]

    @cached_property
    def weights(self) -> dict[str, float]:
        """Of each feature, to the champion."""
        return weights_of(self.champion.features, self.champion.schema["importance"])

    def columns(self, batch: pd.DataFrame, reference: pd.DataFrame) -> dict[str, Column]:
        """Each feature of a batch against a reference."""
        features = self.champion.features
        rules = rules_of(features, self.params)
        return {n: column(n, n in features.numeric, rules[n], batch, reference) for n in features.names}

    def thresholds(self, columns: dict[str, Column]) -> dict[str, float]:
        """The monitor's, of each column."""
        found = {name: finding.threshold for name, finding in self.findings(columns).items()}
        return {name: np.inf if bound is None else bound for name, bound in found.items()}

    def findings(self, columns: dict[str, Column]) -> dict[str, Finding]:
        """What the monitor finds of each column."""
        share = self.params.alpha / len(self.champion.features.names)

        def bound(one: Column) -> float | None:
            return threshold(one, share, self.params.run_days, self.params.seed)

        return {name: compare(one, self.params.min_rows, bound) for name, one in columns.items()}

    def raises(self, moved: dict[str, bool]) -> bool:
        """Whether the monitor raises on what has moved."""
        found = {name: self.found(name, flag) for name, flag in moved.items()}
        return bool(inputs_verdict(found, self.params.max_weighted_share)["raises"])

    def found(self, name: str, moved: bool) -> dict[str, Any]:
        """A column of the verdict, as far as raising looks at it."""
        weight = self.weights[name]
        known = {"weight": weight, "critical": weight >= self.params.critical_weight}
        return known | {"moved": moved, "score": 1.0, "threshold": 1.0}


@dataclass(frozen=True)
class Drawn:
    """Windows of one length: their days, (windows, days), and the monitor's thresholds for them."""

    days: int
    times: Floats
    bounds: dict[str, float]


def prepared(folder: Path, overrides: Sequence[str]) -> Example:
    """Train a champion as of the date in params.yaml."""
    year = lay_out(folder, overrides)
    year.prepare(as_of(year.params), folder)
    train.train(folder, SQL, folder, load(year.params, "train", TrainParams))
    champion, every = model.load(folder / "model"), year.rows
    windows = champion.schema["windows"]
    known, test = (
        every[every["time"].between(pd.Timestamp(window["start"]), pd.Timestamp(window["end"]), inclusive="left")]
        for window in (windows["train"], windows["test"])
    )
    test = test.assign(**{PREDICTION: champion.predict(test)})
    return Example(year, champion, known, test, load(year.params, "drift", DriftParams))


def windows(example: Example, draws: int) -> Iterator[Drawn]:
    """Of each length, with thresholds for so many days of the reference, the last ones."""
    random = np.random.default_rng(example.params.seed)
    day = example.train["time"].dt.floor("D")
    names = np.sort(day.unique())
    for length in SIZES:
        times = random.multinomial(length, np.full(len(names), 1 / len(names)), size=draws).astype(float)
        batch = example.train[day.isin(names[-length:])]
        yield Drawn(length, times, example.thresholds(example.columns(batch, example.train)))


# --- no drift ---------------------------------------------------------------------------------------------------------


def false_alarms(example: Example, drawn: list[Drawn], pools: dict[str, Pool], presets: int) -> list[str]:
    """Unmoved windows: how often the monitor raises, or calls any column moved, and what Evidently's preset does."""
    lines = ["| days | raised | 95 % | any column moved | preset raised | preset: any column | preset: columns |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for one in drawn:
        scores = {name: pool.distances(one.times) for name, pool in pools.items()}
        moved = pd.DataFrame({name: scores[name] >= one.bounds[name] for name in scores})
        theirs = pd.DataFrame({name: scores[name] >= PRESET_THRESHOLD for name in scores})
        check_preset(example, one.times[:presets], theirs[:presets])
        raised = np.array([example.raises(row) for row in records(moved)])
        low, high = wilson(raised.sum(), len(raised))
        cells = [f"{one.days}", f"{raised.mean():.1%}", f"{low:.1%} to {high:.1%}", rate(moved.any(axis=1))]
        cells += [rate(theirs.mean(axis=1) >= PRESET_SHARE), rate(theirs.any(axis=1))]
        cells += [f"{theirs.to_numpy().mean():.0%}"]
        lines.append(row_of(cells))
    return lines


def records(moved: pd.DataFrame) -> list[dict[str, bool]]:
    """What has moved in each window."""
    names = [str(name) for name in moved]
    return [dict(zip(names, map(bool, flags), strict=True)) for flags in moved.to_numpy()]


def check_preset(example: Example, times: Floats, expected: pd.DataFrame) -> None:
    """Run Evidently's preset on the rows of the first windows; stop where it counts other columns than were counted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset

        features = example.champion.features
        kinds = DataDefinition(numerical_columns=features.numeric, categorical_columns=features.categorical)
        sides = [Dataset.from_pandas(example.train[features.names], data_definition=kinds)]
        for window, flags in zip(times, expected.to_numpy(), strict=True):
            now = Dataset.from_pandas(rows_of(example, window)[features.names], data_definition=kinds)
            [count, *_] = Report([DataDriftPreset()]).run(now, *sides).dict()["metrics"]
            if int(count["value"]["count"]) != int(flags.sum()):
                sys.exit(f"Evidently's preset finds {count['value']} where {flags.sum()} columns were expected.")


def rows_of(example: Example, times: Floats) -> pd.DataFrame:
    """The rows of a window."""
    drawn = np.repeat(np.arange(len(times)), times.astype(int))
    return pd.concat([example.by_day[day] for day in drawn], ignore_index=True)


def unseen(example: Example) -> list[str]:
    """Real runs of days against all others from January to March: what months that do drift a little make of it."""
    every = example.year.rows
    end = pd.Timestamp(example.champion.schema["windows"]["test"]["end"])
    every = every[every["time"] < end]
    day = every["time"].dt.floor("D")
    names = np.sort(day.unique())
    lines = ["| days | windows | raised | any column moved | columns moved | preset raised | preset: columns |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for length, count in UNSEEN.items():
        flags, theirs = [], []
        for first in np.linspace(0, len(names) - length, count).round().astype(int):
            inside = day.isin(names[first : first + length])
            findings = example.findings(example.columns(every[inside], every[~inside]))
            flags.append({name: bool(found.moved) for name, found in findings.items()})
            theirs.append([found.score is not None and found.score >= PRESET_THRESHOLD for found in findings.values()])
        moved, preset = pd.DataFrame(flags), np.array(theirs)
        raised = sum(example.raises(row) for row in records(moved))
        cells = [f"{length}", f"{count}", f"{raised}", f"{moved.any(axis=1).sum()}", f"{moved.to_numpy().mean():.1%}"]
        cells += [f"{(preset.mean(axis=1) >= PRESET_SHARE).sum()}", f"{preset.mean():.0%}"]
        lines.append(row_of(cells))
    return lines


# --- shifts -----------------------------------------------------------------------------------------------------------


def categories(example: Example, drawn: list[Drawn], columns: dict[str, Column]) -> list[str]:
    """A category whose share doubles, at the cost of all others."""
    random = np.random.default_rng(example.params.seed)
    lines = [f"| category | share | {' | '.join(f'{n} days' for n in SHIFTED)} | preset's test, 30 days |"]
    lines += ["|---" * (len(SHIFTED) + 3) + "|"]
    for name in example.champion.features.categorical:
        shares = columns[name].reference.value_counts(normalize=True)
        for category, share in shares[(shares >= 0.005) & (shares <= 0.5)].items():
            values = columns[name].reference.copy()
            values[(random.random(len(values)) < share / (1 - share)) & (values != category).to_numpy()] = category
            pool = Pool.of(columns[name], values)
            scores = {one.days: pool.distances(one.times) for one in drawn if one.days in SHIFTED}
            found = [rate(scores[one.days] >= one.bounds[name]) for one in drawn if one.days in SHIFTED]
            lines.append(row_of([f"{name} {category}", f"{share:.1%}", *found, rate(scores[30] >= PRESET_THRESHOLD)]))
    return lines


def numbers(example: Example, drawn: list[Drawn], columns: dict[str, Column]) -> list[str]:
    """Each number moved by 0.3 standard deviations, the steadiest first."""
    head = " | ".join(f"{n} days" for n in SHIFTED)
    lines = [f"| column | daily means vary by | {head} | smallest found, 7 days | 14 days | 30 days |"]
    lines += ["|---" * (len(SHIFTED) + 5) + "|"]
    spreads = {name: spread(columns[name]) for name in example.champion.features.numeric}
    asked = [one for one in drawn if one.days in SHIFTED]
    for name in sorted(spreads, key=lambda name: spreads[name]):
        pool = Pool.of(columns[name], columns[name].reference, bins=512)
        found = {step: powers(pool, step, asked) for step in STEPS}
        smallest = [
            next((f"{s:g}" for s in STEPS if found[s][i] >= 0.9), f"over {STEPS[-1]}") for i in range(len(asked))
        ]
        cells = [f"{power:.0%}" for power in found[0.3]]
        lines.append(row_of([f"`{name}`", f"{spreads[name]:.2f}", *cells, *smallest]))
    return lines


def powers(pool: Pool, step: float, drawn: list[Drawn]) -> list[float]:
    """The share of windows of each length that are called moved, where the column has moved by so many deviations."""
    moved, name = pool.shifted(step * float(pool.column.reference.std(ddof=0))), pool.column.name
    return [float((moved.distances(some.times[:300]) >= some.bounds[name]).mean()) for some in drawn]


def spread(one: Column) -> float:
    """The standard deviation of the daily means, in units of that of the values."""
    means = one.reference.groupby(level=0).mean()
    return float(means.std() / one.reference.std(ddof=0))


# --- broken data ------------------------------------------------------------------------------------------------------


def units(example: Example, drawn: list[Drawn]) -> list[str]:
    """A feature times 1000, in windows of each length; and as it is, where none may be called broken."""
    lines = ["| feature times 1000 | " + " | ".join(f"{one.days} days" for one in drawn) + " |"]
    lines += ["|---" * (len(drawn) + 1) + "|"]
    found: dict[str, list[Flags]] = {name: [] for name in example.champion.features.numeric}
    unmoved = []
    for one in drawn:
        frames = [example.columns(rows_of(example, times), example.train) for times in one.times[:50]]
        for name in found:
            scaled = [Column(c.name, True, c.rule, 1000 * c.batch, c.reference) for c in (f[name] for f in frames)]
            found[name].append(np.array([is_out_of_scale(each, example.params.max_scale) for each in scaled]))
        unmoved.append([is_out_of_scale(f[name], example.params.max_scale) for f in frames for name in found])
    lines += [row_of([f"`{name}`", *(f"{flags.mean():.0%}" for flags in each)]) for name, each in found.items()]
    return [*lines, row_of(["none: the column as it is", *(f"{np.mean(each):.0%}" for each in unmoved)])]


def tables(example: Example) -> list[str]:
    """A column of a source table times 1000 in its newest days: what validation says, and if it passes, drift."""
    lines = ["| source column times 1000 | the last 30 days | the last 7 days |", "|---|---|---|"]
    for table, names in RAW.items():
        for name in names:
            cells = [told(example, table, name, days) for days in (30, 7)]
            lines.append(row_of([f"`{table}.{name}`", *cells]))
    return lines


def told(example: Example, table: str, name: str, days: int) -> str:
    """In words."""
    declared, now = load(example.year.params, "land", LandParams).tables, as_of(example.year.params)
    start = pd.Timestamp(now - timedelta(days=days), tz="UTC")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for one in declared:
            data = ds.dataset(example.year.folder / "tables" / one).to_table()
            if time := declared[one].time:
                data = data.filter(pc.less(data[time], pd.Timestamp(now, tz="UTC")))
            if one == table:
                newest = pc.greater_equal(data[declared[one].time], start)
                place = data.column_names.index(name)
                wrong = pc.if_else(newest, pc.multiply(data[name], 1000), data[name]).cast(data[name].type)
                data = data.set_column(place, name, wrong)
            (out / "tables" / one).mkdir(parents=True)
            pq.write_table(data, out / "tables" / one / "all.parquet")
        suite, params = SQL.parent / "validate.yaml", load(example.year.params, "validate", ValidateParams)
        with contextlib.redirect_stderr(io.StringIO()):
            verdict = validate(out / "tables", suite, out, params, declared, now)
        if verdict.critical:
            return "rejected"
        aside = sum(len(one.reasons) for one in verdict.tables)
        every = rows.select(out / "tables", out / "quarantine", SQL.read_text(encoding="utf-8"), declared)
        batch = every[(every["time"] >= start) & (every["time"] < pd.Timestamp(now, tz="UTC"))]
        return judged(example, batch) or f"not called broken: {aside} rows in quarantine"


def judged(example: Example, batch: pd.DataFrame) -> str:
    """What drift calls a batch that passed; nothing, if not broken."""
    if batch.empty:
        return "no row left: rejected"
    columns = example.columns(batch, example.train)
    scaled = [name for name, one in columns.items() if one.numeric and is_out_of_scale(one, example.params.max_scale)]
    empty = [name for name, one in columns.items() if one.batch.isna().all()]
    return f"broken: {', '.join(scaled + empty)}" if scaled or empty else ""


# --- concept drift ----------------------------------------------------------------------------------------------------


def concept(example: Example, draws: int) -> list[str]:
    """Windows of the test window's days, their labels turned round where the airport is behind its schedule."""
    random = np.random.default_rng(example.params.seed)
    judging = load(example.year.params, "performance", PerformanceParams)
    test = example.test[example.test["label"].notna()].astype({"label": float})
    behind = test["origin_overdue"] > test["origin_overdue"].median()
    flipped = test.assign(label=test["label"].where(~behind, 1 - test["label"]))
    lines = ["| days | called worse: labels turned round | called worse: labels as they are |", "|---|---|---|"]
    for length in (7, 14):
        days = [random.integers(test["time"].dt.date.nunique(), size=length) for _ in range(draws)]
        flags = [
            [bool(verdict_on(of_days(frame, drawn), test, judging)["worse"]) for drawn in days]
            for frame in (flipped, test)
        ]
        lines.append(row_of([f"{length}", *map(rate, flags)]))
    return lines


def verdict_on(batch: pd.DataFrame, test: pd.DataFrame, judging: PerformanceParams) -> dict[str, Any]:
    """What the performance tier says of one window, all of whose labels have come."""
    window = Window("2013-04-01", "2013-05-01", 1)
    return performance_verdict({window: batch}, window, test, window.end, judging)


def of_days(frame: pd.DataFrame, drawn: npt.NDArray[np.int64]) -> pd.DataFrame:
    """The rows of these days one after another; a day that is drawn twice is two days."""
    by_day = [part for _, part in frame.groupby(frame["time"].dt.floor("D"))]
    first = frame["time"].min().floor("D")
    parts = [by_day[day].assign(time=first + timedelta(days=place)) for place, day in enumerate(drawn)]
    together: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return together


# --- avoidable loss ---------------------------------------------------------------------------------------------------


def avoidable(example: Example, draws: int) -> list[str]:
    """Windows after the champion's test window with labels drawn from its own probabilities: there is nothing to save.

    Each day has a level of its own in log odds, which the champion does not know, as its real days have. Beside it the
    same with an airport at which flights have begun to be late more often.
    """
    random, since = np.random.default_rng(example.params.seed), pd.Timestamp(as_of(example.year.params), tz="UTC")
    judging = load(example.year.params, "performance", PerformanceParams)
    policy = load(example.year.params, "policy", PolicyParams)
    [trigger] = [one for one in policy.triggers if isinstance(one, AvoidableLoss)]
    after = example.year.rows
    after = after[after["time"].between(since, since + timedelta(days=max(SHIFTED)), inclusive="left")]
    after = after.assign(**{PREDICTION: example.champion.predict(after)})
    rows = pd.concat([example.test, after], ignore_index=True)
    day, is_new = pd.factorize(days(rows))[0], (rows["time"] >= since).to_numpy()
    odds, there = log_odds(rows), is_new & (rows["origin"] == "EWR").to_numpy()
    lines = ["| days | raised: nothing to save | mean avoidable loss | raised: EWR's odds 1.65 times | mean |"]
    lines += ["|---|---|---|---|---|"]
    for length in SHIFTED:
        within, cells = (rows["time"] < since + timedelta(days=length)).to_numpy(), []
        for shift, count in ((0.0, draws), (0.5, draws // 4)):
            found = []
            for _ in range(count):
                level = random.normal(scale=DAY_LEVEL, size=day.max() + 1)[day] + shift * there
                drawn = rows.assign(label=(random.random(len(rows)) < expit(odds + level)).astype(float))
                part = avoidable_verdict(drawn[within & is_new], drawn[within], example.champion.features, judging)
                found.append((trigger.judge({"performance": {"avoidable": part}}).fires, part["loss"]))
            fires, losses = zip(*found, strict=True)
            cells += [rate(fires), f"{np.mean(losses):+.4f}"]
        lines.append(row_of([f"{length}", *cells]))
    return lines


# --- the page ---------------------------------------------------------------------------------------------------------


def wilson(hits: float, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson, 1927)."""
    share, scale = hits / of, 1 + z**2 / of
    middle, half = share + z**2 / (2 * of), z * np.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    return float((middle - half) / scale), float((middle + half) / scale)


def rate(flags: Any) -> str:
    """``98% (96 to 99)``."""
    low, high = wilson(float(np.sum(flags)), len(flags))
    return f"{np.mean(flags):.1%} ({100 * max(low, 0):.1f} to {100 * high:.1f})"


def row_of(cells: Sequence[str]) -> str:
    """A line of a table, as Markdown."""
    return f"| {' | '.join(cells)} |"


def measured(example: Example, draws: int, presets: int, labels: int) -> Iterator[str]:
    """One table after another, as Markdown."""
    columns = example.columns(example.train, example.train)
    pools = {name: Pool.of(one, one.reference) for name, one in columns.items()}
    drawn = list(windows(example, draws))
    parts: dict[str, Callable[[], list[str]]] = {
        f"No drift: {draws:,} windows of each length": lambda: false_alarms(example, drawn, pools, presets),
        "A category's share doubles: called moved": lambda: categories(example, drawn, columns),
        "A number moves by 0.3 standard deviations: called moved; the smallest move found in 90 %": lambda: numbers(
            example, drawn, columns
        ),
        "A change of unit in what the model reads: called broken": lambda: units(example, drawn),
        "A change of unit at the source": lambda: tables(example),
        "Avoidable loss: how often the trigger of params.yaml raises": lambda: avoidable(example, labels),
        "What the label depends on is turned round, inputs unmoved": lambda: concept(example, draws=100),
        "Real days of January to March, against all others": lambda: unseen(example),
    }
    for title, part in parts.items():
        yield f"**{title}**\n\n" + "\n".join(part())


def main() -> None:
    """Measure, print the tables, and write them where asked."""
    parser = arguments(__doc__)
    parser.add_argument("--draws", type=int, default=1000, help="windows of each length without drift")
    parser.add_argument("--presets", type=int, default=2, help="of these, on which Evidently's preset is really run")
    parser.add_argument("--labels", type=int, default=200, help="windows of each length whose labels are drawn")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            example = prepared(Path(folder), args.set)
        days = example.train["time"].dt.date
        reference = f"{len(days):,} rows of {days.nunique()} days, {days.min()} to {days.max()}"
        changed = "".join(f" --set {override}" for override in args.set)
        command = (
            f"python -m benchmarks.drift --draws {args.draws} --presets {args.presets} --labels {args.labels}{changed}"
        )
        text = [f"`{command}`, {date.today()}. Reference: {reference}. Rates with their 95 % interval."]
        print(*text, flush=True)
        for part in measured(example, args.draws, args.presets, args.labels):
            print(f"\n{part}", flush=True)
            text.append(part)
    if args.write:
        write(args.write, "\n\n".join(text))


if __name__ == "__main__":
    exit_with(main)
