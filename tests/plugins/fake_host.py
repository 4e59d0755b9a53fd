"""Device doors over dictionaries: an edu and an I/OAT channel, scripted just far enough for the plugin's tests.

Written from the devices' descriptions, apart from the plugin and from its software models. Time is trio's, so that a
test's clock may jump. What must not happen (a DMA to memory that is nobody's, an access while memory space is off) is
kept in `strays`.
"""

import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from vfu_server.errors import HostError
from vfu_server.host_device import DmaMap, HostEvent, HostStatistics, Identity, IrqInfo, RegionInfo, Scratch
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_INTX_DISABLE, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, RegionIndex

ALL_ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF}


class FakeHost:
    """What both devices share: config space, guest memory, scratch memory, a log of accesses."""

    bar_size = 0x1000
    ids = (0x1234, 0x5678, 0x00)

    def __init__(self, name: str = "0000:00:04.0") -> None:
        self.name = name
        self.regions: Sequence[RegionInfo] = [
            RegionInfo(index, self.bar_size if index == 0 else 0x1000 if index == RegionIndex.CONFIG else 0)
            for index in range(9)
        ]
        self.irqs: Sequence[IrqInfo] = [IrqInfo(index, 1 if index < 2 else 0) for index in range(5)]
        self.can_reset = False
        self.reset_error: HostError | None = None
        self.resets = 0
        self.config = bytearray(0x1000)
        self.command = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER
        self.ram: dict[int, int] = {}
        """Guest memory, by byte; every address below 4 GiB exists."""
        self.scratch_base: int | None = 0x100000
        self.scratch_error: HostError | None = None
        self.lent: Scratch | None = None
        self.strays: list[str] = []
        self.writes: list[tuple[int, int]] = []
        """BAR writes, as (offset, value)."""

    @property
    def command(self) -> int:
        return int.from_bytes(self.config[PCI_COMMAND : PCI_COMMAND + 2], "little")

    @command.setter
    def command(self, value: int) -> None:
        self.config[PCI_COMMAND : PCI_COMMAND + 2] = value.to_bytes(2, "little")

    def read(self, region: int, offset: int, width: int) -> int:
        self.tick()
        if region == RegionIndex.CONFIG:
            return int.from_bytes(self.config[offset : offset + width], "little")
        self._memory_space(f"read {offset:#x}")
        return self.bar_read(offset, width)

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        self.tick()
        if region == RegionIndex.CONFIG:
            self.config_write(offset, width, value)
            return
        self._memory_space(f"write {offset:#x}")
        self.writes.append((offset, value))
        self.bar_write(offset, width, value)

    def _memory_space(self, what: str) -> None:
        if not self.command & PCI_COMMAND_MEMORY:
            self.strays.append(f"{what} with memory space off")
            raise HostError("memory space is off")

    def config_write(self, offset: int, width: int, value: int) -> None:
        if offset == 0x180:  # I/OAT: written ones clear
            value = int.from_bytes(self.config[offset : offset + width], "little") & ~value
        self.config[offset : offset + width] = value.to_bytes(width, "little")

    def tick(self) -> None:
        """Let happen what is due by now."""

    def bar_read(self, offset: int, width: int) -> int:
        return ALL_ONES[width]

    def bar_write(self, offset: int, width: int, value: int) -> None:
        return None

    def dma(self, iova: int, length: int) -> tuple[memoryview | None, int]:
        """Scratch memory and the place in it, or None for guest memory."""
        if not self.command & PCI_COMMAND_MASTER:
            raise LookupError("bus mastering is off")
        if self.lent is not None and self.lent.iova <= iova and iova + length <= self.lent.iova + len(self.lent.memory):
            return self.lent.memory, iova - self.lent.iova
        if self.scratch_base is not None and self.scratch_base <= iova < self.scratch_base + 0x800000:
            self.strays.append(f"DMA to {iova:#x}, which is lent no more")
            raise LookupError("not mapped")
        if iova + length > 1 << 32:
            raise LookupError("not mapped")
        return None, iova

    def dma_read(self, iova: int, length: int) -> bytes:
        memory, at = self.dma(iova, length)
        if memory is not None:
            return bytes(memory[at : at + length])
        return bytes(self.ram.get(at + n, 0) for n in range(length))

    def dma_write(self, iova: int, data: bytes) -> None:
        memory, at = self.dma(iova, len(data))
        if memory is not None:
            memory[at : at + len(data)] = data
            return
        self.ram.update(zip(range(at, at + len(data)), data, strict=True))

    @asynccontextmanager
    async def scratch(self, size: int, limit: int = 1 << 64) -> AsyncIterator[Scratch | None]:
        if self.scratch_error is not None:
            raise self.scratch_error
        if self.scratch_base is None or self.scratch_base + size > limit:
            yield None
            return
        self.lent = Scratch(self.scratch_base, memoryview(bytearray(size)))
        try:
            yield self.lent
        finally:
            self.lent = None

    def identity(self) -> Identity:
        vendor, device, revision = self.ids
        return Identity(vendor, device, 0, 0, revision, 0x00FF00)

    async def reset(self) -> str:
        self.resets += 1
        if self.reset_error is not None:
            raise self.reset_error
        return "function"

    def read_block(self, region: int, offset: int, length: int) -> bytes:
        return b"".join(self.read(region, offset + n, 1).to_bytes(1, "little") for n in range(length))

    def write_block(self, region: int, offset: int, data: bytes) -> None:
        for n, byte in enumerate(data):
            self.write(region, offset + n, 1, byte)

    async def set_irqs(
        self, index: int, flags: int, start: int, count: int, data: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        raise HostError("not scripted")

    async def dma_map(self, dma_map: DmaMap) -> None:
        raise HostError("not scripted")

    async def dma_unmap(self, iova: int, size: int) -> None:
        raise HostError("not scripted")

    async def dma_unmap_all(self) -> None:
        return None

    async def device_feature(self, flags: int, data: bytes = b"", reply_size: int = 0) -> bytes:
        raise HostError("not scripted")

    async def events(self) -> AsyncIterator[HostEvent]:
        for event in ():
            yield event

    @property
    def native(self) -> Any:
        return None

    def statistics(self) -> HostStatistics:
        return HostStatistics()

    async def aclose(self) -> None:
        return None


class FakeEdu(FakeHost):
    """QEMU's edu: 100 ms for a transfer, `factorial_seconds` for a factorial. Faults: `stuck`, `drop`, `deaf`."""

    bar_size = 0x100000
    ids = (0x1234, 0x11E8, 0x10)

    def __init__(self, name: str = "0000:00:04.0") -> None:
        super().__init__(name)
        self.regs = {0x04: 0, 0x08: 0, 0x20: 0, 0x24: 0, 0x80: 0, 0x88: 0, 0x90: 0, 0x98: 0}
        self.buffer = bytearray(0x1000)
        self.msi = False
        self.intx = False
        self.was_high = False
        self.edges = 0
        self.messages = 0
        self.due: list[tuple[float, Callable[[], None]]] = []
        self.factorial_seconds = 0.001
        self.stuck = False
        self.drop = False
        self.deaf: set[int] = set()
        """Offsets whose writes have no effect."""

    def tick(self) -> None:
        now = trio.current_time()
        for item in sorted((i for i in self.due if i[0] <= now), key=lambda i: i[0]):
            self.due.remove(item)
            item[1]()

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        self.due.append((trio.current_time() + seconds, what))

    def signal(self) -> None:
        if self.msi:
            self.messages += bool(self.command & PCI_COMMAND_MASTER)
            return
        self.intx = True
        self.look()

    def look(self) -> None:
        """Count what an interrupt controller takes for a new interrupt."""
        self.edges += self.line() and not self.was_high
        self.was_high = self.line()

    def config_write(self, offset: int, width: int, value: int) -> None:
        super().config_write(offset, width, value)
        self.look()

    def line(self) -> bool:
        """INTx as the interrupt controller sees it."""
        return self.intx and not self.command & PCI_COMMAND_INTX_DISABLE

    def bar_read(self, offset: int, width: int) -> int:
        if width < 4 or offset % width:
            return 0
        if offset == 0 and width == 4:
            return 0x010000ED
        if offset in self.regs and (width == 4 or offset >= 0x80):
            return self.regs[offset] & ALL_ONES[width]
        return ALL_ONES[width]

    def bar_write(self, offset: int, width: int, value: int) -> None:
        if width < 4 or offset % width or (offset < 0x80 and width != 4) or offset in self.deaf:
            return
        regs = self.regs
        if offset == 0x04:
            regs[0x04] = ~value & 0xFFFFFFFF
        elif offset == 0x08 and not regs[0x20] & 1:
            regs[0x08], regs[0x20] = value, regs[0x20] | 1
            self.later(self.factorial_seconds, self.factorial_done)
        elif offset == 0x20:
            regs[0x20] = regs[0x20] & ~0x80 | value & 0x80
        elif offset == 0x60:
            regs[0x24] |= value
            if regs[0x24]:
                self.signal()
        elif offset == 0x64:
            regs[0x24] &= ~value
            if not regs[0x24] and not self.msi:
                self.intx = False
                self.look()
        elif offset in (0x80, 0x88, 0x90) and not regs[0x98] & 1:
            regs[offset] = value
        elif offset == 0x98 and not regs[0x98] & 1 and value & 1:
            regs[0x98] = value
            if not self.stuck:
                self.later(0.1, self.transfer_done)

    def factorial_done(self) -> None:
        result = 1
        for n in range(1, min(self.regs[0x08], 34) + 1):
            result = result * n & 0xFFFFFFFF
        self.regs[0x08] = result
        self.regs[0x20] &= ~1
        if self.regs[0x20] & 0x80:
            # the device's thread takes a lock before it signals
            self.later(0.002, lambda: self.raise_status(0x1))

    def raise_status(self, bits: int) -> None:
        self.regs[0x24] |= bits
        self.signal()

    def transfer_done(self) -> None:
        source, destination, count, command = (self.regs[offset] for offset in (0x80, 0x88, 0x90, 0x98))
        inner = source if command & 2 else destination
        try:
            if inner >= 0x40000 and inner + count <= 0x41000 and not self.drop:
                at = inner - 0x40000
                if command & 2:
                    self.dma_write(destination & 0xFFFFFFF, bytes(self.buffer[at : at + count]))
                else:
                    self.buffer[at : at + count] = self.dma_read(source & 0xFFFFFFF, count)
        except LookupError:
            pass
        self.regs[0x98] &= ~1
        if command & 4:
            self.raise_status(0x100)


class FakeIoat(FakeHost):
    """I/OAT with two channels; a kick is seen after `blind` seconds and has run all descriptors `delay` seconds later.

    Faults: `bad_nulls` makes a null descriptor an error, `slow` sees no kick, `deaf_reset` and `deaf` (offsets within a
    channel) drop writes.
    """

    bar_size = 0x4000
    ids = (0x8086, 0x0E20, 0x07)
    channels = 2

    def __init__(self, name: str = "0000:00:04.0") -> None:
        super().__init__(name)
        self.global_regs = {
            0x00: self.channels,
            0x01: 20,
            0x02: 0,
            0x03: 0,
            0x04: 0,
            0x08: 0x32,
            0x0C: 0x8000,
            0x10: 0x40,
        }
        self.scratch_base = 0x8000_0000
        self.chans = [FakeChannel(self) for _ in range(self.channels)]
        self.delay = 0.0001
        self.blind = 0.0
        self.deaf: set[int] = set()
        self.bad_nulls = False
        self.slow = False
        self.deaf_reset = False

    def tick(self) -> None:
        for channel in self.chans:
            channel.tick()

    def bar_read(self, offset: int, width: int) -> int:
        index, inner = divmod(offset - 0x80, 0x80)
        if index < 0:
            value = self.global_regs.get(offset, 0) & ALL_ONES[width]
            if offset == 0x03:  # reading INTRCTRL takes the master enable, as the driver's handler knows
                self.global_regs[offset] &= ~1
            return value
        if index >= self.channels:
            return ALL_ONES[width]
        return self.chans[index].read(inner, width)

    def bar_write(self, offset: int, width: int, value: int) -> None:
        index, inner = divmod(offset - 0x80, 0x80)
        if index < 0 and offset in (0x02, 0x03, 0x0C):
            kept = {0x02: 0, 0x03: 0, 0x0C: 0x8000}[offset]
            self.global_regs[offset] = self.global_regs[offset] & kept | value & ~kept
        elif 0 <= index < self.channels:
            self.chans[index].write(inner, width, value)


class FakeChannel:
    """One channel."""

    def __init__(self, host: FakeIoat) -> None:
        self.host = host
        self.regs = {0x00: 0, 0x02: 2, 0x04: 0, 0x06: 0, 0x10: 0, 0x18: 0, 0x28: 0, 0x2C: 0}
        self.last = 0
        self.state = 3
        self.finished = 0
        self.following = 0
        self.seen: float | None = None
        self.due: float | None = None
        self.interrupts = 0
        self.executed: list[int] = []
        self.completions: list[int] = []
        """CHANCMP at each descriptor."""

    def read(self, offset: int, width: int) -> int:
        if offset == 0x08:
            return (self.last | self.state) & ALL_ONES[width]
        value = self.regs.get(offset, 0) & ALL_ONES[width]
        if offset == 0x00:  # whoever reads CHANCTRL first has the channel
            self.regs[offset] |= 0x100
        return value

    def write(self, offset: int, width: int, value: int) -> None:
        regs = self.regs
        if offset in (0x10, 0x14, 0x18, 0x1C):
            base, shift = offset & ~4, (offset & 4) * 8
            assert width == 4, "the hardware takes two halves"
            assert self.state == 3, "the driver writes it on halted channels only"
            regs[base] = regs[base] & ~(0xFFFFFFFF << shift) | value << shift
            if base == 0x10:
                self.following, self.finished = regs[0x10], 0
        elif offset == 0x28:
            regs[0x28] &= ~value
        elif offset == 0x04 and value & 0x20:
            if not self.host.deaf_reset:
                self.state, self.due, self.seen, self.finished, self.following = 3, None, None, 0, 0
                regs[0x06] = 0
        elif offset == 0x06:
            regs[0x06] = value
            if self.finished != value and not self.host.slow:
                self.seen = trio.current_time() + self.host.blind
        elif offset in (0x00, 0x2C) and offset not in self.host.deaf:
            regs[offset] = value & ~1 if offset == 0x00 else value

    def tick(self) -> None:
        if self.seen is not None and self.seen <= trio.current_time():
            self.state, self.due, self.seen = 0, self.seen + self.host.delay, None
        if self.due is None or self.due > trio.current_time():
            return
        self.due = None
        while self.finished != self.regs[0x06]:
            try:
                self.run_one()
            except LookupError:
                self.regs[0x28] |= 1 << 8
            if self.regs[0x28]:
                self.fail()
                return
        self.state = 1

    def fail(self) -> None:
        self.state = 3
        self.interrupts += self.regs[0x00] >> 4 & 1
        if self.regs[0x00] & 4:
            self.host.dma_write(self.regs[0x18], struct.pack("<Q", self.last | self.state))

    def run_one(self) -> None:
        address = self.following
        size, control, source, destination, following = struct.unpack("<IIQQQ32x", self.host.dma_read(address, 64))
        if not size:
            self.regs[0x28] |= 1 << 11
            return
        if control & 0x20:
            if self.host.bad_nulls:
                self.regs[0x28] |= 1 << 10
                return
        else:
            self.host.dma_write(destination, self.host.dma_read(source, size))
        self.executed.append(address)
        self.completions.append(self.regs[0x18])
        self.last, self.following = address, following
        self.finished = self.finished + 1 & 0xFFFF
        self.interrupts += control & 1
        if control & 8 and self.regs[0x18]:
            self.host.dma_write(
                self.regs[0x18], struct.pack("<Q", self.last | (1 if self.finished == self.regs[6] else 0))
            )
