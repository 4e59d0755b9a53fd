"""A door to a device that is nothing but register tables (`FakeHost`), for tests of a plugin's parts without a model.

Registers keep what is written, as far as their `Access` says; a test makes more of them with `on_read` and `on_write`.
Every access is kept. There is no DMA but scratch memory, and no client.
"""

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn

import trio

from vfu_server import uapi
from vfu_server.errors import DeviceGoneError, HostError
from vfu_server.host_device import (
    DmaMap,
    HostEvent,
    HostStatistics,
    Identity,
    IrqInfo,
    MigrationDoor,
    RegionInfo,
    Scratch,
)
from vfu_server.model import Access
from vfu_server.model_registers import RegisterModel
from vfu_server.regmap import Block
from vfu_server.uapi import Command, RegionIndex

WIDE = 16
LOOK_SECONDS = 0.01
READ_WRITE = uapi.REGION_INFO_FLAG_READ | uapi.REGION_INFO_FLAG_WRITE


class FakeHost:
    """A HostDevice of `blocks`, by BAR. `values` are the registers of all of them; memory and bus mastering are on.

    `accesses` are those of BARs, oldest first (their time is 0); `maps` what was mapped for DMA. `gone` True: it was
    pulled out.
    """

    def __init__(
        self,
        blocks: Mapping[int, Block],
        *,
        name: str = "fake",
        identity: Identity | None = None,
        can_reset: bool = True,
    ) -> None:
        self.name = name
        self.can_reset = can_reset
        self.dma_by_messages = False
        self.cannot_revoke = "a fake has no mappings"
        self.relay: Callable[[Command, bytes], Awaitable[bytes]] | None = None
        self.migration: MigrationDoor | None = None
        self.iova_ranges: Sequence[tuple[int, int]] = ()
        self.gone = False
        self.accesses: list[Access] = []
        self.maps: dict[int, DmaMap] = {}
        self.resets = 0
        self.on_read: dict[str, Callable[[int], int]] = {}
        """Register -> what a read gives, made of the value that is kept."""
        self.on_write: dict[str, Callable[[int], int | None]] = {}
        """Register -> what becomes of a written value; None: it is not kept."""
        found = identity or Identity(0x1AF4, 0x10FF, 0x1AF4, 0x1100, 1, 0xFF0000)
        self._identity = found
        self._model = RegisterModel(blocks, vendor=found.vendor, device=found.device, class_code=found.class_code)
        self._model.config.set(uapi.PCI_COMMAND, 2, uapi.PCI_COMMAND_MEMORY | uapi.PCI_COMMAND_MASTER)
        sizes = {index: bar.size for index, bar in self._model.bars.items()}
        sizes[RegionIndex.CONFIG] = self._model.config.size
        self.regions: Sequence[RegionInfo] = [
            RegionInfo(index, sizes.get(index, 0), READ_WRITE if index in sizes else 0)
            for index in range(uapi.NUM_REGIONS)
        ]
        self.irqs: Sequence[IrqInfo] = [IrqInfo(index, 0) for index in range(uapi.NUM_IRQS)]

    def __getitem__(self, register: str) -> int:
        return self._model[register]

    def __setitem__(self, register: str, value: int) -> None:
        self._model[register] = value

    @property
    def writes(self) -> list[tuple[int, int]]:
        """(offset, value) of all writes to BARs."""
        return [(access.offset, access.value) for access in self.accesses if access.write]

    def read(self, region: int, offset: int, width: int) -> int:
        self._check()
        if region == RegionIndex.CONFIG:
            return self._model.config.get(offset, width)
        self._decoding()
        register = self._model.blocks[region].at(offset)
        value = self._model.read(region, offset, width)
        if register is not None and register.offset == offset and register.name in self.on_read:
            value = self.on_read[register.name](value) & (1 << 8 * width) - 1
        self.accesses.append(Access(0.0, False, region, offset, width, value))
        return value

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        self._check()
        if region == RegionIndex.CONFIG:
            self._model.config.set(offset, width, value)
            return
        self._decoding()
        self.accesses.append(Access(0.0, True, region, offset, width, value))
        register = self._model.blocks[region].at(offset)
        if register is not None and register.offset == offset and register.name in self.on_write:
            kept = self.on_write[register.name](value)
            if kept is not None:
                self._model[register.name] = kept
            return
        self._model.write(region, offset, width, value)

    def read_block(self, region: int, offset: int, length: int) -> bytes:
        if region == RegionIndex.CONFIG:
            self._check()
            return self._model.config.read(offset, length)
        return b"".join(self.read(region, offset + at, 1).to_bytes(1, "little") for at in range(length))

    def write_block(self, region: int, offset: int, data: bytes) -> None:
        if region == RegionIndex.CONFIG:
            self._check()
            self._model.config.write(offset, data)
            return
        for at, byte in enumerate(data):
            self.write(region, offset + at, 1, byte)

    def write_wide(self, region: int, offset: int, data: bytes) -> None:
        if len(data) != WIDE or offset % WIDE:
            raise HostError(f"{self.name}: a wide write of {len(data)} bytes at {offset:#x}", errno.EINVAL)
        for at in range(0, WIDE, 8):
            self.write(region, offset + at, 8, int.from_bytes(data[at : at + 8], "little"))

    def identity(self) -> Identity:
        self._check()
        return self._identity

    async def set_irqs(
        self, index: int, flags: int, start: int, count: int, data: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        await trio.lowlevel.checkpoint()
        self._check()

    async def dma_map(self, dma_map: DmaMap) -> None:
        await trio.lowlevel.checkpoint()
        self._check()
        self.maps[dma_map.iova] = dma_map

    async def dma_unmap(self, iova: int, size: int) -> None:
        await trio.lowlevel.checkpoint()
        self._check()
        if iova not in self.maps or self.maps[iova].size != size:
            raise HostError(f"{self.name}: nothing of {size} bytes is mapped at {iova:#x}", errno.ENOENT)
        del self.maps[iova]

    async def dma_unmap_all(self) -> None:
        await trio.lowlevel.checkpoint()
        self.maps.clear()

    async def is_peer(self, fd: int) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    async def reset(self) -> str:
        await trio.lowlevel.checkpoint()
        self._check()
        if not self.can_reset:
            raise HostError(f"{self.name} has no reset", errno.EINVAL)
        self._model.reset()
        self.resets += 1
        return "fake"

    async def device_feature(self, flags: int, data: bytes = b"", reply_size: int = 0) -> bytes:
        await trio.lowlevel.checkpoint()
        raise HostError(f"{self.name} has no feature {flags & uapi.FEATURE_ID_MASK}", errno.ENOTTY)

    @asynccontextmanager
    async def scratch(self, size: int, limit: int = 1 << 64) -> AsyncIterator[Scratch | None]:
        await trio.lowlevel.checkpoint()
        yield Scratch(uapi.PAGE_SIZE, memoryview(bytearray(size)))

    async def events(self) -> AsyncIterator[HostEvent]:
        while not self.gone:  # noqa: ASYNC110 - a test sets it, from any thread
            await trio.sleep(LOOK_SECONDS)
        yield HostEvent("gone", "it was pulled out")

    @property
    def native(self) -> NoReturn:
        """There is no C door: a fake cannot be served to clients."""
        raise HostError("a FakeHost cannot be served: start a model")

    def statistics(self) -> HostStatistics:
        return HostStatistics(len(self.maps), sum(each.size for each in self.maps.values()), len(self.accesses))

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def _check(self) -> None:
        if self.gone:
            raise DeviceGoneError(f"{self.name} was pulled out")

    def _decoding(self) -> None:
        if not self._model.config.memory_enabled:
            raise HostError(f"{self.name}: memory decoding is off")
