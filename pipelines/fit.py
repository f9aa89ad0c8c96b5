"""Fit: how each kind of candidate learns from a window. The loop of the network reads from top to bottom."""

from __future__ import annotations

import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  its name everywhere
from pydantic import Field
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines import baseline, metrics, network
from pipelines.baseline import HgbParams, LogisticParams
from pipelines.checkpoint import Checkpoint
from pipelines.errors import BallastError
from pipelines.model import Kind, Matrix, Probabilities, Transform
from pipelines.network import CHUNK, Network, NetworkConfig, Probability
from pipelines.params import Params

if TYPE_CHECKING:
    import pandas as pd

Log = Callable[[int, Mapping[str, float]], None]
"""Called with a step and its metrics as training goes."""

WARM_UP = 0.05  # of the steps: the learning rate rises from nothing, then falls along a cosine


class TabmParams(Params):
    """Section `train.tabm`: the network's shape, and how it is trained."""

    ensemble: int = Field(ge=1)
    blocks: int = Field(ge=1)
    width: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)
    embedding: int = Field(ge=1)
    bins: int = Field(ge=1)
    epochs: int = Field(ge=1)
    patience: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    averaging: float = Field(ge=0, lt=1)


class TrainParams(Params):
    """Section `train`."""

    seed: int
    threads: int = Field(ge=1)
    device: Literal["auto", "cpu", "cuda"]
    compile: Literal["auto"] | bool
    candidates: list[Kind] = Field(min_length=1)
    temperature: bool
    refit: bool
    tabm: TabmParams
    hgb: HgbParams
    logistic: LogisticParams


@dataclass(frozen=True)
class Window:
    """A window as a candidate takes it: the input matrix, (rows, columns), and the label, (rows,)."""

    matrix: Matrix
    label: Matrix

    @classmethod
    def of(cls, frame: pd.DataFrame, transform: Transform) -> Window:
        """The window of prepared rows."""
        return cls(transform.encode(frame), frame["label"].to_numpy(np.float32))


@dataclass(frozen=True)
class Candidate:
    """A trained candidate: how long it learnt, how it got there, how it predicts, and how to write it."""

    kind: Kind
    length: dict[str, int]
    history: list[dict[str, float]]
    predict: Callable[[Matrix], Probabilities]
    dumps: Callable[[], bytes]


def fit(
    kind: Kind,
    train: Window,
    validation: Window | None,
    transform: Transform,
    params: TrainParams,
    log: Log = lambda step, values: None,
    checkpoint: Checkpoint | None = None,
    length: int | None = None,
) -> Candidate:
    """Fit a candidate to ``train``: for as long as ``validation`` gets better, or else for the given ``length``.

    What ``log`` raises ends the fit. Equal arguments under ``reproducible`` give equal candidates.
    """
    if kind == "tabm":
        return fit_tabm(train, validation, transform, params, log, checkpoint or Checkpoint(), length)
    if kind == "hgb":
        return fit_hgb(train, validation, transform, params, log, length)
    return fit_logistic(train, validation, transform, params, log)


@contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Within, equal computations give equal bits: a seed, a number of threads, deterministic algorithms."""
    before = torch.get_num_threads()
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads), _deterministic_gpu():  # scikit-learn's threads
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _deterministic_gpu() -> Iterator[None]:
    """On the CPU all that is used here is deterministic as it is, and asking for it imports torch's compiler."""
    if not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a kernel a tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# --- TabM -------------------------------------------------------------------------------------------------------------


