"""DMA memory of our own inside the client's address space, for the time that a stopped device needs it.

Works on the books of any C door: a hole below the device's limit is taken if there is one, else client maps step aside
and come back. It knows nothing of what the device does with the memory.
"""

import mmap
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from vfu_server.errors import HostError
from vfu_server.host_device import DmaMap, Scratch
from vfu_server.libvfio_user.door import NativeDoor
from vfu_server.uapi import DMA_FLAG_READ, DMA_FLAG_WRITE, HOST_PAGE_SIZE

FIRST_IOVA = HOST_PAGE_SIZE
"""Address 0 is left alone: too many devices take it for 'none'."""


ALL_IOVAS = ((0, (1 << 64) - 1),)


def find_place(maps: Sequence[DmaMap], size: int, limit: int, usable: Sequence[tuple[int, int]] = ()) -> int | None:
    """The lowest free iova for `size` bytes that end at or below `limit`; `maps` sorted by iova.

    `usable`: ranges that the IOMMU takes, (first, last), ascending; none given: all.
    """
    at = FIRST_IOVA
    remaining = iter(maps)
    taken = next(remaining, None)
    for first, last in usable or ALL_IOVAS:
        at = max(at, -(-first // HOST_PAGE_SIZE) * HOST_PAGE_SIZE)
        while taken is not None and taken.iova < at + size:
            at = max(at, taken.iova + taken.size)
            taken = next(remaining, None)
        if at + size <= min(limit, last + 1):
            return at
    return None


def highest_place(size: int, limit: int, usable: Sequence[tuple[int, int]] = ()) -> int | None:
    """The highest iova for `size` bytes that end at or below `limit`, whatever is mapped there."""
    for first, last in reversed(usable or ALL_IOVAS):
        at = (min(limit, last + 1) - size) // HOST_PAGE_SIZE * HOST_PAGE_SIZE
        if at >= first:
            return at
    return None


@asynccontextmanager
async def scratch_memory(
    door: NativeDoor, size: int, limit: int, usable: Sequence[tuple[int, int]] = ()
) -> AsyncIterator[Scratch]:
    """Map `size` bytes (rounded up to pages) of fresh zeroed memory for the device below `limit`, in a `usable` range.

    Raises HostError if it cannot be mapped, or if a client map that stepped aside could not be put back. Maps and
    unmaps of the client wait meanwhile.
    """
    size = -(-size // HOST_PAGE_SIZE) * HOST_PAGE_SIZE
    with door.lending():
        iova = find_place(door.dma_maps(0, min(limit, ALL_IOVAS[0][1])), size, limit, usable)
        taken = iova is None
        if iova is None:
            iova = highest_place(size, limit, usable)
        if iova is None:
            raise HostError(f"no room for {size} bytes of scratch memory below {limit:#x}")
        aside: list[DmaMap] = []
        try:
            if taken:
                await _step_aside(door, iova, size, aside)
            async with _mapped(door, iova, size) as memory:
                yield Scratch(iova, memory)
        except OSError as error:
            text = f"no scratch memory for the device at iova {iova:#x}: {error.strerror}"
            raise HostError(text, error.errno) from error
        finally:
            with trio.CancelScope(shield=True):
                await _put_back(door, aside)


@asynccontextmanager
async def _mapped(door: NativeDoor, iova: int, size: int) -> AsyncIterator[memoryview]:
    fd = os.memfd_create("vfu-scratch", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        # Unmapped when the last view of it is gone: a plugin may have kept one.
        memory = memoryview(mmap.mmap(fd, size))
        await trio.to_thread.run_sync(door.dma_map, DmaMap(iova, size, DMA_FLAG_READ | DMA_FLAG_WRITE, fd))
        try:
            yield memory
        finally:
            with trio.CancelScope(shield=True), suppress(OSError):
                await trio.to_thread.run_sync(door.dma_unmap, iova, size)
    finally:
        os.close(fd)


async def _step_aside(door: NativeDoor, iova: int, size: int, aside: list[DmaMap]) -> None:
    """Unmap what touches the range; `aside` is what has to come back, also when this fails half-way."""
    with trio.CancelScope(shield=True):
        for m in door.dma_maps(iova, size):
            aside.append(_keep(m))
            await trio.to_thread.run_sync(door.dma_unmap, m.iova, m.size)


def _keep(m: DmaMap) -> DmaMap:
    return DmaMap(m.iova, m.size, m.prot, os.dup(m.fd) if m.fd >= 0 else -1, m.fd_offset)


async def _put_back(door: NativeDoor, aside: Sequence[DmaMap]) -> None:
    failed: list[str] = []
    for m in aside:
        try:
            await trio.to_thread.run_sync(door.dma_map, m)
        except OSError as error:
            failed.append(f"{m.iova:#x}+{m.size:#x}: {error.strerror}")
        finally:
            if m.fd >= 0:
                os.close(m.fd)
    if failed:
        raise HostError(f"client memory could not be mapped again after scratch use ({'; '.join(failed)})")
