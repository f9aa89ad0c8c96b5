"""The model card: what a version is for, what it learnt from, what it is worth and where it comes from, on one page.

As Markdown and as HTML that needs no network. Everything but the words of docs/model-card.md is read from the records
of the version: its tags, the artifacts of its run, the gate's decisions. After Mitchell et al., "Model Cards for Model
Reporting" (2019), https://arxiv.org/abs/1810.03993.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines import lineage, registry, tracking
from pipelines.charts import square_chart
from pipelines.explain import explain
from pipelines.page import render
from pipelines.state import State

WORDS = Path("docs/model-card.md")
"""What no measurement tells: sections that begin with ``## ``, written by the project's people."""
FOLDER = "card"
METRICS = {
    "roc_auc": "ROC AUC",
    "log_loss": "Log loss",
    "brier": "Brier score",
    "calibration_error": "Calibration error",
    "pr_auc": "PR AUC",
}
DATA = ("ingest", "validate", "prepare")

Row = dict[str, str]


def keep(number: int, state: State) -> None:
    """Put the card of a version, as of now, with its training run: ``register`` does, and `decide` with its verdict."""
    found = facts(number, state)
    with TemporaryDirectory() as scratch:
        for kind, made in (("md", markdown(found)), ("html", html(found))):
            Path(scratch, f"v{number}.{kind}").write_text(made, encoding="utf-8")
        tracking.attach(found["run_id"], Path(scratch), FOLDER)


def facts(number: int, state: State) -> dict[str, Any]:
    """All that the card says of version ``number``; what was not kept with it is empty."""
    known, version = explain(number, state), registry.version(number)
    run_id = known["run_id"]
    judged = [made for made in known["decisions"] if made["record"]]
    rules = judged[-1]["record"]["rules"] if judged else []
    importance = _rows(run_id, "train/importance.csv")
    return {
        **{name: known[name] for name in ("model", "version", "digest", "kind", "run_id", "registered_at")},
        "as_of": known["data"]["as_of"],
        "windows": known["data"]["windows"],
        "refit": version.tags.get("ballast.refit") == "true",
        "words": _sections(_text(run_id, f"{FOLDER}/{WORDS.name}") or ""),
        "decision": {name: judged[-1][name] for name in ("verdict", "summary", "record_sha256")} if judged else None,
        "rules": rules,
        "fairness": [rule for rule in rules if rule["rule"].startswith("fairness")],
        "metrics": {
            name: value for key, value in known["metrics"].items() if (name := key.removeprefix("test_")) != key
        },
        "slices": _rows(run_id, "evaluate/slices.csv"),
        "calibration": _rows(run_id, "evaluate/calibration.csv"),
        "roc": _rows(run_id, "evaluate/roc.csv"),
        "importance": [{"feature": row["feature"], "importance": float(row["importance"])} for row in importance],
        "hashes": _hashes(lineage.records(version).stages),
        "lineage": _lineage(known, run_id),
    }


def html(found: Mapping[str, Any]) -> str:
    """The card as one page, with its plots."""
    charts = {
        "calibration": square_chart({"test": _floats(found["calibration"])}) if found["calibration"] else None,
        "roc": square_chart({"test": _floats(found["roc"])}, "fpr", "tpr") if found["roc"] else None,
    }
    most = max((row["importance"] for row in found["importance"]), default=0.0)
    return render("card.html", card=found, charts=charts, most=most, names=METRICS)


def markdown(found: Mapping[str, Any]) -> str:
    """The card for a terminal, a diff or a wiki; without the plots."""
    return render("card.md", card=found, names=METRICS)


def _text(run_id: str, name: str) -> str | None:
    content = tracking.attached(run_id, name)
    return None if content is None else content.decode()


def _rows(run_id: str, name: str) -> list[Row]:
    """The rows of a CSV file; none if it was not kept."""
    return list(csv.DictReader((_text(run_id, name) or "").splitlines()))


def _floats(rows: list[Row]) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items()} for row in rows]


def _sections(words: str) -> list[dict[str, Any]]:
    """The sections of a Markdown text, each with its heading and its blocks: a string, or a list of strings."""
    sections = []
    for part in f"\n{words}".split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        blocks = [_block(block) for block in body.split("\n\n") if block.strip()]
        sections.append({"heading": heading.strip(), "blocks": blocks, "text": body.strip()})
    return sections


def _block(text: str) -> str | list[str]:
    """A paragraph, or the items of a list."""
    text = text.strip()
    if not text.startswith("- "):
        return " ".join(text.split())
    return [" ".join(item.split()) for item in f"\n{text}".split("\n- ")[1:]]


def _hashes(stages: Mapping[str, Any]) -> dict[str, str]:
    """What the data stages put out, by the hash that dvc.lock has for it."""
    return {
        out["path"]: out["md5"]
        for name in DATA
        for out in stages.get(name, {}).get("outs", [])
        if not out["path"].endswith("result.json")
    }


def _lineage(known: Mapping[str, Any], run_id: str) -> dict[str, str]:
    started = [str(known["started_by"][key]) for key in ("kind", "reason", "actor") if known["started_by"].get(key)]
    environment = json.loads(_text(run_id, "environment.json") or "{}")
    here = {name: value for name, value in environment.items() if name != "recorded_by" and value is not None}
    lines = {
        "model": known["digest"],
        "code": f"commit {known['code']['commit'] or 'unknown'}",
        "data, settings and code by hash": f"dvc.lock {known['data']['lock'] or 'none'}",
        "started by": " · ".join(started),
        "environment": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in here.items()),
        "settings": ", ".join(f"{name} {value}" for name, value in sorted(known["params"].items())),
        "MLflow run": run_id,
    }
    return {name: value or "not recorded" for name, value in lines.items()}
