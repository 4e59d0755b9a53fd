"""Dirty pages from the IOMMU's page tables, told as if the device kept a log of its DMA (features 6, 7 and 8).

For a function on its own page table whose IOMMU writes dirty bits. It needs nothing of the device, so no plugin does.
Layouts as `kernel_feature` has them; blocking calls.
"""

import errno
import os
from collections.abc import Callable, Sequence

from vfu_server import uapi
from vfu_server.host import ioctl as kernel_calls
from vfu_server.host.ioctl import Ioctl
from vfu_server.host_device import DmaMap
from vfu_server.libvfio_user.bitmap import PageBitmap
from vfu_server.uapi import Feature

LOGGING = frozenset({Feature.DMA_LOGGING_START, Feature.DMA_LOGGING_STOP, Feature.DMA_LOGGING_REPORT})
WAYS = {
    Feature.DMA_LOGGING_START: uapi.FEATURE_SET,
    Feature.DMA_LOGGING_STOP: uapi.FEATURE_SET,
    Feature.DMA_LOGGING_REPORT: uapi.FEATURE_GET,
}
BITS = 8
STEP = 1 << 20
"""Bytes of bitmap that are asked for at once."""


class IommuLog:
    """The log of one page table. `maps`: the client's maps inside a range, by iova."""

    def __init__(
        self, ioctl: Ioctl, iommufd: int, page_table: int, maps: Callable[[int, int], Sequence[DmaMap]]
    ) -> None:
        self._ioctl = ioctl
        self._iommufd = iommufd
        self._page_table = page_table
        self._maps = maps
        self._running = False

    def feature(self, flags: int, data: bytes, reply_size: int) -> bytes:
        """One of the three features. OSError with the errno that a driver's own log would give."""
        number = Feature(flags & uapi.FEATURE_ID_MASK)
        ways = flags & (uapi.FEATURE_GET | uapi.FEATURE_SET)
        if ways & ~WAYS[number]:
            raise _refused(errno.EINVAL)
        if flags & uapi.FEATURE_PROBE:
            return b""
        if number is Feature.DMA_LOGGING_START:
            return self._start(data)
        if number is Feature.DMA_LOGGING_STOP:
            self._stop()
            return b""
        return self._report(data, reply_size)

    def _start(self, data: bytes) -> bytes:
        """The IOMMU watches all that is mapped, so the ranges only have to be there."""
        head = uapi.FEATURE_LOGGING_START
        if len(data) < head.size or self._running:
            raise _refused(errno.EINVAL)
        page_size, count, _ = head.unpack_from(data)
        if not count or len(data) < head.size + count * uapi.LOGGING_RANGE.size:
            raise _refused(errno.EINVAL)
        kernel_calls.hwpt_set_dirty_tracking(self._ioctl, self._iommufd, self._page_table, on=True)
        self._running = True
        return head.pack(max(page_size, uapi.PAGE_SIZE), count, 0) + data[head.size :]

    def _stop(self) -> None:
        if self._running:
            self._running = False
            kernel_calls.hwpt_set_dirty_tracking(self._ioctl, self._iommufd, self._page_table, on=False)

    def _report(self, data: bytes, reply_size: int) -> bytes:
        head = uapi.FEATURE_LOGGING_REPORT
        if len(data) < head.size or not self._running:
            raise _refused(errno.EINVAL)
        iova, length, page_size = head.unpack_from(data)
        room = reply_size - head.size
        if page_size < uapi.PAGE_SIZE or page_size & (page_size - 1) or not length:
            raise _refused(errno.EINVAL)
        if room < -(-length // (page_size * BITS)):
            raise _refused(errno.EINVAL)
        answer = PageBitmap.of(iova, length, page_size)
        self.merge(iova, length, page_size, memoryview(answer.bits))
        return b"".join((data[: head.size], memoryview(answer.bits)[:room], bytes(max(0, room - len(answer.bits)))))

    def merge(self, iova: int, length: int, page_size: int, bits: memoryview) -> None:
        """See DirtyDoor.merge_dirty. OSError."""
        answer = PageBitmap.within(bits, iova, length, page_size)
        for dma_map in self._maps(iova, length):
            if dma_map.fd >= 0 and dma_map.prot & uapi.DMA_FLAG_WRITE:
                self._collect(answer, iova + length, dma_map)

    def _collect(self, answer: PageBitmap, end: int, dma_map: DmaMap) -> None:
        """Set what was written of one map, up to `end`: the answer's last page may reach further.

        The IOMMU takes whole mapped pages of a size: where those of the answer do not fit, its smallest.
        """
        first = max(answer.iova, dma_map.iova) // uapi.PAGE_SIZE * uapi.PAGE_SIZE
        last = min(-(-end // uapi.PAGE_SIZE) * uapi.PAGE_SIZE, dma_map.iova + dma_map.size)
        page_size = answer.page_size if not (first | last | answer.iova) % answer.page_size else uapi.PAGE_SIZE
        step = page_size * BITS * STEP
        for start in range(first, last, step):
            length = min(step, last - start)
            if (place := answer.from_page(start, start + length, page_size)) is not None:
                self._ask(start, length, page_size, place)  # the kernel sets bits and clears none
            else:
                piece = PageBitmap.of(start, length, page_size)
                self._ask(start, piece.length, page_size, piece.bits)
                answer.merge(piece)

    def _ask(self, iova: int, length: int, page_size: int, bits: bytearray | memoryview) -> None:
        kernel_calls.hwpt_get_dirty_bitmap(self._ioctl, self._iommufd, self._page_table, iova, length, page_size, bits)


def _refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))
