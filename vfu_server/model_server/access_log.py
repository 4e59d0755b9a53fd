"""Counts the accesses that reach the model, for tests and demos that have to prove that there were none.

Cheap enough for every access: one counter and one entry in a bounded ring. It must not know what is accessed.
"""

import time
from collections import deque
from typing import Any

RING_SIZE = 4096

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
        names = ("time", "write", "region", "offset", "width", "value")
        return {"total": self._total, "counts": counts, "last": [dict(zip(names, a, strict=True)) for a in self._ring]}
