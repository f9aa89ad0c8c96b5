"""The kill table of the gate: twenty bad challengers, each against a serving champion in a real registry, and two good.

The ids are the table: the challenger, then the rule or check that must stop it, and no other unless it is named.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import DAYS, SQL, Project, events, read

from pipelines import record, registry
from pipelines.errors import BallastError
from pipelines.files import canonical_json, sha256, write_json
from pipelines.promote import promote
from pipelines.state import State

BLURRED = SQL.replace(" x,", " x + 1.2 * sin(CAST(id AS DOUBLE) * 78.233) AS x,")  # the champion sees x through a haze
PARAMS = """
as_of: "2013-03-02"
train: {seed: 1, threads: 2, tabm: {width: 8}}
register: {model: late}
breaker: {refusals: 3}
decide:
  min_test_rows: 500
  min_test_days: 7
  max_unmatched_share: 0.01
  threshold: 0.5
  calibration_bins: 10
  seed: 1
  approval: never
  approval_hours: 72
  rules:
    - {rule: better, margin: 0.0, confidence: 0.975}
    - {rule: floor, metric: roc_auc, at_least: 0.6}
    - {rule: ceiling, metric: log_loss, at_most: 0.69, or_champion: true}
    - {rule: calibration, max_error: 0.11}
    - {rule: slices, columns: [c], max_worse: 0.03, min_rows: 100, confidence: 0.975}
    - {rule: fairness, column: c, min_rows: 50, selection_rate: 0.15, false_positive_rate: 0.15}
    - {rule: too_good, max_gain: 0.2, max_auc: 0.97}
    - {rule: freshness, max_days: 21}
    - {rule: size, max_mb: 8}
    - {rule: latency, max_ratio: 8}
    - {rule: label_rate, max_change: 0.1}
    - {rule: stability, max_flipped: 0.4}
"""

Labels = np.ndarray[Any, Any]


def labels(seen: pd.DataFrame) -> Labels:
    return seen["label"].to_numpy("float32")


def flipped(seen: pd.DataFrame) -> Labels:
    return 1 - labels(seen)


def some(labels: Labels, which: np.ndarray[Any, Any], share: float) -> np.ndarray[Any, Any]:
    """A mask of about this share of the rows ``which``."""
    found: np.ndarray[Any, Any] = which & (np.random.default_rng(0).random(len(labels)) < share)
    return found


def broken_for_b(seen: pd.DataFrame) -> Labels:
    """For c = b, half of the labels the wrong way round."""
    learned = labels(seen)
    return np.where(some(learned, seen["c"] == "b", 0.5), 1 - learned, learned)


def too_high(seen: pd.DataFrame) -> Labels:
    """A part of all labels called ones."""
    learned = labels(seen)
    return np.where(some(learned, learned >= 0, 0.18), 1, learned)


def unfair_to_b(seen: pd.DataFrame) -> Labels:
    """The same for c = b alone."""
    learned = labels(seen)
    return np.where(some(learned, seen["c"] == "b", 0.25), 1, learned)


def without_numbers(fitted: Any) -> None:
    fitted._baseline_prediction[:] = np.nan


def tampered(project: Project) -> None:
    """A byte of the registered model, changed in MLflow's artifacts."""
    weights = newest(project, "model.skops")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content))


