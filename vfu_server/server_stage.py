"""How far a served device has come, how long its way back may take, whose fault it was: what the process agrees on."""

import enum

from vfu_server.errors import VfuServerError

CLOSE_DEADLINE = 3.0
"""Seconds for the whole way back of a device; the session's own deadlines lie below."""


class Stage(enum.Enum):
    """How far a device has come."""

    OPENING = "opening"
    SERVING = "serving"
    STOPPED = "stopped"
    LOST = "lost"
    FAILED = "failed"


def one_cause(error: Exception) -> Exception:
    """The exception that a nursery wrapped; of several the one that is nobody's known fault, else the first."""
    if not isinstance(error, ExceptionGroup):
        return error
    causes = [one_cause(inner) for inner in error.exceptions]
    unknown = [cause for cause in causes if not isinstance(cause, VfuServerError)]
    return (unknown or causes)[0]
