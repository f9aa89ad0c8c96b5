"""Replays of a toy project: its steps are a script that says what a test has told it, all around them is real."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from pipelines import metrics, places, workspace, worth
from pipelines.errors import BallastError, DataRejected, TryAgain
from pipelines.replay import MONITOR, RETRAIN, Plan, Show, month, overridden, replay

PROJECT = Path(__file__).resolve().parents[2]
FIRST, LAST = date(2013, 4, 1), date(2013, 6, 1)
SERVERS = ("BALLAST_STATE_URI", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "BALLAST_RUN")
POLICY = {
    "triggers": [{"kind": "performance", "max_rise": 0.03}, {"kind": "drift", "windows": 2}],
    "cooldown_days": 21,
    "budget": {"retrainings": 6, "days": 365},
}
PARAMS = """# a comment that stays
as_of: "2013-04-01"
land: {tables: {events: {key: [id], time: time, columns: {id: string, time: timestamp, y: int}}}}
prepare: {label_delay_days: 1, validation_days: 14, test_days: 14, features: {numeric: [x], categorical: []}}
policy:   # what is replaced
  triggers:
    - {kind: performance, max_rise: 0.03}

    - {kind: drift, windows: 2}
  cooldown_days: 21
  budget: {retrainings: 6, days: 365}
# a comment after it
train: {seed: 1}
"""
SQL = "SELECT id AS key, time, y AS label FROM events"
STEP = """
import json, os, pathlib, re, shutil, signal, sys, time
step, run, as_of = sys.argv[1], sys.argv[5], sys.argv[7]
var, told = pathlib.Path(os.environ["BALLAST_VAR"]), json.loads(pathlib.Path(os.environ["TOLD"]).read_text())
with open(var / "calls.jsonl", "a") as file:
    call = {"argv": sys.argv[1:], "trigger": json.loads(os.environ["BALLAST_TRIGGER"])}
    file.write(json.dumps(call | {"environment": sorted(os.environ)}) + "\\n")
if told.get("kill") == [step, as_of] and not (var / "killed").exists():
    (var / "killed").touch()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
if told.get("fail") == [step, as_of]:
    print("error: it cannot be.", file=sys.stderr)
    sys.exit(told["code"])
root = var / "runs" / sys.argv[3] / run
version = len([line for line in (var / "ledger").read_text().split()]) if (var / "ledger").exists() else 0
result = {"summary": step + " as of " + as_of, "seconds": 0.5, "cached": step == "train" and version > 0}
if step == "ingest":
    shutil.copytree(told["tables"], root / "data/ingest/tables", dirs_exist_ok=True)
    (root / "pipelines").mkdir(exist_ok=True)
    shutil.copy("pipelines/prepare.sql", root / "pipelines")
if step == "settle":
    result["verdict"] = told.get("settle", "go")
if step == "score":
    (root / "data/score").mkdir(parents=True, exist_ok=True)
    file = told["predictions"] + "/" + sys.argv[9] + "-v" + str(version) + ".parquet"
    shutil.copy(file, root / "data/score/predictions.parquet")
    result["version"] = version
if step == "drift":
    (root / "data/drift").mkdir(parents=True, exist_ok=True)
    (root / "data/drift/verdict.json").write_text(json.dumps(told.get("verdict", {})))
if step == "policy":
    asks = re.search("kind: (schedule|performance)", open("params.yaml").read())
    result |= {"verdict": "retrain" if asks else "wait", "as_of": as_of, "interval": "", "reasons": ["told"]}
    result |= {"train_days": told.get("train_days"), "asked_by": sys.argv[3] + "/" + run}
if step == "admit":
    result["verdict"] = "pause" if as_of in told.get("paused", []) else "go"
if step == "train":
    result["digest"] = "d" + as_of
if step == "decide":
    verdict = "refuse" if as_of in told.get("refused", []) else "promote"
    result |= {"verdict": verdict, "version": version + 1, "record_sha256": "r" * 64, "as_of": as_of}
if step == "promote":
    with open(var / "ledger", "a") as file:
        file.write(as_of + "\\n")
    result["verdict"] = "promoted"