@dataclass
class Standing:
    """How far the training of a network has come."""

    epoch: int = 1
    step: int = 0
    best: float = math.inf
    best_epoch: int = 0
    best_state: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def fit_tabm(
    train: Window,
    validation: Window | None,
    transform: Transform,
    params: TrainParams,
    log: Log,
    checkpoint: Checkpoint,
    length: int | None = None,
) -> Candidate:
    """Train the network until its log loss on the validation window has not fallen for ``patience`` epochs.

    Without a validation window: for ``length`` epochs, on the same schedule.
    """
    settings = params.tabm
    device = _device(params.device)
    torch.manual_seed(params.seed)

    # The whole table lives on the device, and a batch is an index into it: Python touches no row.
    x, y = torch.from_numpy(train.matrix).to(device), torch.from_numpy(train.label).to(device)
    x_validation = torch.from_numpy(validation.matrix).to(device) if validation else None

    # Every batch has the same size, for CUDA graphs; the few rows left over are drawn in another epoch.
    batch_size = min(settings.batch_size, len(x))
    steps = len(x) // batch_size
    last = min(length or settings.epochs, settings.epochs)

    net = Network(_config(train, transform, settings)).to(device)
    # what is judged and kept: the weights as they are, or their moving average
    average = _average(net, settings.averaging)
    judged: Network = average.module if average else net  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=settings.weight_decay, fused=True)
    loss_of = _compiled(_loss(net, device), params.compile, device)
    parts = 1  # that a batch is taken in, where the device cannot hold it whole

    at, losses = Standing(), torch.zeros(steps, device=device)
    if saved := checkpoint.load():
        at = _take_up(saved, net, average, optimizer, losses)

    what = f"{len(x):,} rows on {device.type}" + (f" · goes on at epoch {at.epoch}, step {at.step}" if saved else "")
    with _progress("tabm", last, what) as show, checkpoint.guarding() as asked_to_end:
        while at.epoch <= last and (validation is None or at.epoch - 1 - at.best_epoch < settings.patience):
            began, before = time.monotonic(), at.step
            net.train()
            batches = _order(len(x), params.seed, at.epoch, device)[: steps * batch_size].view(steps, batch_size)
            while at.step < steps:
                _set_learning_rate(optimizer, settings, (at.epoch - 1) * steps + at.step, settings.epochs * steps)
                optimizer.zero_grad()
                try:
                    losses[at.step] = _gradients(loss_of, x, y, batches[at.step], parts)
                    full = False
                except torch.OutOfMemoryError:
                    full = True
                if full:  # not within `except`, whose traceback keeps what filled the device
                    loss_of, parts = _loss(net, device), _more_parts(parts, batch_size)
                    continue
                optimizer.step()
                if average:
                    average.update_parameters(net)
                at.step += 1
                if checkpoint.due():
                    _check_losses(losses[: at.step], at.epoch, batches, x, transform)
                    checkpoint.save(_standing(at, net, average, optimizer, losses))
                if asked_to_end():
                    break
            if asked_to_end():
                break
            _check_losses(losses, at.epoch, batches, x, transform)
            _check_weights(judged, at.epoch)
            rate = (steps - before) * batch_size / (time.monotonic() - began)

            point = {"epoch": at.epoch, "train_log_loss": losses.mean().item()}
            if validation and x_validation is not None:
                point["validation_log_loss"] = log_loss(validation, _predict(judged, x_validation))
                if point["validation_log_loss"] < at.best:
                    at.best, at.best_epoch = point["validation_log_loss"], at.epoch
                    at.best_state = {name: value.clone() for name, value in judged.state_dict().items()}
            at.history.append(point)
            log(at.epoch, {**named("tabm", point), "tabm/rows_per_s": rate})
            show(at.epoch, f"{_loss_words(point)} · {rate / 1000:,.0f}k rows/s")
            at.epoch, at.step = at.epoch + 1, 0
        checkpoint.save(_standing(at, net, average, optimizer, losses))  # what comes after it may be ended as well
        if number := asked_to_end():
            sys.exit(128 + number)

    if validation:
        judged.load_state_dict(at.best_state)
    judged.cpu()
    return Candidate(
        kind="tabm",
        length={"epochs": at.best_epoch if validation else last},
        history=at.history,
        predict=lambda matrix: _predict(judged, torch.from_numpy(matrix)),
        dumps=lambda: network.dumps(judged),
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
        bins=tuple(_edges(column, settings.bins) for column in numeric.T),
        categories=tuple(len(column.vocabulary) + 1 for column in transform.categorical),
        ensemble=settings.ensemble,
        blocks=settings.blocks,
        width=settings.width,
        dropout=settings.dropout,
        embedding=settings.embedding,
    )


def _average(net: Network, decay: float) -> AveragedModel | None:
    if not decay:
        return None
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


def _edges(column: Matrix, bins: int) -> tuple[float, ...]:
    """The edges of at most ``bins`` bins with about as many rows in each, and of two bins at least."""
    edges = np.unique(np.nanquantile(column, np.linspace(0, 1, bins + 1)).astype(np.float32)).tolist()
    low, high = (edges[0], edges[-1]) if len(edges) > 1 else (edges[0] - 1, edges[0] + 1)
    return tuple(edges) if len(edges) > 2 else (low, (low + high) / 2, high)


