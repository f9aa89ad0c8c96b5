from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import yaml

from benchmarks import gate
from pipelines import metrics, params
from pipelines.decide import DecideParams
from pipelines.errors import ParamsError
from pipelines.params import Params
from pipelines.record import Finding
from pipelines.rules import AnyRule, Better, Evidence, Metric, Scored

DAYS, A_DAY = 14, 100
ROWS = DAYS * A_DAY


class Policy(Params):
    rules: tuple[AnyRule, ...]


def side(probability: Any, **known: Any) -> Scored:
    """A side that was trained to the end of January on rows of which a fifth were ones."""
    rates = {"train": 0.2, "validation": 0.25}
    plain = Scored(np.asarray(probability, float), datetime(2013, 2, 1, tzinfo=UTC), rates, 2_000_000, 0.01)
    return replace(plain, **known)


def evidence(challenger: Any, champion: Any = None, label: Any = None, **columns: Any) -> Evidence:
    """What a rule sees of fourteen days of a hundred rows."""
    time = pd.Timestamp("2013-02-16", tz="UTC") + pd.to_timedelta(np.arange(ROWS) // A_DAY, unit="D")
    test = pd.DataFrame({"time": time, "label": np.arange(ROWS) % 2 if label is None else label, **columns})
    sides = [one if isinstance(one, Scored) or one is None else side(one) for one in (challenger, champion)]
    assert sides[0] is not None
    return Evidence(test, sides[0], sides[1], date(2013, 3, 2), threshold=0.5, bins=10, seed=1)


def check(found: Evidence, rule: str, **fields: Any) -> Finding:
    (made,) = Policy.model_validate({"rules": [{"rule": rule, **fields}]}).rules
    return made.check(found)


def noisy(seed: int = 0) -> np.ndarray[Any, Any]:
    """Predictions that know something of the usual label."""
    random = np.random.default_rng(seed)
    return np.clip(0.5 + 0.15 * (np.arange(ROWS) % 2 - 0.5) + random.normal(0, 0.1, ROWS), 0.01, 0.99)


def test_metric_of_a_rule_is_any_of_the_projects() -> None:
    assert set(get_args(Metric)) == set(metrics.binary([0, 1], [0.1, 0.9], 0.5, 2)) - {"rows"}


@pytest.mark.parametrize("metric", get_args(Metric))
def test_floor_and_ceiling_hold_any_metric_at_its_bound(metric: str) -> None:
    found = evidence(noisy())
    value = metrics.binary(found.test["label"], noisy(), 0.5, 10)[metric]
    assert check(found, "floor", metric=metric, at_least=value).passed
    assert check(found, "ceiling", metric=metric, at_most=value).passed
    assert not check(found, "floor", metric=metric, at_least=value + 1e-9).passed
    failed = check(found, "ceiling", metric=metric, at_most=value - 1e-9)
    assert (failed.passed, failed.measured, failed.rule) == (False, value, f"ceiling {metric}")


def test_metric_that_the_rows_do_not_define_passes_no_bound() -> None:
    found = evidence(noisy(), label=np.ones(ROWS, int))
    for made in (
        check(found, "floor", metric="roc_auc", at_least=0.0),
        check(found, "ceiling", metric="roc_auc", at_most=1.0),
        check(found, "too_good", max_gain=1, max_auc=1),
    ):
        assert (made.passed, made.measured) == (False, None)


@pytest.mark.parametrize(("or_champion", "passed"), [(True, True), (False, False)])
def test_ceiling_gives_way_to_a_champion_only_if_told_to(or_champion: bool, passed: bool) -> None:
    found = evidence(noisy(), np.full(ROWS, 0.9))
    made = check(found, "ceiling", metric="log_loss", at_most=0.1, or_champion=or_champion)
    assert made.passed is passed
    assert ("or the champion's on these rows: 1.204" in made.words) is or_champion
    made = check(found, "calibration", max_error=0.01, or_champion=or_champion)
    assert (made.passed, made.rule) == (passed, "calibration")


def test_ceiling_gives_way_to_no_champion_below_it() -> None:
    found = evidence(np.full(ROWS, 0.9), noisy())
    made = check(found, "ceiling", metric="log_loss", at_most=1.0, or_champion=True)
    assert (made.passed, made.needed) == (False, 1.0)


def test_better_of_a_tie_keeps_the_champion() -> None:
    made = check(evidence(noisy(), noisy()), "better", margin=0, confidence=0.975)
    assert (made.passed, made.words) == (False, "equal in log loss over 14 days")


def test_better_by_exactly_the_margin_keeps_the_champion() -> None:
    found = evidence(np.where(np.arange(ROWS) % 2, 0.8, 0.2), np.full(ROWS, 0.5))
    gain = check(found, "better", margin=0, confidence=0.975).measured
    assert gain == pytest.approx(np.log(0.8) - np.log(0.5))
    assert not check(found, "better", margin=gain, confidence=0.975).passed


def test_better_with_a_margin_below_zero_or_a_warning_only_is_no_setting() -> None:
    for wrong in ({"margin": -0.1}, {"severity": "warn"}, {"confidence": 0.5}, {"metric": "brier"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check(evidence(noisy()), "better", **{"margin": 0, "confidence": 0.975, **wrong})


def worse_on(mask: Any, by: float = 0.3) -> np.ndarray[Any, Any]:
    """The noisy predictions, on these rows drawn to the wrong side."""
    towards = np.where(np.arange(ROWS) % 2, 0.05, 0.95)
    return np.where(mask, noisy() * (1 - by) + towards * by, noisy())


def test_slices_with_one_broken_refuse_and_name_it() -> None:
    origin = np.where(np.arange(ROWS) % 10 < 4, "JFK", "EWR")
    found = evidence(worse_on(origin == "JFK"), noisy(), origin=origin)
    made = check(found, "slices", columns=["origin"], max_worse=0.05, min_rows=100, confidence=0.975)
    assert not made.passed
    assert made.words.startswith("1 of 2 slices surely worse by more than 0.05: origin JFK, worse by ")
    assert check(found, "slices", columns=["origin"], max_worse=1, min_rows=100, confidence=0.975).passed


def test_slices_worse_on_one_day_do_not_refuse() -> None:
    """One bad day says little of the next, however many rows it has."""
    first_day = np.arange(ROWS) < A_DAY
    found = evidence(worse_on(first_day, by=0.9), noisy(), origin=np.full(ROWS, "JFK"))
    assert found.champion is not None
    assert found.gain(found.champion).mean() < -0.1, "by the mean alone it would"
    settings: dict[str, Any] = {"columns": ["origin"], "max_worse": 0.01, "min_rows": 100, "confidence": 0.975}
    assert check(found, "slices", **settings).passed


def test_slices_of_an_equal_challenger_rarely_refuse_however_many_there_are() -> None:
    """Sixty challengers, ten slices each, no bound at all: by the confidence, two or three may look worse by chance."""
    carrier = np.random.default_rng(0).choice(list("abcdefghij"), ROWS)
    settings: dict[str, Any] = {"columns": ["carrier"], "max_worse": 0, "min_rows": 100, "confidence": 0.975}
    found = [
        check(evidence(noisy(seed), noisy(100 + seed), carrier=carrier), "slices", **settings) for seed in range(60)
    ]
    assert sum(not one.passed for one in found) <= 3


def test_slices_with_few_rows_are_judged_together() -> None:
    carrier = np.where(np.arange(ROWS) % 2, "AA", pd.Series(np.arange(ROWS) % 20).astype("str"))
    carrier = pd.Series(carrier).where(np.arange(ROWS) % 20 != 4)
    found = evidence(worse_on(np.arange(ROWS) % 2 == 0), noisy(), carrier=carrier)
    made = check(found, "slices", columns=["carrier"], max_worse=0.05, min_rows=100, confidence=0.975)
    assert "1 of 2 slices" in made.words and "carrier (others)" in made.words
    none = check(found, "slices", columns=["carrier"], max_worse=0.05, min_rows=1401, confidence=0.975)
    assert (none.passed, none.words) == (True, "no slice has 1,401 rows")


def test_fairness_measures_what_fairlearn_says() -> None:
    group = np.where(np.arange(ROWS) % 10 < 3, "x", "y")
    late = np.where(group == "x", np.arange(ROWS) % 4 > 0, np.arange(ROWS) % 4 == 3)
    found = evidence(np.where(late, 0.9, 0.1), group=group)
    label = np.arange(ROWS) % 2
    rates = {
        "selection_rate": [late[group == one].mean() for one in "xy"],
        "false_positive_rate": [late[(group == one) & (label == 0)].mean() for one in "xy"],
        "false_negative_rate": [1 - late[(group == one) & (label == 1)].mean() for one in "xy"],
    }
    for name, (x, y) in rates.items():
        made = check(found, "fairness", column="group", min_rows=10, **{name: 0.1})
        assert (made.passed, made.measured) == (False, pytest.approx(abs(x - y)))
        assert made.words.startswith(f"{name.replace('_', ' ')} differs by ")
    made = check(found, "fairness", column="group", min_rows=10, selection_rate=1, false_negative_rate=0.1)
    assert made.words.startswith("false negative rate"), "the one that is furthest beyond its bound"


def test_fairness_leaves_out_rates_of_few_rows() -> None:
    """Ten rows of a third group, none of them of label 1: their rates would be noise, or no rates."""
    group = np.where(np.arange(ROWS) % 4 < 2, "x", "y").astype(object)
    group[:20:2] = "tiny"
    found = evidence(np.where(group == "tiny", 0.9, 0.1), group=group)
    assert not check(found, "fairness", column="group", min_rows=10, selection_rate=0.1).passed
    assert check(found, "fairness", column="group", min_rows=11, selection_rate=0.1).passed
    assert check(found, "fairness", column="group", min_rows=1, false_negative_rate=0.1).passed
    alone = check(found, "fairness", column="group", min_rows=ROWS, selection_rate=0.1)
    assert (alone.passed, alone.measured) == (True, None)
    assert "fewer than two groups of group have 1,400 rows" in alone.words


@pytest.mark.parametrize(
    ("settings", "challenger", "champion", "passed"),
    [
        ({"max_seconds": 0.02}, 0.02, 0.001, True),
        ({"max_seconds": 0.02}, 0.021, None, False),
        ({"max_ratio": 2}, 0.02, 0.01, True),
        ({"max_ratio": 2}, 0.021, 0.01, False),
        ({"max_ratio": 2}, 9, None, True),
        ({"max_ratio": 2, "max_seconds": 0.01}, 0.015, 0.01, False),
        ({"max_ratio": 2, "max_seconds": 1}, 0.021, 0.01, False),
    ],
)
def test_latency_holds_its_bounds(settings: Any, challenger: float, champion: float | None, passed: bool) -> None:
    theirs = None if champion is None else side(noisy(), seconds=champion)
    assert check(evidence(side(noisy(), seconds=challenger), theirs), "latency", **settings).passed is passed


def test_size_counts_megabytes() -> None:
    assert check(evidence(noisy()), "size", max_mb=2).passed
    made = check(evidence(noisy()), "size", max_mb=1.9)
    assert (made.passed, made.measured, made.words) == (False, 2.0, "the model takes 2.00 MB, needed: at most 1.9 MB")


def test_freshness_counts_days_from_the_end_of_the_training_data() -> None:
    assert check(evidence(noisy()), "freshness", max_days=29).passed
    made = check(evidence(noisy()), "freshness", max_days=28)
    assert (made.passed, made.words) == (False, "its data ends 29 days before 2013-03-02, needed: at most 28")


def test_too_good_believes_up_to_a_bound() -> None:
    leak = np.where(np.arange(ROWS) % 2, 0.99, 0.01)
    made = check(evidence(leak, noisy()), "too_good", max_gain=0.2, max_auc=1)
    assert not made.passed and made.words.endswith("look for a feature that knows the label")
    assert check(evidence(leak, noisy()), "too_good", max_gain=0.9, max_auc=0.1).passed, "the AUC is for a first model"
    assert not check(evidence(leak), "too_good", max_gain=0.2, max_auc=0.95).passed
    assert check(evidence(noisy(), leak), "too_good", max_gain=0.01, max_auc=0.1).passed


def test_label_rate_is_held_against_the_champions_or_the_days_after() -> None:
    ours, theirs = side(noisy(), label_rates={"train": 0.3, "validation": 0.2}), side(noisy())
    assert check(evidence(ours, theirs), "label_rate", max_change=0.11).passed
    made = check(evidence(ours, theirs), "label_rate", max_change=0.09)
    assert (made.passed, "the champion's 0.200" in made.words) == (False, True)
    first = check(evidence(side(noisy(), label_rates={"train": 0.3, "validation": 0.1})), "label_rate", max_change=0.11)
    assert (first.passed, "its validation window's 0.100" in first.words) == (False, True)


def test_stability_counts_predictions_that_change_sides() -> None:
    found = evidence(np.where(np.arange(ROWS) < ROWS / 4, 0.9, 0.1), np.full(ROWS, 0.1))
    assert check(found, "stability", max_flipped=0.25).passed
    made = check(found, "stability", max_flipped=0.24)
    assert (made.passed, made.measured) == (False, 0.25)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("slices", {"columns": ["c"], "max_worse": 0, "min_rows": 1, "confidence": 0.9}),
        ("stability", {"max_flipped": 0}),
        ("better", {"margin": 0.1, "confidence": 0.975}),
    ],
)
def test_rule_that_compares_passes_a_first_model(rule: str, settings: dict[str, Any]) -> None:
    made = check(evidence(noisy(), c="a"), rule, severity="block", **settings)
    assert (made.passed, made.measured, made.words[:11]) == (True, None, "first model")


# --- settings


def load(path: Path, *rules: str) -> DecideParams:
    head = "min_test_rows: 1, min_test_days: 2, max_unmatched_share: 0, threshold: 0.5, calibration_bins: 10, seed: 1"
    path.write_text(f"decide: {{{head}, rules: [{', '.join(rules)}]}}")
    return params.load(path, "decide", DecideParams)


BETTER = "{rule: better, margin: 0, confidence: 0.9}"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("{rule: florr, metric: brier, at_least: 1}", "`decide.rules.1` is no `florr`; did you mean `floor`?"),
        ("{rule: nonsense}", "`decide.rules.1` is no `nonsense`; known here: better, calibration, ceiling,"),
        (
            "{rule: ceiling, metric: brier, at_mots: 1}",
            "`decide.rules.1.ceiling.at_mots` is not a setting; did you mean `at_most`?",
        ),
        ("{rule: size, max_bm: 1}", "`decide.rules.1.size.max_bm` is not a setting; did you mean `max_mb`?"),
        ("{rule: floor, metric: log_los, at_least: 1}", "(found 'log_los'); did you mean `log_loss`?"),
        ("{rule: size, max_mb: 1, severity: wran}", "did you mean `warn`?"),
        ("{rule: size}", "`decide.rules.1.size.max_mb`: Field required"),
        ("{max_mb: 1}", "`decide.rules.1`: Unable to extract tag using discriminator 'rule'"),
        ("{rule: fairness, column: c, min_rows: 9}", "name a bound: selection_rate, false_positive_rate"),
        ("{rule: latency}", "name a bound: max_seconds or max_ratio"),
    ],
)
def test_rule_misspelt_names_the_nearest(tmp_path: Path, rule: str, said: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load(tmp_path / "params.yaml", BETTER, rule)
    assert said in str(caught.value)


def test_rules_without_better_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="there must be a rule `better`"):
        load(tmp_path / "params.yaml", "{rule: size, max_mb: 1}")