print(step, "speaks")
print("\\nballast-result " + json.dumps(result))
"""


class Toy:
    """A project whose steps do as told; the champion's version is the number of promotions."""

    def __init__(self, root: Path) -> None:
        self.root, self.var, self.told = root / "project", root / "var", root / "told.json"

    def make(self) -> None:
        (self.root / "pipelines").mkdir(parents=True)
        (self.root / "pipelines" / "__init__.py").touch()
        (self.root / "pipelines" / "run.py").write_text(STEP)
        (self.root / "pipelines" / "prepare.sql").write_text(SQL)
        (self.root / "params.yaml").write_text(PARAMS)
        self.git("init", "-q")
        subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=self.root, check=True)
        self.commit("a project")

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=self.root, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, message: str) -> str:
        self.git("add", "-A")
        self.git("commit", "-qm", message, "--allow-empty")
        return self.git("rev-parse", "HEAD")

    def tell(self, **told: Any) -> None:
        data = {"tables": str(self.root.parent / "tables"), "predictions": str(self.root.parent / "predictions")}
        self.told.write_text(json.dumps(data | told))

    def home(self) -> Path:
        return self.var / "replay" / f"2013-04..2013-06-{self.git('rev-parse', 'HEAD')[:12]}"

    def calls(self, policy: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.home() / policy / "calls.jsonl").read_text().splitlines()]

    def steps(self, policy: str) -> list[tuple[str, str, str]]:
        """Every call as DAG, as-of date and step."""
        return [(call["argv"][2], call["argv"][6], call["argv"][0]) for call in self.calls(policy)]


def write_data(root: Path) -> pd.DataFrame:
    """Three months of events, some without a label for ever; what version v predicts is worse the older it is."""
    random = np.random.default_rng(7)
    time = pd.date_range("2013-04-01", "2013-07-01", freq="2h", tz="UTC", inclusive="left").as_unit("us")
    y = pd.array(random.integers(0, 2, len(time)), dtype="Int64")
    y[::50] = pd.NA
    events = pd.DataFrame({"id": [f"e{n}" for n in range(len(time))], "time": time, "y": y})
    (root / "tables" / "events").mkdir(parents=True)
    (root / "predictions").mkdir()
    events.to_parquet(root / "tables" / "events" / "all.parquet", index=False)
    for number, start in enumerate(("2013-04-01", "2013-05-01", "2013-06-01"), 1):
        rows = events[events["time"].dt.month == number + 3].rename(columns={"id": "key"})
        for version in range(1, 4):
            chance = np.where(rows["y"].fillna(0) == 1, 0.5 + 0.1 * version, 0.5 - 0.1 * version)
            noise = random.uniform(0.0, 0.1, len(rows))
            rows.assign(probability=chance - noise, label=pd.NA).to_parquet(
                root / "predictions" / f"{start}-v{version}.parquet", index=False
            )
    return events


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    write_data(root)
    Toy(root).make()
    return root


@pytest.fixture
def toy(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True, symlinks=True)
    return here(tmp_path, monkeypatch)


