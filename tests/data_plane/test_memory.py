"""The client's memory in the IOMMU, through a whole session: what is mapped, what is refused, nothing left behind."""

import errno
import fcntl
import os
import tempfile

import pytest

from tests.data_plane.rig import BDF, OTHER, PAGE, WAYS, memory, rig, until
from vfu_server import uapi
from vfu_server.libvfio_user.door import MAX_DMA_MAPS
from vfu_server.testing import ReplyError, save
from vfu_server.testing.migrate import load
from vfu_server.uapi import MigState

READ, RW = 1, 3
WINDOW = 0xFEE00000
"""Interrupt messages: no IOMMU maps memory there."""


def refused(call, *arguments, **more):
    with pytest.raises(ReplyError) as caught:
        call(*arguments, **more)
    return caught.value.errno


def held(fd):
    """How many fds and mappings of the process, ours and the server's, are of the file."""
    inode = os.fstat(fd).st_ino
    files = [
        os.stat(f"/proc/self/fd/{name}").st_ino
        for name in os.listdir("/proc/self/fd")
        if name.isdecimal() and os.path.exists(f"/proc/self/fd/{name}")
    ]
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if line.split()[4] == str(inode)]
    return files.count(inode), len(mapped)


@pytest.fixture(params=WAYS)
def served(request, tmp_path):
    with rig(tmp_path, request.param) as made:
        yield made


@pytest.fixture
def guest():
    with memory(64 * PAGE) as fd:
        yield fd


# --- files


@pytest.mark.parametrize("kind", ["memfd", "sealed memfd", "shm"])
def test_shared_memory_of_each_kind_is_reached(served, kind):
    flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if kind == "sealed memfd" else 0)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        fd = os.dup(file.fileno()) if kind == "shm" else os.memfd_create("guest", flags)
        os.ftruncate(fd, 16 * PAGE)
        if kind == "sealed memfd":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        with served.connect() as client:
            client.dma_map(0x100000, 8 * PAGE, fd=fd, fd_offset=4 * PAGE)
            mapping = served.space.find(0x100000)
            mapping.write(PAGE, b"written by the device")
            assert os.pread(fd, 21, 5 * PAGE) == b"written by the device"
            os.pwrite(fd, b"by the guest", 11 * PAGE)
            assert mapping.read(7 * PAGE, 12) == b"by the guest"
            client.dma_unmap(0x100000, 8 * PAGE)
            until(lambda: held(fd) == ((2 if kind == "shm" else 1, 0)))
        os.close(fd)


def test_protections(served, guest):
    read_only = os.open(f"/proc/self/fd/{guest}", os.O_RDONLY)
    with served.connect() as client:
        for n, prot in enumerate((1, 2, 3)):
            client.dma_map(n * PAGE, PAGE, prot=prot, fd=guest, fd_offset=n * PAGE)
        client.dma_map(8 * PAGE, PAGE, prot=READ, fd=read_only)
        assert [m.prot for m in served.space.maps] == [1, 2, 3, 1]
        assert refused(client.dma_map, 9 * PAGE, PAGE, prot=RW, fd=read_only) == errno.EACCES
        assert len(served.space.maps) == 4
    os.close(read_only)


# --- refusals


@pytest.mark.parametrize(
    ("limit", "iova", "size", "offset", "wanted", "words"),
    [
        ("lock", 0, 64 * PAGE, 0, errno.ENOMEM, "RLIMIT_MEMLOCK"),
        ("", 0, 16 * PAGE, 60 * PAGE, None, ""),
        ("", WINDOW, PAGE, 0, errno.EINVAL, "0xfee00000+0x1000 was refused: Invalid argument"),
        ("", 1 << 45, PAGE, 0, errno.EINVAL, "was refused: Invalid argument"),
        ("", 0x200000, 2 * PAGE, 0, errno.EEXIST, "was refused: File exists"),
    ],
)
def test_a_map_that_the_iommu_refuses_leaves_nothing(served, guest, caplog, limit, iova, size, offset, wanted, words):
    with served.connect() as client:
        client.dma_map(0x200000, PAGE, fd=guest)
        before = held(guest)
        if limit:
            served.kernel.pages_to_lock = 32
        if wanted is None:  # the file is too short: a container and an iommufd call that differently
            assert refused(client.dma_map, iova, size, fd=guest, fd_offset=offset) in (errno.EFAULT, errno.EINVAL)
        else:
            assert refused(client.dma_map, iova, size, fd=guest, fd_offset=offset) == wanted
            until(lambda: words in caplog.text)
        until(lambda: held(guest) == before)
        assert [(m.iova, m.size) for m in served.space.maps] == [(0x200000, PAGE)]
        served.kernel.pages_to_lock = 1 << 20
        client.dma_map(0, 32 * PAGE, fd=guest)
        assert len(served.space.maps) == 2


