from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from hashlib import md5
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import TABLES, Project, project_in, read

from pipelines import lineage, registry
from pipelines.errors import BallastError
from pipelines.explain import explain
from pipelines.files import sha256, write_json
from pipelines.ingest import ingest
from pipelines.land import LandParams, land
from pipelines.lineage import MANIFEST, UV_LOCK, VERDICT, seen
from pipelines.promote import promote
from pipelines.registry import Version
from pipelines.sources import connect
from pipelines.state import State

DECLARED: dict[str, Any] = {
    "events": TABLES["events"],
    "kinds": {"columns": {"c": "string", "size": "float"}, "key": ["c"]},
}
FEBRUARY = "events/2013-02-10"  # in the validation window


class World:
    """A project whose data is landed and ingested as the stages do it, from an inbox, under a dvc.lock as DVC has it.

    Its model is the same whatever the data is: on a laptop its versions then share a run.
    """

    def __init__(self, project: Project) -> None:
        self.project, self.root = project, project.root
        (self.root / "inbox").mkdir()
        (self.root / "uv.lock").write_text("torch 2.13.0")
        project.train()
        result = self.root / "data" / "train" / "result.json"
        write_json(result, {**read(result), "refit": True})
        (self.root / "inbox" / "kinds.csv").write_text("c,size\na,1.5\nb,2\n")
        for day in ("2013-01-05", "2013-02-10", "2013-03-01"):
            self.put(day)

    def put(self, day: str, y: int = 1, piece: str = "1") -> None:
        """An event of that day, in the piece of this number."""
        line = f"{piece},{day}T10:00:00Z,0.5,a,{y}"
        (self.root / "inbox" / f"events-{day}-{piece}.csv").write_text(f"id,time,x,c,y\n{line}\n")

    def ingest(self) -> None:
        options = {name: str(self.root / "inbox" / f"{name}*.csv") for name in DECLARED}
        params = LandParams.model_validate(
            {"source": "files", "options": options, "partition": "day", "tables": DECLARED}
        )
        data, landing = self.root / "data", self.root / "landing"
        land(connect("files", options), date(2013, 3, 2), landing, data / "land", params)
        ingest(data / "land" / "manifest.json", landing, data / "ingest", params.tables)

    def register(self, warnings: int = 0) -> Version:
        """The next version, of the data that the inbox holds."""
        self.ingest()
        found = {"passed": True, "expectations": 9, "quarantined": {"events": warnings}}
        found["warnings"] = [{"message": "an [odd] row"}] * warnings
        write_json(self.root / "data" / "validate" / "verdict.json", found)
        stages = {
            "land": {"outs": [self._entry("data/land/manifest.json")]},
            "ingest": {"deps": [self._entry("data/land/manifest.json")]},
            "validate": {"outs": [self._entry("data/validate/verdict.json")]},
            "train": {"deps": [self._entry("uv.lock")]},
        }
        (self.root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
        return registry.version(self.project.register())

    def _entry(self, path: str) -> dict[str, str]:
        return {"path": path, "hash": "md5", "md5": md5((self.root / path).read_bytes()).hexdigest()}

    def kept(self, version: Version, under: str = "") -> Path:
        """Where an artifact of the version's own lies."""
        run = self.root / "var" / "mlflow" / "artifacts" / "ballast" / version.run_id / "artifacts"
        return run / registry.records(version.lock) / under

    def file(self, name: str) -> Path:
        return self.root / "data" / "ingest" / "tables" / f"{name}.parquet"


@pytest.fixture
def world(project: Project) -> World:
    return World(project)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path, rows: pd.DataFrame) -> Iterator[World]:
    """v1; v2 of data in which February was corrected; v3 of the same, by an older Ballast. To be read only.

    Of v2 the verdict is lost; an older Ballast keeps it with the run alone, and no manifest.
    """
    with pytest.MonkeyPatch.context() as patch:
        world = World(project_in(tmp_path_factory.mktemp("three"), mlflow_template, rows, patch))
        world.register(warnings=1)
        world.put("2013-02-10", y=0)
        second = world.register()
        made = world.project.decided(2, second.digest)
        promote(2, made, State())
        third = world.register(warnings=2)
        for version, name in ((second, "validate"), (third, "land"), (third, "validate")):
            shutil.rmtree(world.kept(version, name))
        yield world


def saw(found: dict[str, Any]) -> list[str | None]:
    return [one["saw"] for one in found["versions"]]


