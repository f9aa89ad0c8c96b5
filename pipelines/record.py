"""The decision record: what the gate wrote down of one decision, as JSON for machines and Markdown for people.

It is known by the SHA-256 of its bytes. The copy that counts lies with the version's training run in MLflow, and
the state store remembers its hash: a record that the gate did not write is no record.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines import registry
from pipelines.errors import BallastError
from pipelines.files import sha256, whole_file, write_json

SCHEMA = "ballast.decision/1"
FOLDER = "decisions"


def keep(out: Path, facts: Mapping[str, Any]) -> str:
    """Write record.json and record.md to ``out`` and put both with the version; return the record's SHA-256."""
    write_json(out / "record.json", facts)
    digest = sha256(out / "record.json")
    with whole_file(out / "record.md") as part:
        part.write_text(markdown(facts), encoding="utf-8")
    with TemporaryDirectory() as scratch:
        for kind in ("json", "md"):
            shutil.copy(out / f"record.{kind}", Path(scratch) / f"{digest}.{kind}")
        registry.attach(facts["version"], Path(scratch), FOLDER)
    if facts["version"] != facts["champion"]["version"]:  # the champion's tags stay those of its promotion
        registry.set_tags(facts["version"], {"ballast.verdict": facts["verdict"], "ballast.record": digest})
    return digest


def fetch(version: int, digest: str) -> dict[str, Any]:
    """The record of this hash from the registry; raise BallastError if it is not there, changed, or another's."""
    content = registry.attached(version, f"{FOLDER}/{digest}.json")
    if content is None:
        raise BallastError(f"v{version} has no decision record {digest[:12]}. Run decide for it.")
    if (found := hashlib.sha256(content).hexdigest()) != digest:
        raise BallastError(f"The decision record {digest[:12]} of v{version} was changed (it is {found[:12]} now).")
    facts: dict[str, Any] = json.loads(content)
    if facts.get("schema") != SCHEMA:
        raise BallastError(f"The decision record {digest[:12]} is no {SCHEMA} (found {facts.get('schema')!r}).")
    if facts["version"] != version:
        raise BallastError(f"The decision record {digest[:12]} is of v{facts['version']}, not of v{version}.")
    return facts


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
    reasons = "\n".join(f"- {reason}" for reason in facts["reasons"])
    return f"# {facts['verdict'].upper()}: {challenger} {may} {place}\n\nAs of {facts['as_of']}, because:\n\n{reasons}"


def _rules(facts: Mapping[str, Any]) -> str:
    lines = ["| rule | measured | needed | | in words |", "|---|---|---|---|---|"]
    for rule in facts["rules"]:
        passed = "passed" if rule["passed"] else "**failed**"
        cells = (rule["rule"], _cell(rule["measured"]), _cell(rule["needed"]), passed, rule["words"])
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "## The rules\n\n" + "\n".join(lines)


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
    window = f"{test['start'][:10]} to {test['end'][:10]}"
    said = [f"{test['rows']:,} rows of {test['days']} days, {window}. Neither side was trained on them."]
    if test["left_out"]:
        said.append(f"{test['left_out']:,} more of the test window were left out: a side was trained on them.")
    if test["unmatched"]:
        said.append(f"{test['unmatched']:,} more were left out: the champion's own preparation does not have them.")
    said.append(f"SHA-256 of their keys and labels: `{test['sha256']}`.")
    return "## The test rows\n\n" + " ".join(said)


def _origin(facts: Mapping[str, Any]) -> str:
    trigger = facts["trigger"]
    asked = " · ".join(str(trigger[name]) for name in ("kind", "reason") if trigger.get(name))
    settings = ", ".join(f"{name} {value}" for name, value in facts["params"].items())
    lines = {
        "asked by": asked,
        "decided": f"{facts['decided_at']} by {facts['actor']}",
        "challenger": f"v{facts['version']}, model `{facts['digest']}`",
        "champion": f"v{facts['champion']['version']}, model `{facts['champion']['digest']}`"
        if facts["champion"]["version"]
        else "none",
        "ledger": f"head `{facts['champion']['ledger_head']}`",
        "code": f"commit `{facts['commit']}`",
        "data": f"dvc.lock `{facts['lock'] or 'none'}`",
        "settings of the gate": settings,
    }
    return "## Where it comes from\n\n" + "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _cell(value: float | str | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
