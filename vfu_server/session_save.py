"""A save session: the plugin's coroutine beside the session, its sections summed and sent into the ring.

It must not know states or messages: the migration task says when a save begins, turns from pre-copy to stop-copy, and
ends.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial

import trio

from vfu_server.device import Device, PrecopyInfo, SavePhase, Section
from vfu_server.errors import DeadlineError, MigrationError, PluginError, StateLostError, VfuServerError
from vfu_server.host_device import HostDevice
from vfu_server.libvfio_user.native import crc32c
from vfu_server.libvfio_user.ring import Ring
from vfu_server.session_config import save_config
from vfu_server.session_revoke import Revocation
from vfu_server.session_task import PluginTask
from vfu_server.stream import Origin, ReadableBuffer, StreamHeader, StreamWriter

log = logging.getLogger(__name__)

PADDING_AFTER = 1.0
"""Seconds that a client's read waits before a padding section answers it; the client gives up after some."""
PADDING_BYTES = 64
SILENCE = 60.0
"""Seconds that a client waits for a stopped device's next section until the save is given up."""
PATIENCE = 0.1
"""Seconds that a client's read waits at most in pre-copy before it is told that there is nothing for now."""
LOOK_AGAIN = 0.05
"""Seconds between two looks at a plugin that had nothing more to give early."""
END_DEADLINE = 0.5


