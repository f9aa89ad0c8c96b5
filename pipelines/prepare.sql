-- One row per flight: will it arrive more than 15 minutes late, asked two hours before its scheduled
-- departure? A feature may use only what was known by then (`asked`). Of the flight itself that is its schedule;
-- dep_time, dep_delay, arr_time, arr_delay and air_time are outcomes. Those of other flights count from the moment
-- they are known: a departure when the aircraft leaves, an arrival a day after that.
-- docs/features.md says what each feature is worth, and which were tried and left out.
WITH scheduled AS (
    SELECT
        *,
        -- time_hour is the scheduled hour of departure in UTC; hour and sched_dep_time are local
        time_hour + to_minutes(minute) AS time,
        time_hour + to_minutes(minute) - INTERVAL 2 HOURS AS asked,
        -- never, where it was cancelled; when that was decided is not in the files
        coalesce(time_hour + to_minutes(minute + dep_delay::BIGINT), 'infinity') AS departed
    FROM flights
),

-- A weather row gathers observations up to minute 51 of its hour, its precipitation the hour's sum
-- (nycflights13, data-raw/weather.R), so it is known when its hour is over.
observed AS (
    SELECT
        *,
        time_hour + INTERVAL 1 HOUR AS known,
        -- runways have a direction
        wind_speed * sin(radians(wind_dir)) AS wind_from_east,
        wind_speed * cos(radians(wind_dir)) AS wind_from_north
    FROM weather
),

-- The last weather known at the origin when asked. A station may fall silent: after 6 hours its last word
-- says little about now, and null says so.
seen AS (
    SELECT
        scheduled.*,
        CASE WHEN scheduled.asked - observed.known <= INTERVAL 6 HOURS THEN observed.known END AS weather_known
    FROM scheduled
    ASOF LEFT JOIN observed
        ON scheduled.origin = observed.origin AND scheduled.asked >= observed.known
),

-- What an operations room has on its board: each line stands there `since` one moment `until` another. A departure
-- comes when the aircraft leaves and stays for three hours. A flight is overdue from its schedule until it leaves, or
-- for six hours, when it has long been cancelled. Whole numbers, so that their sums are exact in any order.
operations AS (
    SELECT
        origin, carrier, dest, departed AS since, departed + INTERVAL 3 HOURS AS until,
        1.0::DOUBLE AS departures, round(dep_delay) AS delay, 0.0::DOUBLE AS overdue
    FROM scheduled
    WHERE departed < 'infinity'
    UNION ALL
    SELECT origin, carrier, dest, time, least(departed, time + INTERVAL 6 HOURS), 0, 0, 1
    FROM scheduled
    WHERE departed > time
),
changes AS (
    SELECT origin, carrier, dest, since AS time, departures, delay, overdue FROM operations
    UNION ALL
    SELECT origin, carrier, dest, until, -departures, -delay, -overdue FROM operations
),

-- What stands on the board from each change on: of the flights from an origin, of a carrier, to a destination.
of_origin AS (
    SELECT
        origin, time, sum(sum(departures)) OVER past AS departures, sum(sum(delay)) OVER past AS delay,
        sum(sum(overdue)) OVER past AS overdue
    FROM changes
    GROUP BY origin, time
    WINDOW past AS (PARTITION BY origin ORDER BY time)
),
of_carrier AS (
    SELECT
        carrier, time, sum(sum(departures)) OVER past AS departures, sum(sum(delay)) OVER past AS delay,
        sum(sum(overdue)) OVER past AS overdue
    FROM changes
    GROUP BY carrier, time
    WINDOW past AS (PARTITION BY carrier ORDER BY time)
),
of_dest AS (
    SELECT
        dest, time, sum(sum(departures)) OVER past AS departures, sum(sum(delay)) OVER past AS delay,
        sum(sum(overdue)) OVER past AS overdue
    FROM changes
    GROUP BY dest, time
    WINDOW past AS (PARTITION BY dest ORDER BY time)
),

