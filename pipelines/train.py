"""Train: the candidates learn from the train window; the better on the validation window is the challenger."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F  # noqa: N812  its name everywhere
from pydantic import Field
from threadpoolctl import threadpool_limits
from torch import Tensor

from pipelines import baseline, metrics, model, network, rows
from pipelines.baseline import HgbParams
from pipelines.errors import BallastError, DataRejected, exit_with
from pipelines.files import read_json, whole_file
from pipelines.model import Kind, Matrix, Probabilities, Transform
from pipelines.network import CHUNK, Network, NetworkConfig, Probability
from pipelines.params import Params, load
from pipelines.schema import Features
from pipelines.stage import finish, options

Log = Callable[[int, Mapping[str, float]], None]
"""Called with a step and its metrics as training goes."""

PARITY = 1e-6  # no probability may move by more when the model is written and read again


class TabmParams(Params):
    """Section `train.tabm`: the network's shape, and how it is trained."""

    ensemble: int = Field(ge=1)
    blocks: int = Field(ge=1)
    width: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)
    embedding: int = Field(ge=1)
    epochs: int = Field(ge=1)
    patience: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)


class TrainParams(Params):
    """Section `train`."""

    seed: int
    threads: int = Field(ge=1)
    device: Literal["auto", "cpu", "cuda"]
    candidates: list[Kind] = Field(min_length=1)
    tabm: TabmParams
    hgb: HgbParams


@dataclass(frozen=True)
class Window:
    """A window as a candidate takes it: the input matrix, (rows, columns), and the label, (rows,)."""

    matrix: Matrix
    label: Matrix


@dataclass(frozen=True)
class Candidate:
    """A trained candidate: what it says of the validation window, how it got there, and how to write it."""

    kind: Kind
    length: dict[str, int]
    history: list[dict[str, float]]
    validation: Probabilities
    dumps: Callable[[], bytes]


def train(
    data: Path, sql: Path, out: Path, params: TrainParams, log: Log = lambda step, values: None
) -> dict[str, Any]:
    """Train the candidates on what prepare wrote to ``data``; write the better one as ``out/model``, and history.csv.

    Equal data, settings, thread count and kind of processor give equal bytes. Returns the stage's result.
    """
    schema = read_json(data / "schema.json")
    features = Features.model_validate(schema["features"])
    frames = {name: rows.read(data / f"{name}.parquet") for name in ("train", "validation")}
    _reject_infinite(frames, features)
    transform = Transform.fit(frames["train"], features)
    for name, reason in transform.dropped.items():
        print(f"{name} is left out: {reason} in the train window", flush=True)
    windows = {name: _window(frame, transform) for name, frame in frames.items()}
    with reproducible(params.seed, params.threads):
        candidates = [FIT[kind](**windows, transform=transform, params=params, log=log) for kind in params.candidates]
    scores = {candidate.kind: _score(candidate, windows["validation"]) for candidate in candidates}
    for kind, score in scores.items():
        log(0, {f"{kind}/{name}": value for name, value in score.items()})
    challenger = min(candidates, key=lambda candidate: scores[candidate.kind]["log_loss"])
    model.save(out / "model", challenger.kind, challenger.dumps(), transform, schema, sql.read_bytes())
    _write_history(out / "history.csv", candidates)
    return {
        "summary": _summary(challenger.kind, scores),
        "challenger": challenger.kind,
        "digest": _check_parity(out / "model", frames["validation"], challenger.validation),
        "candidates": scores,
        "dropped": transform.dropped,
    }


def _window(frame: pd.DataFrame, transform: Transform) -> Window:
    return Window(transform.encode(frame), frame["label"].to_numpy(np.float32))


def _reject_infinite(frames: Mapping[str, pd.DataFrame], features: Features) -> None:
    for window, frame in frames.items():
        for name in features.numeric:
            if infinite := int(np.isinf(frame[name]).sum()):
                raise DataRejected(f"`{name}` is infinite in {infinite} {window} rows. Guard it in prepare.sql.")


@contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Within, equal computations give equal bits: a seed, a number of threads, deterministic algorithms."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
    before = torch.get_num_threads()
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):  # scikit-learn's threads
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)


