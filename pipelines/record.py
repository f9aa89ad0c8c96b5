"""The decision record: what the gate wrote down of one decision, as JSON for machines and Markdown for people.

It is known by the SHA-256 of its bytes. The copy that counts lies with the version's training run in MLflow, and
the state store remembers its hash: a record that the gate did not write is no record. ``Record`` is its form, published
as docs/decision-record.schema.json by ``python -m pipelines.record``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipelines import registry
from pipelines.errors import BallastError, exit_with
from pipelines.files import sha256, whole_file, write_json

if TYPE_CHECKING:
    from pipelines.state import State

SCHEMA = "ballast.decision/2"
FOLDER = "decisions"

Severity = Literal["block", "warn"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(_Part):
    """What one rule, or one check that no setting switches off, found."""

    rule: str = Field(description="Its kind, and what it is about: `ceiling log_loss`, `slices carrier`, `test rows`.")
    severity: Severity = Field(description="What it does where it did not pass: refuse the challenger, or warn.")
    measured: int | float | str | None = Field(description="None where there was nothing to measure.")
    needed: int | float | str | None = Field(description="The bound that it was held against.")
    passed: bool
    words: str = Field(description="The same for a person.")


class Champion(_Part):
    """The champion that the challenger was compared with: promotion asks that it still is the one."""

    version: int | None = Field(description="None if there was none.")
    digest: str | None
    ledger_head: str = Field(description="The hash of the ledger's last move of the champion when the gate decided.")


class Rows(_Part):
    """The rows that both sides were judged on."""

    rows: int
    days: int
    start: str | None
    end: str | None
    sha256: str = Field(description="Over their keys and labels, by time.")
    left_out: int = Field(description="Rows of the test window that a side was trained on, by its windows or by key.")
    left_out_by_key: int = Field(description="Those among them that only their keys gave away.")
    unmatched: int = Field(description="Rows that the champion's own preparation does not have; left out as well.")
    checked: dict[Literal["challenger", "champion"], Literal["windows", "windows and keys"]] = Field(
        description="How it was made sure that a side was not trained on them."
    )


class Alert(_Part):
    """The alert that started the retraining."""

    name: str | None = Field(description="Its label alertname; the source of what came by /trigger.")
    fingerprint: str | None = Field(description="Alertmanager's; the key of what came by /trigger.")
    started_at: str | None = Field(description="Since when it fires; None of what came by /trigger.")
    summary: str | None
    labels: dict[str, str]


class Record(_Part):
    """One decision of the gate: all that is needed to judge it, and to see whether it still holds."""

    schema_: Literal["ballast.decision/2"] = Field(alias="schema")
    verdict: Literal["promote", "refuse"]
    summary: str = Field(description="One line for a person.")
    reasons: list[str] = Field(description="Why it was refused, or what the challenger has over the champion.")
    warnings: list[str] = Field(description="The words of each rule that did not pass and only warns.")
    model: str
    version: int = Field(description="The challenger.")
    digest: str = Field(description="Of the challenger's model.")
    champion: Champion
    as_of: str = Field(description="The date up to which data was seen.")
    test: Rows | None = Field(description="None if a side could not be scored at all.")
    rules: list[Finding] = Field(description="The checks that no setting switches off, then the rules of params.yaml.")
    metrics: dict[Literal["challenger", "champion"], dict[str, float | None]] = Field(
        description="Of both sides on the same rows; None where the rows do not define a metric."
    )
    commit: str | None = Field(description="Of the code that trained the challenger.")
    lock: str = Field(description="The SHA-256 of its dvc.lock: every hash of data, settings and code.")
    trigger: dict[str, Any] = Field(description="Who or what asked: its kind, its reason, and what came with it.")
    alert: Alert | None = Field(default=None, description="None if no alert asked.")
    actor: str = Field(description="The DAG run, as `dag/run`, or the user.")
    params: dict[str, Any] = Field(description="The section `decide` of params.yaml.")
    decided_at: str


def keep(out: Path, facts: Mapping[str, Any]) -> str:
    """Write record.json and record.md to ``out`` and put both with the version; return the record's SHA-256."""
    Record.model_validate(facts)
    write_json(out / "record.json", facts)
    digest = sha256(out / "record.json")
    with whole_file(out / "record.md") as part:
        part.write_text(markdown(facts), encoding="utf-8")
    with TemporaryDirectory() as scratch:
        for kind in ("json", "md"):
            shutil.copy(out / f"record.{kind}", Path(scratch) / f"{digest}.{kind}")
        registry.attach(facts["version"], Path(scratch), FOLDER)
    if facts["version"] != facts["champion"]["version"]:  # the champion's tags stay those of its promotion
        warned = str(len(facts["warnings"]))
        tags = {"ballast.verdict": facts["verdict"], "ballast.record": digest, "ballast.warnings": warned}
        registry.set_tags(facts["version"], tags)
    return digest


