"""
### Promote a challenger

Started by the event `challenger_ready`. `review` takes the decision record from the registry and checks that it still
holds: its hash, its version, and that the champion is the one it was decided against. Where the record asks for a
person (`decide.approval`), `approve` waits for one, under Required Actions, with the record in its form; no answer in
time is a refusal, and a newer challenger supersedes a waiting one. `answer` writes down who said what. Then `promote`:
the ledger gets its entry and the alias `champion` follows. It is a DAG of its own, so that nothing waits for it.

While promotion is frozen (`ballast freeze`) `promote` ends green and says so; `ballast promote VERSION` catches up. It
also does so for a model that was rolled back; `--force` goes round both.

**When it is red**: the log says what no longer holds (most often: the champion changed since the decision). Run a
retraining DAG again: its steps are cached, and `decide` compares with today's champion.
"""

from airflow.sdk import DAG, Param

from ballast_assets import CHALLENGER_READY
from ballast_chain import DEFAULT_ARGS, promote

with DAG(
    "promote",
    description="Move the champion to a version whose decision record holds",
    schedule=[CHALLENGER_READY],
    catchup=False,
    is_paused_upon_creation=False,
    max_active_runs=16,  # those that wait for a person count; one writer at a time: the pool
    params={
        "version": Param(None, type=["null", "integer"], title="Version", description="Empty: the event's."),
        "record_sha256": Param(None, type=["null", "string"], title="Hash of its decision record"),
    },
    default_args=DEFAULT_ARGS,
    tags=["ballast", "promotion"],
    doc_md=__doc__,
):
    promote()
