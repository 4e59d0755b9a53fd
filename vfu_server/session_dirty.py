"""Which guest pages the device has written, from the best source there is: the device's own DMA log, else what the
operator allows.

It must not know messages; requests come decoded, bitmaps go out. Layouts are those of the vfio-user protocol, ranges
and bitmaps inline.
"""

import errno
import logging

from vfu_server import uapi
from vfu_server.dma import all_dirty
from vfu_server.errors import ClientError, HostError
from vfu_server.feature import LoggingReport, LoggingStart
from vfu_server.host_device import HostDevice
from vfu_server.uapi import Feature

log = logging.getLogger(__name__)


class DirtyLog:
    """The dirty pages of one device's client. `mode` is the operator's `--dirty-tracking`, 'auto' or 'all'."""

    def __init__(self, host: HostDevice, mode: str) -> None:
        self._host = host
        self._mode = mode
        self._by_device = False
        self.running = False

    @property
    def offered(self) -> bool:
        """Whether the client may ask for a log at all. Without a source it may not: it then knows that it cannot
        migrate live.
        """
        return self._by_device or self._mode == "all"

    async def find_source(self) -> None:
        """Ask the device's side whether it keeps a log."""
        try:
            await self._host.device_feature(uapi.FEATURE_PROBE | uapi.FEATURE_SET | Feature.DMA_LOGGING_START)
            self._by_device = True
        except HostError as error:
            log.debug("the device keeps no log of its DMA: %s", error)
        if not self.offered:
            log.info(
                "dirty pages: no source, so live migration is not offered (--dirty-tracking all reports every page)"
            )

    async def start(self, start: LoggingStart) -> int:
        """Begin to log; returns the page size in bytes that is really used."""
        if self.running:
            raise ClientError("DMA_LOGGING_START: a log is kept already")
        page_size = start.page_size
        if self._by_device:
            ranges = b"".join(uapi.LOGGING_RANGE.pack(*one) for one in start.ranges)
            data = uapi.FEATURE_LOGGING_START.pack(page_size, len(start.ranges), 0) + ranges
            reply = await self._host.device_feature(uapi.FEATURE_SET | Feature.DMA_LOGGING_START, data, len(data))
            page_size = uapi.FEATURE_LOGGING_START.unpack_from(reply)[0]
        self.running = True
        return page_size

    async def stop(self) -> None:
        """Forget the log. Harmless if none is kept: the kernel's rule."""
        if self.running and self._by_device:
            await self._host.device_feature(uapi.FEATURE_SET | Feature.DMA_LOGGING_STOP)
        self.running = False

    async def report(self, report: LoggingReport) -> bytes:
        """The bitmap for a range, and a clean start for it. After an error the client takes everything for dirty."""
        if not self.running:
            raise ClientError("DMA_LOGGING_REPORT: no log is kept", errno.EINVAL)
        if self._by_device:
            data = uapi.FEATURE_LOGGING_REPORT.pack(report.iova, report.length, report.page_size)
            flags = uapi.FEATURE_GET | Feature.DMA_LOGGING_REPORT
            size = len(data) + report.bitmap_size
            reply = await self._host.device_feature(flags, data, size)
            if len(reply) == size:
                return reply[len(data) :]
            raise HostError(f"DMA_LOGGING_REPORT: {len(reply)} bytes came back, {size} were asked for")
        maps = self._host.native.dma_maps(report.iova, report.length)
        return bytes(all_dirty(maps, report.iova, report.length, report.page_size))
