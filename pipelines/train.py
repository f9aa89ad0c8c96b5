"""Train: the candidates learn from the train window; the best on the validation window is the challenger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines import metrics, model, rows
from pipelines.checkpoint import Checkpoint, Checkpoints
from pipelines.errors import BallastError, DataRejected, exit_with
from pipelines.files import read_json, whole_file
from pipelines.fit import Candidate, Log, TrainParams, Window, fit, log_loss, reproducible
from pipelines.model import Kind, Matrix, Probabilities, Transform, tempered
from pipelines.params import load
from pipelines.schema import Features
from pipelines.stage import finish, options

PARITY = 1e-6  # no probability may move by more when the model is written and read again
IMPORTANCE_ROWS, IMPORTANCE_REPEATS = 4000, 3


@dataclass(frozen=True)
class Validated:
    """A candidate, and what it is worth on the validation window with its temperature."""

    candidate: Candidate
    temperature: float
    scores: dict[str, float]


def train(
    data: Path,
    sql: Path,
    out: Path,
    params: TrainParams,
    log: Log = lambda step, values: None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Any]:
    """Train the candidates on what prepare wrote to ``data``; write the best as ``out/model``, and how it came about.

    Equal data, settings, thread count and kind of processor give equal bytes, also where the training was ended and
    went on from its ``checkpoints``. Returns the stage's result.
    """
    schema = read_json(data / "schema.json")
    features = Features.model_validate(schema["features"])
    frames = {name: rows.read(data / f"{name}.parquet") for name in ("train", "validation")}
    for name, frame in frames.items():
        _reject_unusable(name, frame, features)
    transform = Transform.fit(frames["train"], features)
    for name, reason in transform.dropped.items():
        print(f"{name} is left out: {reason} in the train window", flush=True)
    seen, unseen = (Window.of(frame, transform) for frame in frames.values())

    def checkpoint(name: str) -> Checkpoint:
        return checkpoints.of(name) if checkpoints else Checkpoint()

    def fitted(kind: Kind) -> Validated:
        candidate = fit(kind, seen, unseen, transform, params, log, checkpoint(kind))
        return _validated(candidate, unseen, params.temperature)

    def refitted(chosen: Candidate) -> Candidate:
        [length] = chosen.length.values()
        both = _together(seen, unseen)
        return fit(chosen.kind, both, None, transform, params, checkpoint=checkpoint("refit"), length=length)

    with reproducible(params.seed, params.threads):
        found = [fitted(kind) for kind in params.candidates]
        best = min(found, key=lambda one: one.scores["log_loss"])
        importance = _importance(best, unseen, transform, params.seed)
        challenger = refitted(best.candidate) if params.refit else best.candidate

    scores = {one.candidate.kind: one.scores for one in found}
    for kind, values in scores.items():
        log(0, {f"{kind}/{name}": value for name, value in values.items()})
    found_out = {
        "temperature": best.temperature,
        "refit": params.refit,
        "importance": importance["importance"].to_dict(),
    }
    model.save(out / "model", challenger.kind, challenger.dumps(), transform, {**schema, **found_out}, sql.read_bytes())
    _write_csv(out / "importance.csv", importance.reset_index())
    _write_csv(out / "history.csv", _history([one.candidate for one in found]))
    expected = tempered(challenger.predict(unseen.matrix), best.temperature)
    return {
        "summary": _summary(challenger.kind, scores, params.refit),
        "challenger": challenger.kind,
        "digest": _check_parity(out / "model", frames["validation"], expected),
        "candidates": scores,
        "refit": params.refit,
        "dropped": transform.dropped,
    }


def _reject_unusable(window: str, frame: pd.DataFrame, features: Features) -> None:
    """Raise DataRejected for what no candidate can learn from; prepare lets none of it through but infinities."""
    if frame["label"].nunique() < 2:
        found = f"only label {frame['label'].iloc[0]}" if len(frame) else "no rows"
        raise DataRejected(
            f"The {window} window needs rows of both classes (found {found}). See the windows in `prepare`."
        )
    for name in features.numeric:
        if infinite := int((frame[name].abs() > np.finfo(np.float32).max).sum()):
            raise DataRejected(f"`{name}` is infinite in {infinite} {window} rows. Guard it in prepare.sql.")


def _validated(candidate: Candidate, validation: Window, scaling: bool) -> Validated:
    """Set the temperature that the validation window asks for, and measure the candidate there."""
    raw = candidate.predict(validation.matrix)
    temperature = fit_temperature(validation, raw) if scaling else 1.0
    probability = tempered(raw, temperature)
    scores = metrics.binary(validation.label, probability, threshold=0.5, bins=10)
    return Validated(
        candidate,
        temperature,
        {
            "log_loss": scores["log_loss"],
            "auc": scores["roc_auc"],
            "brier": scores["brier"],
            "temperature": temperature,
            **candidate.length,
        },
    )


def fit_temperature(window: Window, probability: Probabilities) -> float:
    """The temperature with the least log loss on a window, between 1/5 and 5 (see ``model.tempered``)."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_temperature: log_loss(window, tempered(probability, float(np.exp(log_temperature)))),
        bounds=(-np.log(5), np.log(5)),
        method="bounded",
    )
    return round(float(np.exp(found.x)), 4)


