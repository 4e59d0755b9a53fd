"""Waiting for hardware: a deadline that a stalled machine does not shorten to a single look.

It knows no register.
"""

from typing import Self

import trio

LEAST_LOOKS = 20
"""How often is looked at least before a deadline counts: on a machine that stands still for its length the hardware
may have been ready all the time.
"""
FIRST_PAUSE = 0.00001
LONGEST_PAUSE = 0.002
"""Seconds between two looks: the kernel's 10 us at first, doubled up to the longest."""


class Looks:
    """For `async for`: one turn for each look that is due, until `seconds` are over and enough looks were had.

    Not a generator: it may be left half-way.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began = trio.current_time()
        self._longest = min(LONGEST_PAUSE, seconds / LEAST_LOOKS)
        """So that what is over soon is not waited for much longer, for the sake of its looks."""
        self._pause = 0.0
        self._count = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        """How many there were, from 1."""
        if self._count >= LEAST_LOOKS and trio.current_time() - self._began >= self._seconds:
            raise StopAsyncIteration
        if self._count:
            await trio.sleep(self._pause)
        self._pause = min(2 * self._pause, self._longest) or FIRST_PAUSE
        self._count += 1
        return self._count
