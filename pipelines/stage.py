"""The thin main of a stage: options in, a pure function, ``result.json`` out, one line for a person."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.files import write_json


def options(stage: str, *paths: str) -> argparse.Namespace:
    """Parse ``--params`` and the named path options, as they stand in dvc.yaml's command."""
    parser = argparse.ArgumentParser(prog=f"python -m pipelines.{stage}")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    for name in paths:
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args()


def finish(stage: str, out: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.json`` (what the next step and Airflow need to know) and print its summary line."""
    write_json(out / "result.json", result)
    print(f"{stage:<10} {result['summary']}", flush=True)
