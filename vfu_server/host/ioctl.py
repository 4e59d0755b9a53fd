"""The ioctls of VFIO and iommufd: numbers, packed structs, and one function for each call.

Every function takes the `Ioctl` to make it with, so that a test can stand in the kernel's place, and raises OSError
with the kernel's errno. It must not know in which order or for what the calls are made.

Layouts: linux/vfio.h and linux/iommufd.h; native byte order, no padding. Each call writes its struct's size into the
first word: `argsz` of VFIO, `size` of iommufd.
"""

import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vfu_server.libvfio_user.native import check, ffi, lib

Ioctl = Callable[[int, int, "bytearray | int"], int]
"""ioctl(2): fd, request, argument (a buffer that is read and written, or a number). OSError on failure."""

# on the container
GET_API_VERSION = 0x3B64
CHECK_EXTENSION = 0x3B65
SET_IOMMU = 0x3B66
IOMMU_GET_INFO = 0x3B70
IOMMU_MAP_DMA = 0x3B71
IOMMU_UNMAP_DMA = 0x3B72
# on the group
GROUP_GET_STATUS = 0x3B67
GROUP_SET_CONTAINER = 0x3B68
GROUP_GET_DEVICE_FD = 0x3B6A
# on the device; numbers are used again from fd to fd
DEVICE_GET_INFO = 0x3B6B
DEVICE_GET_REGION_INFO = 0x3B6C
DEVICE_GET_IRQ_INFO = 0x3B6D
DEVICE_SET_IRQS = 0x3B6E
DEVICE_RESET = 0x3B6F
DEVICE_GET_PCI_HOT_RESET_INFO = 0x3B70
DEVICE_PCI_HOT_RESET = 0x3B71
DEVICE_FEATURE = 0x3B75
DEVICE_BIND_IOMMUFD = 0x3B76
DEVICE_ATTACH_IOMMUFD_PT = 0x3B77
# on the data fd of a migration
MIG_GET_PRECOPY_INFO = 0x3B79
# on the iommufd
IOMMU_DESTROY = 0x3B80
IOMMU_IOAS_ALLOC = 0x3B81
IOMMU_IOAS_IOVA_RANGES = 0x3B84
IOMMU_IOAS_MAP = 0x3B85
IOMMU_IOAS_UNMAP = 0x3B86
IOMMU_HWPT_ALLOC = 0x3B89
IOMMU_GET_HW_INFO = 0x3B8A
IOMMU_HWPT_SET_DIRTY_TRACKING = 0x3B8B
IOMMU_HWPT_GET_DIRTY_BITMAP = 0x3B8C
IOMMU_IOAS_MAP_FILE = 0x3B8F

API_VERSION = 0
TYPE1V2_IOMMU = 3
GROUP_FLAGS_VIABLE = 1
GROUP_FLAGS_CONTAINER_SET = 2
IOMMU_INFO_CAP_IOVA_RANGE = 1
IOMMU_INFO_CAP_DMA_AVAIL = 3
HOT_RESET_FLAG_DEV_ID = 1
HOT_RESET_FLAG_DEV_ID_OWNED = 2
BIND_FLAG_TOKEN = 1
IOAS_MAP_FIXED_IOVA = 1
IOAS_MAP_WRITEABLE = 2
IOAS_MAP_READABLE = 4
HW_CAP_DIRTY_TRACKING = 1
HWPT_ALLOC_DIRTY_TRACKING = 2
HWPT_DIRTY_TRACKING_ENABLE = 1

GROUP_STATUS = struct.Struct("=II")
"""argsz, flags"""
IOMMU_INFO = struct.Struct("=IIQII")
"""argsz, flags, iova_pgsizes, cap_offset, pad"""
DMA_MAP = struct.Struct("=IIQQQ")
"""argsz, flags, vaddr, iova, size: made by the C door"""
DMA_UNMAP = struct.Struct("=IIQQ")
"""argsz, flags, iova, size: made by the C door"""
DEVICE_INFO = struct.Struct("=IIIIII")
"""argsz, flags, num_regions, num_irqs, cap_offset, pad"""
REGION_INFO = struct.Struct("=IIIIQQ")
"""argsz, flags, index, cap_offset, size, offset in the device fd"""
IRQ_INFO = struct.Struct("=IIII")
"""argsz, flags, index, count"""
IRQ_SET = struct.Struct("=IIIII")
"""argsz, flags, index, start, count; then data"""
HOT_RESET_INFO = struct.Struct("=III")
"""argsz, flags, count; then devices"""
DEPENDENT_DEVICE = struct.Struct("=iHBB")
"""group or device id, segment, bus, devfn"""
HOT_RESET = struct.Struct("=III")
"""argsz, flags, count; then the fds of groups"""
FEATURE = struct.Struct("=II")
"""argsz, flags; then data"""
PRECOPY_INFO = struct.Struct("=IIQQ")
"""argsz, flags, initial_bytes, dirty_bytes"""
BIND_IOMMUFD = struct.Struct("=IIiI")
"""argsz, flags, iommufd, out_devid"""
BIND_IOMMUFD_TOKEN = struct.Struct("=IIiIQ")
"""the same, and a pointer to a token"""
ATTACH_PT = struct.Struct("=III")
"""argsz, flags, pt_id in and out"""
CAP_HEADER = struct.Struct("=HHI")
"""id, version, next"""

