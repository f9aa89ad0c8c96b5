"""Prepare: what the shipped SQL knows and when, and how windows are cut and written."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from random import Random
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


def weather(hour: datetime, dewp: float, origin: str = "EWR") -> dict[str, Any]:
    wind = {"wind_dir": 10 * dewp, "wind_speed": dewp / 4}
    return {"time_hour": hour, "origin": origin, "dewp": dewp, "visib": 10.0, "precip": dewp / 100} | wind


def utc(day: int, hour: int, minute: int = 0) -> datetime:
    return datetime(2013, 1, day, hour, minute, tzinfo=UTC)


def rows_of(flights: Records, weather: Records = (), planes: Records = (), sql: str = SQL) -> pd.DataFrame:
    with TemporaryDirectory() as folder:
        tables = {"flights": flights, "weather": list(weather), "planes": list(planes)}
        return rows.select(lay_out(Path(folder), FLIGHTS, tables), None, sql, FLIGHTS)


def test_sql_flight_of_the_evening_gets_local_hour():
    row = rows_of([flight(utc(1, 1, 30))]).iloc[0]  # 20:30 of New Year's Eve in New York
    assert row["departure_hour"] == 20.5
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
    assert row[["dewp", "wind_from_east", "visib", "aircraft_spare_min"]].isna().all()


def test_sql_aircraft_gives_its_age():
    planes = [{"tailnum": "N1", "year": 1999}, {"tailnum": "N2", "year": 2001}]
    assert rows_of([flight(utc(1, 12))], planes=planes)["plane_age"].to_list() == [14]


@pytest.mark.parametrize(("minute", "dewp"), [(0, 41.0), (59, 41.0)])
def test_sql_weather_is_the_last_whole_hour_two_hours_before(minute, dewp):
    hours = [weather(utc(1, hour), dewp=30.0 + hour) for hour in range(8, 18)]
    # at 14:xx, two hours before is 12:xx; the hour of 11:00 is over since 12:00, that of 12:00 is not
    assert rows_of([flight(utc(1, 14, minute))], hours)["dewp"].to_list() == [dewp]


def test_sql_weather_is_that_of_the_origin():
    hours = [weather(utc(1, 9), 30.0, "EWR"), weather(utc(1, 10), 50.0, "JFK")]
    assert rows_of([flight(utc(1, 14))], hours)["dewp"].to_list() == [30.0]


@pytest.mark.parametrize(("hour", "known"), [(5, True), (4, False)])
def test_sql_weather_older_than_six_hours_is_null(hour, known):
    row = rows_of([flight(utc(1, 14))], [weather(utc(1, hour), 30.0)]).iloc[0]  # asked at 12:00
    assert row[["dewp", "visib"]].notna().to_list() == [known, known]


def departed(time: datetime, delay: int | None, number: int, **others: Any) -> dict[str, Any]:
    """Another flight, of which only the named columns are shared with the one that is asked about; null: cancelled."""
    apart = {"carrier": "AA", "origin": "JFK", "dest": "LAX", "tailnum": f"N{number}"}
    return flight(time, number, **apart | others) | {"dep_delay": delay}


def asked_about(*flights: dict[str, Any]) -> pd.Series[Any]:
    """The features of a flight from EWR to IAH by UA, due at 14:00 and so asked about at 12:00, after ``flights``."""
    frame = rows_of([flight(utc(1, 14), number=1000, tailnum="N1000"), *flights])
    return frame[frame["key"].str.endswith("1000")].iloc[0]


OPERATIONS = pytest.mark.parametrize(
    ("name", "shared"), [("origin", {"origin": "EWR"}), ("carrier", {"carrier": "UA"}), ("dest", {"dest": "IAH"})]
)


@OPERATIONS
def test_sql_delay_of_departures_of_three_hours_is_averaged(name, shared):
    seen = [
        departed(utc(1, 8, 59), 1, number=1, **shared),  # more than three hours ago
        departed(utc(1, 8, 59), 2, number=2, **shared),
        departed(utc(1, 12, 5), -5, number=3, **shared),  # leaves as it is asked
        departed(utc(1, 10), 120, number=4, **shared),
        departed(utc(1, 11), 61, number=5, **shared),  # leaves a minute later
        departed(utc(1, 11), None, number=6, **shared),
        departed(utc(1, 11), 0, number=7),  # elsewhere
    ]
    assert asked_about(*seen)[f"{name}_mean_delay_3h"] == (2 - 5 + 120) / 3


@OPERATIONS
def test_sql_flights_are_overdue_until_they_leave_or_for_six_hours(name, shared):
    seen = [
        departed(utc(1, 11), 60, number=1, **shared),  # leaves as it is asked
        departed(utc(1, 11), 61, number=2, **shared),
        departed(utc(1, 12), 0, number=3, **shared),  # never overdue
        departed(utc(1, 12), None, number=4, **shared),
        departed(utc(1, 6), None, number=5, **shared),
        departed(utc(1, 6, 1), 1000, number=6, **shared),
        departed(utc(1, 12, 1), 100, number=7, **shared),  # due later
        departed(utc(1, 11), None, number=8),  # elsewhere
    ]
    assert asked_about(*seen)[f"{name}_overdue"] == 3


@OPERATIONS
def test_sql_operations_elsewhere_do_not_count(name, shared):
    elsewhere = [departed(utc(1, 11), 50, number=2), departed(utc(1, 11, 55), None, number=3)]
    row = asked_about(departed(utc(1, 10), 30, number=1, **shared), *elsewhere)
    assert row[[f"{name}_mean_delay_3h", f"{name}_overdue"]].to_list() == [30, 0]


def test_sql_no_departure_for_three_hours_gives_no_mean():
    row = asked_about(departed(utc(1, 2), 0, number=1, origin="EWR", carrier="UA", dest="IAH"))
    assert row[["origin_overdue", "carrier_overdue", "dest_overdue"]].to_list() == [0, 0, 0]
    assert row[["origin_mean_delay_3h", "carrier_mean_delay_3h", "dest_mean_delay_3h"]].isna().all()


def test_sql_aircraft_has_a_previous_flight_and_time_to_spare():
    row = asked_about(departed(utc(1, 2, 40), 90, number=7, tailnum="N1000", distance=900.0))
    assert row["aircraft_previous_hours"] == 11 + 20 / 60
    assert row["aircraft_previous_delay_min"] == 90
    assert row["aircraft_spare_min"] == 590 - 240 - 150  # since 4:10; two flights of two hours; taxiing and turning


@pytest.mark.parametrize("delay", [121, None])
def test_sql_aircraft_that_has_not_left_yet_may_leave_now(delay):
    row = asked_about(departed(utc(1, 10), delay, number=7, tailnum="N1000", distance=900.0))
    assert row["aircraft_previous_delay_min"] == 120
    assert row["aircraft_spare_min"] == 120 - 240 - 150


def test_sql_aircraft_overdue_for_six_hours_was_cancelled():
    row = asked_about(departed(utc(1, 5, 59), None, number=7, tailnum="N1000"))
    assert row["aircraft_previous_hours"] == 8 + 1 / 60
    assert row[["aircraft_previous_delay_min", "aircraft_spare_min"]].isna().all()


def test_sql_aircraft_due_after_the_asking_is_not_looked_at():
    row = asked_about(departed(utc(1, 12, 1), 0, number=7, tailnum="N1000"))
    assert row[["aircraft_previous_hours", "aircraft_previous_delay_min", "aircraft_spare_min"]].isna().all()


@pytest.mark.parametrize(("minute", "known"), [(0, True), (1, False)])
def test_sql_aircraft_not_seen_for_two_days_is_not_known(minute, known):
    row = rows_of([flight(utc(3, 14, minute), number=2), flight(utc(1, 12)) | {"dep_delay": 0}]).iloc[1]
    names = ["aircraft_previous_hours", "aircraft_previous_delay_min", "aircraft_spare_min"]
    assert row[names].notna().to_list() == [known] * 3


def test_sql_aircraft_listed_twice_at_one_moment_gives_one_row():
    twice = [departed(utc(1, 8), delay, number=delay, tailnum="N1000") for delay in (5, 10)]
    assert asked_about(*twice)["aircraft_previous_delay_min"] == 10


def test_sql_flight_number_has_a_history_of_four_weeks():
    ended = {
        utc(1, 11): (60, 1.0),  # counts from the 2nd until the 30th at 12:00, when it is asked
        utc(1, 12): (1, 600.0),
        utc(20, 14): (0, 10.0),
        utc(28, 15): (None, None),
        utc(28, 16): (-10, -80.0),
        utc(29, 11): (60, 50.0),  # counts from the 30th at 12:00
        utc(29, 12): (1, 1.0),
    }
    past = [flight(time) | {"dep_delay": left, "arr_delay": landed} for time, (left, landed) in ended.items()]
    other = flight(utc(20, 9), number=2) | {"dep_delay": 0, "arr_delay": 99.0}
    row = rows_of([*past, other, flight(utc(30, 14))]).iloc[-1]
    assert row["flight_mean_delay_28d"] == (180 + 10 - 60 + 50) / 4  # cut off at three hours, and at an hour early


@pytest.mark.parametrize(("direction", "east", "north"), [(90, 20, 0), (180, 0, -20), (None, -1, -1)])
def test_sql_wind_has_components_where_it_has_a_direction(direction, east, north):
    hour = weather(utc(1, 10), 30.0) | {"wind_dir": direction, "wind_speed": 20.0}
    row = rows_of([flight(utc(1, 14))], [hour]).iloc[0]
    assert row[["wind_from_east", "wind_from_north"]].fillna(-1).to_list() == pytest.approx([east, north])


# --- the law: nothing after the prediction time moves a feature ------------------------------------------------------

START, HOUR, DAY = utc(10, 0), timedelta(hours=1), timedelta(days=1)
PLANES = [{"tailnum": "N1", "year": 1999}, {"tailnum": "N2", "year": 2001}]
World = dict[str, Records]


def flown(random: Random) -> dict[str, Any]:
    """A flight of the day or of the day before it, and what became of it: on time, hours late, or cancelled."""
    time = START - random.choice([0, 0, 1]) * DAY + timedelta(minutes=random.randrange(660))
    named = {"carrier": ["UA", "AA"], "origin": ["EWR", "JFK"], "dest": ["IAH", "LAX"], "tailnum": ["N1", "N2", None]}
    others = {name: random.choice(values) for name, values in named.items()}
    delay = random.choice([None, -10, 0, 5, 20, 45, 90, 200, 400])
    return flight(time, random.choice([1, 2, 3]), **others) | outcome(time, delay, random.choice([-20, 0, 14, 60]))


def outcome(time: datetime, departure_delay: int | None, longer: int = 0) -> dict[str, Any]:
    """How a flight went that left so late, and then took so many minutes longer than planned; null: cancelled."""
    if departure_delay is None:
        return dict.fromkeys(("dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"))
    left = time + timedelta(minutes=departure_delay)
    landed = left + timedelta(minutes=180 + longer)
    clocks = {"dep_time": left.hour * 100 + left.minute, "arr_time": landed.hour * 100 + landed.minute}
    return clocks | {"dep_delay": departure_delay, "arr_delay": departure_delay + longer, "air_time": 150 + longer}


def a_world(seed: int) -> World:
    """Two days of flights and eleven hours of weather at two airports, with gaps."""
    random = Random(seed)
    flights = {key_of(record): record for record in (flown(random) for _ in range(random.randrange(60)))}
    places = [(START + timedelta(hours=hour), origin) for hour in range(11) for origin in ("EWR", "JFK")]
    observed = [weather(hour, random.randrange(90), origin) for hour, origin in places if random.random() < 0.7]
    return {"flights": list(flights.values()), "weather": observed}


seeds = st.integers(0, 2**32)  # of worlds: flight by flight, hypothesis would take seconds to draw one


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["time_hour"], record["carrier"], record["flight"]


def time_of(record: dict[str, Any]) -> datetime:
    return record["time_hour"] + timedelta(minutes=record["minute"])


def asked_at(now: datetime) -> Records:
    """Flights due two hours after ``now``, of which no features may differ with what comes after ``now``."""
    due = now + 2 * HOUR
    ours = [
        flight(due, 1, tailnum="N1"),
        flight(due, 2, tailnum="N2", carrier="AA", origin="JFK", dest="LAX"),
        flight(due, 3, tailnum="N2", origin="JFK"),
        flight(due, 3, tailnum="N1", carrier="AA", dest="LAX"),
    ]
    return [record | outcome(due, 0) for record in ours]


def left_at(record: dict[str, Any]) -> datetime:
    """When a flight left; beyond all times where it was cancelled."""
    delay = record["dep_delay"]
    return time_of(record) + timedelta(minutes=delay) if delay is not None else datetime.max.replace(tzinfo=UTC)


def is_past(record: dict[str, Any], now: datetime) -> bool:
    """Whether anything of a row was known: weather when its hour is over, a flight when it was due, or left early."""
    if "dep_delay" in record:
        return min(time_of(record), left_at(record)) <= now
    return record["time_hour"] + HOUR <= now


def with_another_future(record: dict[str, Any], now: datetime) -> dict[str, Any]:
    """The same flight, of which only what was known by ``now`` is as it was: its departure, a day later its arrival."""
    time, left = time_of(record), left_at(record)
    if record["dep_delay"] is None:  # it leaves after all, as soon as nobody has seen it yet
        return record | outcome(time, (now - time) // timedelta(minutes=1) + 1)
    if left > now:
        return record | outcome(time, None)
    landed = max(time, left) + DAY <= now
    return record if landed else record | {"arr_delay": 500.0 - record["arr_delay"], "arr_time": 1}


def without(records: Records, others: Records) -> Records:
    """The flights that are not also among ``others``."""
    keys = {key_of(record) for record in others}
    return [record for record in records if key_of(record) not in keys]


def branch(world: World, other: World, now: datetime) -> tuple[World, World]:
    """``world``, with rows that are asked about ``now``; and one of the same past with the future of ``other``."""
    asked, ours = asked_at(now), without(world["flights"], asked_at(now))
    branched = [with_another_future(row, now) for row in asked + [row for row in ours if is_past(row, now)]]
    branched += without([row for row in other["flights"] if not is_past(row, now)], branched)
    weather = [row for row in world["weather"] if is_past(row, now)]
    weather += [row for row in other["weather"] if not is_past(row, now)]
    return world | {"flights": asked + ours}, {"flights": branched, "weather": weather}


def features_at(now: datetime, world: World, sql: str) -> Records:
    """The rows that were due by ``now``, and those that are asked about at ``now``."""
    frame = rows_of(world["flights"], world["weather"], PLANES, sql).drop(columns="label").fillna(-1000)
    asked = [f"{hour:%Y-%m-%dT%HZ} {carrier} {number}" for hour, carrier, number in map(key_of, asked_at(now))]
    return frame[(frame["time"] <= now) | frame["key"].isin(asked)].to_dict("records")


def assert_future_is_not_seen(sql: str) -> None:
    """Ask for features in a world, and in one that has the same past and another future."""

    @given(seeds, seeds, st.integers(5, 8), st.sampled_from([0, 1, 30, 59]))
    @settings(max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def law(seed: int, other: int, hour: int, minute: int) -> None:
        now = START + timedelta(hours=hour, minutes=minute)
        this, that = branch(a_world(seed), a_world(other), now)
        assert features_at(now, this, sql) == features_at(now, that, sql)

    law()


@given(seeds, st.integers(0, 11))
@settings(max_examples=5, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
def test_sql_features_do_not_change_as_later_rows_come(seed: int, hour: int):
    world, until = a_world(seed), START + timedelta(hours=hour)
    so_far = [record for record in world["flights"] if time_of(record) <= until]
    late = rows_of(world["flights"], world["weather"])
    early = rows_of(so_far, world["weather"])
    pd.testing.assert_frame_equal(early, late[late["time"] <= until].reset_index(drop=True))


def test_sql_features_do_not_change_with_the_future():
    assert_future_is_not_seen(SQL)


@pytest.mark.parametrize(
    ("honest", "peeking"),
    [
        ("- INTERVAL 2 HOURS AS asked", "- INTERVAL 1 HOUR AS asked"),
        # of itself, and of all rows
        ("planes.year AS plane_age", "planes.year + seen.dep_delay AS plane_age"),
        ("observed.visib,", "count(*) OVER () AS visib,"),
        ("observed.dewp,", "avg(seen.arr_delay) OVER (ORDER BY seen.time) AS dewp,"),
        # of the weather
        ("time_hour + INTERVAL 1 HOUR AS known", "time_hour AS known"),
        ("scheduled.asked >= observed.known", "scheduled.asked <= observed.known"),
        # of the operations: before they are seen, after they are asked for, who will be overdue for long
        ("departed AS since", "time AS since"),
        ("WHERE departed > time", "WHERE departed > time + INTERVAL 1 HOUR"),
        ("seen.asked >= of_origin.time", "seen.time >= of_origin.time"),
        ("seen.asked >= of_carrier.time", "seen.time >= of_carrier.time"),
        ("seen.asked >= of_dest.time", "seen.time >= of_dest.time"),
        # of the aircraft
        ("seen.asked >= aircraft.time", "seen.time > aircraft.time"),
        ("WHEN aircraft.departed <= seen.asked", "WHEN aircraft.departed < 'infinity'"),
        # of the flight number's arrivals
        ("greatest(time, departed) + INTERVAL 1 DAY", "departed + INTERVAL 12 HOURS"),
        ("greatest(time, departed) + INTERVAL 1 DAY", "time + INTERVAL 1 DAY"),
        ("seen.asked >= of_flight.time", "seen.time >= of_flight.time"),
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