def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The toy in ``root`` as the project that is replayed."""
    made = Toy(root)
    made.tell()
    for name in ("BALLAST_LANDING", "BALLAST_SOURCE"):
        monkeypatch.delenv(name, raising=False)
    for name in SERVERS:
        monkeypatch.setenv(name, "what the stack uses")
    monkeypatch.setenv("BALLAST_VAR", str(made.var))
    monkeypatch.setenv("TOLD", str(made.told))
    monkeypatch.setattr(places, "ROOT", made.root)
    return made


@pytest.fixture(scope="module")
def played(template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, dict[str, Any]]:
    """A replay of never and schedule, for the tests that only look."""
    root = tmp_path_factory.mktemp("played")
    shutil.copytree(template, root, dirs_exist_ok=True, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        toy = here(root, patch)
        toy.tell(verdict={"estimate": {"log_loss": 0.4321}})
        return toy, play("never", "schedule")[0]


def play(*policies: str) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    found = replay(FIRST, LAST, policies, Show(said.append, lambda done, text: None))
    return found, said


def outcomes(found: dict[str, Any], policy: str) -> list[str | None]:
    months = found["policies"][policy]["months"]
    return [month["retraining"]["outcome"] if month["retraining"] else None for month in months]


def test_replay_takes_the_steps_of_the_dags_month_by_month(played: tuple[Toy, dict[str, Any]]) -> None:
    toy, _ = played
    retrained = [("retrain_scheduled", "2013-04-01", step) for step in RETRAIN] + [("promote", "2013-04-01", "promote")]
    for end in ("2013-05-01", "2013-06-01"):
        retrained += [("monitor", end, step) for step in MONITOR]
        retrained += [("retrain_on_drift", end, step) for step in RETRAIN] + [("promote", end, "promote")]
    last = [("monitor", "2013-07-01", step) for step in MONITOR]
    labels = [("labels", "2013-07-02", step) for step in ("land", "ingest", "validate")]
    assert toy.steps("schedule") == retrained + last + labels


def test_replay_tells_steps_what_airflow_tells_them(played: tuple[Toy, dict[str, Any]]) -> None:
    toy, _ = played
    calls = {(call["argv"][2], call["argv"][6], call["argv"][0]): call for call in toy.calls("schedule")}
    assert calls["retrain_scheduled", "2013-04-01", "admit"]["trigger"] == {"kind": "schedule"}
    assert calls["monitor", "2013-05-01", "score"]["argv"][7:] == ["--start", "2013-04-01"]
    asked = calls["retrain_on_drift", "2013-05-01", "admit"]["trigger"]
    assert (asked["kind"], asked["reason"]) == ("drift", "policy as of 2013-05-01")
    assert asked["events"][0]["asked_by"] == "monitor/replay-2013-05-01"
    assert calls["retrain_on_drift", "2013-05-01", "train"]["argv"][7:] == ["--train-days=all"]
    promoted = calls["promote", "2013-05-01", "promote"]
    assert promoted["argv"][7:] == ["--version", "2", "--record-sha256", "r" * 64]
    assert promoted["trigger"]["events"][0]["version"] == 2


def test_replay_never_trains_the_first_champion_alone(played: tuple[Toy, dict[str, Any]]) -> None:
    toy, found = played
    assert [step for _, _, step in toy.steps("never")].count("train") == 1
    assert outcomes(found, "never") == [None, None, None]
    assert {month["champion"] for month in found["policies"]["never"]["months"]} == {1}
    assert found["summary"]["never"]["trainings"] == 0


def test_replay_counts_refusals_and_pauses_and_keeps_the_champion(toy: Toy) -> None:
    toy.tell(refused=["2013-05-01"], paused=["2013-06-01"])
    found, _ = play("schedule")
    assert outcomes(found, "schedule") == ["refuse", "paused", None]
    one = found["summary"]["schedule"]
    assert (one["trainings"], one["promoted"], one["refused"], one["paused"]) == (1, 0, 1, 1)
    assert {month["champion"] for month in found["policies"]["schedule"]["months"]} == {1}
    assert ("promote", "2013-05-01", "promote") not in toy.steps("schedule")
    assert ("retrain_on_drift", "2013-06-01", "prepare") not in toy.steps("schedule")


def test_replay_measures_the_champion_that_served_on_all_labels(played: tuple[Toy, dict[str, Any]]) -> None:
    toy, found = played
    events = pd.read_parquet(toy.root.parent / "tables" / "events" / "all.parquet").rename(columns={"id": "key"})
    for number, version in enumerate((1, 2, 3)):
        file = toy.root.parent / "predictions" / f"2013-0{number + 4}-01-v{version}.parquet"
        both = pd.read_parquet(file)[["key", "probability"]].merge(events, on="key")
        known = both[both["y"].notna()]
        month = found["policies"]["schedule"]["months"][number]
        expected = metrics.log_loss_rows(known["y"].astype(float), known["probability"]).mean()
        assert month["log_loss"] == pytest.approx(expected, abs=1e-12)
        assert (month["champion"], month["labelled_rows"], month["rows"]) == (version, len(known), len(both))
        assert known["time"].max().day == both["time"].max().day, "the last day's labels are among them"


def test_replay_sums_up_what_the_policies_gained(played: tuple[Toy, dict[str, Any]]) -> None:
    _, found = played
    months = found["policies"]["schedule"]["months"]
    rows, losses = ([month[name] for month in months] for name in ("labelled_rows", "log_loss"))
    one = found["summary"]["schedule"]
    assert one["log_loss"]["by_rows"] == pytest.approx(np.average(losses, weights=rows))
    assert one["log_loss"]["by_months"] == pytest.approx(np.mean(losses))
    assert one["gain_kept"] == {"by_rows": 1.0, "by_months": 1.0}
    assert found["summary"]["never"]["gain_kept"] == {"by_rows": 0.0, "by_months": 0.0}
    assert (one["trainings"], one["promoted"], one["share_of_schedule"]) == (2, 2, 1.0)
    assert found["summary"]["never"]["share_of_schedule"] == 0.0


def test_replay_leaves_the_projects_own_state_and_files_alone(played: tuple[Toy, dict[str, Any]]) -> None:
    toy, _ = played
    before = (toy.root / "params.yaml").read_text()
    assert sorted(path.name for path in toy.var.iterdir()) == ["replay"]
    assert before == PARAMS
    assert toy.git("status", "--porcelain") == ""
    for call in [*toy.calls("never"), *toy.calls("schedule")]:
        assert not set(SERVERS) & set(call["environment"]), "a step would write to the stack's own state"
    worlds = [(toy.home() / policy / "project" / "params.yaml").read_text() for policy in ("never", "schedule")]
    assert [yaml.safe_load(text)["policy"]["triggers"] for text in worlds] == [
        [],
        [{"kind": "schedule", "every_days": 30}],
    ]
    for text in worlds:
        outside = re.sub(r"(?s)policy:.*(?=# a comment after)", "", text)
        assert outside == re.sub(r"(?s)policy:.*(?=# a comment after)", "", before)


def test_replay_of_params_runs_the_very_commit_and_again_nothing(toy: Toy) -> None:
    first, _ = play("params")
    project = toy.home() / "params" / "project"
    assert (project / "params.yaml").read_text() == PARAMS
    assert workspace.git(project, "rev-parse", "HEAD") == toy.git("rev-parse", "HEAD")
    before = toy.calls("params")
    again, said = play("params")
    assert again == first
    assert toy.calls("params") == before
    assert len(said) == 3, "a line for each month"


@pytest.mark.parametrize("where", [["promote", "2013-05-01"], ["policy", "2013-07-01"]])
def test_replay_killed_goes_on_where_it_was_to_the_same_numbers(
    toy: Toy, played: tuple[Toy, dict[str, Any]], where: list[str]
) -> None:
    toy.tell(kill=where, verdict={"estimate": {"log_loss": 0.4321}})
    code = (
        "import pathlib, sys; from datetime import date; import pipelines.places as places\n"
        f"places.ROOT = pathlib.Path({str(toy.root)!r})\n"
        "from pipelines.replay import Show, replay\n"
        "replay(date(2013, 4, 1), date(2013, 6, 1), ['schedule'], Show(lambda _: None, lambda *_: None))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(PROJECT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    again, _ = play("schedule")
    assert again["policies"]["schedule"] == played[1]["policies"]["schedule"]
    taken = toy.steps("schedule")
    assert {(as_of, step) for _, as_of, step in taken if taken.count((_, as_of, step)) > 1} <= {(where[1], where[0])}


def test_replay_of_another_commit_is_another_replay_and_what_is_uncommitted_no_part_of_one(toy: Toy) -> None:
    toy.tell(fail=["land", "2013-04-01"], code=1)
    said: list[str] = []
    (toy.root / "params.yaml").write_text(PARAMS.replace("seed: 1", "seed: 2"))
    for commit in (False, True):
        if commit:
            toy.commit("another seed")
        with pytest.raises(BallastError, match="it cannot be"):
            replay(FIRST, LAST, ["never"], Show(said.append, lambda done, text: None))
        replayed = (toy.home() / "never" / "project" / "params.yaml").read_text()
        assert ("seed: 2" in replayed) == commit
    assert said == ["not part of this replay (uncommitted in the checkout): params.yaml"]
    assert len(list((toy.var / "replay").iterdir())) == 2


@pytest.mark.parametrize(("code", "error"), [(65, DataRejected), (75, TryAgain), (1, BallastError)])
def test_replay_whose_step_fails_says_which_and_where_its_log_is(
    toy: Toy, code: int, error: type[BallastError]
) -> None:
    toy.tell(fail=["drift", "2013-05-01"], code=code)
    with pytest.raises(BallastError, match=r"never: drift of monitor as of 2013-05-01 failed.*it cannot be") as raised:
        play("never")
    assert raised.type is error
    found = re.search(r"Its log: (\S+)\. ", str(raised.value))
    assert found is not None
    assert "error: it cannot be." in Path(found[1]).read_text()


@pytest.mark.parametrize(("code", "tries"), [(134, 4), (1, 1)])
def test_replay_step_that_was_killed_is_tried_again_as_the_dags_do(toy: Toy, code: int, tries: int) -> None:
    toy.tell(fail=["drift", "2013-05-01"], code=code)
    with pytest.raises(BallastError):
        play("never")
    calls = [json.loads(line)["argv"][0] for line in (toy.home() / "never" / "calls.jsonl").read_text().splitlines()]
    assert calls.count("drift") == tries


def test_replay_whose_monitor_would_wait_for_ever_says_so(toy: Toy) -> None:
    toy.tell(settle="wait")
    with pytest.raises(BallastError, match="monitor as of 2013-05-01 would wait for ever"):
        play("never")


def test_replay_without_a_first_champion_says_so(toy: Toy) -> None:
    toy.tell(refused=["2013-04-01"])
    with pytest.raises(BallastError, match="no champion as of 2013-04-01"):
        play("never")


def test_replay_played_by_another_process_is_refused(toy: Toy) -> None:
    import fcntl

    toy.home().mkdir(parents=True)
    held = os.open(toy.home(), os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TryAgain, match="by another process"):
            play("never")
    finally:
        os.close(held)


def test_replay_writes_table_figure_and_page_that_fetch_nothing(played: tuple[Toy, dict[str, Any]]) -> None:
    toy, found = played
    files = {name: (toy.home() / name).read_text() for name in ("replay.csv", "replay.svg", "index.html")}
    assert json.loads((toy.home() / "replay.json").read_text()) == found
    assert len(files["replay.csv"].splitlines()) == 1 + 2 * 3
    for name in ("replay.svg", "index.html"):
        assert not re.search(r"(src|href)=\"(https?:)?//", files[name])
        assert "schedule" in files[name]
    text = worth.table(found)
    assert re.search(r"2013-04 .*0\.\d{4} \(0\.432\) \+", text), "estimated beside realised, promoted after"
    assert re.search(r"schedule .* 100% +100% +2 +100% +2 +0 +0", text)


def test_overridden_leaves_triggers_of_one_kind_and_the_rest_as_it_is() -> None:
    assert overridden(POLICY, "params", []) == POLICY
    assert overridden(POLICY, "never", []) == POLICY | {"triggers": []}
    assert overridden(POLICY, "drift", []) == POLICY | {"triggers": [{"kind": "drift", "windows": 2}]}
    with pytest.raises(BallastError, match="none of the kind estimated_performance"):
        overridden(POLICY, "estimated_performance", [])


def test_overridden_schedule_is_due_at_the_end_of_the_shortest_month() -> None:
    windows = Plan("c" * 40, date(2013, 1, 1), date(2013, 4, 1)).windows
    found = overridden(POLICY, "schedule", windows)
    assert found["triggers"] == [{"kind": "schedule", "every_days": 28}]
    assert found["cooldown_days"] == 0
    assert found["budget"]["retrainings"] >= 12


def test_plan_of_months_over_a_years_end() -> None:
    plan = Plan("c" * 40, date(2013, 11, 1), date(2014, 2, 1))
    assert plan.windows == [
        (date(2013, 11, 1), date(2013, 12, 1)),
        (date(2013, 12, 1), date(2014, 1, 1)),
        (date(2014, 1, 1), date(2014, 2, 1)),
    ]
    assert plan.name == "2013-11..2014-01-cccccccccccc"


def test_replay_of_what_is_no_month_or_no_policy_is_refused(toy: Toy) -> None:
    with pytest.raises(BallastError, match=r"like 2013-04 \(found '2013'\)"):
        month("2013")
    with pytest.raises(BallastError, match=r"one of never, schedule.*\(found sometimes\)"):
        play("sometimes")
    with pytest.raises(BallastError, match="--to must not lie before --from"):
        replay(LAST, FIRST, ["never"], Show(print, print))
