"""A file of each kind that we write, cut in half where it lies: the next step heals it, or says what to do about it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from pipelines.checkpoint import Checkpoint

from .rounds import FIRST, RETRAIN, WINDOW
from .site import LATER, LOOP, Site


def tear(path: Path, share: float = 0.5) -> bytes:
    """Cut a file in half, as it lies; return what it was. One that is write-protected stays so."""
    whole, mode = path.read_bytes(), path.stat().st_mode
    assert len(whole) > 1
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(int(share * len(whole)))
    path.chmod(mode)
    return whole


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A whole loop, and what it came to."""
    made = Site.make(tmp_path_factory.mktemp("torn") / "project")
    for run, step, as_of in LOOP:
        made.step(run, run, step, str(as_of))
    return made


AS_OF = {"retrain": str(FIRST), "monitor": str(FIRST + WINDOW), "later": str(LATER)}


def again(site: Site, run: str, step: str) -> object:
    """The step once more; what it says but for the time it took."""
    found = site.step("retrain" if run == "later" else run, run, step, AS_OF[run])
    return {
        name: value for name, value in found.items() if name not in ("seconds", "cached", "created", "record_sha256")
    }


# The file, the step that meets it, what that says, and the steps that are the remedy.
SAID: list[tuple[str, str, str, str, Sequence[str]]] = [
    ("retrain", "data/land/manifest.json", "ingest", "manifest.json is not as `land` left it", ["land"]),
    ("retrain", "data/ingest/tables", "validate", "tables is not as `ingest` left it", ["ingest"]),
    ("retrain", "data/validate/quarantine", "prepare", "quarantine is not as `validate` left it", ["validate"]),
    ("retrain", "data/prepare/train.parquet", "train", "train.parquet is not as `prepare` left it", ["prepare"]),
    ("retrain", "data/prepare/schema.json", "train", "schema.json is not as `prepare` left it", ["prepare"]),
    ("retrain", "data/train/model/model.skops", "evaluate", "model is not as `train` left it", ["train"]),
    ("retrain", "data/ingest/tables", "decide", "tables is not as `ingest` left it", ["ingest"]),
    ("monitor", "data/validate/quarantine", "score", "quarantine is not as `validate` left it", ["validate"]),
    ("retrain", "data/train/history.csv", "register", "history.csv is not as `train` left it", ["train"]),
    ("retrain", "data/train/model/model.skops", "register", "model is not as `train` left it", ["train"]),
    ("retrain", "data/evaluate/metrics.json", "register", "metrics.json is not as `evaluate` left it", ["evaluate"]),
    ("retrain", "data/register/result.json", "decide", "result.json is no whole JSON", ["register"]),
    ("monitor", "data/score/predictions.parquet", "drift", "predictions.parquet cannot be read", ["score"]),
    ("monitor", "data/drift/verdict.json", "policy", "verdict.json is no whole JSON", ["drift"]),
]


@pytest.mark.chaos
@pytest.mark.parametrize(("run", "name", "step", "said", "remedy"), SAID, ids=[f"{case[1]}-{case[2]}" for case in SAID])
def test_torn_file_of_a_workspace_is_named_with_the_remedy(
    site: Site, run: str, name: str, step: str, said: str, remedy: Sequence[str]
) -> None:
    before = again(site, run, step)
    found = site.workspace(run, run) / name
    tear(found if found.is_file() else next(file for file in sorted(found.rglob("*")) if file.is_file()))
    done = site.attempt(run, run, step, AS_OF[run])
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    for one in remedy:
        again(site, run, one)
    assert again(site, run, step) == before


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["params.yaml", "dvc.lock", ".dvc/config.local"])
def test_torn_settings_or_lock_of_a_workspace_stop_every_step(site: Site, name: str) -> None:
    """Half of either may well be readable, and mean something else."""
    file = site.workspace("retrain", "retrain") / name
    whole = tear(file)
    for step in ("train", "register"):
        done = site.attempt("retrain", "retrain", step, None)
        assert done.returncode == 1
        assert "as the run's steps left it" in done.stderr or name in done.stderr
        assert "Traceback" not in done.stderr
    file.write_bytes(whole)
    again(site, "retrain", "register")


@pytest.mark.chaos
def test_torn_index_or_report_heals(site: Site) -> None:
    [index] = (site.var / "landing" / "index").glob("*.json")
    before = again(site, "retrain", "land")
    tear(index)
    assert again(site, "retrain", "land") == before
    [verdict] = (site.var / "reports" / "monitor").glob("*/verdict.json")
    whole = tear(verdict)
    again(site, "monitor", "policy")
    assert verdict.read_bytes() == whole


@pytest.mark.chaos
def test_torn_object_of_the_landing_store_is_named_and_landed_again(site: Site) -> None:
    again(site, "later", "land")
    objects = sorted((site.var / "landing" / "objects").glob("*/*.parquet"), key=lambda path: path.stat().st_mtime)
    tear(objects[0])
    done = site.attempt("retrain", "later", "ingest", AS_OF["later"])
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"{objects[0]} is damaged" in done.stderr
    objects[0].unlink()
    again(site, "later", "land")
    again(site, "later", "ingest")


