"""What training costs: a step beside its bare parts and beside a DataLoader, and what the seconds of a training buy.

    python -m benchmarks.train [--parts step,limit,reach,budget] [--rounds 5] [--set train.tabm.width=32]

All of it trains the example as of 2013-12-01 with the settings of params.yaml.

step    The real loop, `pipelines.fit.fit`, runs a few epochs, the first of them to warm up. After each, in the function
        that the loop calls with an epoch's metrics, the same number of steps is taken bare: forward, backward and
        optimizer (its `zero_grad` too) of an equal network, on batches that were gathered before. What an epoch of the
        loop takes longer, for each step, is the share outside. On one thread of a CPU that is counted in the process's
        CPU time, which other processes disturb least. Then the same bare step is fed by DataLoaders, from the plain one
        to one that gathers whole batches by index tensors; the best counts. All of it in one process, in turn; medians
        over the rounds. Likewise for a network with a tenth of the parameters. On a GPU also against eager steps.
limit   The matrix products of a step (counted by PyTorch's FlopCounterMode) and the memory it must move (what eager
        keeps for the backward pass, written and read once; weights, gradients and moments once a step), against what
        this device does in one large product and one large copy, measured here.
reach   Seconds until the network's log loss on the validation window is what a baseline ends with, and the baseline's.
budget  Seconds of the whole stage as a process of its own, imports and MLflow included; then what the network would win
        with the double budget: twice the epochs, or twice the width.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.example import ROOT, SQL, Year, arguments, between, lay_out, next_month
from benchmarks.quality import quiet, score
from pipelines import fit as loop
from pipelines import model, rows
from pipelines.errors import exit_with
from pipelines.files import read_json
from pipelines.fit import TrainParams, Window, fit, log_loss, reproducible
from pipelines.model import Kind, Transform
from pipelines.network import Network
from pipelines.params import load
from pipelines.prepare import PrepareParams

AS_OF = date(2013, 12, 1)
GOAL_OUTSIDE = {"default": 0.10, "a tenth": 0.25}
GOAL_GPU, GOAL_STAGE_S = 30, 90
LOADER_STEPS = 100  # of a round: a DataLoader that takes row by row is slow
GATHERED = 16  # batches that the bare step goes through


@dataclass(frozen=True)
class Example:
    """The windows of the as-of date as the candidates take them."""

    train: Window
    validation: Window
    transform: Transform


def example(year: Year, folder: Path) -> Example:
    """Prepare the as-of date into ``folder``."""
    year.prepare(AS_OF, folder)
    frames = [rows.read(folder / f"{name}.parquet") for name in ("train", "validation")]
    transform = Transform.fit(frames[0], load(year.params, "prepare", PrepareParams).features)
    train, validation = (Window.of(frame, transform) for frame in frames)
    return Example(train, validation, transform)


# --- step -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    """Seconds on the wall, and of the process on a processor."""

    wall: float
    cpu: float


class Clock:
    """Runs from its making on."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def spent(self) -> Spent:
        """What has passed since."""
        return Spent(time.perf_counter() - self.wall, time.process_time() - self.cpu)


