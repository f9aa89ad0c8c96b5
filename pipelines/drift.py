"""Four questions about a scored batch: is the data broken, have inputs moved, predictions moved, is the model worse?

Inputs are compared with the rows that the champion was trained on, predictions with those on its test window. How far
is too far comes from the days of these windows themselves (``thresholds``), and what it means from the column's weight:
its share of the champion's permutation importance. docs/drift.md has the method on a page.

Whether the model is worse is no matter of distributions: performance.py judges it by the labels, estimate.py before
they have come, and avoidable.py says how much of the loss a retraining could have saved.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pydantic import Field

from pipelines import stage
from pipelines.avoidable import avoidable_verdict
from pipelines.comparison import Column, Finding, Rule, column, compare, keep, report
from pipelines.errors import BallastError, ParamsError, exit_with
from pipelines.estimate import estimate_verdict, tracked
from pipelines.files import read_json, write_json
from pipelines.params import Params, load
from pipelines.performance import PerformanceParams, Window, by_window, judged_windows, performance_verdict
from pipelines.schema import Features
from pipelines.state import State
from pipelines.thresholds import threshold

log = logging.getLogger(__name__)

Verdict = dict[str, Any]

PREDICTION = "probability"
NAMED_COLUMNS = 4
PARTS = ("data", "inputs", "predictions", "performance", "estimate")


class DriftParams(Params):
    """The ``drift`` section of params.yaml."""

    max_rows: int = Field(ge=1)
    seed: int
    min_rows: int = Field(ge=1)
    alpha: float = Field(gt=0, lt=0.5)
    run_days: int = Field(ge=1)
    max_scale: float = Field(ge=1)
    critical_weight: float = Field(gt=0, le=1)
    max_weighted_share: float = Field(gt=0, le=1)
    numeric: Rule
    categorical: Rule
    columns: dict[str, Rule]
    prediction: Rule


def drift(
    score: Path,
    validate: Path,
    out: Path,
    params: DriftParams,
    judging: PerformanceParams,
    history: Iterable[Verdict] = (),
) -> Verdict:
    """Compare the batch in ``score`` with the champion's windows; write verdict.json, report.html and report.json.

    ``validate`` is the verdict of validate, which need not exist; ``history`` are the verdicts of earlier windows.
    Nothing to compare with is a finding, no error.
    """
    scored = read_json(score / "result.json")
    for name in ("verdict.json", "report.html", "report.json", "result.json"):
        (out / name).unlink(missing_ok=True)
    verdict: Verdict = {name: scored[name] for name in ("version", "start", "end", "rows", "labelled_rows")}
    if scored["version"] is None:
        verdict |= _without_champion(validate)
    else:
        features = Features.model_validate(scored["features"])
        verdict |= _compare(score, features, scored.get("importance", {}), validate, out, params)
        verdict |= _worse(score, scored, features, judging, history)
    write_json(out / "verdict.json", verdict)
    judged = verdict["performance"].get("present")  # by its own labels: an estimate adds nothing
    parts = [verdict[part]["words"] for part in PARTS if part != "estimate" or not judged]
    return {**verdict, "summary": " · ".join(part for part in parts if part)}


def data_verdict(validate: Path, empty: list[str], out_of_scale: list[str]) -> Verdict:
    """Is the batch broken: what validation found, the columns without a single value, and those in another unit."""
    found = read_json(validate) if validate.exists() else {}
    rejected = not found.get("passed", True)
    faults = {"empty": empty, "out of scale": out_of_scale}
    causes = [f"{fault}: {_named(names)}" for fault, names in faults.items() if names]
    cause = "rejected by validation" if rejected else ", ".join(causes)
    return {
        "broken": bool(cause),
        "rejected": rejected,
        "validated": bool(found),
        "expectations": found.get("expectations"),
        "warnings": len(found.get("warnings", [])),
        "quarantined": sum(found.get("quarantined", {}).values()),
        "empty": empty,
        "out_of_scale": out_of_scale,
        "words": f"data BROKEN ({cause})" if cause else "",
    }


def inputs_verdict(columns: dict[str, Verdict], max_weighted_share: float) -> Verdict:
    """Have the inputs moved: which columns, their share of those that could be judged, and of the model's importance.

    ``raises``: enough of the importance has moved, or a critical column. One that came empty is broken, and counts not.
    None where what could not be judged might have raised.
    """
    judged = [found for found in columns.values() if found["moved"] is not None]
    moved = sorted((name for name in columns if columns[name]["moved"]), key=lambda name: -_excess(columns[name]))
    drifted = [name for name in moved if not _is_empty(columns[name])]
    critical = [name for name in drifted if columns[name]["critical"]]
    weighted = sum((columns[name]["weight"] for name in drifted), 0.0)
    raises = bool(critical) or weighted >= max_weighted_share
    unknown = [found for found in columns.values() if found["moved"] is None]
    open_ = any(found["critical"] for found in unknown)
    open_ = open_ or weighted + sum(found["weight"] for found in unknown) >= max_weighted_share
    return {
        "moved": bool(moved) if judged else None,
        "raises": True if raises else None if open_ or not judged else False,
        "columns": columns,
        "moved_columns": moved,
        "judged": len(judged),
        "share": len(moved) / len(judged) if judged else None,
        "weighted_share": weighted if judged else None,
        "critical_moved": critical,
        "words": _inputs_words(moved, weighted, critical) if judged else "inputs not measured",
    }


def weights_of(features: Features, importance: dict[str, float]) -> dict[str, float]:
    """Each feature's share of the permutation importance, below zero being none; equal shares where there is none."""
    rises = {name: max(0.0, importance.get(name, 0.0)) for name in features.names}
    whole = sum(rises.values())
    return {name: rise / whole if whole else 1 / len(rises) for name, rise in rises.items()}


