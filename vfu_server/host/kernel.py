"""The door to a real PCI function under kernel VFIO, or to a mediated one: `open_bdf`, `open_mdev`, what they return.

Registers and guest memory go through the C door, interrupts straight from the kernel to the client's eventfds; here
are the steps in between. It knows nothing of clients, policy or migration.
"""

import errno
import logging
import os
import struct
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import TypeVar

import trio

from vfu_server import uapi
from vfu_server.errors import DeviceGoneError, HostError, UsageError
from vfu_server.host import checks
from vfu_server.host import ioctl as kernel_calls
from vfu_server.host.attachment import Attachment
from vfu_server.host.cdev import CdevAttachment
from vfu_server.host.checks import Status, Way
from vfu_server.host.group import GroupAttachment
from vfu_server.host.in_kernel import InKernel
from vfu_server.host.ioctl import Kernel
from vfu_server.host.kernel_dirty import LOGGING, IommuLog
from vfu_server.host.kernel_feature import device_feature, merge_dirty
from vfu_server.host.kernel_info import KernelInfo, read_info
from vfu_server.host.kernel_irqs import KernelIrqs
from vfu_server.host.kernel_migration import KernelMigration
from vfu_server.host.kernel_reset import Ladder, resets_unannounced
from vfu_server.host.sysfs import Function, Sysfs
from vfu_server.host_device import (
    DmaMap,
    HostEvent,
    HostStatistics,
    Identity,
    IrqInfo,
    MigrationDoor,
    RegionInfo,
    Scratch,
)
from vfu_server.libvfio_user.kernel_door import KernelDoor
from vfu_server.uapi import Command, Feature, IrqIndex, RegionIndex

log = logging.getLogger(__name__)

T = TypeVar("T")

ALL_ONES = 0xFFFFFFFF
SETTLE_DEADLINE = 1.0
"""Seconds for what a driver that migrates is still at when the function is to be closed."""
EVENT_WORDS = {
    IrqIndex.ERR: ("error", "the function reports an error that it does not recover from (AER)"),
    IrqIndex.REQ: ("request", "the kernel wants the function back: an unbind or a removal waits until it is closed"),
}

NO_MEMORY_BIT = "a virtual function has no memory-enable bit: the kernel lets mappings fault in again at once"
MEDIATED = "the driver of a mediated device decides over its mappings, not the kernel's vfio-pci"

_open_here: set[str] = set()
"""BDFs that this process has open: a hot reset must not hit one of them by the way."""


async def open_bdf(
    bdf: str, *, kernel: Kernel | None = None, vf_token: str = "", vfio_fd: int = -1, iommu_fd: int = -1
) -> "KernelHost":
    """Open the function at `bdf`: by its device node and an iommufd where there are, by its group else.

    The kernel resets the function. `vfio_fd` and `iommu_fd`: open fds of both nodes from a launcher, the door's from
    now on, also if it fails. HostError says what is wrong, its notes what an operator types.
    """
    inherited = (vfio_fd, iommu_fd) if vfio_fd >= 0 and iommu_fd >= 0 else None
    return await trio.to_thread.run_sync(_open, kernel or Kernel(), bdf, Sysfs.function, vf_token, inherited)


async def open_mdev(uuid: str, *, kernel: Kernel | None = None) -> "KernelHost":
    """Open the mediated device `uuid` (an mdev), in the same two ways. Its driver is its IOMMU as well."""
    return await trio.to_thread.run_sync(_open, kernel or Kernel(), uuid, Sysfs.mdev, "", None)


def _open(
    kernel: Kernel,
    address: str,
    find: Callable[[Sysfs, str], Function],
    token: str,
    inherited: tuple[int, int] | None,
) -> "KernelHost":
    sysfs = Sysfs(kernel.root)
    try:
        function = _checked(kernel, sysfs, lambda: find(sysfs, address), token, inherited=inherited is not None)
    except BaseException:
        for fd in inherited or ():
            os.close(fd)
        raise
    attachment: Attachment
    if inherited or checks.usable_way(kernel, function) is Way.CDEV:
        attachment = cdev = CdevAttachment(kernel, function)
        cdev.open(token, *(inherited or ()))
    else:
        attachment = group = GroupAttachment(kernel, function)
        group.open(token)
    try:
        host = KernelHost(kernel, function, attachment)
    except BaseException:
        attachment.close()
        raise
    limit, privileged = checks.memlock_of_process(sysfs)
    memlock = checks.check_memlock(limit, privileged=privileged)
    if memlock.status is Status.WARN:
        log.warning("%s: %s", memlock.text, "; ".join(memlock.cure))
    log.info("%s is open (%s, driver %s)", address, attachment.way.value, function.driver)
    return host


