"""Interrupts of a real function: the client's eventfds go to the kernel, which signals them without us.

Two things are added to SET_IRQS. Vectors that the kernel cannot add later (NORESIZE) can still be armed bit by bit, as
a client with few fds in a message does: the index is turned off and on again with all of them. ERR and REQ are watched
by eventfds of ours, and passed on to the client's. Blocking calls; the caller makes one at a time.
"""

import contextlib
import errno
import os
import select
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from vfu_server import uapi
from vfu_server.errors import HostError
from vfu_server.host import ioctl as kernel_calls
from vfu_server.host.ioctl import Ioctl
from vfu_server.host_device import IrqInfo
from vfu_server.uapi import IrqIndex

ARM = uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_TRIGGER
TURN_OFF = uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_TRIGGER
NO_FD = -1
WATCHED = (IrqIndex.ERR, IrqIndex.REQ)
MESSAGES = (IrqIndex.MSI, IrqIndex.MSIX)


@dataclass(slots=True)
class _Watch:
    """One of ERR and REQ: our eventfd, and a duplicate of the client's or -1."""

    own: int
    client: int = NO_FD


class KernelIrqs:
    """The interrupts of one open function."""

    def __init__(self, ioctl: Ioctl, device_fd: int, irqs: Sequence[IrqInfo]) -> None:
        self._ioctl = ioctl
        self._device_fd = device_fd
        self._irqs = irqs
        self._mode: IrqIndex | None = None
        """MSI or MSI-X, while it is on."""
        self._allocated = 0
        """Vectors that the kernel had when the mode was turned on."""
        self._vectors: dict[int, int] = {}
        """Duplicates of what is armed, where vectors cannot be added."""
        self._watches: dict[IrqIndex, _Watch] = {}
        self._epoll = select.epoll()

    def watch(self) -> None:
        """Arm ERR and REQ, where the function has them, with eventfds of ours."""
        for index in WATCHED:
            if not self._irqs[index].count:
                continue
            own = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._watches[index] = _Watch(own)
            self._epoll.register(own, select.EPOLLIN)
            self._arm_single(index, own)

    def fileno(self) -> int:
        """Readable when `fired` would give something."""
        return self._epoll.fileno()

    def fired(self) -> list[IrqIndex]:
        """Which of ERR and REQ the kernel has signalled since the last call; the client is told, too."""
        ready = {fd for fd, _ in self._epoll.poll(0)}
        found = []
        for index, watch in self._watches.items():
            if watch.own in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(watch.own)
                    found.append(index)
                    self._pass_on(index, watch)
        return found

    def set_irqs(self, index: int, flags: int, start: int, count: int, data: bytes, fds: Sequence[int]) -> None:
        """VFIO_DEVICE_SET_IRQS; see HostDevice.set_irqs. OSError with the kernel's errno."""
        if index in WATCHED and index < len(self._irqs):
            self._set_watched(IrqIndex(index), flags, start, count, data, fds)
        elif flags & uapi.IRQ_SET_DATA_TYPE_MASK != uapi.IRQ_SET_DATA_EVENTFD:
            self._call(index, flags, start, count, data)
            if index == self._mode and flags == TURN_OFF and not count:
                self._forget()
        elif index in MESSAGES and flags == ARM:
            self._arm_messages(IrqIndex(index), start, list(fds) or [NO_FD] * count)
        else:
            self._call(index, flags, start, count, _packed(list(fds) or [NO_FD] * count))

    def close(self) -> None:
        """Close what is ours; the kernel disarms when the function is closed."""
        self._forget()
        for watch in self._watches.values():
            _close(watch.own)
            _close(watch.client)
        self._watches.clear()
        self._epoll.close()

    def _call(self, index: int, flags: int, start: int, count: int, data: bytes = b"") -> None:
        had = kernel_calls.set_irqs(self._ioctl, self._device_fd, flags, index, start, count, data)
        if had > 0:
            name = IrqIndex(index).name
            raise HostError(f"this machine has {had} vectors for {name}, {start + count} were asked for", errno.ENOSPC)

    # MSI and MSI-X

    def _arm_messages(self, index: IrqIndex, start: int, fds: list[int]) -> None:
        fixed = bool(self._irqs[index].flags & uapi.IRQ_INFO_NORESIZE)
        end = start + len(fds)
        if fixed and self._mode == index and end > self._allocated:
            if any(fd != NO_FD for fd in fds):
                self._grow(index, start, fds)
            return  # disarming what was never there
        try:
            self._call(index, ARM, start, len(fds), _packed(fds))
        except (OSError, HostError):
            if self._mode == index:  # the kernel has turned off what it was to arm
                for vector in range(start, end):
                    _close(self._vectors.pop(vector, NO_FD))
            raise
        if self._mode != index:
            self._mode, self._allocated = index, end
        if fixed:
            self._remember(start, fds)

    def _grow(self, index: IrqIndex, start: int, fds: list[int]) -> None:
        before = [self._vectors.get(vector, NO_FD) for vector in range(self._allocated)]
        wanted = before + [NO_FD] * (start + len(fds) - len(before))
        wanted[start : start + len(fds)] = fds
        self._call(index, TURN_OFF, 0, 0)
        try:
            self._call(index, ARM, 0, len(wanted), _packed(wanted))
        except (OSError, HostError):
            try:
                self._call(index, ARM, 0, len(before), _packed(before))
            except (OSError, HostError):
                self._forget()
            raise
        self._allocated = len(wanted)
        self._remember(start, fds)

    def _remember(self, start: int, fds: Sequence[int]) -> None:
        for vector, fd in enumerate(fds, start):
            _close(self._vectors.pop(vector, NO_FD))
            if fd != NO_FD:
                self._vectors[vector] = os.dup(fd)

    def _forget(self) -> None:
        for fd in self._vectors.values():
            _close(fd)
        self._vectors.clear()
        self._mode, self._allocated = None, 0

    # ERR and REQ: vfio-pci's rules for a single trigger, with the client's eventfd in the place of the kernel's

    def _set_watched(
        self, index: IrqIndex, flags: int, start: int, count: int, data: bytes, fds: Sequence[int]
    ) -> None:
        kind = flags & uapi.IRQ_SET_DATA_TYPE_MASK
        watch = self._watches.get(index)
        if watch is None or start or count > 1 or kind not in (1, 2, 4):
            raise _refused(errno.EINVAL)
        if flags & uapi.IRQ_SET_ACTION_TYPE_MASK != uapi.IRQ_SET_ACTION_TRIGGER:
            raise _refused(errno.ENOTTY)
        if kind == uapi.IRQ_SET_DATA_NONE:
            if watch.client == NO_FD:
                raise _refused(errno.EINVAL)
            if count:
                self._pass_on(index, watch)
            else:
                self._set_client(watch, NO_FD)
        elif not count:
            raise _refused(errno.EINVAL)
        elif kind == uapi.IRQ_SET_DATA_BOOL:
            if data[:1] not in (b"", b"\0"):
                self._pass_on(index, watch)
        else:
            self._take_client(index, watch, fds[0] if fds else NO_FD)

    def _take_client(self, index: IrqIndex, watch: _Watch, fd: int) -> None:
        if fd == NO_FD:
            self._set_client(watch, NO_FD)
            return
        try:
            self._arm_single(index, fd)  # the kernel says whether it is an eventfd
        finally:
            self._arm_single(index, watch.own)
        self._set_client(watch, os.dup(fd))

    @staticmethod
    def _set_client(watch: _Watch, fd: int) -> None:
        _close(watch.client)
        watch.client = fd

    def _pass_on(self, index: IrqIndex, watch: _Watch) -> None:
        """Let the kernel signal the client's eventfd: it never blocks, whatever the client has done to the counter."""
        if watch.client == NO_FD:
            return
        self._arm_single(index, watch.client)
        try:
            self._call(index, TURN_OFF, 0, 1)  # with a vector: fire
        finally:
            self._arm_single(index, watch.own)

    def _arm_single(self, index: IrqIndex, fd: int) -> None:
        self._call(index, ARM, 0, 1, _packed([fd]))


def _packed(fds: Sequence[int]) -> bytes:
    return struct.pack(f"={len(fds)}i", *fds)


def _close(fd: int) -> None:
    if fd != NO_FD:
        os.close(fd)


def _refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))
