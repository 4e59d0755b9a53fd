"""What a function under kernel VFIO consists of: its regions and interrupts, in the door's records.

It asks and translates; nothing is mapped or armed here.
"""

import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from vfu_server import uapi
from vfu_server.errors import HostError
from vfu_server.host import ioctl as kernel_calls
from vfu_server.host.ioctl import Ioctl
from vfu_server.host_device import IrqInfo, MmapArea, RegionInfo

T = TypeVar("T")
KNOWN_FLAGS = uapi.REGION_INFO_FLAG_READ | uapi.REGION_INFO_FLAG_WRITE | uapi.REGION_INFO_FLAG_MMAP


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """All nine regions and five interrupt indexes, by index; `offsets`: where each region lies in the device fd."""

    can_reset: bool
    regions: tuple[RegionInfo, ...]
    offsets: tuple[int, ...]
    irqs: tuple[IrqInfo, ...]


def read_info(ioctl: Ioctl, device_fd: int) -> KernelInfo:
    """Ask for everything. HostError if it is no PCI device or the kernel does not answer."""
    try:
        flags, num_regions, num_irqs = kernel_calls.device_info(ioctl, device_fd)
        if not flags & uapi.DEVICE_FLAGS_PCI:
            raise HostError(f"this is no PCI function (VFIO_DEVICE_GET_INFO flags {flags:#x})", errno.ENODEV)
        regions = [
            _region(ioctl, device_fd, index) if index < num_regions else (RegionInfo(index, 0), 0)
            for index in range(uapi.NUM_REGIONS)
        ]
        irqs = [
            _irq(ioctl, device_fd, index) if index < num_irqs else IrqInfo(index, 0) for index in range(uapi.NUM_IRQS)
        ]
    except OSError as error:
        raise HostError(f"the kernel does not describe the function: {error.strerror}", error.errno) from error
    except struct.error as error:
        raise HostError(f"the kernel describes the function in a way that cannot be read: {error}") from error
    return KernelInfo(
        bool(flags & uapi.DEVICE_FLAGS_RESET),
        tuple(region for region, _ in regions),
        tuple(offset for _, offset in regions),
        tuple(irqs),
    )


def _or_absent(ask: Callable[[], T], absent: T) -> T:
    """The kernel answers EINVAL for what a function does not have: VGA, a ROM, AER."""
    try:
        return ask()
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return absent


def _region(ioctl: Ioctl, device_fd: int, index: int) -> tuple[RegionInfo, int]:
    none = bytearray(kernel_calls.REGION_INFO.size)
    buffer = _or_absent(lambda: kernel_calls.region_info(ioctl, device_fd, index), none)
    _, flags, _, cap_offset, size, offset = kernel_calls.REGION_INFO.unpack_from(buffer)
    areas: tuple[MmapArea, ...] = ()
    if size and flags & uapi.REGION_INFO_FLAG_MMAP:
        areas = (MmapArea(0, size),)
        if flags & uapi.REGION_INFO_FLAG_CAPS:
            sparse = _sparse_areas(buffer, cap_offset, size)
            areas = areas if sparse is None else sparse
    mapped = bool(areas)
    flags &= KNOWN_FLAGS if mapped else KNOWN_FLAGS & ~uapi.REGION_INFO_FLAG_MMAP
    fd, fd_offset = (device_fd, offset) if mapped else (-1, 0)
    return RegionInfo(index, size, flags, areas, fd, fd_offset), offset


def _sparse_areas(buffer: bytearray, cap_offset: int, size: int) -> tuple[MmapArea, ...] | None:
    """The areas of a sparse mmap capability, or None without one: then the whole region can be mapped."""
    for cap, at in kernel_calls.capabilities(buffer, cap_offset):
        if cap == uapi.REGION_INFO_CAP_SPARSE_MMAP:
            count, _ = uapi.SPARSE_HEADER.unpack_from(buffer, at)
            first = at + uapi.SPARSE_HEADER.size
            found = uapi.SPARSE_AREA.iter_unpack(buffer[first : first + count * uapi.SPARSE_AREA.size])
            return tuple(MmapArea(offset, length) for offset, length in found if length and offset + length <= size)
    return None


def _irq(ioctl: Ioctl, device_fd: int, index: int) -> IrqInfo:
    flags, count = _or_absent(lambda: kernel_calls.irq_info(ioctl, device_fd, index), (0, 0))
    return IrqInfo(index, count, flags if count else 0)
