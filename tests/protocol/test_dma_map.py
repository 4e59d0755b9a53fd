"""DMA_MAP: what is taken, what is refused with which errno, and what becomes of the fd."""

import errno
import os

import pytest

from tests.protocol.served import Served, fd_count
from vfu_server import uapi
from vfu_server.host_device import DmaMap
from vfu_server.testing import GuestMemory, ReplyError
from vfu_server.uapi import Command, HeaderFlag

READ, WRITE = uapi.DMA_FLAG_READ, uapi.DMA_FLAG_WRITE
TOP = 1 << 64


@pytest.fixture
def memory():
    with GuestMemory.of(1 << 20) as memory:
        yield memory


def maps(served):
    return [(each.iova, each.size, each.prot) for each in served.door.dma_maps()]


def test_mapped_memory_is_reached(served, client, memory):
    client.dma_map(0x100000, 0x2000, fd=memory.fd, fd_offset=0x3000)
    memory.write(0x3010, b"from the guest")
    assert served.door.load(0x100010, 14) == b"from the guest"
    served.door.store(0x101FF8, b"to guest")
    assert memory.read(0x4FF8, 8) == b"to guest"
    assert maps(served) == [(0x100000, 0x2000, READ | WRITE)]


@pytest.mark.parametrize(("prot", "reads", "writes"), [(READ, True, False), (WRITE, False, True)])
def test_protection_is_kept(served, client, memory, prot, reads, writes):
    client.dma_map(0, 0x1000, prot=prot, fd=memory.fd)
    for allowed, act in ((reads, lambda: served.door.load(0, 4)), (writes, lambda: served.door.store(0, b"abcd"))):
        if allowed:
            act()
        else:
            with pytest.raises(OSError, match="denied"):
                act()


def test_the_fd_is_the_servers_own_from_then_on(served, client):
    before = fd_count()
    fd = os.memfd_create("short-lived")
    os.ftruncate(fd, 4096)
    os.pwrite(fd, b"kept", 0)
    client.dma_map(0x1000, 0x1000, fd=fd)
    os.close(fd)
    assert served.door.load(0x1000, 4) == b"kept"
    assert fd_count() == before + 1
    client.dma_unmap(0x1000, 0x1000)
    assert served.fds_after(client) == before


@pytest.mark.parametrize(
    ("iova", "size", "error"),
    [
        (0x1000, 0, errno.EINVAL),
        (0x1001, 0x1000, errno.EINVAL),
        (0x1000, 0x1001, errno.EINVAL),
        (0x1000, 1, errno.EINVAL),
        (0x800, 0x1800, errno.EINVAL),
        (TOP - 0x1000, 0x2000, errno.EOVERFLOW),
        (0x1000, TOP - 0x1000, errno.EOVERFLOW),
        (0x1000, 1 << 63, None),
        (TOP - 0x1000, TOP - 0x1000, errno.EOVERFLOW),
    ],
)
def test_ranges_that_cannot_be(served, client, memory, iova, size, error):
    before = fd_count()
    with pytest.raises(ReplyError) as caught:
        client.dma_map(iova, size, fd=memory.fd)
    assert error is None or caught.value.errno in (error, errno.EINVAL)
    assert maps(served) == []
    assert served.fds_after(client) == before


def test_the_last_page_of_the_address_space(served, client, memory):
    client.dma_map(TOP - 0x1000, 0x1000, fd=memory.fd)
    memory.write(0xFFC, b"last")
    assert served.door.load(TOP - 4, 4) == b"last"
    with pytest.raises(OSError, match="Bad address"):
        served.door.load(TOP - 4, 8)
    client.dma_unmap(TOP - 0x1000, 0x1000)


@pytest.mark.parametrize("fd_offset", [1, 0x800, 1 << 63, TOP - 0x1000, TOP - 1])
def test_offsets_into_the_fd_that_cannot_be(served, client, memory, fd_offset):
    with pytest.raises(ReplyError) as caught:
        client.dma_map(0x1000, 0x1000, fd=memory.fd, fd_offset=fd_offset)
    assert caught.value.errno in (errno.EINVAL, errno.EOVERFLOW)
    assert maps(served) == []


@pytest.mark.parametrize(
    ("iova", "size"),
    [(0x10000, 0x4000), (0x10000, 0x1000), (0x13000, 0x1000), (0xF000, 0x2000), (0x13000, 0x2000), (0, 0x100000)],
)
def test_an_overlap_is_eexist_and_leaves_the_old_map(served, client, memory, iova, size):
    client.dma_map(0x10000, 0x4000, fd=memory.fd)
    before = fd_count()
    with pytest.raises(ReplyError) as caught:
        client.dma_map(iova, size, fd=memory.fd)
    assert caught.value.errno == errno.EEXIST
    assert maps(served) == [(0x10000, 0x4000, 3)]
    assert served.fds_after(client) == before


def test_neighbours_are_no_overlap(served, client, memory):
    for iova in (0x2000, 0x0, 0x1000, 0x3000):
        client.dma_map(iova, 0x1000, fd=memory.fd, fd_offset=iova)
    memory.write(0xFF8, bytes(range(16)))
    assert served.door.load(0xFF8, 16) == bytes(range(16))


def test_no_protection_at_all_is_refused(served, client, memory):
    with pytest.raises(ReplyError) as caught:
        client.dma_map(0, 0x1000, prot=0, fd=memory.fd)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("flags", [4, 8, 0x80000000, 7])