def predictions_verdict(found: Verdict, batch: pd.Series, reference: pd.Series) -> Verdict:
    """Have the predictions moved: the distance, and the mean probability now and then."""
    words = {None: "predictions not measured", True: "predictions MOVED", False: "predictions not moved"}
    means = {"mean": _number(batch.mean()), "reference_mean": _number(reference.mean())}
    return {**found, **means, "words": words[found["moved"]]}


def is_out_of_scale(one: Column, most: float) -> bool:
    """Is a number on average so many times larger than any that the reference has: its unit must have changed.

    Zero is zero in every unit, and is left out: rain times 1000 on a dry day too.
    """
    if not one.numeric:
        return False
    sizes, largest = one.batch.abs(), one.reference.abs().max()
    return bool(largest > 0 and sizes[sizes > 0].mean() > most * largest)


def rules_of(features: Features, params: DriftParams) -> dict[str, Rule]:
    """The rule of each feature; raise ParamsError where a method does not fit the kind of its column."""
    rules = {name: params.columns.get(name, params.numeric) for name in features.numeric}
    rules |= {name: params.columns.get(name, params.categorical) for name in features.categorical}
    for name in features.categorical:
        if rules[name].method == "wasserstein":
            raise ParamsError(
                f"drift: `{name}` is categorical and its method is wasserstein, which is for numbers. "
                "Take jensenshannon, hellinger, psi or kl_div."
            )
    if unknown := sorted(set(params.columns) - set(features.names)):
        log.warning("drift.columns names what the champion does not read: %s", ", ".join(unknown))
    return rules


def _compare(
    score: Path, features: Features, importance: dict[str, float], validate: Path, out: Path, params: DriftParams
) -> Verdict:
    """Read both sides, measure on all rows, keep Evidently's report on samples of them."""
    batch, reference = _read(score / "predictions.parquet"), _read(score / "reference.parquet")
    train, test = (reference[reference["window"] == window] for window in ("train", "test"))
    rules = rules_of(features, params)

    def columns(now: pd.DataFrame, then: pd.DataFrame, tested: pd.DataFrame) -> dict[str, Column]:
        made = {name: column(name, name in features.numeric, rules[name], now, then) for name in features.names}
        return made | {PREDICTION: column(PREDICTION, True, params.prediction, now, tested)}

    whole, samples = columns(batch, train, test), [_sample(frame, params) for frame in (batch, train, test)]
    share = params.alpha / len(features.names)  # Bonferroni: of all columns together, alpha
    findings = {name: _judge(whole[name], share, params) for name in features.names}
    prediction = _judge(whole[PREDICTION], params.alpha, params)
    _report(columns(*samples), findings | {PREDICTION: prediction}, out)
    found = {name: whole[name].rule.model_dump() | asdict(finding) for name, finding in findings.items()}
    for name, weight in weights_of(features, importance).items():
        found[name] |= {"weight": weight, "critical": weight >= params.critical_weight}
        found[name] |= {"missing": _missing(batch, name), "reference_missing": _missing(train, name)}
    empty = [name for name in found if _is_empty(found[name])]
    out_of_scale = [name for name in found if is_out_of_scale(whole[name], params.max_scale)]
    judged = params.prediction.model_dump() | asdict(prediction)
    return {
        "data": data_verdict(validate, empty, out_of_scale),
        "inputs": inputs_verdict(found, params.max_weighted_share),
        "predictions": predictions_verdict(judged, batch[PREDICTION], test[PREDICTION]),
        "sample": _sample_words(samples, [batch, train, test], params.seed),
    }


def _read(path: Path, **which: Any) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, **which)
    except pa.ArrowException as error:
        raise BallastError(f"{path} cannot be read: {error}. Run `score` again.") from None


