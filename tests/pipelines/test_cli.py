from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from contextlib import closing
from datetime import date
from pathlib import Path
from socket import create_server
from typing import Any

import pytest
import typer
from conftest import Project

from pipelines import cli, registry, reproduce
from pipelines.promote import promote
from pipelines.state import Alert, State

OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
COMMANDS = ["status", "history", "explain", "promote", "freeze", "unfreeze", "rollback", "breaker", "replay", "tune"]
COMMANDS.append("alerts")


@pytest.fixture
def two(project: Project) -> Project:
    """v1, then v2 became champion; v3 was refused."""
    for digest, verdict in (("a", "promote"), ("b", "promote"), ("c", "refuse")):
        version = project.bare_version(digest * 64)
        made = project.decided(version, digest * 64, verdict)
        if verdict == "promote":
            promote(version, made, State())
    return project


def tamper(project: Project) -> None:
    import sqlite3

    with closing(sqlite3.connect(project.root / "var" / "state.db")) as connection, connection:
        connection.execute("UPDATE ledger SET reason = 'I was never here' WHERE seq = 1")


def test_help_answers_at_once_and_has_an_example_each(project: Project) -> None:
    began = time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "pipelines.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 3  # a fifth of a second on an idle machine
    for name in COMMANDS:
        assert name in done.stdout
    heavy = re.findall(r"\| +(mlflow|optuna|pandas|sqlalchemy|torch|pydantic|numpy|rich)$", done.stderr, re.MULTILINE)
    assert heavy == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example(ballast: Any, name: str) -> None:
    code, out, _ = ballast(name, "--help")
    assert code == 0
    assert f"Example: ballast {name}" in out


@pytest.mark.parametrize("line", re.findall(r"^ballast .*$", OPERATIONS.read_text(), re.MULTILINE))
def test_operations_page_shows_commands_that_are_there(line: str) -> None:
    command: Any = typer.main.get_command(cli.app)
    name, arguments = "ballast", shlex.split(line)[1:]
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(command.context_class(command), arguments)
    command.make_context(name, arguments)  # raises for an option or a value that is not there


def test_status_before_anything_happened_says_so(project: Project, ballast: Any) -> None:
    code, out, _ = ballast("status")
    assert code == 0
    assert re.search(r"champion +none yet", out)
    assert re.search(r"registry +agrees with the ledger", out)
    assert json.loads(ballast("status", "--json")[1])["champion"] is None


def test_status_names_the_champion_and_the_last_verdicts(two: Project, ballast: Any) -> None:
    code, out, _ = ballast("status")
    assert code == 0
    assert re.search(r"champion +v2 since 20\d\d-.* \(as of 2013-03-02\)", out)
    assert "promoted: PROMOTE · for the test" in out
    assert re.search(r"verdicts +v3 as of 2013-03-02: REFUSE · for the test", out)
    assert re.search(r"ledger +2 entries, whole", out)
    found = json.loads(ballast("status", "--json")[1])
    assert (found["champion"]["version"], found["previous"]) == (2, 1)
    assert [decision["version"] for decision in found["decisions"]] == [3, 2, 1]
    assert found["registry"] == {"agrees": True, "completed": False, "odds": None, "away": None}