@pytest.mark.chaos
def test_torn_model_and_prediction_log_are_named_and_heal_once_deleted(site: Site) -> None:
    before = again(site, "monitor", "score")
    [model] = (site.var / "models").glob("*/model.skops")
    tear(model)
    done = site.attempt("monitor", "monitor", "score", AS_OF["monitor"])
    assert f"model.skops in {model.parent}" in done.stderr
    for file in model.parent.iterdir():
        file.unlink()
    model.parent.rmdir()
    logged = sorted((site.var / "predictions").glob("date=*/v1.parquet"))
    tear(logged[0])
    assert again(site, "monitor", "score") == before, "of its own window the log is written anew"
    other = logged[0].parent.with_name("date=2024-03-01") / "v1.parquet"
    other.parent.mkdir()
    other.write_bytes(logged[0].read_bytes())
    tear(other)
    done = site.attempt("monitor", "monitor", "score", AS_OF["monitor"])
    assert f"The logged predictions {other} cannot be read" in done.stderr
    other.unlink()
    assert again(site, "monitor", "score") == before


@pytest.mark.chaos
def test_torn_decision_record_promotes_nothing(site: Site) -> None:
    for step in RETRAIN:
        again(site, "later", step)
    decided = site.results["later", "decide"]
    [record] = (site.var / "mlflow" / "artifacts").rglob(f"{decided['record_sha256']}.json")
    tear(record)
    done = site.attempt("retrain", "later", "promote", AS_OF["later"])
    assert "was changed" in done.stderr
    again(site, "later", "decide")
    assert site.step("retrain", "later", "promote", AS_OF["later"])["verdict"] == "promoted"


DATA = ("land", "ingest", "validate", "prepare")
# Which files of DVC's cache, and the stages that meet one of them.
CACHE: dict[str, tuple[Callable[[Path], bool], set[str]]] = {
    "objects": (lambda file: "files" in file.parts and file.suffix != ".dir", set(DATA)),
    "lists-of-folders": (lambda file: file.suffix == ".dir", {"land", "ingest", "validate"}),
    "run-cache": (lambda file: "runs" in file.parts and file.suffix != ".lock", set(DATA)),
}


def outs(site: Site, run: str) -> dict[str, object]:
    """What the stages of the data made in a run, by its dvc.lock."""
    stages = yaml.safe_load((site.workspace("retrain", run) / "dvc.lock").read_text())["stages"]
    return {step: stages[step]["outs"] for step in DATA}


@pytest.mark.chaos
@pytest.mark.parametrize("kind", CACHE)
def test_torn_cache_is_not_believed_and_whole_again_after_a_run(site: Site, kind: str) -> None:
    """Every file of a kind in DVC's cache; a new run of the same date would take all of it."""
    (chosen, meet) = CACHE[kind]
    kept = [file for file in (site.root / ".dvc" / "cache").rglob("*") if file.is_file() and chosen(file)]
    assert len(kept) > 1
    for file in kept:
        tear(file)
    for run, made in ((f"{kind}-torn", meet), (f"{kind}-mended", {"land"})):
        found = {step for step in DATA if not site.step("retrain", run, step, str(FIRST))["cached"]}
        assert found == made
        assert outs(site, run) == outs(site, "retrain")


@pytest.mark.chaos
def test_torn_database_of_dvc_is_named_and_of_no_loss(site: Site) -> None:
    for file in (site.root / "site").rglob("*.db"):
        tear(file)
    done = site.attempt("retrain", "without-database", "land", str(FIRST))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"is damaged: database disk image is malformed. Delete {site.root / 'site' / 'repo'}" in done.stderr
    shutil.rmtree(site.root / "site" / "repo")
    for step in DATA:
        site.step("retrain", "without-database", step, str(FIRST))
    assert outs(site, "without-database") == outs(site, "retrain")


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["state.db", "mlflow/mlflow.db"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_torn_database_judges_nothing(site: Site, name: str, share: float) -> None:
    """An emptied one is a new one to SQLite: with no champion in it, any challenger would take the place."""
    file = site.var / name
    again(site, "retrain", "register")
    whole = tear(file, share)
    for beside in (file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm")):
        beside.unlink(missing_ok=True)
    try:
        for step in ("decide", "register"):
            done = site.attempt("retrain", "retrain", step, AS_OF["retrain"])
            assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
            assert "from a backup" in done.stderr
    finally:
        for left in file.parent.glob(f"{file.name}*"):
            left.unlink()
        file.write_bytes(whole)
    again(site, "retrain", "register")
    again(site, "retrain", "decide")


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_torn_checkpoint_costs_the_training_so_far(
    tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Checkpoint(tmp_path / "hgb.pt")
    kept.save({"trees": [1] * 1000, "epoch": 3})
    with (tmp_path / "hgb.pt").open("r+b") as file:
        file.truncate(int(share * (tmp_path / "hgb.pt").stat().st_size))
    assert kept.load() is None
    assert "is damaged" in caplog.text
    kept.save({"epoch": 4})
    assert kept.load() == {"epoch": 4}