def _importance(best: Validated, window: Window, transform: Transform, seed: int) -> pd.DataFrame:
    """How much the log loss on the window rises when a column's values change places between the rows.

    Permutation importance (Breiman, 2001), on at most ``IMPORTANCE_ROWS`` rows at even distances, as the mean and the
    standard deviation over ``IMPORTANCE_REPEATS`` permutations; the most important feature first.
    """
    places = np.linspace(0, len(window.label) - 1, min(IMPORTANCE_ROWS, len(window.label))).astype(int)
    some = Window(window.matrix[places], window.label[places])
    random = np.random.default_rng(seed)

    def loss(matrix: Matrix) -> float:
        return log_loss(some, tempered(best.candidate.predict(matrix), best.temperature))

    as_it_is = loss(some.matrix)
    rises: dict[str, list[float]] = {}
    for column, name in enumerate(transform.features.names):
        shuffled = some.matrix.copy()
        rises[name] = []
        for _ in range(IMPORTANCE_REPEATS):
            shuffled[:, column] = random.permutation(some.matrix[:, column])
            rises[name].append(loss(shuffled) - as_it_is)
    table = pd.DataFrame(
        {
            "importance": {name: np.mean(rise) for name, rise in rises.items()},
            "std": {n: np.std(r) for n, r in rises.items()},
        }
    )
    return table.rename_axis("feature").round(6).sort_values("importance", ascending=False, kind="stable")


def _together(*windows: Window) -> Window:
    return Window(np.concatenate([w.matrix for w in windows]), np.concatenate([w.label for w in windows]))


def _history(candidates: list[Candidate]) -> pd.DataFrame:
    history = pd.concat([pd.DataFrame(candidate.history).assign(candidate=candidate.kind) for candidate in candidates])
    history.insert(0, "candidate", history.pop("candidate"))
    return history


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    with whole_file(path) as part:
        table.to_csv(part, index=False, lineterminator="\n")


def _summary(challenger: Kind, scores: Mapping[Kind, Mapping[str, float]], refit: bool) -> str:
    losses = " · ".join(f"{kind} {score['log_loss']:.4f}" for kind, score in scores.items())
    again = ", refitted" if refit else ""
    return f"validation log loss {losses} · challenger is {challenger}{again}"


def _check_parity(folder: Path, frame: pd.DataFrame, expected: Probabilities) -> str:
    """Read the model again, and let it predict from raw rows; return its digest."""
    written = model.load(folder)
    apart = float(np.abs(written.predict(frame) - expected).max())
    if apart > PARITY:
        raise BallastError(
            f"The written model does not predict what the trained one did (they differ by {apart:.1g}, "
            f"and {PARITY:.0g} is allowed). See `dumps` and `loads` of its kind."
        )
    return written.digest


def main() -> None:
    """Run the stage as dvc.yaml's command does, with the MLflow run that the environment names."""
    from pipelines import tracking

    arguments = options("train", "data", "sql", "out")
    params = load(arguments.params, "train", TrainParams)
    inputs = {name: arguments.data / f"{name}.parquet" for name in ("train", "validation")}
    code = [*sorted(Path(__file__).parent.glob("*.py")), *Path().glob("uv.lock")]
    data = [*inputs.values(), arguments.data / "schema.json", arguments.sql]
    checkpoints = Checkpoints([*data, *code], params.model_dump())
    with tracking.training_run(
        tracking.EXPERIMENT, params.model_dump(), run_id=checkpoints.run_id, inputs=inputs
    ) as run:
        checkpoints.run_id = run.run_id
        result = train(arguments.data, arguments.sql, arguments.out, params, run.log, checkpoints)
        run.trained(result["digest"])
    finish("train", arguments.out, result)
    checkpoints.clear()


if __name__ == "__main__":
    exit_with(main)
