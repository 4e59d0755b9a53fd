"""`GuestMemory`: guest RAM in one memfd, laid out by IOVA, mapped with its fd or served by messages.

It knows DMA_MAP and the client's `Memory`; nothing of devices or of who migrates what.
"""

import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from vfu_server import uapi
from vfu_server.testing.client import Client


@dataclass(frozen=True, slots=True)
class Block:
    """RAM of `size` bytes at `iova`, at `offset` in the memfd. Not `shared`: the server is not given the fd."""

    iova: int
    size: int
    offset: int
    prot: int
    shared: bool

    @property
    def end(self) -> int:
        """First IOVA behind the block."""
        return self.iova + self.size


class GuestMemory:
    """Guest RAM. `read` and `write` are the guest's own accesses; `dma_read` and `dma_write` the server's by messages.

    All raise OSError EFAULT for what no block covers, the DMA ones also EPERM for what a block's `prot` forbids.
    """

    def __init__(self, name: str = "guest-memory") -> None:
        self._size = 0
        self._blocks: dict[Block, mmap.mmap] = {}
        self.fd = -1
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)

    @classmethod
    def of(cls, size: int, iova: int = 0) -> Self:
        """RAM of one block."""
        memory = cls()
        memory.add(iova, size)
        return memory

    def add(
        self, iova: int, size: int, *, prot: int = uapi.DMA_FLAG_READ | uapi.DMA_FLAG_WRITE, shared: bool = True
    ) -> Block:
        """Plug a block in, of whole pages, nowhere over another. Maps nothing into any server."""
        if iova % mmap.PAGESIZE or size % mmap.PAGESIZE or size <= 0:
            raise ValueError(f"a block needs whole pages, not {iova:#x}+{size:#x}")
        if any(iova < block.end and block.iova < iova + size for block in self._blocks):
            raise ValueError(f"{iova:#x}+{size:#x} lies over another block")
        block = Block(iova, size, self._size, prot, shared)
        os.ftruncate(self.fd, self._size + size)
        self._blocks[block] = mmap.mmap(self.fd, size, offset=block.offset)
        self._size += size
        return block

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in order of their IOVAs."""
        return tuple(sorted(self._blocks, key=lambda block: block.iova))

    def map_into(self, client: Client) -> None:
        """DMA_MAP every block."""
        for block in self.blocks:
            fd, offset = (self.fd, block.offset) if block.shared else (-1, 0)
            client.dma_map(block.iova, block.size, prot=block.prot, fd=fd, fd_offset=offset)

    def unmap_from(self, client: Client) -> None:
        """DMA_UNMAP every block."""
        for block in self.blocks:
            client.dma_unmap(block.iova, block.size)

    def read(self, iova: int, length: int) -> bytes:
        """What the guest reads."""
        return b"".join(bytes(memory[at : at + count]) for _, memory, at, count in self._pieces(iova, length))

    def write(self, iova: int, data: bytes) -> None:
        """What the guest writes: all or, where a byte is not covered, nothing."""
        done = 0
        for _, memory, at, count in list(self._pieces(iova, len(data))):
            memory[at : at + count] = data[done : done + count]
            done += count

    def dma_read(self, iova: int, length: int) -> bytes:
        """What the device reads by a message."""
        self._check(iova, length, uapi.DMA_FLAG_READ)
        return self.read(iova, length)

    def dma_write(self, iova: int, data: bytes) -> None:
        """What the device writes by a message."""
        self._check(iova, len(data), uapi.DMA_FLAG_WRITE)
        self.write(iova, data)

    def copy_to(self, other: "GuestMemory", iova: int, length: int) -> None:
        """Copy a range to the same place of another guest's memory."""
        if other is not self:
            other.write(iova, self.read(iova, length))

    def close(self) -> None:
        """Give the memory back. Idempotent; done at the latest when the object is forgotten."""
        for memory in self._blocks.values():
            memory.close()
        self._blocks.clear()
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, iova: int, length: int, prot: int) -> None:
        for block, *_ in self._pieces(iova, length):
            if not block.prot & prot:
                raise OSError(errno.EPERM, f"the guest does not allow this access at {iova:#x}")

    def _pieces(self, iova: int, length: int) -> Iterator[tuple[Block, mmap.mmap, int, int]]:
        """(block, its memory, offset in it, bytes) for each part of the range that one block covers."""
        end = iova + length
        for block in self.blocks:
            if iova < end and block.iova <= iova < block.end:
                count = min(end, block.end) - iova
                yield block, self._blocks[block], iova - block.iova, count
                iova += count
        if iova < end:
            raise OSError(errno.EFAULT, f"no guest memory at {iova:#x}")
