"""Owns kernel VFIO as the test machine sees it without the product: ioctls written out, by group and by cdev.

Numbers and layouts are those of linux/vfio.h and linux/iommufd.h. One object is one open device with a DMA space.
"""

import ctypes
import fcntl
import mmap
import os
import select
import struct
from pathlib import Path
from typing import Self

from tests.vm.guest import pci

VFIO_BASE = 0x3B64
GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU = VFIO_BASE, VFIO_BASE + 1, VFIO_BASE + 2
GROUP_GET_STATUS, GROUP_SET_CONTAINER, GROUP_GET_DEVICE_FD = VFIO_BASE + 3, VFIO_BASE + 4, VFIO_BASE + 6
DEVICE_GET_INFO, DEVICE_GET_REGION_INFO, DEVICE_GET_IRQ_INFO = VFIO_BASE + 7, VFIO_BASE + 8, VFIO_BASE + 9
DEVICE_SET_IRQS, DEVICE_RESET = VFIO_BASE + 10, VFIO_BASE + 11
TYPE1_MAP_DMA, TYPE1_UNMAP_DMA = VFIO_BASE + 13, VFIO_BASE + 14
DEVICE_BIND_IOMMUFD, DEVICE_ATTACH_IOMMUFD_PT = VFIO_BASE + 18, VFIO_BASE + 19
IOAS_ALLOC, IOAS_MAP, IOAS_UNMAP = 0x3B81, 0x3B85, 0x3B86
TYPE1V2 = 3
GROUP_VIABLE = 1
CONFIG_REGION = 7
MSI, MSIX = 1, 2
EVENTFD_TRIGGER = 0x4 | 0x20
COMMAND, COMMAND_MEMORY, COMMAND_MASTER = 4, 0x2, 0x4


def address_of(memory: mmap.mmap) -> int:
    """Where the mapping is in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class RawDevice:
    """What both ways of opening have in common; `fd` is the device's, the others close with it."""

    def __init__(self, fd: int, others: list[int]) -> None:
        self.fd = fd
        self._others = others

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A device that stays open blocks whoever unbinds it, for good.
        for fd in (self.fd, *self._others):
            os.close(fd)

    def info(self) -> tuple[int, int, int]:
        """Flags, number of regions, number of interrupt indexes."""
        buffer = bytearray(struct.pack("=6I", 24, 0, 0, 0, 0, 0))
        fcntl.ioctl(self.fd, DEVICE_GET_INFO, buffer)
        return struct.unpack_from("=4x3I", buffer)

    def region(self, index: int) -> tuple[int, int]:
        """Size and offset in the device's file."""
        buffer = bytearray(struct.pack("=4I2Q", 32, 0, index, 0, 0, 0))
        fcntl.ioctl(self.fd, DEVICE_GET_REGION_INFO, buffer)
        return struct.unpack_from("=16x2Q", buffer)

    def irq_count(self, index: int) -> int:
        """How many interrupts the index has."""
        buffer = bytearray(struct.pack("=4I", 16, 0, index, 0))
        fcntl.ioctl(self.fd, DEVICE_GET_IRQ_INFO, buffer)
        return struct.unpack_from("=12xI", buffer)[0]

    def read(self, index: int, offset: int, width: int) -> int:
        """One access to a region."""
        return int.from_bytes(os.pread(self.fd, width, self.region(index)[1] + offset), "little")

    def write(self, index: int, offset: int, width: int, value: int) -> None:
        """One access to a region."""
        os.pwrite(self.fd, value.to_bytes(width, "little"), self.region(index)[1] + offset)

    def map_region(self, index: int) -> mmap.mmap:
        """The region as memory."""
        size, offset = self.region(index)
        return mmap.mmap(self.fd, size, mmap.MAP_SHARED, offset=offset)

    def enable(self) -> None:
        """Let the device be reached by memory accesses, and reach memory itself."""
        command = self.read(CONFIG_REGION, COMMAND, 2)
        self.write(CONFIG_REGION, COMMAND, 2, command | COMMAND_MEMORY | COMMAND_MASTER)

    def arm_msi(self) -> int:
        """An eventfd that the device's first message signals."""
        eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        fcntl.ioctl(self.fd, DEVICE_SET_IRQS, struct.pack("=5Ii", 24, EVENTFD_TRIGGER, MSI, 0, 1, eventfd))
        return eventfd

    def reset(self) -> None:
        """DEVICE_RESET; OSError where the function has no way to be reset."""
        fcntl.ioctl(self.fd, DEVICE_RESET)

    def map(self, memory: mmap.mmap, iova: int) -> None:
        """Let the device reach all of `memory` from `iova` on."""
        raise AssertionError("a way of opening defines this")

    def unmap(self, iova: int, size: int) -> None:
        """Undo `map`."""
        raise AssertionError("a way of opening defines this")


