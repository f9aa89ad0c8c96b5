"""Four questions about a scored batch: is the data broken, have inputs moved, predictions moved, is the model worse?

Inputs are compared with the rows that the champion was trained on, predictions with those on its test window.
Whether the model is worse is no matter of distributions: performance.py judges it by the labels, estimate.py before
they have come.
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
from pydantic import Field

from pipelines import stage
from pipelines.comparison import Rule, column, compare, keep
from pipelines.errors import ParamsError, exit_with
from pipelines.estimate import estimate_verdict, tracked
from pipelines.files import read_json, write_json
from pipelines.params import Params, load
from pipelines.performance import PerformanceParams, Window, by_window, performance_verdict
from pipelines.schema import Features
from pipelines.state import State

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
        verdict |= _compare(score, Features.model_validate(scored["features"]), validate, out, params)
        verdict |= _judge(score, scored, judging, history)
    write_json(out / "verdict.json", verdict)
    judged = verdict["performance"].get("present")  # by its own labels: an estimate adds nothing
    parts = [verdict[part]["words"] for part in PARTS if part != "estimate" or not judged]
    return {**verdict, "summary": " · ".join(part for part in parts if part)}


def data_verdict(validate: Path, empty: list[str]) -> Verdict:
    """Is the batch broken: what validation found, and the columns that came without a single value."""
    found = read_json(validate) if validate.exists() else {}
    rejected = not found.get("passed", True)
    cause = "rejected by validation" if rejected else f"empty: {_named(empty)}" if empty else ""
    return {
        "broken": bool(cause),
        "rejected": rejected,
        "validated": bool(found),
        "expectations": found.get("expectations"),
        "warnings": len(found.get("warnings", [])),
        "quarantined": sum(found.get("quarantined", {}).values()),
        "empty": empty,
        "words": f"data BROKEN ({cause})" if cause else "",
    }


def inputs_verdict(columns: dict[str, Verdict]) -> Verdict:
    """Have the inputs moved: which columns, and their share of those that could be judged."""
    judged = [found for found in columns.values() if found["moved"] is not None]
    moved = sorted((name for name in columns if columns[name]["moved"]), key=lambda name: -_excess(columns[name]))
    words = f"inputs MOVED ({_named(moved)})" if moved else "inputs not moved" if judged else "inputs not measured"
    return {
        "moved": bool(moved) if judged else None,
        "columns": columns,
        "moved_columns": moved,
        "judged": len(judged),
        "share": len(moved) / len(judged) if judged else None,
        "words": words,
    }


def predictions_verdict(found: Verdict, batch: pd.Series, reference: pd.Series) -> Verdict:
    """Have the predictions moved: the distance, and the mean probability now and then."""
    words = {None: "predictions not measured", True: "predictions MOVED", False: "predictions not moved"}
    means = {"mean": _number(batch.mean()), "reference_mean": _number(reference.mean())}
    return {**found, **means, "words": words[found["moved"]]}


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


def _compare(score: Path, features: Features, validate: Path, out: Path, params: DriftParams) -> Verdict:
    """Read both sides, measure on samples of them, keep Evidently's report."""
    batch, reference = pd.read_parquet(score / "predictions.parquet"), pd.read_parquet(score / "reference.parquet")
    train, test = (reference[reference["window"] == window] for window in ("train", "test"))
    rules = rules_of(features, params)
    samples = [_sample(frame, params) for frame in (batch, train, test)]
    columns = [column(name, name in features.numeric, rules[name], *samples[:2]) for name in features.names]
    columns.append(column(PREDICTION, True, params.prediction, samples[0], samples[2]))
    findings, run = compare(columns, params.min_rows)
    if run is not None:
        keep(run, out)
    found: dict[str, Verdict] = {c.name: c.rule.model_dump() | asdict(findings[c.name]) for c in columns}
    prediction = found.pop(PREDICTION)
    for name, values in found.items():
        values |= {"missing": _missing(batch, name), "reference_missing": _missing(train, name)}
    return {
        "data": data_verdict(validate, [name for name in found if _is_empty(found[name])]),
        "inputs": inputs_verdict(found),
        "predictions": predictions_verdict(prediction, batch[PREDICTION], test[PREDICTION]),
        "sample": _sample_words(samples, [batch, train, test], params.seed),
    }


def _judge(score: Path, scored: Verdict, params: PerformanceParams, history: Iterable[Verdict]) -> Verdict:
    """Is the model worse, by the labels that have come and by what may be expected of those that have not."""
    present = Window(scored["start"], scored["end"], scored["version"])
    logged = pd.read_parquet(score / "logged.parquet")
    reference = pd.read_parquet(score / "reference.parquet", columns=["window", "time", "label", "probability"])
    test, windows = reference[reference["window"] == "test"], by_window(logged)
    performance = performance_verdict(windows, present, test, scored["labels_until"], params)
    batch, judged = windows.get(present, logged.iloc[:0]), performance["windows"]
    estimate = estimate_verdict(batch, test, tracked(judged, history, present), params)
    return {"performance": performance, "estimate": estimate}


def _without_champion(validate: Path) -> Verdict:
    nothing = {"method": None, "threshold": None, "score": None, "moved": None, "mean": None, "reference_mean": None}
    return {
        "data": data_verdict(validate, []),
        "inputs": inputs_verdict({}) | {"words": "no champion yet: nothing to compare with"},
        "predictions": nothing | {"words": ""},
        "performance": {"measured": False, "labelled_rows": 0, "words": "", "windows": []},
        "estimate": {"measured": False, "rows": 0, "tracked": [], "bias": None, "words": ""},
        "sample": "",
    }


def _sample(frame: pd.DataFrame, params: DriftParams) -> pd.DataFrame:
    if len(frame) <= params.max_rows:
        return frame
    return frame.sample(params.max_rows, random_state=params.seed).sort_index()


def _sample_words(samples: list[pd.DataFrame], whole: list[pd.DataFrame], seed: int) -> str:
    """What the distances were computed from, for the page."""
    names = ("the batch", "the train window", "the test window")
    parts = [f"{len(some):,} of {len(all_):,} rows of {n}" for n, some, all_ in zip(names, samples, whole, strict=True)]
    return f"{parts[0]}, {parts[1]} and {parts[2]}, drawn with seed {seed}"


def _missing(frame: pd.DataFrame, name: str) -> float | None:
    """The share of rows without a value."""
    if frame.empty:
        return None
    return float(frame[name].isna().mean()) if name in frame else 1.0


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
