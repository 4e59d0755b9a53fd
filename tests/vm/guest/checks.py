"""Owns running checks inside the test machine: every function `check_*` of a script, in the order they are written.

One line of JSON for each check goes to /results/checks as soon as it ended, so that a machine that dies tells how far
it got. A check fails by raising; what it raised is the report.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from types import FrameType

RESULTS = os.environ.get("VFU_CHECKS", "/results/checks")
SECONDS = 300
PREFIX = "check_"


class TooLongError(Exception):
    """A check did not end in its time."""


def run(namespace: Mapping[str, object], after_failure: Callable[[], str] = str) -> None:
    """Run the checks of a script: `run(globals())`. Exits with the number of those that failed.

    `after_failure` clears away what a failed check has left to the next one; its answer is added to the report.
    """
    signal.signal(signal.SIGALRM, _expired)
    failed = 0
    for name, function in list(namespace.items()):
        if not name.startswith(PREFIX) or not callable(function):
            continue
        began = time.monotonic()
        if error := _try(function):
            error += after_failure()
        failed += bool(error)
        record = {"check": name, "error": error, "seconds": round(time.monotonic() - began, 3)}
        with open(RESULTS, "a", encoding="utf-8") as results:
            results.write(json.dumps(record) + "\n")
        print(f"{name}: {'failed' if error else 'ok'}", flush=True)
    sys.exit(failed)


def _try(function: Callable[[], object]) -> str:
    signal.alarm(SECONDS)
    try:
        function()
    except Exception:  # noqa: BLE001 - a check may fail in any way, and the next one has to run
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return ""


def _expired(_number: int, _frame: FrameType | None) -> None:
    raise TooLongError(f"not done after {SECONDS} s")


def equal(got: object, wanted: object, what: str = "") -> None:
    """Fail with both values unless they are equal."""
    if got != wanted:
        shown = [f"{value:#x}" if type(value) is int else repr(value) for value in (got, wanted)]
        raise AssertionError(f"{what + ': ' if what else ''}got {shown[0]}, wanted {shown[1]}")
