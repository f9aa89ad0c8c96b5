"""The pages: what a person is told, that nothing is fetched, and what stays when windows come and go."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest

from pipelines import page

COLUMN = {"method": "wasserstein", "threshold": 0.5, "missing": 0.0, "reference_missing": 0.0}


def verdict(start: str = "2013-04-01", end: str = "2013-05-01", **changes: Any) -> dict[str, Any]:
    columns = {
        "visib": COLUMN | {"score": 0.1, "moved": False, "words": "0.10, bound 0.50"},
        "temp": COLUMN | {"score": 1.9, "moved": True, "words": "1.90, bound 0.50"},
        "seats": COLUMN | {"score": None, "moved": None, "words": "not measured: 3 values in the batch"},
    }
    data = {"rejected": False, "empty": [], "validated": True, "expectations": 14, "warnings": 2, "quarantined": 31}
    curve = [{"predicted": 0.1, "observed": 0.2, "rows": 10.0}, {"predicted": 0.4, "observed": 0.45, "rows": 10.0}]
    performance = {
        "measured": True,
        "labelled_rows": 26619,
        "log_loss": 0.607,
        "reference_log_loss": 0.512,
        "rise": 0.095,
        "standard_error": 0.012,
        "standard_errors": 2.0,
        "worse": True,
        "auc": 0.64,
        "reference_auc": 0.69,
        "label_rate": 0.29,
        "reference_label_rate": 0.22,
        "calibration": {"batch": curve, "reference": curve},
        "words": "model WORSE",
    }
    predictions = {"moved": False, "mean": 0.197, "reference_mean": 0.206, "score": 0.1, "threshold": 0.4, "words": ""}
    inputs = {"moved": True, "columns": columns, "moved_columns": ["temp"], "judged": 2, "share": 0.5, "words": ""}
    whole = {"version": 3, "start": start, "end": end, "rows": 28353, "labelled_rows": 26619, "sample": "20,000 rows"}
    estimate = {"measured": True, "words": "estimate not worse: log loss 0.520 ± 0.020, was 0.512"}
    parts = {"data": data, "inputs": inputs, "predictions": predictions, "performance": performance}
    parts["estimate"] = estimate
    return whole | {name: part | changes.pop(name, {}) for name, part in parts.items()} | changes


def decision(kind: str = "wait") -> dict[str, Any]:
    return {"verdict": kind, "reasons": ["performance: log loss worse by 0.095 ± 0.012, bound 0.03"]}


def text(html: str) -> str:
    """What a reader sees, in one line."""
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def unjudged() -> dict[str, Any]:
    """What drift says of a window without a champion."""
    return verdict(
        version=None,
        data={"validated": False},
        inputs={"moved": None, "columns": {}, "moved_columns": [], "judged": 0, "share": None},
        predictions={"moved": None, "mean": None, "score": None},
        performance={"measured": False, "words": "", "calibration": None},
    )


def test_window_page_answers_the_four_questions_with_their_numbers():
    seen = text(page.window_page(verdict(), decision("retrain"), True))
    for said in (
        "Is the data broken? No 14 expectations checked: 2 warnings, 31 rows in quarantine.",
        "Have the inputs moved? Yes 1 of 2 columns. Furthest: temp with 1.90, bound 0.50. 1 could not be measured.",
        "Have the predictions moved? No Mean probability 0.197, was 0.206. Distance 0.10, bound 0.40.",
        "Is the model worse? Yes Log loss 0.607, was 0.512: worse by 0.095 ± 0.012 on 26,619 labelled rows.",
        "AUC 0.640, was 0.690.",
        "Estimate not worse: log loss 0.520 ± 0.020, was 0.512.",
        "RETRAIN performance: log loss worse by 0.095 ± 0.012, bound 0.03",
        "April 2013",
        "champion v3",
    ):
        assert said in seen


def test_window_page_lists_columns_furthest_first_and_unmeasured_last():
    seen = text(page.window_page(verdict(), decision(), False))
    assert seen.index(" temp 1.900") < seen.index(" visib 0.100") < seen.index(" seats not measured")


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"data": {"empty": ["precip"]}}, "Is the data broken? Yes Not one value came for precip."),
        ({"data": {"rejected": True}}, "Is the data broken? Yes Validation rejected it."),
        ({"data": {"validated": False}}, "Is the data broken? Not checked"),
        ({"performance": {"worse": False, "rise": -0.01}}, "Is the model worse? No Log loss 0.607"),
        ({"performance": {"worse": False}}, "Is the model worse? Not certainly Log loss"),
        ({"performance": {"worse": None, "standard_error": None}}, "Is the model worse? Not judged Log loss"),
        (
            {"performance": {"present": False, "start": "2013-03-01", "end": "2013-04-01"}},
            "AUC 0.640, was 0.690. These are of March 2013: this window has too few labels yet.",
        ),
        ({"performance": {"auc": None}}, "on 26,619 labelled rows. RETRAIN"),
    ],
)
def test_window_page_answer_follows_the_verdict(changes, answer):
    assert answer in text(page.window_page(verdict(**changes), decision("retrain"), False))


def test_window_page_without_champion_says_that_nothing_was_judged():
    seen = text(page.window_page(unjudged(), decision("hold"), False))
    assert "no champion yet" in seen
    assert seen.count("Not measured") == 2
    assert "Is the model worse? Not judged" in seen


def test_window_page_fetches_nothing():
    html = page.window_page(verdict(), decision(), True)
    assert re.findall(r"""(?:src|href)=["']([^"']+)""", html) == [
        "../../index.html",
        "evidently.html",
        "evidently.html",
    ]
    assert "http" not in html
    assert "<script" not in html


