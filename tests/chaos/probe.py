"""What a process beside the workers finds in the stores; run in the project, it prints one line of JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow.parquet as pq

from pipelines import places, registry, tracking
from pipelines.state import State, moves

TAGS = ("ballast.kind", "ballast.as_of", "ballast.commit", "ballast.trigger", tracking.DIGEST, registry.LOCK)


def ledger(state: State) -> list[str]:
    """What is wrong with the ledger, and where the alias is not its projection."""
    found = state.verify()
    if (alias := registry.aliases().get("champion")) != state.champion():
        found.append(f"the alias says v{alias}, the ledger v{state.champion()}")
    promoted = Counter(entry.record_sha256 for entry in moves(state.ledger()))
    return found + [f"promoted {times} times on {record}" for record, times in promoted.items() if times > 1]


def versions() -> list[str]:
    """What is half registered, or registered twice."""
    found = []
    known = registry.versions()
    for version in known:
        missing = [tag for tag in TAGS if not version.tags.get(tag)]
        found += [f"v{version.number} has no tag {tag}" for tag in missing]
        registry.model(version.number)  # raises unless every byte is that of the digest
        run = tracking.client().get_run(version.run_id)
        if run.info.status != "FINISHED" or run.data.tags.get(tracking.DIGEST) != version.digest:
            found.append(f"v{version.number}: its run {version.run_id} is {run.info.status} of another model")
    twice = Counter((version.digest, version.lock) for version in known)
    return found + [f"{digest[:12]} is registered {times} times" for (digest, _), times in twice.items() if times > 1]


def runs() -> list[str]:
    """MLflow runs that nobody ended, and DAG runs that have two."""
    experiment = tracking.client().get_experiment_by_name(tracking.EXPERIMENT)
    if experiment is None:
        return []
    found = tracking.client().search_runs([experiment.experiment_id], max_results=10_000)
    left = [f"run {run.info.run_name} is {run.info.status}" for run in found if run.info.status != "FINISHED"]
    twice = Counter(run.data.tags.get("ballast.run") for run in found)
    return left + [f"{name} has {times} MLflow runs" for name, times in twice.items() if name and times > 1]


def predictions() -> dict[str, Any]:
    """The number of logged rows by version, and what is there twice."""
    rows: Counter[str] = Counter()
    keys: Counter[tuple[str, str]] = Counter()
    for file in (places.var() / "predictions").glob("date=*/v*.parquet"):
        for key in pq.ParquetFile(file).read(["key"])["key"].to_pylist():
            rows[file.stem] += 1
            keys[file.stem, key] += 1
    twice = sum(times > 1 for times in keys.values())
    return {"rows": rows, "problems": [f"{twice} predictions are logged twice"] if twice else []}


def main() -> None:
    """Print ``problems``, and what the caller compares."""
    state, logged = State(), predictions()
    open_ones = [f"{one.run or one.asked_by} never ended" for one in state.retrainings() if not one.ended_at]
    found = {
        "problems": ledger(state) + versions() + runs() + open_ones + logged["problems"],
        "champion": state.champion(),
        "moves": len(moves(state.ledger())),
        "digests": {version.number: version.digest for version in registry.versions()},
        "predictions": logged["rows"],
        "windows": [(window.start, window.end) for window in state.windows()],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