def test_shipped_rules_are_all_kinds_that_make_sense_for_flights() -> None:
    shipped = params.load(Path("params.yaml"), "decide", DecideParams)
    kinds = {get_args(type(rule).model_fields["rule"].annotation)[0] for rule in shipped.rules}
    every = {get_args(kind.model_fields["rule"].annotation)[0] for kind in get_args(get_args(AnyRule)[0])}
    assert every - kinds == {"fairness"}
    features = yaml.safe_load(Path("params.yaml").read_text())["prepare"]["features"]["categorical"]
    assert all(set(rule.reads) <= set(features) for rule in shipped.rules)


def test_page_of_the_gate_shows_every_kind_and_field() -> None:
    page = Path("docs/gate.md").read_text()
    example = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    Policy.model_validate(example)
    shown = {rule["rule"]: rule for rule in example["rules"]}
    for kind in get_args(get_args(AnyRule)[0]):
        name = get_args(kind.model_fields["rule"].annotation)[0]
        missing = set(kind.model_fields) - set(shown[name]) - {"severity"}
        assert name == "better" or not {field for field in missing if f"`{field}`" not in page}, name
    assert all(f"`{metric}`" in page for metric in get_args(Metric))


def test_rules_import_nothing_heavy() -> None:
    code = "import sys, pipelines.rules; print(*{'pandas', 'sklearn', 'fairlearn', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# --- the bootstrap, by simulation (benchmarks/gate.py; larger there)


