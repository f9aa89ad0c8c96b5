"""The pages: what a person is told, that nothing is fetched, and what stays when windows come and go."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipelines import page, windows
from pipelines.charts import shade
from pipelines.files import write_json
from pipelines.windows import Window

COLUMN = {"method": "wasserstein", "threshold": 0.5, "floor": 0.1, "missing": 0.0, "reference_missing": 0.0}
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HOSTILE = """</title><script>alert("x")</script>"'&{{ 7 * 7 }}"""


def verdict(start: str = "2013-04-01", end: str = "2013-05-01", **changes: Any) -> dict[str, Any]:
    columns = {
        "visib": COLUMN
        | {"score": 0.1, "moved": False, "words": "0.10 sd, bound 0.50", "weight": 0.1, "critical": False},
        "temp": COLUMN | {"score": 1.9, "moved": True, "words": "1.90 sd, bound 0.50", "weight": 0.3, "critical": True},
        "seats": COLUMN
        | {"score": None, "threshold": None, "moved": None, "words": "not measured: 3 values in the batch"}
        | {"weight": 0.6, "critical": True},
    }
    data = {"rejected": False, "empty": [], "validated": True, "expectations": 14, "warnings": 2, "quarantined": 31}
    curve = [{"predicted": 0.1, "observed": 0.2, "rows": 10.0}, {"predicted": 0.4, "observed": 0.45, "rows": 10.0}]
    version = changes.get("version", 3)
    key = {"start": start, "end": end, "version": version, "rows": 28353, "labelled_rows": 26619, "complete": True}
    performance = {
        "measured": True,
        "start": start,
        "end": end,
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
        "windows": [key | {"log_loss": 0.607, "standard_error": 0.011, "auc": 0.64}],
    }
    estimate = {
        "measured": True,
        "rows": 28353,
        "log_loss": 0.57,
        "log_loss_standard_error": 0.02,
        "reference_log_loss": 0.512,
        "rise": 0.058,
        "standard_error": 0.015,
        "worse": True,
        "tracked": [{"start": "2013-03-01", "end": "2013-04-01", "estimated": 0.5, "realised": 0.52, "error": -0.02}],
        "words": "estimate WORSE",
    }
    predictions = {"moved": False, "mean": 0.197, "reference_mean": 0.206, "score": 0.1, "threshold": 0.4, "words": ""}
    inputs = {"moved": True, "columns": columns, "moved_columns": ["temp"], "judged": 2, "share": 0.5, "words": ""}
    inputs |= {"raises": True, "weighted_share": 0.3, "critical_moved": ["temp"]}
    whole = {"version": 3, "start": start, "end": end, "rows": 28353, "labelled_rows": 26619, "sample": "20,000 rows"}
    parts = {"data": data, "inputs": inputs, "predictions": predictions, "performance": performance}
    parts |= {"estimate": estimate}
    return whole | {name: part | changes.pop(name, {}) for name, part in parts.items()} | changes


UNMEASURED = {"measured": False} | dict.fromkeys(("log_loss", "worse", "reference_log_loss", "standard_error"))
UNLABELLED = UNMEASURED | {"labelled_rows": 0, "windows": [], "words": "model not judged: 0 labelled rows"}


def older(**changes: Any) -> dict[str, Any]:
    """A verdict as it was before columns had weights and floors, and windows an estimate."""
    found = verdict(**changes)
    new = {"inputs": ("raises", "weighted_share", "critical_moved"), "performance": ("start", "end", "windows")}
    found = {name: part for name, part in found.items() if name != "estimate"}
    for part, names in new.items():
        found[part] = {name: value for name, value in found[part].items() if name not in names}
    columns = found["inputs"]["columns"].items()
    found["inputs"]["columns"] = {
        name: {key: value for key, value in column.items() if key not in ("weight", "critical", "floor")}
        for name, column in columns
    }
    return found


def decision(kind: str = "wait") -> dict[str, Any]:
    return {"verdict": kind, "reasons": ["performance: log loss worse by 0.095 ± 0.012, bound 0.03"]}


