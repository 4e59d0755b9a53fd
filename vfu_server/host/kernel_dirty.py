"""Dirty pages from the IOMMU's page tables, told as if the device kept a log of its DMA (features 6, 7 and 8).

For a function on its own page table whose IOMMU writes dirty bits. It needs nothing of the device, so no plugin does.
Layouts as `kernel_feature` has them; blocking calls.
"""

import errno
import os
from collections.abc import Callable, Iterator, Sequence

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
    """The log of one page table. `maps`: the client's maps inside a range, by iova.

    `page`: bytes of the IOMMU's least page, which is the host's; it is asked in whole ones only.
    """

    def __init__(
        self,
        ioctl: Ioctl,
        iommufd: int,
        page_table: int,
        maps: Callable[[int, int], Sequence[DmaMap]],
        page: int = uapi.HOST_PAGE_SIZE,
    ) -> None:
        self._ioctl = ioctl
        self._iommufd = iommufd
        self._page_table = page_table
        self._maps = maps
        self._page = page
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
        return head.pack(max(page_size, self._page), count, 0) + data[head.size :]

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

        The IOMMU takes whole mapped pages of a size: where those of the answer do not fit, its smallest. A page of its
        that is covered in part stays dirty there, or what lies beside the range would never be told.
        """
        start, stop = max(answer.iova, dma_map.iova), min(end, dma_map.iova + dma_map.size)
        for first, last, whole in _pages_of(start, stop, self._page):
            self._collect_pages(answer, first, last, keep=not whole)

    def _collect_pages(self, answer: PageBitmap, first: int, last: int, *, keep: bool) -> None:
        page_size = answer.page_size if not (first | last | answer.iova) % answer.page_size else self._page
        step = max(page_size, self._page) * BITS * STEP
        for start in range(first, last, step):
            length = min(step, last - start)
            if (place := answer.from_page(start, start + length, page_size)) is not None:
                self._ask(start, length, page_size, place, keep)  # the kernel sets bits and clears none
            else:
                piece = PageBitmap.of(start, length, page_size)
                self._ask(start, piece.length, page_size, piece.bits, keep)
                answer.merge(piece)

    def _ask(self, iova: int, length: int, page_size: int, bits: bytearray | memoryview, keep: bool) -> None:
        kernel_calls.hwpt_get_dirty_bitmap(
            self._ioctl, self._iommufd, self._page_table, iova, length, page_size, bits, keep=keep
        )


def _pages_of(start: int, stop: int, page: int) -> Iterator[tuple[int, int, bool]]:
    """The pages that a range touches, `(first, last, whole)`: those it covers whole, and one at each end that it does
    not.
    """
    first, last = start // page * page, -(-stop // page) * page
    inner_first, inner_last = -(-start // page) * page, stop // page * page
    if first < inner_first:
        yield first, inner_first, False
    if inner_first < inner_last:
        yield inner_first, inner_last, True
    if (at := max(inner_first, inner_last)) < last:
        yield at, last, False


def _refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))
