"""When things run by themselves: the one place to change for data of your own.

The example's flights are of 2013: the cron DAGs begin and end with that year. Yours begin where your data does, and
end never: ``END = None``.
"""

from __future__ import annotations

import os
from datetime import date, datetime, timedelta

START = datetime(2013, 1, 1)
END: datetime | None = datetime(2014, 1, 1)

RETRAINING = "0 0 1 * *"
INTERVALS = {"daily": "0 0 * * *", "weekly": "0 0 * * 1", "monthly": "0 0 1 * *"}
INTERVAL = os.environ.get("BALLAST_MONITOR_INTERVAL") or "monthly"

if INTERVAL not in INTERVALS:
    raise ValueError(f"BALLAST_MONITOR_INTERVAL must be one of {', '.join(INTERVALS)} (found {INTERVAL!r}).")


def interval_before(end: date) -> date:
    """The first day of the monitored interval that ends at the midnight before ``end``."""
    if INTERVAL == "monthly":
        return (end - timedelta(days=1)).replace(day=1)
    return end - timedelta(days=7 if INTERVAL == "weekly" else 1)
