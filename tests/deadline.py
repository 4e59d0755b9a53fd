"""Owns the time limit of every test: a pytest plugin. Must not know what is tested.

Each phase (set-up, call, tear-down) has 60 s, or what `@pytest.mark.deadline(seconds)` says. Past that the stacks of
all threads are printed and the test fails where its main thread stands. A main thread that is stuck in C takes no
notice: after the grace time the whole run is ended, with the stacks.
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

SECONDS = 60.0
GRACE = 30.0
_terminal = -1


def pytest_configure() -> None:
    """Keep the real standard error: the one that tests see is captured."""
    global _terminal
    _terminal = os.dup(sys.stderr.fileno())


def pytest_unconfigure() -> None:
    """Counterpart of pytest_configure."""
    global _terminal
    if _terminal >= 0:
        os.close(_terminal)
        _terminal = -1


@contextmanager
def _limit(item: pytest.Item) -> Iterator[None]:
    marker = item.get_closest_marker("deadline")
    seconds = float(marker.args[0]) if marker else SECONDS

    def expired(_signal: int, _frame: FrameType | None) -> None:
        faulthandler.dump_traceback(file=_terminal)
        pytest.fail(f"the test took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=_terminal)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    with _limit(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    with _limit(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    with _limit(item):
        return (yield)