class Save:
    """The saving side of one device. Its tasks run in the nursery that `attach` names, one at a time."""

    def __init__(
        self,
        host: HostDevice,
        device: Device,
        ring: Ring,
        plugin_name: str,
        plugin_version: str,
        revocation: Revocation,
    ) -> None:
        self._host = host
        self._device = device
        self._ring = ring
        self._who = plugin_name, plugin_version
        self._revocation = revocation
        self._nursery: trio.Nursery | None = None
        self._writer: StreamWriter | None = None
        self._records = trio.Lock()
        self._backlog: deque[memoryview] = deque()
        self._asked = trio.Event()
        self._resting = False
        """The plugin had nothing more to give early and will be asked again."""
        self._initial_end: int | None = None
        """Place in the stream behind the first pass of a pre-copy; None while the plugin is at it."""
        self._reinit = False
        """A new first pass has begun, which the client was not told yet."""
        self._sections = 0
        """How many the plugin has given or begun to give."""
        self._failure: VfuServerError | None = None
        self._untold = False
        """The plugin was told of a begin and of no end yet."""
        self.task = PluginTask("save")

    def attach(self, nursery: trio.Nursery | None) -> None:
        """Tasks begin in `nursery` from now on, which outlives a client; None without one: what runs shall end."""
        self._nursery = nursery
        if nursery is None:
            self.task.cancel()

    async def open(self, *, pre_copy: bool) -> None:
        """Open the session. Raises PluginError if the plugin's names do not fit into a stream."""
        name, version = self._who
        writer = StreamWriter(StreamHeader(name, version, self._device.identity, self._host.identity()), crc32c)
        header = writer.begin()
        await self._device.save_begin()
        self._writer, self._untold = writer, True
        try:
            self._backlog.clear()
            self._initial_end = self._failure = None
            self._reinit = False
            self._ring.open_save(pre_copy=pre_copy)
            await self._ring.send(header)
        except BaseException:
            await self.close()
            raise

    async def begin_pre_copy(self) -> None:
        """Let the plugin give what it can while the device runs."""
        await self.task.end()
        self._ring.more_to_come()
        self._begin(self._pre_copy, SavePhase.PRE_COPY)

    async def pause_pre_copy(self) -> None:
        """Give the plugin's pre-copy an end; afterwards no coroutine of the device runs.

        What it has given can still be fetched. Raises MigrationError if it had failed: the device need not be stopped
        for a stream that is lost.
        """
        await self.task.end()
        self._ring.nothing_for_now()
        if self._failure is not None:
            raise MigrationError(f"the pre-copy has failed: {self._failure}", self._failure.errno)
        if self._backlog:
            self._begin(self._flush, SavePhase.PRE_COPY)

    async def begin_stop_copy(self) -> None:
        """The device is stopped: give the rest."""
        await self.task.end()
        self._ring.more_to_come()
        self._begin(self._stop_copy, SavePhase.STOP_COPY)

    async def close(self) -> None:
        """End the session. What the client did not fetch is dropped; harmless if none is open.

        StateLostError: the plugin's save goes on all the same; it is told of the end when it has ended.
        """
        try:
            await self.task.end()
        finally:
            if self._writer is not None:
                self._writer = None
                self._backlog.clear()
                self._ring.close()
        if self._untold:
            self._untold = False
            await self._tell_end()

    @property
    def unfetched(self) -> int:
        """Bytes that were given and not fetched yet."""
        if self._writer is None:
            return 0
        return self._ring.used + sum(len(buffer) for buffer in self._backlog)

    async def precopy_info(self) -> PrecopyInfo:
        """The plugin's numbers and what the client has not fetched yet: of the first pass until all of that is out."""
        info = await self._device.precopy_info()
        reinit, self._reinit = self._reinit or info.reinit, False
        if self._resting and (info.initial_bytes > 0 or info.dirty_bytes > 0):
            self._ring.more_to_come()  # so the read that follows this answer waits for it
            self._asked.set()
        unfetched = self.unfetched
        if info.initial_bytes > 0:
            self._initial_end = None
            return PrecopyInfo(info.initial_bytes + unfetched, info.dirty_bytes, reinit)
        if self._initial_end is None:
            self._initial_end = self._given
        initial = max(0, self._initial_end - (self._given - unfetched))
        return PrecopyInfo(initial, info.dirty_bytes + unfetched - initial, reinit)

    @property
    def _given(self) -> int:
        """Place in the stream behind all that the plugin has given."""
        return self._ring.total + sum(len(buffer) for buffer in self._backlog)

    def _begin(self, work: Callable[[], Awaitable[None]], phase: SavePhase) -> None:
        self.task.begin(self._open_nursery(), partial(self._run, work, phase))

    async def _run(self, work: Callable[[], Awaitable[None]], phase: SavePhase) -> None:
        try:
            await work()
        except VfuServerError as error:
            log.error("saving the device's state (%s) failed: %s", phase.value, error)
            self._fail(error)
        except Exception as error:
            log.exception("saving the device's state (%s) failed in the plugin", phase.value)
            self._fail(PluginError(repr(error)))

    def _fail(self, error: VfuServerError) -> None:
        self._failure = error
        self._ring.fail(error.errno)

    @contextlib.contextmanager
    def _beside(self, work: Callable[[trio.CancelScope], Awaitable[None]]) -> Iterator[None]:
        """Let `work` run until the end of the `with`."""
        scope = trio.CancelScope()
        self._open_nursery().start_soon(work, scope)
        try:
            yield
        finally:
            scope.cancel()

    async def _pre_copy(self) -> None:
        """Have the plugin give, and again whenever it has more."""
        with self._beside(self._excuse):
            while True:
                given = self._given
                self._ring.more_to_come()
                await self._device.save(SavePhase.PRE_COPY, self)
                await self._rest(idle=self._given == given)

    async def _rest(self, *, idle: bool) -> None:
        """Wait until the plugin has more. `idle`: it has just given nothing, so it is not asked again at once."""
        self._resting = True
        try:
            while idle or not await self._has_more():
                idle = False
                self._ring.nothing_for_now()
                self._asked = trio.Event()
                with trio.move_on_after(LOOK_AGAIN):
                    await self._asked.wait()
        finally:
            self._resting = False

    async def _has_more(self) -> bool:
        info = await self._device.precopy_info()
        self._reinit = self._reinit or info.reinit
        return info.initial_bytes > 0 or info.dirty_bytes > 0

    async def _excuse(self, scope: trio.CancelScope) -> None:
        """Tell a client that waits while the plugin is at work that there is nothing for now: it may look elsewhere."""
        with scope:
            while True:
                await trio.sleep(PATIENCE)
                if self._ring.wanted:
                    self._ring.excuse_reader()

    async def _stop_copy(self) -> None:
        began = trio.current_time()
        with self._revocation.lifted(), trio.CancelScope() as plugin, self._beside(partial(self._pad, plugin)):
            await self._put(Section("config", 1, save_config(self._host)), Origin.SERVER)
            await self._device.save(SavePhase.STOP_COPY, self)
        if plugin.cancelled_caught:
            raise DeadlineError(f"the plugin gave nothing for {SILENCE} s")
        async with self._records:
            await self._send_all((self._open_writer().end(),))
        self._ring.finish()
        log.info("saved %d bytes of state in %.1f ms", self._ring.total, (trio.current_time() - began) * 1e3)

    async def send(self, section: Section) -> None:
        """One section of the plugin's (device.Sink)."""
        await self._put(section, Origin.PLUGIN)

    async def _put(self, section: Section, origin: Origin) -> None:
        self._sections += 1
        async with self._records:  # cancelled here: nothing was taken
            try:
                await self._send_all(self._open_writer().section(section, origin))
            except trio.Cancelled:
                # Taken all the same: the rest goes out with what follows. So whoever gave it need not guess; he is
                # cancelled where he waits next.
                return

    async def _flush(self) -> None:
        """Give what a pre-copy that was cut short has left."""
        async with self._records:
            await self._send_all(())

    async def _send_all(self, buffers: Iterable[ReadableBuffer]) -> None:
        # All of a section is taken on before its first byte goes out: a pre-copy that is cancelled in the middle of one
        # leaves the rest to the save that goes on.
        self._backlog.extend(memoryview(buffer).cast("B") for buffer in buffers)
        while self._backlog:
            sent = await self._ring.send_some(self._backlog[0])
            self._backlog[0] = self._backlog[0][sent:]
            if not self._backlog[0]:
                self._backlog.popleft()

    async def _pad(self, plugin: trio.CancelScope, scope: trio.CancelScope) -> None:
        """Answer a client that waits while the plugin has nothing yet: its patience has an end. So has ours: `plugin`
        is cancelled when nothing has come for too long, since the guest stands still meanwhile.
        """
        with scope, contextlib.suppress(MigrationError):  # a session that is over needs none
            given, since = self._sections, trio.current_time()
            while True:
                await trio.sleep(PADDING_AFTER)
                waited_for = self._ring.wanted and not self._records.locked()
                if self._sections != given or not waited_for:
                    given, since = self._sections, trio.current_time()
                elif trio.current_time() - since >= SILENCE:
                    plugin.cancel()
                if waited_for:
                    async with self._records:
                        await self._send_all(self._open_writer().padding(PADDING_BYTES))

    async def _tell_end(self) -> None:
        """The plugin is told in any case; whatever it does with that, the session is over. Raises StateLostError."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + END_DEADLINE) as scope:
            try:
                await self._device.save_end()
            except StateLostError:
                raise
            except Exception as error:
                fault = None if isinstance(error, VfuServerError) else error
                log.error("the plugin could not end the save: %s", error, exc_info=fault)
        if scope.cancelled_caught:
            log.error("the plugin did not end the save within %s s", END_DEADLINE)

    def _open_writer(self) -> StreamWriter:
        if self._writer is None:
            raise MigrationError("the save session is closed")
        return self._writer

    def _open_nursery(self) -> trio.Nursery:
        if self._nursery is None:
            raise MigrationError("no client is there to save for")
        return self._nursery
