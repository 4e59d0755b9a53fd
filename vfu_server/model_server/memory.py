"""DMA of a model: the client's memory, where it is mapped here or by messages where it is not.

It must not know who asks or why; the lock that its caller holds is let go while the client is waited for.
"""

import threading
from collections.abc import Iterator
from typing import Protocol

from vfu_server.host_device import DmaMap
from vfu_server.libvfio_user.door import LocalMemory
from vfu_server.model import BusError
from vfu_server.uapi import DMA_ACCESS, DMA_FLAG_READ, DMA_FLAG_WRITE, Command

MESSAGE_SECONDS = 3.0
"""How long one message to the client may take."""
MOST_IN_A_MESSAGE = 64 << 10


class Requester(Protocol):
    """What sends a message to the client and waits for the body of its reply. OSError: refused, too late, no client."""

    def request(self, command: Command, payload: bytes, timeout: float) -> bytes: ...


class ClientMemory:
    """Reads and writes at IOVAs. BusError where there is no memory, or not for that direction, or the client fails."""

    def __init__(self, door: LocalMemory, lock: threading.Condition) -> None:
        self.door = door
        self.requester: Requester | None = None
        self.max_transfer = MOST_IN_A_MESSAGE
        self._lock = lock
        self._asking = 0
        """Messages whose answer is waited for: of its own model, and of another that shares the lock."""
        self._clients = 0

    def read(self, iova: int, length: int) -> bytes:
        """`length` bytes at `iova`."""
        try:
            if not self.door.needs_messages(iova, length):
                return self.door.load(iova, length)
            return b"".join(
                self._ask_read(at, size) if by_message else self.door.load(at, size)
                for at, size, by_message in self._parts(iova, length, DMA_FLAG_READ)
            )
        except OSError as error:
            raise BusError(f"DMA read of {length} bytes at {iova:#x}: {error.strerror}") from error

    def write(self, iova: int, data: bytes) -> None:
        """Put `data` at `iova`; what lies before the place of an error may have been written."""
        try:
            if not self.door.needs_messages(iova, len(data)):
                self.door.store(iova, data)
                return
            for at, size, by_message in self._parts(iova, len(data), DMA_FLAG_WRITE):
                part = data[at - iova : at - iova + size]
                if by_message:
                    self._ask_write(at, part)
                else:
                    self.door.store(at, part)
        except OSError as error:
            raise BusError(f"DMA write of {len(data)} bytes at {iova:#x}: {error.strerror}") from error

    def drop(self) -> None:
        """The client has gone: so have its maps. A message that it leaves unanswered is over before another comes."""
        self._clients += 1
        self.door.dma_unmap_all()
        while self._asking:
            self._lock.wait()

    def _parts(self, iova: int, length: int, prot: int) -> Iterator[tuple[int, int, bool]]:
        """`(iova, length, by message)` of the pieces of a range, each within one map."""
        end = iova + length
        client = self._clients
        for dma_map in self.door.dma_maps(iova, length):
            if dma_map.iova > iova or not dma_map.prot & prot:
                break
            until = min(end, dma_map.iova + dma_map.size)
            step = self._step(dma_map)
            for at in range(iova, until, step):
                if client != self._clients:
                    raise BusError("the client has gone")
                yield at, min(step, until - at), dma_map.fd < 0
            iova = until
        if iova < end:
            raise BusError(f"no memory for the device at {iova:#x}")

    def _step(self, dma_map: DmaMap) -> int:
        return max(1, min(self.max_transfer, MOST_IN_A_MESSAGE)) if dma_map.fd < 0 else dma_map.size

    def _ask_read(self, iova: int, length: int) -> bytes:
        reply = self._ask(Command.DMA_READ, DMA_ACCESS.pack(iova, length))
        data = reply[DMA_ACCESS.size :]
        if len(reply) < DMA_ACCESS.size or DMA_ACCESS.unpack_from(reply)[1] != length or len(data) != length:
            raise BusError(f"the client answered DMA_READ of {length} bytes with {len(data)}")
        return data

    def _ask_write(self, iova: int, data: bytes) -> None:
        self._ask(Command.DMA_WRITE, DMA_ACCESS.pack(iova, len(data)) + data)

    def _ask(self, command: Command, payload: bytes) -> bytes:
        if self.requester is None:
            raise BusError("there is no client")
        self._asking += 1
        self._lock.release()
        try:
            return self.requester.request(command, payload, MESSAGE_SECONDS)
        finally:
            self._lock.acquire()
            self._asking -= 1
            self._lock.notify_all()
