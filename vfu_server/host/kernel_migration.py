"""The kernel's migration protocol v2 on a function whose own driver migrates it: states, data fds, their numbers.

Source: linux/vfio.h (features MIGRATION, MIG_DEVICE_STATE, MIG_DATA_SIZE, MIG_PRECOPY_INFOv2; ioctl
MIG_GET_PRECOPY_INFO). Every call may block in the driver for as long as the hardware takes, so all are made in threads
and outlive a caller who gives up. It decides nothing and knows no stream.
"""

import errno
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import trio

from vfu_server import uapi
from vfu_server.device import PrecopyInfo
from vfu_server.errors import HostError
from vfu_server.host import ioctl as kernel_calls
from vfu_server.host.ioctl import Kernel
from vfu_server.host.patient import PatientCall
from vfu_server.uapi import Feature, MigState

log = logging.getLogger(__name__)

T = TypeVar("T")

KNOWN_FLAGS = uapi.MIGRATION_STOP_COPY | uapi.MIGRATION_P2P | uapi.MIGRATION_PRE_COPY


class KernelStateFile:
    """A StateFile over a data fd, which it owns. `reinit`: the kernel tells the flags of its pre-copy numbers."""

    def __init__(self, kernel: Kernel, fd: int, name: str, *, reinit: bool) -> None:
        self._kernel = kernel
        self._fd = fd
        self._name = name
        self._reinit = reinit
        self._data = PatientCall[bytes](f"{name} data")
        self._numbers = PatientCall[tuple[int, int, int]](f"{name} pre-copy")
        self._asking = trio.Lock()
        self._closing = False
        self.closed = False

    async def read(self, size: int) -> bytes:
        """See StateFile. It is the driver's own read."""
        if self._data.pending:  # of who was cancelled: its bytes count, its end was perhaps that of a pre-copy
            with suppress(OSError):
                if data := await self._data.result():
                    return data
        self._begin(self._data, lambda fd: self._kernel.read(fd, size))
        return await self._result(self._data, "the state could not be read")

    async def write(self, data: bytes) -> None:
        """See StateFile. It may take several writes of the driver."""
        if self._data.pending:  # a write that somebody has given up
            await self._result(self._data, "the driver did not take the state")
        self._begin(self._data, lambda fd: self._write_all(fd, data))
        await self._result(self._data, "the driver did not take the state")

    def _write_all(self, fd: int, data: bytes) -> bytes:
        left = memoryview(data)
        while left:
            taken = self._kernel.write(fd, left)
            if not 0 < taken <= len(left):
                raise OSError(errno.EIO, f"it took {taken} of {len(left)} bytes")
            left = left[taken:]
        return b""

    async def precopy_info(self) -> PrecopyInfo:
        """See StateFile. Without the opt-in of newer kernels the flags mean nothing."""
        async with self._asking:
            if self._numbers.pending:  # an answer that somebody has given up, and old by now
                with suppress(OSError):
                    await self._numbers.result()
            self._begin(self._numbers, lambda fd: kernel_calls.precopy_info(self._kernel.ioctl, fd))
            flags, initial, dirty = await self._result(self._numbers, "the driver does not tell what is left to save")
        return PrecopyInfo(initial, dirty, self._reinit and bool(flags & uapi.PRECOPY_INFO_REINIT))

    def _begin(self, call: PatientCall[T], function: Callable[[int], T]) -> None:
        fd = self._fd
        if self._closing:
            raise HostError(f"{self._name}: the migration data session is over", errno.ENODEV)
        call.begin(lambda: function(fd))

    async def _result(self, call: PatientCall[T], what: str) -> T:
        try:
            return await call.result()
        except OSError as error:
            raise HostError(f"{self._name}: {what}: {error.strerror}", error.errno) from error

    def close(self) -> None:
        """See StateFile. The number must not be used again while a thread may still look it up."""
        if not self._closing:
            self._closing = True
            self._data.afterwards(lambda: self._numbers.afterwards(self._close))

    def _close(self) -> None:
        os.close(self._fd)
        self.closed = True

    async def settled(self) -> None:
        """Wait until no call is under way."""
        await self._data.settled()
        await self._numbers.settled()


