"""What the two ways of opening a function have in common (`Attachment`), and their errors in words.

An Attachment owns the fds of one open function and knows its IOMMU interface; regions, interrupts and features are the
same on both and none of its business.
"""

import errno
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from vfu_server.errors import HostError
from vfu_server.host.checks import Way
from vfu_server.host.ioctl import HotReset
from vfu_server.host_device import Scratch
from vfu_server.libvfio_user.kernel_door import KernelDoor

NO_TABLE = -1


class Attachment(Protocol):
    """One open function."""

    way: Way
    device_fd: int
    iommu_fd: int
    """Type1 container or iommufd."""
    ioas_id: int
    """`kernel_door.TYPE1`, or the client's address space in the iommufd."""
    page_table: int
    """Id of the client's page table in the iommufd, or NO_TABLE."""
    tracks_dirty_pages: bool
    """That page table has dirty bits: the IOMMU can tell which pages the device wrote."""

    def hot_reset_groups(self, info: HotReset) -> Sequence[int] | None:
        """The fds to pass to a hot reset, or None where it would touch what is not ours."""
        ...

    def iova_ranges(self) -> Sequence[tuple[int, int]]:
        """Where the IOMMU takes addresses, as (first, last), ascending; none: it does not tell. HostError."""
        ...

    def scratch(self, door: KernelDoor, size: int, limit: int) -> AbstractAsyncContextManager[Scratch]:
        """See HostDevice.scratch."""
        ...

    def close(self) -> None:
        """Close all fds; the kernel then stops, resets and releases the function. Idempotent. Blocks."""
        ...


def refusal(what: str, error: OSError, reasons: Mapping[int, tuple[str, ...]]) -> HostError:
    """A failed step of opening, with what its errno usually means and the way out: (meaning, commands...)."""
    meaning, *cure = reasons.get(error.errno or 0, ("",))
    text = f"{what}: {error.strerror}"
    found = HostError(f"{text}: {meaning}" if meaning else text, error.errno or errno.EIO)
    for line in cure:
        found.add_note(line)
    return found
