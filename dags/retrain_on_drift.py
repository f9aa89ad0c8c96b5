"""
### Retrain on drift

The same chain as `retrain_scheduled`, started by the event `drift_detected` when the monitor's policy says that
retraining is worth it. The event carries the as-of date, the reasons and how much to train on. Several may arrive as
one run: all are read, their reasons are kept, and the one with the latest as-of date says as of when and on what.

It ends in the branch `paused`, green, while the circuit breaker is open and the data was refused before.

**When it is red**: as for `retrain_scheduled`: the failed task's log ends with cause and remedy; clear the task.
"""

from airflow.sdk import DAG

from ballast_assets import DRIFT_DETECTED
from ballast_chain import AS_OF, DEFAULT_ARGS, REASON, retrain

with DAG(
    "retrain_on_drift",
    description="Retrain when the monitor finds that it is worth it",
    schedule=[DRIFT_DETECTED],
    catchup=False,
    is_paused_upon_creation=False,
    max_active_runs=1,
    params={"as_of": AS_OF, "reason": REASON},
    default_args=DEFAULT_ARGS,
    tags=["ballast", "retrain", "drift"],
    doc_md=__doc__,
):
    retrain()
