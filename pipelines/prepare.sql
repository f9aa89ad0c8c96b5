-- One row per flight: will it arrive more than 15 minutes late, asked two hours before its scheduled
-- departure? A feature may use only what was known by then (`asked`). Of the flight itself that is its
-- schedule; dep_time, dep_delay, arr_time, arr_delay and air_time are outcomes, and only the label reads one.
WITH scheduled AS (
    SELECT
        *,
        -- time_hour is the scheduled hour of departure in UTC; hour and sched_dep_time are local
        time_hour + to_minutes(minute) AS time,
        time_hour + to_minutes(minute) - INTERVAL 2 HOURS AS asked
    FROM flights
),

-- A weather row gathers observations up to minute 51 of its hour, its precipitation the hour's sum
-- (nycflights13, data-raw/weather.R), so it is known when its hour is over.
observed AS (
    SELECT *, time_hour + INTERVAL 1 HOUR AS known
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
)

SELECT
    strftime(seen.time_hour, '%Y-%m-%dT%HZ') || ' ' || seen.carrier || ' ' || seen.flight AS key,
    seen.time,
    seen.arr_delay > 15 AS label,  -- the US DOT's line; null where the flight was cancelled or diverted

    seen.sched_dep_time // 100 + (seen.sched_dep_time % 100) / 60 AS departure_hour,
    isodow(make_date(seen.year, seen.month, seen.day)) - 1 AS weekday,
    seen.distance,
    observed.temp,
    observed.dewp,
    observed.humid,
    observed.wind_speed,
    observed.wind_gust,
    observed.precip,
    observed.pressure,
    observed.visib,
    -- the aircraft that flew: the files do not tell a swap in the last two hours
    seen.year - planes.year AS plane_age,
    planes.seats,
    planes.engines,
    seen.carrier,
    seen.origin,
    seen.dest
FROM seen
LEFT JOIN observed
    ON seen.origin = observed.origin AND seen.weather_known = observed.known
LEFT JOIN planes
    ON seen.tailnum = planes.tailnum
