"""The command queue of a function that we drive: slots, doorbell, waiting, deadlines, and errors with a name.

It must not know what commands mean or in which order they come. Completion is polled from memory, with growing pauses;
no interrupt is needed. Source: Linux' mlx5_core (cmd.c).
"""

import errno
import logging
from collections import Counter
from typing import Final

import trio

from plugins.mlx5.commands import Commands, Request
from plugins.mlx5.contexts import COMMAND_ENTRY
from plugins.mlx5.init_segment import InitSegment
from plugins.mlx5.layouts import Command
from plugins.mlx5.mailboxes import OWNER, STRIDE, Chain, blocks_for, entry
from plugins.mlx5.status import CommandError, CommandLostError, CommandTimeoutError, PfDeadError
from vfu_server.dma_memory import DmaBuffer, DmaMemory
from vfu_server.errors import HostError

log = logging.getLogger(__name__)

QUEUE_BYTES: Final = 4096
MAX_LOG_ENTRIES: Final = 5
MIN_LOG_STRIDE: Final = 6
USUAL_BLOCKS: Final = 8
"""Mailboxes that a slot begins with, each way: enough for a capability block."""
FIRST_PAUSE: Final = 0.00005
LONGEST_PAUSE: Final = 0.002
"""Of that many seconds a command is told too late at most."""


class _Slot:
    """One entry of the queue with mailboxes of its own."""

    def __init__(self, index: int, place: memoryview) -> None:
        self.index = index
        self.place = place
        self.buffer: DmaBuffer | None = None
        self.blocks = 0
        self.token = 0
        """Of the command that was posted last."""

    @property
    def done(self) -> bool:
        """The device has given the entry back."""
        return not self.place[OWNER] & 1

    @property
    def chains(self) -> tuple[Chain, Chain]:
        """For the input and for the output."""
        assert self.buffer is not None
        half = self.blocks * STRIDE
        memory, iova = self.buffer.memory, self.buffer.iova
        return Chain(memory[:half], iova), Chain(memory[half : 2 * half], iova + half)