class KernelMigration:
    """A MigrationDoor over MIG_DEVICE_STATE of an open device fd. Made by `find`."""

    def __init__(self, kernel: Kernel, device_fd: int, name: str, migrator: str, flags: int) -> None:
        self.flags = flags
        self.migrator = migrator
        self._kernel = kernel
        self._device_fd = device_fd
        self._name = name
        self._reinit = bool(flags & uapi.MIGRATION_PRE_COPY) and self._tells_flags()
        self._files: list[KernelStateFile] = []
        self._change = PatientCall[tuple[MigState, int]](f"{name} state")

    @classmethod
    def find(cls, kernel: Kernel, device_fd: int, name: str, migrator: str) -> "KernelMigration | None":
        """What the function's driver offers; None if it does not migrate. Blocks for a moment."""
        get = uapi.FEATURE_GET | Feature.MIGRATION
        try:
            reply = kernel_calls.device_feature(kernel.ioctl, device_fd, get, bytes(uapi.FEATURE_MIGRATION.size))
        except OSError as error:
            if error.errno != errno.ENOTTY:
                log.warning("%s: whether its driver migrates it cannot be asked: %s", name, error.strerror)
            return None
        flags = int(uapi.FEATURE_MIGRATION.unpack(reply)[0]) & KNOWN_FLAGS
        if not flags & uapi.MIGRATION_STOP_COPY:
            return None
        return cls(kernel, device_fd, name, migrator, flags)

    def _tells_flags(self) -> bool:
        """Opt in to valid flags of pre-copy numbers: kernels that know of it (7.2) keep it until the end."""
        try:
            kernel_calls.device_feature(
                self._kernel.ioctl, self._device_fd, uapi.FEATURE_SET | Feature.MIG_PRECOPY_INFO
            )
        except OSError:
            return False
        return True

    async def set_state(self, state: MigState) -> KernelStateFile | None:
        """See MigrationDoor."""
        await self._forget_abandoned()
        self._change.begin(lambda: self._feature(uapi.FEATURE_SET, state))
        try:
            _, fd = await self._change.result()
        except OSError as error:
            text = f"{self._name}: its driver {self.migrator} refused state {state.name}: {error.strerror}"
            raise HostError(text, error.errno) from error
        if fd < 0:
            return None
        file = KernelStateFile(self._kernel, fd, self._name, reinit=self._reinit)
        self._files = [*(other for other in self._files if not other.closed), file]
        return file

    async def state(self) -> MigState:
        """See MigrationDoor."""
        await self._forget_abandoned()
        self._change.begin(lambda: self._feature(uapi.FEATURE_GET, MigState.ERROR))
        try:
            return (await self._change.result())[0]
        except (OSError, ValueError) as error:
            text = f"{self._name}: its driver {self.migrator} does not tell its state: {error}"
            raise HostError(text, getattr(error, "errno", errno.EIO)) from error

    async def data_size(self) -> int:
        """See MigrationDoor. Kernels before 6.2 have no such question."""
        get = uapi.FEATURE_GET | Feature.MIG_DATA_SIZE
        call = PatientCall[bytes](f"{self._name} size")
        size = uapi.FEATURE_DATA_SIZE.size
        call.begin(lambda: kernel_calls.device_feature(self._kernel.ioctl, self._device_fd, get, bytes(size)))
        try:
            return int(uapi.FEATURE_DATA_SIZE.unpack(await call.result())[0])
        except OSError as error:
            text = f"{self._name}: its driver {self.migrator} does not tell how much it would save: {error.strerror}"
            raise HostError(text, error.errno) from error

    async def settled(self) -> None:
        """Wait until no call is under way, also on the data of sessions."""
        await self._change.settled()
        for file in self._files:
            await file.settled()

    async def _forget_abandoned(self) -> None:
        """Wait for a change that somebody has given up; a data fd that it brought is nobody's."""
        if self._change.pending:
            with suppress(OSError, ValueError):
                _, fd = await self._change.result()
                if fd >= 0:
                    os.close(fd)

    def _feature(self, way: int, state: MigState) -> tuple[MigState, int]:
        data = uapi.FEATURE_STATE.pack(state, uapi.NO_DATA_FD)
        flags = way | Feature.MIG_DEVICE_STATE
        reply = kernel_calls.device_feature(self._kernel.ioctl, self._device_fd, flags, data)
        number, fd = uapi.FEATURE_STATE.unpack(reply)
        return (state if way == uapi.FEATURE_SET else MigState(number)), int(fd)
