"""DMA between devices: a map that comes with another device's file, allowed or not, by each way into the kernel.

The other device's file is /dev/zero here, a character device whose memory can be mapped: the fake kernel takes it for
an open function.
"""

import errno
import os
import struct

import pytest

from tests.data_plane.rig import PAGE, WAYS, memory, rig, until
from tests.data_plane.sources import pages_in
from tests.host.fake_function import FakeFunction, fail
from tests.host.fake_kernel import File
from vfu_server.errors import HostError
from vfu_server.regmap import Block
from vfu_server.session import SessionOptions
from vfu_server.session_peers import Peers
from vfu_server.testing import ReplyError
from vfu_server.testing.fake_host import FakeHost
from vfu_server.uapi import PCI_BASE_ADDRESS_0, PCI_COMMAND, PCI_COMMAND_MEMORY, RegionIndex

IOVA = 0xFD000000
ALLOWED = SessionOptions(allow_p2p=True)


@pytest.fixture
def peer():
    fd = os.open("/dev/zero", os.O_RDWR)
    yield fd
    os.close(fd)


def with_peer(kernel):
    """The kernel knows /dev/zero as a function's file; an iommufd pins no memory of devices."""
    zero = os.stat("/dev/zero")
    function = FakeFunction("0000:00:09.0")
    known, ioas_map = kernel._file, kernel._ioas_map

    def file_of(fd, *kinds):
        if fd not in kernel._files and os.fstat(fd).st_rdev == zero.st_rdev:
            return File("device", zero.st_ino, function)
        return known(fd, *kinds)

    def map_memory(file, view):
        vaddr = struct.unpack_from("=Q", view, 16)[0]
        with open("/proc/self/maps") as maps:
            if any(line.startswith(f"{vaddr:x}-") and "/dev/zero" in line for line in maps):
                raise fail(errno.EFAULT)
        return ioas_map(file, view)

    kernel._file, kernel._ioas_map = file_of, map_memory


def open_files(rdev):
    """Files of a character device that the process has open, and mappings of it."""
    files = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    with open("/proc/self/maps") as maps:
        mapped = sum("/dev/zero" in line for line in maps)
    return sum(os.path.exists(path) and os.stat(path).st_rdev == rdev for path in files), mapped


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("options", "p2p"),
    [(SessionOptions(), True), (ALLOWED, False), (SessionOptions(), False)],
    ids=["operator", "plugin", "both"],
)
def test_without_leave_it_is_accepted_and_not_mapped(tmp_path, way, options, p2p, peer, caplog):
    with rig(tmp_path, way, prepare=with_peer, options=options, p2p=p2p) as made, made.connect() as client:
        client.dma_map(IOVA, 2 * PAGE, fd=peer)
        assert made.space.maps == []
        assert client.migration_flags()
        until(lambda: "memory of another device, accepted and not mapped" in caplog.text)
        assert ("does not say that this device can hold its DMA" in caplog.text) == options.allow_p2p
        client.dma_unmap(IOVA, 2 * PAGE)


def test_by_type1_it_is_mapped_and_stays_open_as_long(tmp_path, peer):
    rdev = os.fstat(peer).st_rdev
    with rig(tmp_path, "group", prepare=with_peer, options=ALLOWED, p2p=True) as made:
        with made.connect() as client:
            client.dma_map(IOVA, 2 * PAGE, fd=peer)
            until(lambda: open_files(rdev) == (2, 1))
            made.space.find(IOVA).write(8, b"a doorbell")
            assert made.space.find(IOVA).read(8, 10) == b"a doorbell"
            assert client.migration_flags()
            client.dma_unmap(0, 1 << 32)
            assert made.space.maps == []
            until(lambda: open_files(rdev) == (1, 0))
            client.dma_map(IOVA, 2 * PAGE, fd=peer)
        with made.connect():
            assert made.space.maps == []
            assert open_files(rdev) == (1, 0)