class Stepper:
    """Forward, backward and optimizer of a network like the loop's."""

    def __init__(self, example: Example, params: TrainParams, compiled: bool = True) -> None:
        self.device = loop._device(params.device)
        self.net = Network(loop._config(example.train, example.transform, params.tabm)).to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=params.tabm.learning_rate, weight_decay=params.tabm.weight_decay, fused=True
        )
        self.eager = loop._loss(self.net, self.device)
        self.loss_of = loop._compiled(self.eager, params.compile if compiled else False, self.device)

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.loss_of(x, y).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def take(self, batches: Iterator[tuple[Tensor, Tensor]], steps: int) -> Spent:
        """So many steps, timed once the first batch has come."""
        x, y = next(batches)
        self.step(x.to(self.device), y.to(self.device))
        self.wait()
        clock = Clock()
        for x, y in islice(batches, steps):
            self.step(x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True))
        self.wait()
        return clock.spent()

    def wait(self) -> None:
        """Until the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class IndexTensors(Sampler[Tensor]):
    """Shuffled batches as tensors of indices, so that a TensorDataset gathers each at once."""

    def __init__(self, rows: int, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """The batches of an epoch, all of one size."""
        whole = self.rows // self.batch_size * self.batch_size
        return iter(torch.randperm(self.rows)[:whole].view(-1, self.batch_size))


def loaders(window: Window, batch_size: int, pin: bool) -> dict[str, DataLoader[Any]]:
    """DataLoaders of the window, by how they take a batch."""
    data = TensorDataset(torch.from_numpy(window.matrix), torch.from_numpy(window.label))
    indices = BatchSampler(RandomSampler(data), batch_size, drop_last=True)
    workers: dict[str, Any] = {"num_workers": 2, "persistent_workers": True, "pin_memory": pin}
    tensors: Any = IndexTensors(len(data), batch_size)
    return {
        "row by row": DataLoader(data, batch_size, shuffle=True, drop_last=True, pin_memory=pin),
        "row by row, 2 workers": DataLoader(data, batch_size, shuffle=True, drop_last=True, **workers),
        "lists of indices": DataLoader(data, batch_size=None, sampler=indices, pin_memory=pin),
        "index tensors": DataLoader(data, batch_size=None, sampler=tensors, pin_memory=pin),
        "index tensors, 2 workers": DataLoader(data, batch_size=None, sampler=tensors, **workers),
    }


@dataclass
class Rates:
    """Rows a second, a value for each round."""

    parameters: int
    found: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    shares: list[float] = field(default_factory=list)
    """Of the loop's step, what is no forward, backward or optimizer."""

    def median(self, name: str) -> float:
        """Of the rounds."""
        return statistics.median(self.found[name])

    def best(self, prefix: str) -> str:
        """The fastest of the DataLoaders."""
        return max((name for name in self.found if name.startswith(prefix)), key=self.median)


def measure_step(example: Example, params: TrainParams, rounds: int) -> Rates:
    """Run the loop for an epoch a round, and after each what stands beside it."""
    stepper = Stepper(example, params)
    on_gpu = stepper.device.type == "cuda"
    fed = {"DataLoader": stepper} | ({"eager, DataLoader": Stepper(example, params, compiled=False)} if on_gpu else {})
    batch_size = min(params.tabm.batch_size, len(example.train.label))
    steps = len(example.train.label) // batch_size
    few = min(steps - 1, LOADER_STEPS)
    gathered = list(islice(gather(example.train, batch_size, stepper.device), GATHERED))
    sources = loaders(example.train, batch_size, pin=on_gpu)
    rates = Rates(sum(weight.numel() for weight in stepper.net.parameters()))
    clock = Clock()

    def beside(epoch: int, values: Mapping[str, float]) -> None:
        nonlocal clock
        whole, bare = clock.spent(), stepper.take(cycled(gathered), steps)
        found = {"loop": whole.wall / steps, "bare": bare.wall / steps}
        for prefix, one in fed.items():
            for name, source in sources.items():
                found[f"{prefix}: {name}"] = one.take(iter(source), few).wall / few
        if epoch > 1:
            rates.shares.append(1 - (bare.wall / whole.wall if on_gpu or params.threads > 1 else bare.cpu / whole.cpu))
            for name, seconds in found.items():
                rates.found[name].append(batch_size / seconds)
        clock = Clock()

    settings = params.tabm.model_copy(update={"epochs": rounds + 1})
    with quiet(), reproducible(params.seed, params.threads):
        fit("tabm", example.train, None, example.transform, params.model_copy(update={"tabm": settings}), beside)
    return rates