# --- TabM -------------------------------------------------------------------------------------------------------------


def fit_tabm(train: Window, validation: Window, transform: Transform, params: TrainParams, log: Log) -> Candidate:
    """Train the network until its log loss on the validation window has not fallen for ``patience`` epochs."""
    settings = params.tabm
    device = _device(params.device)

    # The whole table lives on the device, and a batch is an index into it: Python touches no row.
    x = torch.from_numpy(train.matrix).to(device)
    y = torch.from_numpy(train.label).to(device)
    x_validation = torch.from_numpy(validation.matrix).to(device)
    shuffle = torch.Generator(device).manual_seed(params.seed)

    net = Network(_config(train, transform, settings)).to(device)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )

    best, best_epoch, best_state = math.inf, 0, net.state_dict()
    history = []
    with _progress("tabm", settings.epochs, f"{len(x):,} rows on {device.type}") as show:
        for epoch in range(1, settings.epochs + 1):
            began = time.monotonic()
            net.train()
            order = torch.randperm(len(x), generator=shuffle, device=device)
            batches = torch.split(order, settings.batch_size)
            losses = torch.empty(len(batches), device=device)
            for step, batch in enumerate(batches):
                logits = net(x[batch])
                # Each member of the ensemble learns by itself: the mean of their losses, not the loss of their mean.
                loss = F.binary_cross_entropy_with_logits(logits, y[batch, None].expand_as(logits))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses[step] = loss.detach()  # reading it here would wait for the device at every step
            _check_losses(losses, epoch, batches, x, transform)
            rate = len(x) / (time.monotonic() - began)

            log_loss = _log_loss(validation, _predict(net, x_validation))
            history.append({"epoch": epoch, "train_log_loss": losses.mean().item(), "validation_log_loss": log_loss})
            log(epoch, {**_named("tabm", history[-1]), "tabm/rows_per_s": rate})
            show(epoch, f"log loss {log_loss:.3f} · {rate / 1000:,.0f}k rows/s")

            if log_loss < best:
                best, best_epoch = log_loss, epoch
                best_state = {name: value.clone() for name, value in net.state_dict().items()}
            elif epoch - best_epoch >= settings.patience:
                break

    net.load_state_dict(best_state)
    net.cpu()
    return Candidate(
        kind="tabm",
        length={"epochs": best_epoch},
        history=history,
        validation=_predict(net, x_validation.cpu()),
        dumps=lambda: network.dumps(net),
    )


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise BallastError("`train.device` is cuda, but torch finds no CUDA device here. Set it to auto or cpu.")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def _config(train: Window, transform: Transform, settings: TabmParams) -> NetworkConfig:
    numeric = train.matrix[:, : len(transform.numeric)]
    return NetworkConfig(
        numeric=len(transform.numeric),
        # Only those that training saw missing: other indicators would keep the weights they began with.
        missing=tuple(np.flatnonzero(np.isnan(numeric).any(axis=0)).tolist()),
        categories=tuple(len(column.vocabulary) + 1 for column in transform.categorical),
        ensemble=settings.ensemble,
        blocks=settings.blocks,
        width=settings.width,
        dropout=settings.dropout,
        embedding=settings.embedding,
    )


@torch.inference_mode()
def _predict(net: Network, x: Tensor) -> Probabilities:
    ensemble = Probability(net).eval()
    return torch.cat([ensemble(chunk) for chunk in torch.split(x, CHUNK)]).cpu().numpy().astype(np.float64)


def _check_losses(losses: Tensor, epoch: int, batches: tuple[Tensor, ...], x: Tensor, transform: Transform) -> None:
    """Raise BallastError for the first batch whose loss is no number, with the column that is furthest out in it."""
    wrong = (~losses.isfinite()).nonzero()
    if not len(wrong):
        return
    step = int(wrong[0])
    largest = x[batches[step], : len(transform.numeric)].nan_to_num(0.0).abs().amax(dim=0).tolist()
    furthest = sorted(zip(largest, transform.features.numeric, strict=True), reverse=True)[:3]
    where = ", ".join(f"{name} {value:.3g}" for value, name in furthest) or "no numeric column"
    raise BallastError(
        f"The loss is not finite in epoch {epoch}, batch {step + 1} of {len(batches)}. Furthest from its mean there, "
        f"in standard deviations: {where}. Clip such values in prepare.sql, or lower `train.tabm.learning_rate`."
    )


