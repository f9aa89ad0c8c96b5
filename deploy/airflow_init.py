"""Make Airflow ready: its database, the roles, the accounts of the stack, the pools. Run at each start; changes nothing
that is as it should be, and leaves people's own accounts and pools alone.
"""

import os
import subprocess
import sys
from typing import Any

POOLS = {
    "training": "One training at a time: the machine's cores or its GPU are one resource.",
    "promotion": "One writer to the registry and the ledger at a time.",
}
# Beside FAB's own Viewer and Admin. FAB's User and Op may both run DAGs and approve: here these are two.
RUN = {
    ("can_edit", "DAGs"),  # pause, and trigger
    ("can_create", "DAG Runs"),
    ("can_edit", "DAG Runs"),
    ("can_edit", "Task Instances"),
    ("can_create", "Assets"),
    ("can_create", "Backfills"),
    ("can_edit", "Backfills"),
}
# FAB lets nobody answer a form who may not edit its DAG; `promote` is the one that asks.
APPROVE = {("can_edit", "HITL Detail"), ("menu_access", "HITL Detail"), ("can_edit", "DAG:promote")}
ROLES = {"Operator": RUN, "Approver": APPROVE}
# The services log in as people do. The bridge starts runs; the workers close forms that nobody need answer any more.
ACCOUNTS = {"admin": "Admin", "bridge": "Operator", "exporter": "Viewer", "worker": "Approver"}


def make_roles(security: Any) -> None:
    """Give each role what a Viewer may do and what is its own."""
    security.sync_roles()
    viewer = {(held.action.name, held.resource.name) for held in security.find_role("Viewer").permissions}
    roles = [{"role": name, "perms": sorted(viewer | own)} for name, own in ROLES.items()]
    security.bulk_sync_roles(roles)


def make_accounts(security: Any) -> None:
    """Make the accounts of the stack, and give them the passwords of the secrets file."""
    for name, role in ACCOUNTS.items():
        password = os.environ[f"AIRFLOW_{name.upper()}_PASSWORD"]
        if known := security.find_user(username=name):
            if name != "admin":  # a person's own since the first start
                security.reset_password(known.id, password)
            continue
        made = security.add_user(name, name, "ballast", f"{name}@ballast.invalid", security.find_role(role), password)
        if not made:
            sys.exit(f"error: The account {name} could not be made; the lines above say why.")


def make_pools() -> None:
    """Make the pools that the DAGs name; one that a person has changed stays as it is."""
    from airflow.models.pool import Pool

    for name, words in POOLS.items():
        if not Pool.get_pool(name):
            Pool.create_or_update_pool(name, slots=1, description=words, include_deferred=False)


def main() -> None:
    """Bring the database to this version, then fill in what is missing."""
    subprocess.run(["airflow", "db", "migrate"], check=True)
    from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder

    with get_application_builder() as appbuilder:
        make_roles(appbuilder.sm)
        make_accounts(appbuilder.sm)
    make_pools()
    print("Airflow is ready: database, roles " + ", ".join(["Viewer", *ROLES, "Admin"]) + ", accounts, pools")


if __name__ == "__main__":
    main()
