"""Where a source's secrets come from: the environment. params.yaml is in git, and in every run's record."""

from __future__ import annotations

import re

from pipelines.errors import ParamsError

# A password may hold all that must be quoted in it, as some write it; a port and a path are none.
PASSWORD = re.compile(
    r"(?<=://)([^/?#@\s:]*):(?!\d+[/?#])[^@\s]*@|\b([a-z_-]*password|pwd|sig|x-amz-signature)=[^&\s'\"]+", re.I
)


def refuse(where: str, url: str, remedy: str) -> None:
    """Raise ParamsError, which does not show it, for a URL of params.yaml that has a password in it."""
    if PASSWORD.search(url):
        raise ParamsError(f"`{where}` has a password in it (found {mask(url)}). {remedy}")


def mask(text: str) -> str:
    """The text with the passwords of its URLs made unreadable, fit for an error and a log."""
    return PASSWORD.sub(lambda found: f"{found[1]}:***@" if found[2] is None else f"{found[2]}=***", text)
