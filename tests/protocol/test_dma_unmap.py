"""DMA_UNMAP: exact, coarse, all; what is cut or cannot be is refused and leaves everything as it was."""

import errno
import os

import pytest

from tests.protocol.served import fd_count
from vfu_server import uapi
from vfu_server.testing import GuestMemory, ReplyError
from vfu_server.uapi import Command

TOP = 1 << 64


@pytest.fixture
def memory():
    with GuestMemory.of(1 << 20) as memory:
        yield memory


@pytest.fixture
def pages(client, memory):
    """The client with four maps of 4 KiB at 0x1000, 0x2000, 0x4000 and 0x5000."""
    for iova in (0x1000, 0x2000, 0x4000, 0x5000):
        client.dma_map(iova, 0x1000, fd=memory.fd, fd_offset=iova)
    return client


def iovas(served):
    return [each.iova for each in served.door.dma_maps()]


@pytest.mark.parametrize(
    ("iova", "size", "left"),
    [
        (0x2000, 0x1000, [0x1000, 0x4000, 0x5000]),
        (0x1000, 0x2000, [0x4000, 0x5000]),
        (0x2000, 0x3000, [0x1000, 0x5000]),
        (0x0, 0x100000, []),
        (0x0, 1 << 63, []),
        (0x3000, 0x1000, [0x1000, 0x2000, 0x4000, 0x5000]),
        (0x100000, 0x100000, [0x1000, 0x2000, 0x4000, 0x5000]),
        (0x5000, TOP - 0x5000, [0x1000, 0x2000, 0x4000]),
    ],
)
def test_everything_inside_the_range_is_unmapped(served, pages, iova, size, left):
    before = fd_count()
    pages.dma_unmap(iova, size)
    assert iovas(served) == left
    assert served.fds_after(pages) == before - (4 - len(left))


def test_the_reply_repeats_the_request(pages):
    request = uapi.DMA_UNMAP.pack(24, 0, 0x1000, 0x2000)
    assert pages.call(Command.DMA_UNMAP, request).payload == request


def test_unmapped_memory_is_not_reached_any_more(served, pages):
    assert served.door.load(0x1000, 4) == bytes(4)
    pages.dma_unmap(0x1000, 0x1000)
    with pytest.raises(OSError, match="Bad address"):
        served.door.load(0x1000, 4)


def test_what_was_unmapped_can_be_mapped_again(served, pages, memory):
    for _ in range(20):
        pages.dma_unmap(0, 0x10000)
        pages.dma_map(0x1000, 0x4000, fd=memory.fd)
    assert iovas(served) == [0x1000]


@pytest.mark.parametrize(("iova", "size"), [(0x10000, 0x1000), (0x11000, 0x1000), (0xF000, 0x2000), (0x13000, 0x2000)])
def test_a_range_that_cuts_a_map_is_refused(served, client, memory, iova, size):
    client.dma_map(0x10000, 0x4000, fd=memory.fd)
    client.dma_map(0x14000, 0x1000, fd=memory.fd)
    with pytest.raises(ReplyError) as caught:
        client.dma_unmap(iova, size)
    assert caught.value.errno == errno.EINVAL
    assert iovas(served) == [0x10000, 0x14000]
    assert served.door.load(0x10000, 4) == bytes(4)


@pytest.mark.parametrize(
    ("iova", "size", "error"),
    [
        (0x1000, 0, errno.EINVAL),
        (0x1001, 0x1000, errno.EINVAL),
        (0x1000, 0x1001, errno.EINVAL),
        (0x1000, 0xFFF, errno.EINVAL),
        (TOP - 0x1000, 0x2000, errno.EOVERFLOW),
        (0x1000, TOP - 0x1000 + 0x1000 - 0x1000, None),
        (0x2000, TOP - 0x1000, errno.EOVERFLOW),
    ],
)
def test_ranges_that_cannot_be(served, pages, iova, size, error):
    if error is None:
        pages.dma_unmap(iova, size)  # up to the very end of the address space: that can be
        assert iovas(served) == []
        return
    with pytest.raises(ReplyError) as caught:
        pages.dma_unmap(iova, size)
    assert caught.value.errno in (error, errno.EINVAL)
    assert len(iovas(served)) == 4


def test_all(served, pages):
    pages.dma_unmap_all()
    assert iovas(served) == []
    pages.dma_unmap_all()


@pytest.mark.parametrize(("flags", "iova", "size"), [(2, 0x1000, 0), (2, 0, 0x1000), (3, 0, 0), (4, 0x1000, 0x1000)])
def test_all_with_a_range_and_unknown_flags_are_refused(served, pages, flags, iova, size):
    with pytest.raises(ReplyError) as caught:
        pages.dma_unmap(iova, size, flags=flags)
    assert caught.value.errno == errno.EINVAL
    assert len(iovas(served)) == 4


def test_the_bitmap_of_the_dead_protocol_is_refused(served, pages):
    payload = uapi.DMA_UNMAP.pack(40, 1, 0x1000, 0x1000) + uapi.DMA_BITMAP.pack(4096, 8) + bytes(8)
    with pytest.raises(ReplyError) as caught:
        pages.call(Command.DMA_UNMAP, payload)
    assert caught.value.errno == errno.EINVAL
    assert len(iovas(served)) == 4


def test_unmaps_come_up_while_dirty_pages_are_logged(served, pages):
    served.context.unmaps_to_python(True)
    payload = uapi.DMA_UNMAP.pack(24, 0, 0x1000, 0x1000)
    message, reply = served.answer(pages, Command.DMA_UNMAP, payload, reply=payload)
    assert message.payload == reply.payload == payload
    assert len(iovas(served)) == 4
    served.context.unmaps_to_python(False)
    pages.dma_unmap(0x1000, 0x1000)
    assert len(iovas(served)) == 3


def test_a_map_with_its_own_file_for_each_page(served, client):
    before = fd_count()
    for n in range(64):
        fd = os.memfd_create("page")
        os.ftruncate(fd, 4096)
        client.dma_map(n << 12, 0x1000, fd=fd)
        os.close(fd)
    assert fd_count() == before + 64
    client.dma_unmap(0, 64 << 12)
    assert served.fds_after(client) == before
