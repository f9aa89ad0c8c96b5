"""Score: a real model of a tiny dataset, its tables laid out as ingest does."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import baseline, model, score
from pipelines.errors import BallastError, DataRejected
from pipelines.files import read_json, whole_file
from pipelines.schema import Features, Table

EVENTS = Table(
    columns={"id": "string", "happened": "timestamp", "size": "float", "colour": "string", "outcome": "int"},
    key=["id"],
    time="happened",
)
SQL = "SELECT id AS key, happened AS time, outcome = 1 AS label, size * 2 AS twice, colour FROM events"
FEATURES = Features(numeric=["twice"], categorical=["colour"])
WINDOWS = {"train": ("01-01", "01-21"), "validation": ("01-21", "01-26"), "test": ("01-26", "01-30")}
START, END = date(2013, 2, 1), date(2013, 2, 11)


def events() -> pd.DataFrame:
    """Four a day, the first at midnight, through January and February; a fifth of them never gets an outcome."""
    random = np.random.default_rng(1)
    at = pd.date_range("2013-01-01", "2013-03-01", freq="6h", tz="UTC", inclusive="left")
    size = random.normal(size=len(at))
    outcome = pd.array((size + random.normal(size=len(at)) > 0).astype(int), dtype="Int64")
    outcome[::5] = pd.NA
    colour = random.choice(["red", "blue"], len(at))
    return pd.DataFrame(
        {"id": [f"e{i}" for i in range(len(at))], "happened": at, "size": size, "colour": colour, "outcome": outcome}
    )


def write(path: Path, frame: pd.DataFrame, schema: pa.Schema) -> None:
    with whole_file(path) as part:
        pq.write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False), part)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    write(folder / "events" / "all.parquet", events(), EVENTS.arrow)
    return folder


@pytest.fixture(scope="module")
def champion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sklearn.ensemble import HistGradientBoostingClassifier

    folder = tmp_path_factory.mktemp("champion") / "model"
    rows = events().rename(columns={"outcome": "label"}).assign(twice=lambda frame: frame["size"] * 2).dropna()
    transform = model.Transform.fit(rows, FEATURES)
    classifier = HistGradientBoostingClassifier(max_iter=5, random_state=1)
    classifier.fit(transform.encode(rows), rows["label"].astype(int))
    schema: dict[str, Any] = {
        "as_of": "2013-01-31",
        "label_delay_days": 2,
        "features": FEATURES.model_dump(),
        "importance": {"twice": 0.02},
        "tables": {"events": EVENTS.model_dump()},
        "windows": {
            name: {"start": f"2013-{start}T00:00:00+00:00", "end": f"2013-{end}T00:00:00+00:00"}
            for name, (start, end) in WINDOWS.items()
        },
    }
    model.save(folder, "hgb", baseline.dumps(classifier), transform, schema, SQL.encode())
    return folder


@pytest.fixture(scope="module")
def champion(champion_folder: Path) -> model.Model:
    return model.load(champion_folder)


def run(
    champion: model.Model,
    tables: Path,
    out: Path,
    start: date = START,
    end: date = END,
    version: int = 7,
    earlier_windows: int = 2,
    quarantine: Path | None = None,
) -> dict[str, Any]:
    """One run of the monitor; the log lies beside its output."""
    return score.score(champion, version, tables, quarantine, start, end, out, out.parent / "log", earlier_windows)


def logged(out: Path) -> pd.DataFrame:
    """What score says of this batch and those before: rows and labels by first day and version."""
    frame = pd.read_parquet(out / "logged.parquet")
    return frame.groupby(["start", "version"])["label"].agg(["size", "count"]).reset_index().astype({"start": "str"})


@pytest.fixture(scope="module")
def scored(
    champion: model.Model, tables: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("score") / "out"
    return out, run(champion, tables, out)


def test_score_takes_the_rows_from_start_up_to_end(scored):
    out, result = scored
    times = pd.read_parquet(out / "predictions.parquet")["time"]
    assert (len(times), result["rows"]) == (40, 40)
    assert (times.min(), times.max()) == (
        pd.Timestamp("2013-02-01", tz="UTC"),
        pd.Timestamp("2013-02-10 18:00", tz="UTC"),
    )
    assert (result["version"], result["start"], result["end"]) == (7, "2013-02-01", "2013-02-11")


def test_score_label_not_known_by_the_end_is_null(scored):
    out, result = scored
    batch = pd.read_parquet(out / "predictions.parquet").set_index("key")
    outcome = events().set_index("id").loc[batch.index]
    unknown = batch["time"] >= pd.Timestamp("2013-02-09", tz="UTC")
    assert unknown.sum() == 8
    assert batch.loc[unknown, "label"].isna().all()
    known = outcome.loc[~unknown, "outcome"]
    assert batch.loc[~unknown, "label"].isna().equals(known.isna())
    assert (batch.loc[~unknown, "label"].dropna() == known.dropna()).all()
    assert result["labelled_rows"] == known.notna().sum()
    assert 0 < known.isna().sum() < len(known)


def test_score_probability_is_the_champions_on_its_own_preparation(scored, champion):
    batch = pd.read_parquet(scored[0] / "predictions.parquet")
    size = events().set_index("id").loc[batch["key"], "size"].to_numpy()
    assert batch["twice"].to_numpy() == pytest.approx(2 * size)
    assert batch["probability"].to_numpy() == pytest.approx(champion.predict(batch))
    assert batch["probability"].nunique() > 2


def test_score_reference_is_the_champions_train_and_test_window(scored):
    reference = pd.read_parquet(scored[0] / "reference.parquet")
    assert reference.groupby("window")["key"].count().to_dict() == {"train": 80, "test": 16}
    days = reference.groupby("window")["time"].agg(["min", "max"]).map(lambda time: f"{time:%m-%d}")
    assert days.loc["train"].to_list() == ["01-01", "01-20"]
    assert days.loc["test"].to_list() == ["01-26", "01-29"]
    probability = reference.set_index("window")["probability"]
    assert probability.loc["test"].notna().all()
    assert probability.loc["train"].isna().all()


def test_score_result_says_what_drift_needs(scored):
    result = scored[1]
    assert Features.model_validate(result["features"]) == FEATURES
    assert result["labels_until"] == "2013-02-09"
    assert result["importance"] == {"twice": 0.02}
    assert result["summary"] == f"40 rows with v7 · {result['labelled_rows']} with a label"


def test_score_leaves_quarantined_rows_out(champion, tables, tmp_path):
    schema = EVENTS.arrow.append(pa.field("reason", pa.string()))
    rows = events().assign(reason="outcome out of range").query("happened.dt.strftime('%m-%d') == '02-03'")
    write(tmp_path / "quarantine" / "events.parquet", rows, schema)
    result = run(champion, tables, tmp_path / "out", quarantine=tmp_path / "quarantine")
    assert result["rows"] == 36


def test_score_interval_without_rows_is_rejected_and_says_what_there_is(champion, tables, tmp_path):
    with pytest.raises(DataRejected, match=r"2013-03-01 to 2013-04-01 \(found rows from 2013-01-01 to 2013-02-28\)"):
        run(champion, tables, tmp_path / "out", date(2013, 3, 1), date(2013, 4, 1))


def test_score_champion_windows_no_longer_there_give_an_empty_reference(champion, tmp_path):
    write(tmp_path / "tables" / "events" / "all.parquet", events().query("happened.dt.month == 2"), EVENTS.arrow)
    run(champion, tmp_path / "tables", tmp_path / "out")
    assert list(pd.read_parquet(tmp_path / "out" / "reference.parquet").columns) == [
        "window", "key", "time", "label", "probability", "twice", "colour",
    ]  # fmt: skip


def test_score_logs_each_prediction_on_its_day_without_a_label(scored):
    out = scored[0]
    files = sorted((out.parent / "log").rglob("*.*"))
    assert [f"{file.parent.name}/{file.name}" for file in files] == [
        f"date=2013-02-{d:02}/v7.parquet" for d in range(1, 11)
    ]
    kept = pd.concat(pq.ParquetFile(file).read().to_pandas() for file in files)
    assert list(kept.columns) == ["version", "start", "end", "time", "key", "probability", "features_hash"]
    batch = pd.read_parquet(out / "predictions.parquet")
    assert kept[["time", "key", "probability"]].reset_index(drop=True).equals(batch[["time", "key", "probability"]])
    assert kept["features_hash"].nunique() == len(batch)


def test_score_again_leaves_the_log_as_it_was(champion, tables, tmp_path):
    run(champion, tables, tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "log").rglob("*.*")}
    first = (tmp_path / "out" / "logged.parquet").read_bytes()
    run(champion, tables, tmp_path / "out")
    assert {file: file.read_bytes() for file in (tmp_path / "log").rglob("*.*")} == before
    assert (tmp_path / "out" / "logged.parquet").read_bytes() == first


def test_score_another_champion_of_the_same_days_stays_beside(champion, tables, tmp_path):
    for version in (7, 8):
        run(champion, tables, tmp_path / "out", version=version)
    assert logged(tmp_path / "out").to_numpy().tolist() == [["2013-02-01", 7, 40, 25], ["2013-02-01", 8, 40, 25]]


def test_score_labels_that_came_since_complete_the_batch_before(champion, tables, tmp_path):
    """Those of its last two days were not due by its end; one came later still, and its row was there before."""
    late = events()
    late.loc[late["id"] == "e125", "outcome"] = 1  # 2013-02-01: without an outcome, until now
    write(tmp_path / "tables" / "events" / "all.parquet", late, EVENTS.arrow)
    run(champion, tables, tmp_path / "out")
    assert logged(tmp_path / "out").to_numpy().tolist() == [["2013-02-01", 7, 40, 25]]
    run(champion, tmp_path / "tables", tmp_path / "out", END, date(2013, 2, 21))
    assert logged(tmp_path / "out").to_numpy().tolist() == [["2013-02-01", 7, 40, 33], ["2013-02-11", 7, 40, 25]]


def test_score_logged_rows_have_the_features_of_now(scored, champion):
    """The avoidable loss is learnt from them."""
    out, _ = scored
    names = ["key", *champion.features.names]
    batch, kept = (pd.read_parquet(out / f"{name}.parquet")[names] for name in ("predictions", "logged"))
    pd.testing.assert_frame_equal(
        kept.sort_values("key", ignore_index=True), batch.sort_values("key", ignore_index=True)
    )


def test_score_logged_row_that_is_gone_stays_without_a_label(champion, tables, tmp_path):
    write(tmp_path / "tables" / "events" / "all.parquet", events().query("id != 'e126'"), EVENTS.arrow)
    run(champion, tables, tmp_path / "out")
    run(champion, tmp_path / "tables", tmp_path / "out", END, date(2013, 2, 21))
    assert logged(tmp_path / "out").to_numpy().tolist()[0] == ["2013-02-01", 7, 40, 31]


def test_score_label_delay_of_45_days_leaves_this_batch_without_and_completes_the_first(champion, tables, tmp_path):
    slow = replace(champion, schema={**champion.schema, "label_delay_days": 45})
    for start, end in (((1, 1), (1, 11)), ((2, 1), (2, 11))):
        run(slow, tables, tmp_path / "out", date(2013, *start), date(2013, *end))
    assert logged(tmp_path / "out")["count"].tolist() == [0, 0]
    result = run(slow, tables, tmp_path / "out", date(2013, 2, 19), date(2013, 3, 1))
    assert logged(tmp_path / "out")["count"].tolist() == [32, 0, 0]  # labels until 2013-01-15
    assert (result["labelled_rows"], result["labels_until"]) == (0, "2013-01-15")


def test_score_of_a_past_batch_sees_nothing_that_was_logged_after_it(champion, tables, tmp_path):
    for start, end in ((END, date(2013, 2, 21)), (START, END)):
        run(champion, tables, tmp_path / "out", start, end)
    assert logged(tmp_path / "out")["start"].tolist() == ["2013-02-01"]


def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Path:
    """A folder with params.yaml and a state of its own, in which main() runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("BALLAST_STATE_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BALLAST_VAR", str(tmp_path / "var"))
    monkeypatch.setattr("sys.argv", ["score", *arguments])
    judging = "{earlier_windows: 2, min_rows: 10, min_days: 7, standard_errors: 2, confidence: 0.95, "
    judging += "calibration_bins: 5, seed: 1}"
    (tmp_path / "params.yaml").write_text(
        f'as_of: "2013-02-11"\nscore: {{}}\nperformance: {judging}\nregister: {{model: events}}\n'
    )
    return tmp_path / "data" / "score"


def test_main_without_champion_scores_nothing_and_clears_what_was(tmp_path, monkeypatch):
    out = workspace(tmp_path, monkeypatch, "--start", "2013-02-01")
    out.mkdir(parents=True)
    (out / "predictions.parquet").write_bytes(b"of an earlier run")
    score.main()
    assert [path.name for path in out.iterdir()] == ["result.json"]
    assert read_json(out / "result.json")["version"] is None


def test_main_start_on_the_as_of_date_is_refused(tmp_path, monkeypatch):
    workspace(tmp_path, monkeypatch, "--start", "2013-02-11")
    with pytest.raises(BallastError, match="before the as-of date 2013-02-11"):
        score.main()