# --- HistGradientBoosting ---------------------------------------------------------------------------------------------


def fit_hgb(train: Window, validation: Window, transform: Transform, params: TrainParams, log: Log) -> Candidate:
    """Fit the baseline to the same matrix; its history has every tenth iteration."""
    categories = {
        place: len(column.vocabulary) + 1
        for place, column in enumerate(transform.categorical, start=len(transform.numeric))
    }
    with _progress("hgb", params.hgb.iterations, f"{len(train.label):,} rows on cpu") as show:
        classifier = baseline.fit(
            (train.matrix, train.label), (validation.matrix, validation.label), categories, params.hgb, params.seed
        )
        probability = classifier.predict_proba(validation.matrix)[:, 1]
        show(classifier.n_iter_, f"log loss {_log_loss(validation, probability):.3f}")
    history = [
        {
            "epoch": iteration,
            "train_log_loss": -classifier.train_score_[iteration],
            "validation_log_loss": -classifier.validation_score_[iteration],
        }
        for iteration in sorted({*range(10, classifier.n_iter_, 10), classifier.n_iter_})
    ]
    for point in history:
        log(int(point["epoch"]), _named("hgb", point))
    return Candidate(
        kind="hgb",
        length={"iterations": classifier.n_iter_},
        history=history,
        validation=probability,
        dumps=lambda: baseline.dumps(classifier),
    )


FIT: dict[Kind, Callable[..., Candidate]] = {
    "tabm": fit_tabm,
    "hgb": fit_hgb,
}


# --- what is said and written -----------------------------------------------------------------------------------------


def _log_loss(window: Window, probability: Probabilities) -> float:
    return float(metrics.log_loss_rows(window.label, probability).mean())


def _named(kind: Kind, point: Mapping[str, float]) -> dict[str, float]:
    """A point of the history as MLflow's metrics: ``tabm/validation_log_loss``."""
    return {f"{kind}/{name}": value for name, value in point.items() if name != "epoch"}


@contextmanager
def _progress(kind: Kind, total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    """Yield a function of an epoch and what to say of it: a bar at a terminal, a line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console()
    unit = "epoch" if kind == "tabm" else "iteration"
    if not console.is_terminal:
        print(f"{kind:<5} {what}", flush=True)
        yield lambda epoch, text: print(f"{kind:<5} {unit} {epoch}/{total} · {text}", flush=True)
        return
    columns = TextColumn(f"{kind:<5}"), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda epoch, text: progress.update(
            task, completed=epoch, description=f"{unit} {epoch}/{total} · {text} · {what}"
        )


def _score(candidate: Candidate, validation: Window) -> dict[str, float]:
    scores = metrics.binary(validation.label, candidate.validation, threshold=0.5, bins=10)
    return {
        "log_loss": scores["log_loss"],
        "auc": scores["roc_auc"],
        "brier": scores["brier"],
        **candidate.length,
    }


def _summary(challenger: Kind, scores: Mapping[Kind, Mapping[str, float]]) -> str:
    losses = " · ".join(f"{kind} {score['log_loss']:.4f}" for kind, score in scores.items())
    return f"validation log loss {losses} · challenger is {challenger}"


def _write_history(path: Path, candidates: list[Candidate]) -> None:
    history = pd.concat([pd.DataFrame(candidate.history).assign(candidate=candidate.kind) for candidate in candidates])
    history.insert(0, "candidate", history.pop("candidate"))
    with whole_file(path) as part:
        history.to_csv(part, index=False)


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
    from pipelines import registry

    arguments = options("train", "data", "sql", "out")
    params = load(arguments.params, "train", TrainParams)
    with registry.training_run(registry.EXPERIMENT, params.model_dump()) as run:
        result = train(arguments.data, arguments.sql, arguments.out, params, run.log)
        run.trained(result["digest"])
    finish("train", arguments.out, result)


if __name__ == "__main__":
    exit_with(main)