def test_status_does_without_mlflow(two: Project) -> None:
    code = (
        "import sys; from pipelines.cli import app; app(['status'], standalone_mode=False); print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "champion   v2" in done.stdout
    assert "'mlflow'" not in done.stdout


def test_status_names_what_is_up(project: Project, ballast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(create_server(("127.0.0.1", 0))) as up, closing(create_server(("127.0.0.1", 0))) as down:
        ports = up.getsockname()[1], down.getsockname()[1]
        monkeypatch.setenv("AIRFLOW_PORT", str(ports[0]))
        monkeypatch.setenv("MLFLOW_PORT", str(ports[1]))
        down.close()
        assert f"Airflow up on :{ports[0]} · MLflow not up on :{ports[1]}" in ballast("status")[1]
        monkeypatch.setenv("AIRFLOW_PORT", "1")
        monkeypatch.setenv("BALLAST_AIRFLOW_URL", f"http://localhost:{ports[0]}")
        assert f"Airflow up on :{ports[0]}" in ballast("status")[1]
        monkeypatch.setenv("BALLAST_AIRFLOW_URL", "https://airflow.invalid")
        assert "Airflow not up on airflow.invalid:443" in ballast("status")[1]


def test_status_completes_a_promotion_that_was_cut_off(two: Project, ballast: Any) -> None:
    state = State()
    state.append("rollback", 1, head=state.head(), reason="r", actor="me", as_of=date(2013, 3, 2))
    assert registry.aliases()["champion"] == 2
    assert "a promotion that was cut off is completed" in ballast("status")[1]
    assert registry.aliases() == {"champion": 1}
    assert "cut off" not in ballast("status")[1]


def test_status_tells_of_an_alias_moved_by_hand_and_repairs_it_when_asked(two: Project, ballast: Any) -> None:
    registry.client().set_registered_model_alias("late", "champion", "3")
    _, out, _ = ballast("status")
    assert "moved by hand: the registry says champion v3, previous v1" in out
    assert registry.aliases()["champion"] == 3
    assert "moved by hand" in ballast("history")[1]
    assert "agrees with the ledger" in ballast("status", "--repair")[1]
    assert registry.aliases() == {"champion": 2, "previous": 1}


def test_status_with_the_registry_away_still_answers(
    two: Project, ballast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, _ = ballast("status")
    assert code == 0
    assert re.search(r"champion +v2", out)
    assert "http://127.0.0.1:9 does not answer" in out


def test_history_is_one_line_an_event(two: Project, ballast: Any) -> None:
    code, out, _ = ballast("history")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 2
    assert re.match(r"  1  20\d\d-.* UTC  as of 2013-03-02  promote +none → v1 +PROMOTE · for the test", lines[0])
    entries = json.loads(ballast("history", "--json")[1])["entries"]
    assert [entry["to_version"] for entry in entries] == [1, 2]


def test_history_of_nothing_says_so(project: Project, ballast: Any) -> None:
    assert ballast("history")[:2] == (0, "The ledger is empty: no model was promoted yet.\n")


def test_history_after_tampering_says_so_and_fails(two: Project, ballast: Any) -> None:
    tamper(two)
    code, out, _ = ballast("history")
    assert code == 1
    assert "TAMPERED WITH  Entry 1 was changed" in out
    code, out, _ = ballast("history", "--json")
    assert (code, json.loads(out)["problems"]) == (1, ["Entry 1 was changed: its hash does not fit what it says."])
    assert "TAMPERED WITH" in ballast("status")[1]


def test_alerts_are_shown_the_newest_first_and_status_names_those_to_see_to(project: Project, ballast: Any) -> None:
    state = State()
    assert "no alert has come" in ballast("alerts")[1]
    assert "ballast alerts" not in ballast("status")[1]
    for number in range(3):
        told = {"reason": f"worse [{number}]", "as_of": "2013-03-02"}
        at = f"2026-01-0{number + 1}T10:00:00.000+00:00"
        state.take_alert(Alert(f"alert-{number}", "monitor", told, received_at=at), lambda: None)
    state.settle_alert(state.alerts()[0], "failed", "Airflow refused it: 422")
    _, out, _ = ballast("alerts")
    assert out.splitlines() == [
        "2026-01-03 10:00 UTC  monitor   waiting    alert-2  worse [2] · accepted",
        "2026-01-02 10:00 UTC  monitor   waiting    alert-1  worse [1] · accepted",
        "2026-01-01 10:00 UTC  monitor   failed     alert-0  worse [0] · Airflow refused it: 422",
    ]
    assert [one["run_id"] for one in json.loads(ballast("alerts", "--last", "1", "--json")[1])["alerts"]] == ["alert-2"]
    said = r"alerts +2 wait for Airflow, since 2026-01-02 10:00 UTC · 1 failed for good: ballast alerts"
    assert re.search(said, ballast("status")[1])
    assert json.loads(ballast("status", "--json")[1])["alerts"]["failed"] == 1


def test_explain_and_record_show_the_alert_that_asked(
    project: Project, ballast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {"alertname": "PerformanceDropped", "severity": "page"}
    told = {"labels": labels, "annotations": {"summary": "worse\nby 0.1"}, "startsAt": "2013-03-01T06:00:00Z"}
    conf = {"reason": "worse", "alert": {**told, "fingerprint": "f1", "reason": "worse"}, "as_of": "2013-03-02"}
    trigger = {"kind": "alert", "reason": "worse", "conf": conf, "events": []}
    monkeypatch.setenv("BALLAST_TRIGGER", json.dumps(trigger))
    project.train()
    project.register()
    project.decide()
    said = "PerformanceDropped · since 2013-03-01T06:00:00Z · worse by 0.1 · fingerprint f1 · "
    said += "alertname=PerformanceDropped, severity=page"
    assert f"  alert      {said}\n" in ballast("explain", "1")[1]
    markdown = (project.root / "data" / "decide" / "record.md").read_text()
    assert f"- alert: {said}\n" in markdown
    assert '- asked by: alert · worse · conf {"reason": "worse", "as_of": "2013-03-02"}\n' in markdown
    found = json.loads(ballast("explain", "1", "--json")[1])
    assert found["alert"] == found["decisions"][0]["record"]["alert"]
    assert found["alert"] == {
        "name": "PerformanceDropped",
        "fingerprint": "f1",
        "started_at": "2013-03-01T06:00:00Z",
        "summary": "worse by 0.1",
        "labels": labels,
    }


def test_explain_says_what_why_and_when(project: Project, ballast: Any) -> None:
    project.train()
    project.register()
    made = project.decide()
    promote(made["version"], made["record_sha256"], State())
    code, out, _ = ballast("explain", "1")
    assert code == 0
    for said in (
        r"late v1 · hgb · model [0-9a-f]{12}",
        r"served +champion since 20\d\d.*, promoted: PROMOTE · first model · 8 of 8 rules",
        r"decision +PROMOTE · first model",
        r"passed  test rows: 840 test rows that no side was trained on, needed: at least 500",
        r"passed  better: first model",
        r"data +train +2013-01-01 → 2013-02-02  1 rows",
        r"code +commit unknown",
        r"started by +laptop",
        r"test .*roc auc 0.81",
        r"parameters +seed 1, tabm.width 8, threads 2",
    ):
        assert re.search(said, out), (said, out)
    found = json.loads(ballast("explain", "1", "--json")[1])
    assert found["champion"] is True
    assert found["decisions"][0]["record"]["rules"][0]["rule"] == "models load"


def test_explain_of_a_replaced_version_says_by_what(two: Project, ballast: Any) -> None:
    _, out, _ = ballast("explain", "1")
    assert re.search(r"served +since .*; until .*, replaced by v2 \(promote: PROMOTE · for the test\)", out)
    assert re.search(r"for \[the\] test", out)
    assert re.search(r"served +never", ballast("explain", "3")[1])


def test_explain_with_a_lost_record_says_so(two: Project, ballast: Any) -> None:
    for path in (two.root / "var" / "mlflow" / "artifacts").rglob("decisions/*.json"):
        path.unlink()
    code, out, _ = ballast("explain", "2")
    assert code == 0
    assert "v2 has no decision record" in out


def test_explain_of_an_unknown_version_fails_in_one_line(two: Project, ballast: Any) -> None:
    assert ballast("explain", "7") == (1, "", "error: The registry has no late v7 (found v1, v2, v3).\n")


def test_rollback_asks_and_takes_no_for_an_answer(two: Project, ballast: Any) -> None:
    code, out, _ = ballast("rollback", "--reason", "odd", answer="n")
    assert code == 1
    assert "The champion is v2. Go back to v1?" in out
    assert State().champion() == 2


@pytest.mark.parametrize(("more", "answer"), [(["--yes"], ""), ([], "y"), (["--to", "1", "--yes"], "")])
def test_rollback_goes_back(two: Project, ballast: Any, more: list[str], answer: str) -> None:
    code, out, _ = ballast("rollback", "--reason", "odd", *more, answer=answer)
    assert code == 0
    assert out.endswith("champion: v2 → v1 · rolled back: odd · v2 is in quarantine\n")
    assert (State().champion(), registry.aliases()) == (1, {"champion": 1})


def test_rollback_to_a_named_version_takes_that_one(two: Project, ballast: Any) -> None:
    ballast("rollback", "--reason", "odd", "--yes")
    assert re.search(r"quarantine +v2 odd, by \w+, since 20", ballast("status")[1])
    assert list(json.loads(ballast("status", "--json")[1])["quarantined"]) == ["2"]
    assert re.search(r"quarantine +rolled back: odd, by", ballast("explain", "2")[1])
    code, out, _ = ballast("rollback", "--reason", "it was right", "--to", "2", "--yes", "--json")
    assert (code, json.loads(out)["to"]) == (0, 2)
    assert json.loads(ballast("explain", "2", "--json")[1])["quarantined"] is None


def test_rollback_without_a_champion_fails_in_one_line(project: Project, ballast: Any) -> None:
    expected = "error: There is no champion to roll back: no version was ever promoted.\n"
    assert ballast("rollback", "--reason", "odd", "--yes") == (1, "", expected)


def test_freeze_is_shown_everywhere_until_it_is_lifted(two: Project, ballast: Any) -> None:
    code, out, _ = ballast("freeze", "--reason", " peak [season] ")
    assert (code, out.split(" (by ")[0]) == (0, "frozen: peak [season]")
    for command in (["status"], ["explain", "3"]):
        said = ballast(*command)[1]
        assert re.search(r"FROZEN +peak \[season\], by \w+, since 20.*ballast unfreeze --reason TEXT", said), command
        assert json.loads(ballast(*command, "--json")[1])["frozen"]["reason"] == "peak [season]"
    assert re.search(r"  3  20.* freeze +v2 +peak \[season\]", ballast("history")[1])
    found = ballast("status")[1]
    assert re.search(r"champion +v2 since", found)
    assert re.search(r"registry +agrees with the ledger\n", found)
    code, out, _ = ballast("unfreeze", "--reason", "over", "--json")
    assert (code, json.loads(out)["frozen"]) == (0, None)
    assert "FROZEN" not in ballast("status")[1] + ballast("explain", "3")[1]
    kinds = [entry["kind"] for entry in json.loads(ballast("history", "--json")[1])["entries"]]
    assert kinds == ["promote", "promote", "freeze", "unfreeze"]


def test_freeze_before_the_first_model_holds_it(project: Project, ballast: Any) -> None:
    assert ballast("freeze", "--reason", "not yet")[0] == 0
    version = project.bare_version("a" * 64)
    project.decided(version, "a" * 64)
    code, out, _ = ballast("promote", "1")
    assert (code, State().champion()) == (1, None)
    assert re.match(r"frozen: not yet \(by \w+, since 20.* UTC\)\. v1 waits for `ballast unfreeze --reason TEXT`", out)
    assert re.search(r"champion +none yet", ballast("status")[1])
    assert re.search(r"  1  20.* freeze +none +not yet", ballast("history")[1])
    assert "passed the gate meanwhile: `ballast promote 1`" in ballast("unfreeze", "--reason", "now")[1]
    assert ballast("promote", "1") == (0, "champion: none → v1\n", "")


def test_freeze_that_says_nothing_new_fails_in_one_line(project: Project, ballast: Any) -> None:
    assert ballast("unfreeze", "--reason", "over")[2].startswith("error: Promotion is not frozen")
    assert ballast("freeze", "--reason", " ")[2].startswith("error: A freeze needs a reason")
    ballast("freeze", "--reason", "first")
    code, _, err = ballast("freeze", "--reason", "second")
    assert (code, err.split(" (by ")[0]) == (1, "error: Promotion is frozen: first")
    assert [entry.reason for entry in State().ledger()] == ["first"]


def test_promote_by_force_says_what_stands_against_it_and_asks(two: Project, ballast: Any) -> None:
    ballast("freeze", "--reason", "peak")
    force = ["promote", "3", "--force", "--reason", "odd"]
    code, out, err = ballast(*force, answer="n")
    assert (code, State().champion()) == (1, 2)
    assert "The champion is v2. Promote v3 BY FORCE?" in out
    assert "against v3: frozen: peak (by " in err
    assert "against v3: The gate refused v3: for the test" in err
    code, out, _ = ballast(*force, "--yes")
    assert (code, State().champion()) == (0, 3)
    assert out.startswith("FORCED · champion: v2 → v3 · odd · went round: frozen: peak (by ")
    assert re.search(r"  4  20.* FORCE +v2 → v3 +odd · went round: ", ballast("history")[1])
    assert "promoted BY FORCE: odd · went round" in ballast("status")[1]
    assert re.search(r"served +champion since .*, promoted BY FORCE: odd", ballast("explain", "3")[1])


def test_promote_by_force_without_a_reason_asks_nothing(two: Project, ballast: Any) -> None:
    said = "error: A promotion by force needs a reason: it stays in the ledger. Pass --reason TEXT.\n"
    assert ballast("promote", "3", "--force", "--yes") == (1, "", said)
    assert ballast("promote", "3", "--reason", "odd")[2].startswith("error: `--reason` goes with `--force`")


def test_breaker_is_shown_and_reset(two: Project, ballast: Any) -> None:
    assert re.search(r"breaker +closed: 1 of 3 refusals in a row", ballast("status")[1])
    for digest in "de":
        two.decided(two.bare_version(digest * 64), digest * 64, "refuse")
    assert re.search(r"breaker +OPEN: 3 retrainings in a row were refused \(v3, v4, v5\)", ballast("status")[1])
    assert json.loads(ballast("status", "--json")[1])["breaker"]["open"] is True
    code, out, _ = ballast("breaker", "reset", "--reason", "mended")
    assert (code, out.split(" (by ")[0]) == (0, "breaker closed: mended")
    assert re.search(r"  3  20.* reset +v2 +mended", ballast("history")[1])
    assert not re.search(r"^ +breaker", ballast("status")[1], re.MULTILINE)
    assert ballast("breaker", "reset", "--reason", "again")[2].startswith("error: The breaker is not open")


def test_promote_without_a_decision_fails_in_one_line(two: Project, ballast: Any) -> None:
    said = "error: The gate has made no decision on v7. `ballast status` shows the last ones.\n"
    assert ballast("promote", "7") == (1, "", said)
    assert ballast("promote", "3")[2].startswith("error: The gate refused v3: for the test")


def test_state_that_cannot_be_written_fails_in_one_line(
    project: Project, ballast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALLAST_STATE_URI", f"sqlite:///{Path('/proc/none/state.db')}")
    code, out, err = ballast("status")
    assert (code, out) == (1, "")
    assert err.startswith("error: There can be no state store at sqlite:////proc/none/state.db")
    assert err.count("\n") == 1


def test_explain_before_any_promotion_says_that_it_never_served(project: Project, ballast: Any) -> None:
    project.bare_version("a" * 64)
    code, out, _ = ballast("explain", "1")
    assert code == 0
    assert "served     never" in out


def test_card_prints_markdown_or_writes_the_page(two: Project, ballast: Any) -> None:
    code, out, _ = ballast("card", "2")
    assert (code, out.splitlines()[0]) == (0, "# late v2")
    assert "- passed · test: for [the] test" in out
    assert ballast("card", "2", "--html", "card.html")[:2] == (0, "written to card.html\n")
    assert (two.root / "card.html").read_text().startswith("<!doctype html>")
    assert json.loads(ballast("card", "2", "--json")[1])["decision"]["verdict"] == "promote"


@pytest.mark.parametrize(("outcome", "code"), [("identical", 0), ("equal", 3), ("different", 4)])
def test_reproduce_says_by_its_exit_code_what_came_out(
    two: Project, ballast: Any, monkeypatch: pytest.MonkeyPatch, outcome: str, code: int
) -> None:
    def made(number: int, tolerance: float, build: bool, say: Any) -> dict[str, Any]:
        say("train", "hgb [refitted]")
        return {
            "model": "late",
            "version": number,
            "outcome": outcome,
            "reasons": ["threads: 4 then, 1 here"],
            "tolerance": tolerance,
            "digest": {"registered": "a" * 64, "reproduced": "b" * 64},
            "predictions": {"rows": 1200, "differing": 7, "max_difference": 0.002},
        }

    monkeypatch.setattr(reproduce, "reproduce", made)
    found, out, _ = ballast("reproduce", "2")
    assert found == code
    assert out.startswith("  train      hgb [refitted]\n")
    if outcome != "identical":
        assert "7 of 1,200 test rows are predicted otherwise, by at most 0.002 (tolerance 0.01)" in out
        assert out.endswith("threads: 4 then, 1 here\n")
    found, out, _ = ballast("reproduce", "2", "--json", "--tolerance", "0.5", "--no-build")
    assert (found, json.loads(out)["tolerance"]) == (code, 0.5)
