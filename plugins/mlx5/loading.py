"""One load session of a virtual function: records come in, images go to the firmware one after the other, beside.

It knows the order of records and LOADs, not the states of the client. Memory is bounded: it grows with what has really
come in, and what waits for the firmware is limited. Source: Linux' mlx5-vfio-pci (main.c).
"""

from typing import Final

import trio

from plugins.mlx5 import records
from plugins.mlx5.buffers import MAX_IMAGE, StateBuffer, alloc_pd, dealloc_pd, released
from plugins.mlx5.records import Begin, Piece, RecordReader
from plugins.mlx5.saving import Beside
from plugins.mlx5.vhca import Vhca
from vfu_server.dma_memory import DmaMemory
from vfu_server.errors import RestoreError, StreamFormatError, VfuServerError

MAX_WAITING: Final = 256 << 20
"""Bytes of complete images that may wait for the firmware; one always may."""


class LoadSession:
    """One session. `beside`: starts a task that outlives it; so a LOAD goes on when the session is given up."""

    def __init__(self, vhca: Vhca, memory: DmaMemory, beside: Beside) -> None:
        self._vhca = vhca
        self._memory = memory
        self._reader = RecordReader()
        self._pd: int | None = None
        self._image: StateBuffer | None = None
        self._at = 0
        self._waiting: list[tuple[StateBuffer, int]] = []
        self._changed = trio.Event()
        self._error: VfuServerError | None = None
        self._given_up = False
        self.loaded = 0
        self.ended = trio.Event()
        """The memory is released."""
        self._beside = beside

    async def begin(self) -> None:
        """Get ready. HostError."""
        self._pd = await alloc_pd(self._vhca.queue)
        self._beside(self._work)

    async def take(self, data: bytes) -> None:
        """The stream's next bytes. StreamFormatError, HostError: what the firmware says of an earlier image."""
        for part in self._reader.push(data):
            if isinstance(part, Begin):
                if part.tag == records.TAG_IMAGE:
                    if part.size > MAX_IMAGE:
                        raise StreamFormatError(f"an image of {part.size} bytes: none is larger than {MAX_IMAGE}")
                    self._image, self._at = StateBuffer(self._memory, part.size), 0
            elif isinstance(part, Piece):
                if self._image is not None:
                    await self._image.grow(self._at + len(part.data))
                    self._image.write(self._at, part.data)
                    self._at += len(part.data)
            elif self._image is not None:
                await self._wait_for_room()
                self._waiting.append((self._image, self._at))
                self._image = None
                self._wake()
        self._check()

    async def finish(self) -> None:
        """Wait until the firmware has taken everything. StreamFormatError, RestoreError."""
        self._reader.finish()
        while self._waiting and self._error is None:
            await self._changed.wait()
        if self._error is not None:
            raise RestoreError(f"{self._error} (behind {self.loaded} images)", self._error.errno) from self._error
        await self.give_up()

    async def give_up(self) -> None:
        """End it, at the latest when the LOAD under way has ended; waits for that."""
        self._given_up = True
        self._wake()
        await self.ended.wait()

    def leave(self) -> None:
        """As `give_up`, without waiting."""
        self._given_up = True
        self._wake()

    async def _wait_for_room(self) -> None:
        while self._error is None and self._waiting and sum(size for _, size in self._waiting) > MAX_WAITING:
            await self._changed.wait()
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _work(self) -> None:
        """The task that loads."""
        try:
            while not self._given_up and self._error is None:
                if self._waiting:
                    await self._load(*self._waiting[0])
                    self._wake()
                else:
                    await self._changed.wait()
        finally:
            with trio.CancelScope(shield=True):
                await self._release()
            self.ended.set()

    async def _load(self, image: StateBuffer, size: int) -> None:
        assert self._pd is not None
        try:
            await image.register(self._vhca.queue, self._pd)
            await self._vhca.load(image, size)
            await image.free(self._vhca.queue)
            self.loaded += 1
            self._waiting.pop(0)
        except VfuServerError as error:
            self._error = error

    async def _release(self) -> None:
        images = [image for image, _ in self._waiting] + ([self._image] if self._image is not None else [])
        self._waiting, self._image = [], None
        queue = self._vhca.queue
        for image in images:
            await image.free(queue)
        if self._pd is not None:
            pd, self._pd = self._pd, None
            await released(dealloc_pd(queue, pd), queue.name)
