"""The C door under kernel VFIO: which calls it makes for an access or a map, and what it does when they fail."""

import errno
import fcntl
import mmap
import os
import struct

import pytest

from tests.host.fake_kernel import FakeKernel, Mapping, Space
from vfu_server.host_device import DmaMap
from vfu_server.libvfio_user.kernel_door import TYPE1, KernelDoor
from vfu_server.libvfio_user.native import ffi, lib

PAGE = 4096
MIB = 1 << 20


class Device:
    """A memfd in the place of the device's fd, and a log of the calls that reach it."""

    def __init__(self):
        self.fd = os.memfd_create("device", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, 1 << 44)
        self.log = []
        self.short = 0
        """Every call carries this much at most, if not 0."""
        self.error = 0
        self.keep = [
            ffi.callback("int(int, unsigned long, void *)", lambda *_: -errno.ENOTTY),
            ffi.callback("long(int, void *, size_t, uint64_t)", self.pread),
            ffi.callback("long(int, const void *, size_t, uint64_t)", self.pwrite),
        ]
        self.calls = ffi.new("struct vs_kernel_calls *", self.keep)

    def pread(self, fd, buffer, count, offset):
        self.log.append(("read", fd, offset, count))
        if self.error:
            return -self.error
        data = os.pread(fd, min(count, self.short or count), offset)
        ffi.memmove(buffer, data, len(data))
        return len(data)

    def pwrite(self, fd, buffer, count, offset):
        self.log.append(("write", fd, offset, count))
        if self.error:
            return -self.error
        return os.pwrite(fd, bytes(ffi.buffer(buffer, min(count, self.short or count))), offset)


@pytest.fixture
def device():
    device = Device()
    yield device
    os.close(device.fd)


@pytest.fixture
def door(device):
    door = KernelDoor(device.fd, -1, TYPE1, device.calls)
    door.set_region(0, 0, 0x4000)
    door.set_region(2, 2 << 40, 0x1000)
    door.set_region(7, 7 << 40, 256)
    yield door
    door.close()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_an_aligned_access_is_one_call_of_its_width(door, device, width):
    door.write(2, 0x10, bytes(range(1, width + 1)))
    assert door.read(2, 0x10, width) == bytes(range(1, width + 1))
    at = (2 << 40) + 0x10
    assert device.log == [("write", device.fd, at, width), ("read", device.fd, at, width)]
    assert os.pread(device.fd, width, at) == bytes(range(1, width + 1))


def test_a_block_is_one_call_and_goes_on_where_the_kernel_stopped(door, device):
    data = os.urandom(256)
    device.short = 100
    door.write(7, 0, data)
    assert door.read(7, 0, 256) == data
    assert [count for _, _, _, count in device.log] == [256, 156, 56, 256, 156, 56]
    assert [offset - (7 << 40) for _, _, offset, _ in device.log] == [0, 100, 200, 0, 100, 200]


def test_a_register_is_never_taken_in_parts(door, device):
    device.short = 2
    with pytest.raises(OSError, match="Input/output") as failed:
        door.read(0, 0x80, 4)
    assert failed.value.errno == errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        door.write(0, 0x80, b"1234")
    assert len(device.log) == 2


@pytest.mark.parametrize(
    ("region", "offset", "length"),
    [(0, 0x4000, 1), (0, 0x3FFE, 4), (0, (1 << 64) - 1, 8), (1, 0, 1), (7, 256, 4), (8, 0, 1), (9, 0, 1), (200, 0, 4)],
)
def test_what_lies_outside_a_region_never_reaches_the_kernel(door, device, region, offset, length):
    for access in (lambda: door.read(region, offset, length), lambda: door.write(region, offset, bytes(length))):
        with pytest.raises(OSError, match="Invalid") as failed:
            access()
        assert failed.value.errno == errno.EINVAL
    assert device.log == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EFAULT, errno.EPERM])
def test_the_kernels_errno_comes_back_and_is_counted(door, device, number):
    device.error = number
    with pytest.raises(OSError, match=os.strerror(number)):
        door.read(0, 0, 4)
    assert (door.numbers().requests, door.numbers().errors) == (1, 1)


