"""A file of each kind that we write, cut in half where it lies: the next step heals it, or says what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.checkpoint import Checkpoint

from .rounds import FIRST, RETRAIN, WINDOW
from .site import LATER, LOOP, Site


def tear(path: Path) -> bytes:
    """Cut a file in half, as it lies; return what it was."""
    whole = path.read_bytes()
    assert len(whole) > 1
    with path.open("r+b") as file:
        file.truncate(len(whole) // 2)
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
    ("retrain", "data/prepare/train.parquet", "train", "train.parquet cannot be read", ["prepare"]),
    ("retrain", "data/land/manifest.json", "ingest", "manifest.json is no whole JSON", ["land"]),
    ("retrain", "data/train/history.csv", "register", "history.csv is not as `train` left it", ["train"]),
    ("retrain", "data/train/model/model.skops", "register", "Changed since the model was written", ["train"]),
    ("retrain", "data/evaluate/metrics.json", "register", "metrics.json is not as `evaluate` left it", ["evaluate"]),
    ("retrain", "data/register/result.json", "decide", "result.json is no whole JSON", ["register"]),
    ("monitor", "data/score/predictions.parquet", "drift", "predictions.parquet cannot be read", ["score"]),
    ("monitor", "data/drift/verdict.json", "policy", "verdict.json is no whole JSON", ["drift"]),
]


@pytest.mark.chaos
@pytest.mark.parametrize(("run", "name", "step", "said", "remedy"), SAID, ids=[case[1] for case in SAID])
def test_torn_file_of_a_workspace_is_named_with_the_remedy(
    site: Site, run: str, name: str, step: str, said: str, remedy: Sequence[str]
) -> None:
    before = again(site, run, step)
    tear(site.workspace(run, run) / name)
    done = site.attempt(run, run, step, AS_OF[run])
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    for one in remedy:
        again(site, run, one)
    assert again(site, run, step) == before


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["params.yaml", "dvc.lock"])
def test_torn_settings_or_lock_of_a_workspace_stop_every_step(site: Site, name: str) -> None:
    """Half of either may well be readable, and mean something else."""
    file = site.workspace("retrain", "retrain") / name
    whole = tear(file)
    for step in ("train", "register"):
        done = site.attempt("retrain", "retrain", step, None)
        assert done.returncode == 1
        assert "as the run's steps left it" in done.stderr or "params.yaml" in done.stderr
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


@pytest.mark.chaos
def test_torn_state_store_is_said_to_be_damaged(site: Site) -> None:
    whole = tear(site.var / "state.db")
    done = site.attempt("retrain", "retrain", "decide", AS_OF["retrain"])
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "is damaged" in done.stderr
    (site.var / "state.db").write_bytes(whole)


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