class GroupDevice(RawDevice):
    """By the legacy group and a type1v2 container."""

    def __init__(self, bdf: str) -> None:
        self._container = os.open("/dev/vfio/vfio", os.O_RDWR)
        group = os.open(f"/dev/vfio/{pci.group(bdf)}", os.O_RDWR)
        if fcntl.ioctl(self._container, GET_API_VERSION) or not fcntl.ioctl(self._container, CHECK_EXTENSION, TYPE1V2):
            raise AssertionError("the kernel's VFIO containers are not of the one known version and type")
        status = bytearray(struct.pack("=2I", 8, 0))
        fcntl.ioctl(group, GROUP_GET_STATUS, status)
        if not struct.unpack("=2I", status)[1] & GROUP_VIABLE:
            raise AssertionError(f"the group is not viable: {pci.group_members(bdf)}")
        fcntl.ioctl(group, GROUP_SET_CONTAINER, struct.pack("=i", self._container))
        fcntl.ioctl(self._container, SET_IOMMU, TYPE1V2)
        fd = fcntl.ioctl(group, GROUP_GET_DEVICE_FD, bytearray(bdf.encode() + b"\0"))
        super().__init__(fd, [group, self._container])

    def map(self, memory: mmap.mmap, iova: int) -> None:
        fcntl.ioctl(self._container, TYPE1_MAP_DMA, struct.pack("=2I3Q", 32, 3, address_of(memory), iova, len(memory)))

    def unmap(self, iova: int, size: int) -> None:
        fcntl.ioctl(self._container, TYPE1_UNMAP_DMA, struct.pack("=2I2Q", 24, 0, iova, size))


class CdevDevice(RawDevice):
    """By the character device and an address space of iommufd."""

    def __init__(self, bdf: str) -> None:
        (node,) = (pci.DEVICES / bdf / "vfio-dev").iterdir()
        fd = os.open(Path("/dev/vfio/devices") / node.name, os.O_RDWR)
        self._iommu = os.open("/dev/iommu", os.O_RDWR)
        fcntl.ioctl(fd, DEVICE_BIND_IOMMUFD, bytearray(struct.pack("=2Ii I", 16, 0, self._iommu, 0)))
        allocated = bytearray(struct.pack("=3I", 12, 0, 0))
        fcntl.ioctl(self._iommu, IOAS_ALLOC, allocated)
        self._ioas = struct.unpack("=3I", allocated)[2]
        fcntl.ioctl(fd, DEVICE_ATTACH_IOMMUFD_PT, bytearray(struct.pack("=3I", 12, 0, self._ioas)))
        super().__init__(fd, [self._iommu])

    def map(self, memory: mmap.mmap, iova: int) -> None:
        fixed_writeable_readable = 0x7
        wanted = struct.pack(
            "=4I3Q", 40, fixed_writeable_readable, self._ioas, 0, address_of(memory), len(memory), iova
        )
        fcntl.ioctl(self._iommu, IOAS_MAP, bytearray(wanted))

    def unmap(self, iova: int, size: int) -> None:
        fcntl.ioctl(self._iommu, IOAS_UNMAP, bytearray(struct.pack("=2I2Q", 24, self._ioas, iova, size)))


def wait_eventfd(eventfd: int, seconds: float = 60.0) -> int:
    """How often it was signalled, at least once; AssertionError when it was not."""
    if not select.select([eventfd], [], [], seconds)[0]:
        raise AssertionError(f"no interrupt within {seconds:g} s")
    return os.eventfd_read(eventfd)
