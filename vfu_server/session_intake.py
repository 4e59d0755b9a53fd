"""What comes in of one state stream: checked as it comes, handed to the plugin, written to the hardware at the end.

It must not know where the bytes come from, nor when a load begins and ends.
"""

import errno
import logging
from collections.abc import Sequence

import trio

from vfu_server.device import Device, Section
from vfu_server.errors import DeadlineError, HostError, StreamFormatError
from vfu_server.host_device import HostDevice
from vfu_server.libvfio_user.native import crc32c
from vfu_server.session_config import check_config, load_config
from vfu_server.stream import MAX_SECTION, Origin, ReadableBuffer, StreamEnd, StreamHeader, StreamItem, StreamReader

log = logging.getLogger(__name__)

SERVER_SECTIONS = {"config": 1}
"""Our own sections by tag, with the newest version that is understood."""

SECTION_DEADLINE = 4.0
"""Seconds for a plugin to take one section."""
LEAVE = 32 << 10
"""Bytes of payload that are worth being waited for, to be taken at once."""


class Intake:
    """One stream into one device, whose `load_begin` was called. Any fault ends it: it must not be gone on with."""

    def __init__(self, host: HostDevice, device: Device, plugin_name: str) -> None:
        self._host = host
        self._device = device
        self._plugin_name = plugin_name
        self._reader = StreamReader(crc32c, known=self._known)
        self._config: bytes | None = None
        self._plugins_fault: MemoryError | None = None

    @property
    def bulk(self) -> int:
        """Bytes that come next and only have to be summed and kept: best pushed all at once."""
        return self._reader.chunk_left

    def push(self, pieces: Sequence[ReadableBuffer]) -> tuple[int, list[StreamItem]]:
        """Look at some bytes, none of which is kept. How many were taken, from the first piece on, and what became
        complete with them, which is to be taken, in order, before the next push.

        Raises StreamFormatError; HostError (ENOMEM) if there is no memory for a section.
        """
        before, bulk = self._reader.position, self._reader.chunk_left
        try:
            if bulk and sum(map(len, pieces)) == bulk:
                self._reader.push_payload(pieces)
                return bulk, []
            items = self._reader.push(pieces[0], MAX_SECTION if bulk else LEAVE)
        except MemoryError as error:
            if error is self._plugins_fault:
                raise  # told with its traceback, as any other bug of the plugin's
            raise HostError("there is no memory for the section that comes in", errno.ENOMEM) from None
        return self._reader.position - before, items

    async def take(self, item: StreamItem) -> None:
        """Check or hand on what came in. Raises StreamFormatError, StreamMismatchError, and what the plugin raises."""
        if isinstance(item, StreamHeader):
            item.check(self._plugin_name, self._host.identity())
            self._device.check_identity(item.state)
            log.info("state of %s %s (%s) comes in", item.plugin, item.plugin_version, item.state.variant)
        elif isinstance(item, StreamEnd):
            log.info("%d bytes of state came in, all sums right", item.length)
        elif item.origin is Origin.SERVER:
            if self._config is not None:
                raise StreamFormatError("section config came twice")
            check_config(self._host, item.section.payload)
            self._config = item.section.payload
        else:
            await self._give(item.section)

    def finish(self) -> None:
        """No more bytes will come. Raises StreamFormatError if something is missing."""
        self._reader.finish()

    async def write(self) -> None:
        """All has come in: write it to the hardware. Once only, since nobody knows what a write that failed has left.

        Raises StreamFormatError, RestoreError, and what the plugin raises.
        """
        if not self._reader.complete or self._config is None:
            raise StreamFormatError(
                "the stream has no section config" if self._reader.complete else "the stream is not complete"
            )
        load_config(self._host, self._config)
        await self._device.load_done()

    def _known(self, origin: Origin, tag: str, version: int) -> bool:
        if origin is Origin.SERVER:
            return 1 <= version <= SERVER_SECTIONS.get(tag, 0)
        try:
            return self._device.knows(tag, version)
        except MemoryError as error:
            self._plugins_fault = error
            raise

    async def _give(self, section: Section) -> None:
        """A section for the plugin, whose patience ends before that of a client that waits for room behind it."""
        with trio.CancelScope(deadline=trio.current_time() + SECTION_DEADLINE) as scope:
            await self._device.load(section)
        if scope.cancelled_caught:
            raise DeadlineError(f"the plugin took longer than {SECTION_DEADLINE} s over section {section.tag!r}")
