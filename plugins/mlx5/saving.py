"""One save session of a virtual function: images come from the firmware beside the session and leave as records.

It knows the order of QUERY and SAVE, not the states of the client: `driven` says when the device runs and when it is
stopped. Memory is bounded: two buffers, of which one is filled while the other is given. Source: Linux' mlx5-vfio-pci
(main.c, cmd.c).
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import trio

from plugins.mlx5 import records
from plugins.mlx5.buffers import MAX_IMAGE, StateBuffer, alloc_pd, dealloc_pd, released
from plugins.mlx5.status import BAD_RESOURCE_STATE, CommandError, CommandTimeoutError, PfDeadError
from plugins.mlx5.vhca import STATE_INIT, Query, Saved, Vhca
from vfu_server.device import PrecopyInfo, Section, Sink
from vfu_server.dma_memory import DmaMemory
from vfu_server.errors import HostError, VfuServerError
from vfu_server.kernel_migration import CHUNK, SECTION_VERSION, TAG

log = logging.getLogger(__name__)

CHUNK_BUFFER: Final = 8 << 20
"""What a buffer for chunks has at least, unless the whole state is smaller."""
MIN_BUFFER: Final = 4096


Beside = Callable[..., None]
"""Starts a coroutine function with arguments. PfDeadError: the physical function's driver has ended."""


class _Record:
    """Bytes that are to be given: a head, and `length` bytes of a buffer."""

    def __init__(self, head: bytes, buffer: StateBuffer | None = None, length: int = 0, *, first: bool = False) -> None:
        self._head = head
        self.buffer = buffer
        self._length = length
        self.first = first
        """It belongs to the first pass."""
        self._given = 0

    @property
    def left(self) -> int:
        return len(self._head) + self._length - self._given

    def peek(self, most: int) -> bytes:
        """The next bytes, which stay until `give`."""
        head = self._head[self._given : self._given + most]
        room = most - len(head)
        if self.buffer is None or not room:
            return head
        at = max(0, self._given - len(self._head))
        return head + self.buffer.read(at, min(room, self._length - at))

    def give(self, count: int) -> None:
        self._given += count


class _Job:
    """A SAVE under way."""

    def __init__(self, buffer: StateBuffer, *, incremental: bool, track: bool, first: bool) -> None:
        self.buffer = buffer
        self.incremental = incremental
        self.track = track
        self.first = first
        self.done = trio.Event()
        self.saved: Saved | None = None
        self.error: VfuServerError | None = None