def _checked(kernel: Kernel, sysfs: Sysfs, find: Callable[[], Function], token: str, *, inherited: bool) -> Function:
    if token:
        try:
            uuid.UUID(token)
        except ValueError:
            raise UsageError(f"{token!r} is no vf token: it is a UUID") from None
    function = find()
    for finding in checks.before_opening(kernel, sysfs, function, token):
        if finding.status is Status.FAIL and not (inherited and finding.name == "permission"):
            raise finding.error()
        if finding.status is Status.WARN:
            log.warning("%s", finding.text)
    return function


class KernelHost:
    """A HostDevice under kernel VFIO. Made by `open_bdf`."""

    def __init__(self, kernel: Kernel, function: Function, attachment: Attachment) -> None:
        self.name = function.bdf
        self.function = function
        self.dma_by_messages = False
        self.cannot_revoke = NO_MEMORY_BIT if function.physical_function else MEDIATED if function.mdev_type else ""
        self.relay: Callable[[Command, bytes], Awaitable[bytes]] | None = None
        """Not used: a real function reaches memory through the IOMMU, or not at all."""
        self._kernel = kernel
        self._attachment = attachment
        self._closed = False
        self._irq_lock = trio.Lock()
        info = read_info(kernel.ioctl, attachment.device_fd)
        self.regions: Sequence[RegionInfo] = info.regions
        self.irqs: Sequence[IrqInfo] = info.irqs
        self._iommu_log: IommuLog | None = None
        by_function = info.can_reset or (bool(function.mdev_type) and resets_unannounced(kernel.ioctl, attachment))
        self._in_kernel = InKernel(self.name)
        self._ladder = Ladder(kernel.ioctl, self.name, attachment, _open_here, self._in_kernel, by_function=by_function)
        self.can_reset = self._ladder.exists()
        self._irqs = KernelIrqs(kernel.ioctl, attachment.device_fd, info.irqs)
        try:
            self._irqs.watch()
            self._door = self._make_door(info)
        except OSError as error:
            self._irqs.close()
            raise HostError(f"{self.name} cannot be set up: {error.strerror}", error.errno) from error
        self._logs_itself = self._keeps_log()
        if attachment.tracks_dirty_pages and not self._logs_itself:
            table = attachment.page_table
            self._iommu_log = IommuLog(kernel.ioctl, attachment.iommu_fd, table, self._door.dma_maps)
        migrator = function.mdev_type or function.driver
        self._states = KernelMigration.find(kernel, attachment.device_fd, self.name, migrator)
        self.migration: MigrationDoor | None = self._states
        _open_here.add(self.name)

    def _make_door(self, info: KernelInfo) -> KernelDoor:
        at = self._attachment
        door = KernelDoor(at.device_fd, at.iommu_fd, at.ioas_id, self._kernel.door_calls)
        try:
            for region, offset in zip(info.regions, info.offsets, strict=True):
                door.set_region(region.index, offset, region.size)
        except OSError:
            door.close()
            raise
        return door

    def _keeps_log(self) -> bool:
        probe = uapi.FEATURE_PROBE | uapi.FEATURE_SET | Feature.DMA_LOGGING_START
        try:
            device_feature(self._kernel.ioctl, self._attachment.device_fd, probe, b"", 0)
        except OSError:
            return False
        return True

    @property
    def dirty_source(self) -> str:
        """Who tells which pages the device has written, for people; nothing: nobody."""
        return "the device's driver" if self._logs_itself else "the IOMMU" if self._iommu_log else ""

    @property
    def iova_ranges(self) -> Sequence[tuple[int, int]]:
        """See HostDevice."""
        self._check_open()
        return self._attachment.iova_ranges()

    @property
    def native(self) -> KernelDoor:
        """The C door."""
        return self._door

    @property
    def is_open(self) -> bool:
        """It was not closed yet."""
        return not self._closed

    @property
    def attachment(self) -> Attachment:
        """How the function was opened, for a report."""
        return self._attachment

    # registers

    def read(self, region: int, offset: int, width: int) -> int:
        """See HostDevice."""
        return int.from_bytes(self._call(lambda: self._door.read(region, offset, width)), "little")

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """See HostDevice."""
        self._call(lambda: self._door.write(region, offset, value.to_bytes(width, "little")))

    def read_block(self, region: int, offset: int, length: int) -> bytes:
        """See HostDevice."""
        return self._call(lambda: self._door.read(region, offset, length))

    def write_block(self, region: int, offset: int, data: bytes) -> None:
        """See HostDevice."""
        self._call(lambda: self._door.write(region, offset, data))

    def write_wide(self, region: int, offset: int, data: bytes) -> None:
        """See HostDevice. Through a mapping of the BAR's page; a virtual function's memory space is always on."""
        if not self.function.physical_function and not (
            self.read(RegionIndex.CONFIG, uapi.PCI_COMMAND, 2) & uapi.PCI_COMMAND_MEMORY
        ):
            raise HostError(f"{self.name}: a write of 16 bytes while its memory space is off", errno.EIO)
        self._call(lambda: self._door.write_wide(region, offset, data))

    def identity(self) -> Identity:
        """See HostDevice. VFIO tells no firmware version."""
        header = self.read_block(RegionIndex.CONFIG, 0, 64)
        vendor, device = struct.unpack_from("<HH", header, uapi.PCI_VENDOR_ID)
        subsystem_vendor, subsystem = struct.unpack_from("<HH", header, uapi.PCI_SUBSYSTEM_VENDOR_ID)
        class_code = int.from_bytes(header[uapi.PCI_CLASS_PROG : uapi.PCI_CLASS_PROG + 3], "little")
        return Identity(vendor, device, subsystem_vendor, subsystem, header[uapi.PCI_REVISION_ID], class_code)

    # interrupts

    async def set_irqs(
        self, index: int, flags: int, start: int, count: int, data: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        """See HostDevice. Masking and firing are made at once, since a client without KVM does it at each interrupt."""
        async with self._irq_lock:
            if flags & uapi.IRQ_SET_DATA_TYPE_MASK == uapi.IRQ_SET_DATA_EVENTFD or not count:
                await self._in_thread(lambda: self._irqs.set_irqs(index, flags, start, count, data, fds), "interrupts")
            else:
                self._call(lambda: self._irqs.set_irqs(index, flags, start, count, data, fds))

    def events(self) -> AsyncIterator[HostEvent]:
        """See HostDevice. ERR and REQ, and whether the function still answers when one of them came."""
        return _Events(self._next_events)

    async def _next_events(self) -> list[HostEvent]:
        """What happens next; nothing: there will be no more."""
        fired: list[IrqIndex] = []
        while self.is_open and not self._door.gone and not fired:
            try:
                await trio.lowlevel.wait_readable(self._irqs.fileno())
            except trio.ClosedResourceError:
                break
            fired = await self._take_fired()
        found = [HostEvent(*EVENT_WORDS[index]) for index in fired]
        if found and self._is_dead():
            self._door.mark_gone()
            found.append(HostEvent("gone", "the function does not answer any more: its registers read as all ones"))
        return found

    async def _take_fired(self) -> list[IrqIndex]:
        async with self._irq_lock:
            return self._call(self._irqs.fired) if self.is_open else []

    def _is_dead(self) -> bool:
        """Revision and class come from the hardware, while the kernel makes up the ids of config space."""
        try:
            return self.read(RegionIndex.CONFIG, uapi.PCI_REVISION_ID, 4) == ALL_ONES
        except HostError:
            return True

    # memory

    async def dma_map(self, dma_map: DmaMap) -> None:
        """See HostDevice. Memory without fd is written down and stays out of the device's reach."""
        try:
            await self._in_thread(lambda: self._door.dma_map(dma_map), "DMA map")
        except HostError as error:
            if error.errno == errno.ENOMEM:
                error.add_note("guest memory is locked: see RLIMIT_MEMLOCK (LimitMEMLOCK=infinity in the unit)")
            elif error.errno == errno.ENOSPC:
                error.add_note("see /sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
            raise

    async def dma_unmap(self, iova: int, size: int) -> None:
        """See HostDevice."""
        await self._in_thread(lambda: self._door.dma_unmap(iova, size), "DMA unmap")

    async def dma_unmap_all(self) -> None:
        """See HostDevice."""
        try:
            await self._in_thread(self._door.dma_unmap_all, "DMA unmap")
        except DeviceGoneError:
            return

    async def is_peer(self, fd: int) -> bool:
        """See HostDevice. Asked of the file itself: a name under /dev says nothing."""
        try:
            await self._in_thread(lambda: kernel_calls.device_info(self._kernel.ioctl, fd), "device info")
        except HostError:
            return False
        return True

    def scratch(self, size: int, limit: int = 1 << 64) -> AbstractAsyncContextManager[Scratch | None]:
        """See HostDevice. With an iommufd an address space of its own, else a part of the client's."""
        return self._attachment.scratch(self._door, size, limit)

    # requests

    async def reset(self) -> str:
        """See HostDevice: DEVICE_RESET, else a hot reset that hits nobody else."""
        self._check_open()
        if self._door.gone:
            raise DeviceGoneError(f"{self.name} is gone")
        return await self._ladder.reset()

    async def device_feature(self, flags: int, data: bytes = b"", reply_size: int = 0) -> bytes:
        """See HostDevice. A data fd in a reply is the caller's to close.

        Where the driver keeps no log of the device's DMA but the IOMMU can tell, the IOMMU's is given for it.
        """
        if self._iommu_log is not None and flags & uapi.FEATURE_ID_MASK in LOGGING:
            of_iommu = self._iommu_log
            return await self._in_thread(lambda: of_iommu.feature(flags, data, reply_size), "dirty bits")
        device = self._attachment.device_fd
        return await self._in_thread(
            lambda: device_feature(self._kernel.ioctl, device, flags, data, reply_size), "feature"
        )

    async def merge_dirty(self, iova: int, length: int, page_size: int, bits: memoryview) -> None:
        """See DirtyDoor."""
        if self._iommu_log is not None:
            of_iommu = self._iommu_log
            await self._in_thread(lambda: of_iommu.merge(iova, length, page_size, bits), "dirty bits")
            return
        device = self._attachment.device_fd
        await self._in_thread(
            lambda: merge_dirty(self._kernel.ioctl, device, iova, length, page_size, bits), "dirty bits"
        )

    def statistics(self) -> HostStatistics:
        """See HostDevice."""
        numbers = self._door.numbers()
        slow = self._in_kernel.slow
        return HostStatistics(numbers.dma_maps, numbers.dma_bytes, numbers.requests, numbers.errors, slow)

    async def aclose(self) -> None:
        """See HostDevice. The kernel stops, resets and releases the function when its last fd is closed; a client that
        was handed the device's fd for a mapping keeps it open until it closes that.
        """
        if not self.is_open:
            return
        self._closed = True
        trio.lowlevel.notify_closing(self._irqs.fileno())
        with trio.CancelScope(shield=True):
            if self._states is not None:
                with trio.move_on_after(SETTLE_DEADLINE):
                    await self._states.settled()
            async with self._irq_lock:
                await self._in_kernel.run(self._close, "closing it")

    def _close(self) -> None:
        with suppress(OSError):  # no DMA while its memory goes away: a fault in the IOMMU helps nobody
            command = int.from_bytes(self._door.read(RegionIndex.CONFIG, uapi.PCI_COMMAND, 2), "little")
            stopped = command & ~uapi.PCI_COMMAND_MASTER
            self._door.write(RegionIndex.CONFIG, uapi.PCI_COMMAND, stopped.to_bytes(2, "little"))
        self._irqs.close()
        self._door.close()
        self._attachment.close()
        _open_here.discard(self.name)

    # errors

    def _check_open(self) -> None:
        if not self.is_open:
            raise HostError(f"{self.name} is closed", errno.EBADF)

    def _call(self, function: Callable[[], T]) -> T:
        self._check_open()
        try:
            return function()
        except OSError as error:
            raise self._error(error) from error

    async def _in_thread(self, function: Callable[[], T], what: str) -> T:
        return await self._in_kernel.run(lambda: self._call(function), what)

    def _error(self, error: OSError) -> HostError:
        if self._door.gone:
            return DeviceGoneError(f"{self.name} is gone")
        return HostError(f"{self.name}: the kernel answered: {error.strerror}", error.errno)


class _Events:
    """One reader's view of what a function says. Not a generator: it may be dropped half-way without a warning."""

    def __init__(self, more: Callable[[], Awaitable[list[HostEvent]]]) -> None:
        self._more = more
        self._waiting: deque[HostEvent] = deque()

    def __aiter__(self) -> "_Events":
        return self

    async def __anext__(self) -> HostEvent:
        if not self._waiting:
            self._waiting.extend(await self._more())
        if not self._waiting:
            raise StopAsyncIteration
        return self._waiting.popleft()