def gather(window: Window, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device."""
    x, y = torch.from_numpy(window.matrix).to(device), torch.from_numpy(window.label).to(device)
    for batch in IndexTensors(len(x), batch_size):
        yield x[batch], y[batch]


def cycled(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches over and over."""
    while True:
        yield from batches


def a_tenth(example: Example, params: TrainParams) -> TrainParams:
    """The settings of the network, its width and its embeddings made smaller together, with a tenth the parameters."""
    base = params.tabm

    def smaller(width: int) -> TrainParams:
        embedding = max(1, round(base.embedding * width / base.width))
        tabm = base.model_copy(update={"width": width, "embedding": embedding})
        return params.model_copy(update={"tabm": tabm})

    def size(one: TrainParams) -> int:
        return sum(w.numel() for w in Network(loop._config(example.train, example.transform, one.tabm)).parameters())

    wanted = size(params) / 10
    return min(map(smaller, range(1, base.width)), key=lambda one: abs(size(one) - wanted))


def say_step(name: str, params: TrainParams, rates: Rates) -> None:
    """The rates of a network, each beside the loop's."""
    tabm, rate = params.tabm, rates.median("loop")
    print(f"\n{name}: {rates.parameters:,} parameters (width {tabm.width}, embedding {tabm.embedding})")
    print(f"  the loop                        {rate:12,.0f} rows/s   {tabm.batch_size / rate * 1e3:.2f} ms a step")
    print(f"  forward, backward, optimizer    {rates.median('bare'):12,.0f} rows/s")
    outside = statistics.median(rates.shares)
    rounds = ", ".join(f"{share:.1%}" for share in rates.shares)
    print(
        f"  outside of them                 {outside:12.1%} (goal: at most {GOAL_OUTSIDE[name]:.0%}; rounds {rounds})"
    )
    for source in rates.found:
        if source not in ("loop", "bare"):
            other = rates.median(source)
            mark = "  the best" if source == rates.best(source.partition(":")[0]) else ""
            print(f"  {source:<43} {other:11,.0f} rows/s   the loop does {rate / other:.2f} times as many{mark}")
    if any(source.startswith("eager") for source in rates.found):
        best = rates.best("eager")
        print(f"  compile and CUDA graphs against {best}: {rate / rates.median(best):.1f} times (goal {GOAL_GPU})")


# --- limit ------------------------------------------------------------------------------------------------------------


def say_limit(example: Example, params: TrainParams, rate: float) -> None:
    """How far the loop, at so many rows a second, is from what the device can do."""
    batch_size = min(params.tabm.batch_size, len(example.train.label))
    with reproducible(params.seed, params.threads):
        stepper = Stepper(example, params, compiled=False)
        x, y = next(gather(example.train, batch_size, stepper.device))
        flops, moved = flops_of(stepper, x, y), bytes_of(stepper, x, y)
        half = stepper.device.type == "cuda" and torch.cuda.is_bf16_supported()
        kind = torch.bfloat16 if half else torch.float32
        peak_flops, peak_bytes = peaks(stepper, kind)
    steps = rate / batch_size
    compute, memory = flops * steps / peak_flops, moved * steps / peak_bytes
    words = f"{params.threads} thread(s)" if stepper.device.type == "cpu" else torch.cuda.get_device_name()
    binds = "the matrix products bind" if compute > memory else "memory binds"
    print(f"\nthe device's limit ({words}, {str(kind).removeprefix('torch.')}): {binds}")
    for name, amount, peak, share, unit in (
        ("matrix products", flops, peak_flops, compute, "FLOP"),
        ("memory", moved, peak_bytes, memory, "B"),
    ):
        per_step, per_s, at_most = f"{amount / 1e6:,.1f} M{unit}", amount * steps / 1e9, peak / 1e9
        print(f"  {name:<16} {per_step:>14} a step   {per_s:10,.1f} of {at_most:10,.1f} G{unit}/s   {share:.1%}")


def flops_of(stepper: Stepper, x: Tensor, y: Tensor) -> int:
    """FLOPs of a step's matrix products."""
    with FlopCounterMode(display=False) as counter:
        stepper.step(x, y)
    return int(counter.get_total_flops())


def bytes_of(stepper: Stepper, x: Tensor, y: Tensor) -> int:
    """Bytes that a step must write and read: its activations twice, seven times the size of the weights."""
    weights = {weight.data_ptr(): weight.nbytes for weight in stepper.net.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stepper.step(x, y)
    activations = sum(size for place, size in kept.items() if place not in weights)
    # read: weights, gradients, both moments; written: gradients, both moments, weights
    return 2 * activations + 8 * sum(weights.values())


def peaks(stepper: Stepper, kind: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product, and bytes/s of a large copy (each byte read and written), on the device."""
    size = 8192 if stepper.device.type == "cuda" else 2048
    a = torch.randn(size, size, device=stepper.device, dtype=kind)
    source = torch.zeros(size * size * 4, device=stepper.device)
    target = torch.empty_like(source)
    return (
        2 * size**3 / best_seconds(stepper, lambda: a @ a),
        2 * source.nbytes / best_seconds(stepper, lambda: target.copy_(source)),
    )


def best_seconds(stepper: Stepper, call: Callable[[], object], times: int = 10) -> float:
    """The least of a few calls, the first left out."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        call()
        stepper.wait()
        found.append(time.perf_counter() - began)
    return min(found[1:])


# --- reach ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """A fit: the seconds it took, the log loss on the validation window it ended with, and the way there."""

    seconds: float
    log_loss: float
    way: list[tuple[float, float]]
    """Seconds and log loss at the end of each epoch."""


def course(kind: Kind, example: Example, params: TrainParams) -> Course:
    """Fit a candidate as `train` does, and take the time."""
    way: list[tuple[float, float]] = []

    def log(step: int, values: Mapping[str, float]) -> None:
        way.append((time.perf_counter() - began, values[f"{kind}/validation_log_loss"]))

    with quiet(), reproducible(params.seed, params.threads):
        began = time.perf_counter()
        fitted = fit(kind, example.train, example.validation, example.transform, params, log)
        seconds = time.perf_counter() - began
        loss = log_loss(example.validation, fitted.predict(example.validation.matrix))
    return Course(seconds, loss, way)


def say_reach(example: Example, params: TrainParams) -> None:
    """The network's way, and where it passes each baseline."""
    ours = course("tabm", example, params)
    print(f"\ntime to a baseline's log loss on the validation window ({len(example.train.label):,} rows to learn from)")
    way = " · ".join(f"{loss:.4f} at {at:.1f} s" for at, loss in ours.way)
    print(f"  tabm      {ours.log_loss:.4f} after {ours.seconds:5.1f} s in all; {way}")
    kinds: tuple[Kind, ...] = ("hgb", "logistic")
    for kind in kinds:
        theirs = course(kind, example, params)
        reached = next(((n, at) for n, (at, loss) in enumerate(ours.way, start=1) if loss <= theirs.log_loss), None)
        words = (
            f"tabm there after epoch {reached[0]}, {reached[1]:.1f} s: {reached[1] / theirs.seconds:.2f} times as long"
            if reached
            else f"tabm does not get there ({ours.log_loss - theirs.log_loss:+.4f})"
        )
        print(f"  {kind:<8}  {theirs.log_loss:.4f} after {theirs.seconds:5.1f} s; {words}")


# --- budget -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A run of the stage: its seconds, what it picked, the network's log loss on validation and the month's score."""

    seconds: float
    picked: str
    validation: float
    month: str


def stage(year: Year, data: Path, changes: Mapping[str, Any]) -> Stage:
    """Run `python -m pipelines.train` with some settings of `train` changed, then test what comes out on the month."""
    values = yaml.safe_load(year.params.read_text(encoding="utf-8"))
    values["train"] = merged(values["train"], changes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "params.yaml").write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "pipelines.train", "--params", str(folder / "params.yaml")]
        command += ["--data", str(data), "--sql", str(SQL), "--out", str(folder / "train")]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=apart(data), capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            sys.exit(f"train failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        result, trained = read_json(folder / "train" / "result.json"), model.load(folder / "train" / "model")
        frame = between(year.labelled, AS_OF, next_month(AS_OF))
        month = score(frame["label"].to_numpy(np.float32), trained.predict(frame))
    validation = result["candidates"].get("tabm", {}).get("log_loss", float("nan"))
    return Stage(seconds, result["challenger"], validation, str(month))


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with some changed, section by section."""
    return {**values, **{k: merged(values[k], v) if isinstance(v, dict) else v for k, v in changes.items()}}


def apart(data: Path) -> dict[str, str]:
    """An environment in which the stage keeps its state beside its data, and MLflow in a file."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BALLAST_", "MLFLOW_"))}
    return {**kept, "BALLAST_VAR": str(data / "var"), "MLFLOW_DISABLE_TELEMETRY": "true"}


