"""kill -9 of each component in each step of the loop, on the processes of the production topology.

Afterwards the run has gone on or has said why not, the champion is the one that the ledger says, nothing is half
registered, lost, doubled or left behind, and the model is that of a run which nothing broke.
"""

from __future__ import annotations

import random

import pytest

from pipelines.run import STAGES

from .conftest import LINES, REPORT, SEED, kills, write_report
from .rounds import Reference, Round, found, locks, residue
from .topology import Topology

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference") / "project")


@pytest.fixture(scope="module")
def typical(topology: Topology) -> dict[int, float]:
    """How long each step takes in a round that nothing breaks, which makes the first champion."""
    calm = Round(topology, 0, [None] * 18, random.Random(SEED))
    calm.play({})
    assert found(topology)["champion"] == 1
    assert not residue(topology)
    return calm.took


@pytest.mark.parametrize("number", range(len(kills())))
def test_round_of_kills_loses_nothing(
    topology: Topology, typical: dict[int, float], reference: Reference, number: int
) -> None:
    before = found(topology)
    played = Round(topology, number + 1, kills()[number], random.Random(f"{SEED}/{number}"))
    reference.begin(played.as_of)
    try:
        played.play(typical)
    finally:
        REPORT.extend(played.cells)
        write_report()
    problems = judged(topology, before, played, reference)
    LINES.append(f"round {number + 1}: " + ("; ".join(problems) or "nothing lost, doubled or left behind"))
    write_report()
    assert not problems
    assert all(cell.well for cell in played.cells)


def judged(topology: Topology, before: dict[str, object], played: Round, reference: Reference) -> list[str]:
    """What is wrong after a round: one version, one promotion and one window more, and nothing else."""
    topology.wait()  # what was killed last may not be back yet
    after = found(topology)
    version = str(after["champion"])
    problems = [*after["problems"], *residue(topology), *locks(topology, played.name, STAGES)]
    if (after["moves"], after["champion"]) != (before["moves"] + 1, len(before["digests"]) + 1):  # type: ignore[operator,arg-type]
        problems.append(f"{after['moves']} promotions, champion v{version}; before: {before}")
    if (made := reference.made()) != after["digests"][version]:
        problems.append(f"the model is {after['digests'][version][:12]}, unbroken it is {made[:12]}")
    if len(after["windows"]) != len(before["windows"]) + 1:  # type: ignore[arg-type]
        problems.append(f"{len(after['windows'])} windows")
    if (logged := after["predictions"].get(f"v{version}")) != (rows := played.rows_of_window()):
        problems.append(f"{logged} predictions are logged of {rows} rows")
    return problems
