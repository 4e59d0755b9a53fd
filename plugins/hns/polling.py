"""Waiting for hardware: a deadline that a stalled machine does not shorten to a single look.

It knows no register.
"""

from collections.abc import AsyncIterator

import trio

LEAST_LOOKS = 20
"""How often is looked at least before a deadline counts: on a machine that stands still for its length the hardware
may have been ready all the time.
"""
FIRST_PAUSE = 0.00001
LONGEST_PAUSE = 0.002
"""Seconds between two looks: the kernel's 10 us at first, doubled up to the longest."""


async def looks(seconds: float) -> AsyncIterator[int]:
    """Counts up from 1, once for each look that is due, until `seconds` are over and enough looks were had."""
    began = trio.current_time()
    pause, count = FIRST_PAUSE, 0
    while True:
        count += 1
        yield count
        if count >= LEAST_LOOKS and trio.current_time() - began >= seconds:
            return
        await trio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
