"""What comes in at the alert bridge: what it must look like, which run it names, and whether it may start that."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, StringConstraints

from pipelines import params, retraining
from pipelines.errors import BallastError, TryAgain, exit_with
from pipelines.files import canonical_json
from pipelines.places import ROOT
from pipelines.state import Alert, Inbox, State, today

ACTIONS = ("retrain", "monitor", "rollback", "freeze")
MOST_ALERTS = 1000  # in one delivery
MOST_WAITING = 1000  # in the inbox, beyond which senders are asked to come again
MOST_CHARACTERS = 32_768  # of what a run gets to know of its alert
LEAST_REASON = 3  # characters: `rollback` takes no shorter one

# No NUL anywhere: PostgreSQL's JSONB, where Airflow keeps a run's conf, cannot hold one.
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]
Text = Annotated[str, StringConstraints(max_length=4000, pattern=r"^[^\x00]*$")]
Words = Annotated[dict[Name, Text], Field(max_length=64)]


class Firing(BaseModel):
    """One alert of Alertmanager's; what else it says is not read."""

    status: Literal["firing", "resolved"]
    labels: Words
    annotations: Words = Field(default_factory=dict)
    startsAt: AwareDatetime  # noqa: N815 - Alertmanager's name
    fingerprint: Name
    generatorURL: Text = ""  # noqa: N815


class Delivery(BaseModel):
    """Alertmanager's webhook, payload version 4. The version is the contract: new fields beside these are ignored."""

    version: Literal["4"]
    receiver: Text = ""
    alerts: list[Firing] = Field(max_length=MOST_ALERTS)


class Trigger(BaseModel):
    """What any other sender posts: a CI job, a data vendor, cron. The same source and key is the same request."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["retrain", "monitor", "rollback", "freeze"]
    source: Name
    key: Name
    reason: Annotated[
        str, StringConstraints(min_length=LEAST_REASON, max_length=1000, pattern=r"^[^\x00]*[^\x00\s][^\x00]*$")
    ]
    as_of: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    labels: Words = Field(default_factory=dict)
    annotations: Words = Field(default_factory=dict)


class Pace(params.Params):
    """What of the ``policy`` section alerts share with the monitor."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    class Budget(BaseModel):
        """At most so many retrainings in so many days."""

        retrainings: PositiveInt
        days: PositiveInt

    cooldown_days: NonNegativeInt
    budget: Budget


def alert_id(fingerprint: str, starts_at: datetime) -> str:
    """The run of an alert, to the second. A fingerprint that Airflow would not have in an id is hashed."""
    fits = re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", fingerprint)
    name = fingerprint if fits else "~" + _hash(fingerprint)
    try:
        at = starts_at.astimezone(UTC)
    except OverflowError:
        raise BallastError(f"startsAt {starts_at.isoformat()} is no time in UTC. Send one of this era.") from None
    return f"alert-{name}-{at.year:04}{at:%m%dT%H%M%SZ}"


def trigger_id(source: str, key: str) -> str:
    """The run of a generic sender's request."""
    return f"trigger-{_hash([source, key])}"


_TOO_LONG = f"labels and annotations have more than {MOST_CHARACTERS} characters. Shorten them."


def take(state: State, delivery: Delivery, actions: frozenset[str]) -> list[dict[str, str]]:
    """Take in each alert of a delivery; return its id, outcome and words."""
    return [_take_firing(state, firing, delivery.receiver, actions) for firing in delivery.alerts]


def take_trigger(state: State, trigger: Trigger, actions: frozenset[str]) -> dict[str, str]:
    """Take in what a generic sender asks for."""
    run_id = trigger_id(trigger.source, trigger.key)
    told = trigger.model_dump(exclude={"action", "as_of"})
    if len(canonical_json(told)) > MOST_CHARACTERS:
        return _said(run_id, "refused_size", _TOO_LONG)
    return _fire(state, run_id, trigger.action, told, trigger.as_of, actions)


def _take_firing(state: State, firing: Firing, receiver: str, actions: frozenset[str]) -> dict[str, str]:
    action = firing.labels.get("ballast_action")
    if action is None:
        return _said(firing.fingerprint, "ignored", "it has no label ballast_action")
    try:
        run_id = alert_id(firing.fingerprint, firing.startsAt)
    except BallastError as error:
        return _said(firing.fingerprint, "refused_time", str(error))
    notes, name = firing.annotations, firing.labels.get("alertname", firing.fingerprint)
    told = {**firing.model_dump(mode="json", exclude={"status"}), "receiver": receiver}
    said = (notes.get("summary") or notes.get("description") or "").strip()
    told["reason"] = said if len(said) >= LEAST_REASON else f"alert {name}"
    if len(canonical_json(told)) > MOST_CHARACTERS:
        return _said(run_id, "refused_size", _TOO_LONG)
    if firing.status == "resolved" and action in actions:
        found = state.withdraw_alert(Alert(run_id, action, told))
        return _said(run_id, "withdrawn" if found.status == "withdrawn" else "known", found.outcome or "")
    as_of = notes.get("ballast_as_of") or firing.labels.get("ballast_as_of")
    return _fire(state, run_id, action, told, as_of, actions)


def _fire(
    state: State, run_id: str, action: str, told: dict[str, Any], as_of: str | None, actions: frozenset[str]
) -> dict[str, str]:
    if action not in actions:
        allowed = ", ".join(sorted(actions)) or "none"
        return _said(run_id, "refused_action", f"{action!r} is not allowed here ({allowed}): BALLAST_BRIDGE_ACTIONS")
    try:
        day = date.fromisoformat(as_of) if as_of else today(state)
    except ValueError:
        return _said(run_id, "refused_as_of", f"the as-of date must look like 2013-06-01 (found {as_of!r})")
    if day > (now := datetime.now(UTC).date()):
        return _said(run_id, "refused_as_of", f"the as-of date {day} lies in the future (it is {now})")
    alert = Alert(run_id, action, {**told, "as_of": day.isoformat()})

    def against() -> str | None:
        inbox = state.inbox()
        if inbox.waiting >= MOST_WAITING:
            raise TryAgain(f"{inbox.waiting} alerts wait for Airflow, at most {MOST_WAITING}. Send it again later.")
        return _against(state, inbox, day) if action == "retrain" else None

    found, new = state.take_alert(alert, against)
    if found.status == "held":
        return _said(run_id, "held", found.outcome or "")
    return _said(run_id, "accepted" if new else "known", f"{action} as of {day}" if new else f"it is {found.status}")


def _against(state: State, inbox: Inbox, as_of: date) -> str | None:
    """Why no retraining may be asked for now. The breaker is the run's own affair: its `admit` pauses."""
    pace = params.load(ROOT / "params.yaml", "policy", Pace)
    ahead = [f"{inbox.retraining} waits already"] if inbox.retraining else []
    running = retraining.under_way(state)
    busy = [f"under way: {retraining.words(running)}"] if running and not ahead else []
    trained, budget = retraining.trained(state), pace.budget
    spent = retraining.spent(trained, as_of, pace.cooldown_days, budget.retrainings, budget.days)
    return "; ".join([*ahead, *busy, *spent]) or None


def _said(run_id: str, outcome: str, words: str) -> dict[str, str]:
    return {"id": run_id, "outcome": outcome, "words": words}


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def main() -> None:
    """Print the published schema of what a generic sender posts."""
    print(json.dumps(Trigger.model_json_schema(), indent=2))


if __name__ == "__main__":
    exit_with(main)