def test_the_hosts_limit_of_maps_is_told_and_the_next_fits_after_an_unmap(served, guest, caplog):
    """As the guest of a VMM with an IOMMU does it: page by page."""
    served.kernel.dma_limit = 5
    with served.connect() as client:
        for n in range(5):
            client.dma_map(2 * n * PAGE, PAGE, fd=guest, fd_offset=n * PAGE)
        before = held(guest)
        for _ in range(3):
            assert refused(client.dma_map, 1 << 30, PAGE, fd=guest) == errno.ENOSPC
        until(lambda: held(guest) == before)
        until(lambda: "ENOSPC, 5 maps in place: the host's limit on the number of maps is reached" in caplog.text)
        until(lambda: "dma_entry_limit" in caplog.text)
        client.dma_unmap(4 * PAGE, PAGE)
        client.dma_map(1 << 30, PAGE, fd=guest)
        assert refused(client.dma_map, 4 * PAGE, PAGE, fd=guest) == errno.ENOSPC
        client.dma_unmap(0, 1 << 20)
        client.dma_map(4 * PAGE, PAGE, fd=guest)
        assert [m.iova for m in served.space.maps] == [1 << 30, 4 * PAGE]


def test_what_the_kernel_refused_is_not_asked_again(served, guest):
    served.kernel.dma_limit = 0
    with served.connect() as client:
        before = len(served.kernel.requests)
        assert refused(client.dma_map, 0, PAGE, fd=guest) == errno.ENOSPC
        asked = served.kernel.requests[before:]
        assert len([request for request in asked if request in (0x3B71, 0x3B85, 0x3B8F)]) == 1


# --- unmaps


def test_a_coarse_unmap_takes_all_that_lies_inside(served, guest):
    with served.connect() as client:
        for n in range(40):
            client.dma_map((3 * n + n % 2) * PAGE, PAGE, fd=guest, fd_offset=n * PAGE)
        client.dma_unmap(30 * PAGE, 60 * PAGE)
        assert all(not 30 * PAGE <= m.iova < 90 * PAGE for m in served.space.maps)
        assert len(served.space.maps) == 20
        client.dma_unmap(30 * PAGE, 60 * PAGE)  # nothing there: fine
        client.dma_unmap(0, 1 << 39)
        assert served.space.maps == []
        until(lambda: held(guest) == (1, 0))


def test_an_unmap_that_would_cut_a_map_takes_none(served, guest):
    with served.connect() as client:
        client.dma_map(0, 4 * PAGE, fd=guest)
        client.dma_map(8 * PAGE, 4 * PAGE, fd=guest)
        for iova, size in ((0, 2 * PAGE), (2 * PAGE, 64 * PAGE), (0, 10 * PAGE), (9 * PAGE, PAGE)):
            assert refused(client.dma_unmap, iova, size) == errno.EINVAL
        assert len(served.space.maps) == 2


def test_memory_goes_with_its_client(served, guest):
    with served.connect() as client:
        client.dma_map(0, 8 * PAGE, fd=guest)
        client.dma_map(1 << 20, 8 * PAGE)
    with served.connect():
        assert served.space.maps == []
        until(lambda: held(guest) == (1, 0))
        assert served.session._memory.unreachable == {}


# --- maps without a file


def place(client, address, *, bar=0):
    client.write(uapi.RegionIndex.CONFIG, uapi.PCI_BASE_ADDRESS_0 + 4 * bar, 4, address)
    client.write(uapi.RegionIndex.CONFIG, uapi.PCI_COMMAND, 2, uapi.PCI_COMMAND_MEMORY)


def test_our_own_bar_is_accepted_and_not_mapped(served, caplog):
    """QEMU sends it for BARs that it has mapped itself."""
    with served.connect() as client:
        place(client, 0xFE000000)
        client.dma_map(0xFE001000, PAGE)
        assert served.space.maps == []
        assert client.migration_flags()
        until(lambda: f"BAR0 of {BDF}, accepted and not mapped" in caplog.text)
        client.dma_unmap(0xFE001000, PAGE)
        assert refused(client.dma_unmap, 0xFE001000, 0) == errno.EINVAL


