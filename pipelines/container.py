"""What a stage needs where it runs in a container, which whoever runs us starts: we print what, it says how that ended.

One line on stdout, ``ballast-command`` and JSON, and one line back on stdin, the exit code. No value of a secret is in
it, only names; no path that the stage does not read, and none as writable but those of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.errors import BallastError, TryAgain

COMMAND = "ballast-command "
RUNNER = "BALLAST_STAGE_RUNNER"
SET = ("BALLAST_VAR", "BALLAST_SOURCE", "BALLAST_LANDING", "BALLAST_DAG", "BALLAST_RUN", "BALLAST_LINKS")
THREADS = ("*_NUM_THREADS",)
NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE")
# The image holds an environment too: it must be the one that the commit names. stderr goes where stdout goes, as the
# engine would mix the two within a line.
CHECKED = """exec 2>&1
cmp -s "$VIRTUAL_ENV/uv.lock" uv.lock || {
echo 'error: The image of the stages holds another uv.lock than the commit. Build it from this commit, and set \
BALLAST_STAGE_IMAGE to what it is then.'
exit 1
}
exec bash --norc -c "$0\""""


@dataclass(frozen=True)
class Needs:
    """What a stage needs besides its workspace, all of which it may read, and its folder there, where it may write.

    Paths by the variable that holds them; the names of variables whose values only the worker knows, as patterns.
    """

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    network: Literal["source", "mlflow"] | None = None
    names: tuple[str, ...] = ()
    gpu: bool = False


NEEDS = {
    "land": Needs(
        reads=("BALLAST_SOURCE",),
        writes=("BALLAST_LANDING",),
        network="source",
        names=("BALLAST_SOURCE_*", "AWS_*", "FSSPEC_*", *NETWORK),
    ),
    "ingest": Needs(reads=("BALLAST_LANDING",)),
    "validate": Needs(),
    "prepare": Needs(),
    "train": Needs(writes=("checkpoints", "links"), network="mlflow", names=("MLFLOW_*", *NETWORK), gpu=True),
    "evaluate": Needs(),
}


def asked() -> bool:
    """Whether stages run in containers (``BALLAST_STAGE_RUNNER``); raise BallastError if it names neither way."""
    found = os.environ.get(RUNNER) or "local"
    if found not in ("local", "container"):
        raise BallastError(f"{RUNNER} must be local or container (found {found!r}).")
    return found == "container"


def run(stage: str, line: str, root: Path, env: Mapping[str, str]) -> int:
    """Have a stage's command run in a container; return its exit code, above 128 where a signal ended it.

    Raise TryAgain if who was asked is gone, and BallastError if that is a person at a terminal.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise BallastError(
            f"{RUNNER} is container, and it is Airflow's tasks that start those. Unset it, or set local."
        )
    asked_for = request(stage, line, root, env)
    for path in asked_for["writes"]:
        Path(path).mkdir(parents=True, exist_ok=True)
    print(COMMAND + json.dumps(asked_for), flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        raise TryAgain(f"Whoever ran {stage} in a container is gone. Nothing is recorded.")
    return int(answer)


def request(stage: str, line: str, root: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """What the container is to be: its command, and what it sees of the disk, the network and the environment."""
    needs = NEEDS.get(stage, Needs())
    places = {
        **{name: env[name] for name in SET if name in env},
        "checkpoints": str(Path(env["BALLAST_VAR"], "checkpoints")),
        "links": str(Path(env["BALLAST_LINKS"]).parent),
    }
    return {
        "command": ["bash", "--norc", "-c", CHECKED, line],
        "cwd": str(root),
        "reads": [str(root), *(places[name] for name in needs.reads)],
        "writes": [str(root / "data" / stage), *(places[name] for name in needs.writes)],
        "hides": env["BALLAST_VAR"],  # what else lies there: other runs, the secrets of an Airflow on this machine
        "env": {name: env[name] for name in SET if name in env},
        "names": [*THREADS, *needs.names],
        "network": needs.network,
        "gpu": needs.gpu,
    }
