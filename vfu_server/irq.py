"""Interrupts of a device that we make ourselves: what VFIO_DEVICE_SET_IRQS does, and who is signalled when.

It behaves as vfio-pci of Linux does, errnos included (vfio_pci_intrs.c and the argument checks of vfio_main.c), in the
form of a vfio-user server: eventfds come beside the message, none at all disarms. It must not know a register, a socket
or trio. Nothing here is locked: the caller calls one method at a time.
"""

import contextlib
import errno
import os
import select
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfu_server import uapi
from vfu_server.errors import ClientError
from vfu_server.host_device import IrqInfo
from vfu_server.uapi import IrqIndex

_ONE = struct.pack("=Q", 1)
_KNOWN_FLAGS = uapi.IRQ_SET_DATA_TYPE_MASK | uapi.IRQ_SET_ACTION_TYPE_MASK
_NO_FD = -1

_Action = Callable[["IrqState", IrqIndex, "_Request"], None]


@dataclass(slots=True)
class _Request:
    """One SET_IRQS: `kind` is the data type; `fds` what is to be armed from `start` on, `_NO_FD` to disarm."""

    kind: int
    start: int
    count: int
    bools: bytes
    fds: list[int]

    def acts(self, at: int) -> bool:
        """Whether NONE or BOOL data say yes for the vector `start + at`."""
        return self.kind == uapi.IRQ_SET_DATA_NONE or bool(self.bools[at])

    def take(self, at: int) -> int:
        """The eventfd for the vector `start + at`, now the caller's."""
        fd, self.fds[at] = self.fds[at], _NO_FD
        return fd