def say_budget(year: Year, data: Path, params: TrainParams) -> None:
    """The stage as shipped, and the network alone with more."""
    tabm, alone = params.tabm, {"candidates": ["tabm"]}
    stage(year, data, {**alone, "refit": False, "tabm": {"epochs": 1, "width": 8}})  # bytecode, and MLflow's database
    epochs, width = {"epochs": 2 * tabm.epochs}, {"width": 2 * tabm.width}
    runs: dict[str, Mapping[str, Any]] = {"as shipped": {}}
    runs |= {"tabm alone": alone} if params.candidates != ["tabm"] else {}
    runs |= {"epochs x 2": {**alone, "tabm": epochs}, "width x 2": {**alone, "tabm": width}}
    print(
        f"\nthe stage `train` as of {AS_OF}, a process, {params.threads} thread(s) (goal: {GOAL_STAGE_S} s as shipped)"
    )
    print(f"  {'':<12} {'seconds':>7}  {'picked':<8}  {'tabm, validation':<16}  {f'{AS_OF:%B}: log loss, AUC'}")
    for name, changes in runs.items():
        run = stage(year, data, changes)
        print(f"  {name:<12} {run.seconds:7.1f}  {run.picked:<8}  {run.validation:<16.4f}  {run.month}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------


def run(parts: Iterable[str], year: Year, folder: Path, rounds: int) -> None:
    """Measure the parts, and print each as it comes."""
    params = load(year.params, "train", TrainParams)
    with quiet():
        shown = example(year, folder)
    number, columns = shown.train.matrix.shape
    machine = f"{os.cpu_count()} cores, {params.threads} thread(s)"
    print(
        f"as of {AS_OF}: {number:,} rows, {columns} columns · {machine} · batches of {params.tabm.batch_size}",
        flush=True,
    )
    if loop._device(params.device).type == "cpu":
        print("no GPU in use: compile, CUDA graphs and bf16 against eager with a DataLoader are not measured")
    rate = None
    if "step" in parts:
        for name, settings in {"default": params, "a tenth": a_tenth(shown, params)}.items():
            rates = measure_step(shown, settings, rounds)
            say_step(name, settings, rates)
            rate = rate or rates.median("loop")
    if "limit" in parts:
        say_limit(shown, params, rate or measure_step(shown, params, rounds).median("loop"))
    if "reach" in parts:
        say_reach(shown, params)
    if "budget" in parts:
        say_budget(year, folder, params)


def main() -> None:
    """Lay the example out, and measure."""
    parser = arguments(__doc__)
    parser.add_argument("--parts", default="step,limit,reach,budget")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            year = lay_out(Path(folder), args.set)
        run(args.parts.split(","), year, Path(folder) / "prepared", args.rounds)


if __name__ == "__main__":
    exit_with(main)