class CommandQueue(Commands):
    """The queue. `open` first; after `fail` every call raises.

    The last slot is kept for requests with `pages`: feeding pages must not wait for a command that waits for pages.
    """

    def __init__(self, segment: InitSegment, memory: DmaMemory) -> None:
        self.segment = segment
        self.name = segment.name
        self._memory = memory
        self._page: DmaBuffer | None = None
        self._free: list[_Slot] = []
        self._stalled: list[_Slot] = []
        self._pages_slot: _Slot | None = None
        self._pages_lock = trio.Lock()
        self._returned = trio.Event()
        self._slots = 0
        self._token = 0
        self._failure: HostError | None = None
        self._seconds = 60.0
        self.epoch = 0
        self.in_flight = 0
        self.counts: Counter[str] = Counter()

    async def open(self) -> None:
        """Give the firmware a queue. HostError: it has another interface than ours; DeadlineError: it stays busy."""
        self.segment.check_revision()
        low = self.segment.read("cmdq_addr_low")
        log_entries, log_stride = low >> 4 & 0xF, low & 0xF
        if not (0 < log_entries <= MAX_LOG_ENTRIES and MIN_LOG_STRIDE <= log_stride <= 12 - log_entries):
            raise HostError(f"{self.name}: a command queue of 2^{log_entries} entries, 2^{log_stride} bytes apart")
        timeouts = self.segment.timeouts()
        self._seconds = timeouts.command
        self._page = page = await self._memory.allocate(QUEUE_BYTES)
        slots = [_Slot(n, page.memory[n << log_stride : (n << log_stride) + 64]) for n in range(1 << log_entries)]
        self._slots = len(slots)
        self._pages_slot, self._free, self._stalled = slots[-1], slots[-2::-1], []
        self.segment.write("cmdq_addr_high", page.iova >> 32)
        self.segment.write("cmdq_addr_low", page.iova & 0xFFFFF000)
        await self.segment.wait_initialized(timeouts.init)
        self._failure = None
        self.epoch += 1

    async def close(self) -> None:
        """Give the memory back. The device must have been reset, or not use the queue any more."""
        self.fail(PfDeadError(f"{self.name}: its driver here has ended"))
        for slot in {id(one): one for one in [*self._free, *self._stalled, self._pages_slot] if one}.values():
            if slot.buffer is not None:
                await self._memory.free(slot.buffer)
                slot.buffer = None
        self._free, self._stalled, self._pages_slot = [], [], None
        if self._page is not None:
            await self._memory.free(self._page)
            self._page = None

    def fail(self, error: HostError) -> None:
        """Every command that waits, and every further one, raises `error`."""
        self._failure = error
        self._wake()

    @property
    def exhausted(self) -> bool:
        """No entry is left: commands that never completed have them all."""
        self._reclaim()
        return 0 < self._slots - 1 <= len(self._stalled)

    @property
    def failure(self) -> HostError | None:
        """Why nothing can be sent, if so."""
        return self._failure

    async def send(self, request: Request) -> bytes:
        command = request.command
        seconds = self._seconds if request.seconds is None else min(request.seconds, self._seconds)
        self._reclaim()
        slot = await self._take_pages_slot() if request.pages else await self._take_slot(command, seconds)
        stalled = False
        self.in_flight += 1
        try:
            with trio.CancelScope(shield=True):
                await self._post(slot, request.message, request.length)
                stalled = not await self._completed(slot, seconds)
            if stalled:
                self.counts["timeouts"] += 1
                raise CommandTimeoutError(
                    f"{self.name}: {command.name} did not complete within {seconds:g} s ({self._health()})"
                )
            return self._result(slot, command, request.length)
        finally:
            self.in_flight -= 1
            self._give_back(slot, pages=request.pages, stalled=stalled)

    async def _take_pages_slot(self) -> _Slot:
        await self._pages_lock.acquire()
        slot = self._pages_slot
        if self._failure is not None or slot is None:
            self._pages_lock.release()
            raise self._failure or PfDeadError(f"{self.name}: its command queue is not open")
        if not slot.done and self._free:  # its last command timed out: another one takes its place
            self._stalled.append(slot)
            slot = self._pages_slot = self._free.pop()
        return slot

    async def _take_slot(self, command: Command, seconds: float) -> _Slot:
        with trio.move_on_after(seconds):
            while len(self._stalled) < self._slots - 1:
                if self._failure is not None:
                    raise self._failure
                if self._free:
                    return self._free.pop()
                await self._returned.wait()
        raise HostError(
            f"{self.name}: {command.name} finds no free entry, {len(self._stalled)} commands never completed",
            errno.EAGAIN,
        )

    def _reclaim(self) -> None:
        """A timed-out entry is used again only when the device has given it back."""
        done = [slot for slot in self._stalled if slot.done]
        self._stalled = [slot for slot in self._stalled if slot not in done]
        self._free += done

    def _give_back(self, slot: _Slot, *, pages: bool, stalled: bool) -> None:
        if pages:
            self._pages_lock.release()
        elif stalled:
            self._stalled.append(slot)
        else:
            self._free.append(slot)
        self._wake()

    def _wake(self) -> None:
        self._returned.set()
        self._returned = trio.Event()

    async def _post(self, slot: _Slot, message: bytes, length: int) -> None:
        if not slot.done:  # the one for pages, whose last command timed out
            raise HostError(f"{self.name}: entry {slot.index} is still the device's", errno.EAGAIN)
        into, out_of = blocks_for(len(message)), blocks_for(length)
        await self._room_for(slot, max(into, out_of))
        slot.token = self._token = self._token % 255 + 1
        inbox = outbox = 0
        if into or out_of:
            boxes_in, boxes_out = slot.chains
            boxes_in.fill(message, self._token)
            boxes_out.clear(length, self._token)
            inbox, outbox = boxes_in.iova if into else 0, boxes_out.iova if out_of else 0
        built = entry(message, length, self._token, inbox, outbox)
        slot.place[:OWNER] = built[:OWNER]
        slot.place[OWNER:64] = built[OWNER:]  # last: now it is the device's; the doorbell's call orders the writes
        self.counts["commands"] += 1
        try:
            self.segment.write("cmd_doorbell", 1 << slot.index)
        except HostError:
            slot.place[OWNER] = 0  # the device was not told, so the entry is ours again
            raise

    async def _room_for(self, slot: _Slot, blocks: int) -> None:
        if blocks <= slot.blocks:
            return
        if slot.buffer is not None:
            await self._memory.free(slot.buffer)
            slot.buffer, slot.blocks = None, 0
        blocks = max(blocks, USUAL_BLOCKS)
        slot.buffer = await self._memory.allocate(2 * blocks * STRIDE)
        slot.blocks = blocks

    async def _completed(self, slot: _Slot, seconds: float) -> bool:
        """Whether it came back in time."""
        deadline = trio.current_time() + seconds
        pause = FIRST_PAUSE
        await trio.lowlevel.checkpoint()
        while not slot.done:
            if self._failure is not None:
                raise self._failure
            if trio.current_time() >= deadline:
                return slot.done
            await trio.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)
        return True

    def _health(self) -> str:
        """What the health buffer says. That it cannot be read must not hide that a command may still act."""
        try:
            return self.segment.health()
        except HostError as error:
            return f"its health cannot be read: {error}"

    def _result(self, slot: _Slot, command: Command, length: int) -> bytes:
        place = bytes(slot.place)
        if delivery := COMMAND_ENTRY.get(place, "status"):
            self.counts["errors"] += 1
            raise CommandError(self.name, command.name, delivery=delivery)
        if COMMAND_ENTRY.get(place, "token") != slot.token:
            raise CommandLostError(f"{self.name}: the entry of {command.name} came back with another token")
        inline = place[0x20:0x30]
        if status := inline[0]:
            self.counts["errors"] += 1
            raise CommandError(self.name, command.name, status, int.from_bytes(inline[4:8], "big"))
        return slot.chains[1].take(inline, length) if blocks_for(length) else inline[:length]
