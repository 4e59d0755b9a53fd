"""The bounded ring through which a device's state flows between a coroutine and the pump.

Bytes are copied once, without the GIL; whoever finds the ring full or empty sleeps. It knows nothing of what the bytes
mean.
"""

import errno
from collections import deque

import trio

from vfu_server.errors import MigrationError
from vfu_server.libvfio_user.native import ffi, lib

LEND = 64 << 10
"""Pieces of at least so many bytes are not copied but lent: they are kept here until the client has them."""
NO_FAULTS = frozenset({0, errno.EAGAIN, errno.ENOMSG, errno.ENODATA})
"""What the ring's calls say by errno when nothing has failed."""


class Ring:
    """Migration data of one device: `send` while it is saved, `receive` while it is loaded.

    `open_save`, `open_load` and `close` may be called only from the handler of the message that asks for it, or without
    a client.
    """

    def __init__(self, device: object) -> None:
        self._device = device
        self._fd = int(lib.vs_device_ring_fd(device))
        self._pieces = ffi.new("struct vs_piece[]", lib.VS_RING_PIECES)
        self._nr = ffi.new("size_t *")
        self._lent: deque[tuple[int, bytes]] = deque()
        """What the pump may still send from, with the place in the stream behind it."""

    def open_save(self, *, pre_copy: bool) -> None:
        """Begin a save: what `send` gives, the client reads. In pre-copy an empty ring is answered at once (ENOMSG)."""
        self._open(lib.VS_RING_SAVE, pre_copy)

    def open_load(self, *, judged: bool = False) -> None:
        """Begin a load: what the client writes, `receive` gives. `judged`: a small write is answered when it was taken
        (`consume`), or with the errno of `fail`; else as soon as it is inside.
        """
        self._open(lib.VS_RING_LOAD, judged)

    def close(self) -> None:
        """End the session; what is still inside is dropped, and the buffer given back."""
        self._open(lib.VS_RING_CLOSED)

    def _open(self, mode: int, option: bool = False) -> None:
        result = lib.vs_device_ring_open(self._device, mode, option)
        self._lent.clear()  # nobody sends from it any more
        self._check(result)

    def more_to_come(self) -> None:
        """From now on a reader of the empty ring waits."""
        lib.vs_device_ring_nowait(self._device, False)

    def nothing_for_now(self) -> None:
        """From now on a reader of the empty ring is told ENOMSG at once; so is one that waits."""
        lib.vs_device_ring_nowait(self._device, True)

    def excuse_reader(self) -> None:
        """Tell ENOMSG to the reader that waits, or to the next that would; those behind it wait again."""
        lib.vs_device_ring_excuse(self._device)

    def finish(self) -> None:
        """This was all: a reader gets 0 bytes behind it, a receiver None."""
        lib.vs_device_ring_eof(self._device)

    def fail(self, error: int) -> None:
        """Answer the client's further reads or writes with errno `error`; with EIO where that has a meaning of its own
        here: a client that is told to wait would wait for ever.
        """
        lib.vs_device_ring_error(self._device, errno.EIO if error in NO_FAULTS else error)

    @property
    def wanted(self) -> bool:
        """A client's read waits for bytes that are not there."""
        return bool(lib.vs_device_ring_wanted(self._device))

    @property
    def used(self) -> int:
        """Bytes that are inside."""
        return int(lib.vs_device_ring_used(self._device))

    @property
    def total(self) -> int:
        """Bytes that went in since the session was opened."""
        return int(lib.vs_device_ring_total(self._device))

    async def send_some(self, data: memoryview) -> int:
        """Put as much of `data` as there is room for, waiting for some; returns the bytes put.

        Raises MigrationError if the session is over. Cancelled: nothing was put. What lies in bytes, which nobody can
        change, is lent if it is much.
        """
        owner = data.obj
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()
            if len(data) >= LEND and isinstance(owner, bytes) and data.contiguous:
                n = self._write(data, lend=True)
                if n:
                    self._keep(owner)
            else:
                n = self._write(data, lend=False)
            if n or not len(data):
                return n
            await self._wait()

    def _write(self, data: memoryview, *, lend: bool) -> int:
        with ffi.from_buffer(data) as buffer:
            return self._check(int(lib.vs_device_ring_write(self._device, buffer, len(data), lend)))

    def _keep(self, owner: bytes) -> None:
        """`owner` was lent; what the client has by now need not be kept."""
        total = self.total
        self._lent.append((total, owner))
        gone = total - self.used
        while self._lent and self._lent[0][0] <= gone:
            self._lent.popleft()

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Put all of `data`, waiting for room. MigrationError if the session is over."""
        view = memoryview(data).cast("B")
        while view:
            view = view[await self.send_some(view) :]

    async def look(self, size: int = 1 << 20, least: int = 1) -> list[memoryview] | None:
        """Up to `size` bytes that came in, where they lie, in a few pieces; None when this was all.

        Waits until `least` are there or no more will come.

        To be released, and then given back with `consume`, before the next look or the session's end: the memory is the
        ring's. Raises MigrationError if the session is over.
        """
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()
            n = int(lib.vs_device_ring_look(self._device, least, size, self._pieces, self._nr))
            if n == -errno.ENODATA:
                return None
            if self._check(n) > 0:
                found = (self._pieces[i] for i in range(self._nr[0]))
                return [memoryview(ffi.buffer(piece.data, piece.len)) for piece in found]
            await self._wait()

    def consume(self, size: int) -> None:
        """Done with the first `size` bytes: there is room for others."""
        lib.vs_device_ring_consume(self._device, size)

    async def receive(self, size: int = 1 << 20) -> bytes | None:
        """As `look`, and taken out."""
        views = await self.look(size)
        if views is None:
            return None
        data = b"".join(views)
        self.consume(len(data))
        return data

    async def _wait(self) -> None:
        await trio.lowlevel.wait_readable(self._fd)
        lib.vs_drain_fd(self._fd)

    @staticmethod
    def _check(result: int) -> int:
        if result < 0:
            raise MigrationError("the migration data session is over", -result)
        return result