def event(kind: str, version: int | None, as_of: str, summary: str = "", href: str | None = None) -> dict[str, Any]:
    return {"kind": kind, "version": version, "as_of": as_of, "summary": summary, "href": href}


def shown(found: dict[str, Any], kind: str = "wait", **known: Any) -> str:
    """The page of a window."""
    decided = {"train_days": None} | decision(kind) | known.pop("decided", {})
    return page.window_page(Window("2013-04-01..2013-05-01", windows.complete(found), decided, **known))


def text(html: str) -> str:
    """What a reader sees, in one line."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


class Nesting(HTMLParser):
    """The elements that are open; fails where one is closed that is not."""

    VOID = frozenset(("meta", "br", "wbr", "img", "link", "input", "hr"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert not self.opened

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag


def unjudged() -> dict[str, Any]:
    """What drift says of a window without a champion."""
    return verdict(
        version=None,
        data={"validated": False},
        inputs={"moved": None, "columns": {}, "moved_columns": [], "judged": 0, "share": None, "raises": None},
        predictions={"moved": None, "mean": None, "score": None},
        performance=UNMEASURED | {"words": "", "calibration": None, "windows": [], "start": None, "end": None},
        estimate=UNMEASURED | {"rows": 0, "tracked": [], "words": ""},
    )


def year(reports: Path, count: int, columns: int = 19, days: int = 7) -> list[dict[str, Any]]:
    """So many windows with so many columns; every fifth asks for a retraining, which promotes; return the events."""
    happened = []
    for i in range(count):
        start, end = (date(2013, 1, 1) + timedelta(days * n) for n in (i, i + 1))
        scores = {f"column_{n}": 0.1 + (i * n) % 7 / 5 for n in range(columns)}
        judged = {
            name: COLUMN | {"score": score, "moved": score >= 0.5, "words": f"{score:.2f} sd, bound 0.50"}
            for name, score in scores.items()
        }
        weighed = {name: column | {"weight": 1 / columns, "critical": columns < 7} for name, column in judged.items()}
        found = verdict(str(start), str(end), version=1 + i // 5, inputs={"columns": weighed, "judged": columns})
        folder = reports / "monitor" / f"{start}..{end}"
        write_json(folder / "verdict.json", found)
        write_json(folder / "policy.json", decision("retrain" if i % 5 == 4 else "wait"))
        if i % 5 == 4:
            happened += [event(kind, 2 + i // 5, str(end), "better") for kind in ("passed", "promote")]
    page.refresh(reports, happened)
    return happened


# --- the page of a window


def test_window_page_answers_the_four_questions_with_their_numbers():
    seen = text(shown(verdict(), "retrain", decided={"train_days": 120}))
    for said in (
        "Is the data broken? No 14 expectations checked: 2 warnings, 31 rows in quarantine.",
        "Have the inputs moved? Yes 1 of 2 columns, 30% of the model's importance; critical: temp. Enough to raise.",
        "Furthest: temp with 1.90 sd, bound 0.50. 1 could not be measured.",
        "Have the predictions moved? No Mean probability 0.197, was 0.206. Distance 0.10, bound 0.40.",
        "Came true: 0.290 of 26,619 labelled rows.",
        "Is the model worse? Yes Log loss 0.607 ± 0.011, was 0.512: worse by 0.095 ± 0.012 on 26,619 labelled rows.",
        "AUC 0.640, was 0.690. Estimated 0.570 ± 0.020 before the labels.",
        "Estimates so far were off by 0.020, too low by 0.020 (1 window).",
        "RETRAIN performance: log loss worse by 0.095 ± 0.012, bound 0.03",
        "Training window: the last 120 days before the validation window",
        "April 2013",
        "champion v3",
    ):
        assert said in seen


def test_window_page_before_the_labels_gives_the_estimate_and_later_what_came_true():
    found = verdict(performance=UNLABELLED)
    assert (
        "Is the model worse? Probably Estimated log loss 0.570 ± 0.020 before the labels, was 0.512: worse by 0.058"
    ) in text(shown(found))
    late = {"log_loss": 0.6, "standard_error": 0.03}
    assert "worse by 0.058 ± 0.015. Realised since then: 0.600 ± 0.030. Estimates so far" in text(
        shown(found, realised=late)
    )


def test_window_page_judged_by_an_earlier_windows_labels_says_whose_they_are():
    of_march = {"start": "2013-03-01", "end": "2013-04-01"}
    seen = text(shown(verdict(performance=of_march)))
    assert "Is the model worse? Yes Newest labels, of March 2013: log loss 0.607, was 0.512" in seen
    assert "labelled rows. AUC 0.640, was 0.690. Estimated log loss 0.570 ± 0.020" in seen
    assert "Came true" not in seen


def test_window_page_lists_columns_by_weight_times_drift_and_unmeasured_last():
    light = COLUMN | {"score": 2.0, "moved": True, "words": "", "weight": 0.01, "critical": False}
    columns = {"light": light, **verdict()["inputs"]["columns"]}
    seen = text(shown(verdict(inputs={"columns": columns})))
    order = [seen.index(f" {name} ") for name in ("temp critical 30.0%", "light 1.0%", "visib 10.0%", "seats critical")]
    assert order == sorted(order)
    assert "1.900 0.50 0.10 wasserstein" in seen  # score, threshold, floor


def test_window_page_folds_only_columns_that_have_not_moved():
    columns = {
        f"c{n:02}": COLUMN
        | {"score": 0.1 + n / 100, "moved": n == 0, "words": "", "weight": n / 780, "critical": False}
        for n in range(40)
    }
    before, folded = shown(verdict(inputs={"columns": columns})).split("more, not moved</summary>")
    assert '<td class="name">c00</td>' in before  # the last of the forty
    assert before.endswith(f"<summary>{40 - page.SHOWN_COLUMNS - 1} ")
    assert folded.count('<td class="name">') == 40 - page.SHOWN_COLUMNS - 1


def test_window_page_older_verdict_reads_as_not_judged_where_it_has_nothing():
    html = shown(older())
    seen = text(html)
    assert "Have the inputs moved? Yes 1 of 2 columns. Furthest: temp" in seen
    assert "Is the model worse? Yes Log loss 0.607, was 0.512: worse by 0.095 ± 0.012" in seen
    assert "Columns, the furthest from the training window first" in seen
    for absent in ("Estimate", "weight", "critical", "floor", "known on"):
        assert absent not in seen
    assert seen.index(" temp 1.900") < seen.index(" visib 0.100") < seen.index(" seats not measured")


def test_window_page_verdict_without_any_part_is_no_error():
    bare = {name: verdict()[name] for name in ("version", "start", "end")}
    seen = text(shown(bare))
    assert "Not checked" in seen
    assert seen.count("Not measured") == 2
    assert "Is the model worse? Not judged" in seen


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"data": {"empty": ["precip"]}}, "Is the data broken? Yes Not one value came for precip."),
        ({"data": {"out_of_scale": ["precip"]}}, "Is the data broken? Yes As after a change of unit, far too large"),
        ({"data": {"rejected": True}}, "Is the data broken? Yes Validation rejected it."),
        ({"data": {"validated": False}}, "Is the data broken? Not checked"),
        ({"inputs": {"raises": False, "critical_moved": []}}, "30% of the model's importance. Too little to raise."),
        ({"performance": {"worse": False, "rise": -0.01}}, "Is the model worse? No Log loss 0.607"),
        ({"performance": {"worse": False}}, "Is the model worse? Not certainly Log loss"),
        ({"performance": {"worse": None, "standard_error": None}}, "Is the model worse? Not judged Log loss"),
        ({"performance": {"auc": None}}, "on 26,619 labelled rows. Estimated"),
        ({"performance": UNLABELLED, "estimate": {"worse": False}}, "Is the model worse? Probably not Estimated"),
        ({"performance": UNLABELLED, "estimate": {"worse": None, "standard_error": None}}, "worse? Not judged Estim"),
    ],
)
def test_window_page_answer_follows_the_verdict(changes, answer):
    assert answer in text(shown(verdict(**changes), "retrain"))


def test_window_page_without_champion_says_that_nothing_was_judged():
    seen = text(shown(unjudged(), "hold"))
    assert "no champion yet" in seen
    assert seen.count("Not measured") == 2
    assert "Is the model worse? Not judged" in seen


def test_window_page_fetches_nothing():
    html = shown(verdict(), evidently=True)
    assert re.findall(r"""(?:src|href)=["']([^"']+)""", html) == [
        "../../index.html",
        "evidently.html",
        "evidently.html",
    ]
    assert "http" not in html


