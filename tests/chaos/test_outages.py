"""On the running stack: the S3 store away for a minute, and much at once."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from threading import Timer

import pytest
from moto.server import ThreadedMotoServer

from pipelines.dagruns import ENDED
from tests.waiting import until

from .conftest import LINES, needed
from .rounds import PLACES, Cell, Round, found, residue
from .topology import Topology

pytestmark = pytest.mark.chaos
AWAY_S = 60.0
STEPS = {("retrain_on_alert", "train"), ("retrain_on_alert", "register"), ("promote", "promote"), ("monitor", "score")}


@pytest.fixture(scope="module")
def stack() -> Iterator[Topology]:
    """The stack with the retries of the product."""
    needed()
    made = Topology()
    try:
        made.up()
        yield made
    finally:
        made.close()


class WithoutStore(Round):
    """A round in some of whose steps the S3 store goes away for a minute, or for one more where it is away already."""

    back: Timer | None = None

    def _kill(self, component: str, dag: str, step: str, runner: object, typical: float) -> None:
        if self.back and self.back.is_alive():
            self.back.cancel()
        else:
            self.topology.s3.stop()
        self.back = Timer(AWAY_S, self._back)
        self.back.start()
        cell = Cell("S3 away for a minute", dag, step, 0.0, hit=True)
        self.cells.append(cell)
        self._open = cell, time.monotonic()

    def _back(self) -> None:
        self.topology.s3 = ThreadedMotoServer("127.0.0.1", self.topology.ports["s3"], verbose=False)
        self.topology.s3.start()


def test_store_away_for_a_minute_is_waited_for(stack: Topology) -> None:
    away = ["s3" if place in STEPS else None for place in PLACES]
    played = WithoutStore(stack, 0, away, random.Random(1))
    try:
        played.play({})
    finally:
        LINES.extend(cell.row() for cell in played.cells)
        if played.back:
            played.back.join()
    assert len(played.cells) == len(STEPS)
    assert all(cell.ended in ("went on", "tried again") for cell in played.cells), "no run failed"
    waited = {cell.step: cell.seconds for cell in played.cells}
    assert waited["register"] > AWAY_S - 10, "it sends the model, so it cannot have ended before the store was back"
    after = found(stack)
    assert (after["champion"], after["problems"], residue(stack)) == (1, [], [])


def test_two_retrainings_and_a_monitor_at_once_end_well_with_one_champion(stack: Topology) -> None:
    client, before, every = stack.airflow, found(stack), ("queued", "running", *ENDED)
    promotions = len(client.runs(every, "promote"))
    rounds = [Round(stack, number, [None] * len(PLACES), random.Random(1)) for number in (1, 2)]
    for one in rounds:
        one._trigger("retrain_on_alert")
    rounds[0]._trigger("monitor")
    runs = [("retrain_on_alert", rounds[0].name), ("retrain_on_alert", rounds[1].name), ("monitor", rounds[0].name)]

    def ended() -> list[str]:
        states = [client.run(*run).state for run in runs]
        return states if all(state in ENDED for state in states) else []

    assert until("the end of all three", ended, 1200, 2) == ["success"] * 3

    def promoted() -> list[str]:
        all_of = client.runs(every, "promote")
        both = len(all_of) == promotions + 2
        return [run.state for run in all_of] if both and all(run.over for run in all_of) else []

    states = until("the end of the promotions", promoted, 600, 2)
    after = found(stack)
    assert not after["problems"]
    assert not residue(stack)
    assert len(after["digests"]) == len(before["digests"]) + 2
    # Whoever decided against a champion that has moved since is told so; the other is champion.
    assert after["moves"] - before["moves"] == states.count("success") - 1 >= 1
