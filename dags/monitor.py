"""
### Monitor the champion

Takes the new rows of one interval, judges them, scores them with the champion, joins the labels that have arrived,
and asks four questions: is the data broken, have the inputs moved, have the predictions moved, is the model worse?
The policy turns the answers into a verdict; `retrain` starts `retrain_on_drift` by the event `drift_detected`.

**Runs** monthly over its data interval; backfill it over 2013 to see the example's year. It ships paused, as
`retrain_scheduled` does and for the same reason.

**When it is red**: `validate` red: the batch is broken, which is never a reason to retrain; its log says what is
wrong. No champion yet is no failure: the policy holds.
"""

from datetime import datetime

from airflow.sdk import DAG, CronDataIntervalTimetable, Param

from ballast_chain import AS_OF, DEFAULT_ARGS, monitor

START = Param(
    None,
    type=["null", "string"],
    format="date",
    title="Interval start",
    description="The first day of the interval that ends at the as-of date. Empty: the data interval, or one month.",
)

with DAG(
    "monitor",
    description="Watch the champion on new data; ask for retraining when it is worth it",
    schedule=CronDataIntervalTimetable("0 0 1 * *", timezone="UTC"),
    start_date=datetime(2013, 1, 1),
    end_date=datetime(2014, 1, 1),
    catchup=False,
    is_paused_upon_creation=True,
    max_active_runs=1,
    params={"as_of": AS_OF, "start": START},
    default_args=DEFAULT_ARGS,
    tags=["ballast", "monitor", "drift"],
    doc_md=__doc__,
):
    monitor()