-- How late the flight of this number arrived on the days before: an arrival counts from a day after it left, when it is
-- known, for four weeks. A single bad day is cut off at three hours.
arrivals AS (
    SELECT
        carrier, flight, greatest(time, departed) + INTERVAL 1 DAY AS since, since + INTERVAL 28 DAYS AS until,
        1.0::DOUBLE AS arrivals, round(greatest(-60, least(arr_delay, 180))) AS delay
    FROM scheduled
    WHERE arr_delay IS NOT NULL AND departed < 'infinity'
),
arrival_changes AS (
    SELECT carrier, flight, since AS time, arrivals, delay FROM arrivals
    UNION ALL
    SELECT carrier, flight, until, -arrivals, -delay FROM arrivals
),
of_flight AS (
    SELECT
        carrier, flight, time, sum(sum(arrivals)) OVER past AS arrivals, sum(sum(delay)) OVER past AS delay
    FROM arrival_changes
    GROUP BY carrier, flight, time
    WINDOW past AS (PARTITION BY carrier, flight ORDER BY time)
),

-- The flight before of the same aircraft: the last that was due when asked. The files tell the aircraft that flew in the
-- end, and no swap in the last two hours; two flights of one aircraft at one moment are a slip.
aircraft AS (
    SELECT tailnum, time, max(departed) AS departed, max(distance) AS distance
    FROM scheduled
    WHERE tailnum IS NOT NULL
    GROUP BY tailnum, time
),
turned AS (
    SELECT
        seen.*,
        -- an aircraft that was not here for two days has been elsewhere
        CASE WHEN seen.asked - aircraft.time <= INTERVAL 2 DAYS THEN aircraft.time END AS previous,
        -- when it left, or if it is still here, now at the earliest; null where it was cancelled
        CASE
            WHEN seen.asked - aircraft.time > INTERVAL 2 DAYS THEN NULL
            WHEN aircraft.departed <= seen.asked THEN aircraft.departed
            WHEN seen.asked - aircraft.time <= INTERVAL 6 HOURS THEN seen.asked
        END AS previous_left,
        aircraft.distance AS previous_distance
    FROM seen
    ASOF LEFT JOIN aircraft
        ON seen.tailnum = aircraft.tailnum AND seen.asked >= aircraft.time
)

SELECT
    strftime(seen.time_hour, '%Y-%m-%dT%HZ') || ' ' || seen.carrier || ' ' || seen.flight AS key,
    seen.time,
    seen.arr_delay > 15 AS label,  -- the US DOT's line; null where the flight was cancelled or diverted

    seen.sched_dep_time // 100 + (seen.sched_dep_time % 100) / 60 AS departure_hour,
    observed.dewp,
    observed.wind_from_east,
    observed.wind_from_north,
    observed.precip,
    observed.visib,
    seen.year - planes.year AS plane_age,
    epoch(seen.time - seen.previous) / 3600 AS aircraft_previous_hours,
    epoch(seen.previous_left - seen.previous) / 60 AS aircraft_previous_delay_min,
    -- there and back at 450 miles an hour, and two and a half hours for taxiing and two turns on the ground
    epoch(seen.time - seen.previous_left) / 60 - 2 * seen.previous_distance / 7.5 - 150 AS aircraft_spare_min,
    of_origin.delay / nullif(of_origin.departures, 0) AS origin_mean_delay_3h,
    of_origin.overdue AS origin_overdue,
    of_carrier.delay / nullif(of_carrier.departures, 0) AS carrier_mean_delay_3h,
    of_carrier.overdue AS carrier_overdue,
    of_dest.delay / nullif(of_dest.departures, 0) AS dest_mean_delay_3h,
    of_dest.overdue AS dest_overdue,
    of_flight.delay / nullif(of_flight.arrivals, 0) AS flight_mean_delay_28d,
    seen.carrier,
    seen.origin
FROM turned AS seen
LEFT JOIN observed
    ON seen.origin = observed.origin AND seen.weather_known = observed.known
LEFT JOIN planes
    ON seen.tailnum = planes.tailnum
ASOF LEFT JOIN of_origin
    ON seen.origin = of_origin.origin AND seen.asked >= of_origin.time
ASOF LEFT JOIN of_carrier
    ON seen.carrier = of_carrier.carrier AND seen.asked >= of_carrier.time
ASOF LEFT JOIN of_dest
    ON seen.dest = of_dest.dest AND seen.asked >= of_dest.time
ASOF LEFT JOIN of_flight
    ON seen.carrier = of_flight.carrier AND seen.flight = of_flight.flight AND seen.asked >= of_flight.time
