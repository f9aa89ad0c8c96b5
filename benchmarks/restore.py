"""What it costs to believe DVC's cache only where it is whole: a cached stage of much data, beside plain `dvc repro`.

    python -m benchmarks.restore [--gb 1] [--rounds 3]

A project of one stage makes files of a quarter GB, and 5,000 small ones. In a new workspace the step then takes them
from the cache, after hashing them there; `dvc repro` in a new clone with the same cache takes them unread. Between the
two lies the MD5 of every byte, which is the floor of what is added.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.pipeline import ROOT, environment
from pipelines.files import md5
from pipelines.workspace import share_cache

MAKE = """
import json, os, pathlib, sys
block = os.urandom(1 << 20)
for name, files, size in (("big", int(sys.argv[1]) * 4, 1 << 28), ("small", 5000, 20_000)):
    folder = pathlib.Path("data/land", name)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        with (folder / str(number)).open("wb") as file:
            for piece in range(max(size >> 20, 1)):
                file.write(f"{number} {piece}".encode().ljust(20) + block[: min(size, 1 << 20) - 20])
pathlib.Path("data/land/result.json").write_text(json.dumps({"summary": "made"}))
"""
STEP = """
import pathlib, sys
import pipelines.places
pipelines.places.ROOT = pathlib.Path(sys.argv[1])  # before anything takes it from there
from pipelines import errors, run
sys.argv[:2] = ["pipelines.run"]
errors.exit_with(run.main)
"""
OUTS = ["data/land/big", "data/land/small", "data/land/result.json"]


def run(command: list[str], cwd: Path, **more: str) -> float:
    """How long a command takes; it must succeed."""
    env, began = environment() | more, time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} failed in {cwd}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def make_project(root: Path, gb: int) -> None:
    """The project of one stage, committed."""
    root.mkdir()
    stage = {"cmd": f"python make.py {gb}", "deps": ["make.py"], "outs": OUTS}
    texts = {"make.py": MAKE, "dvc.yaml": json.dumps({"stages": {"land": stage}}), ".gitignore": "/data\n"}
    texts |= {"params.yaml": 'as_of: "2013-04-01"\n', "uv.lock": (ROOT / "uv.lock").read_text()}
    for name, text in texts.items():
        (root / name).write_text(text)
    run(["git", "init", "-q"], root)
    run([sys.executable, "-m", "dvc", "init", "-q"], root)
    run(["git", "add", "-A"], root)
    run(["git", "-c", "user.name=b", "-c", "user.email=b@example.org", "commit", "-qm", "one stage"], root)


def step(home: Path, name: str) -> float:
    """Seconds of the step in a workspace that is new."""
    command = [sys.executable, "-c", STEP, str(home / "project"), "land", "--dag-id", "d", "--run-id", name]
    return run([*command, "--as-of", "2013-05-01"], home, BALLAST_VAR=str(home / "var"), PYTHONPATH=str(ROOT))


def repro(home: Path, name: str) -> float:
    """Seconds of `dvc repro` in a clone that is new and shares the cache; the clone counts, as the workspace does."""
    began = time.perf_counter()
    run(["git", "clone", "-q", "--shared", "project", name], home)
    share_cache(home / "project", home / name)
    run([sys.executable, "-m", "dvc", "repro"], home / name)
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print a line per round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found: dict[str, list[float]] = {"dvc repro": [], "step": [], "MD5 alone": []}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["BALLAST_VAR"] = str(home / "var")
        make_project(home / "project", given.gb)
        step(home, "first")
        for number in range(given.rounds):
            found["dvc repro"].append(repro(home, f"clone-{number}"))
            found["step"].append(step(home, f"run-{number}"))
            began = time.perf_counter()
            with ThreadPoolExecutor() as pool:
                list(pool.map(md5, (home / "project" / ".dvc" / "cache" / "files" / "md5").glob("*/*")))
            found["MD5 alone"].append(time.perf_counter() - began)
            print(f"round {number + 1}   " + "   ".join(f"{name} {times[-1]:5.1f} s" for name, times in found.items()))
    repro_s, step_s, md5_s = (statistics.median(times) for times in found.values())
    print(f"\nmedian of {given.rounds}, {given.gb} GB in large files and 5,000 small ones, on {os.cpu_count()} cores")
    print(f"  dvc repro, from the cache  {repro_s:5.1f} s")
    print(f"  the step, from the cache   {step_s:5.1f} s   {step_s / repro_s:.2f} times, {step_s - repro_s:+.1f} s")
    print(f"  MD5 of all of it, alone    {md5_s:5.1f} s")


if __name__ == "__main__":
    main()