def test_a_device_that_is_gone_is_not_touched(door, device):
    door.mark_gone()
    with pytest.raises(OSError, match="No such device"):
        door.read(0, 0, 4)
    assert device.log == []
    assert door.gone


def test_offsets_that_cannot_be_are_refused(door):
    for offset, size in (((1 << 64) - 1, 2), ((1 << 63) - 1, 2)):
        with pytest.raises(OSError, match="Invalid"):
            door.set_region(0, offset, size)
    with pytest.raises(OSError, match="Invalid"):
        door.set_region(9, 0, 1)


def test_sixteen_bytes_go_through_a_mapping_and_not_through_a_call(door, device):
    os.ftruncate(device.fd, (2 << 40) + 0x10000)
    door.write_wide(2, 0x300, bytes(range(16)))
    door.write_wide(0, 0x2FF0, bytes(range(16, 32)))  # another page
    door.write_wide(0, 0x2000, bytes(range(32, 48)))
    assert os.pread(device.fd, 16, (2 << 40) + 0x300) == bytes(range(16))
    assert os.pread(device.fd, 16, 0x2FF0) == bytes(range(16, 32))
    assert os.pread(device.fd, 16, 0x2000) == bytes(range(32, 48))
    assert device.log == []
    assert door.numbers().requests == 3


@pytest.mark.parametrize(("region", "offset"), [(2, 0x308), (2, 0x1000), (2, 0xFF8), (9, 0), (0, (1 << 64) - 16)])
def test_sixteen_bytes_that_are_not_aligned_or_lie_outside_are_refused(door, region, offset):
    with pytest.raises(OSError, match="Invalid"):
        door.write_wide(region, offset, bytes(16))


def test_sixteen_bytes_are_not_more_nor_less(door):
    with pytest.raises(ValueError, match="15 bytes"):
        door.write_wide(0, 0, bytes(15))


def test_a_region_that_cannot_be_mapped_takes_no_sixteen_bytes():
    reading, writing = os.pipe()  # a file that mmap refuses
    door = KernelDoor(reading, -1)
    door.set_region(0, 0, 0x1000)
    try:
        with pytest.raises(OSError, match=r"No such device|Permission"):
            door.write_wide(0, 0, bytes(16))
    finally:
        door.close()
        os.close(reading)
        os.close(writing)


def test_the_real_calls(device):
    """Without a test in between: pread, pwrite and ioctl of this kernel."""
    door = KernelDoor(device.fd, device.fd)
    door.set_region(0, 0x1000, 0x1000)
    door.write(0, 8, b"\x78\x56\x34\x12")
    assert door.read(0, 8, 4) == b"\x78\x56\x34\x12"
    assert os.pread(device.fd, 4, 0x1008) == b"\x78\x56\x34\x12"
    with pytest.raises(OSError, match="Inappropriate ioctl"):  # a memfd is no container
        door.dma_map(DmaMap(0, PAGE, 3, device.fd))
    assert door.numbers().dma_maps == 0
    pipe = os.pipe()
    os.write(pipe[1], b"12345")
    count = bytearray(4)
    assert lib.vs_ioctl(pipe[0], 0x541B, ffi.from_buffer(count)) == 0  # FIONREAD
    assert struct.unpack("i", count) == (5,)
    assert lib.vs_ioctl(pipe[0], 0x3B65, ffi.NULL) == -errno.ENOTTY
    for fd in pipe:
        os.close(fd)
    door.close()


# --- guest memory