@pytest.mark.parametrize("where", ["column", "reason", "event", "words"])
def test_pages_hostile_text_stays_text(tmp_path, where):
    columns = {HOSTILE if where == "column" else "x": COLUMN | {"score": 1.9, "moved": True, "words": HOSTILE}}
    found, said = verdict(inputs={"columns": columns, "critical_moved": [HOSTILE]}), decision()
    if where == "reason":
        said["reasons"] = [HOSTILE]
    if where == "words":
        found["performance"] |= UNLABELLED | {"words": HOSTILE}
        found["estimate"] = {}
    happened = [event(HOSTILE if where == "event" else "promote", 4, "2013-05-01", HOSTILE)]
    folder = page.publish(tmp_path, found, said, tmp_path / "none.html", happened)
    for html in ((folder / "index.html").read_text(), (tmp_path / "index.html").read_text()):
        assert html.count("<script") == 1  # our own
        assert "{{" not in re.sub(r"\{\{ 7 \* 7 \}\}", "", html)
        Nesting(html)


# --- what came after


def test_pages_late_labels_and_events_reach_the_windows_that_they_belong_to(tmp_path):
    april = verdict(performance=UNLABELLED)
    page.publish(tmp_path, april, decision("retrain"), tmp_path / "none.html")
    first = tmp_path / "monitor" / "2013-04-01..2013-05-01" / "index.html"
    assert "What happened next Nothing yet." in text(first.read_text())
    labels = {"start": "2013-04-01", "end": "2013-05-01", "version": 3, "log_loss": 0.611, "standard_error": 0.02}
    may = verdict("2013-05-01", "2013-06-01", performance={"windows": [labels]})
    happened = [
        event("passed", 4, "2013-05-01", "better by 0.02", "http://mlflow/4"),
        event("promote", 4, "2013-05-01"),
        event("refused", 5, "2013-06-01", "not better"),
    ]
    page.publish(tmp_path, may, decision(), tmp_path / "none.html", happened)
    html = first.read_text()
    assert "What happened next Passed the gate v4 : better by 0.02 Promoted v4 Columns" in text(html)
    assert '<a href="http://mlflow/4" target="_blank" rel="noopener">Passed the gate v4</a>' in html
    assert "Realised since then: 0.611 ± 0.020." in text(html)
    assert 'href="../2013-05-01..2013-06-01/index.html" rel="next">May 2013' in html
    second = (tmp_path / "monitor" / "2013-05-01..2013-06-01" / "index.html").read_text()
    assert "What happened next Refused by the gate v5: not better" in text(second)
    assert "April 2013 0.611 ± 0.020" in text(second)
    assert "0.611 ± 0.020 0.570 ± 0.020" in text((tmp_path / "index.html").read_text())


