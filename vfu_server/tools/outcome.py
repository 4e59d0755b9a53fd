"""What the tools end with, and how they tell a fault: one line with its name, its notes below it.

It must not know what a tool does.
"""

import enum
import os
import sys
from collections.abc import Callable

from vfu_server import logs
from vfu_server.errors import VfuServerError


class Outcome(enum.IntEnum):
    """The status of the process. Documented in `--help`; scripts rely on the numbers."""

    GOOD = 0
    BAD = 1
    USAGE = 2
    FILE = 3


class PlaceError(VfuServerError):
    """A file or socket that was named cannot be had; the message names it."""


def place_error(what: str, path: str, error: OSError) -> PlaceError:
    """`error` as a fault that says what of `path` did not work."""
    return PlaceError(f"{path!r} cannot be {what}: {error.strerror or error}", error.errno)


def end(program: str, work: Callable[[], Outcome]) -> int:
    """The exit code of `work`; whatever is wrong is told, and only a fault of ours shows a traceback."""
    try:
        outcome = work()
        sys.stdout.flush()
        return outcome
    except BrokenPipeError:  # of standard output: whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return Outcome.GOOD
    except VfuServerError as error:
        tell(program, error)
        return Outcome.FILE if isinstance(error, PlaceError) else Outcome.BAD


def tell(program: str, error: VfuServerError) -> None:
    """Say on standard error what is wrong: the kind of fault, its text, its notes."""
    notes = "".join(f"  {logs.plain(note)}\n" for note in getattr(error, "__notes__", []))
    sys.stdout.flush()
    sys.stderr.write(f"{program}: error: {type(error).__name__}: {logs.plain(str(error))}\n{notes}")