class Memory:
    """A door on a fake kernel's IOMMU, and guest memory."""

    def __init__(self, tmp_path, *, iommufd, **has):
        self.fake = FakeKernel(tmp_path)
        for name, value in has.items():
            setattr(self.fake, name, value)
        self.iommu = self.fake.open("/dev/iommu" if iommufd else "/dev/vfio/vfio")
        ioas = 0
        if iommufd:
            answer = bytearray(struct.pack("=III", 12, 0, 0))
            self.fake.ioctl(self.iommu, 0x3B81, answer)
            ioas = struct.unpack("=III", answer)[2]
        self.space: Space = self.fake._objects[ioas][1] if iommufd else self.fake._files[self.iommu].what
        self.door = KernelDoor(-1, self.iommu, ioas, self.fake.kernel.door_calls)
        self.guest = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.guest, 4 * MIB)

    def refused(self, dma_map):
        with pytest.raises(OSError) as failed:
            self.door.dma_map(dma_map)
        assert self.door.dma_maps() == []
        assert self.space.maps == []
        assert vmas_of(self.guest) == 0
        return failed.value.errno

    def close(self):
        self.door.close()
        os.close(self.iommu)
        os.close(self.guest)
        self.fake.close()


def vmas_of(fd):
    """How often this process has the file mapped."""
    inode = os.fstat(fd).st_ino
    with open("/proc/self/maps") as maps:
        return sum(1 for line in maps if line.split()[4] == str(inode))


KINDS = {
    "type1": {"iommufd": False},
    "map-file": {"iommufd": True},
    "map": {"iommufd": True, "has_map_file": False},
}


@pytest.fixture(params=KINDS)
def memory(request, tmp_path, no_leaks):
    memory = Memory(tmp_path, **KINDS[request.param])
    memory.kind = request.param
    yield memory
    memory.close()


def test_a_map_reaches_the_iommu_as_asked(memory):
    memory.door.dma_map(DmaMap(0x10_0000, MIB, 3, memory.guest, 2 * MIB))
    memory.door.dma_map(DmaMap(0x100_0000, PAGE, 1, memory.guest, PAGE))
    first, second = memory.space.maps
    assert (first.iova, first.size, first.prot) == (0x10_0000, MIB, 3)
    assert (second.iova, second.size, second.prot) == (0x100_0000, PAGE, 1)
    os.pwrite(memory.guest, b"from the guest", 2 * MIB + 5)
    assert first.read(5, 14) == b"from the guest"
    first.write(100, b"from the device")
    assert os.pread(memory.guest, 15, 2 * MIB + 100) == b"from the device"
    assert vmas_of(memory.guest) == (0 if memory.kind == "map-file" else 2)
    memory.door.dma_unmap(0x10_0000, MIB)
    memory.door.dma_unmap_all()
    assert memory.space.maps == []
    assert vmas_of(memory.guest) == 0


def test_memory_without_fd_is_written_down_and_out_of_reach(memory):
    memory.door.dma_map(DmaMap(0xFEBF_9000, PAGE, 3))
    assert memory.door.dma_maps() == [DmaMap(0xFEBF_9000, PAGE, 3, -1, 0)]
    assert memory.space.maps == []
    before = len(memory.fake.requests)
    assert memory.door.dma_unmap(0xFEBF_9000, PAGE) == PAGE
    assert len(memory.fake.requests) == before


def test_a_file_that_is_cut_short_afterwards_hurts_nobody(memory):
    memory.door.dma_map(DmaMap(0, MIB, 3, memory.guest))
    os.ftruncate(memory.guest, 0)
    memory.door.dma_map(DmaMap(0x4000_0000, PAGE, 3))
    assert memory.door.dma_unmap(0, MIB) == MIB


def test_a_file_that_is_too_short_is_refused(memory):
    assert memory.refused(DmaMap(0, 2 * MIB, 3, memory.guest, 3 * MIB)) == errno.EFAULT


def test_the_window_of_interrupt_messages_is_refused(memory):
    assert memory.refused(DmaMap(0xFEE0_0000, PAGE, 3, memory.guest)) == errno.EINVAL


def test_memory_that_cannot_be_locked_is_refused(memory):
    memory.fake.pages_to_lock = 16
    assert memory.refused(DmaMap(0, MIB, 3, memory.guest)) == errno.ENOMEM
    memory.door.dma_map(DmaMap(0, 16 * PAGE, 3, memory.guest))


