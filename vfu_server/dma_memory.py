"""Memory of a plugin's own in a companion's DMA space (`DmaMemory`): made, given an iova, mapped for the device.

For functions without a guest only: it takes every address to be its own. It must not know which door or IOMMU is
behind the host.
"""

import bisect
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from vfu_server.errors import DeviceGoneError, HostError, PluginError
from vfu_server.host_device import DmaMap, HostDevice
from vfu_server.uapi import DMA_FLAG_READ, DMA_FLAG_WRITE, HOST_PAGE_SIZE

FIRST_IOVA = HOST_PAGE_SIZE
"""Address 0 is left alone: too many devices take it for 'none'."""
ALL_IOVAS = ((0, (1 << 64) - 1),)


@dataclass(frozen=True, slots=True, eq=False)
class DmaBuffer:
    """`size` bytes that the device reads and writes at `iova`, and we as `memory`; both are whole pages at least as
    long as asked for. Unmapped from this process when the last view of `memory` is gone.
    """

    iova: int
    size: int
    memory: memoryview = field(repr=False)


class DmaMemory:
    """Buffers of one host. For one trio task or several; what two of them ask for at once does not overlap."""

    def __init__(self, host: HostDevice) -> None:
        self._host = host
        self._taken: list[tuple[int, int]] = []
        """(iova, size), ascending: what is mapped, or about to be."""
        self._going: set[tuple[int, int]] = set()
        """Of these, what is being unmapped."""

    async def allocate(self, size: int, alignment: int = HOST_PAGE_SIZE, limit: int = 1 << 64) -> DmaBuffer:
        """Zeroed memory at one contiguous range of iovas, rounded up to whole pages.

        `alignment`: a power of two, of its iova. It ends at or below `limit`, lies where the IOMMU takes addresses, and
        never at 0. Each buffer is one map and one file: cut many small things from one. HostError ENOSPC: no room;
        ENOMEM and others: the door's refusal. Raised or cancelled: nothing is left.
        """
        if size <= 0 or alignment <= 0 or alignment & (alignment - 1):
            raise PluginError(f"DMA memory of {size} bytes, aligned to {alignment}, cannot be meant")
        size = -(-size // HOST_PAGE_SIZE) * HOST_PAGE_SIZE
        iova = self._place(size, max(alignment, HOST_PAGE_SIZE), limit)
        bisect.insort(self._taken, (iova, size))
        try:
            return DmaBuffer(iova, size, await self._map(iova, size))
        except BaseException:
            self._taken.remove((iova, size))
            raise

    async def free(self, buffer: DmaBuffer) -> None:
        """Take `buffer` from the device, which must not use it any more. PluginError: it is none of these, or was freed
        before. A device that is gone has lost it already. Raised or cancelled: it is mapped still.
        """
        place = (buffer.iova, buffer.size)
        if place not in self._taken or place in self._going:
            raise PluginError(f"{self._host.name}: no DMA memory of {buffer.size} bytes at {buffer.iova:#x} to free")
        self._going.add(place)
        try:
            with suppress(DeviceGoneError):
                await self._host.dma_unmap(buffer.iova, buffer.size)
            self._taken.remove(place)  # only now: until it is unmapped nobody else may be given the place
        finally:
            self._going.discard(place)

    async def _map(self, iova: int, size: int) -> memoryview:
        try:
            fd = os.memfd_create("vfu-dma", os.MFD_CLOEXEC)
            try:
                os.ftruncate(fd, size)
                memory = memoryview(mmap.mmap(fd, size))
                await self._host.dma_map(DmaMap(iova, size, DMA_FLAG_READ | DMA_FLAG_WRITE, fd))
            finally:
                os.close(fd)
        except OSError as error:
            text = f"{self._host.name}: {size} bytes of DMA memory: {error.strerror}"
            raise HostError(text, error.errno) from error
        return memory

    def _place(self, size: int, alignment: int, limit: int) -> int:
        """The lowest free iova."""
        for first, end in self._holes():
            iova = -(-max(first, FIRST_IOVA) // alignment) * alignment
            if iova + size <= min(end, limit):
                return iova
        raise HostError(f"{self._host.name}: no room for {size} bytes of DMA memory below {limit:#x}", errno.ENOSPC)

    def _holes(self) -> Iterator[tuple[int, int]]:
        """(first, end) of all that is usable and not taken, ascending."""
        for first, last in self._host.iova_ranges or ALL_IOVAS:
            at = first
            for iova, size in self._taken:
                if first <= iova <= last:
                    yield at, iova
                    at = iova + size
            yield at, last + 1
