"""Whether the service of this container is well, for Docker's health check; it imports only what it must.

``BALLAST_HEALTH`` says what to ask: a URL that must answer 200; a URL and, after a space, the component of Airflow that
it must call healthy; or ``celery``, for the worker of this container. Unset: nothing to ask.
"""

import json
import os
import socket
import ssl
import sys
from urllib.request import urlopen

TIMEOUT_S = 8


def healthy(asked: str) -> bool:
    """Whether what is asked for is well; an error is a no."""
    if asked == "celery":
        return _worker_answers()
    url, _, component = asked.partition(" ")
    # The certificate of the bridge names the service, and here we ask by loopback.
    with urlopen(url, timeout=TIMEOUT_S, context=ssl._create_unverified_context()) as answer:
        return not component or json.load(answer)[component]["status"] == "healthy"


def _worker_answers() -> bool:
    from celery import Celery

    broker = os.environ["AIRFLOW__CELERY__BROKER_URL"]
    me = f"celery@{socket.gethostname()}"
    return bool(Celery(broker=broker).control.ping(destination=[me], timeout=TIMEOUT_S - 2))


if __name__ == "__main__":
    sys.exit(0 if not (asked := os.environ.get("BALLAST_HEALTH")) or healthy(asked) else 1)
