"""The events that tie the DAGs together. What happened is carried in the event's ``extra``."""

from __future__ import annotations

from airflow.sdk import Asset

# extra: version, record_sha256, as_of, summary
CHALLENGER_READY = Asset(name="challenger_ready", uri="ballast://challenger_ready", group="ballast")
# extra: as_of, interval, reasons, summary, train_days (None for all), asked_by
DRIFT_DETECTED = Asset(name="drift_detected", uri="ballast://drift_detected", group="ballast")
