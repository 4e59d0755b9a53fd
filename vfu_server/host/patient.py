"""A blocking call that may outlive whoever waits for it (`PatientCall`): a coroutine can be cancelled, the kernel not.

It must not know which call it is.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import trio

T = TypeVar("T")


class PatientCall(Generic[T]):
    """One call at a time, in a thread. Who is cancelled leaves it running, and its result can still be had."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._done: trio.Event | None = None
        self._unwrap: Callable[[], T] | None = None
        self._then: list[Callable[[], None]] = []

    @property
    def pending(self) -> bool:
        """A call was begun and its result was not taken yet."""
        return self._done is not None

    def begin(self, function: Callable[[], T]) -> None:
        """Start `function` in a thread. Nothing may be pending."""
        assert self._done is None
        self._done, self._unwrap = trio.Event(), None
        token = trio.lowlevel.current_trio_token()

        def deliver(outcome: Any) -> None:  # in the thread
            try:
                token.run_sync_soon(self._finished, outcome.unwrap)
            except trio.RunFinishedError:  # nobody waits any more, but what was to be done afterwards is done
                self._finished(outcome.unwrap)

        trio.lowlevel.start_thread_soon(function, deliver, name=self._name)

    def _finished(self, unwrap: Callable[[], T]) -> None:
        assert self._done is not None
        self._unwrap = unwrap
        self._done.set()
        for action in self._then:
            action()
        self._then.clear()

    async def result(self) -> T:
        """Wait for the pending call and take what it returned or raised. Cancelled: it is pending still."""
        assert self._done is not None
        await self._done.wait()
        assert self._unwrap is not None
        unwrap, self._unwrap, self._done = self._unwrap, None, None
        return unwrap()

    async def settled(self) -> None:
        """Wait until no call is under way; a result stays where it is."""
        if self._done is not None:
            await self._done.wait()

    def afterwards(self, action: Callable[[], None]) -> None:
        """Do `action` once no call is under way: now, or when the one that is has returned."""
        if self._done is None or self._done.is_set():
            action()
        else:
            self._then.append(action)