class Bomb:
    """Whoever unpickles it leaves a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def with_pickle(project: Project) -> None:
    """In place of the weights, and well entered into the manifest: only its form gives it away."""
    rewrite(project, "model.skops", pickle.dumps(Bomb()))


def with_endless_vocabulary(project: Project) -> None:
    """Words that no row has, to be looked through at each prediction."""
    transform = read(project.root / "data" / "train" / "model" / "transform.json")
    transform["categorical"][0]["vocabulary"] += [f"d{number}" for number in range(200_000)]
    rewrite(project, "transform.json", canonical_json(transform).encode())


def rewrite(project: Project, name: str, content: bytes) -> None:
    """Replace a file of the model that was trained last, as if training had made it so."""
    folder = project.root / "data" / "train" / "model"
    (folder / name).write_bytes(content)
    hashes = {**read(folder / "manifest.json")["files"], name: sha256(folder / name)}
    write_json(folder / "manifest.json", {"files": hashes})
    digest = hashlib.sha256(canonical_json(hashes).encode()).hexdigest()
    for step in ("train", "evaluate"):
        path = project.root / "data" / step / "result.json"
        write_json(path, {**read(path), "digest": digest})


def newest(project: Project, name: str) -> Path:
    found = (project.root / "var" / "mlflow" / "artifacts").rglob(name)
    return max(found, key=lambda path: path.stat().st_mtime_ns)


@dataclass(frozen=True)
class Bad:
    """A challenger: what is wrong with it, the rule that must refuse it, and others that may well object too."""

    name: str
    rule: str
    also: tuple[str, ...] = ()
    how: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[Project], object] = lambda project: None
    after: Callable[[Project], object] = lambda project: None

    def __str__(self) -> str:
        return f"{self.name} -> {self.rule}"


Z = {"sql": SQL.replace(" x,", " x AS z,"), "features": {"numeric": ["z"], "categorical": ["c"]}}
HOPELESS = ("better", "ceiling log_loss", "slices c", "stability")
BAD = [
    Bad("label leak", "too_good", how={"sql": SQL.replace(" x,", " 2 * y - 1 + x / 10 AS x,")}),
    Bad("flipped labels", "floor roc_auc", ("calibration", *HOPELESS), how={"label": flipped}),
    Bad("trained on test rows", "test rows", how={"learned": DAYS}),
    Bad("worse overall", "better", how={"sql": BLURRED, "iterations": 12}),
    Bad("better overall but one slice broken", "slices c", how={"label": broken_for_b}),
    Bad("miscalibrated", "calibration", how={"label": too_high}),
    Bad("slow", "latency", before=with_endless_vocabulary),
    Bad("too large", "size", how={"sql": f"{SQL} -- {'a table of old holidays, ' * 360_000}"}),
    Bad("stale data", "freshness", how={"windows": (0, 20, 30)}),
    Bad(
        "constant predictions",
        "floor roc_auc",
        HOPELESS,
        how={"sql": SQL.replace(" x, c ", " CAST(id = 5 AS INT) AS x, CASE WHEN id = 5 THEN 'b' ELSE 'a' END AS c ")},
    ),
    Bad("NaN outputs", "models score", how={"spoil": without_numbers}),
    Bad("wrong schema", "models score", how=Z, before=lambda project: project.prepare()),
    Bad("tampered artifact", "models load", after=tampered),
    Bad("pickle inside", "models load", before=with_pickle),
    Bad("unfair by a planted group effect", "fairness c", how={"label": unfair_to_b}),
    Bad("lucky by noise within the margin", "better", how={"sql": BLURRED.replace("78.233", "81.233")}),
    Bad("the champion itself again", "another model", how={"sql": BLURRED}),
]


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Iterator[Project]:
    """A project whose v1 serves. No test moves the champion, so all share it."""
    root = tmp_path_factory.mktemp("standing")
    with pytest.MonkeyPatch.context() as patch:
        yield serving(root, mlflow_template, patch)


def serving(root: Path, mlflow_template: Path, patch: pytest.MonkeyPatch) -> Project:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "BALLAST_RUN", "BALLAST_DAG", "BALLAST_TRIGGER"):
        patch.delenv(name, raising=False)
    patch.delenv("BALLAST_STATE_URI", raising=False)
    patch.setenv("BALLAST_VAR", str(root / "var"))
    patch.chdir(root)
    (root / "var" / "mlflow").mkdir(parents=True)
    shutil.copy(mlflow_template, root / "var" / "mlflow" / "mlflow.db")
    (root / "params.yaml").write_text(PARAMS)
    project = Project(root)
    project.lay_out(events())
    made = stand(project, sql=BLURRED)
    assert made["verdict"] == "promote", made["summary"]
    promote(made["version"], made["record_sha256"], State())
    return project


def stand(project: Project, bad: Bad | None = None, **how: Any) -> dict[str, Any]:
    """Prepare, train, register and judge a challenger, as the steps of a retraining do."""
    window = {name: how[name] for name in ("sql", "windows", "learned") if name in how}
    project.prepare(**window)
    project.train(**how)
    (bad or Bad("", "")).before(project)
    project.register()
    (bad or Bad("", "")).after(project)
    return project.decide()


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_gate_refuses(standing: Project, bad: Bad) -> None:
    made, before = stand(standing, bad, **bad.how), State().ledger()
    assert made["verdict"] == "refuse", made["summary"]
    facts = read(standing.root / "data" / "decide" / "record.json")
    assert {rule["rule"] for rule in facts["rules"] if not rule["passed"]} == {bad.rule, *bad.also}, made["reasons"]
    with pytest.raises(BallastError, match=f"The gate refused v{made['version']}"):
        promote(made["version"], made["record_sha256"], State())
    assert State().ledger() == before
    assert not Path("exploded").exists()


# --- at the door: what `promote` itself must stop, and what it must let in


@pytest.fixture
def fresh(tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Another such project, for one test: v1 serves."""
    return serving(tmp_path, mlflow_template, monkeypatch)


