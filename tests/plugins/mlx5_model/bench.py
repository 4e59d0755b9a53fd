"""Owns a card on buses of the test's own: memory for each function, one clock that only the test moves.

It must not know what is tested. `Port` is what a driver sees of a function; the same driver runs over a socket.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from plugins.mlx5.models.functions import functions
from plugins.mlx5.models.options import Options
from vfu_server.model import BusError, Model


@dataclass(order=True)
class Alarm:
    time: float
    number: int
    callback: Callable[[], None] | None = field(compare=False)

    def cancel(self) -> None:
        self.callback = None


class Clock:
    """One time for all functions."""

    def __init__(self) -> None:
        self.time = 0.0
        self._numbers = itertools.count()
        self._alarms: list[Alarm] = []

    def later(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        assert seconds >= 0
        alarm = Alarm(self.time + seconds, next(self._numbers), callback)
        heapq.heappush(self._alarms, alarm)
        return alarm

    def advance(self, seconds: float) -> None:
        """Let so much time pass."""
        until = self.time + seconds
        while self._alarms and self._alarms[0].time <= until:
            self.next()
        self.time = until

    def next(self) -> bool:
        """The next thing that is due; False if nothing is."""
        while self._alarms:
            alarm = heapq.heappop(self._alarms)
            if alarm.callback is not None:
                self.time = max(self.time, alarm.time)
                alarm.callback()
                return True
        return False


class Bus:
    """A bus with memory at iova 0; `holes` are (start, end)."""

    messages_enabled = True

    def __init__(self, model: Model, clock: Clock, size: int) -> None:
        self.memory = bytearray(size)
        self.holes: list[tuple[int, int]] = []
        self.messages: list[int] = []
        self._model = model
        self._clock = clock
        model.config.write(4, b"\x06\x00")
        model.plug(self)

    def dma_read(self, iova: int, length: int) -> bytes:
        self._check(iova, length)
        return bytes(self.memory[iova : iova + length])

    def dma_write(self, iova: int, data: bytes) -> None:
        self._check(iova, len(data))
        self.memory[iova : iova + len(data)] = data

    def message(self, vector: int) -> None:
        self.messages.append(vector)

    def intx(self, level: bool) -> None:
        raise AssertionError("the functions have no pin")

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        return self._clock.later(seconds, callback)

    def now(self) -> float:
        return self._clock.time

    def _check(self, iova: int, length: int) -> None:
        inside = iova >= 0 and iova + length <= len(self.memory)
        if (
            not inside
            or not self._model.config.bus_master
            or any(iova < e and s < iova + length for s, e in self.holes)
        ):
            raise BusError(f"no memory at {iova:#x} + {length:#x}")


class Port:
    """A function for its driver: registers, memory, interrupts, and waiting."""

    def __init__(self, model: Model, bus: Bus, clock: Clock) -> None:
        self.model = model
        self.bus = bus
        self._clock = clock

    def read(self, region: int, offset: int, width: int) -> int:
        return self.model.read(region, offset, width)

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        self.model.write(region, offset, width, value)

    def load(self, iova: int, length: int) -> bytes:
        return bytes(self.bus.memory[iova : iova + length])

    def store(self, iova: int, data: bytes) -> None:
        self.bus.memory[iova : iova + len(data)] = data

    def wait(self, until: Callable[[], bool], what: str = "something", seconds: float = 60.0) -> None:
        """Let time go on until it is so; TimeoutError if it never is."""
        end = self._clock.time + seconds
        while not until():
            if self._clock.time > end:
                raise TimeoutError(f"waited for {what}")
            if not self._clock.next():
                self._clock.advance(0.001)

    def interrupts(self, vector: int) -> int:
        """How many messages of a vector came since it was last asked."""
        count = self.bus.messages.count(vector)
        self.bus.messages = [other for other in self.bus.messages if other != vector]
        return count


class Card:
    """A card, plugged in: `pf` and `vfs` are ports."""

    def __init__(
        self, clock: Clock | None = None, seed: str = "test", memory: int = 32 << 20, **options: object
    ) -> None:
        options.setdefault("boot_pages", 4)
        options.setdefault("init_pages", 20)
        options.setdefault("vf_pages", 8)
        options.setdefault("save_pages", 3)
        self.options = Options(**options)  # type: ignore[arg-type]
        self.clock = Clock() if clock is None else clock
        self.models = functions(self.options, seed)
        self.ports = {
            name: Port(model, Bus(model, self.clock, memory if name == "pf" else 4 << 20), self.clock)
            for name, model in self.models.items()
        }
        self.pf = self.ports["pf"]
        self.vfs = [port for name, port in self.ports.items() if name != "pf"]

    def state(self) -> dict[str, int]:
        return dict(self.models["pf"].state())

    @property
    def violations(self) -> int:
        return self.state()["violations"]

    def order(self, name: str, times: int = 1) -> None:
        self.models["pf"].faults.armed[name] = times