def test_simulated_bounds_are_those_of_the_rule() -> None:
    gains, day = gate.compare(gate.Window(9, 40), 5, 0.2, np.random.default_rng(0))
    bounds = gate.lower_bounds(gains, day, 0.975, seed=3)
    for gain, bound in zip(gains, bounds, strict=True):
        assert metrics.mean_by_day(gain, day, 0.975, seed=3).lower == pytest.approx(bound, abs=1e-12)


@pytest.mark.parametrize("days", [7, 14])
def test_better_lets_an_equal_challenger_through_rarely(days: int) -> None:
    """4,000 comparisons: at most 5 % by luck, at the fewest days that are allowed as well; and not never, either."""
    shipped = params.load(Path("params.yaml"), "decide", DecideParams)
    rule = next(rule for rule in shipped.rules if isinstance(rule, Better)).model_copy(update={"margin": 0.0})
    assert days >= shipped.min_test_days
    promoted, gain = gate.simulate(rule, shipped.seed, gate.Window(days, 30), 4000, skill=0.0)
    assert abs(gain) < 0.001
    assert 0.01 < promoted <= 0.05


def test_better_finds_a_challenger_that_is_clearly_better() -> None:
    shipped = params.load(Path("params.yaml"), "decide", DecideParams)
    rule = next(rule for rule in shipped.rules if isinstance(rule, Better))
    promoted, gain = gate.simulate(rule, shipped.seed, gate.Window(14, 300), 500, skill=0.6)
    assert 0.01 < gain < 0.03
    assert promoted > 0.8
