"""A save session: the plugin's coroutine beside the session, its sections summed and sent into the ring.

It must not know states or messages: the migration task says when a save begins, turns from pre-copy to stop-copy, and
ends.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Iterable

import trio

from vfu_server.device import Device, SavePhase, Section
from vfu_server.errors import MigrationError, PluginError, VfuServerError
from vfu_server.host_device import HostDevice
from vfu_server.libvfio_user.native import crc32c
from vfu_server.libvfio_user.ring import Ring
from vfu_server.session_config import save_config
from vfu_server.stream import Origin, ReadableBuffer, StreamHeader, StreamWriter

log = logging.getLogger(__name__)

PADDING_AFTER = 1.0
"""Seconds that a client's read waits before a padding section answers it; the client gives up after some."""
PADDING_BYTES = 64


class Save:
    """The saving side of one device. Its tasks run in the nursery that `attach` names, one at a time."""

    def __init__(self, host: HostDevice, device: Device, ring: Ring, plugin_name: str, plugin_version: str) -> None:
        self._host = host
        self._device = device
        self._ring = ring
        self._who = plugin_name, plugin_version
        self._nursery: trio.Nursery | None = None
        self._writer: StreamWriter | None = None
        self._records = trio.Lock()
        self._backlog: deque[memoryview] = deque()
        self._scope: trio.CancelScope | None = None
        self._ended = trio.Event()

    def attach(self, nursery: trio.Nursery | None) -> None:
        """Tasks begin in `nursery` from now on: that of the present client, None without one."""
        self._nursery = nursery

    async def open(self, *, pre_copy: bool) -> None:
        """Open the session."""
        name, version = self._who
        header = StreamHeader(name, version, self._device.identity, self._host.identity())
        self._backlog.clear()
        self._ring.open_save(pre_copy=pre_copy)
        self._writer = StreamWriter(header, crc32c)
        await self._ring.send(self._writer.begin())

    async def begin_pre_copy(self) -> None:
        """Let the plugin give what it can while the device runs."""
        self._begin(SavePhase.PRE_COPY)

    async def pause_pre_copy(self) -> None:
        """Give the plugin's pre-copy an end; afterwards no coroutine of the device runs."""
        await self._end()

    async def begin_stop_copy(self) -> None:
        """The device is stopped: give the rest."""
        self._ring.end_pre_copy()
        self._begin(SavePhase.STOP_COPY)

    async def close(self) -> None:
        """End the session. What the client did not fetch is dropped; harmless if none is open."""
        await self._end()
        if self._writer is not None:
            self._writer = None
            self._ring.close()

    def _begin(self, phase: SavePhase) -> None:
        nursery = self._open_nursery()
        self._scope, self._ended = trio.CancelScope(), trio.Event()
        nursery.start_soon(self._run, phase, self._scope, self._ended)

    async def _end(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
            with trio.CancelScope(shield=True):
                await self._ended.wait()
            self._scope = None

    async def _run(self, phase: SavePhase, scope: trio.CancelScope, ended: trio.Event) -> None:
        try:
            with scope:
                await self._save(phase)
        except VfuServerError as error:
            log.error("saving the device's state (%s) failed: %s", phase.value, error)
            self._ring.fail(error.errno)
        except Exception as error:
            log.exception("saving the device's state (%s) failed in the plugin", phase.value)
            self._ring.fail(PluginError(repr(error)).errno)
        finally:
            ended.set()

    async def _save(self, phase: SavePhase) -> None:
        if phase is SavePhase.PRE_COPY:
            await self._device.save(phase, self)
            return
        began = trio.current_time()
        padding = trio.CancelScope()
        self._open_nursery().start_soon(self._pad, padding)
        try:
            await self._put(Section("config", 1, save_config(self._host)), Origin.SERVER)
            await self._device.save(phase, self)
        finally:
            padding.cancel()
        async with self._records:
            await self._send_all((self._open_writer().end(),))
        self._ring.finish()
        log.info("saved %d bytes of state in %.1f ms", self._ring.total, (trio.current_time() - began) * 1e3)

    async def send(self, section: Section) -> None:
        """One section of the plugin's (device.Sink)."""
        await self._put(section, Origin.PLUGIN)

    async def _put(self, section: Section, origin: Origin) -> None:
        async with self._records:
            await self._send_all(self._open_writer().section(section, origin))

    async def _send_all(self, buffers: Iterable[ReadableBuffer]) -> None:
        # All of a section is taken on before its first byte goes out: a pre-copy that is cancelled in the middle of one
        # leaves the rest to the save that goes on.
        self._backlog.extend(memoryview(buffer).cast("B") for buffer in buffers)
        while self._backlog:
            sent = await self._ring.send_some(self._backlog[0])
            self._backlog[0] = self._backlog[0][sent:]
            if not self._backlog[0]:
                self._backlog.popleft()

    async def _pad(self, scope: trio.CancelScope) -> None:
        """Answer a client that waits while the plugin has nothing yet: its patience has an end."""
        with scope, contextlib.suppress(MigrationError):  # a session that is over needs none
            while True:
                await trio.sleep(PADDING_AFTER)
                if self._ring.wanted and not self._records.locked():
                    async with self._records:
                        await self._send_all(self._open_writer().padding(PADDING_BYTES))

    def _open_writer(self) -> StreamWriter:
        if self._writer is None:
            raise MigrationError("the save session is closed")
        return self._writer

    def _open_nursery(self) -> trio.Nursery:
        if self._nursery is None:
            raise MigrationError("no client is there to save for")
        return self._nursery
