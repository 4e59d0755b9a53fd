"""Opening a function by its IOMMU group and a type1 container: the way of kernels without VFIO device nodes.

One container for one group: an address space that no other function shares. It must not know regions or interrupts.
"""

import errno
import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress

from vfu_server.errors import HostError
from vfu_server.host import ioctl as kernel_calls
from vfu_server.host.attachment import NO_TABLE, refusal
from vfu_server.host.checks import Way, nodes_of
from vfu_server.host.ioctl import HotReset, Kernel
from vfu_server.host.scratch import scratch_memory
from vfu_server.host.sysfs import Function
from vfu_server.host_device import Scratch
from vfu_server.libvfio_user.kernel_door import TYPE1, KernelDoor

UNSAFE_INTERRUPTS = (
    "this machine does not check interrupt messages (no interrupt remapping), and the kernel refuses DMA then",
    "switch interrupt remapping on in the firmware's set-up; or, if the guest may send this machine any interrupt:",
    "echo Y > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
)


class GroupAttachment:
    """A function that was opened through /dev/vfio/GROUP."""

    way = Way.GROUP
    ioas_id = TYPE1
    page_table = NO_TABLE
    tracks_dirty_pages = False
    """A type1 container reports every page of an ordinary device as dirty, always."""

    def __init__(self, kernel: Kernel, function: Function) -> None:
        self.device_fd = -1
        self.iommu_fd = -1
        self._group_fd = -1
        self._kernel = kernel
        self._function = function

    def open(self, token: str) -> None:
        """Open container, group and function, in the kernel's order. HostError says what failed and what helps."""
        container, group = nodes_of(Way.GROUP, self._function)
        call = self._kernel.ioctl
        try:
            self.iommu_fd = self._node(container)
            if kernel_calls.api_version(call, self.iommu_fd) != kernel_calls.API_VERSION:
                raise HostError(f"{container} speaks another version of VFIO", errno.EPROTO)
            if not kernel_calls.check_extension(call, self.iommu_fd, kernel_calls.TYPE1V2_IOMMU):
                failed = HostError("the kernel has no type1v2 IOMMU interface", errno.ENODEV)
                failed.add_note("modprobe vfio_iommu_type1")
                raise failed
            self._group_fd = self._node(group)
            if not kernel_calls.group_status(call, self._group_fd) & kernel_calls.GROUP_FLAGS_VIABLE:
                raise HostError(f"IOMMU group {self._function.group} is not viable", errno.EPERM)
            self._join_container()
            self.device_fd = self._function_fd(token)
        except BaseException:
            self.close()
            raise

    def _node(self, path: str) -> int:
        try:
            return self._kernel.open(path)
        except OSError as error:
            reasons = {
                errno.EBUSY: ("another process has it", f"fuser -v {path}"),
                errno.ENODEV: ("the function was just unbound",),
                errno.EPERM: ("no-IOMMU mode, or not permitted",),
            }
            raise refusal(path, error, reasons) from error

    def _join_container(self) -> None:
        call = self._kernel.ioctl
        try:
            kernel_calls.group_set_container(call, self._group_fd, self.iommu_fd)
        except OSError as error:
            reasons = {errno.EPERM: ("a driver of this machine uses a member of the group, or another process does",)}
            raise refusal(f"IOMMU group {self._function.group}", error, reasons) from error
        try:
            kernel_calls.set_iommu(call, self.iommu_fd, kernel_calls.TYPE1V2_IOMMU)
        except OSError as error:
            raise refusal("the IOMMU", error, {errno.EPERM: UNSAFE_INTERRUPTS}) from error

    def _function_fd(self, token: str) -> int:
        name = self._function.bdf + (f" vf_token={token}" if token else "")
        try:
            return kernel_calls.group_get_device_fd(self._kernel.ioctl, self._group_fd, name)
        except OSError as error:
            reasons = {
                errno.EACCES: ("the vf token is missing or wrong",),
                errno.EINVAL: ("the kernel does not want what was given with it, a vf token for instance",),
                errno.ENODEV: ("no VFIO driver has it any more",),
                errno.EBUSY: ("its IOMMU group is used in another way",),
            }
            raise refusal(self._function.bdf, error, reasons) from error

    def hot_reset_groups(self, info: HotReset) -> Sequence[int] | None:
        """See Attachment."""
        return [self._group_fd] if all(group == self._function.group for group, _ in info.devices) else None

    def scratch(self, door: KernelDoor, size: int, limit: int) -> AbstractAsyncContextManager[Scratch]:
        """See Attachment. In the one address space that there is: a hole of it, or the place of client memory."""
        return scratch_memory(door, size, limit, self.iova_ranges())

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """See Attachment. Kernels before 5.4 do not tell."""
        with suppress(OSError):
            return kernel_calls.iommu_info(self._kernel.ioctl, self.iommu_fd).ranges
        return ()

    def close(self) -> None:
        """See Attachment."""
        for fd in (self.device_fd, self._group_fd, self.iommu_fd):
            if fd >= 0:
                os.close(fd)
        self.device_fd = self._group_fd = self.iommu_fd = -1
