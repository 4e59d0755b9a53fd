"""Memory that an image of a function's state goes through: pages in the physical function's DMA space under an mkey.

It knows protection domains and mkeys, not what is saved or when. Whoever frees must know that no command uses the
memory any more. Source: Linux' mlx5-vfio-pci (cmd.c) and rdma-core (mlx5_vfio.c).
"""

import logging
from collections.abc import Awaitable
from typing import Final

from plugins.mlx5.commands import Commands
from plugins.mlx5.layouts import ALLOC_PD, CREATE_MKEY, DEALLOC_PD, DESTROY_MKEY
from vfu_server.dma_memory import DmaBuffer, DmaMemory
from vfu_server.errors import HostError, VfuServerError

log = logging.getLogger(__name__)

MAX_IMAGE: Final = (1 << 32) - 4096
"""Sizes are 32 bits: no image is larger."""
PAGE_SHIFT: Final = 12
LARGE_SHIFT: Final = 21
LARGE: Final = 1 << LARGE_SHIFT
"""Larger buffers are made of pieces of whole 2 MiB: an mkey over 4 GiB then names 2048 of them."""
LARGEST_PIECE: Final = 64 << 20
_MTT: Final = 1


async def alloc_pd(queue: Commands) -> int:
    """A protection domain."""
    return (await queue.call(ALLOC_PD))["pd"]


async def dealloc_pd(queue: Commands, pd: int) -> None:
    """It is not used any more."""
    await queue.call(DEALLOC_PD, pd=pd)


async def released(step: Awaitable[object], name: str) -> None:
    """Do a step of giving back, whose failure nobody can do anything about: it is logged."""
    try:
        await step
    except VfuServerError as error:
        log.debug("%s: giving back: %s", name, error)


class StateBuffer:
    """Up to `limit` bytes, which come as they are needed. `mkey`: 0 until `register`."""

    def __init__(self, memory: DmaMemory, limit: int) -> None:
        if not 0 < limit <= MAX_IMAGE:
            raise HostError(f"an image of {limit} bytes: none is larger than {MAX_IMAGE}")
        self._memory = memory
        self._pieces: list[DmaBuffer] = []
        self._starts: list[int] = []
        self.shift = LARGE_SHIFT if limit > LARGE else PAGE_SHIFT
        page = 1 << self.shift
        self.limit = min(-(-limit // page) * page, MAX_IMAGE)
        self.capacity = 0
        self.mkey = 0

    async def grow(self, size: int) -> None:
        """Have room for `size` bytes at least; what is there stays. HostError: there is no memory."""
        if size > self.limit:
            raise HostError(f"{size} bytes do not fit a buffer of {self.limit}")
        page = 1 << self.shift
        while self.capacity < size:
            wanted = min(max(self.capacity, size - self.capacity), LARGEST_PIECE)
            if self.shift == PAGE_SHIFT:
                wanted = self.limit
            length = -(-min(wanted, self.limit - self.capacity) // page) * page
            piece = await self._memory.allocate(length, page)
            self._starts.append(self.capacity)
            self._pieces.append(piece)
            self.capacity += length

    @property
    def entries(self) -> list[int]:
        """The IOVA of each page, in order."""
        step = 1 << self.shift
        return [at for piece in self._pieces for at in range(piece.iova, piece.iova + piece.size, step)]

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the image."""
        parts = []
        for piece, start, first, last in self._spans(offset, length):
            parts.append(piece.memory[first - start : last - start])
        return b"".join(parts)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put `data`; there must be room."""
        if offset + len(data) > self.capacity:
            raise HostError(f"bytes up to {offset + len(data)} do not fit {self.capacity}")
        for piece, start, first, last in self._spans(offset, len(data)):
            piece.memory[first - start : last - start] = data[first - offset : last - offset]

    def _spans(self, offset: int, length: int) -> list[tuple[DmaBuffer, int, int, int]]:
        found = []
        for piece, start in zip(self._pieces, self._starts, strict=True):
            first, last = max(offset, start), min(offset + length, start + piece.size)
            if first < last:
                found.append((piece, start, first, last))
        return found

    async def register(self, queue: Commands, pd: int) -> None:
        """Make an mkey over all of it, addresses in it being offsets."""
        entries = self.entries
        octwords = -(-len(entries) // 2)
        tail = b"".join(entry.to_bytes(8, "big") for entry in entries) + bytes(8 * (len(entries) % 2))
        answer = await queue.call(
            CREATE_MKEY,
            tail=tail,
            access_mode_1_0=_MTT,
            rw=1,
            rr=1,
            lw=1,
            lr=1,
            qpn=0xFFFFFF,
            pd=pd,
            len=self.capacity,
            translations_octword_size=octwords,
            translations_octword_actual_size=octwords,
            log_page_size=self.shift,
        )
        self.mkey = answer["mkey_index"] << 8

    async def free(self, queue: Commands) -> None:
        """Destroy the mkey and give the memory back, as far as that is possible; what is not is logged."""
        if self.mkey:
            mkey, self.mkey = self.mkey, 0
            await released(queue.call(DESTROY_MKEY, mkey_index=mkey >> 8), queue.name)
        pieces, self._pieces, self._starts, self.capacity = self._pieces, [], [], 0
        for piece in pieces:
            await released(self._memory.free(piece), queue.name)
