"""Opening a function by its own device node and an iommufd: the way of kernels since 6.6.

The client's memory is one address space (IOAS) with a page table of its own that stays while the function is attached
elsewhere, so that scratch memory costs neither a map nor a pin of guest memory. It must not know regions or interrupts.
"""

import errno
import mmap
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import trio

from vfu_server.errors import HostError
from vfu_server.host import ioctl as kernel_calls
from vfu_server.host.attachment import NO_TABLE, refusal
from vfu_server.host.checks import Way, nodes_of
from vfu_server.host.ioctl import HotReset, Kernel
from vfu_server.host.scratch import find_place, scratch_memory
from vfu_server.host.sysfs import Function
from vfu_server.host_device import Scratch
from vfu_server.libvfio_user.kernel_door import KernelDoor
from vfu_server.uapi import HOST_PAGE_SIZE

# The kernel refuses to attach while the function is being reset; that is over soon.
ATTACH_TRIES = 20
ATTACH_PAUSE = 0.05

UNSAFE_INTERRUPTS = (
    "another process has its group, or this machine does not check interrupt messages (no interrupt remapping)",
    "switch interrupt remapping on in the firmware's set-up; or, if the guest may send this machine any interrupt:",
    "echo Y > /sys/module/iommufd/parameters/allow_unsafe_interrupts",
)


