"""Register: one version in the MLflow registry, tied to the code, the data and the run that made it."""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines import card, champion, provenance, registry, stage, tracking
from pipelines.errors import BallastError, exit_with
from pipelines.files import read_json
from pipelines.state import State


def register(train: Path, evaluate: Path, prepare: Path, settings: Path) -> dict[str, Any]:
    """Complete the training run in MLflow and register the model; the same model of the same data only once."""
    from pipelines.model import Transform, _verified

    folder = train / "model"
    files, digest = _verified(folder)  # not loaded: torch would take longer than all the rest
    schema = json.loads(files["schema.json"])
    features = Transform.from_json(json.loads(files["transform.json"])).features
    if (measured := read_json(evaluate / "result.json")["digest"]) != digest:
        raise BallastError(
            f"{evaluate} measured model {measured[:12]}, and {folder} is {digest[:12]}. Run evaluate again."
        )
    champion.refuse_strangers(state := State())
    trained = read_json(train / "result.json")
    run_id = tracking.complete_run(tracking.EXPERIMENT, digest, _evidence(trained, train, evaluate, prepare, settings))
    tags = {**_origin(schema), **_refit(trained)}
    version, created = registry.register(folder, features, digest, provenance.data_lock(), run_id, tags)
    card.keep(version.number, state)
    name = registry.name()
    return {
        "summary": f"{name} v{version.number}" + ("" if created else " · known: the same model of the same data"),
        "model": name,
        "version": version.number,
        "digest": version.digest,
        "created": created,
        "run_id": version.run_id,
    }


def _evidence(
    trained: Mapping[str, Any], train: Path, evaluate: Path, prepare: Path, settings: Path
) -> tracking.Evidence:
    candidates = trained["candidates"]
    metrics = {f"{name}/{key}": value for name, found in candidates.items() for key, value in found.items()}
    metrics |= {f"test_{key}": value for key, value in read_json(evaluate / "metrics.json").items()}
    return tracking.Evidence(
        params=yaml.safe_load(settings.read_text(encoding="utf-8"))["train"],
        history=_history(train / "history.csv"),
        metrics={key: value for key, value in metrics.items() if isinstance(value, int | float)},
        tags=_refit(trained),
        inputs={window: prepare / f"{window}.parquet" for window in ("train", "validation", "test")},
        files=[
            (train / "history.csv", "train"),
            (train / "importance.csv", "train"),
            (evaluate, "evaluate"),
            (prepare / "schema.json", "prepare"),
            (prepare.parent / "validate" / "verdict.json", "validate"),
            (settings, ""),
            (Path("dvc.lock"), ""),
            *_records(settings, prepare.parent),
            (card.WORDS, card.FOLDER),
        ],
    )


def _records(settings: Path, data: Path) -> list[tuple[Path, str]]:
    """What is kept for each dvc.lock apart: two versions of the same model may share a run."""
    if not (lock := provenance.data_lock()):
        return []
    files = {
        Path("dvc.lock"): "",
        settings: "",
        data / "land" / "manifest.json": "/land",
        data / "validate" / "verdict.json": "/validate",
    }
    return [(file, registry.records(lock) + folder) for file, folder in files.items()]


def _history(file: Path) -> dict[int, dict[str, float]]:
    """The metrics by epoch, named as ``train`` logs them live."""
    history: dict[int, dict[str, float]] = defaultdict(dict)
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            candidate, epoch = row.pop("candidate"), int(row.pop("epoch"))
            history[epoch] |= {f"{candidate}/{name}": float(value) for name, value in row.items() if value}
    return history


def _refit(trained: Mapping[str, Any]) -> dict[str, str]:
    """The mark of a model that learned from the validation window too, after that had chosen it."""
    return {"ballast.refit": "true"} if trained.get("refit") else {}


def _origin(schema: Mapping[str, Any]) -> dict[str, str]:
    """What ties the version to its origin. Set with the version itself, so that none is without."""
    windows, origin = schema["windows"], provenance.trigger()
    return {
        "ballast.kind": schema["kind"],
        "ballast.as_of": schema["as_of"],
        "ballast.train_start": windows["train"]["start"],
        "ballast.train_end": windows["train"]["end"],
        "ballast.windows": json.dumps(windows),
        "ballast.commit": provenance.commit(),
        "ballast.actor": provenance.actor(),
        "ballast.trigger": json.dumps(origin),
    }


def main() -> None:
    """Run the step in the root of a workspace."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.register")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--train", type=Path, default=Path("data/train"))
    parser.add_argument("--evaluate", type=Path, default=Path("data/evaluate"))
    parser.add_argument("--prepare", type=Path, default=Path("data/prepare"))
    parser.add_argument("--out", type=Path, default=Path("data/register"))
    options = parser.parse_args()
    stage.finish("register", options.out, register(options.train, options.evaluate, options.prepare, options.params))


if __name__ == "__main__":
    exit_with(main)