class SaveSession:
    """One session. `beside`: starts a task that outlives it; so a SAVE goes on when the session's task is cancelled."""

    def __init__(self, vhca: Vhca, memory: DmaMemory, beside: Beside) -> None:
        self._vhca = vhca
        self._memory = memory
        self._beside = beside
        self._pd: int | None = None
        self._free: list[StateBuffer] = []
        self._all: list[StateBuffer] = []
        self._records: deque[_Record] = deque()
        self._job: _Job | None = None
        self._expected = 0
        """Bytes of the first image, as the firmware has said."""
        self._lock = trio.Lock()
        """Around QUERY and the start of the SAVE that follows it."""
        self._tracking = False
        self._early_failed = False
        self._first_again = False
        self._began_running = False
        self._final = False
        """What is saved when the device is stopped has begun."""
        self.images = 0
        self.bytes = 0

    # begin and end

    async def begin(self, *, running: bool) -> None:
        """Get memory ready and, for a device that runs, have the first image written. Raises: nothing is left."""
        self._began_running = running
        try:
            self._pd = await alloc_pd(self._vhca.queue)
            query = await self._vhca.query(incremental=False)
            size = self._buffer_size(query, spare=running)
            for _ in range(2):
                await self._new_buffer(size)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._release()
            raise
        self._expected = min(query.required, size)
        self._records.append(_Record(records.stop_copy_size(size), first=True))
        if running:
            self._tracking = True
            self._start(self._free.pop(), incremental=False, track=True, first=True)

    def _buffer_size(self, query: Query, *, spare: bool) -> int:
        if self._vhca.chunks:
            wanted = max(query.required, min(CHUNK_BUFFER, query.remaining))
        else:
            wanted = query.required + (query.required // 10 if spare else 0)
        wanted = max(MIN_BUFFER, -(-wanted // 4096) * 4096)
        if query.required > MAX_IMAGE:
            raise HostError(f"{self._vhca.queue.name}: an image of {query.required} bytes cannot be carried")
        return min(wanted, MAX_IMAGE)

    async def settle(self) -> None:
        """Wait until no SAVE is under way: nothing else may be asked of the function meanwhile."""
        while self._job is not None and not self._job.done.is_set():
            await self._job.done.wait()

    def end(self, *, running: bool) -> trio.Event:
        """Give the session up or close it, beside; the event says that all is released. `running`: its responder does,
        so that tracking has to be turned off; a function that is stopped stops tracking with its next save.
        """
        ended = trio.Event()
        try:
            self._beside(self._end, ended, running)
        except PfDeadError:
            ended.set()  # the memory went with the function's driver
        return ended

    async def _end(self, ended: trio.Event, running: bool) -> None:
        try:
            await self.settle()
            self._finish_at_last()
            if self._tracking and running:
                async with self._lock:
                    await self._stop_tracking()
        except VfuServerError as error:
            log.info("%s: ending a save: %s", self._vhca.queue.name, error)
        finally:
            with trio.CancelScope(shield=True):
                await self._release()
            ended.set()

    def _finish_at_last(self) -> None:
        """Nobody has waited for the last SAVE; it may have turned tracking off."""
        if self._job is not None:
            try:
                self._finish(self._job)
            except VfuServerError as error:
                log.info("%s: a save that was given up: %s", self._vhca.queue.name, error)

    async def _stop_tracking(self) -> None:
        """A full SAVE without tracking, thrown away, is what turns it off."""
        self._tracking = False
        self._throw_away()
        query = await self._vhca.query(incremental=True)
        buffer = await self._buffer(query.required)
        await self._vhca.save(buffer, incremental=False, track=False)

    def _throw_away(self) -> None:
        for record in self._records:
            if record.buffer is not None and record.buffer not in self._free:
                self._free.append(record.buffer)
        self._records.clear()

    async def _release(self) -> None:
        self._records.clear()
        queue = self._vhca.queue
        for buffer in self._all:
            await buffer.free(queue)
        if self._pd is not None:
            await released(dealloc_pd(queue, self._pd), queue.name)
        self._all, self._free, self._pd = [], [], None

    async def _new_buffer(self, size: int) -> StateBuffer:
        assert self._pd is not None
        buffer = StateBuffer(self._memory, size)
        self._all.append(buffer)
        await buffer.grow(size)
        await buffer.register(self._vhca.queue, self._pd)
        self._free.append(buffer)
        return buffer

    async def _buffer(self, size: int) -> StateBuffer:
        """A free buffer into which `size` bytes fit: a new one in the place of one that is too small."""
        if size > MAX_IMAGE:
            raise HostError(f"{self._vhca.queue.name}: an image of {size} bytes cannot be carried")
        if self._free:
            buffer = self._free.pop()
            if size <= buffer.capacity:
                return buffer
            self._all.remove(buffer)
            await buffer.free(self._vhca.queue)
        await self._new_buffer(max(MIN_BUFFER, -(-size // 4096) * 4096))
        return self._free.pop()

    # SAVEs

    def _start(self, buffer: StateBuffer, *, incremental: bool, track: bool, first: bool = False) -> None:
        job = _Job(buffer, incremental=incremental, track=track, first=first)
        self._beside(self._run, job)
        self._job = job

    async def _run(self, job: _Job) -> None:
        try:
            job.saved = await self._vhca.save(job.buffer, incremental=job.incremental, track=job.track)
            if job.saved.size > job.buffer.capacity:
                raise HostError(f"an image of {job.saved.size} bytes in a buffer of {job.buffer.capacity}")
        except VfuServerError as error:
            job.error = error
        finally:
            job.done.set()

    def _finish(self, job: _Job) -> int:
        """Take the result in; returns what the next image of the same save needs. Raises what went wrong."""
        self._job = None
        if isinstance(job.error, CommandTimeoutError):
            self._all.remove(job.buffer)  # never freed: the device may write it whenever it likes
            raise job.error
        if job.error is not None:
            self._free.append(job.buffer)
            refused = isinstance(job.error, CommandError) and job.error.status == BAD_RESOURCE_STATE
            if refused and job.track:
                log.warning("%s; all will be saved again once the device is stopped", job.error)
                self._early_failed, self._tracking = True, False
                return 0
            raise job.error
        if job.saved is None:
            raise PfDeadError(f"{self._vhca.queue.name}: its driver here has ended")
        size = job.saved.size
        self.images += 1
        self.bytes += size
        if size:
            self._records.append(_Record(records.image_header(size), job.buffer, size, first=job.first))
        else:
            self._free.append(job.buffer)
        if not job.track:
            self._tracking = False
        return job.saved.following if not job.track else 0

    # what the device may give while it runs

    async def info(self, *, running: bool) -> PrecopyInfo:
        """How much could be given now. `running` False: its initiator is stopped, so it is not asked."""
        first = sum(record.left for record in self._records if record.first)
        dirty = sum(record.left for record in self._records if not record.first)
        if self._job is not None:
            if self._job.first:
                first += records.HEADER.size + self._expected
            return PrecopyInfo(first, dirty)
        if not running or self._early_failed or self._final or self._lock.locked():
            return PrecopyInfo(first, dirty)
        async with self._lock:
            query = await self._vhca.query(incremental=True)
        more = query.size + records.HEADER.size if query.size else 0
        if query.state == STATE_INIT and more:
            reinit, self._first_again = not self._first_again, True
            return PrecopyInfo(first + dirty + more, 0, reinit)
        return PrecopyInfo(first, dirty + more)

    async def give_early(self, sink: Sink) -> None:
        """What is there; if nothing is, what has changed since."""
        if self._job is not None:
            await self._job.done.wait()
            self._finish(self._job)
        if not self._records and not self._early_failed and await self._start_increment():
            assert self._job is not None
            await self._job.done.wait()
            self._finish(self._job)
        await self._send_all(sink)

    async def _start_increment(self) -> bool:
        """Whether there was anything."""
        async with self._lock:
            query = await self._vhca.query(incremental=True)
            if not query.size:
                return False
            with trio.CancelScope(shield=True):  # buffers change hands
                buffer = await self._buffer(query.required)
            first, self._first_again = self._first_again or query.state == STATE_INIT, False
            self._start(buffer, incremental=True, track=True, first=first)
            return True

    # the rest

    async def give_rest(self, sink: Sink) -> None:
        """All that is still to be given, the device stopped: an image, or as many chunks as there are."""
        if self._job is not None:
            await self._job.done.wait()
            self._finish(self._job)
        if not self._free:
            await self._send_all(sink)
        self._final = True
        incremental = self._began_running and not self._early_failed
        async with self._lock:
            query = await self._vhca.query(incremental=incremental)
            await self._start_final(query.required, incremental=incremental)
        while self._job is not None or self._records:
            await self._send_all(sink)
            if self._job is not None:
                await self._job.done.wait()
                following = self._finish(self._job)
                if following:
                    await self._start_final(following, incremental=True)

    async def _start_final(self, size: int, *, incremental: bool) -> None:
        with trio.CancelScope(shield=True):
            buffer = await self._buffer(size)
        self._start(buffer, incremental=incremental, track=False)

    async def _send_all(self, sink: Sink) -> None:
        for data in self._pieces():
            await sink.send(Section(TAG, SECTION_VERSION, data))
            self._gave(len(data))

    def _pieces(self) -> Iterator[bytes]:
        """The next bytes of the stream, again and again, until there are none."""
        while self._records:
            yield self._records[0].peek(CHUNK)

    def _gave(self, count: int) -> None:
        record = self._records[0]
        record.give(count)
        if not record.left:
            self._records.popleft()
            if record.buffer is not None:
                self._free.append(record.buffer)