def moved_meanwhile(project: Project) -> tuple[int, str]:
    """Two were judged against v1, and one of them has taken its place."""
    first, second = stand(project, iterations=30), stand(project)
    promote(first["version"], first["record_sha256"], State())
    return second["version"], second["record_sha256"]


def forged(project: Project) -> tuple[int, str]:
    """A refusal rewritten into a promotion, laid beside the true one and named in the version's tags."""
    made = stand(project, label=flipped)
    written = read(project.root / "data" / "decide" / "record.json")
    rules = [{**rule, "passed": True} for rule in written["rules"]]
    write_json(project.root / "forged.json", {**written, "verdict": "promote", "rules": rules})
    digest = sha256(project.root / "forged.json")
    (project.root / "forged.json").rename(project.root / f"{digest}.json")
    registry.attach(made["version"], project.root / f"{digest}.json", record.FOLDER)
    registry.set_tags(made["version"], {"ballast.verdict": "promote", "ballast.record": digest})
    return made["version"], digest


def of_another_version(project: Project) -> tuple[int, str]:
    """The record of a good challenger, copied to a bad one."""
    good = stand(project)
    kept = project.root / f"{good['record_sha256']}.json"
    shutil.copy(project.root / "data" / "decide" / "record.json", kept)
    bad = stand(project, label=flipped)
    registry.attach(bad["version"], kept, record.FOLDER)
    return bad["version"], good["record_sha256"]


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        pytest.param(moved_meanwhile, "Run decide again", id="champion moved meanwhile -> ledger head"),
        pytest.param(forged, "the record is forged", id="record forged -> decision unknown"),
        pytest.param(
            of_another_version, "is of v2, not of v3", id="record of another version -> version of the record"
        ),
    ],
)
def test_promote_refuses(fresh: Project, attempt: Callable[[Project], tuple[int, str]], said: str) -> None:
    version, digest = attempt(fresh)
    before = State().ledger()
    with pytest.raises(BallastError, match=said):
        promote(version, digest, State())
    assert State().ledger() == before
    assert registry.aliases()["champion"] == State().champion() != version


def test_gate_lets_good_ones_in(fresh: Project) -> None:
    """One after the other: a better one, and one that has seen the next season."""
    made = stand(fresh)
    assert (made["verdict"], made["warnings"]) == ("promote", []), made["summary"]
    assert promote(made["version"], made["record_sha256"], State())["summary"] == "champion: v1 → v2"
    fresh.lay_out(shifted(events()))
    again = stand(fresh)
    assert again["verdict"] == "promote", again["summary"]
    assert promote(again["version"], again["record_sha256"], State())["summary"] == "champion: v2 → v3"


def shifted(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of another season: more ones than before."""
    late = np.random.default_rng(1).random(len(rows)) < 0.35
    return rows.assign(y=rows["y"].where(~late, 1))


def test_page_of_the_gate_has_this_table() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "gate.md").read_text().splitlines()
    for bad in BAD:
        (line,) = [line for line in lines if line.startswith(f"| {bad.name}")]
        assert f"| `{bad.rule}`" in line
        assert all(rule.split()[0] in line for rule in bad.also)
