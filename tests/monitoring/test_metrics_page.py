"""docs/metrics.md lists what is exposed, and nothing else."""

from __future__ import annotations

import re

from pipelines.places import ROOT

ROW = re.compile(r"^\| `(ballast_\w+)` \| (\w+) \| (.*?) ?\| (.+) \|$", re.M)


def test_metrics_page_lists_what_is_exposed_with_type_labels_and_meaning(exposed):
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    listed = {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)), words)
        for name, kind, labels, words in ROW.findall(text)
    }
    assert listed == {name: (found.kind, found.labels, found.words) for name, found in exposed.items()}
