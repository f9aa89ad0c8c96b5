"""What can go wrong, and what the exit code says about trying again.

    BallastError            1   a bug or a setting: a person must look
    ├── ParamsError         1   params.yaml is wrong
    ├── DataRejected       65   the data was rejected: upstream must change, a retry cannot help
    ├── TryAgain           75   a server is away, a lock is held: the same call may work later
    ├── Conflict            1   someone else won: the ledger or the champion has moved
    └── Held                1   people have stopped it: a result where nobody but a machine asked

Every message gives the fact, the value found and the remedy.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import ClassVar, NoReturn

EXIT_DATA_REJECTED = 65
EXIT_TRY_AGAIN = 75


class BallastError(Exception):
    """An error with a message for a person; shown without a traceback."""

    exit_code: ClassVar[int] = 1


class ParamsError(BallastError):
    """A setting in params.yaml is missing, misspelt or out of range."""


class DataRejected(BallastError):
    """The data cannot be used as it is."""

    exit_code: ClassVar[int] = EXIT_DATA_REJECTED


class TryAgain(BallastError):
    """Something outside is away for now."""

    exit_code: ClassVar[int] = EXIT_TRY_AGAIN


class Conflict(BallastError):
    """Another writer was first; what was read before no longer holds."""


class Held(BallastError):
    """A person's word stands against it."""


def exit_with(main: Callable[[], object]) -> NoReturn:
    """Run ``main`` as a process does: a Ballast error becomes one line on stderr and its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        main()
    except BallastError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    sys.exit(0)