def test_explain_has_each_partition_by_hash_the_verdict_and_the_environment(world: World) -> None:
    world.put("2013-02-10", piece="2")
    world.register(warnings=1)
    found = explain(1, State())
    events, kinds = found["data"]["tables"]["events"], found["data"]["tables"]["kinds"]
    assert (events["first"], events["last"], events["rows"]) == ("2013-01-05", "2013-03-01", 4)
    assert (kinds["first"], kinds["last"], kinds["rows"], list(kinds["partitions"])) == ("all", "all", 2, ["all"])
    files = {f"2013-02-10{suffix}": number for number, suffix in enumerate(("", "-2"))}
    for name, number in files.items():
        assert events["partitions"]["2013-02-10"][number]["sha256"] == sha256(world.file(f"events/{name}"))
    assert found["validation"] == read(world.root / "data" / "validate" / "verdict.json")
    assert found["environment"]["uv_lock_md5"] == md5(b"torch 2.13.0").hexdigest()
    assert found["environment"]["threads"] == 2
    assert found["missing"] == {}


def test_explain_has_one_hash_a_table_that_follows_its_partitions(three: World) -> None:
    first, second = (explain(number, State())["data"]["tables"] for number in (1, 2))
    assert first["events"]["sha256"] != second["events"]["sha256"]
    assert first["kinds"]["sha256"] == second["kinds"]["sha256"]


def test_explain_of_a_version_by_an_older_ballast_says_what_is_not_on_record(three: World) -> None:
    found = explain(3, State())
    assert found["data"]["tables"] is None
    assert found["missing"] == {MANIFEST: "no land/manifest.json was kept"}
    assert found["validation"]["quarantined"] == {"events": 2}, "the run's, as it is the one in v3's dvc.lock"
    assert found["environment"]["uv_lock_md5"]


def test_explain_of_a_version_without_a_lock_says_what_is_not_on_record(project: Project) -> None:
    project.bare_version("a" * 64)
    found = explain(1, State())
    assert (found["data"]["tables"], found["validation"]) == (None, None)
    assert found["missing"] == dict.fromkeys((MANIFEST, VERDICT, UV_LOCK), "no dvc.lock was kept")


def test_records_take_no_verdict_of_another_version_of_the_run(three: World) -> None:
    found = lineage.records(registry.version(2), VERDICT)
    assert (found.files, found.missing) == ({}, {VERDICT: f"the {VERDICT} that was kept is not the one in dvc.lock"})


def test_records_that_someone_changed_are_not_shown(world: World) -> None:
    version = world.register()
    manifest = world.kept(version, MANIFEST)
    manifest.write_text(manifest.read_text().replace('"rows": 1', '"rows": 7'))
    assert list(lineage.records(version, MANIFEST).missing) == [MANIFEST]
    lock = world.kept(version, "dvc.lock")
    lock.write_text(lock.read_text() + "\n")
    assert lineage.records(version).missing == {UV_LOCK: "the dvc.lock that was kept is not the version's own"}


def test_records_name_the_manifest_that_was_ingested_and_not_one_landed_later() -> None:
    landed, ingested = ({"path": "data/land/manifest.json", "md5": digest} for digest in ("later", "then"))
    found = lineage.Records({"land": {"outs": [landed]}, "ingest": {"deps": [ingested]}}, {}, {})
    assert found.md5("data/land/manifest.json") == "then"


def test_seen_tells_the_very_bytes_from_a_late_correction(three: World) -> None:
    found = seen(three.file(FEBRUARY), State())
    assert (found["table"], found["partition"]) == ("events", "2013-02-10")
    assert found["sha256"] == sha256(three.file(FEBRUARY))
    assert saw(found) == ["another revision", "these bytes", None]
    assert [one["version"] for one in found["versions"] if one["champion"]] == [2]
    first, second, third = found["versions"]
    assert first["sha256"] != second["sha256"] == [found["sha256"]]
    assert (second["used_as"], second["refit"], second["rows"]) == (["validation"], True, 1)
    assert (third["sha256"], third["missing"]) == ([], "no land/manifest.json was kept")


