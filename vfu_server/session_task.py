"""A coroutine of the plugin's beside the session: begun, cancelled, waited for, but not for ever.

A plugin may shield what it waits for, or wait for a call in a thread that the kernel keeps: nothing in this process can
end that. Whoever ends it waits for so long, says that it goes on, and the device is nobody's until it is over. It must
not know what the coroutine does.
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from vfu_server.errors import StateLostError

log = logging.getLogger(__name__)

END_PATIENCE = 10.0
"""Seconds that a coroutine has to end in, once it is cancelled: more than a client waits, since what only overruns must
not cost the guest its device.
"""
LOOK_AGAIN = 0.5
"""Seconds that are waited for one that has not ended in that time."""


class PluginTask:
    """One coroutine at a time. `what` is its name for people; `overruns` counts those that did not end in time."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._scope: trio.CancelScope | None = None
        self._ended = trio.Event()
        self._counted = False
        self.overruns = 0

    @property
    def begun(self) -> bool:
        """One was begun and its end was not waited for yet."""
        return self._scope is not None

    @property
    def stuck(self) -> str:
        """Why no other can be begun: the last one was told to end and goes on. Empty: all is well."""
        if self._scope is None or not self._counted or self._ended.is_set():
            return ""
        return (
            f"the plugin's {self._what} goes on after it was cancelled: nothing is known of the device before its end"
        )

    def begin(self, nursery: trio.Nursery, work: Callable[[], Awaitable[None]]) -> None:
        """Start `work`, which raises nothing. The last one must have been ended."""
        self._scope, self._ended, self._counted = trio.CancelScope(), trio.Event(), False
        nursery.start_soon(self._run, work, self._scope, self._ended)

    async def _run(self, work: Callable[[], Awaitable[None]], scope: trio.CancelScope, ended: trio.Event) -> None:
        try:
            with scope:
                await work()
        finally:
            ended.set()
            if self._counted and self._ended is ended:
                log.warning("the plugin's %s has ended at last", self._what)

    async def wait(self) -> None:
        """Until it has ended by itself."""
        await self._ended.wait()

    def cancel(self) -> None:
        """It shall end."""
        if self._scope is not None:
            self._scope.cancel()

    async def end(self) -> None:
        """Cancel it and wait. Harmless if there is none. StateLostError: it goes on."""
        if self._scope is None:
            return
        self._scope.cancel()
        patience = LOOK_AGAIN if self._counted else END_PATIENCE
        with trio.CancelScope(shield=True, deadline=trio.current_time() + patience):
            await self._ended.wait()
        if self._ended.is_set():
            self._scope = None
            return
        if not self._counted:
            self._counted = True
            self.overruns += 1
            log.error("the plugin's %s goes on %g s after it was cancelled", self._what, END_PATIENCE)
        raise StateLostError(self.stuck)
