"""
### Monitor the champion

Waits until the retraining that the interval before asked for has come to its end, its promotion included. Then it takes
the new rows of one interval, judges them, scores them with the version that was champion as the interval began, joins
the labels that have arrived, and asks four questions: is the data broken, have the inputs moved, have the predictions
moved, is the model worse? The policy turns the answers into a verdict; `retrain` starts `retrain_on_drift` by the event
`drift_detected`.

**Runs** over its data interval: monthly, or as `BALLAST_MONITOR_INTERVAL` says (`daily`, `weekly`). It ships paused,
as `retrain_scheduled` does and for the same reason. Backfill it over 2013 to see the example's year, with *Max Active
Runs* 1: a backfill goes by its own number, and months that run at once are all scored with the same champion.

**When it is red**: `validate` red: the batch is broken, which is never a reason to retrain; its log says what is
wrong. No champion yet is no failure: the policy holds. `settle` waiting for hours: its log names the retraining that it
waits for, and when that counts as dead; unpause `retrain_on_drift`, or clear that run's failed task.
"""

from airflow.sdk import DAG, CronDataIntervalTimetable, Param

from ballast_calendar import END, INTERVAL, INTERVALS, START
from ballast_chain import AS_OF, DEFAULT_ARGS, monitor

FROM = Param(
    None,
    type=["null", "string"],
    format="date",
    title="Interval start",
    description="The first day of the interval that ends at the as-of date. Empty: one interval before.",
)

with DAG(
    "monitor",
    description="Watch the champion on new data; ask for retraining when it is worth it",
    schedule=CronDataIntervalTimetable(INTERVALS[INTERVAL], timezone="UTC"),
    start_date=START,
    end_date=END,
    catchup=False,
    is_paused_upon_creation=True,
    max_active_runs=1,
    params={"as_of": AS_OF, "start": FROM},
    default_args=DEFAULT_ARGS,
    tags=["ballast", "monitor", "drift"],
    doc_md=__doc__,
):
    monitor()