def test_seen_of_a_name_without_a_file_tells_the_revisions_apart(
    three: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy("params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    found = seen(Path(FEBRUARY), State())
    assert (found["file"], found["sha256"]) == (None, None)
    assert saw(found) == ["a revision", "a revision", None]
    assert len({one["sha256"][0] for one in found["versions"][:2]}) == 2
    assert seen(Path(f"data/ingest/tables/{FEBRUARY}.parquet"), State())["versions"] == found["versions"]


def test_seen_finds_a_copy_and_a_landed_object_by_their_bytes(three: World, tmp_path: Path) -> None:
    expected = ["another revision", "these bytes", None]
    sha = sha256(three.file(FEBRUARY))
    for path in (three.root / "landing" / "objects" / sha[:2] / f"{sha[2:]}.parquet", tmp_path / "copy"):
        if not path.exists():
            shutil.copy(three.file(FEBRUARY), path)
        found = seen(path, State())
        assert (found["table"], found["partition"], saw(found)) == ("events", "2013-02-10", expected)


def test_seen_takes_a_second_piece_for_the_same_partition(world: World) -> None:
    world.register()
    world.put("2013-02-10", piece="2")
    world.register()
    assert saw(seen(world.file(f"{FEBRUARY}-2"), State())) == ["another revision", "these bytes"]
    assert saw(seen(world.file(FEBRUARY), State())) == ["these bytes", "these bytes"]
    assert len(seen(Path(FEBRUARY), State())["versions"][1]["sha256"]) == 2


def test_seen_of_a_table_without_time_is_a_reference(three: World) -> None:
    found = seen(Path("kinds/all"), State())
    assert saw(found) == ["these bytes", "these bytes", None]
    assert [one["used_as"] for one in found["versions"]] == [["reference"], ["reference"], []]


def test_seen_of_data_that_came_later_is_by_none(three: World, tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    (later := tmp_path / "events" / "2013-02-20.parquet").write_bytes(b"other rows")
    assert saw(seen(later, State())) == ["nothing", "nothing", None]


def test_seen_where_nothing_is_on_record_says_so_of_each(world: World) -> None:
    version = world.register()
    shutil.rmtree(world.kept(version, "land"))
    assert saw(seen(Path("events/2013-02-11"), State())) == [None]


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("event/2013-02-10", r"Near it: events/2013-02-10"),
        ("events/2013-02-11", r"Near it: events/2013-"),
        ("kinds", r"Near it: kinds/all\. Name"),
        ("data/ingest/tables/events", r"Near it: events/2013-"),
        ("params.yaml", r"saw\. Name one as data/ingest/tables/TABLE/PARTITION\.parquet"),
        ("nope", r"saw\. Name one as"),
    ],
)
def test_seen_of_what_is_no_partition_names_the_nearest(three: World, path: str, near: str) -> None:
    with pytest.raises(BallastError, match=near):
        seen(Path(path), State())


@pytest.mark.parametrize(
    ("partition", "used_as"),
    [
        ("2012-12-31", []),
        ("2013-01-01", ["train"]),
        ("2013-02-01", ["train"]),
        ("2013-02-02", ["validation"]),
        ("2013-03-01", ["test"]),
        ("2013-03-02", []),
        ("2013-02", ["train", "validation", "test"]),
        ("2013-03", ["test"]),
        ("2013-04", []),
        ("all", ["reference"]),
    ],
)
def test_used_as_goes_by_the_days_that_partition_and_window_share(partition: str, used_as: list[str]) -> None:
    edges = ["2013-01-01", "2013-02-02", "2013-02-16", "2013-03-02"]
    ends = [f"{edge}T00:00:00+00:00" for edge in edges]
    windows = {
        name: {"start": start, "end": end}
        for name, start, end in zip(("train", "validation", "test"), ends[:-1], ends[1:], strict=True)
    }
    tags = {"ballast.windows": json.dumps(windows)}
    assert lineage._used_as(partition, Version(1, "", "", "", datetime.now(UTC), tags)) == used_as


def test_explain_command_shows_the_records(three: World, ballast: Any) -> None:
    code, out, _ = ballast("explain", "1")
    assert code == 0
    for said in (
        "\n  partitions events     3 partitions, 2013-01-05 to 2013-03-01, 3 rows  ",
        "\n             kinds      all, 2 rows  ",
        "\n  validation passed · 9 expectations · 1 warning, 1 row in quarantine\n",
        "\n             warned  an [odd] row\n",
        f"\n  environment uv.lock {md5(b'torch 2.13.0').hexdigest()[:12]} (MD5) · python 3.11.",
    ):
        assert said in out, (said, out)
    assert "\n  partitions not on record: no land/manifest.json was kept\n" in ballast("explain", "3")[1]
    assert json.loads(ballast("explain", "1", "--json")[1]) == json.loads(json.dumps(explain(1, State())))


def test_explain_command_shows_who_saw_a_partition(three: World, ballast: Any) -> None:
    code, out, _ = ballast("explain", "--data", FEBRUARY)
    assert code == 0
    found = seen(Path(FEBRUARY), State())
    old, new = (one["sha256"][0][:12] for one in found["versions"][:2])
    window = "1 rows · validation window (refitted on it) · as of 2013-03-02"
    assert out.splitlines() == [
        f"events/2013-02-10 · SHA-256 {new}",
        f"  v1         another revision {old}, {window}",
        f"  v2         these bytes {new}, {window} · champion",
        "  v3         not on record: no land/manifest.json was kept · as of 2013-03-02",
    ]
    assert json.loads(ballast("explain", "--data", FEBRUARY, "--json")[1]) == found


def test_explain_command_takes_a_version_or_data_and_not_both(project: Project, ballast: Any) -> None:
    said = (
        "error: Name a version or a partition: `ballast explain 2`, or `ballast explain --data flights/2013-02-03`.\n"
    )
    assert ballast("explain") == (1, "", said)
    assert ballast("explain", "1", "--data", FEBRUARY) == (1, "", said)
    assert ballast("explain", "--data", FEBRUARY)[1].endswith("No version is registered yet.\n")


def test_explain_is_light() -> None:
    code = "import pipelines.explain, pipelines.lineage, sys; print(*sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not {"mlflow", "pandas", "torch", "sklearn", "duckdb"} & set(done.stdout.split())
