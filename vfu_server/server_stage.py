"""How far a served device has come, and how long its way back may take: what the process and its devices agree on."""

import enum

CLOSE_DEADLINE = 3.0
"""Seconds for the whole way back of a device; the session's own deadlines lie below."""


class Stage(enum.Enum):
    """How far a device has come."""

    OPENING = "opening"
    SERVING = "serving"
    STOPPED = "stopped"
    LOST = "lost"
    FAILED = "failed"
