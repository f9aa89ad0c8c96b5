"""What tests that start real processes wait by."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(what: str, found: Callable[[], T], within_s: float = 600, every_s: float = 0.5) -> T:
    """What ``found`` gives once that is something; an AssertionError after so long."""
    deadline = time.monotonic() + within_s
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what} did not come within {within_s:.0f} s"
        time.sleep(every_s)
    return value
