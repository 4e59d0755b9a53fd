"""A software model in this process: a bus that runs on trio's clock, and a door to the model for a plugin's own code.

No socket and no other process, so a clock may jump while everything waits. It must not know any plugin or model.
"""

import mmap
from collections.abc import Callable

import trio

from tests.end_to_end.streams import Parts
from tests.plugins.bus import Alarm, FakeBus
from tests.plugins.fake_host import FakeHost
from vfu_server.host_device import DmaMap, Identity, RegionInfo
from vfu_server.model import BusError, Model
from vfu_server.stream import Origin
from vfu_server.uapi import DMA_FLAG_READ, DMA_FLAG_WRITE, RegionIndex

HEADER = ((0x0C, 1), (0x0D, 1), *((at, 4) for at in range(0x10, 0x28, 4)), (0x30, 4), (0x3C, 1), (0x04, 2))
"""What a guest writes in config space, as (offset, bytes)."""


class TrioBus(FakeBus):
    """A FakeBus whose time is trio's. Memory is what the door has mapped, and `memory` below that."""

    def __init__(self, model: Model, size: int) -> None:
        self.maps: dict[int, mmap.mmap] = {}
        self._news = trio.Event()
        super().__init__(model, size)

    def now(self) -> float:
        return trio.current_time()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        self._time = max(self._time, trio.current_time())
        alarm = super().call_later(seconds, callback)
        self._news.set()
        return alarm

    async def serve(self) -> None:
        """Call back who is due, until cancelled."""
        while True:
            self._news = trio.Event()
            wait = self._alarms[0].time - trio.current_time() if self._waiting() else float("inf")
            with trio.move_on_after(max(0.0, wait)):
                await self._news.wait()
            self.step(max(0.0, trio.current_time() - self._time))
            self.accesses.clear()
            self.messages.clear()

    def dma_read(self, iova: int, length: int) -> bytes:
        memory, at = self._mapped(iova, length)
        return super().dma_read(iova, length) if memory is None else memory[at : at + length]

    def dma_write(self, iova: int, data: bytes) -> None:
        memory, at = self._mapped(iova, len(data))
        if memory is None:
            super().dma_write(iova, data)
        else:
            memory[at : at + len(data)] = data

    def _mapped(self, iova: int, length: int) -> tuple[mmap.mmap | None, int]:
        if not self._model.config.bus_master:
            raise BusError("bus mastering is off")
        for start, memory in self.maps.items():
            if start <= iova and iova + length <= start + len(memory):
                return memory, iova - start
        return None, iova


class ModelHost(FakeHost):
    """The door to `model`. `writes` has all that was written to its BARs, wide stores as one number."""

    def __init__(self, model: Model, name: str, *, memory: int = 0) -> None:
        super().__init__(name)
        self.model = model
        self.bus = TrioBus(model, memory)
        sizes = {RegionIndex.CONFIG: model.config.size, **{index: bar.size for index, bar in model.bars.items()}}
        self.regions = [RegionInfo(index, sizes.get(index, 0)) for index in range(9)]
        self.can_reset = model.can_reset
        self.dma_by_messages = True
        self.cannot_revoke = ""
        self.migration = None
        self.iova_ranges = ()

    def identity(self) -> Identity:
        ids = ((0x00, 2), (0x02, 2), (0x2C, 2), (0x2E, 2), (0x08, 1), (0x09, 3))
        return Identity(*(int.from_bytes(self.model.config.read(*place), "little") for place in ids))

    def read(self, region: int, offset: int, width: int) -> int:
        if region == RegionIndex.CONFIG:
            return int.from_bytes(self.model.config.read(offset, width), "little")
        return self.model.read(region, offset, width)

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        if region == RegionIndex.CONFIG:
            self.model.config.write(offset, value.to_bytes(width, "little"))
            return
        self.writes.append((offset, value))
        self.model.write(region, offset, width, value)

    def write_wide(self, region: int, offset: int, data: bytes) -> None:
        """One store of 16 bytes, which a bus carries as two halves in order."""
        self.writes.append((offset, int.from_bytes(data, "little")))
        for at in range(0, len(data), 8):
            self.model.write(region, offset + at, 8, int.from_bytes(data[at : at + 8], "little"))

    async def reset(self) -> str:
        self.resets += 1
        self.model.config.reset()
        self.model.reset()
        return "DEVICE_RESET"

    async def dma_map(self, dma_map: DmaMap) -> None:
        assert dma_map.prot == DMA_FLAG_READ | DMA_FLAG_WRITE
        self.bus.maps[dma_map.iova] = mmap.mmap(dma_map.fd, dma_map.size)

    async def dma_unmap(self, iova: int, size: int) -> None:
        assert len(self.bus.maps.pop(iova)) == size

    # config space, which the server restores

    def header_bits(self) -> dict[int, int]:
        """By offset, the bits of what a guest writes that this hardware keeps. Afterwards all of it is as new."""
        config, found = self.model.config, {}
        for offset, width in HEADER:
            config.write(offset, b"\xff" * width)
            ones = config.get(offset, width)
            config.write(offset, bytes(width))
            found[offset] = ones ^ config.get(offset, width)
        config.reset()
        return found

    def header_differences(self, parts: Parts, bits: dict[int, int]) -> list[str]:
        """What of the stream's config space is not here."""
        sections = [part.section for part in parts.sections if part.origin is Origin.SERVER]
        (payload,) = [section.payload for section in sections if section.tag == "config" and section.version <= 1]
        wrong = []
        for offset, width in HEADER:
            given = int.from_bytes(payload[offset : offset + width], "little")
            found = self.model.config.get(offset, width)
            if (given ^ found) & bits[offset]:
                wrong.append(f"config {offset:#x}: {found:#x}, not {given:#x}")
        return wrong
