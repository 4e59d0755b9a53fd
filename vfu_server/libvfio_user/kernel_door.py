"""The C door to a function under kernel VFIO: registers through the device fd, guest memory through the IOMMU.

It opens nothing and closes none of the fds that it is given; what the kernel's device is like is `host.kernel`'s.
"""

from typing import Any

from vfu_server.libvfio_user.door import MAX_DMA_MAPS, NativeDoor
from vfu_server.libvfio_user.native import check, ffi, lib

TYPE1 = 0
"""In the place of an IOAS id: the IOMMU's fd is a type1 container. No IOAS has this id."""


class KernelDoor(NativeDoor):
    """Accesses and maps of one function. Maps without fd are written down and not made reachable for the device.

    `calls`: a `struct vs_kernel_calls *` for a test that stands in the kernel's place.
    """

    def __init__(self, device_fd: int, iommu_fd: int, ioas_id: int = TYPE1, calls: Any = None) -> None:
        pointer = lib.vs_kernel_open(device_fd, iommu_fd, ioas_id, MAX_DMA_MAPS, ffi.NULL if calls is None else calls)
        if pointer == ffi.NULL:
            raise MemoryError
        super().__init__(pointer)

    def set_region(self, index: int, offset: int, size: int) -> None:
        """Where a region lies in the device fd, as the kernel has told."""
        check(lib.vs_kernel_set_region(self.pointer, index, offset, size))

    def mark_gone(self) -> None:
        """Give the device up: accesses fail with ENODEV, maps are kept in the books only."""
        lib.vs_kernel_mark_gone(self.pointer)
