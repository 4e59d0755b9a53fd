"""The C doors as Python sees them: books of the client's DMA maps, and the memory behind them.

`LocalMemory` is a model's: it has no device, only the client's memory. Its copies survive a client that cuts its file
short.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from vfu_server.host_device import DmaMap
from vfu_server.libvfio_user.native import check, ffi, lib

MAX_DMA_MAPS = 65535
"""What vfio-user clients may assume (max_dma_maps), and the kernel's default limit for a type1 container."""


WIDE = 16
"""Bytes of a wide write."""


@dataclass(frozen=True, slots=True)
class DoorNumbers:
    """Counters of a door."""

    dma_maps: int
    dma_bytes: int
    requests: int
    errors: int


class NativeDoor:
    """A C door. `pointer` is what a Context is given; it lives until `close`."""

    def __init__(self, pointer: Any) -> None:
        self.pointer = pointer
        self.settled = trio.Event()
        """No memory of the server's is lent to the device: the client's maps and unmaps can be done."""
        self.settled.set()
        self._lent = 0
        self._closed = False

    @property
    def gone(self) -> bool:
        """The device behind it will not come back."""
        return bool(lib.vs_door_gone(self.pointer))

    def dma_map(self, dma_map: DmaMap) -> None:
        """Enter a map and make it reachable for the device; the fd is duplicated. OSError: the errno for the reply."""
        fd = os.dup(dma_map.fd) if dma_map.fd >= 0 else -1
        result = lib.vs_door_dma_map(self.pointer, dma_map.iova, dma_map.size, dma_map.prot, fd, dma_map.fd_offset)
        if result < 0 and fd >= 0:
            os.close(fd)
        check(result)

    def dma_unmap(self, iova: int, size: int) -> int:
        """Remove every map inside the range; returns the bytes unmapped. OSError EINVAL if one would be cut: then none
        is.
        """
        unmapped = ffi.new("uint64_t *")
        check(lib.vs_door_dma_unmap(self.pointer, iova, size, unmapped))
        return int(unmapped[0])

    def dma_unmap_all(self) -> None:
        """Remove all maps."""
        check(lib.vs_door_dma_unmap_all(self.pointer))

    @contextmanager
    def lending(self) -> Iterator[None]:
        """For the time of the `with` the client's maps and unmaps come up as messages, which wait for `settled`."""
        if not self._lent:
            self.settled = trio.Event()
        self._lent += 1
        lib.vs_door_lend(self.pointer, 1)
        try:
            yield
        finally:
            lib.vs_door_lend(self.pointer, -1)
            self._lent -= 1
            if not self._lent:
                self.settled.set()

    def dma_maps(self, iova: int = 0, size: int = (1 << 64) - 1) -> list[DmaMap]:
        """The maps that touch the range, by iova. Their fds stay the door's: use them before the next unmap, or
        duplicate them.
        """
        room = 64
        while True:
            maps = ffi.new("struct vs_map[]", room)
            n = int(lib.vs_door_dma_list(self.pointer, iova, size, maps, room))
            if n <= room:
                return [DmaMap(m.iova, m.size, m.prot, m.fd, m.fd_offset) for m in maps[0:n]]
            room = n

    def read(self, region: int, offset: int, length: int) -> bytes:
        """Read of a region, in one access as far as the door can. Blocks without the GIL, for some seconds at worst."""
        buffer = ffi.new("uint8_t[]", length)
        check(lib.vs_door_access(self.pointer, region, offset, buffer, length, False))
        return bytes(ffi.buffer(buffer, length))

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write to a region, in one access as far as the door can."""
        buffer = ffi.new("uint8_t[]", data)
        check(lib.vs_door_access(self.pointer, region, offset, buffer, len(data), True))

    def write_wide(self, region: int, offset: int, data: bytes) -> None:
        """Write 16 bytes, aligned, in one access. OSError ENOTSUP: this door or this processor cannot."""
        if len(data) != WIDE:
            raise ValueError(f"{len(data)} bytes are no wide write")
        check(lib.vs_door_wide(self.pointer, region, offset, data))

    def numbers(self) -> DoorNumbers:
        """Counters since it was opened."""
        numbers = ffi.new("uint64_t[4]")
        lib.vs_door_numbers(self.pointer, numbers)
        return DoorNumbers(*(int(n) for n in numbers))

    def close(self) -> None:
        """Unmap everything and free it. No Context may use it any more."""
        if not self._closed:
            self._closed = True
            lib.vs_door_close(self.pointer)


class LocalMemory(NativeDoor):
    """The client's memory for a model's DMA."""

    def __init__(self, max_maps: int = MAX_DMA_MAPS) -> None:
        pointer = lib.vs_local_open(max_maps)
        if pointer == ffi.NULL:
            raise MemoryError
        super().__init__(pointer)

    def load(self, iova: int, length: int) -> bytes:
        """`length` bytes at `iova`. OSError: EFAULT (unmapped, or the file was cut), EACCES (not readable), EREMOTE (by
        messages).
        """
        buffer = ffi.new("uint8_t[]", max(length, 1))
        done = ffi.new("size_t *")
        check(lib.vs_local_copy(self.pointer, iova, buffer, length, False, done))
        return bytes(ffi.buffer(buffer, length))

    def store(self, iova: int, data: bytes) -> None:
        """Write `data` at `iova`; errors as `load`, EACCES: not writeable. What lies before the failing byte may be
        written.
        """
        done = ffi.new("size_t *")
        with ffi.from_buffer(data) as buffer:
            check(lib.vs_local_copy(self.pointer, iova, ffi.cast("void *", buffer), len(data), True, done))

    def needs_messages(self, iova: int, length: int) -> bool:
        """Whether any byte of the range lies in a map without fd, so that DMA must go by messages."""
        return any(m.fd < 0 for m in self.dma_maps(iova, length)) if length else False