def fetch(version: int, digest: str) -> dict[str, Any]:
    """The record of this hash from the registry; raise BallastError if it is not there, changed, or another's.

    One that an older Ballast wrote is given in today's form, with what it does not know left at what was so then.
    """
    content = registry.attached(version, f"{FOLDER}/{digest}.json")
    if content is None:
        raise BallastError(f"v{version} has no decision record {digest[:12]}. Run decide for it.")
    if (found := hashlib.sha256(content).hexdigest()) != digest:
        raise BallastError(f"The decision record {digest[:12]} of v{version} was changed (it is {found[:12]} now).")
    facts: dict[str, Any] = json.loads(content)
    if facts.get("schema") == "ballast.decision/1":
        facts = _from_1(facts)
    if facts.get("schema") != SCHEMA:
        raise BallastError(
            f"The decision record {digest[:12]} is no {SCHEMA} (found {facts.get('schema')!r}). "
            "A newer Ballast wrote it, or none."
        )
    if facts["version"] != version:
        raise BallastError(f"The decision record {digest[:12]} is of v{facts['version']}, not of v{version}.")
    return facts


def holding(version: int, digest: str, state: State) -> dict[str, Any]:
    """The record of this hash, if it is the gate's own, of this version and model, and passing; else BallastError."""
    if state.decision(digest) is None:
        raise BallastError(
            f"The gate has made no decision {digest[:12]}: the record is forged, or of another state store. "
            f"Run decide for v{version}."
        )
    facts = fetch(version, digest)
    if (found := registry.version(version).digest) != facts["digest"]:
        raise BallastError(
            f"The record is of model {facts['digest'][:12]}, and v{version} is {found[:12]} now. Run decide again."
        )
    if facts["verdict"] != "promote":
        raise BallastError(f"The gate refused v{version}: {'; '.join(facts['reasons'])}. A refused version stays out.")
    return facts


def outdated(facts: Mapping[str, Any], state: State) -> str:
    """What to say of a record whose champion has moved since the decision."""
    return (
        f"v{facts['version']} was compared with {_name(facts['champion']['version'])}, and since then the champion has "
        f"moved (it is {_name(state.champion())}). Run decide again: it compares with the champion of today."
    )


def _name(version: int | None) -> str:
    return f"v{version}" if version else "no champion"


def _from_1(facts: dict[str, Any]) -> dict[str, Any]:
    """Every rule of the first form blocked, and training rows were told by their windows alone."""
    sides = ["challenger"] + (["champion"] if facts["champion"]["version"] else [])
    checked = {"left_out_by_key": 0, "checked": dict.fromkeys(sides, "windows")}
    return {
        **facts,
        "schema": SCHEMA,
        "warnings": [],
        "test": {**facts["test"], **checked} if facts["test"] else None,
        "rules": [{**rule, "severity": "block"} for rule in facts["rules"]],
    }


