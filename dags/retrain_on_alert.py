"""
### Retrain on an alert, or by hand

The same chain as `retrain_scheduled`, started from outside: `POST /api/v2/dags/retrain_on_alert/dagRuns`, or by a
person with the form. What came with the call (`alert`, `reason`) stays with the version that it leads to.

A `dag_run_id` made from the alert keeps a repeated delivery from starting a second run: Airflow answers 409.

An alert ends in the branch `paused`, green, while the circuit breaker is open and the data was refused before; what a
person starts goes on.

**When it is red**: as for `retrain_scheduled`: the failed task's log ends with cause and remedy; clear the task.
"""

from airflow.sdk import DAG, Param

from ballast_chain import AS_OF, DEFAULT_ARGS, REASON, retrain

ALERT = Param(None, type=["null", "object"], title="Alert", description="Labels and annotations of the alert, if any.")

with DAG(
    "retrain_on_alert",
    description="Retrain because an alert, or a person, asks for it",
    schedule=None,
    is_paused_upon_creation=False,
    max_active_runs=2,
    params={"as_of": AS_OF, "reason": REASON, "alert": ALERT},
    default_args=DEFAULT_ARGS,
    tags=["ballast", "retrain", "alert"],
    doc_md=__doc__,
):
    retrain()