def test_window_page_names_are_escaped():
    columns = {"<b>x</b>": COLUMN | {"score": 1.9, "moved": True, "words": "<i>"}}
    html = page.window_page(verdict(inputs={"columns": columns}), decision(), False)
    assert "<b>" not in html
    assert "&lt;b&gt;x&lt;/b&gt;" in html


def test_publish_keeps_the_window_and_lists_it(tmp_path):
    report = tmp_path / "report.html"
    report.write_text("evidently")
    folder = page.publish(tmp_path / "reports", verdict(), decision(), report)
    assert sorted(path.name for path in folder.iterdir()) == [
        "evidently.html",
        "index.html",
        "policy.json",
        "verdict.json",
    ]
    index = (tmp_path / "reports" / "index.html").read_text()
    assert 'href="monitor/2013-04-01..2013-05-01/index.html"' in index
    assert (tmp_path / "reports" / "monitor" / "2013-04-01..2013-05-01" / "index.html").exists()


def test_publish_again_replaces_the_window(tmp_path):
    (tmp_path / "report.html").write_text("evidently")
    page.publish(tmp_path / "reports", verdict(), decision(), tmp_path / "report.html")
    folder = page.publish(tmp_path / "reports", verdict(version=4), decision("retrain"), tmp_path / "none.html")
    assert not (folder / "evidently.html").exists()
    seen = text((tmp_path / "reports" / "index.html").read_text())
    assert ("1 window," in seen, "v4" in seen, "v3" in seen) == (True, True, False)


def test_index_page_shows_the_year_in_order_with_its_marks(tmp_path):
    for start, end, version, kind in (
        ("2013-06-01", "2013-07-01", 4, "wait"),
        ("2013-04-01", "2013-05-01", 3, "retrain"),
        ("2013-05-01", "2013-06-01", 3, "wait"),
    ):
        page.publish(tmp_path, verdict(start, end, version=version), decision(kind), tmp_path / "none.html")
    html = (tmp_path / "index.html").read_text()
    seen = text(html)
    assert seen.index("April 2013 v3") < seen.index("May 2013 v3") < seen.index("June 2013 v4")
    assert html.count("<title>the policy said retrain</title>") == 1
    assert html.count('stroke-dasharray="3 3"') == 1  # v4 came once
    assert html.count("<circle") == 3


def test_index_page_windows_without_labels_have_no_chart(tmp_path):
    page.publish(tmp_path, unjudged(), decision("hold"), tmp_path / "none.html")
    html = (tmp_path / "index.html").read_text()
    assert "Log loss by window" not in html
    assert "HOLD" in html


def test_index_page_does_not_draw_a_window_by_an_earlier_ones_labels(tmp_path):
    page.publish(
        tmp_path,
        verdict(performance={"present": False, "start": "2013-03-01", "end": "2013-04-01"}),
        decision(),
        tmp_path / "none",
    )
    assert "Log loss by window" not in (tmp_path / "index.html").read_text()


def test_index_page_no_windows_says_so(tmp_path):
    assert "No window has been monitored yet" in page.index_page(tmp_path)


@pytest.mark.parametrize(
    ("start", "end", "name"),
    [
        ("2013-02-01", "2013-03-01", "February 2013"),
        ("2013-12-01", "2014-01-01", "December 2013"),
        ("2013-04-02", "2013-05-02", "2013-04-02 to 2013-05-02"),
        ("2013-04-01", "2013-04-08", "2013-04-01 to 2013-04-08"),
    ],
)
def test_window_name_whole_months_have_their_name(start, end, name):
    assert page.window_name(start, end) == name