class CdevAttachment:
    """A function that was opened through /dev/vfio/devices/vfioN."""

    way = Way.CDEV

    def __init__(self, kernel: Kernel, function: Function) -> None:
        self.device_fd = -1
        self.iommu_fd = -1
        self.ioas_id = 0
        self.page_table = NO_TABLE
        self.tracks_dirty_pages = False
        self._kernel = kernel
        self._function = function
        self._device_id = 0

    def open(self, token: str, device_fd: int = -1, iommu_fd: int = -1) -> None:
        """Open both nodes, or take open fds over from a launcher; bind, and attach to a new, empty address space."""
        iommu_node, device_node = nodes_of(Way.CDEV, self._function)
        self.device_fd, self.iommu_fd = device_fd, iommu_fd
        call = self._kernel.ioctl
        try:
            if iommu_fd < 0:
                self.iommu_fd = self._node(iommu_node)
            if device_fd < 0:
                self.device_fd = self._node(device_node)
            self._bind(token)
            self.ioas_id = kernel_calls.ioas_alloc(call, self.iommu_fd)
            self._make_table()
            self._attach_to_table()
        except OSError as error:
            self.close()
            raise refusal("the address space for the client's memory", error, {}) from error
        except BaseException:
            self.close()
            raise

    @property
    def _main(self) -> int:
        return self.ioas_id if self.page_table == NO_TABLE else self.page_table

    def _node(self, path: str) -> int:
        try:
            return self._kernel.open(path)
        except OSError as error:
            reasons = {errno.ENODEV: ("the function was just unbound",)}
            raise refusal(path, error, reasons) from error

    def _bind(self, token: str) -> None:
        raw = uuid.UUID(token).bytes if token else b""
        try:
            self._device_id = kernel_calls.bind_iommufd(self._kernel.ioctl, self.device_fd, self.iommu_fd, raw)
        except OSError as error:
            node = nodes_of(Way.CDEV, self._function)[1]
            reasons = {
                errno.EINVAL: (
                    "it is in use already, or the kernel does not take a vf token this way",
                    f"fuser -v {node}",
                ),
                errno.EBUSY: (
                    "its IOMMU group is in use, by a process through /dev/vfio or by a driver of this machine",
                    f"fuser -v /dev/vfio/{self._function.group} {node}",
                ),
                errno.EACCES: ("the vf token is missing or wrong",),
                errno.EPERM: UNSAFE_INTERRUPTS,
            }
            raise refusal(self._function.bdf, error, reasons) from error

    def _make_table(self) -> None:
        """A page table of our own, with dirty bits if the IOMMU writes them (kernels before 6.7 do not tell)."""
        call, flags = self._kernel.ioctl, 0
        with suppress(OSError):
            known = kernel_calls.hw_capabilities(call, self.iommu_fd, self._device_id)
            if known & kernel_calls.HW_CAP_DIRTY_TRACKING:
                flags = kernel_calls.HWPT_ALLOC_DIRTY_TRACKING
        for wanted in dict.fromkeys((flags, 0)):
            with suppress(OSError):
                device = self._device_id
                self.page_table = kernel_calls.hwpt_alloc(call, self.iommu_fd, device, self.ioas_id, wanted)
                self.tracks_dirty_pages = bool(wanted)
                return

    def _attach_to_table(self) -> None:
        """To our page table. Where there is none (6.6, some IOMMUs) or it does not suit, the kernel keeps one for us
        while the function is attached to the address space.
        """
        try:
            self._attach(self._main)
        except HostError:
            if self.page_table == NO_TABLE:
                raise
            kernel_calls.destroy(self._kernel.ioctl, self.iommu_fd, self.page_table)
            self.page_table, self.tracks_dirty_pages = NO_TABLE, False
            self._attach(self.ioas_id)

    def _attach(self, page_table: int) -> None:
        try:
            kernel_calls.attach(self._kernel.ioctl, self.device_fd, page_table)
        except OSError as error:
            raise refusal(f"{self._function.bdf} and its IOMMU", error, {errno.EPERM: UNSAFE_INTERRUPTS}) from error

    def hot_reset_groups(self, info: HotReset) -> Sequence[int] | None:
        """See Attachment. The kernel itself says whether all that would be reset is ours."""
        owned = kernel_calls.HOT_RESET_FLAG_DEV_ID | kernel_calls.HOT_RESET_FLAG_DEV_ID_OWNED
        return () if info.flags & owned == owned else None

    # scratch memory

    def scratch(self, door: KernelDoor, size: int, limit: int) -> AbstractAsyncContextManager[Scratch]:
        """See Attachment. An address space of its own: client memory is out of the device's reach for that time."""
        if self.page_table == NO_TABLE:
            return scratch_memory(door, size, limit, self._ranges(self.ioas_id))
        return self._own_space(size, limit)

    def iova_ranges(self) -> Sequence[tuple[int, int]]:
        """See Attachment."""
        return self._ranges(self.ioas_id)

    def _ranges(self, ioas: int) -> tuple[tuple[int, int], ...]:
        try:
            return kernel_calls.ioas_iova_ranges(self._kernel.ioctl, self.iommu_fd, ioas)
        except OSError as error:
            raise HostError(f"the IOMMU's usable addresses cannot be read: {error.strerror}", error.errno) from error

    @asynccontextmanager
    async def _own_space(self, size: int, limit: int) -> AsyncIterator[Scratch]:
        size = -(-size // HOST_PAGE_SIZE) * HOST_PAGE_SIZE
        # Given back when the last view of it is gone: a plugin may have kept one.
        memory = mmap.mmap(-1, size)
        space = self._new_space()
        try:
            await self._attach_soon(space)
            iova = await trio.to_thread.run_sync(self._map_scratch, space, memory, limit)
            yield Scratch(iova, memoryview(memory))
        finally:
            with trio.CancelScope(shield=True):
                await self._leave(space)

    def _new_space(self) -> int:
        try:
            return kernel_calls.ioas_alloc(self._kernel.ioctl, self.iommu_fd)
        except OSError as error:
            raise HostError(f"no address space for scratch memory: {error.strerror}", error.errno) from error

    def _map_scratch(self, space: int, memory: mmap.mmap, limit: int) -> int:
        iova = find_place((), len(memory), limit, self._ranges(space))
        if iova is None:
            raise HostError(f"no room for {len(memory)} bytes of scratch memory below {limit:#x}", errno.ENOSPC)
        try:
            kernel_calls.ioas_map(self._kernel.ioctl, self.iommu_fd, space, memory, iova)
        except OSError as error:
            raise HostError(f"scratch memory at iova {iova:#x}: {error.strerror}", error.errno) from error
        return iova

    async def _leave(self, space: int) -> None:
        """Back to the client's memory. If that fails, the device is left in a space without memory: no harm is done."""
        call = self._kernel.ioctl
        with suppress(OSError):
            await trio.to_thread.run_sync(kernel_calls.ioas_unmap, call, self.iommu_fd, space, 0, (1 << 64) - 1)
        await self._attach_soon(self._main)
        with suppress(OSError):
            kernel_calls.destroy(call, self.iommu_fd, space)

    async def _attach_soon(self, page_table: int) -> None:
        for left in reversed(range(ATTACH_TRIES)):
            try:
                await trio.to_thread.run_sync(self._attach, page_table)
                return
            except HostError as error:
                if error.errno != errno.EBUSY or not left:
                    raise
            await trio.sleep(ATTACH_PAUSE)

    def close(self) -> None:
        """See Attachment."""
        for fd in (self.device_fd, self.iommu_fd):
            if fd >= 0:
                os.close(fd)
        self.device_fd = self.iommu_fd = -1
