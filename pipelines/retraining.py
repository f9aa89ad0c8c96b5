"""The retraining under way: the policy asks for it, its run begins it at `admit`, the gate ends it.

So nothing is asked for twice, and the next window waits for the champion that comes of it. What has been asked for and
does not begin, or has begun and does not end, counts as dead after a while: its event was lost, or its run failed and
nobody let it go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

from pipelines import provenance
from pipelines.state import Retraining, State, frozen, moves

# Its event starts a run within seconds, unless retrain_on_drift is paused; in it, land, ingest and validate come before
# `admit`, each half an hour at most and tried again.
BEGINS_WITHIN = timedelta(hours=3)
ENDS_WITHIN = timedelta(hours=24)  # train may take six hours, and three more tries of them
PROMOTES_WITHIN = timedelta(minutes=15)  # promote is started and done within seconds; its retries take minutes


def begin(state: State, as_of: date) -> None:
    """Note that this run retrains; whoever asked for it by an event is named in the event."""
    trigger = provenance.trigger()
    asked_by = [event["asked_by"] for event in trigger.get("events") or () if event.get("asked_by")]
    state.begin_retraining(provenance.actor(), as_of, str(trigger.get("kind")), asked_by)


def under_way(state: State, apart_from: str = "") -> Retraining | None:
    """The retraining that has not ended and is not dead, if there is one; what ``apart_from`` asked for is none."""
    found = [one for one in state.retrainings() if not one.ended_at and not is_dead(one)]
    return next((one for one in found if one.asked_by != apart_from), None)


def is_dead(retraining: Retraining) -> bool:
    """Whether one that is under way should have begun, or ended, long ago."""
    since, limit = _since(retraining)
    return _ago(since) > limit


def trained(state: State, apart_from: str = "") -> list[date]:
    """The as-of dates of the retrainings that began and came to the gate, or still may; the earliest first."""
    lost = ("paused", "failed")
    found = [one for one in state.retrainings() if one.run and one.outcome not in lost and one.asked_by != apart_from]
    return sorted(date.fromisoformat(one.as_of) for one in found)


def spent(trained: Sequence[date], as_of: date, cooldown_days: int, most: int, within_days: int) -> list[str]:
    """The cooldown and the budget, as far as they stand against a retraining as of this date."""
    found = []
    if trained and (as_of - trained[-1]).days < cooldown_days:
        until = trained[-1] + timedelta(days=cooldown_days)
        found.append(f"cooldown: retrained as of {trained[-1]}, none is asked for before {until}")
    lately = [day for day in trained if (as_of - day).days < within_days]
    if len(lately) >= most:
        found.append(f"budget: {len(lately)} retrainings within {within_days} days, at most {most}")
    return found


def words(retraining: Retraining) -> str:
    """Which one it is, in one line."""
    since, _ = _since(retraining)
    who = f"{retraining.run} retrains" if retraining.run else f"{retraining.asked_by} has asked for a retraining"
    return f"{who} as of {retraining.as_of}, since {since[:16].replace('T', ' ')} UTC"


def unpromoted(state: State) -> str | None:
    """Why the gate's last decision has yet to show in the champion, if so.

    Not so where it refused, where it was answered in the ledger or waits for a person, while promotion is frozen, and
    where nothing has come of it in PROMOTES_WITHIN.
    """
    made, ledger = state.decisions()[-1:], state.ledger()
    if not made or made[0].verdict != "promote" or frozen(ledger):
        return None
    said = [entry for entry in ledger if entry.record_sha256 == made[0].record_sha256][-1:]
    answered = bool(said) and said[0].kind != "approve"  # after an approval the promotion is still to come
    moved = any(entry.at > made[0].decided_at for entry in moves(ledger))
    if answered or moved or _ago(said[0].at if said else made[0].decided_at) > PROMOTES_WITHIN:
        return None
    return f"v{made[0].version} has passed the gate and is about to be promoted"


def _since(retraining: Retraining) -> tuple[str, timedelta]:
    """From when on it has waited for its next step, and how long that may take."""
    if retraining.began_at:
        return retraining.began_at, ENDS_WITHIN
    return retraining.asked_at, BEGINS_WITHIN


def _ago(at: str) -> timedelta:
    return datetime.now(UTC) - datetime.fromisoformat(at)
