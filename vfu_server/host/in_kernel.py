"""Calls of the kernel in worker threads: one that does not come back is told while it is waited for.

Such a call cannot be cancelled: whoever waits for it waits on, over every deadline of his own. It must not know which
call it is, but for its name.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import trio

log = logging.getLogger(__name__)

T = TypeVar("T")

TELL_AFTER = 5.0
"""Seconds after which a call is told of: as long as a client waits. Pinning very large memory may take that."""


class InKernel:
    """The calls of one device, `name`. `slow`: how many took longer than TELL_AFTER, those that still do included."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.slow = 0

    async def run(self, function: Callable[[], T], what: str) -> T:
        """Call `function` in a thread and wait for it."""
        watch = _Watch(self, f"{self._name}: {what}")
        trio.lowlevel.spawn_system_task(watch.run)
        try:
            return await trio.to_thread.run_sync(function)
        finally:
            watch.over()


class _Watch:
    def __init__(self, calls: InKernel, what: str) -> None:
        self._calls = calls
        self._what = what
        self._scope = trio.CancelScope()
        self._began = trio.current_time()
        self._told = False

    async def run(self) -> None:
        """Tell of it, if it is not over by then."""
        with self._scope:
            await trio.sleep(TELL_AFTER)
            self._told = True
            self._calls.slow += 1
            log.error("%s: the kernel has not come back for %s s; it cannot be interrupted", self._what, TELL_AFTER)

    def over(self) -> None:
        """It has come back."""
        self._scope.cancel()
        if self._told:
            log.warning("%s: the kernel has come back after %.1f s", self._what, trio.current_time() - self._began)
