"""
### Roll back

Puts the champion before back in its place, or the earlier champion that the form names, with a reason, in the ledger
for good. The same as `ballast rollback [--to VERSION] --reason "..."`. The version that it replaces is in quarantine
from then on: no retraining brings that model back, only a person.

**When it is red**: the log says why there is nothing to go back to. `ballast history` shows the whole ledger.
"""

from airflow.sdk import DAG, Param

from ballast_chain import DEFAULT_ARGS, rollback

with DAG(
    "rollback",
    description="Go back to the champion before",
    schedule=None,
    is_paused_upon_creation=False,
    max_active_runs=1,
    params={
        "reason": Param(type="string", minLength=3, title="Reason", description="Why; kept in the ledger."),
        "to": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            title="To version",
            description="One that was champion once. Empty: the champion before.",
        ),
    },
    default_args=DEFAULT_ARGS,
    tags=["ballast", "promotion"],
    doc_md=__doc__,
):
    rollback()
