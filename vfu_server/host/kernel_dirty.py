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
from vfu_server.uapi import Feature

LOGGING = frozenset({Feature.DMA_LOGGING_START, Feature.DMA_LOGGING_STOP, Feature.DMA_LOGGING_REPORT})
WAYS = {
    Feature.DMA_LOGGING_START: uapi.FEATURE_SET,
    Feature.DMA_LOGGING_STOP: uapi.FEATURE_SET,
    Feature.DMA_LOGGING_REPORT: uapi.FEATURE_GET,
}
BITS = 8
WORD = 8


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
        bitmap = bytearray(room)
        for dma_map in self._maps(iova, length):
            if dma_map.fd >= 0 and dma_map.prot & uapi.DMA_FLAG_WRITE:
                first = max(iova, dma_map.iova)
                last = min(iova + length, dma_map.iova + dma_map.size)
                self._collect(bitmap, iova, first, last - first, page_size)
        return data[: head.size] + bytes(bitmap)

    def _collect(self, bitmap: bytearray, base: int, iova: int, length: int, page_size: int) -> None:
        """Set the bits of one mapped piece; one that is not in whole pages of that size counts as written."""
        at, shift = divmod((iova - base) // page_size, BITS)
        pages = -(-(iova + length - base) // page_size) - (iova - base) // page_size
        if (iova | length) % page_size:
            bits = (1 << pages) - 1
        else:
            own = bytearray(-(-pages // (WORD * BITS)) * WORD)
            kernel_calls.hwpt_get_dirty_bitmap(
                self._ioctl, self._iommufd, self._page_table, iova, length, page_size, own
            )
            bits = int.from_bytes(own, "little") & ((1 << pages) - 1)
        size = -(-(pages + shift) // BITS)
        before = int.from_bytes(bitmap[at : at + size], "little")
        bitmap[at : at + size] = (before | bits << shift).to_bytes(size, "little")


def _refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))
