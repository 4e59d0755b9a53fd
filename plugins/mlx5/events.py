"""The event queue: made, read from memory, armed, and every event given to who asked for its type.

It knows no handler's business. It is polled, fast while a command is under way (which may wait for pages that an event
asks for) and slowly otherwise; no interrupt is needed. Source: Linux' mlx5_core (eq.c).
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from plugins.mlx5.commands import Commands
from plugins.mlx5.contexts import EQE
from plugins.mlx5.layouts import CREATE_EQ, DESTROY_EQ
from plugins.mlx5.registers import swap32
from vfu_server.dma_memory import DmaBuffer, DmaMemory
from vfu_server.errors import DeviceGoneError, HostError, VfuServerError
from vfu_server.host_device import HostDevice
from vfu_server.uapi import RegionIndex

log = logging.getLogger(__name__)

CQ_ERROR: Final = 0x04
QP_CATASTROPHIC: Final = 0x05
PAGE_REQUEST: Final = 0x0B
NIC_VPORT_CHANGE: Final = 0x0D
QP_REQUEST_ERROR: Final = 0x10
QP_ACCESS_ERROR: Final = 0x11
OBJECT_CHANGE: Final = 0x27
TYPES: Final = (
    CQ_ERROR,
    QP_CATASTROPHIC,
    PAGE_REQUEST,
    NIC_VPORT_CHANGE,
    QP_REQUEST_ERROR,
    QP_ACCESS_ERROR,
    OBJECT_CHANGE,
)

LOG_ENTRIES: Final = 8
ENTRY: Final = 64
UPDATE_EVERY: Final = 64
"""Events after which the device learns how far we are; it must at least every 128."""
UAR_PAGE: Final = 4096
EQ_ARM: Final = 0x40
EQ_UPDATE: Final = 0x48
VAIN: Final = 10
"""Doorbells in a row that do not get through: then nobody can say any more what the device does."""
FAST: Final = 0.001
SLOW: Final = 0.025

Handler = Callable[[bytes], Awaitable[None]]


class EventQueue:
    """One queue of a physical function. `uar`: the doorbell page that it is armed through; `types`: the events that
    come here, none for a queue that completion queues name; `busy`: whether a command is under way.
    """

    def __init__(
        self,
        host: HostDevice,
        commands: Commands,
        memory: DmaMemory,
        uar: int,
        types: Sequence[int] = TYPES,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._host = host
        self._commands = commands
        self._types = types
        self._busy = busy
        self._memory = memory
        self._uar = uar
        self._buffer: DmaBuffer | None = None
        self._eqn = 0
        self._ci = 0
        self._handlers: dict[int, list[Handler]] = {}
        self._vain = 0
        """Doorbells in a row that did not get through."""
        self.seen = 0

    @property
    def eqn(self) -> int:
        """The number by which other objects name it."""
        return self._eqn

    def on(self, kind: int, handler: Handler) -> None:
        """Call `handler` with every event of type `kind`, 64 bytes each."""
        self._handlers.setdefault(kind, []).append(handler)

    def off(self, kind: int, handler: Handler) -> None:
        """Not any more."""
        self._handlers[kind].remove(handler)

    async def open(self) -> None:
        """Make it and arm it; `run` then has to be started."""
        self._buffer = buffer = await self._memory.allocate(ENTRY << LOG_ENTRIES)
        for at in range(0, ENTRY << LOG_ENTRIES, ENTRY):
            buffer.memory[at + ENTRY - 1] = 1
        words = [sum(1 << kind % 64 for kind in self._types if kind // 64 == word) for word in range(4)]
        pages = range(buffer.iova, buffer.iova + (ENTRY << LOG_ENTRIES), 4096)
        try:
            answer = await self._commands.call(
                CREATE_EQ,
                {f"event_bitmask_{word}": mask for word, mask in enumerate(words)},
                tail=b"".join(page.to_bytes(8, "big") for page in pages),
                log_eq_size=LOG_ENTRIES,
                uar_page=self._uar,
                intr=0,
                log_page_size=0,
            )
        except HostError:
            await self._memory.free(buffer)
            self._buffer = None
            raise
        self._eqn, self._ci = answer["eqn"], 0
        self._tell(EQ_ARM)

    async def close(self) -> None:
        """Destroy it; `run` must have ended."""
        if self._buffer is None:
            return
        try:
            await self._commands.call(DESTROY_EQ, eqn=self._eqn)
        finally:
            await self.release()

    async def release(self) -> None:
        """Give its memory back: the device does not know it any more."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            await self._memory.free(buffer)

    async def run(self) -> None:
        """Look for events until cancelled."""
        while True:
            await self.drain()
            await trio.sleep(FAST if self._busy() else SLOW)

    async def drain(self) -> int:
        """Handle what is there; returns how many."""
        found = 0
        while (event := self._next()) is not None:
            found += 1
            self._ci += 1
            if found % UPDATE_EVERY == 0:
                self._tell(EQ_UPDATE)
            await self._handle(event)
        self.seen += found
        if found or self._vain:
            self._tell(EQ_ARM)
        return found

    def _next(self) -> bytes | None:
        if self._buffer is None:
            return None
        at = (self._ci & ((1 << LOG_ENTRIES) - 1)) * ENTRY
        if self._buffer.memory[at + ENTRY - 1] & 1 != self._ci >> LOG_ENTRIES & 1:
            return None
        return bytes(self._buffer.memory[at : at + ENTRY])

    async def _handle(self, event: bytes) -> None:
        kind = EQE.get(event, "type")
        handlers = self._handlers.get(kind, ())
        if not handlers:
            log.info("%s: event of type %#x, which nobody waits for", self._host.name, kind)
        for handler in list(handlers):
            try:
                await handler(event)
            except VfuServerError as error:  # one object's trouble is not the queue's
                log.warning("%s: event of type %#x: %s", self._host.name, kind, error)

    def _tell(self, doorbell: int) -> None:
        """Say how far we are. What does not get through is said again with the next look; HostError: not for long."""
        value = self._eqn << 24 | self._ci & 0xFFFFFF
        try:
            self._host.write(RegionIndex.BAR0, self._uar * UAR_PAGE + doorbell, 4, swap32(value))
        except HostError as error:
            self._vain += 1
            if isinstance(error, DeviceGoneError) or self._vain > VAIN:
                raise
            log.info("%s: doorbell of event queue %d: %s", self._host.name, self._eqn, error)
        else:
            self._vain = 0
