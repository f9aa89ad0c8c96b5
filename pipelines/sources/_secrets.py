"""Where a source's secrets come from: the environment. params.yaml is in git, and in every run's record."""

from __future__ import annotations

import json
import os
import re
from typing import Annotated, Any

from pydantic import Field

from pipelines.errors import ParamsError

ConnectionId = Annotated[str, Field(pattern=r"^\w+$")]
"""Of a connection of Airflow."""

# A password may hold all that must be quoted in it, as some write it; a port and a path are none.
PASSWORD = re.compile(
    r"(?<=://)([^/?#@\s:]*):(?!\d+[/?#])[^@\s]*@|\b([a-z_-]*password|pwd|sig|x-amz-signature)=[^&\s'\"]+", re.I
)


def variable(connection: str) -> str:
    """Where a connection of Airflow stands, put there by its task or by hand."""
    return f"AIRFLOW_CONN_{connection.upper()}"


def connection(conn_id: str) -> dict[str, Any]:
    """The fields of a connection of Airflow; raise ParamsError, which shows none, if there is none in JSON."""
    name = variable(conn_id)
    if not (found := os.environ.get(name)):
        raise ParamsError(f"`land.options.connection`: make `{conn_id}` in Airflow, or set {name} (found neither).")
    try:
        fields: dict[str, Any] = json.loads(found)
        extra = fields.get("extra") or {}
        return {**fields, "extra": json.loads(extra) if isinstance(extra, str) else dict(extra)}
    except (ValueError, AttributeError):
        form = '{"conn_type": "http", "host": "example.org", "login": "me", "password": "…"}'
        raise ParamsError(f"{name} must be a connection of Airflow as JSON, such as {form}.") from None


def refuse(where: str, url: str, remedy: str) -> None:
    """Raise ParamsError, which does not show it, for a URL of params.yaml that has a password in it."""
    if PASSWORD.search(url):
        raise ParamsError(f"`{where}` has a password in it (found {mask(url)}). {remedy}")


def mask(text: str) -> str:
    """The text with the passwords of its URLs made unreadable, fit for an error and a log."""
    return PASSWORD.sub(lambda found: f"{found[1]}:***@" if found[2] is None else f"{found[2]}=***", text)
