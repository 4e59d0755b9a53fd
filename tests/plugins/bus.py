"""Owns a model's surroundings for tests without a server: memory, interrupts and a clock that only a test moves."""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from vfu_server.model import BusError, Model


@dataclass(order=True)
class Alarm:
    """A callback that is due at `time`."""

    time: float
    number: int
    callback: Callable[[], None] | None = field(compare=False)

    def cancel(self) -> None:
        self.callback = None


class FakeBus:
    """A bus with `memory` at iova 0, all of it mapped but for the ranges in `holes` and `read_only`, as (start, end).

    Like a PCI bus it lets nothing through without bus mastering, and knows from config space whether messages are on;
    `messages_on` overrides that where a server would go by SET_IRQS.
    """

    def __init__(self, model: Model, size: int = 1 << 20) -> None:
        self.memory = bytearray(size)
        self.holes: list[tuple[int, int]] = []
        self.read_only: list[tuple[int, int]] = []
        self.messages: list[int] = []
        self.level = False
        self.edges = 0
        self.messages_on: bool | None = None
        self.accesses: list[tuple[str, int, int]] = []
        self._model = model
        self._time = 0.0
        self._numbers = itertools.count()
        self._alarms: list[Alarm] = []
        model.config.write(4, b"\x06\x00")
        model.plug(self)

    # what a model sees

    def dma_read(self, iova: int, length: int) -> bytes:
        self._check("read", iova, length, self.holes)
        return bytes(self.memory[iova : iova + length])

    def dma_write(self, iova: int, data: bytes) -> None:
        self._check("write", iova, len(data), self.holes + self.read_only)
        self.memory[iova : iova + len(data)] = data

    def message(self, vector: int) -> None:
        if self.messages_enabled and self._model.config.bus_master:
            self.messages.append(vector)

    def intx(self, level: bool) -> None:
        self.edges += level != self.level
        self.level = level
        self._model.config.set_interrupt_status(level)

    @property
    def messages_enabled(self) -> bool:
        if self.messages_on is not None:
            return self.messages_on
        return self._model.config.msi_enabled or self._model.config.msix_enabled

    @property
    def msix_enabled(self) -> bool:
        return self.messages_enabled and self._model.config.msix_enabled

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        assert seconds >= 0
        alarm = Alarm(self._time + seconds, next(self._numbers), callback)
        heapq.heappush(self._alarms, alarm)
        return alarm

    def now(self) -> float:
        return self._time

    # what a test does

    def config_write(self, offset: int, data: bytes) -> None:
        """A write to config space; switching messages on lowers the line, as PCI wants it."""
        before = self.messages_enabled
        self._model.config.write(offset, data)
        if self.messages_enabled and not before:
            self.intx(False)

    def reset(self) -> None:
        """What a reset of the machine does to any device."""
        self.intx(False)
        self._model.config.reset()
        self._model.bus_reset()

    def step(self, seconds: float) -> None:
        """Let time go on, and call back who is due."""
        until = self._time + seconds
        while self._alarms and self._alarms[0].time <= until + 1e-12:
            alarm = heapq.heappop(self._alarms)
            self._time = max(self._time, alarm.time)
            if alarm.callback is not None:
                alarm.callback()
        self._time = until

    def run(self, limit: float = 3600.0) -> float:
        """Let time go on until nobody waits any more; returns how long that took."""
        start = self._time
        while self._waiting():
            assert self._time - start < limit, "the model never comes to rest"
            self.step(max(0.0, self._alarms[0].time - self._time))
        return self._time - start

    def _waiting(self) -> bool:
        while self._alarms and self._alarms[0].callback is None:
            heapq.heappop(self._alarms)
        return bool(self._alarms)

    def take_messages(self) -> list[int]:
        """The vectors sent since the last call."""
        taken, self.messages = self.messages, []
        return taken

    def _check(self, kind: str, iova: int, length: int, refused: list[tuple[int, int]]) -> None:
        self.accesses.append((kind, iova, length))
        outside = iova < 0 or iova + length > len(self.memory)
        if outside or not self._model.config.bus_master or any(iova < e and s < iova + length for s, e in refused):
            raise BusError(f"no memory at {iova:#x}")
