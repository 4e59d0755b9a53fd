"""A driver's own log of its device's DMA at the ioctl door: features 6, 7 and 8, with the kernel's rules.

As drivers/vfio/vfio_main.c and the drivers behind it have it: START needs at least one range, ranges in whole pages and
apart, one session at a time; a report sets bits in the caller's bitmap and forgets what it has told.
"""

import errno
import struct

from tests.host.fake_function import FakeFunction, fail, load, store

PAGE = 4096
SET, GET = 0x20000, 0x10000
MAX_RANGES = 256
TOP = 1 << 64


class DeviceLog:
    """The log of `function`. `written`: pages that the device wrote and that nobody was told of."""

    def __init__(self, function: FakeFunction, granularity: int = PAGE) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.written: set[int] = set()
        self.granularity = granularity
        self.running = False
        self.failures: list[int] = []
        """Errnos with which the next reports fail, after they have forgotten what they read."""
        self.asked: list[tuple[int, int, int]] = []
        """(iova, length, page size) of each report."""
        function.features |= {6: (SET, 32, self._start), 7: (SET, 8, self._stop), 8: (GET, 40, self._report)}

    def write(self, *pages: int) -> None:
        """The device writes; only what is followed is taken down."""
        self.written |= {page for page in pages if self.running and self._follows(page)}

    def _follows(self, page: int) -> bool:
        return any(start <= page < start + length for start, length in self.ranges)

    def _start(self, _flags: int, view: memoryview) -> int:
        page_size, count, reserved, pointer = struct.unpack("=QIIQ", view[:24])
        if self.running or reserved or not count:
            raise fail(errno.EINVAL)
        if count > MAX_RANGES:
            raise fail(errno.E2BIG)
        ranges = sorted(struct.iter_unpack("=QQ", load(pointer, 16 * count)))
        at = 0
        for start, length in ranges:
            if not length or (start | length) % page_size or start < at:
                raise fail(errno.EINVAL)
            if start + length >= TOP:
                raise fail(errno.EOVERFLOW)
            at = start + length
        self.ranges, self.running, self.written = ranges, True, set()
        struct.pack_into("=Q", view, 0, self.granularity)
        return 0

    def _stop(self, _flags: int, _view: memoryview) -> int:
        self.running, self.ranges = False, []
        return 0

    def _report(self, _flags: int, view: memoryview) -> int:
        iova, length, page_size, pointer = struct.unpack("=QQQQ", view[:32])
        if page_size < PAGE or page_size & (page_size - 1) or not self.running:
            raise fail(errno.EINVAL)
        if iova + length >= TOP:
            raise fail(errno.EOVERFLOW)
        assert any(start <= iova and iova + length <= start + n for start, n in self.ranges), "not followed"
        self.asked.append((iova, length, page_size))
        told = {page for page in self.written if iova < page + PAGE and page < iova + length}
        self.written -= told
        if self.failures:
            raise fail(self.failures.pop(0))
        for page in told:
            for at in range(max(page, iova), min(page + PAGE, iova + length), min(page_size, PAGE)):
                byte, bit = divmod((at - iova) // page_size, 8)
                store(pointer + byte, bytes([load(pointer + byte, 1)[0] | 1 << bit]))
        return 0
