"""Four questions about a scored batch: is the data broken, have inputs moved, predictions moved, is the model worse?

Inputs are compared with the rows that the champion was trained on, predictions with those on its test window.
Whether the model is worse is no matter of distributions: it is the realised log loss of the labelled rows against
the test window's, with a standard error by day.
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from pipelines import metrics, stage
from pipelines.comparison import Rule, column, compare, keep
from pipelines.errors import ParamsError, exit_with
from pipelines.files import read_json, write_json
from pipelines.params import Params, load
from pipelines.schema import Features

log = logging.getLogger(__name__)

Verdict = dict[str, Any]

PREDICTION = "probability"
CALIBRATION_BINS = 10
NAMED_COLUMNS = 4


class DriftParams(Params):
    """The ``drift`` section of params.yaml."""

    max_rows: int = Field(ge=1)
    seed: int
    min_rows: int = Field(ge=1)
    standard_errors: float = Field(ge=0)
    numeric: Rule
    categorical: Rule
    columns: dict[str, Rule]
    prediction: Rule


def drift(score: Path, validate: Path, out: Path, params: DriftParams) -> Verdict:
    """Compare the batch in ``score`` with the champion's windows; write verdict.json, report.html and report.json.

    ``validate`` is the verdict of validate, which need not exist. Nothing to compare with is a finding, no error.
    """
    scored = read_json(score / "result.json")
    for name in ("verdict.json", "report.html", "report.json", "result.json"):
        (out / name).unlink(missing_ok=True)
    verdict: Verdict = {name: scored[name] for name in ("version", "start", "end", "rows", "labelled_rows")}
    if scored["version"] is None:
        verdict |= _without_champion(validate)
    else:
        verdict |= _compare(score, Features.model_validate(scored["features"]), validate, out, params)
    write_json(out / "verdict.json", verdict)
    parts = [verdict[part]["words"] for part in ("data", "inputs", "predictions", "performance")]
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


def performance_verdict(batch: pd.DataFrame, reference: pd.DataFrame, params: DriftParams) -> Verdict:
    """Is the model worse: its log loss on the batch's labelled rows against that on its own test window.

    ``worse`` is null where a side has one day only: the days are what the standard error is taken from.
    """
    batch, reference = batch[batch["label"].notna()], reference[reference["label"].notna()]
    if batch.empty or reference.empty:
        side = "batch" if batch.empty else "reference"
        return {"measured": False, "labelled_rows": len(batch), "words": f"model not judged: no labels in the {side}"}
    now, then = _metrics(batch), _metrics(reference)
    rise = now["log_loss"] - then["log_loss"]
    error = _standard_error(batch, reference, params.seed)
    worse = None if error is None else rise > params.standard_errors * error
    return {
        "measured": True,
        "labelled_rows": len(batch),
        "log_loss": now["log_loss"],
        "reference_log_loss": then["log_loss"],
        "rise": rise,
        "standard_error": error,
        "standard_errors": params.standard_errors,
        "worse": worse,
        "auc": _number(now["roc_auc"]),
        "reference_auc": _number(then["roc_auc"]),
        "label_rate": now["label_rate"],
        "reference_label_rate": then["label_rate"],
        "calibration": {"batch": _calibration(batch), "reference": _calibration(reference)},
        "words": f"{_judgement(rise, error, worse)}: log loss {now['log_loss']:.3f}, was {then['log_loss']:.3f}",
    }


def _judgement(rise: float, error: float | None, worse: bool | None) -> str:
    """A rise of one standard error is noise; one that is more, and yet not enough to be sure, is called that."""
    if error is None:
        return "model not judged"
    if worse:
        return "model WORSE"
    return "model not certainly worse" if rise > error else "model not worse"


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
        "performance": performance_verdict(batch, test, params),
        "sample": _sample_words(samples, [batch, train, test], params.seed),
    }


def _without_champion(validate: Path) -> Verdict:
    nothing = {"method": None, "threshold": None, "score": None, "moved": None, "mean": None, "reference_mean": None}
    return {
        "data": data_verdict(validate, []),
        "inputs": inputs_verdict({}) | {"words": "no champion yet: nothing to compare with"},
        "predictions": nothing | {"words": ""},
        "performance": {"measured": False, "labelled_rows": 0, "words": ""},
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


def _metrics(frame: pd.DataFrame) -> dict[str, float]:
    return metrics.binary(frame["label"].astype(float), frame[PREDICTION], threshold=0.5, bins=CALIBRATION_BINS)


def _calibration(frame: pd.DataFrame) -> list[dict[str, float]]:
    curve = metrics.calibration_curve(frame["label"].astype(float), frame[PREDICTION], CALIBRATION_BINS)
    return [{str(name): float(value) for name, value in point.items()} for point in curve.to_dict("records")]


def _standard_error(batch: pd.DataFrame, reference: pd.DataFrame, seed: int) -> float | None:
    """Of the rise in log loss, by a bootstrap over the days of both sides; None where a side has a single day."""
    draws = []
    for offset, frame in enumerate((batch, reference)):
        days = frame["time"].dt.floor("D")
        if days.nunique() < 2:
            return None
        losses = metrics.log_loss_rows(frame["label"].astype(float), frame[PREDICTION])
        draws.append(metrics.bootstrap_by_day(losses, days.to_numpy(), seed + offset))
    return float(np.std(draws[0] - draws[1]))


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
    found = drift(options.score, options.validate, options.out, params)
    # The columns stay in verdict.json: what Airflow passes on is the answers.
    answers = {name: found[name]["words"] for name in ("data", "inputs", "predictions", "performance")}
    named = {name: found[name] for name in ("version", "start", "end", "summary")}
    stage.finish("drift", options.out, {**named, "answers": answers})


if __name__ == "__main__":
    exit_with(main)