def _worse(
    score: Path, scored: Verdict, features: Features, params: PerformanceParams, history: Iterable[Verdict]
) -> Verdict:
    """Is the model worse, by the labels that have come and by what may be expected of those that have not."""
    present = Window(scored["start"], scored["end"], scored["version"])
    logged = _read(score / "logged.parquet")
    test = _read(score / "reference.parquet", filters=[("window", "==", "test")])
    windows = by_window(logged)
    performance = performance_verdict(windows, present, test, scored["labels_until"], params)
    if performance["measured"]:
        judged_on = pd.concat([windows[window] for window in judged_windows(windows, present, params)])
        own = [test, *(rows for window, rows in windows.items() if window.version == present.version)]
        labelled, unseen = (rows[rows["label"].notna()] for rows in (judged_on, pd.concat(own)))
        performance["avoidable"] = avoidable_verdict(labelled, unseen, features, params)
    batch, judged = windows.get(present, logged.iloc[:0]), performance["windows"]
    estimate = estimate_verdict(batch, test, tracked(judged, history, present), params)
    return {"performance": performance, "estimate": estimate}


def _judge(one: Column, alpha: float, params: DriftParams) -> Finding:
    """The finding of a column; one in another unit is broken, and has not moved."""
    if is_out_of_scale(one, params.max_scale):
        return Finding(
            None,
            None,
            None,
            f"broken: mean size over {params.max_scale:g} times the largest before",
        )
    return compare(one, params.min_rows, lambda asked: threshold(asked, alpha, params.run_days, params.seed))


def _report(columns: dict[str, Column], findings: dict[str, Finding], out: Path) -> None:
    """Evidently's report of what was measured, with the thresholds that decided; of rare values a sample has none."""
    bounds = {name: found.threshold for name, found in findings.items() if found.threshold is not None}
    shown = [name for name in bounds if columns[name].batch.notna().any() and columns[name].reference.notna().any()]
    if shown:
        keep(report([columns[name] for name in shown], [bounds[name] for name in shown]), out)


def _without_champion(validate: Path) -> Verdict:
    unknown = ("method", "floor", "threshold", "score", "moved", "mean", "reference_mean")
    return {
        "data": data_verdict(validate, [], []),
        "inputs": inputs_verdict({}, 1.0) | {"words": "no champion yet: nothing to compare with"},
        "predictions": dict.fromkeys(unknown) | {"words": ""},
        "performance": {"measured": False, "labelled_rows": 0, "words": "", "windows": []},
        "estimate": {"measured": False, "rows": 0, "tracked": [], "bias": None, "words": ""},
        "sample": "",
    }


def _sample(frame: pd.DataFrame, params: DriftParams) -> pd.DataFrame:
    if len(frame) <= params.max_rows:
        return frame
    return frame.sample(params.max_rows, random_state=params.seed).sort_index()


def _sample_words(samples: list[pd.DataFrame], whole: list[pd.DataFrame], seed: int) -> str:
    """What Evidently's report was made from, for the page: the distances that decide come from all rows."""
    names = ("the batch", "the train window", "the test window")
    parts = [f"{len(some):,} of {len(all_):,} rows of {n}" for n, some, all_ in zip(names, samples, whole, strict=True)]
    return f"{parts[0]}, {parts[1]} and {parts[2]}, drawn with seed {seed}"


def _missing(frame: pd.DataFrame, name: str) -> float | None:
    """The share of rows without a value."""
    if frame.empty:
        return None
    return float(frame[name].isna().mean()) if name in frame else 1.0


def _inputs_words(moved: list[str], weighted: float, critical: list[str]) -> str:
    """``inputs MOVED (visib, dewp), 23% by importance, visib critical``."""
    if not moved:
        return "inputs not moved"
    return f"inputs MOVED ({_named(moved)}), {weighted:.0%} by importance" + (
        f", {_named(critical)} critical" if critical else ""
    )


def _is_empty(found: Verdict) -> bool:
    return bool(found["moved"]) and found["score"] is None


def _excess(found: Verdict) -> float:
    """The score in units of its threshold; an empty column is beyond all others."""
    return math.inf if found["score"] is None else float(found["score"] / found["threshold"])


def _named(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED_COLUMNS
    return ", ".join(names[:NAMED_COLUMNS]) + (f" and {more} more" if more > 0 else "")


def _number(value: Any) -> float | None:
    """A float that JSON can hold, else None."""
    number = float(value)
    return number if math.isfinite(number) else None


def _history(state: State) -> list[Verdict]:
    """The windows that the monitor has seen: whose they were, and what was estimated of them then."""
    return [asdict(window) | window.numbers for window in state.windows()]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipelines.drift")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--score", type=Path, default=Path("data/score"))
    parser.add_argument("--validate", type=Path, default=Path("data/validate/verdict.json"))
    parser.add_argument("--out", type=Path, default=Path("data/drift"))
    return parser.parse_args()


def main() -> None:
    """Judge the scored batch."""
    options = _options()
    params = load(options.params, "drift", DriftParams)
    judging = load(options.params, "performance", PerformanceParams)
    found = drift(options.score, options.validate, options.out, params, judging, _history(State()))
    # The columns stay in verdict.json: what Airflow passes on is the answers.
    answers = {name: found[name]["words"] for name in PARTS}
    named = {name: found[name] for name in ("version", "start", "end", "summary")}
    stage.finish("drift", options.out, {**named, "answers": answers})


if __name__ == "__main__":
    exit_with(main)
