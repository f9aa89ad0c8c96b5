"""Checkpoints: what a training needs to go on where it was ended, and to come to the same model.

They lie under ``var/checkpoints/``, not among the outs of ``train``, which DVC removes before the stage runs; their
folder is named for all that the stage's result depends on, so that nothing else ever goes on from them.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from pipelines import places
from pipelines.files import canonical_json, sha256, whole_file

log = logging.getLogger(__name__)

EVERY_S = 20.0  # between two of them: what a machine's sudden end costs at most
KEPT_DAYS = 7  # a training that nobody took up again
RUN = "run_id"


class Checkpoint:
    """The checkpoint of one candidate. Without a path it keeps nothing, and is never due."""

    def __init__(self, path: Path | None = None, every_s: float = EVERY_S) -> None:
        self._path = path
        self._every_s = every_s
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """What was saved last, its tensors on the CPU; None where there is nothing, or nothing whole."""
        if self._path is None or not self._path.exists():
            return None
        try:
            saved: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
            log.warning("The checkpoint %s is damaged (%s); the training begins anew.", self._path, error)
            return None
        return saved

    def due(self) -> bool:
        """Whether the last one is old enough for another."""
        return self._path is not None and time.monotonic() - self._last >= self._every_s

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep ``state`` (tensors, numbers, strings, lists and dicts of them) in the place of what was there, whole."""
        if self._path is not None:
            with whole_file(self._path) as part:
                torch.save(dict(state), part)
        self._last = time.monotonic()

    def guarding(self) -> AbstractContextManager[Callable[[], int]]:
        """``asked_to_end`` for whoever has a checkpoint to save before leaving; else signals do what they always do."""
        return nullcontext(lambda: 0) if self._path is None else asked_to_end()


@contextmanager
def asked_to_end() -> Iterator[Callable[[], int]]:
    """Yield a function that gives the signal by which the process was asked to end (SIGTERM, SIGINT), else 0.

    Whoever asks it leaves in order, where an exception of the handler would come in the middle of a statement. A second
    Ctrl-C ends the process as always.
    """
    asked = [0]

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked[-1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Checkpoints:
    """The checkpoints of one training, which is told from others by a hash of its inputs."""

    def __init__(self, files: Iterable[Path], settings: Mapping[str, Any]) -> None:
        inputs = {
            "files": [sha256(file) for file in files],
            "settings": settings,
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        }
        root = places.var() / "checkpoints"
        self._folder = root / hashlib.sha256(canonical_json(inputs).encode()).hexdigest()[:16]
        _forget_old(root)

    def of(self, candidate: str) -> Checkpoint:
        """The checkpoint of the candidate with this name."""
        return Checkpoint(self._folder / f"{candidate}.pt")

    @property
    def run_id(self) -> str | None:
        """The MLflow run of the attempt before, if there was one."""
        file = self._folder / RUN
        return file.read_text() if file.exists() else None

    @run_id.setter
    def run_id(self, run_id: str | None) -> None:
        if run_id:
            with whole_file(self._folder / RUN) as part:
                part.write_text(run_id)

    def clear(self) -> None:
        """Remove them: the training has ended, and its result is written."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _forget_old(root: Path) -> None:
    old = time.time() - KEPT_DAYS * 24 * 3600
    for folder in root.glob("*/"):
        with suppress(FileNotFoundError):  # another training is writing there, or clears it
            if max(path.stat().st_mtime for path in (folder, *folder.iterdir())) < old:
                shutil.rmtree(folder, ignore_errors=True)