DESTROY = struct.Struct("=II")
"""size, id"""
IOAS_ALLOC = struct.Struct("=III")
"""size, flags, out_ioas_id"""
IOAS_IOVA_RANGES = struct.Struct("=IIIIQQ")
"""size, ioas_id, num_iovas in and out, reserved, pointer to ranges, out_iova_alignment"""
IOVA_RANGE = struct.Struct("=QQ")
"""start, last"""
IOAS_MAP = struct.Struct("=IIIIQQQ")
"""size, flags, ioas_id, reserved, user_va, length, iova"""
IOAS_MAP_FILE = struct.Struct("=IIIiQQQ")
"""size, flags, ioas_id, fd, start, length, iova: made by the C door"""
IOAS_UNMAP = struct.Struct("=IIQQ")
"""size, ioas_id, iova, length in and out"""
HWPT_ALLOC = struct.Struct("=IIIIIIIIQII")
"""size, flags, dev_id, pt_id, out_hwpt_id, reserved, data_type, data_len, data_uptr, fault_id, reserved"""
HWPT_SET_DIRTY_TRACKING = struct.Struct("=IIII")
"""size, flags, hwpt_id, reserved"""
HWPT_GET_DIRTY_BITMAP = struct.Struct("=IIIIQQQQ")
"""size, hwpt_id, flags, reserved, iova, length, page_size, pointer to the bitmap"""
HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1
HW_INFO = struct.Struct("=IIIIQIIQ")
"""size, flags, dev_id, data_len, data_uptr, out_data_type, pasid bits, out_capabilities"""


def native_ioctl(fd: int, request: int, argument: "bytearray | int") -> int:
    """The real one. Without the GIL, however long it takes; begun again after a signal."""
    pointer = ffi.cast("void *", argument) if isinstance(argument, int) else ffi.from_buffer(argument)
    return check(lib.vs_ioctl(fd, request, pointer))


def open_node(path: str) -> int:
    """Open a device node for reading and writing."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def may_use(path: Path) -> bool:
    """Whether this process may read and write `path`."""
    return os.access(path, os.R_OK | os.W_OK, effective_ids=True)


@dataclass(frozen=True, slots=True)
class Kernel:
    """The ways into the kernel: nodes under `root`, and the calls. A test puts its own below the same code."""

    root: Path = Path("/")
    ioctl: Ioctl = native_ioctl
    open: Callable[[str], int] = open_node
    may_use: Callable[[Path], bool] = may_use
    read: Callable[[int, int], bytes] = os.read
    write: Callable[[int, memoryview], int] = os.write
    door_calls: Any = field(default=None)
    """`struct vs_kernel_calls *` for the C door; None: the kernel's."""

    def path(self, path: str) -> Path:
        """An absolute path, under `root`."""
        return self.root / path.lstrip("/")