def test_read_takes_labels_of_a_part_of_a_window_for_nothing(tmp_path):
    page.publish(tmp_path, verdict(performance=UNLABELLED), decision(), tmp_path / "none.html")
    part = {"start": "2013-04-01", "end": "2013-05-01", "version": 3, "log_loss": 2.1, "complete": False}
    may = verdict("2013-05-01", "2013-06-01", performance={"windows": [part]})
    page.publish(tmp_path, may, decision(), tmp_path / "none.html")
    assert windows.read(tmp_path)[0].realised is None


def test_window_page_quiet_window_says_that_nothing_came_of_it(tmp_path):
    for start, end in (("2013-04-01", "2013-05-01"), ("2013-05-01", "2013-06-01")):
        page.publish(tmp_path, verdict(start, end), decision(), tmp_path / "none.html")
    html = (tmp_path / "monitor" / "2013-04-01..2013-05-01" / "index.html").read_text()
    assert "Nothing before the next window." in html


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


def test_refresh_without_a_window_writes_nothing(tmp_path):
    page.refresh(tmp_path)
    assert not list(tmp_path.iterdir())


# --- the history


def test_index_page_shows_the_year_with_its_marks_and_the_newest_window_first(tmp_path):
    for start, end, version, kind in (
        ("2013-06-01", "2013-07-01", 4, "wait"),
        ("2013-04-01", "2013-05-01", 3, "retrain"),
        ("2013-05-01", "2013-06-01", 3, "wait"),
    ):
        page.publish(tmp_path, verdict(start, end, version=version), decision(kind), tmp_path / "none.html")
    html = (tmp_path / "index.html").read_text().replace("\u00a0", " ")
    seen = text(html)
    assert seen.index("June 2013 v4") < seen.index("May 2013 v3") < seen.index("April 2013 v3")
    assert html.count("<title>retrain: performance") == 1
    assert html.count("<title>v4 is champion from here on</title>") == 1
    assert html.count(": realised 0.607 ± 0.011</title>") == 3
    assert html.count(": estimated 0.570 ± 0.020</title>") == 3
    assert html.count("v3 on its own test window: 0.512") == 1  # one line for both of its windows