def test_flags_that_nobody_sends_are_for_the_session_to_refuse(served, client, memory, flags):
    payload = uapi.DMA_MAP.pack(32, flags, 0, 0, 0x1000)
    message, reply = served.answer(client, Command.DMA_MAP, payload, [memory.fd], error=errno.EINVAL)
    assert len(message.fds) == 1
    assert reply.errno == errno.EINVAL
    assert maps(served) == []


def test_two_fds_are_refused(served, client, memory):
    msg_id = client.send_message(Command.DMA_MAP, uapi.DMA_MAP.pack(32, 3, 0, 0, 0x1000), [memory.fd] * 2)
    assert client.wait_reply(msg_id).errno == errno.EINVAL


def test_a_map_without_fd_is_for_the_session(served, client):
    payload = uapi.DMA_MAP.pack(32, 3, 0, 0x7000, 0x1000)
    message, reply = served.answer(client, Command.DMA_MAP, payload)
    assert (message.payload, message.fds, reply.errno) == (payload, [], 0)


@pytest.mark.parametrize("kind", ["pipe", "eventfd", "device", "directory"])
def test_fds_that_are_no_plain_file_are_for_the_session(served, client, kind):
    if kind == "pipe":
        fds = list(os.pipe())
    else:
        makers = {"eventfd": os.eventfd, "device": lambda _: os.open("/dev/zero", os.O_RDWR)}
        fds = [makers.get(kind, lambda _: os.open("/", os.O_RDONLY))(0)]
    message, _ = served.answer(
        client, Command.DMA_MAP, uapi.DMA_MAP.pack(32, 3, 0, 0, 0x1000), fds[:1], error=errno.EINVAL
    )
    assert len(message.fds) == 1
    for fd in fds:
        os.close(fd)


def test_a_read_only_file_cannot_be_mapped_for_writing(served, client, tmp_path):
    (tmp_path / "rom").write_bytes(bytes(4096))
    fd = os.open(tmp_path / "rom", os.O_RDONLY)
    with pytest.raises(ReplyError) as caught:
        client.dma_map(0, 0x1000, fd=fd)
    assert caught.value.errno in (errno.EACCES, errno.EPERM)
    client.dma_map(0, 0x1000, prot=READ, fd=fd)
    assert served.door.load(0, 4) == bytes(4)
    os.close(fd)


def test_a_file_that_is_cut_short_kills_nobody(served, client):
    fd = os.memfd_create("cut")
    os.ftruncate(fd, 0x4000)
    client.dma_map(0, 0x4000, fd=fd)
    served.door.store(0x3000, b"here")
    os.ftruncate(fd, 0x1000)
    for act in (lambda: served.door.load(0x3000, 4), lambda: served.door.store(0x3000, b"gone")):
        with pytest.raises(OSError, match="Bad address"):
            act()
    assert served.door.load(0, 4) == bytes(4)
    assert client.get_info().num_irqs == 5
    os.close(fd)


def test_a_file_that_is_shorter_than_its_map_kills_nobody(served, client):
    fd = os.memfd_create("empty")
    client.dma_map(0, 0x1000, fd=fd)
    with pytest.raises(OSError, match="Bad address"):
        served.door.load(0, 1)
    os.close(fd)


def test_too_many_maps_are_for_the_session_to_refuse():
    served = Served(max_maps=3)
    with served.connect() as client, GuestMemory.of(1 << 20) as memory:
        for n in range(3):
            client.dma_map(n << 12, 0x1000, fd=memory.fd)
        payload = uapi.DMA_MAP.pack(32, 3, 0, 0x10000, 0x1000)
        message, reply = served.answer(client, Command.DMA_MAP, payload, [memory.fd], error=errno.ENOSPC)
        assert len(message.fds) == 1
        assert reply.errno == errno.ENOSPC
        client.dma_unmap(0, 0x1000)
        client.dma_map(0x10000, 0x1000, fd=memory.fd)
    served.close()


def test_thousands_of_small_maps(served, client, memory):
    """A guest behind a virtual IOMMU maps page by page."""
    pages = 4096
    for n in range(pages):
        payload = uapi.DMA_MAP.pack(32, 3, (n % 256) << 12, n << 13, 0x1000)
        client.send_message(Command.DMA_MAP, payload, [memory.fd], flags=HeaderFlag.NO_REPLY)
        if n % 256 == 255:
            served.settle(client)
    assert served.door.numbers().dma_maps == pages
    assert served.door.dma_maps(0, 0x3000) == [
        DmaMap(0, 0x1000, 3, served.door.dma_maps(0, 1)[0].fd),
        DmaMap(0x2000, 0x1000, 3, served.door.dma_maps(0x2000, 1)[0].fd, 0x1000),
    ]
    client.dma_unmap(0, pages << 13)
    assert served.door.numbers().dma_maps == 0


def test_maps_end_with_the_connection_when_the_session_says_so(served, memory):
    with served.connect() as client:
        client.dma_map(0, 0x1000, fd=memory.fd)
        before = fd_count()
    assert served.door.numbers().dma_maps == 1
    served.door.dma_unmap_all()
    assert served.door.numbers().dma_maps == 0
    assert fd_count() == before - 3  # the map's fd and both ends of the connection
