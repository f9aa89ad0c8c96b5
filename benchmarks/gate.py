"""How often luck gets through the gate, and how large a gain must be to get through it.

Thousands of comparisons of two models on simulated test windows. Each model errs by the row and, all rows of a day
alike, by the day; days differ in size and in how late they run. An equal challenger errs as the champion does, by
itself; a better one errs less. The decision is that of the rule ``better``: the lower bound of the gain in log loss, by
the paired bootstrap over days.

python -m benchmarks.gate [--comparisons 4000] [--params params.yaml]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines import metrics, params
from pipelines.decide import DecideParams
from pipelines.rules import Better

Floats = npt.NDArray[np.float64]
CHUNK = 500  # comparisons at a time, for memory
BY_ROW, BY_DAY = 0.4, 0.3  # how far a model's log odds are off, by the row and by the day: a gain's error as on flights


@dataclass(frozen=True)
class Window:
    """A simulated test window: how many days, and how many rows a day on average."""

    days: int
    rows_a_day: int


def compare(
    window: Window, comparisons: int, skill: float, random: np.random.Generator
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Gains in log loss, (comparisons, rows), and the day of each row, (rows,).

    ``skill`` is the share of the champion's error that the challenger does without; 0 makes them equal.
    """
    sizes = random.integers(window.rows_a_day // 2, window.rows_a_day * 3 // 2 + 1, window.days)
    day = np.repeat(np.arange(window.days), sizes)
    shape, by_day = (comparisons, len(day)), (comparisons, window.days)
    true = random.normal(-1.2, 0.9, shape) + random.normal(0, 0.5, by_day)[:, day]
    late = random.random(shape) < 1 / (1 + np.exp(-true))

    def loss(share: float) -> Floats:
        wrong = random.normal(0, BY_ROW, shape) + random.normal(0, BY_DAY, by_day)[:, day]
        odds = true + share * wrong
        losses: Floats = np.logaddexp(0, np.where(late, -odds, odds))
        return losses

    return loss(1.0) - loss(1.0 - skill), day


def lower_bounds(gains: Floats, day: npt.NDArray[np.int64], confidence: float, seed: int) -> Floats:
    """``metrics.mean_by_day(...).lower`` of each comparison at once, (comparisons,): they share the drawn days."""
    days = int(day.max()) + 1
    sums, rows = np.stack([gains[:, day == one].sum(axis=1) for one in range(days)]), np.bincount(day)
    times = np.random.default_rng(seed).multinomial(days, np.full(days, 1 / days), size=2000)
    draws = (times @ sums) / (times @ rows)[:, None]
    means = gains.mean(axis=1)
    below = means - np.quantile(draws, 1 - confidence, axis=0)
    bounds: Floats = means - metrics.widening(days, confidence) * below
    return bounds


def simulate(rule: Better, seed: int, window: Window, comparisons: int, skill: float) -> tuple[float, float]:
    """The share of the challengers that are promoted, and the mean gain that they really have."""
    random = np.random.default_rng(1)
    promoted, total = 0, 0.0
    for start in range(0, comparisons, CHUNK):
        gains, day = compare(window, min(CHUNK, comparisons - start), skill, random)
        promoted += int((lower_bounds(gains, day, rule.confidence, seed) > rule.margin).sum())
        total += float(gains.mean(axis=1).sum())
    return promoted / comparisons, total / comparisons


def main() -> None:
    """Print the false promotion rate by the number of days, then the power by the gain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=4000)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    given = parser.parse_args()
    gate = params.load(given.params, "decide", DecideParams)
    rule = next(rule for rule in gate.rules if isinstance(rule, Better))
    tie = rule.model_copy(update={"margin": 0.0})
    print(f"{given.comparisons:,} comparisons each, at {rule.confidence:.1%}; a mean of 200 rows a day")
    print(f"\nequal challengers promoted {'margin 0':>18} {f'margin {rule.margin:g}':>14}")
    for days in (gate.min_test_days, 14, 28):
        window = Window(days, 200)
        found = [simulate(one, gate.seed, window, given.comparisons, 0.0)[0] for one in (tie, rule)]
        print(f"  {days:>3} days {found[0]:>34.1%} {found[1]:>14.1%}")
    print(f"\nbetter challengers promoted, 14 days of 900 rows, margin {rule.margin:g}")
    for skill in (0.05, 0.1, 0.2, 0.3, 0.5):
        power, gain = simulate(rule, gate.seed, Window(14, 900), given.comparisons // 4, skill)
        print(f"  better by {gain:.4f} log loss {power:>17.1%}")


if __name__ == "__main__":
    main()