def test_index_page_columns_stand_by_weight_and_cells_say_their_distance(tmp_path):
    page.publish(tmp_path, verdict(), decision(), tmp_path / "none.html")
    html = (tmp_path / "index.html").read_text()
    assert re.findall(r'<div class="column" title="([^"]+)"', html) == [
        "seats: 60.0% of the importance",
        "temp: 30.0% of the importance",
        "visib: 10.0% of the importance",
    ]
    cells = re.findall(r'class="heat".*?fill="([^"]+)"><title>([^<]+)', html)
    assert [title for _, title in cells] == [
        "April 2013 · seats: not measured: 3 values in the batch",
        "April 2013 · temp: 1.90 sd, bound 0.50 (3.8 thresholds, critical)",
        "April 2013 · visib: 0.10 sd, bound 0.50 (0.2 thresholds)",
    ]
    assert [fill for fill, _ in cells] == ["url(#unjudged)", "#e27a32", "#ecf1f6"]


def test_index_page_events_of_the_ledger_are_marked_where_they_fell(tmp_path):
    happened = [event("refused", 4, "2013-05-01", "worse"), event("rollback", 2, "2013-06-01", "it was wrong")]
    for start, end in (("2013-04-01", "2013-05-01"), ("2013-05-01", "2013-06-01")):
        page.publish(tmp_path, verdict(start, end), decision(), tmp_path / "none.html", happened)
    html = (tmp_path / "index.html").read_text()
    assert "<title>v2 champion as of 2013-06-01 (rollback): it was wrong</title>" in html
    assert "<title>v4 refused: worse</title>" in html


def test_index_page_windows_without_labels_or_estimate_have_no_line(tmp_path):
    page.publish(tmp_path, unjudged(), decision("hold"), tmp_path / "none.html")
    html = (tmp_path / "index.html").read_text()
    assert "<h2>Log loss" not in html
    assert "HOLD" in html