def test_an_iommufd_refuses_and_the_log_says_why(tmp_path, peer, caplog):
    with rig(tmp_path, "cdev", prepare=with_peer, options=ALLOWED, p2p=True) as made, made.connect() as client:
        with pytest.raises(ReplyError) as caught:
            client.dma_map(IOVA, 2 * PAGE, fd=peer)
        assert caught.value.errno == errno.EFAULT
        until(lambda: "an iommufd cannot, a type1 container can" in caplog.text)
        until(lambda: open_files(os.fstat(peer).st_rdev) == (1, 0))
        assert made.space.maps == []


def test_what_is_no_device_is_not_mapped_either(tmp_path, caplog):
    """A file that is no memory and no function: whoever sends it gets no use of it."""
    with rig(tmp_path, "group", options=ALLOWED, p2p=True) as made, made.connect() as client:
        for path in ("/dev/zero", "/dev/null"):
            fd = os.open(path, os.O_RDWR)
            client.dma_map(IOVA, PAGE, fd=fd)
            os.close(fd)
        assert made.space.maps == []
        until(lambda: "accepted and not mapped" in caplog.text)


def test_a_peers_memory_is_no_memory_that_gets_dirty(tmp_path, peer):
    options = SessionOptions(allow_p2p=True, dirty_tracking="all")
    with (
        memory(4 * PAGE) as guest,
        rig(tmp_path, "group", prepare=with_peer, options=options, p2p=True) as made,
        made.connect() as client,
    ):
        client.dma_map(0, 4 * PAGE, fd=guest)
        client.dma_map(8 * PAGE, 2 * PAGE, fd=peer)
        client.dma_logging_start([(0, 1 << 32)])
        client.dma_unmap(8 * PAGE, 2 * PAGE)
        client.dma_map(8 * PAGE, 2 * PAGE, fd=peer)
        found = client.dma_logging_report(0, 64 * PAGE)
        assert pages_in(found, 0) == {n * PAGE for n in range(4)}


def test_who_is_a_peer(tmp_path):
    """Devices whose clients are one process; a client that nobody can name has only its own."""
    with rig(tmp_path, "group", bdfs=tuple(f"0000:00:0{n}.0" for n in (4, 5, 6))) as made:
        hosts = [served.host for served in made.served.values()]
        for n, host in enumerate(hosts):
            host.write(RegionIndex.CONFIG, PCI_BASE_ADDRESS_0, 4, 0xFE000000 + (n << 20))
            host.write(RegionIndex.CONFIG, PCI_COMMAND, 2, PCI_COMMAND_MEMORY)
        peers = Peers()

        def seen(name, n):
            return {bar.owner for bar in peers.bars(name, hosts[n])}

        for name, n, client in (("a", 0, 100), ("b", 1, 100), ("c", 2, 200)):
            peers.connect(name, hosts[n], client)
        assert (seen("a", 0), seen("b", 1), seen("c", 2)) == ({"a", "b"}, {"a", "b"}, {"c"})
        peers.disconnect("b")
        assert (seen("a", 0), seen("b", 1)) == ({"a"}, {"b"})
        peers.connect("b", hosts[1], 0)
        peers.connect("c", hosts[2], 0)
        assert (seen("b", 1), seen("c", 2)) == ({"b"}, {"c"})


def test_device_with_a_short_config_space_has_its_bars_found():
    """mtty has 255 bytes, and the kernel answers a read beyond them with EINVAL."""

    class Short(FakeHost):
        def read_block(self, region, offset, length):
            if region == RegionIndex.CONFIG and offset + length > 0xFF:
                raise HostError("beyond its end", errno.EINVAL)
            return super().read_block(region, offset, length)

    host = Short({0: Block("bar", PAGE)})
    host.write(RegionIndex.CONFIG, PCI_BASE_ADDRESS_0, 4, 0xFE000000)
    peers = Peers()
    peers.connect("a", host, 100)
    assert [(bar.owner, bar.start) for bar in peers.bars("a", host)] == [("a", 0xFE000000)]
