"""Prepare: what the shipped SQL knows and when, and how windows are cut and written."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipelines import params, rows
from pipelines.errors import DataRejected, ParamsError
from pipelines.files import read_json, sha256
from pipelines.prepare import PrepareParams, prepare
from pipelines.schema import Declared, Features, Table

ROOT = Path(__file__).resolve().parents[2]
SQL = (ROOT / "pipelines" / "prepare.sql").read_text(encoding="utf-8")
FLIGHTS = params.load(ROOT / "params.yaml", "land", Declared).tables
PARAMS = params.load(ROOT / "params.yaml", "prepare", PrepareParams)
Records = list[dict[str, Any]]


def lay_out(folder: Path, declared: dict[str, Table], tables: dict[str, Records]) -> Path:
    for name, records in tables.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(records, schema=declared[name].arrow)
        pq.write_table(table, folder / name / "all.parquet")
    return folder


# --- the SQL: one row per flight -------------------------------------------------------------------------------------


def flight(time: datetime, number: int = 1, **others: Any) -> dict[str, Any]:
    """A flight scheduled for ``time`` (UTC), with the local columns that belong to it."""
    local = time.astimezone(ZoneInfo("America/New_York"))
    schedule = {
        **{"year": local.year, "month": local.month, "day": local.day, "hour": local.hour, "minute": local.minute},
        **{"sched_dep_time": local.hour * 100 + local.minute, "time_hour": time.replace(minute=0)},
        **{"carrier": "UA", "flight": number, "tailnum": "N1", "origin": "EWR", "dest": "IAH", "distance": 1400.0},
    }
    return schedule | {"arr_delay": 0.0} | others


def weather(hour: datetime, temp: float, origin: str = "EWR") -> dict[str, Any]:
    return {"time_hour": hour, "origin": origin, "temp": temp, "visib": 10.0}


def utc(day: int, hour: int, minute: int = 0) -> datetime:
    return datetime(2013, 1, day, hour, minute, tzinfo=UTC)


def rows_of(flights: Records, weather: Records = (), planes: Records = (), sql: str = SQL) -> pd.DataFrame:
    with TemporaryDirectory() as folder:
        tables = {"flights": flights, "weather": list(weather), "planes": list(planes)}
        return rows.select(lay_out(Path(folder), FLIGHTS, tables), None, sql, FLIGHTS)


def test_sql_flight_of_the_evening_gets_local_hour_and_weekday():
    row = rows_of([flight(utc(1, 1, 30))]).iloc[0]  # 20:30 of New Year's Eve in New York, a Monday
    assert (row["departure_hour"], row["weekday"]) == (20.5, 0)
    assert row["time"] == pd.Timestamp("2013-01-01T01:30Z")
    assert row["key"] == "2013-01-01T01Z UA 1"


def test_sql_gives_exactly_the_features_that_params_name():
    names = set(rows_of([flight(utc(1, 12))]).columns) - set(rows.HEAD)
    assert names == set(PARAMS.features.names)


@pytest.mark.parametrize(("arr_delay", "label"), [(15.0, 0), (15.5, 1), (-3.0, 0)])
def test_sql_label_is_more_than_15_minutes_late(arr_delay, label):
    assert rows_of([flight(utc(1, 12), arr_delay=arr_delay)])["label"].to_list() == [label]


def test_sql_cancelled_flight_has_no_label():
    assert rows_of([flight(utc(1, 12), arr_delay=None)])["label"].isna().all()


def test_sql_flight_with_neither_weather_nor_aircraft_is_kept_with_nulls():
    row = rows_of([flight(utc(1, 12), tailnum=None)]).iloc[0]
    assert row[["temp", "visib", "plane_age", "seats", "engines"]].isna().all()


def test_sql_aircraft_gives_age_seats_and_engines():
    planes = [{"tailnum": "N1", "year": 1999, "seats": 149, "engines": 2}, {"tailnum": "N2", "seats": 5}]
    row = rows_of([flight(utc(1, 12))], planes=planes).iloc[0]
    assert (row["plane_age"], row["seats"], row["engines"]) == (14, 149, 2)


@pytest.mark.parametrize(("minute", "temp"), [(0, 41.0), (59, 41.0)])
def test_sql_weather_is_the_last_whole_hour_two_hours_before(minute, temp):
    hours = [weather(utc(1, hour), temp=30.0 + hour) for hour in range(8, 18)]
    # at 14:xx, two hours before is 12:xx; the hour of 11:00 is over since 12:00, that of 12:00 is not
    assert rows_of([flight(utc(1, 14, minute))], hours)["temp"].to_list() == [temp]


def test_sql_weather_is_that_of_the_origin():
    hours = [weather(utc(1, 9), 30.0, "EWR"), weather(utc(1, 10), 50.0, "JFK")]
    assert rows_of([flight(utc(1, 14))], hours)["temp"].to_list() == [30.0]


@pytest.mark.parametrize(("hour", "known"), [(5, True), (4, False)])
def test_sql_weather_older_than_six_hours_is_null(hour, known):
    row = rows_of([flight(utc(1, 14))], [weather(utc(1, hour), 30.0)]).iloc[0]  # asked at 12:00
    assert row[["temp", "visib"]].notna().to_list() == [known, known]


# --- the law: nothing after the prediction time moves a feature ------------------------------------------------------

OUTCOMES = ("dep_time", "dep_delay", "arr_time", "arr_delay", "air_time")
PLANES = [{"tailnum": "N1", "year": 1999, "seats": 149, "engines": 2}]
START, HOUR = utc(10, 0), timedelta(hours=1)
NUMBERS = st.integers(0, 2000)
World = dict[str, Records]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Ten hours of weather at two airports, with gaps, and some flights, each with its outcomes."""
    hours = draw(st.sets(st.integers(0, 10), min_size=3))
    minutes = draw(st.lists(st.integers(0, 10 * 60), max_size=4, unique_by=lambda minute: minute // 60))
    flights = [flight(START + timedelta(minutes=minute), number=2) for minute in minutes]
    places = [(START + timedelta(hours=hour), origin) for hour in hours for origin in ("EWR", "JFK")]
    return {
        "flights": [record | {name: draw(NUMBERS) for name in OUTCOMES} for record in flights],
        "weather": [weather(hour, draw(NUMBERS), origin) for hour, origin in places],
    }


def features_in(world: World, row: dict[str, Any], sql: str) -> dict[str, Any]:
    frame = rows_of([row, *world["flights"]], world["weather"], PLANES, sql)
    return frame[frame["key"].str.endswith(" UA 1")].drop(columns="label").fillna(-1).iloc[0].to_dict()


def with_another_future(world: World, other: World, now: datetime) -> World:
    """The weather known by ``now`` and the flights scheduled until then; all else, and all outcomes, of ``other``."""

    def past(record: dict[str, Any]) -> bool:
        # a weather row is known when its hour is over
        return record["time_hour"] + (timedelta(minutes=record["minute"]) if "minute" in record else HOUR) <= now

    # no feature reads an outcome, even of a flight long gone, so these change for every flight
    flights = [record | dict.fromkeys(OUTCOMES, 1000) for record in world["flights"] if past(record)]
    return {
        "flights": flights + [record for record in other["flights"] if not past(record)],
        "weather": [r for r in world["weather"] if past(r)] + [r for r in other["weather"] if not past(r)],
    }


def assert_future_is_not_seen(sql: str) -> None:
    """Ask for one flight's features in a world, and in one that has the same past and another future."""

    @given(worlds(), worlds(), st.integers(5, 9), st.sampled_from([0, 1, 30, 59]))
    @settings(max_examples=30, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def law(world: World, other: World, hour: int, minute: int) -> None:
        time = START + timedelta(hours=hour, minutes=minute)
        changed = with_another_future(world, other, now=time - 2 * HOUR)
        late = dict.fromkeys(OUTCOMES, 60)
        assert features_in(world, flight(time), sql) == features_in(changed, flight(time) | late, sql)

    law()


def test_sql_features_do_not_change_with_the_future():
    assert_future_is_not_seen(SQL)


@pytest.mark.parametrize(
    ("honest", "peeking"),
    [
        ("- INTERVAL 2 HOURS AS asked", "- INTERVAL 1 HOUR AS asked"),
        ("time_hour + INTERVAL 1 HOUR AS known", "time_hour AS known"),
        ("scheduled.asked >= observed.known", "scheduled.asked <= observed.known"),
        ("planes.seats", "seen.dep_delay AS seats"),
        ("planes.engines", "count(*) OVER () AS engines"),
        ("observed.visib", "avg(seen.arr_delay) OVER (ORDER BY seen.time) AS visib"),
    ],
)
def test_sql_that_peeks_is_caught(honest, peeking):
    assert SQL.count(honest) == 1
    with pytest.raises(AssertionError):
        assert_future_is_not_seen(SQL.replace(honest, peeking))


# --- the windows -----------------------------------------------------------------------------------------------------

CALLS = {"calls": Table(time="at_", key=["id"], columns={"id": "int", "at_": "timestamp", "won": "bool"})}
CALLS_SQL = (
    "SELECT id::VARCHAR AS key, at_ AS time, won AS label, id % 7 AS number, 'even' AS word, 1 AS other FROM calls"
)
AS_OF = date(2013, 1, 21)
FEATURES = Features(numeric=["number"], categorical=["word"])


def windows(**others: Any) -> PrepareParams:
    known = {"label_delay_days": 1, "validation_days": 3, "test_days": 2, "features": FEATURES}
    return PrepareParams.model_validate(known | others)


def calls(first_day: int = 1, first_hour: int = 0) -> Records:
    """A call every six hours until the as-of date, every second one won."""
    first = utc(first_day, first_hour)
    count = (utc(21, 0) - first) // timedelta(hours=6)
    return [{"id": n, "at_": first + timedelta(hours=6 * n), "won": n % 2 == 0} for n in range(count)]


def run(tmp_path: Path, records: Records, params: PrepareParams, sql: str = CALLS_SQL) -> dict[str, Any]:
    tables = lay_out(tmp_path / "tables", CALLS, {"calls": records})
    (tmp_path / "calls.sql").write_text(sql)
    (tmp_path / "quarantine").mkdir(exist_ok=True)
    out = tmp_path / "out"
    return prepare(tables, tmp_path / "quarantine", tmp_path / "calls.sql", out, params, CALLS, AS_OF)


def span(tmp_path: Path, window: str) -> tuple[str, str, int]:
    times = rows.read(tmp_path / "out" / f"{window}.parquet")["time"]
    return f"{times.min():%d %H}", f"{times.max():%d %H}", len(times)


def test_prepare_rows_fall_into_windows_by_time(tmp_path):
    result = run(tmp_path, calls(), windows())
    # the end is midnight of the 20th: the labels of the 20th are not known on the 21st
    assert span(tmp_path, "test") == ("18 00", "19 18", 8)
    assert span(tmp_path, "validation") == ("15 00", "17 18", 12)
    assert span(tmp_path, "train") == ("01 00", "14 18", 56)
    assert result == {
        "summary": "train 56 · validation 12 · test 8 rows",
        "rows": {"train": 56, "validation": 12, "test": 8},
        "rows_without_label": 0,
    }


def test_prepare_train_days_leaves_older_rows_out(tmp_path):
    run(tmp_path, calls(), windows(train_days=5))
    assert span(tmp_path, "train") == ("10 00", "14 18", 20)


def test_prepare_rows_without_label_are_counted_and_left_out(tmp_path):
    records = calls()
    for n in (0, 1, 60, 79):  # two of train, one of validation, one after the end
        records[n]["won"] = None
    result = run(tmp_path, records, windows())
    assert result["rows"] == {"train": 54, "validation": 11, "test": 8}
    assert result["rows_without_label"] == 3


def test_prepare_window_holds_the_named_features_and_known_labels(tmp_path):
    run(tmp_path, calls(), windows())
    schema = pq.read_schema(tmp_path / "out" / "test.parquet")
    assert schema.remove_metadata() == pa.schema([*rows.HEAD.items(), ("number", pa.float64()), ("word", pa.string())])
    assert schema.metadata is None


def test_prepare_schema_says_what_a_model_needs_to_prepare_its_own_rows(tmp_path):
    run(tmp_path, calls(), windows())
    schema = read_json(tmp_path / "out" / "schema.json")
    assert (schema["as_of"], schema["label_delay_days"]) == ("2013-01-21", 1)
    assert Features.model_validate(schema["features"]) == FEATURES
    assert {name: Table.model_validate(table) for name, table in schema["tables"].items()} == CALLS
    assert schema["windows"]["test"] == {
        "start": "2013-01-18T00:00:00+00:00",
        "end": "2013-01-20T00:00:00+00:00",
        "rows": 8,
        "label_rate": 0.5,
    }


def test_prepare_twice_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(tmp_path / name, calls()[:: 1 if name == "a" else -1], windows())  # the order of files' rows is no matter
    for file in ("train.parquet", "validation.parquet", "test.parquet", "schema.json"):
        assert sha256(tmp_path / "a" / "out" / file) == sha256(tmp_path / "b" / "out" / file)


@pytest.mark.parametrize(
    ("first", "others", "fact"),
    [
        ((20, 6), {}, "ask for 6 days of rows before 2013-01-20 .found 0"),
        ((16, 0), {}, "ask for 6 days of rows before 2013-01-20 .found 4"),
        ((15, 0), {}, "ask for 6 days of rows before 2013-01-20 .found 5"),
        ((8, 0), {"train_days": 10}, "ask for 15 days of rows before 2013-01-20 .found 12"),
    ],
)
def test_prepare_rows_that_begin_too_late_are_rejected(tmp_path, first, others, fact):
    with pytest.raises(DataRejected, match=fact):
        run(tmp_path, calls(*first), windows(**others))


def test_prepare_no_rows_are_rejected(tmp_path):
    with pytest.raises(DataRejected, match="found 0"):
        run(tmp_path, [], windows())


def test_prepare_one_day_of_training_is_enough(tmp_path):
    run(tmp_path, calls(14), windows())
    assert span(tmp_path, "train") == ("14 00", "14 18", 4)


@pytest.mark.parametrize(("lacking", "window"), [(range(18, 20), "test"), (range(15, 18), "validation")])
def test_prepare_window_without_rows_is_rejected_and_leaves_nothing(tmp_path, lacking, window):
    with pytest.raises(DataRejected, match=f"The {window} window, 2013-01-.* holds no row with a label"):
        run(tmp_path, [call for call in calls() if call["at_"].day not in lacking], windows())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("days", "window"), [((1, 14), "train"), ((15, 17), "validation"), ((18, 19), "test")])
def test_prepare_window_of_one_class_is_rejected(tmp_path, days, window):
    records = [call | {"won": call["won"] and not days[0] <= call["at_"].day <= days[1]} for call in calls()]
    with pytest.raises(DataRejected, match=f"The {window} window, .* one class only .found label 0"):
        run(tmp_path, records, windows())


@pytest.mark.parametrize(
    ("features", "fact"),
    [
        (Features(numeric=["nubmer"], categorical=[]), "`prepare.features.numeric` names `nubmer`, .* as no column"),
        (Features(numeric=["word"], categorical=[]), "names `word`, which the SQL gives as categorical"),
        (Features(numeric=[], categorical=["number"]), "names `number`, which the SQL gives as numeric"),
    ],
)
def test_prepare_feature_that_the_sql_does_not_give_is_refused(tmp_path, features, fact):
    with pytest.raises(ParamsError, match=fact):
        run(tmp_path, calls(), windows(features=features))


@pytest.mark.parametrize(
    ("section", "fact"),
    [
        ({"features": {"numeric": ["label"], "categorical": []}}, "none of key, time, label: label"),
        ({"features": {"numeric": ["number"], "categorical": ["number"]}}, "named once .*: number"),
        ({"features": {"numeric": [], "categorical": []}}, "needs a feature"),
        ({"test_days": 0}, "`prepare.test_days`: .*greater than 0.* .found 0"),
        ({"tets_days": 1}, "did you mean `test_days`"),
    ],
)
def test_params_wrong_prepare_section_is_refused(tmp_path, section, fact):
    known = yaml.safe_load((ROOT / "params.yaml").read_text())["prepare"] | section
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"prepare": known}))
    with pytest.raises(ParamsError, match=fact):
        params.load(tmp_path / "params.yaml", "prepare", PrepareParams)


def test_main_rejected_data_exits_65_with_one_line(tmp_path):
    lay_out(tmp_path / "tables", FLIGHTS, {"flights": [flight(utc(1, 12))]})
    command = [sys.executable, "-m", "pipelines.prepare", "--params", "params.yaml", "--sql", "pipelines/prepare.sql"]
    paths = ["--tables", tmp_path / "tables", "--quarantine", tmp_path / "none", "--out", tmp_path / "out"]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.startswith("error: The train window, ")
    assert not (tmp_path / "out").exists()
