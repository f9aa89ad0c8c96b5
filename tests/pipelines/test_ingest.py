from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.errors import BallastError
from pipelines.files import read_json, write_json
from pipelines.ingest import ingest
from pipelines.schema import Table

TABLES = {
    "trips": Table(columns={"id": "int", "at": "timestamp"}, key=["id"], time="at"),
    "places": Table(columns={"id": "int"}, key=["id"]),
}


def store(landing: Path, *ids: int) -> dict[str, Any]:
    """Put an object in the landing store, as landing does; what the manifest says of it."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ids}), sink)
    data = sink.getvalue().to_pybytes()
    sha256 = hashlib.sha256(data).hexdigest()
    path = landing / "objects" / sha256[:2] / f"{sha256[2:]}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"sha256": sha256, "rows": len(ids)}


def object_path(landing: Path, stored: dict[str, Any]) -> Path:
    sha256: str = stored["sha256"]
    return landing / "objects" / sha256[:2] / f"{sha256[2:]}.parquet"


@pytest.fixture
def landing(tmp_path: Path) -> Path:
    return tmp_path / "landing"


@pytest.fixture
def manifest(tmp_path: Path, landing: Path) -> Path:
    trips = {"2013-03-01": [store(landing, 1, 2), store(landing, 9)], "2013-03-02": [store(landing, 3)]}
    places = {"all": [store(landing, *range(1000, 3000))]}
    path = tmp_path / "land" / "manifest.json"
    write_json(path, {"tables": {"places": places, "trips": trips}})
    return path


def laid_out(out: Path) -> dict[str, list[int]]:
    tables = out / "tables"
    return {str(path.relative_to(tables)): pq.read_table(path)["id"].to_pylist() for path in tables.rglob("*.*")}


def test_ingest_lays_out_a_file_for_each_piece_of_a_partition(tmp_path: Path, landing: Path, manifest: Path) -> None:
    result = ingest(manifest, landing, tmp_path / "out", TABLES)
    assert laid_out(tmp_path / "out") == {
        "trips/2013-03-01.parquet": [1, 2],
        "trips/2013-03-01-2.parquet": [9],
        "trips/2013-03-02.parquet": [3],
        "places/all.parquet": list(range(1000, 3000)),
    }
    assert result == {"summary": "2 days · 4 trips · 2,000 places", "rows": {"trips": 4, "places": 2000}}


def test_ingest_copies_so_that_a_write_in_place_spares_the_store(tmp_path: Path, landing: Path, manifest: Path) -> None:
    ingest(manifest, landing, tmp_path / "out", TABLES)
    for path in (tmp_path / "out").rglob("*.parquet"):
        path.write_bytes(b"spoilt")
    ingest(manifest, landing, tmp_path / "again", TABLES)


def test_ingest_again_replaces_the_folder_whole(tmp_path: Path, landing: Path, manifest: Path) -> None:
    ingest(manifest, landing, tmp_path / "out", TABLES)
    tables = read_json(manifest)["tables"]
    write_json(manifest, {"tables": {**tables, "trips": {"2013-03-02": tables["trips"]["2013-03-02"]}}})
    result = ingest(manifest, landing, tmp_path / "out", TABLES)
    assert laid_out(tmp_path / "out").keys() == {"trips/2013-03-02.parquet", "places/all.parquet"}
    assert result["summary"] == "1 day · 1 trips · 2,000 places"


def test_ingest_missing_object_leaves_the_folder_and_names_the_remedy(
    tmp_path: Path, landing: Path, manifest: Path
) -> None:
    ingest(manifest, landing, tmp_path / "out", TABLES)
    before = laid_out(tmp_path / "out")
    lost = object_path(landing, read_json(manifest)["tables"]["places"]["all"][0])
    lost.unlink()
    with pytest.raises(BallastError, match=rf"lacks the object {lost}. Run `python -m pipelines.land` again"):
        ingest(manifest, landing, tmp_path / "out", TABLES)
    assert laid_out(tmp_path / "out") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tables"]


def test_ingest_damaged_object_is_named_with_the_remedy(tmp_path: Path, landing: Path, manifest: Path) -> None:
    damaged = object_path(landing, read_json(manifest)["tables"]["trips"]["2013-03-02"][0])
    data = bytearray(damaged.read_bytes())
    data[20] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(BallastError, match=rf"{damaged} is damaged: .* Delete it. Run `python -m pipelines.land`"):
        ingest(manifest, landing, tmp_path / "out", TABLES)
    assert not (tmp_path / "out" / "tables").exists()


def test_ingest_table_that_the_manifest_lacks_is_an_error(tmp_path: Path, landing: Path, manifest: Path) -> None:
    tables = {**TABLES, "weather": TABLES["places"]}
    with pytest.raises(BallastError, match=r"has no table `weather`, which params.yaml declares. Run `python -m"):
        ingest(manifest, landing, tmp_path / "out", tables)


def test_ingest_months_are_counted_as_months(tmp_path: Path, landing: Path, manifest: Path) -> None:
    tables = {"places": {"all": [store(landing, 1)]}, "trips": {"2013-02": [store(landing, 1)]}}
    write_json(manifest, {"tables": tables})
    assert ingest(manifest, landing, tmp_path / "out", TABLES)["summary"] == "1 month · 1 trips · 1 places"


def test_ingest_without_a_timed_table_counts_rows_only(tmp_path: Path, landing: Path, manifest: Path) -> None:
    result = ingest(manifest, landing, tmp_path / "out", {"places": TABLES["places"]})
    assert result["summary"] == "2,000 places"


def test_main_lands_and_ingests_the_example_alike_twice(tmp_path: Path) -> None:
    """The stages as dvc.yaml calls them, on two days of the example data."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["as_of"] = "2013-01-03"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    environment = {**os.environ, "BALLAST_LANDING": str(tmp_path / "landing"), "PYTHONPATH": str(Path.cwd())}

    def stage(name: str, *options: str) -> str:
        command = [sys.executable, "-m", f"pipelines.{name}", "--params", "params.yaml", "--out", f"data/{name}"]
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout

    outs = []
    for _ in range(2):
        printed = stage("land"), stage("ingest", "--manifest", "data/land/manifest.json")
        outs.append({path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()})
    assert outs[0] == outs[1]
    assert printed == (
        "land       flights 2 days · weather 2 days · planes\n           0 of 5 partitions new · read 0 of 3 pieces\n",
        "ingest     2 days · 1,639 flights · 124 weather · 3,322 planes\n",
    )
    assert read_json(tmp_path / "data/ingest/result.json")["rows"]["flights"] == 1639
    flights = pq.read_table(tmp_path / "data/ingest/tables/flights")
    assert flights.schema.remove_metadata() == Table(**params["land"]["tables"]["flights"]).arrow