def address_of(buffer: Any) -> int:
    """Where a buffer lies in this process; it must stay alive (and its size) while the kernel uses the number."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def _filled(layout: struct.Struct, *values: int, tail: bytes = b"") -> bytearray:
    """A struct with its size in front of `values`."""
    return bytearray(layout.pack(layout.size + len(tail), *values) + tail)


# --- container and group


def api_version(ioctl: Ioctl, container: int) -> int:
    """VFIO_GET_API_VERSION."""
    return ioctl(container, GET_API_VERSION, 0)


def check_extension(ioctl: Ioctl, container: int, extension: int) -> bool:
    """VFIO_CHECK_EXTENSION."""
    return ioctl(container, CHECK_EXTENSION, extension) > 0


def set_iommu(ioctl: Ioctl, container: int, kind: int) -> None:
    """VFIO_SET_IOMMU; the container must have a group."""
    ioctl(container, SET_IOMMU, kind)


def group_status(ioctl: Ioctl, group: int) -> int:
    """VFIO_GROUP_GET_STATUS: GROUP_FLAGS_*."""
    buffer = _filled(GROUP_STATUS, 0)
    ioctl(group, GROUP_GET_STATUS, buffer)
    return int(GROUP_STATUS.unpack(buffer)[1])


def group_set_container(ioctl: Ioctl, group: int, container: int) -> None:
    """VFIO_GROUP_SET_CONTAINER."""
    ioctl(group, GROUP_SET_CONTAINER, bytearray(struct.pack("=i", container)))


def group_get_device_fd(ioctl: Ioctl, group: int, name: str) -> int:
    """VFIO_GROUP_GET_DEVICE_FD: opens and resets the function. `name`: the BDF, perhaps with ` vf_token=UUID`."""
    return ioctl(group, GROUP_GET_DEVICE_FD, bytearray(name.encode() + b"\0"))


@dataclass(frozen=True, slots=True)
class Type1Info:
    """VFIO_IOMMU_GET_INFO. `ranges`: usable IOVAs, (first, last); empty: not told. `available`: maps left, or None."""

    page_sizes: int
    ranges: tuple[tuple[int, int], ...]
    available: int | None


def iommu_info(ioctl: Ioctl, container: int) -> Type1Info:
    """VFIO_IOMMU_GET_INFO of a type1 container."""
    buffer = _grown(ioctl, container, IOMMU_GET_INFO, _filled(IOMMU_INFO, 0, 0, 0, 0))
    _, _, page_sizes, cap_offset, _ = IOMMU_INFO.unpack_from(buffer)
    ranges: tuple[tuple[int, int], ...] = ()
    available = None
    for cap, at in capabilities(buffer, cap_offset):
        if cap == IOMMU_INFO_CAP_IOVA_RANGE:
            count, _ = struct.unpack_from("=II", buffer, at)
            ranges = tuple(IOVA_RANGE.iter_unpack(buffer[at + 8 : at + 8 + count * IOVA_RANGE.size]))
        elif cap == IOMMU_INFO_CAP_DMA_AVAIL:
            available = int(struct.unpack_from("=I", buffer, at)[0])
    return Type1Info(page_sizes, ranges, available)


# --- device


def device_info(ioctl: Ioctl, device: int) -> tuple[int, int, int]:
    """VFIO_DEVICE_GET_INFO: flags, num_regions, num_irqs."""
    buffer = _filled(DEVICE_INFO, 0, 0, 0, 0, 0)
    ioctl(device, DEVICE_GET_INFO, buffer)
    _, flags, num_regions, num_irqs, _, _ = DEVICE_INFO.unpack(buffer)
    return flags, num_regions, num_irqs


def region_info(ioctl: Ioctl, device: int, index: int) -> bytearray:
    """VFIO_DEVICE_GET_REGION_INFO: a REGION_INFO and the capabilities behind it."""
    return _grown(ioctl, device, DEVICE_GET_REGION_INFO, _filled(REGION_INFO, 0, index, 0, 0, 0))


def irq_info(ioctl: Ioctl, device: int, index: int) -> tuple[int, int]:
    """VFIO_DEVICE_GET_IRQ_INFO: flags, count."""
    buffer = _filled(IRQ_INFO, 0, index, 0)
    ioctl(device, DEVICE_GET_IRQ_INFO, buffer)
    _, flags, _, count = IRQ_INFO.unpack(buffer)
    return flags, count


def set_irqs(ioctl: Ioctl, device: int, flags: int, index: int, start: int, count: int, data: bytes = b"") -> int:
    """VFIO_DEVICE_SET_IRQS. 0; or, arming nothing, how many vectors could have been had."""
    return ioctl(device, DEVICE_SET_IRQS, _filled(IRQ_SET, flags, index, start, count, tail=data))


def device_reset(ioctl: Ioctl, device: int) -> None:
    """VFIO_DEVICE_RESET."""
    ioctl(device, DEVICE_RESET, 0)


@dataclass(frozen=True, slots=True)
class HotReset:
    """What a hot reset would touch: `flags` HOT_RESET_FLAG_*, `devices` as (group or device id, BDF)."""

    flags: int
    devices: tuple[tuple[int, str], ...]


def hot_reset_info(ioctl: Ioctl, device: int) -> HotReset:
    """VFIO_DEVICE_GET_PCI_HOT_RESET_INFO. ENODEV: neither slot nor bus can be reset."""
    buffer = _filled(HOT_RESET_INFO, 0, 0)
    for _ in range(3):  # devices may come while we ask
        try:
            ioctl(device, DEVICE_GET_PCI_HOT_RESET_INFO, buffer)
            break
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            count = HOT_RESET_INFO.unpack_from(buffer)[2]
            buffer = _filled(HOT_RESET_INFO, 0, 0, tail=bytes(count * DEPENDENT_DEVICE.size))
    else:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    _, flags, count = HOT_RESET_INFO.unpack_from(buffer)
    room = (len(buffer) - HOT_RESET_INFO.size) // DEPENDENT_DEVICE.size
    devices = []
    for i in range(min(count, room)):
        known_as, segment, bus, devfn = DEPENDENT_DEVICE.unpack_from(
            buffer, HOT_RESET_INFO.size + i * DEPENDENT_DEVICE.size
        )
        devices.append((known_as, f"{segment:04x}:{bus:02x}:{devfn >> 3:02x}.{devfn & 7}"))
    return HotReset(flags, tuple(devices))


def hot_reset(ioctl: Ioctl, device: int, groups: Sequence[int]) -> None:
    """VFIO_DEVICE_PCI_HOT_RESET. `groups`: fds of all groups it touches; none on a cdev."""
    tail = struct.pack(f"={len(groups)}i", *groups)
    ioctl(device, DEVICE_PCI_HOT_RESET, _filled(HOT_RESET, 0, len(groups), tail=tail))


def device_feature(ioctl: Ioctl, device: int, flags: int, data: bytes = b"") -> bytes:
    """VFIO_DEVICE_FEATURE: the data behind the header, as long as `data`, as the kernel left it."""
    buffer = _filled(FEATURE, flags, tail=data)
    ioctl(device, DEVICE_FEATURE, buffer)
    return bytes(buffer[FEATURE.size :])


def precopy_info(ioctl: Ioctl, data_fd: int) -> tuple[int, int, int]:
    """VFIO_MIG_GET_PRECOPY_INFO of a data fd: flags, initial_bytes, dirty_bytes."""
    buffer = _filled(PRECOPY_INFO, 0, 0, 0)
    ioctl(data_fd, MIG_GET_PRECOPY_INFO, buffer)
    _, flags, initial_bytes, dirty_bytes = PRECOPY_INFO.unpack(buffer)
    return flags, initial_bytes, dirty_bytes


def bind_iommufd(ioctl: Ioctl, device: int, iommufd: int, token: bytes = b"") -> int:
    """VFIO_DEVICE_BIND_IOMMUFD: opens and resets the function; its id in the iommufd. `token`: 16 bytes, or none."""
    if token:
        held = bytearray(token)
        buffer = _filled(BIND_IOMMUFD_TOKEN, BIND_FLAG_TOKEN, iommufd, 0, address_of(held))
    else:
        buffer = _filled(BIND_IOMMUFD, 0, iommufd, 0)
    ioctl(device, DEVICE_BIND_IOMMUFD, buffer)
    return int(BIND_IOMMUFD.unpack_from(buffer)[3])


def attach(ioctl: Ioctl, device: int, page_table: int) -> int:
    """VFIO_DEVICE_ATTACH_IOMMUFD_PT: to an IOAS or a page table, in the place of what it was attached to before."""
    buffer = _filled(ATTACH_PT, 0, page_table)
    ioctl(device, DEVICE_ATTACH_IOMMUFD_PT, buffer)
    return int(ATTACH_PT.unpack(buffer)[2])


# --- iommufd


def destroy(ioctl: Ioctl, iommufd: int, known_as: int) -> None:
    """IOMMU_DESTROY of any object."""
    ioctl(iommufd, IOMMU_DESTROY, _filled(DESTROY, known_as))


def ioas_alloc(ioctl: Ioctl, iommufd: int) -> int:
    """IOMMU_IOAS_ALLOC: the id of a new, empty address space."""
    buffer = _filled(IOAS_ALLOC, 0, 0)
    ioctl(iommufd, IOMMU_IOAS_ALLOC, buffer)
    return int(IOAS_ALLOC.unpack(buffer)[2])


def ioas_iova_ranges(ioctl: Ioctl, iommufd: int, ioas: int) -> tuple[tuple[int, int], ...]:
    """IOMMU_IOAS_IOVA_RANGES: what may be mapped, (first, last)."""
    count = 16
    for _ in range(3):
        ranges = bytearray(count * IOVA_RANGE.size)
        buffer = _filled(IOAS_IOVA_RANGES, ioas, count, 0, address_of(ranges), 0)
        try:
            ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, buffer)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            count = IOAS_IOVA_RANGES.unpack(buffer)[2]
        else:
            count = IOAS_IOVA_RANGES.unpack(buffer)[2]
            return tuple(IOVA_RANGE.iter_unpack(ranges[: count * IOVA_RANGE.size]))
    raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))


def ioas_map(ioctl: Ioctl, iommufd: int, ioas: int, buffer: Any, iova: int) -> None:
    """IOMMU_IOAS_MAP of a page-aligned buffer of ours, for reading and writing, at `iova`."""
    flags = IOAS_MAP_FIXED_IOVA | IOAS_MAP_READABLE | IOAS_MAP_WRITEABLE
    ioctl(iommufd, IOMMU_IOAS_MAP, _filled(IOAS_MAP, flags, ioas, 0, address_of(buffer), len(buffer), iova))


def ioas_unmap(ioctl: Ioctl, iommufd: int, ioas: int, iova: int, length: int) -> None:
    """IOMMU_IOAS_UNMAP of whole maps."""
    ioctl(iommufd, IOMMU_IOAS_UNMAP, _filled(IOAS_UNMAP, ioas, iova, length))


def hwpt_alloc(ioctl: Ioctl, iommufd: int, device_id: int, ioas: int, flags: int) -> int:
    """IOMMU_HWPT_ALLOC: a page table of `ioas` for the device, with all its maps; it stays when nothing is attached."""
    buffer = _filled(HWPT_ALLOC, flags, device_id, ioas, 0, 0, 0, 0, 0, 0, 0)
    ioctl(iommufd, IOMMU_HWPT_ALLOC, buffer)
    return int(HWPT_ALLOC.unpack(buffer)[4])


def hwpt_set_dirty_tracking(ioctl: Ioctl, iommufd: int, page_table: int, *, on: bool) -> None:
    """IOMMU_HWPT_SET_DIRTY_TRACKING; turning it on clears what was dirty."""
    flags = HWPT_DIRTY_TRACKING_ENABLE if on else 0
    ioctl(iommufd, IOMMU_HWPT_SET_DIRTY_TRACKING, _filled(HWPT_SET_DIRTY_TRACKING, flags, page_table, 0))


def hwpt_get_dirty_bitmap(
    ioctl: Ioctl,
    iommufd: int,
    page_table: int,
    iova: int,
    length: int,
    page_size: int,
    bitmap: bytearray | memoryview,
    *,
    keep: bool = False,
) -> None:
    """IOMMU_HWPT_GET_DIRTY_BITMAP: sets the bits of what was written since the last call, and clears none. All of it
    must be mapped. `keep`: the IOMMU keeps what it tells, and tells it again.
    """
    at = address_of(bitmap)
    flags = HWPT_GET_DIRTY_BITMAP_NO_CLEAR if keep else 0
    buffer = _filled(HWPT_GET_DIRTY_BITMAP, page_table, flags, 0, iova, length, page_size, at)
    ioctl(iommufd, IOMMU_HWPT_GET_DIRTY_BITMAP, buffer)


def hw_capabilities(ioctl: Ioctl, iommufd: int, device_id: int) -> int:
    """IOMMU_GET_HW_INFO: HW_CAP_* of the IOMMU before the device."""
    buffer = _filled(HW_INFO, 0, device_id, 0, 0, 0, 0, 0)
    ioctl(iommufd, IOMMU_GET_HW_INFO, buffer)
    return int(HW_INFO.unpack(buffer)[7])


# --- structs with capabilities behind them

MAX_INFO = 1 << 16


def _grown(ioctl: Ioctl, fd: int, request: int, buffer: bytearray) -> bytearray:
    """Ask, and ask again with the room that the kernel says it needs: it answers a short argsz without capabilities."""
    size, asked = len(buffer), bytes(buffer)
    while True:
        ioctl(fd, request, buffer)
        needed = int(struct.unpack_from("=I", buffer)[0])
        if not size < needed <= MAX_INFO:
            return buffer
        size = needed
        buffer = bytearray(struct.pack("=I", size) + asked[4:] + bytes(size - len(asked)))


def capabilities(buffer: bytes | bytearray, offset: int) -> Iterator[tuple[int, int]]:
    """The capability list that begins at `offset` (0: none): (id, where its data begins)."""
    while offset and offset + CAP_HEADER.size <= len(buffer):
        cap, _, following = CAP_HEADER.unpack_from(buffer, offset)
        yield cap, offset + CAP_HEADER.size
        offset = following if following > offset else 0
