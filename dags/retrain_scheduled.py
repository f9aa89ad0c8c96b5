"""
### Retrain on a schedule

Brings the data in, judges it, trains the candidates, measures the better one, registers it, and decides whether it
may take the champion's place. A challenger that may goes to `promote`, by the event `challenger_ready`.

**Runs** monthly, as of the end of its data interval, so it can be backfilled. It ships paused: the example's clock
stands in 2013, and a run of this month would find no flights. Its end date keeps an unpaused one from being scheduled
past the example's year; with data of your own, set `END` in `plugins/ballast_calendar.py` to None and unpause.

**When it is red**: `validate` red: the data was rejected, its log says by which expectation; mend the source and clear
`land` and what comes after it. Any other task: the last lines of its log name the cause and the remedy; clear the task,
finished steps are cached. A refused challenger is no failure: see the record that `decide` links to. Neither is the
branch `paused`: so many retrainings in a row were refused (`params.yaml: breaker`) that it takes new data, or `ballast
breaker reset`.
"""

from airflow.sdk import DAG, CronDataIntervalTimetable

from ballast_calendar import END, RETRAINING, START
from ballast_chain import AS_OF, DEFAULT_ARGS, REASON, retrain

with DAG(
    "retrain_scheduled",
    description="Retrain every month; promote what beats the champion",
    schedule=CronDataIntervalTimetable(RETRAINING, timezone="UTC"),
    start_date=START,
    end_date=END,
    catchup=False,
    is_paused_upon_creation=True,
    max_active_runs=1,
    params={"as_of": AS_OF, "reason": REASON},
    default_args=DEFAULT_ARGS,
    tags=["ballast", "retrain"],
    doc_md=__doc__,
):
    retrain()
