"""Counts the accesses that reach the model, for tests and demos that have to prove that there were none.

Cheap enough for every access: one counter and one entry in a ring, both bounded. It must not know what is accessed.
"""

import time
from collections import deque
from dataclasses import asdict
from typing import Any

from vfu_server.model import Access

RING_SIZE = 4096
MOST_COUNTERS = 16384
"""A client that touches more places than that finds the rest counted at offset -1 of their region."""

_Key = tuple[int, int, bool]


class AccessLog:
    """Accesses since the last `clear`; the last RING_SIZE of them with time stamp, width and value."""

    def __init__(self) -> None:
        self._counts: dict[_Key, int] = {}
        self._ring: deque[tuple[float, bool, int, int, int, int]] = deque(maxlen=RING_SIZE)
        self._total = 0

    def note(self, write: bool, region: int, offset: int, width: int, value: int) -> None:
        """One access of `width` bytes; `value` is what was written or read."""
        key = (region, offset, write)
        if len(self._counts) >= MOST_COUNTERS and key not in self._counts:
            key = (region, -1, write)
        self._counts[key] = self._counts.get(key, 0) + 1
        self._ring.append((time.monotonic(), write, region, offset, width, value))
        self._total += 1

    def clear(self) -> None:
        """Forget."""
        self._counts.clear()
        self._ring.clear()
        self._total = 0

    def report(self) -> dict[str, Any]:
        """`total`, `counts` by region, offset and direction, and `last`: the newest accesses, oldest first.

        Times are CLOCK_MONOTONIC in seconds, comparable between the processes of one machine.
        """
        counts = [
            {"region": region, "offset": offset, "write": write, "count": count}
            for (region, offset, write), count in sorted(self._counts.items())
        ]
        return {"total": self._total, "counts": counts, "last": [asdict(Access(*access)) for access in self._ring]}
