"""Dirty pages from the IOMMU, asked for as a device's own log of its DMA would be."""

import errno
import os
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import trio_test

from tests.host.conftest import BDF
from tests.host.fake_function import load, store
from vfu_server import uapi
from vfu_server.errors import HostError
from vfu_server.host import ioctl
from vfu_server.host.kernel import KernelHost, open_bdf
from vfu_server.host.kernel_dirty import IommuLog
from vfu_server.host_device import DmaMap
from vfu_server.uapi import Feature

PAGE = 4096
START = uapi.FEATURE_SET | Feature.DMA_LOGGING_START
STOP = uapi.FEATURE_SET | Feature.DMA_LOGGING_STOP
REPORT = uapi.FEATURE_GET | Feature.DMA_LOGGING_REPORT
WISH = uapi.FEATURE_LOGGING_START.pack(PAGE, 1, 0) + uapi.LOGGING_RANGE.pack(0, 1 << 32)


@pytest.fixture
def guest():
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


async def reported(host: KernelHost, iova: int, pages: int, page_size: int = PAGE) -> set[int]:
    """Pages of the range that are told as dirty, by number."""
    ask = uapi.FEATURE_LOGGING_REPORT.pack(iova, pages * page_size, page_size)
    size = -(-pages // 64) * 8
    reply = await host.device_feature(REPORT, ask, len(ask) + size)
    assert reply[: len(ask)] == ask
    assert len(reply) == len(ask) + size
    bits = int.from_bytes(reply[len(ask) :], "little")
    assert bits >> pages == 0
    return {page for page in range(pages) if bits >> page & 1}


@trio_test
async def test_what_the_device_wrote_is_told_once(by_cdev, function, guest):
    by_cdev.hw_capabilities = 1
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    await host.device_feature(uapi.FEATURE_PROBE | START)
    await host.dma_map(DmaMap(0, 16 * PAGE, 3, guest))
    await host.dma_map(DmaMap(0x13000, 80 * PAGE, 3, guest, 16 * PAGE))
    await host.dma_map(DmaMap(0x80000, PAGE, 1, guest))  # which it cannot write
    await host.dma_map(DmaMap(0x90000, PAGE, 3))  # a peer's
    space = by_cdev.space_of(function)
    space.dirty |= {0}
    assert await host.device_feature(START, WISH, len(WISH)) == WISH
    assert space.tracking
    space.dirty |= {0x2000, 0xF000, 0x13000, 0x62000}
    async with host.scratch(PAGE):  # attached elsewhere for a while; the table keeps what it knows
        pass
    assert await reported(host, 0, 0x100) == {0x2, 0xF, 0x13, 0x62}
    assert await reported(host, 0, 0x100) == set()
    space.dirty |= {0x14000}
    assert await reported(host, 0x14000, 3) == {0}
    await host.device_feature(STOP)
    await host.device_feature(STOP)
    assert not space.tracking
    with pytest.raises(HostError) as failed:
        await reported(host, 0, 1)
    assert failed.value.errno == errno.EINVAL
    await host.aclose()


@trio_test
async def test_pages_of_another_size(by_cdev, function, guest):
    """The IOMMU takes whole pages of the size only: where a map's edge cuts one, it is asked in its smallest."""
    by_cdev.hw_capabilities = 1
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    await host.dma_map(DmaMap(0, 16 * PAGE, 3, guest))
    await host.dma_map(DmaMap(17 * PAGE, 15 * PAGE, 3, guest, 16 * PAGE))
    await host.device_feature(START, WISH, len(WISH))
    by_cdev.space_of(function).dirty |= {5 * PAGE, 24 * PAGE}
    assert await reported(host, 0, 4, 8 * PAGE) == {0, 3}
    assert await reported(host, 0, 4, 8 * PAGE) == set()
    by_cdev.space_of(function).dirty |= {17 * PAGE}
    assert await reported(host, 0, 1, 512 * PAGE) == {0}
    await host.aclose()


@trio_test
async def test_a_device_that_keeps_its_own_log_is_asked_itself(by_cdev, function):
    by_cdev.hw_capabilities = 1
    asked = []
    function.features = {6: (0x20000, 32, lambda *_: asked.append(6) or 0)}
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    assert host.dirty_source == "the device's driver"
    await host.device_feature(START, WISH, len(WISH))
    assert asked == [6]
    assert ioctl.IOMMU_HWPT_SET_DIRTY_TRACKING not in by_cdev.requests
    await host.aclose()


@trio_test
async def test_a_page_table_with_dirty_bits_that_does_not_suit(by_cdev, function):
    """An IOMMU that promises and refuses: the function is served all the same."""
    by_cdev.hw_capabilities = 1
    by_cdev.attach_busy = 1  # refuses the first attach
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    assert (host.attachment.tracks_dirty_pages, host.dirty_source) == (False, "")
    assert "attached ioas" in function.calls
    with pytest.raises(HostError) as failed:
        await host.device_feature(uapi.FEATURE_PROBE | START)
    assert failed.value.errno == errno.ENOTTY
    await host.aclose()


@pytest.mark.parametrize(
    ("flags", "data", "room"),
    [
        (uapi.FEATURE_PROBE | uapi.FEATURE_GET | Feature.DMA_LOGGING_START, b"", 0),
        (uapi.FEATURE_GET | Feature.DMA_LOGGING_STOP, b"", 0),
        (START, WISH[:16], 32),
        (START, uapi.FEATURE_LOGGING_START.pack(PAGE, 0, 0), 32),
        (START, uapi.FEATURE_LOGGING_START.pack(PAGE, 2, 0) + bytes(16), 32),
        (REPORT, uapi.FEATURE_LOGGING_REPORT.pack(0, PAGE, PAGE), 32),  # before START
    ],
)
def test_what_a_driver_would_refuse(flags, data, room):
    log = IommuLog(lambda *_: pytest.fail("reached the kernel"), -1, 1, lambda *_: [])
    with pytest.raises(OSError, match="Invalid") as failed:
        log.feature(flags, data, room)
    assert failed.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("iova", "length", "page_size", "room"),
    [(0, PAGE, 0, 32), (0, PAGE, 2048, 32), (0, PAGE, PAGE + 1, 32), (0, 0, PAGE, 32), (0, 65 * PAGE, PAGE, 32)],
)
def test_reports_that_cannot_be(iova, length, page_size, room):
    log = IommuLog(lambda *_: 0, -1, 1, lambda *_: [])
    log.feature(START, WISH, len(WISH))
    with pytest.raises(OSError, match="Invalid"):
        log.feature(START, WISH, len(WISH))
    with pytest.raises(OSError, match="Invalid"):
        log.feature(REPORT, uapi.FEATURE_LOGGING_REPORT.pack(iova, length, page_size), room)


