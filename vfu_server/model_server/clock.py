"""The model's time: callbacks that come due, in a thread of their own, under the function's lock.

A thread and not trio's: a callback may wait for the client (DMA by messages), and the client may at that moment wait
for an answer of trio's. It must not know what is called back.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(order=True, slots=True)
class Alarm:
    """A callback that is due at `due` (CLOCK_MONOTONIC, seconds); None once it is cancelled."""

    due: float
    number: int
    callback: Callable[[], None] | None = field(compare=False)

    def cancel(self) -> None:
        """It shall not come any more."""
        self.callback = None


class Clock:
    """Time that runs `1 / scale` times as fast as ours. `condition` holds the lock that callbacks run under.

    An exception out of a callback is given to `failed`, and time goes on.
    """

    def __init__(self, condition: threading.Condition, scale: float, failed: Callable[[BaseException], None]) -> None:
        self._condition = condition
        self._scale = scale
        self._failed = failed
        self._start = time.monotonic()
        self._numbers = itertools.count()
        self._alarms: list[Alarm] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Let time begin."""
        self._thread.start()

    def stop(self) -> None:
        """No callback comes any more. Not under the lock; waits for one that runs."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def now(self) -> float:
        """The model's seconds."""
        return (time.monotonic() - self._start) / self._scale

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        """Call back after `seconds` of the model's time. Under the lock."""
        alarm = Alarm(time.monotonic() + max(seconds, 0.0) * self._scale, next(self._numbers), callback)
        heapq.heappush(self._alarms, alarm)
        if self._alarms[0] is alarm:
            self._condition.notify_all()
        return alarm

    def _run(self) -> None:
        with self._condition:
            while not self._stopped:
                if not self._alarms:
                    self._condition.wait()
                    continue
                left = self._alarms[0].due - time.monotonic()
                if left > 0:
                    self._condition.wait(min(left, threading.TIMEOUT_MAX))
                    continue
                callback = heapq.heappop(self._alarms).callback
                if callback is not None:
                    self._call(callback)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - a model's mistake ends one callback, not the device's time
            self._failed(error)