def rows_sha256(keys: Iterable[str], labels: Iterable[int]) -> str:
    """A hash of rows by key and label, in their order: equal hashes mean judged on the same rows."""
    lines = "".join(f"{key}\t{int(label)}\n" for key, label in zip(keys, labels, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def markdown(facts: Mapping[str, Any]) -> str:
    """The record for someone who was not there."""
    parts = [_headline(facts), _rules(facts), _metrics(facts), _rows(facts), _origin(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(facts: Mapping[str, Any]) -> str:
    challenger, champion = f"{facts['model']} v{facts['version']}", facts["champion"]["version"]
    place = f"the place of v{champion}" if champion else "the place that no model had yet"
    may = "may take" if facts["verdict"] == "promote" else "does not take"
    said = f"# {facts['verdict'].upper()}: {challenger} {may} {place}\n\nAs of {facts['as_of']}, because:\n\n"
    said += _listed(facts["reasons"])
    if facts["warnings"]:
        said += f"\n\nWarnings, which alone refuse nothing:\n\n{_listed(facts['warnings'])}"
    return said


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _rules(facts: Mapping[str, Any]) -> str:
    lines = ["| rule | measured | needed | | in words |", "|---|---|---|---|---|"]
    for rule in facts["rules"]:
        cells = (rule["rule"], _cell(rule["measured"]), _cell(rule["needed"]), _outcome(rule), rule["words"])
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    bounds = (
        "Of `better` and `slices`, measured is the bound that is sure; the words say the mean ± its standard error."
    )
    return "## The rules\n\n" + "\n".join(lines) + f"\n\n{bounds}"


def _outcome(rule: Mapping[str, Any]) -> str:
    if rule["passed"]:
        return "passed"
    return "**blocked**" if rule["severity"] == "block" else "**warned**"


def _metrics(facts: Mapping[str, Any]) -> str:
    sides = facts["metrics"]
    if not sides:
        return ""
    lines = ["| | " + " | ".join(sides) + " |", "|---|" + "---|" * len(sides)]
    for name in sides["challenger"]:
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(_cell(side[name]) for side in sides.values()) + " |")
    return "## Side by side, on the same rows\n\n" + "\n".join(lines)


def _rows(facts: Mapping[str, Any]) -> str:
    test = facts["test"]
    if not test or not test["rows"]:
        return ""
    said = [f"{test['rows']:,} rows of {test['days']} days, {test['start'][:10]} to {test['end'][:10]}."]
    ways = ", ".join(f"by {way} for the {side}" for side, way in test["checked"].items())
    said.append(f"No side was trained on any of them: checked {ways}.")
    if test["left_out"]:
        keys = f" ({test['left_out_by_key']:,} of them known by their keys alone)" if test["left_out_by_key"] else ""
        said.append(f"{test['left_out']:,} more of the test window were left out: a side was trained on them{keys}.")
    if test["unmatched"]:
        said.append(f"{test['unmatched']:,} more were left out: the champion's own preparation does not have them.")
    said.append(f"SHA-256 of their keys and labels: `{test['sha256']}`.")
    return "## The test rows\n\n" + " ".join(said)


def _origin(facts: Mapping[str, Any]) -> str:
    settings = {name: value for name, value in facts["params"].items() if name != "rules"}
    alert = facts.get("alert")
    lines = {
        "asked by": _asked(facts["trigger"], apart="alert" if alert else None),
        **({"alert": alert_words(alert)} if alert else {}),
        "decided": f"{facts['decided_at']} by {facts['actor']}",
        "challenger": f"v{facts['version']}, model `{facts['digest']}`",
        "champion": f"v{facts['champion']['version']}, model `{facts['champion']['digest']}`"
        if facts["champion"]["version"]
        else "none",
        "ledger": f"head `{facts['champion']['ledger_head']}`",
        "code": f"commit `{facts['commit']}`",
        "data": f"dvc.lock `{facts['lock'] or 'none'}`",
        "settings of the gate": ", ".join(f"{name} {value}" for name, value in settings.items()) or "none",
    }
    return "## Where it comes from\n\n" + _listed(f"{name}: {value}" for name, value in lines.items())


def alert_words(alert: Mapping[str, Any]) -> str:
    """An alert in one line; its labels last."""
    since = f"since {alert['started_at']}" if alert["started_at"] else None
    labels = ", ".join(f"{name}={value}" for name, value in sorted(alert["labels"].items()))
    mark = f"fingerprint {alert['fingerprint']}" if alert["fingerprint"] else None
    parts = (alert["name"], since, alert["summary"], mark, labels)
    return " · ".join(part for part in parts if part)


def _asked(trigger: Mapping[str, Any], apart: str | None) -> str:
    """The kind and the reason first; then what came with it, but for what is said ``apart``."""
    if apart:
        trigger = {**trigger, "conf": {name: value for name, value in trigger["conf"].items() if name != apart}}
    first = [str(trigger[name]) for name in ("kind", "reason") if trigger.get(name)]
    rest = [f"{name} {_plain(value)}" for name, value in trigger.items() if name not in ("kind", "reason") and value]
    return " · ".join([*first, *rest])


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _cell(value: float | str | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def main() -> None:
    """Print the published schema."""
    print(json.dumps(Record.model_json_schema(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    exit_with(main)