class IrqState:
    """The interrupt set-up of one device and its client.

    `intx`, `msi`, `msix` are the numbers of vectors, `express` whether there is an error interrupt. Eventfds that come
    in are taken over: kept or closed, also when the call fails.
    """

    def __init__(self, *, intx: bool, msi: int, msix: int, express: bool) -> None:
        self._counts = (int(intx), msi, msix, int(express), 1)
        self._mode: IrqIndex | None = None
        self._armed: dict[int, int] = {}
        self._allocated = 0
        self._single = {IrqIndex.ERR: _NO_FD, IrqIndex.REQ: _NO_FD}
        self._resample = _NO_FD
        self._masked = False
        self._disabled = False
        self._level = False
        self._poll = select.poll()

    # what the client sees

    @property
    def infos(self) -> tuple[IrqInfo, ...]:
        """All five indexes with the flags that vfio-pci has where vectors cannot be added later."""
        extra = {IrqIndex.INTX: uapi.IRQ_INFO_MASKABLE | uapi.IRQ_INFO_AUTOMASKED}
        return tuple(
            IrqInfo(index, self._counts[index], uapi.IRQ_INFO_EVENTFD | extra.get(index, uapi.IRQ_INFO_NORESIZE))
            for index in IrqIndex
        )

    def handle(self, payload: bytes, fds: Sequence[int]) -> None:
        """One SET_IRQS message: its payload and the fds that came with it. ClientError with the kernel's errno."""
        own = list(fds)
        try:
            if len(payload) < uapi.IRQ_SET.size:
                raise ClientError(f"SET_IRQS of {len(payload)} bytes")
            argsz, flags, index, start, count = uapi.IRQ_SET.unpack_from(payload)
            data = payload[uapi.IRQ_SET.size : max(argsz, uapi.IRQ_SET.size)]
            if argsz < uapi.IRQ_SET.size:
                raise ClientError(f"SET_IRQS with argsz {argsz}")
        except ClientError:
            _close_all(own)
            raise
        self.set_irqs(index, flags, start, count, data, own)

    def set_irqs(
        self, index: int, flags: int, start: int, count: int, data: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        """VFIO_DEVICE_SET_IRQS; `data` are the bytes of BOOL. EVENTFD with no fd at all: those vectors are disarmed."""
        own = list(fds)
        try:
            if index >= len(self._counts):
                raise ClientError(f"SET_IRQS: there is no interrupt index {index}")
            request = self._request(index, flags, start, count, data, own)
            action = flags & uapi.IRQ_SET_ACTION_TYPE_MASK
            function = _ACTIONS.get((IrqIndex(index), action))
            if function is None:
                raise ClientError(f"SET_IRQS: action {action:#x} is not for index {index}", errno.ENOTTY)
            own = request.fds
            function(self, IrqIndex(index), request)
        finally:
            _close_all(own)

    def release(self) -> None:
        """The client has gone: everything off, every eventfd closed. The line keeps its level."""
        self._turn_off()
        for index, fd in self._single.items():
            _close_all([fd])
            self._single[index] = _NO_FD

    # what the device does

    @property
    def messages_enabled(self) -> bool:
        """MSI or MSI-X is on."""
        return self._mode in (IrqIndex.MSI, IrqIndex.MSIX)

    @property
    def mode(self) -> IrqIndex | None:
        """Which of INTx, MSI and MSI-X is on."""
        return self._mode

    @property
    def level(self) -> bool:
        """The INTx line."""
        return self._level

    def signal(self, index: IrqIndex, vector: int) -> bool:
        """Signal one vector; False if the client has not armed it: it is lost then."""
        fd = self._armed.get(vector, _NO_FD) if self._mode == index else self._single.get(index, _NO_FD)
        return self._write(fd)

    def message(self, vector: int) -> bool:
        """Signal `vector` of whichever of MSI and MSI-X is on."""
        return self.messages_enabled and self._write(self._armed.get(vector, _NO_FD))

    def intx(self, level: bool) -> None:
        """Drive the line. High and not masked: the client is signalled and INTx masked until it says otherwise."""
        self._level = level
        self._deliver_intx()

    def set_intx_disabled(self, disabled: bool) -> None:
        """The INTx disable bit of COMMAND as the client has it: it masks, and clearing it unmasks."""
        if disabled and not self._disabled:
            self._masked = True
        self._disabled, before = disabled, self._disabled
        if before and not disabled:
            self._unmask_intx()

    @property
    def resample_fd(self) -> int:
        """Eventfd of the client that unmasks INTx when it is readable (then call `resample`), or -1. Closed by us."""
        return self._resample

    def resample(self) -> None:
        """The resample eventfd may be readable: take its count and unmask. Never blocks."""
        if self._resample == _NO_FD:
            return
        with contextlib.suppress(BlockingIOError):
            os.preadv(self._resample, [bytearray(8)], -1, os.RWF_NOWAIT)
            self._unmask_intx()

    # inside: one method for each action, as the kernel has them

    def _request(self, index: int, flags: int, start: int, count: int, data: bytes, fds: list[int]) -> _Request:
        limit = self._counts[index]
        if flags & ~_KNOWN_FLAGS or start >= limit or count > limit - start:
            raise ClientError(f"SET_IRQS: flags {flags:#x}, index {index} has {limit} vectors, not {start}+{count}")
        kind = flags & uapi.IRQ_SET_DATA_TYPE_MASK
        if kind == uapi.IRQ_SET_DATA_BOOL and len(data) < count:
            raise ClientError(f"SET_IRQS: {count} bools in {len(data)} bytes")
        if kind == uapi.IRQ_SET_DATA_EVENTFD:
            if fds and len(fds) != count:
                raise ClientError(f"SET_IRQS: {len(fds)} eventfds for {count} vectors")
            return _Request(kind, start, count, b"", fds or [_NO_FD] * count)
        if fds or kind not in (uapi.IRQ_SET_DATA_NONE, uapi.IRQ_SET_DATA_BOOL):
            raise ClientError(f"SET_IRQS: data type {kind:#x} with {len(fds)} eventfds")
        return _Request(kind, start, count, data, [])

    def _trigger_intx(self, _index: IrqIndex, request: _Request) -> None:
        on = self._mode == IrqIndex.INTX
        if on and request.kind == uapi.IRQ_SET_DATA_NONE and request.count == 0:
            self._turn_off()
            return
        if (not on and self._mode is not None) or request.count != 1:
            raise ClientError("SET_IRQS: INTx is one vector, and only one of INTx, MSI and MSI-X can be on")
        if request.kind == uapi.IRQ_SET_DATA_EVENTFD:
            self._check_eventfd(request.fds[0])
            self._disarm(0)
            self._arm(0, request.take(0))
            if not on:
                self._mode = IrqIndex.INTX
                self._masked = self._disabled
                self._deliver_intx()
            return
        if not on:
            raise ClientError("SET_IRQS: INTx is not on")
        if request.acts(0) and not self._disabled:
            self._write(self._armed.get(0, _NO_FD))

    def _mask(self, _index: IrqIndex, request: _Request) -> None:
        self._check_intx_on(request)
        if request.kind == uapi.IRQ_SET_DATA_EVENTFD:
            raise ClientError("SET_IRQS: no masking by eventfd", errno.ENOTTY)
        if request.acts(0):
            self._masked = True

    def _unmask(self, _index: IrqIndex, request: _Request) -> None:
        self._check_intx_on(request)
        if request.kind != uapi.IRQ_SET_DATA_EVENTFD:
            if request.acts(0):
                self._unmask_intx()
            return
        if request.fds[0] == _NO_FD:
            _close_all([self._resample])
            self._resample = _NO_FD
            return
        self._check_eventfd(request.fds[0])
        if self._resample != _NO_FD:
            raise ClientError("SET_IRQS: there is an eventfd for unmasking already", errno.EBUSY)
        self._resample = request.take(0)
        self.resample()

    def _trigger_messages(self, index: IrqIndex, request: _Request) -> None:
        on = self._mode == index
        if on and request.kind == uapi.IRQ_SET_DATA_NONE and request.count == 0:
            self._turn_off()
            return
        if not on and self._mode is not None:
            raise ClientError("SET_IRQS: only one of INTx, MSI and MSI-X can be on")
        if request.kind == uapi.IRQ_SET_DATA_EVENTFD:
            self._arm_messages(index, request, first=not on)
            return
        if not on:
            raise ClientError(f"SET_IRQS: {index.name} is not on")
        for at in range(request.count):
            if request.acts(at):
                self._write(self._armed.get(request.start + at, _NO_FD))

    def _arm_messages(self, index: IrqIndex, request: _Request, *, first: bool) -> None:
        if first:
            if request.start + request.count == 0:
                raise ClientError("SET_IRQS: no vector to turn on", errno.ERANGE)
            self._mode, self._allocated = index, request.start + request.count
        vector = request.start
        try:
            for at, vector in enumerate(range(request.start, request.start + request.count)):
                self._disarm(vector)
                if request.fds[at] == _NO_FD:
                    continue
                if vector >= self._allocated:
                    raise ClientError(f"SET_IRQS: vector {vector} came after {self._allocated} were turned on")
                self._check_eventfd(request.fds[at])
                self._arm(vector, request.take(at))
        except ClientError:
            for done in range(request.start, vector):
                self._disarm(done)
            if first:
                self._turn_off()
            raise

    def _trigger_single(self, index: IrqIndex, request: _Request) -> None:
        now = self._single[index]
        if request.kind == uapi.IRQ_SET_DATA_NONE:
            if now == _NO_FD:
                raise ClientError(f"SET_IRQS: {index.name} is not armed")
            if request.count:
                self._write(now)
                return
        elif request.count == 0:
            raise ClientError(f"SET_IRQS: {index.name} with no vector")
        elif request.kind == uapi.IRQ_SET_DATA_BOOL:
            if request.acts(0):
                self._write(now)
            return
        else:
            self._check_eventfd(request.fds[0])
        self._single[index] = request.take(0) if request.fds else _NO_FD
        _close_all([now])

    def _check_intx_on(self, request: _Request) -> None:
        if self._mode != IrqIndex.INTX or request.count != 1:
            raise ClientError("SET_IRQS: INTx is not on, or not one vector")

    def _unmask_intx(self) -> None:
        if self._mode == IrqIndex.INTX and not self._disabled:
            self._masked = False
            self._deliver_intx()

    def _deliver_intx(self) -> None:
        if self._mode == IrqIndex.INTX and self._level and not self._masked:
            self._masked = True
            self._write(self._armed.get(0, _NO_FD))

    def _turn_off(self) -> None:
        for vector in list(self._armed):
            self._disarm(vector)
        _close_all([self._resample])
        self._resample = _NO_FD
        self._mode = None
        self._allocated = 0
        self._masked = False

    def _arm(self, vector: int, fd: int) -> None:
        if fd != _NO_FD:
            self._armed[vector] = fd

    def _disarm(self, vector: int) -> None:
        _close_all([self._armed.pop(vector, _NO_FD)])

    @staticmethod
    def _check_eventfd(fd: int) -> None:
        """EINVAL for what is no eventfd: a pipe or file of the client could block us."""
        if fd == _NO_FD:
            return
        try:
            kind = str(Path(f"/proc/self/fd/{fd}").readlink())
        except OSError as error:
            raise ClientError(f"SET_IRQS: fd cannot be looked at: {error}", error.errno) from error
        if kind != "anon_inode:[eventfd]":
            raise ClientError(f"SET_IRQS: {kind} is not an eventfd")

    def _write(self, fd: int) -> bool:
        """Add one to an eventfd. A full counter (only its owner can fill it) would block, and says enough already."""
        if fd == _NO_FD:
            return False
        self._poll.register(fd, select.POLLOUT)
        try:
            if self._poll.poll(0):
                os.write(fd, _ONE)
        finally:
            self._poll.unregister(fd)
        return True


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd != _NO_FD:
            os.close(fd)


_ACTIONS: dict[tuple[IrqIndex, int], _Action] = {
    (IrqIndex.INTX, uapi.IRQ_SET_ACTION_MASK): IrqState._mask,
    (IrqIndex.INTX, uapi.IRQ_SET_ACTION_UNMASK): IrqState._unmask,
    (IrqIndex.INTX, uapi.IRQ_SET_ACTION_TRIGGER): IrqState._trigger_intx,
    (IrqIndex.MSI, uapi.IRQ_SET_ACTION_TRIGGER): IrqState._trigger_messages,
    (IrqIndex.MSIX, uapi.IRQ_SET_ACTION_TRIGGER): IrqState._trigger_messages,
    (IrqIndex.ERR, uapi.IRQ_SET_ACTION_TRIGGER): IrqState._trigger_single,
    (IrqIndex.REQ, uapi.IRQ_SET_ACTION_TRIGGER): IrqState._trigger_single,
}
