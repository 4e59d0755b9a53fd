"""`Guest`: a VMM with its firmware in one object, in the order of messages that QEMU 11.1 sends.

It joins client, memory, interrupts and config space. It knows no device: drivers take a Guest and add what they know.
"""

import mmap
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

from vfu_server import uapi
from vfu_server.errors import VfuServerError
from vfu_server.host_device import IrqInfo, RegionInfo
from vfu_server.testing import pci
from vfu_server.testing.client import Client, DeviceInfo
from vfu_server.testing.interrupts import Interrupts
from vfu_server.testing.memory import GuestMemory
from vfu_server.testing.wire import ReplyError
from vfu_server.uapi import IrqIndex, RegionIndex

_CAST: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_MSI_ADDRESS = 0xFEE00000


class RegionConfig:
    """Config space through the client."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def read(self, offset: int, width: int) -> int:
        """Little-endian value."""
        return self._client.read(RegionIndex.CONFIG, offset, width)

    def write(self, offset: int, width: int, value: int) -> None:
        """Store a little-endian value."""
        self._client.write(RegionIndex.CONFIG, offset, width, value)


class Guest:
    """A guest with one vfio-user device. `start` does all that happens until an operating system would boot.

    With `map_regions` the sparse areas that the server offers are mapped and accesses there never become messages. With
    `posted_writes` writes to memory BARs want no reply, as QEMU does it where nothing can be mapped; refusals are then
    not seen.
    """

    def __init__(
        self,
        client: Client,
        memory: GuestMemory | None = None,
        *,
        map_regions: bool = True,
        posted_writes: bool = False,
    ) -> None:
        self.client = client
        self.memory = GuestMemory.of(16 << 20) if memory is None else memory
        self._own_memory = memory is None
        client.memory = self.memory
        self.config = RegionConfig(client)
        self.map_regions = map_regions
        self.posted_writes = posted_writes
        self.info = DeviceInfo(0, 0, 0)
        self.regions: dict[int, RegionInfo] = {}
        self.irqs: dict[int, IrqInfo] = {}
        self.bars: list[pci.BarInfo] = []
        self.addresses: dict[int, int] = {}
        self.interrupts: Interrupts | None = None
        self.error_interrupt: Interrupts | None = None
        self._areas: dict[int, list[tuple[int, int, mmap.mmap]]] = {}

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        memory: GuestMemory | None = None,
        *,
        timeout: float = 5.0,
        map_regions: bool = True,
        posted_writes: bool = False,
    ) -> Self:
        """A guest whose device is the server at `path`; `start` is still to be called."""
        client = Client.connect(path, timeout=timeout)
        return cls(client, memory, map_regions=map_regions, posted_writes=posted_writes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection and all that belongs to it. Memory that was given to the guest stays open."""
        for areas in self._areas.values():
            for *_, area in areas:
                area.close()
        self._areas.clear()
        for region in self.regions.values():
            if region.fd >= 0:
                os.close(region.fd)
        self.regions.clear()
        for interrupts in (self.interrupts, self.error_interrupt):
            if interrupts is not None:
                interrupts.close()
        self.interrupts = self.error_interrupt = None
        self.client.close()
        if self._own_memory:
            self.memory.close()

    # what a VMM does

    def start(self) -> Self:
        """Plug the device in, reset the machine, let the firmware place the BARs."""
        self.plug_in()
        self.machine_reset()
        self.firmware()
        return self

    def plug_in(self) -> None:
        """VERSION, DMA maps, infos, config space, interrupts: what QEMU does when the device is realized."""
        self.client.negotiate()
        self.memory.map_into(self.client)
        self.info = self.client.get_info()
        for index in (0, 1, 2, 3, 4, 5, 7):
            self.regions[index] = self.client.get_region_info(index)
        self._learn_irqs((IrqIndex.ERR,))
        size = min(self.regions[RegionIndex.CONFIG].size, uapi.PCI_CFG_SPACE_EXP_SIZE)
        header = self.client.region_read(RegionIndex.CONFIG, 0, size)
        if len(header) < uapi.PCI_CFG_SPACE_SIZE or header[:2] == b"\xff\xff":
            raise VfuServerError(f"config space of {size} bytes begins with {header[:4].hex()}: no device there")
        self.bars = pci.size_bars(self.config)
        self._learn_irqs((IrqIndex.MSIX, IrqIndex.MSI, IrqIndex.INTX))
        if self.map_regions:
            self._map_areas()
        self.enable_intx()
        if IrqIndex.ERR in self.irqs:
            self.error_interrupt = Interrupts(self.client, IrqIndex.ERR).arm()

    def machine_reset(self) -> None:
        """Interrupts off, decoding off, DEVICE_RESET where it is offered, INTx on again, BARs to 0."""
        self.disable_interrupts()
        command = self.config.read(uapi.PCI_COMMAND, 2)
        decoding = uapi.PCI_COMMAND_IO | uapi.PCI_COMMAND_MEMORY | uapi.PCI_COMMAND_MASTER
        self.config.write(uapi.PCI_COMMAND, 2, command & ~decoding)
        if self.info.can_reset:
            self.client.reset()
        self.enable_intx()
        for bar in self.bars:
            pci.write_bar(self.config, bar, 0)

    def firmware(self) -> None:
        """Size and place the BARs, then switch decoding and bus mastering on."""
        self.bars = pci.size_bars(self.config)
        self.addresses = pci.place_bars(self.config, self.bars)

    # interrupts

    def enable_intx(self) -> Interrupts | None:
        """Arm the pin, unless the device has none."""
        if IrqIndex.INTX not in self.irqs or not self.config.read(uapi.PCI_INTERRUPT_PIN, 1):
            return None
        return self._switch(Interrupts(self.client, IrqIndex.INTX))

    def enable_msi(self, count: int = 1) -> Interrupts:
        """As a driver does: address, data and enable bit in config space; then, as QEMU does, INTx off and eventfds."""
        at = self._capability(uapi.PCI_CAP_ID_MSI)
        flags = self.config.read(at + pci.MSI_FLAGS, 2)
        self.config.write(at + 4, 4, _MSI_ADDRESS)
        if flags & pci.MSI_64BIT:
            self.config.write(at + 8, 4, 0)
        self.config.write(at + (12 if flags & pci.MSI_64BIT else 8), 2, 0x40)
        log2 = max(0, count - 1).bit_length()
        flags = flags & ~(7 << pci.MSI_QUEUE_SIZE_SHIFT) | log2 << pci.MSI_QUEUE_SIZE_SHIFT
        self.config.write(at + pci.MSI_FLAGS, 2, flags | pci.MSI_ENABLE)
        return self.arm_interrupts(IrqIndex.MSI, count)

    def enable_msix(self, count: int | None = None) -> Interrupts:
        """Enable bit in config space, INTx off, eventfds for `count` vectors (all unless said)."""
        at = self._capability(uapi.PCI_CAP_ID_MSIX)
        flags = self.config.read(at + pci.MSIX_FLAGS, 2)
        self.config.write(at + pci.MSIX_FLAGS, 2, flags | pci.MSIX_ENABLE)
        return self.arm_interrupts(IrqIndex.MSIX, self.irqs[IrqIndex.MSIX].count if count is None else count)

    def arm_interrupts(self, index: int, count: int) -> Interrupts:
        """The VMM's part of it: the index in use off, `count` vectors of `index` on."""
        self.disable_interrupts()
        return self._switch(Interrupts(self.client, index, count))

    def disable_interrupts(self) -> None:
        """Switch the index in use off."""
        if self.interrupts is not None:
            self.interrupts.disable()
            self.interrupts.close()
            self.interrupts = None

    def _switch(self, interrupts: Interrupts) -> Interrupts:
        if self.interrupts is not None:
            self.interrupts.close()
        self.interrupts = interrupts
        return interrupts.arm()

    # accesses of the guest's driver

    def read(self, region: int, offset: int, width: int) -> int:
        """A load of 1, 2, 4 or 8 bytes: from the mapping where there is one, else a REGION_READ."""
        mapped = self._mapped(region, offset, width)
        if mapped is None:
            return self.client.read(region, offset, width)
        area, at = mapped
        with memoryview(area) as whole, whole[at : at + width].cast(_CAST[width]) as word:
            return int(word[0])

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """A store of 1, 2, 4 or 8 bytes."""
        mapped = self._mapped(region, offset, width)
        if mapped is None:
            self.client.write(region, offset, width, value, posted=self._posted(region))
            return
        area, at = mapped
        with memoryview(area) as whole, whole[at : at + width].cast(_CAST[width]) as word:
            word[0] = value

    def _posted(self, region: int) -> bool:
        if not self.posted_writes or self._areas or region > RegionIndex.BAR5:
            return False
        return not any(bar.io and bar.index == region for bar in self.bars)

    def _mapped(self, region: int, offset: int, width: int) -> tuple[mmap.mmap, int] | None:
        for start, size, area in self._areas.get(region, ()):
            if start <= offset and offset + width <= start + size:
                return area, offset - start
        return None

    def _map_areas(self) -> None:
        for region in self.regions.values():
            if region.fd < 0 or not region.flags & uapi.REGION_INFO_FLAG_MMAP:
                continue
            whole: Sequence[tuple[int, int]] = [(area.offset, area.size) for area in region.areas] or [(0, region.size)]
            self._areas[region.index] = [
                (start, size, mmap.mmap(region.fd, size, offset=region.fd_offset + start)) for start, size in whole
            ]

    def _learn_irqs(self, indexes: Sequence[IrqIndex]) -> None:
        for index in indexes:
            try:
                info = self.client.get_irq_info(index)
            except ReplyError:
                continue  # QEMU takes a refusal for "not there" too
            if info.count:
                self.irqs[index] = info

    def _capability(self, capability_id: int) -> int:
        at = pci.find_capability(self.config, capability_id)
        if not at:
            raise VfuServerError(f"the device has no capability {capability_id:#x}")
        return at