def test_a_peers_bar_is_accepted_and_one_of_another_machine_is_not(tmp_path, caplog):
    """Peers are known by the process that their clients are: here it is one, which cannot be two machines."""
    with rig(tmp_path, "group", bdfs=(BDF, OTHER)) as made:
        with made.connect() as client, made.connect(OTHER) as other:
            place(other, 0xFD000000, bar=1)
            client.dma_map(0xFD000000, 2 * PAGE)
            until(lambda: f"BAR1 of {OTHER}, accepted and not mapped" in caplog.text)
            assert client.migration_flags()
        with made.connect() as client:
            client.dma_map(0xFD000000, 2 * PAGE)
            assert client.migration_flags() == 0, "the peer's client has gone: this is memory"


def test_memory_without_a_file_bars_migration_until_it_goes(served, guest, caplog):
    with served.connect() as client:
        client.dma_map(0, 4 * PAGE, fd=guest)
        assert client.migration_flags()
        client.dma_map(1 << 30, 4 * PAGE)
        client.dma_map(2 << 30, 4 * PAGE)
        client.dma_map(3 << 30, PAGE, prot=READ)
        until(lambda: "the hardware cannot reach" in caplog.text)
        until(lambda: "memory-backend-memfd" in caplog.text)
        until(lambda: "read-only and without a file descriptor, accepted" in caplog.text)
        assert client.migration_flags() == 0
        assert len(served.space.maps) == 1
        client.dma_unmap(1 << 30, 4 * PAGE)
        assert client.migration_flags() == 0
        client.dma_unmap(0, 4 << 30)
        assert client.migration_flags()
        assert served.space.maps == []


def arrive(client, stream, *maps):
    """As QEMU does at the destination: the state, then maps of BARs that its own copy of config space has, then on."""
    client.reset()
    for at, width in ((uapi.PCI_BASE_ADDRESS_0, 4), (uapi.PCI_COMMAND, 2)):
        client.write(uapi.RegionIndex.CONFIG, at, width, 0)
    client.set_mig_state(MigState.RESUMING)
    load(client, stream)
    for iova, size in maps:
        client.dma_map(iova, size)
    client.set_mig_state(MigState.STOP)
    client.set_mig_state(MigState.RUNNING)


def test_our_own_bar_is_known_once_the_state_that_comes_in_has_placed_it(served, caplog):
    with served.connect() as client:
        place(client, 0xFE000000)
        client.set_mig_state(MigState.STOP_COPY)
        stream = list(save(client))
        arrive(client, stream, (0xFE001000, PAGE))
        assert client.migration_flags()
        assert served.session._memory.unreachable == {}
        until(lambda: f"BAR0 of {BDF}, accepted and not mapped" in caplog.text)
        assert "the hardware cannot reach" not in caplog.text
        arrive(client, stream, (0xFE001000, PAGE), (1 << 30, PAGE))
        assert client.migration_flags() == 0, "this is memory, wherever BARs are"
        until(lambda: "the hardware cannot reach" in caplog.text)


def test_a_migration_that_has_begun_goes_on_with_memory_without_a_file(served):
    with served.connect() as client:
        client.set_mig_state(MigState.STOP_COPY)
        client.dma_map(1 << 30, PAGE)
        client.set_mig_state(MigState.RUNNING)
        assert client.migration_flags() == 0


def test_where_no_migration_begins_the_device_is_left_at_work(served):
    """Refused a state, QEMU asks for the one that it was in, and resets the device if that is refused as well. It also
    stops and starts the device with the machine.
    """
    with served.connect() as client:
        assert client.migration_flags()
        client.dma_map(1 << 30, PAGE)
        for state in (MigState.RUNNING, MigState.STOP):
            client.set_mig_state(state)
            assert refused(client.set_mig_state, MigState.STOP_COPY) == errno.EINVAL
            client.set_mig_state(state)
            assert client.mig_state() is state
        assert client.mig_data_size() > 0
        client.dma_unmap(1 << 30, PAGE)
        client.set_mig_state(MigState.STOP_COPY)


def test_memory_without_a_file_is_remembered_up_to_a_limit(served, caplog):
    with served.connect() as client:
        client.dma_map(0, PAGE)
        odd = served.session._memory.unreachable
        served.on_trio(odd.update, {n << 20: PAGE for n in range(1, MAX_DMA_MAPS)})
        assert refused(client.dma_map, 1 << 50, PAGE) == errno.ENOSPC
        until(lambda: "all we remember" in caplog.text)
        client.dma_unmap(0, PAGE)
        client.dma_map(1 << 50, PAGE)
        client.dma_unmap_all()
        assert client.migration_flags()


@pytest.mark.parametrize("flags", [0, 4, 8, 0x80000003])
def test_flags_that_nobody_offers(served, guest, flags):
    with served.connect() as client:
        assert refused(client.dma_map, 0, PAGE, prot=flags, fd=guest) == errno.EINVAL
        until(lambda: held(guest) == (1, 0))