def test_the_iommus_limit_on_maps_is_told(memory):
    memory.fake.dma_limit = 1
    memory.door.dma_map(DmaMap(0, PAGE, 3, memory.guest))
    with pytest.raises(OSError, match="No space"):
        memory.door.dma_map(DmaMap(PAGE, PAGE, 3, memory.guest))
    memory.door.dma_unmap(0, PAGE)
    memory.door.dma_map(DmaMap(PAGE, PAGE, 3, memory.guest))


@pytest.mark.parametrize("prot", [2, 3])
def test_a_file_that_the_client_may_only_read_is_not_given_for_writing(memory, prot):
    read_only = os.open(f"/proc/self/fd/{memory.guest}", os.O_RDONLY)
    try:
        assert memory.refused(DmaMap(0, PAGE, prot, read_only)) == errno.EACCES
        memory.door.dma_map(DmaMap(0, PAGE, 1, read_only))
    finally:
        os.close(read_only)


def test_a_sealed_file_is_not_given_for_writing(memory):
    fcntl.fcntl(memory.guest, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert memory.refused(DmaMap(0, PAGE, 3, memory.guest)) == errno.EPERM


def test_a_kernel_without_map_file_is_asked_once(tmp_path):
    memory = Memory(tmp_path, iommufd=True, has_map_file=False)
    for i in range(3):
        memory.door.dma_map(DmaMap(i * PAGE, PAGE, 3, memory.guest))
    assert memory.fake.requests[1:] == [0x3B8F, 0x3B85, 0x3B85, 0x3B85]
    memory.close()


def test_a_file_that_the_kernel_does_not_take_itself_goes_by_mapping(tmp_path):
    memory = Memory(tmp_path, iommufd=True)
    with open(tmp_path / "on-disk", "w+b") as file:
        file.truncate(MIB)
        memory.door.dma_map(DmaMap(0, MIB, 3, file.fileno()))
        assert (memory.space.maps[0].vaddr != 0, memory.space.maps[0].fd) == (True, -1)
        memory.door.dma_map(DmaMap(MIB, MIB, 3, memory.guest))
        assert memory.space.maps[1].fd >= 0
    memory.close()


def test_an_unmap_that_takes_less_is_an_error_and_leaves_the_books(tmp_path):
    memory = Memory(tmp_path, iommufd=False)
    memory.door.dma_map(DmaMap(0, PAGE, 3, memory.guest))
    memory.space.maps.clear()  # the kernel has forgotten
    with pytest.raises(OSError, match="Input/output"):
        memory.door.dma_unmap(0, PAGE)
    assert memory.door.dma_maps() == []
    assert vmas_of(memory.guest) == 0
    memory.close()


def test_maps_of_a_device_that_is_gone_are_only_written_down(memory):
    memory.door.dma_map(DmaMap(0, PAGE, 3, memory.guest))
    memory.door.mark_gone()
    memory.door.dma_map(DmaMap(PAGE, PAGE, 3, memory.guest))
    assert len(memory.space.maps) == 1
    assert memory.door.dma_unmap(0, 2 * PAGE) == 2 * PAGE


def test_guest_memory_is_not_dumped(tmp_path):
    memory = Memory(tmp_path, iommufd=False)
    memory.door.dma_map(DmaMap(0, MIB, 3, memory.guest))
    inode = f" {os.fstat(memory.guest).st_ino} "
    with open("/proc/self/smaps") as smaps:
        text = smaps.read()
    area = text[text.index(inode) :]
    flags = area[area.index("VmFlags:") :].splitlines()[0].split()
    assert "dd" in flags
    memory.close()


def test_a_fake_mapping_reads_what_the_process_has(no_leaks):
    """The fake itself: its view through /proc/self/mem is that of the IOMMU."""
    with mmap.mmap(-1, PAGE) as page:
        page[:4] = b"1234"
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(page)))
        assert Mapping(0, PAGE, 3, address).read(0, 4) == b"1234"
        Mapping(0, PAGE, 3, address).write(1, b"ab")
        assert page[:4] == b"1ab4"