def _loss(net: Network, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = net(x).float()
        # Each member of the ensemble learns by itself: the mean of their losses, not the loss of their mean.
        return F.binary_cross_entropy_with_logits(logits, y[:, None].expand_as(logits))

    return loss


def _compiled(
    loss: Callable[[Tensor, Tensor], Tensor], wanted: Literal["auto"] | bool, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """On a GPU as CUDA graphs, where launching kernels one by one would take longer than they do."""
    if wanted is False or (wanted == "auto" and not _can_compile(device)):
        return loss
    torch._dynamo.reset()  # it compiles one function for eight networks at most, then silently none
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(loss, mode=mode, dynamic=False)
    return compiled


def _can_compile(device: torch.device) -> bool:
    """Whether it is a GPU, and there is what Triton builds its launcher with (triton/runtime/build.py)."""
    if device.type == "cpu":
        return False
    named = os.environ.get("CC")
    compiler = shutil.which(named) if named is not None else shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if compiler and header.exists():
        return True
    lacking = header if compiler else "C compiler (gcc, clang, or what CC names)"
    print(
        f"tabm      trains uncompiled, which takes longer: there is no {lacking}, which torch.compile needs", flush=True
    )
    return False


def _order(rows: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The rows in the epoch's order, which needs no state: a training that goes on finds it again."""
    return torch.randperm(rows, generator=torch.Generator(device).manual_seed(100_003 * seed + epoch), device=device)


def _set_learning_rate(optimizer: torch.optim.Optimizer, settings: TabmParams, step: int, steps: int) -> None:
    """Rise from nothing in the first steps, then fall along a cosine to nothing at the last."""
    warm, cosine = min(1.0, (step + 1) / (WARM_UP * steps)), (1 + math.cos(math.pi * step / steps)) / 2
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * warm * cosine


def _gradients(loss_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, batch: Tensor, parts: int) -> Tensor:
    """Add up the gradients of a batch, taken in ``parts`` parts; return its loss (which stays on the device)."""
    total = torch.zeros((), device=x.device)
    for part in batch.chunk(parts):
        loss = loss_of(x[part], y[part]) * (len(part) / len(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def _more_parts(parts: int, batch_size: int) -> int:
    if parts >= batch_size:
        raise BallastError(
            "The device has no memory for a single row. Free some, make `train.tabm` smaller, "
            "or set `train.device` to cpu."
        )
    print(
        f"tabm      out of memory: each batch of {batch_size} rows is taken in {2 * parts} parts from here on, its "
        "gradients added up. A smaller `train.tabm.batch_size` would avoid it.",
        flush=True,
    )
    if torch.cuda.is_available():
        torch._dynamo.reset()  # the graphs of whole batches hold their memory, and do not add gradients up
        torch.cuda.empty_cache()
    return 2 * parts


@torch.inference_mode()
def _predict(net: Network, x: Tensor) -> Probabilities:
    ensemble = Probability(net).eval()
    return torch.cat([ensemble(chunk) for chunk in torch.split(x, CHUNK)]).cpu().numpy().astype(np.float64)


def _check_losses(losses: Tensor, epoch: int, batches: Tensor, x: Tensor, transform: Transform) -> None:
    """Raise BallastError for the first batch whose loss is no number, with the columns that are furthest out in it.

    Once an epoch and before a checkpoint: reading a loss waits for the device, and would at every step.
    """
    wrong = (~losses.isfinite()).nonzero()
    if not len(wrong):
        return
    step = int(wrong[0])
    largest = x[batches[step], : len(transform.numeric)].nan_to_num(0.0).abs().amax(dim=0).tolist()
    furthest = sorted(zip(largest, transform.features.numeric, strict=True), reverse=True)[:3]
    where = ", ".join(f"{name} {value:.3g}" for value, name in furthest) or "no numeric column"
    raise BallastError(
        f"The loss is not finite in epoch {epoch}, batch {step + 1} of {len(batches)}. Furthest from its mean there, "
        f"in standard deviations: {where}. Clip such values in prepare.sql, or lower `train.tabm.learning_rate` "
        "(if nothing there is far out, the batch before it threw the weights)."
    )


def _check_weights(net: Network, epoch: int) -> None:
    """The last step of an epoch may have made them infinite, and no loss tells of it yet."""
    if not all(bool(weights.isfinite().all()) for weights in net.parameters()):
        raise BallastError(
            f"The weights are not finite after the last batch of epoch {epoch}. Lower `train.tabm.learning_rate`."
        )


def _standing(
    at: Standing, net: Network, average: AveragedModel | None, optimizer: torch.optim.Optimizer, losses: Tensor
) -> dict[str, Any]:
    """All that the rest of a training depends on."""
    return {
        "at": vars(at),
        "net": net.state_dict(),
        "average": average.state_dict() if average else None,
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "random": torch.get_rng_state(),  # of dropout
        "random_cuda": torch.cuda.get_rng_state() if losses.is_cuda else None,
    }


def _take_up(
    saved: Mapping[str, Any],
    net: Network,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    losses: Tensor,
) -> Standing:
    """Put everything back as it stood."""
    net.load_state_dict(saved["net"])
    if average:
        average.load_state_dict(saved["average"])
    optimizer.load_state_dict(saved["optimizer"])
    losses.copy_(saved["losses"])
    torch.set_rng_state(saved["random"])
    if losses.is_cuda:
        torch.cuda.set_rng_state(saved["random_cuda"])
    return Standing(**saved["at"])


# --- scikit-learn's ---------------------------------------------------------------------------------------------------


def fit_hgb(
    train: Window,
    validation: Window | None,
    transform: Transform,
    params: TrainParams,
    log: Log,
    length: int | None = None,
) -> Candidate:
    """Fit gradient boosting to the same matrix; its history has every tenth iteration."""
    settings = params.hgb.model_copy(update={"iterations": length or params.hgb.iterations})
    held_out = (validation.matrix, validation.label) if validation else None
    with _progress("hgb", settings.iterations, f"{len(train.label):,} rows on cpu") as show:
        classifier = baseline.fit_hgb(
            (train.matrix, train.label), held_out, _categories(transform), settings, params.seed
        )
        iterations = classifier.n_iter_
        history = [_hgb_point(classifier, at) for at in sorted({*range(10, iterations, 10), iterations})]
        show(iterations, _loss_words(history[-1]))
    for point in history:
        log(int(point["epoch"]), named("hgb", point))
    return Candidate(
        kind="hgb",
        length={"iterations": baseline.best_iteration(classifier)},
        history=history,
        predict=lambda matrix: baseline.probability(classifier, matrix),
        dumps=lambda: baseline.dumps(classifier),
    )


def _hgb_point(classifier: Any, iteration: int) -> dict[str, float]:
    scores = {"train_log_loss": classifier.train_score_, "validation_log_loss": classifier.validation_score_}
    return {"epoch": iteration, **{name: -score[iteration] for name, score in scores.items() if len(score)}}


def fit_logistic(
    train: Window, validation: Window | None, transform: Transform, params: TrainParams, log: Log
) -> Candidate:
    """Fit a logistic regression to the same matrix; its history is its end."""
    with _progress("logistic", 1, f"{len(train.label):,} rows on cpu") as show:
        pipeline = baseline.fit_logistic(
            (train.matrix, train.label), _categories(transform), params.logistic, params.seed
        )
        iterations = int(pipeline["regression"].n_iter_[0])
        windows = {"train": train} | ({"validation": validation} if validation else {})
        point: dict[str, float] = {"epoch": iterations}
        for name, window in windows.items():
            point[f"{name}_log_loss"] = log_loss(window, baseline.probability(pipeline, window.matrix))
        show(1, _loss_words(point))
    log(iterations, named("logistic", point))
    return Candidate(
        kind="logistic",
        length={"iterations": iterations},
        history=[point],
        predict=lambda matrix: baseline.probability(pipeline, matrix),
        dumps=lambda: baseline.dumps(pipeline),
    )


def _categories(transform: Transform) -> dict[int, int]:
    """The categorical columns of the matrix, each with its number of codes."""
    columns = enumerate(transform.categorical, start=len(transform.numeric))
    return {place: len(column.vocabulary) + 1 for place, column in columns}


# --- what is said -----------------------------------------------------------------------------------------------------


def log_loss(window: Window, probability: Probabilities) -> float:
    """The mean log loss of a window's rows, in nats."""
    return float(metrics.log_loss_rows(window.label, probability).mean())


def named(kind: Kind, point: Mapping[str, float]) -> dict[str, float]:
    """A point of the history as MLflow's metrics: ``tabm/validation_log_loss``."""
    return {f"{kind}/{name}": value for name, value in point.items() if name != "epoch"}


def _loss_words(point: Mapping[str, float]) -> str:
    """The loss that tells most; boosting without a validation window computes none."""
    if "validation_log_loss" in point:
        return f"log loss {point['validation_log_loss']:.3f}"
    return f"train log loss {point['train_log_loss']:.3f}" if "train_log_loss" in point else "fitted"


@contextmanager
def _progress(kind: Kind, total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    """Yield a function of an epoch and what to say of it: a bar at a terminal, a line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console()
    unit = "epoch" if kind == "tabm" else "iteration"
    if not console.is_terminal:
        print(f"{kind:<9} {what}", flush=True)
        yield lambda epoch, text: print(f"{kind:<9} {unit} {epoch}/{total} · {text}", flush=True)
        return
    columns = TextColumn(f"{kind:<9}"), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda epoch, text: progress.update(
            task, completed=epoch, description=f"{unit} {epoch}/{total} · {text} · {what}"
        )
