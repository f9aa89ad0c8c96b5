"""The alerts: promtool holds them to their tests, and what they ask is held to what is exposed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from pipelines import cli
from pipelines.alerts import ACTIONS
from pipelines.places import ROOT

MONITORING = ROOT / "monitoring"
RULES = MONITORING / "prometheus" / "rules"
OWN = {"job", "instance"}  # Prometheus' own
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is missing (package prometheus)")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in load(RULES / "ballast.yml")["groups"] for rule in group["rules"]}


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def queries() -> Iterator[tuple[str, str]]:
    """Everything that is asked of Prometheus, and by whom."""
    for name, rule in alerts().items():
        yield name, rule["expr"]
        for words in rule["annotations"].values():
            yield from ((name, query) for query in re.findall(r'query \(printf "([^"]+)"', words))
    for page in sorted((MONITORING / "grafana" / "dashboards").glob("*.json")):
        yield from ((page.name, query) for query in _asked(json.loads(page.read_text(encoding="utf-8"))))


def _asked(part: Any) -> Iterator[str]:
    """The queries of a dashboard: of its panels, annotations and variables, wherever they stand."""
    if isinstance(part, dict):
        yield from (found for key in ("expr", "definition") if isinstance(found := part.get(key), str))
    if isinstance(part, dict | list):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _asked(inner)


def unknown(query: str, exposed: Mapping[str, Any]) -> list[str]:
    """The metrics and labels of a query that nobody exposes."""
    used = re.findall(r"\b(ballast_\w+)(?:\{([^}]*)\})?", query)
    known = OWN.union(*(exposed[name].labels for name, _ in used if name in exposed))
    faults = [name for name, _ in used if name not in exposed]
    for name, selector in used:
        labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)
        faults += [
            f"{name}{{{label}}}" for label in labels if name in exposed and label not in exposed[name].labels | OWN
        ]
    for listed in re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", query):
        faults += [label for label in re.findall(r"\w+", listed) if label not in known]
    return faults


def test_queries_ask_for_what_is_exposed(exposed):
    asked = list(queries())
    assert {found for by, query in asked for found in [(by, fault) for fault in unknown(query, exposed)]} == set()
    assert set(alerts()) <= {by for by, _ in asked}


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("ballast_no_such_thing > 0", "ballast_no_such_thing"),
        ('ballast_dag_paused{dag="monitor"} == 1', "ballast_dag_paused{dag}"),
        ("sum by (dag, instance) (ballast_dag_paused)", "dag"),
    ],
)
def test_unknown_metric_or_label_is_found(exposed, query, fault):
    assert unknown(query, exposed) == [fault]


def test_dashboards_are_two_and_their_panels_ask_of_the_provisioned_source():
    found = {page.stem: json.loads(page.read_text()) for page in (MONITORING / "grafana" / "dashboards").glob("*.json")}
    assert {name: page["uid"] for name, page in found.items()} == {
        name: name for name in ("ballast-model", "ballast-loop")
    }
    (source,) = load(MONITORING / "grafana" / "provisioning" / "datasources" / "ballast.yml")["datasources"]
    for page in found.values():
        panels = [panel for panel in page["panels"] if panel["type"] != "row"]
        assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
        assert all(panel["title"] and [one["expr"] for one in panel["targets"]] for panel in panels)
        assert len({panel["id"] for panel in page["panels"]}) == len(page["panels"])
        assert overlapping(panels) == []


def overlapping(panels: list[Any]) -> list[str]:
    """Panels that lie on one another."""
    taken: set[tuple[int, int]] = set()
    found = []
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        found += [panel["title"]] if cells & taken or at["x"] + at["w"] > 24 else []
        taken |= cells
    return found


@pytest.mark.parametrize("name", alerts())
def test_alert_says_how_urgent_it_is_what_is_wrong_and_where_to_read_on(name):
    rule = alerts()[name]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["labels"].get("ballast_action", "retrain") in ACTIONS
    assert rule["annotations"]["summary"] and rule["annotations"]["description"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == name.lower()
    assert anchor in slugs(ROOT / page)


def test_alerts_that_retrain_are_those_that_retraining_mends():
    asked = {
        name: rule["labels"]["ballast_action"] for name, rule in alerts().items() if "ballast_action" in rule["labels"]
    }
    retrain = dict.fromkeys(("BallastModelWorse", "BallastModelEstimatedWorse", "BallastDriftSustained"), "retrain")
    assert asked == retrain | {"BallastMonitorNotRun": "monitor"}


@pytest.mark.parametrize("name", alerts())
def test_alert_has_a_test_of_when_it_fires_and_when_not(name):
    tests = [one for group in load(RULES / "ballast_test.yml")["tests"] for one in group["alert_rule_test"]]
    mine = [one["exp_alerts"] for one in tests if one["alertname"] == name]
    assert [] in mine
    assert any(mine)


@needs_promtool
def test_promtool_finds_the_settings_whole():
    done = subprocess.run(
        ["promtool", "check", "config", MONITORING / "prometheus" / "prometheus.yml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_finds_that_alerts_fire_when_they_should():
    done = subprocess.run(
        ["promtool", "test", "rules", RULES / "ballast_test.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_runbook_has_a_section_of_each_alert_and_commands_that_there_are():
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.M) == list(alerts())
    commands = set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"\bballast ([a-z]+)\b", text)) <= commands