@pytest.mark.parametrize(("count", "columns"), [(1, 5), (4, 40), (52, 19)])
def test_index_page_any_number_of_windows_lies_within_its_picture(tmp_path, count, columns):
    happened = year(tmp_path, count, columns)
    seen = Nesting((tmp_path / "index.html").read_text()).seen
    width, height = next(map(float, a["viewbox"].split()[2:]) for tag, a in seen if tag == "svg")
    cells = [a for tag, a in seen if a.get("class") == "heat"]
    assert len(cells) == count * columns
    assert all(float(a["x"]) + float(a["width"]) <= width for a in cells)
    assert all(float(a["y"]) + float(a["height"]) <= height for a in cells)
    marks = [float(a["x1"]) for tag, a in seen if tag == "line" and a.get("stroke-dasharray")]
    assert len(marks) == len(happened) // 2
    labels = sorted(float(a["x"]) for tag, a in seen if tag == "text" and a.get("class") == "label")
    assert all(after - before > 40 for before, after in pairwise(labels))


def test_read_orders_windows_and_ignores_half_written_folders(tmp_path):
    year(tmp_path, 3, 5)
    shutil.copytree(tmp_path / "monitor" / "2013-01-01..2013-01-08", tmp_path / "monitor" / ".2013-01-01.part")
    assert [window.verdict["end"] for window in windows.read(tmp_path)] == ["2013-01-08", "2013-01-15", "2013-01-22"]


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine windows of nineteen columns, one of them hard to print."""
    folder = tmp_path_factory.mktemp("reports")
    year(folder, 9)
    name = "a_name_that_is_" + "very_" * 12 + "long" + HOSTILE
    found = json.loads(json.dumps(verdict("2013-03-05", "2013-03-12")))
    found["inputs"]["columns"][name] = COLUMN | {"score": 0.7, "moved": True, "words": "0.70 sd, bound 0.50"}
    (folder / "evidently.html").write_text("<p>evidently</p>")
    page.publish(folder, found, decision("retrain"), folder / "evidently.html")
    return folder


def opened(browser: Any, file: Path, width: int) -> Callable[[str], Any]:
    """Open a page in a window so wide; return how to ask it."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(file.as_uri())
    return lambda script: browser.execute_script(f"return {script}")


@pytest.mark.parametrize("width", [400, 800, 1440])
@pytest.mark.parametrize("where", ["index.html", "monitor/2013-03-05..2013-03-12/index.html"])
def test_pages_in_a_browser_neither_scroll_sideways_nor_complain(browser, reports, where, width):
    ask = opened(browser, reports / where, width)
    assert ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    right = "getBoundingClientRect().right"
    cells = "[...document.querySelectorAll('.panel:not(.scroll) td, .panel:not(.scroll) p')]"
    assert ask(f"{cells}.filter(cell => cell.{right} > cell.closest('.panel').{right}).length") == 0
    assert browser.get_log("browser") == []
    assert ask("document.title").endswith("· Ballast")


def test_window_page_in_a_browser_answers_on_one_screen(browser, reports):
    ask = opened(browser, reports / "monitor/2013-03-05..2013-03-12/index.html", 1440)
    bottoms = ask("[...document.querySelectorAll('.answer, .then')].map(e => e.getBoundingClientRect().bottom)")
    assert len(bottoms) == 5
    assert max(bottoms) < 500  # the evidence begins within the screen's upper part


def test_index_page_in_a_browser_every_cell_has_a_title_and_legible_text(browser, reports):
    ask = opened(browser, reports / "index.html", 1440)
    cells = "[...document.querySelectorAll('rect.heat')]"
    assert ask(f"{cells}.length") > 9 * 19
    assert ask(f"{cells}.every(cell => cell.querySelector('title').textContent.length > 20)")
    assert ask("getComputedStyle(document.querySelector('text.cell')).fill") == "rgb(29, 37, 48)"
    clipped = "[...document.querySelectorAll('.column')].filter(e => e.getBoundingClientRect().left < 0).length"
    assert ask(clipped) == 0


@pytest.mark.parametrize("far", [0.0, 0.99, 1.0, 2.0, 9.0])
def test_shade_dark_text_has_the_contrast_that_wcag_asks_for(far):
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert (luminance(shade(far)) + 0.05) / (luminance("#1d2530") + 0.05) >= 4.5


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
    assert windows.window_name(start, end) == name