maps_and_dirt = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 70)), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pieces=maps_and_dirt,
    page=st.sampled_from([4096, 16384, 65536]),
    answer_page=st.sampled_from([4096, 65536, 1 << 20]),
    data=st.data(),
)
def test_bits_land_where_the_pages_are(pieces, page, answer_page, data):
    """Against the plain meaning, with an IOMMU of any page size: a page of the answer is dirty if and only if the
    device wrote to a page that shares a byte with it; and the IOMMU forgets what was told whole, nothing else.
    """
    maps, at = [], 0
    for gap, size in pieces:
        maps.append(DmaMap((at + gap) * page, size * page, 3, 0))
        at += gap + size
    mapped = {n for m in maps for n in range(m.iova // page, (m.iova + m.size) // page)}
    some = data.draw(st.sets(st.sampled_from(sorted(mapped))))
    written = frozenset(some if data.draw(st.booleans()) else mapped - some)
    left = set(written)

    def call(_fd, request, buffer):
        if request != ioctl.IOMMU_HWPT_GET_DIRTY_BITMAP:
            return 0
        _, _, flags, _, iova, size, unit, pointer = struct.unpack("=IIIIQQQQ", buffer)
        assert not (iova | size) % page, "the kernel takes whole pages of the IOMMU only"
        assert not (iova | size) % unit
        wanted = set(range(iova // page, (iova + size) // page))
        assert wanted <= mapped
        bits = 0
        for n in wanted & left:
            for bit in range(max(n * page, iova) // unit, -(-(n + 1) * page // unit)):
                bits |= 1 << bit - iova // unit
        told = bits.to_bytes(-(-(size // unit) // 64) * 8, "little")
        store(pointer, bytes(a | b for a, b in zip(load(pointer, len(told)), told, strict=True)))
        if not flags & ioctl.HWPT_GET_DIRTY_BITMAP_NO_CLEAR:
            left.difference_update(wanted)
        return 0

    def inside(iova, size):
        return [m for m in maps if m.iova < iova + size and iova < m.iova + m.size]

    log = IommuLog(call, -1, 1, inside, page)
    (found, _, _) = uapi.FEATURE_LOGGING_START.unpack_from(log.feature(START, WISH, len(WISH)))
    assert found == max(PAGE, page)
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, (at + 9) * page // PAGE)] * 2)))
    iova, end = first * PAGE, (last + 1) * PAGE
    ask = uapi.FEATURE_LOGGING_REPORT.pack(iova, end - iova, answer_page)
    pages = -(-(end - iova) // answer_page)
    size = -(-pages // 64) * 8
    bits = int.from_bytes(log.feature(REPORT, ask, len(ask) + size)[len(ask) :], "little")
    hit = [(n * page, (n + 1) * page) for n in written if n * page < end and iova < (n + 1) * page]
    due = {
        at
        for first, last in hit
        for at in range(max(first - iova, 0) // answer_page, -(-(min(last, end) - iova) // answer_page))
    }
    assert {at for at in range(8 * size) if bits >> at & 1} == due
    whole = {n for n in written if iova <= n * page and (n + 1) * page <= end}
    assert left == written - whole
