"""A clock that jumps between the steps of a run: an hour ahead, a day back."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from itertools import cycle
from pathlib import Path

import pytest

from .rounds import RETRAIN
from .site import LATER, LOOP, Site

pytestmark = pytest.mark.chaos
AHEAD, BACK = ("faketime", "-f", "+1h"), ("faketime", "-f", "-1d")
MADE = """
import json
from pipelines import breaker, retraining
from pipelines.state import State
state = State()
print(json.dumps({
    "decided": [decision.version for decision in state.decisions()],
    "trained": [str(day) for day in retraining.trained(state)],
    "waits": retraining.unpromoted(state),
    "moves": [(entry.from_version, entry.to_version, entry.as_of) for entry in state.ledger()],
}))
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    if not shutil.which("faketime"):
        pytest.skip("needs libfaketime (apt-get install faketime)")
    return Site.make(tmp_path / "project")


def test_jumps_between_the_steps_change_no_date_and_no_order(site: Site) -> None:
    for run, step, as_of in LOOP[: len(RETRAIN) + 2]:
        site.step(run, run, step, str(as_of))
    for jump, step in zip(cycle([AHEAD, BACK]), (*RETRAIN, "review", "promote"), strict=False):
        found = site.step("retrain", "later", step, str(LATER), BACK if step == "decide" else jump)
        assert found["as_of"] == str(LATER)
    made = site.python(MADE)
    assert made["decided"] == [1, 2], "the newest decision is the last, whatever the clock said"
    assert made["moves"] == [[None, 1, str(LOOP[0][2])], [1, 2, str(LATER)]]
    assert made["trained"] == [str(LOOP[0][2]), str(LATER)]
    assert made["waits"] is None
    for run, step, as_of in LOOP[len(RETRAIN) + 2 :]:
        site.step(run, run, step, str(as_of), AHEAD)
    assert not site.python("from tests.chaos import probe; probe.main()")["problems"]


def test_run_without_a_date_keeps_the_one_that_it_began_with(site: Site) -> None:
    began = site.step("retrain", "undated", "land", None, ("faketime", "-f", "+40d"))["as_of"]
    assert began == str((datetime.now(UTC) + timedelta(days=40)).date())
    assert site.step("retrain", "undated", "ingest", None, BACK)["as_of"] == began
    params = (site.workspace("retrain", "undated") / "params.yaml").read_text()
    assert f"as_of: {json.dumps(began)}" in params
