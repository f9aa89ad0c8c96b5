from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import Project

from pipelines import card, registry
from pipelines.state import State

WORDS = """
## Intended use

To see whether an event
is <late>.

## Limits

- Of one year,
  2013.
- Not for people.
"""


@pytest.fixture
def registered(project: Project) -> Project:
    """A project with v1, all of whose evidence is there."""
    data = project.root / "data"
    project.train(learned=46, more={"refit": True})
    trained = json.loads((data / "train" / "result.json").read_text())
    (data / "train" / "result.json").write_text(json.dumps({**trained, "refit": True}))
    (data / "train" / "importance.csv").write_text("feature,importance,std\nx,0.2,0.01\nc,-0.001,0.0\n")
    slices = "column,value,rows,label_rate,roc_auc,log_loss,brier\nc,a,590,0.51,0.8,0.5,0.2\nc,(others),9,1.0,,,\n"
    (data / "evaluate" / "slices.csv").write_text(slices)
    (data / "evaluate" / "calibration.csv").write_text("predicted,observed,rows\n0.1,0.12,300\n0.7,0.66,300\n")
    (data / "evaluate" / "roc.csv").write_text("fpr,tpr\n0.0,0.0\n0.2,0.7\n1.0,1.0\n")
    outs = [{"path": "data/ingest/tables", "md5": "d1.dir"}, {"path": "data/ingest/result.json", "md5": "d2"}]
    (project.root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"ingest": {"outs": outs}}}))
    (project.root / "docs").mkdir()
    (project.root / "docs" / "model-card.md").write_text(WORDS)
    project.register()
    return project


def kept(kind: str) -> str:
    content = registry.attached(1, f"card/v1.{kind}")
    assert content
    return content.decode()


def test_card_says_what_is_known_before_the_gate_has_judged(registered: Project) -> None:
    made = kept("md")
    assert made == card.markdown(card.facts(1, State()))
    assert made.startswith("# late v1\n\nhgb, refitted on train and validation · as of 2013-03-02 · registered 20")
    assert "## Intended use\n\nTo see whether an event\nis <late>." in made
    assert "| train | 2013-01-01 | 2013-02-02 | 1 | 50.0% |" in made
    assert "- data/ingest/tables: `d1.dir`" in made
    assert "result.json" not in made
    assert "| ROC AUC | 0.81 |" in made
    assert "| 0.7 | 0.66 | 300 |" in made
    assert "| c | (others) | 9 | 1.0 | – | – |" in made
    assert "- x: 0.2000" in made
    assert made.count("not judged") == 2
    assert f"- model: {registry.version(1).digest}" in made
    assert "- code: commit unknown" in made
    assert "- started by: laptop" in made


def test_card_page_has_the_words_escaped_the_plots_and_nothing_from_the_network(registered: Project) -> None:
    made = kept("html")
    assert "<p>To see whether an event is &lt;late&gt;.</p>" in made
    assert "<ul><li>Of one year, 2013.</li><li>Not for people.</li></ul>" in made
    assert made.count("<svg") == 2
    assert 'points="12.5,85.0 87.5,17.5"' in made, "the calibration, scaled to 0.8"
    assert '<i style="width: 100.0%"></i>' in made
    assert '<i style="width: 0.0%"></i>' in made, "a feature that only disturbs"
    assert "NOT JUDGED YET" in made
    assert "http" not in made
    assert "src=" not in made


def test_card_is_completed_by_the_verdict(registered: Project) -> None:
    decided = registered.decide()
    for made in (kept("md"), kept("html")):
        assert decided["summary"].split(" · ")[0] in made
        assert decided["record_sha256"][:12] in made
        assert "roc auc 0." in made.lower()
    assert "no fairness rule stands in `decide.rules`" in kept("md")
    assert '<span class="pill promote">PROMOTE</span>' in kept("html")


def test_card_shows_what_a_fairness_rule_found(registered: Project) -> None:
    settings = registered.root / "params.yaml"
    rule = "    - {rule: fairness, column: c, min_rows: 50, selection_rate: 0.0, severity: warn}\n"
    settings.write_text(settings.read_text() + rule)
    registered.decide()
    assert "- fairness c: **not passed**: " in kept("md")
    assert '<span class="bad">not passed</span> · fairness c: ' in kept("html")


def test_card_of_a_version_without_evidence_says_so(project: Project) -> None:
    project.bare_version("a" * 64)
    found = card.facts(1, State())
    made, page = card.markdown(found), card.html(found)
    assert "Not stated: docs/model-card.md had no section" in made
    assert made.count("Not measured") == 3
    assert "- environment: not recorded" in made
    assert "<svg" not in page


def test_sections_are_told_apart_by_their_headings() -> None:
    assert card._sections("no heading") == []
    first, second = card._sections("intro\n## One\na\nb\n\n- c\n- d\n  e\n## Two\nf")
    assert (first["heading"], first["blocks"]) == ("One", ["a b", ["c", "d e"]])
    assert (second["heading"], second["text"]) == ("Two", "f")


def test_words_of_this_project_state_use_and_limits() -> None:
    words = (Path(__file__).resolve().parents[2] / card.WORDS).read_text()
    assert [section["heading"] for section in card._sections(words)] == ["Intended use", "Limits"]
