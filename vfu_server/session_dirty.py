"""Which guest pages the device has written, from the best source there is: the device's side (its own DMA log, or the
IOMMU's dirty bits that the door tells as one), else what the operator allows.

It must not know messages; requests come decoded, bitmaps go out. Layouts are those of the vfio-user protocol, ranges
and bitmaps inline.
"""

import errno
import logging
from collections.abc import Iterator, Sequence
from typing import cast

from vfu_server import uapi
from vfu_server.device import DeviceLog
from vfu_server.dma import bitmap_bytes, logging_ranges
from vfu_server.errors import ClientError, HostError, PluginError, VfuServerError
from vfu_server.feature import LoggingReport, LoggingStart
from vfu_server.host_device import DirtyDoor, DmaMap, HostDevice
from vfu_server.libvfio_user.bitmap import PageBitmap
from vfu_server.session_memory import ClientMemory
from vfu_server.session_written import WrittenPages
from vfu_server.uapi import Feature

log = logging.getLogger(__name__)

STEP_PAGES = uapi.MAX_DATA_XFER_SIZE * 8
"""Pages that the device's side is asked for at once: a bitmap of one megabyte."""


class DirtyLog:
    """The dirty pages of one device's client. `mode` is the operator's `--dirty-tracking`, 'auto' or 'all'.

    A bit that was read from the source is gone there. Until the reply that carries it is made it is kept here, so that
    no unmap, failed report or range asked for in parts loses one. A report that fails leaves its whole range as
    written, since the source may have forgotten what it did not tell. STOP, START and the client's end forget
    everything: whoever begins a log takes all memory for written.
    """

    def __init__(self, host: HostDevice, mode: str, memory: ClientMemory, own: DeviceLog | None = None) -> None:
        self._host = host
        self._own = own
        """The plugin's, which goes before the door's."""
        self._mode = mode
        self._memory = memory
        self._by_device = False
        self._source_runs = False
        self._watched: Sequence[tuple[int, int]] = ()
        """`(iova, length)` that the source follows, ascending."""
        self._written = WrittenPages()
        by_door = own is None and hasattr(host, "merge_dirty")
        self._door: DirtyDoor | None = cast("DirtyDoor", host) if by_door else None
        self._answer = bytearray()
        """Memory of the last answer, for the next one: new memory costs more than what is done with it."""
        self.running = False

    @property
    def offered(self) -> bool:
        """Whether the client may ask for a log at all. Without a source it may not: it then knows that it cannot
        migrate live.
        """
        return self._by_device or self._mode == "all"

    async def find_source(self) -> None:
        """Ask the device's side whether it keeps a log."""
        if self._own is not None:
            self._by_device = True
            return
        try:
            await self._host.device_feature(uapi.FEATURE_PROBE | uapi.FEATURE_SET | Feature.DMA_LOGGING_START)
            self._by_device = True
        except HostError as error:
            log.debug("the device's side keeps no log of its DMA: %s", error)
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
            await self._stop_source()  # that of a client whose end it has outlived
            page_size = await self._start_source(start)
        self._written.clear()
        self.running = True
        self._memory.watch_unmaps(self._collect)
        return page_size

    async def _start_source(self, start: LoggingStart) -> int:
        maps = self._memory.writable(0, 1 << 64)
        self._watched = logging_ranges(start.ranges, maps, start.page_size)
        if self._own is not None:
            self._source_runs = True
            return await self._own.start(self._watched, start.page_size)
        ranges = b"".join(uapi.LOGGING_RANGE.pack(*one) for one in self._watched)
        data = uapi.FEATURE_LOGGING_START.pack(start.page_size, len(self._watched), 0) + ranges
        reply = await self._host.device_feature(uapi.FEATURE_SET | Feature.DMA_LOGGING_START, data, len(data))
        self._source_runs = True
        if len(reply) < uapi.FEATURE_LOGGING_START.size:
            raise HostError(f"DMA_LOGGING_START: {len(reply)} bytes came back, {len(data)} were due")
        return int(uapi.FEATURE_LOGGING_START.unpack_from(reply)[0])

    async def stop(self) -> None:
        """Forget the log. Harmless if none is kept: the kernel's rule."""
        self.running = False
        self._memory.watch_unmaps(None)
        self._written.clear()
        self._answer = bytearray()
        await self._stop_source()

    async def _stop_source(self) -> None:
        if self._source_runs:
            if self._own is not None:
                await self._own.stop()
            else:
                await self._host.device_feature(uapi.FEATURE_SET | Feature.DMA_LOGGING_STOP)
            self._source_runs = False

    async def report(self, report: LoggingReport) -> memoryview:
        """The bitmap for a range, and a clean start for it; to be used before the next is asked for. After an error the
        client takes everything for dirty, and so is it told if it asks again.
        """
        if not self.running:
            raise ClientError("DMA_LOGGING_REPORT: no log is kept", errno.EINVAL)
        answer = self._empty(report)
        try:
            await self._read(answer, report.length)
        except VfuServerError:
            self._take_for_written(self._memory.writable(report.iova, report.length), report.iova, report.length)
            raise
        self._written.take(answer, report.length)
        return memoryview(answer.bits)

    def _empty(self, report: LoggingReport) -> PageBitmap:
        if len(self._answer) < report.bitmap_size:
            self._answer = bytearray(report.bitmap_size)
        answer = PageBitmap.within(self._answer, report.iova, report.length, report.page_size)
        answer.wipe()
        return answer

    async def _collect(self, maps: Sequence[DmaMap]) -> None:
        """Memory is about to be unmapped: keep what was written to it. Never fails: what cannot be read counts."""
        for dma_map in maps:
            step = STEP_PAGES * uapi.PAGE_SIZE
            for at in range(dma_map.iova, dma_map.iova + dma_map.size, step):
                length = min(step, dma_map.iova + dma_map.size - at)
                written = PageBitmap.of(at, length, uapi.PAGE_SIZE)
                try:
                    await self._read(written, length)
                except VfuServerError as error:
                    log.warning("dirty pages of memory that is unmapped cannot be read, all of it counts: %s", error)
                    self._written.add_range(at, length)
                else:
                    self._written.add(written)

    async def _read(self, into: PageBitmap, length: int) -> None:
        """Set what was written of the first `length` bytes. What the source does not follow counts as written."""
        start, end = into.iova, into.iova + length
        at = start
        for watched, size in self._watched if self._by_device else ():
            first, last = max(start, watched), min(end, watched + size)
            if first < last:
                self._fill(into, at, first)
                await self._ask_source(into, first, last)
                at = last
        self._fill(into, at, end)

    def _fill(self, into: PageBitmap, start: int, end: int) -> None:
        for dma_map in self._memory.writable(start, end - start) if start < end else ():
            first, last = max(start, dma_map.iova), min(end, dma_map.iova + dma_map.size)
            into.fill(first, last - first)

    async def _ask_source(self, into: PageBitmap, first: int, last: int) -> None:
        """In pages of the answer where the range begins with one, else in the smallest."""
        page_size = uapi.PAGE_SIZE if (first - into.iova) % into.page_size else into.page_size
        for start, end in _steps(first, last, page_size * STEP_PAGES):
            place = into.from_page(start, end, page_size) if self._door is not None else None
            if self._door is not None and place is not None:
                await self._door.merge_dirty(start, end - start, page_size, place)
                continue
            pages = -(-(end - start) // page_size)
            if self._own is not None:
                bits = await self._own.report(start, end - start, page_size)
                if len(bits) != bitmap_bytes(end - start, page_size):
                    raise PluginError(f"the log of the device's DMA gave {len(bits)} bytes for {pages} pages")
                into.merge_bits(start, page_size, pages, memoryview(bits))
                continue
            head = uapi.FEATURE_LOGGING_REPORT.pack(start, end - start, page_size)
            flags = uapi.FEATURE_GET | Feature.DMA_LOGGING_REPORT
            size = len(head) + bitmap_bytes(end - start, page_size)
            reply = await self._host.device_feature(flags, head, size)
            if len(reply) != size:
                raise HostError(f"DMA_LOGGING_REPORT: {len(reply)} bytes came back, {size} were asked for")
            into.merge_bits(start, page_size, pages, memoryview(reply)[len(head) :])

    def _take_for_written(self, maps: Sequence[DmaMap], iova: int, length: int) -> None:
        for dma_map in maps:
            first, last = max(iova, dma_map.iova), min(iova + length, dma_map.iova + dma_map.size)
            self._written.add_range(first, last - first)


def _steps(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + step, last)) for at in range(first, last, step))
