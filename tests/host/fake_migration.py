"""A driver in the kernel that migrates its function: states, data fds, pre-copy numbers, with the kernel's rules.

The rules and errnos are those of linux/vfio.h as its user sees them; the state is bytes that a test may change, faults
are orders. The ways between states are searched by the rules of tests/session/kernel_model.py, not read from the
server's table.
"""

import errno
import struct
import threading
from dataclasses import dataclass, field

from tests.host.fake_function import FakeFunction, fail
from tests.host.fake_kernel import FakeKernel
from tests.session.kernel_model import RES, SAVING, way
from vfu_server.uapi import MIGRATION_P2P, MIGRATION_PRE_COPY, MIGRATION_STOP_COPY, MigState

GET, SET = 0x10000, 0x20000
STOP_COPY, P2P, PRE_COPY = MIGRATION_STOP_COPY, MIGRATION_P2P, MIGRATION_PRE_COPY
MAGIC = b"FAKEKERNELSTATE:"
REINIT = 1


@dataclass
class DataFile:
    """What is behind one data fd. `queue`: bytes to be read, or those that were written."""

    saving: bool
    queue: bytearray = field(default_factory=bytearray)
    initial: int = 0
    """Of the queue, what belongs to the first pass."""
    over: bool = False


class FakeMigration:
    """The driver of `function`: `state` bytes are saved and restored; MAGIC goes ahead of them in a pre-copy."""

    def __init__(
        self, kernel: FakeKernel, function: FakeFunction, flags: int = STOP_COPY | P2P | PRE_COPY, state: bytes = b""
    ) -> None:
        self.kernel = kernel
        self.function = function
        self.flags = flags
        self.mig_state = MigState.RUNNING
        self.state = bytearray(state)
        self.file: DataFile | None = None
        self.walked: list[MigState] = []
        self.read_sizes: list[int] = []
        self.piece = 1 << 30
        """At most so many bytes in one read or write."""
        self.end_of_pre_copy = errno.ENOMSG
        """0: as some drivers, a read gives 0 bytes."""
        self.reinit = False
        self.opted_in = False
        self.knows_reinit = True
        self.refuse: dict[MigState, int] = {}
        """errno of the arc to that state."""
        self.breaks: set[MigState] = set()
        """States on whose way the driver ends in ERROR."""
        self.fail_read = self.fail_write = 0
        self.has_size = True
        self.slow: dict[str, threading.Event] = {}
        """'state', 'read', 'write', 'info': who calls waits for the event first."""
        self.entered = threading.Event()
        """Somebody waits so."""
        function.features |= {
            1: (GET, 16, self._get_flags),
            2: (GET | SET, 16, self._device_state),
            9: (GET, 16, self._data_size),
            12: (SET, 8, self._opt_in),
        }
        self._reset, self._release = function.reset, function.release
        function.reset, function.release = self._device_reset, self._released

    def _wait(self, where: str) -> None:
        if where in self.slow:
            self.entered.set()
            assert self.slow[where].wait(10)

    # features

    def _get_flags(self, _flags: int, data: memoryview) -> int:
        struct.pack_into("=Q", data, 0, self.flags)
        return 0

    def _data_size(self, _flags: int, data: memoryview) -> int:
        if not self.has_size:
            raise fail(errno.ENOTTY)
        struct.pack_into("=Q", data, 0, len(MAGIC) + len(self.state))
        return 0

    def _opt_in(self, _flags: int, _data: memoryview) -> int:
        if not self.knows_reinit:
            raise fail(errno.ENOTTY)
        if not self.flags & PRE_COPY:
            raise fail(errno.EINVAL)
        self.opted_in = True
        return 0

    def _device_state(self, flags: int, data: memoryview) -> int:
        if flags & GET:
            struct.pack_into("=Ii", data, 0, self.mig_state, -1)
            return 0
        wanted = struct.unpack_from("=I", data)[0]
        struct.pack_into("=i", data, 4, -1)
        self._wait("state")
        opened = self._set_state(wanted)
        struct.pack_into("=i", data, 4, opened)
        return 0

    def _set_state(self, wanted: int) -> int:
        path = way(self.flags, self.mig_state, wanted)
        if path is None:
            raise fail(errno.EINVAL)
        opened = -1
        for state in path:
            if state in self.breaks:
                self._end_session()
                self.mig_state = MigState.ERROR
                raise fail(errno.EIO)
            if state in self.refuse:
                raise fail(self.refuse[state])
            opened = self._arc(self.mig_state, state)
            self.walked.append(state)
            self.mig_state = state
        return opened

    # arcs

    def _arc(self, source: MigState, target: MigState) -> int:
        if source is RES:
            self._take()
        if target in SAVING and source in SAVING:
            if target is MigState.STOP_COPY:
                self.file.queue += self._whole()
            return -1
        if source in SAVING or source is RES:
            self._end_session()
        if target is RES:
            return self._open(DataFile(saving=False))
        if target is MigState.STOP_COPY:
            return self._open(DataFile(saving=True, queue=bytearray(MAGIC) + self._whole()))
        if target in SAVING:
            return self._open(DataFile(saving=True, queue=bytearray(MAGIC), initial=len(MAGIC)))
        return -1

    def _whole(self) -> bytes:
        return b"=" + len(self.state).to_bytes(8, "little") + bytes(self.state)

    def _open(self, file: DataFile) -> int:
        self.file = file
        return self.kernel._new_file("state", (self, file))

    def _end_session(self) -> None:
        if self.file is not None:
            self.file.over = True
            self.file = None

    def _take(self) -> None:
        """RESUMING -> STOP: what was written becomes the state, the last whole copy of it."""
        data, head = bytes(self.file.queue), len(MAGIC)
        if data[:head] != MAGIC:
            raise fail(errno.EINVAL)
        at = head
        while data[at : at + 1] == b"~":  # early news, which the whole copy has as well
            at += 9 + int.from_bytes(data[at + 1 : at + 9], "little")
        size = int.from_bytes(data[at + 1 : at + 9], "little")
        if data[at : at + 1] != b"=" or len(data) != at + 9 + size:
            raise fail(errno.EINVAL)
        self.state[:] = data[at + 9 :]

    def change(self, data: bytes) -> None:
        """The device changes its state while it runs."""
        self.state[: len(data)] = data
        if self.file is not None and self.file.saving:
            self.file.queue += b"~" + len(data).to_bytes(8, "little") + data

    def begin_anew(self) -> None:
        """The device is configured anew during a pre-copy: a new first pass."""
        self.reinit = True
        self.change(b"anew")
        self.file.initial += 13

    def _device_reset(self) -> int:
        done = self._reset()
        self._end_session()
        self.mig_state = MigState.RUNNING
        return done

    def _released(self) -> None:
        self._end_session()
        self.mig_state, self.opted_in = MigState.RUNNING, False
        self._release()

    # data fds

    def read(self, file: DataFile, size: int) -> bytes:
        if not file.saving:
            raise fail(errno.EBADF)
        self.read_sizes.append(size)
        self._wait("read")
        if file.over:
            raise fail(errno.ENODEV)
        if self.fail_read:
            raise fail(self.fail_read)
        data = bytes(file.queue[: min(size, self.piece)])
        if not data and self.mig_state is not MigState.STOP_COPY and self.end_of_pre_copy:
            raise fail(self.end_of_pre_copy)
        del file.queue[: len(data)]
        file.initial = max(0, file.initial - len(data))
        return data

    def write(self, file: DataFile, data: bytes) -> int:
        if file.saving:
            raise fail(errno.EBADF)
        self._wait("write")
        if file.over:
            raise fail(errno.ENODEV)
        data = data[: self.piece]
        if self.fail_write and len(file.queue) + len(data) >= self.fail_write:
            raise fail(errno.EINVAL)
        file.queue += data
        return len(data)

    def precopy_info(self, file: DataFile, view: memoryview) -> int:
        argsz = struct.unpack_from("=I", view)[0]
        self._wait("info")
        if not self.flags & PRE_COPY:
            raise fail(errno.ENOTTY)
        if argsz < 24 or self.mig_state not in (MigState.PRE_COPY, MigState.PRE_COPY_P2P):
            raise fail(errno.EINVAL)
        if file.over:
            raise fail(errno.ENODEV)
        flags = (REINIT if self.reinit else 0) if self.opted_in else 0xFFFFFFFF  # nobody set them
        struct.pack_into("=IIQQ", view, 0, 24, flags, file.initial, len(file.queue) - file.initial)
        self.reinit = False
        return 0
