"""Is it time to retrain? The monitor's verdict in, one of retrain, wait and hold out, with the reasons in numbers.

retrain   the champion is measurably worse, or more of its inputs have moved than it can be trusted with
wait      nothing says so
hold      retraining could not help: there is no champion, the batch is broken at its source, or the breaker is open
"""

from __future__ import annotations

import argparse
import logging
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines import page, params, places, provenance, registry, stage
from pipelines.breaker import BreakerParams, read
from pipelines.errors import BallastError, exit_with
from pipelines.files import read_json
from pipelines.params import Params
from pipelines.state import State

log = logging.getLogger(__name__)


class PolicyParams(Params):
    """The ``policy`` section of params.yaml."""

    min_labelled_rows: int = Field(ge=1)
    max_log_loss_rise: float = Field(ge=0)
    max_drifted_share: float = Field(ge=0, le=1)


def policy(verdict: dict[str, Any], settings: PolicyParams, paused: str | None = None) -> dict[str, Any]:
    """Decide by drift's ``verdict``; the reasons are those of the decision. ``paused``: why retraining is, if so."""
    found = {
        "as_of": verdict["end"],
        "interval": f"{verdict['start']}..{verdict['end']}",
        "version": verdict["version"],
    }
    if obstacle := _obstacle(verdict):
        return _decision("hold", [obstacle], found)
    judged = [_performance(verdict["performance"], settings), _drift(verdict["inputs"], settings)]
    if paused:
        return _decision("hold", [paused, *(reason for _, reason in judged)], found)
    if reasons := [reason for fires, reason in judged if fires]:
        return _decision("retrain", reasons, found)
    return _decision("wait", [reason for _, reason in judged], found)


def _obstacle(verdict: dict[str, Any]) -> str | None:
    """Why retraining could not help, if so. Drift of broken data says nothing: it is mended at its source."""
    if verdict["version"] is None:
        return "no champion yet: retrain_scheduled trains the first"
    data = verdict["data"]
    if data["rejected"]:
        return "data: validation rejected it; mend it at its source"
    if data["empty"]:
        return (
            f"data: {', '.join(data['empty'])} came empty; mend it at its source, retraining would learn to do without"
        )
    return None


def _performance(found: dict[str, Any], settings: PolicyParams) -> tuple[bool, str]:
    """Worse than its bound, and by more than its uncertainty explains."""
    rows, least = found["labelled_rows"], settings.min_labelled_rows
    if not found["measured"] or rows < least:
        return False, f"performance: not judged, {rows:,} labelled rows of at least {least:,}"
    bound = f"bound {settings.max_log_loss_rise:g}"
    change = f"log loss {'worse' if found['rise'] > 0 else 'better'} by {abs(found['rise']):.3f}"
    if found["standard_error"] is None:
        return False, f"performance: {change}, {bound}, from one day: two at least are needed to judge"
    reason = f"performance: {change} ± {found['standard_error']:.3f}, {bound}"
    above = found["rise"] > settings.max_log_loss_rise
    if above and not found["worse"]:
        reason += f", but within {found['standard_errors']:g} standard errors"
    return above and found["worse"], reason


def _drift(found: dict[str, Any], settings: PolicyParams) -> tuple[bool, str]:
    if found["share"] is None or found["judged"] * 2 < len(found["columns"]):
        return False, f"drift: not judged, {found['judged']} of {len(found['columns'])} columns could be measured"
    moved = f"{len(found['moved_columns'])} of {found['judged']} columns moved"
    reason = f"drift: {moved} ({found['share']:.0%}), bound {settings.max_drifted_share:.0%}"
    return found["share"] > settings.max_drifted_share, reason


def _decision(verdict: str, reasons: list[str], found: dict[str, Any]) -> dict[str, Any]:
    return {"verdict": verdict, "reasons": reasons, **found, "summary": " · ".join([verdict.upper(), *reasons])}


def _attach(version: int | None, folder: Path) -> dict[str, str]:
    """Put the page with the champion's MLflow run, and return which that is.

    The page is evidence, kept here already: MLflow away is no failure.
    """
    if version is None:
        return {}
    try:
        return registry.attach(version, folder, f"monitor/{folder.name}")
    except BallastError as error:
        log.warning("The page of %s is not with version %d in MLflow: %s", folder.name, version, error)
        return {}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipelines.policy")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--drift", type=Path, default=Path("data/drift/verdict.json"))
    parser.add_argument("--out", type=Path, default=Path("data/policy"))
    return parser.parse_args()


def main() -> None:
    """Decide, then lay out the page of this window and the index of all."""
    options = _options()
    verdict = read_json(options.drift)
    breaker = read(State(), params.load(options.params, "breaker", BreakerParams).refusals)
    paused = breaker.words if breaker.stops(provenance.data()) else None
    decision = policy(verdict, params.load(options.params, "policy", PolicyParams), paused)
    reports = places.var() / "reports"
    folder = page.publish(reports, verdict, decision, options.drift.parent / "report.html")
    run = _attach(verdict["version"], folder)
    State().advance_clock(date.fromisoformat(decision["as_of"]))
    where = (folder / "index.html").relative_to(places.var()).as_posix()
    stage.finish("policy", options.out, {**decision, **run, "page": where})


if __name__ == "__main__":
    exit_with(main)
