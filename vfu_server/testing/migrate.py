"""Moving a device from one server to another, step by step as QEMU does it, with the time and bytes of each step.

It knows the messages of migration and what a VMM carries by itself (memory, COMMAND, interrupts); the device's state
is opaque.
"""

import errno
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from vfu_server import uapi
from vfu_server.device import PrecopyInfo
from vfu_server.errors import DeadlineError
from vfu_server.testing.client import Client, dirty_pages
from vfu_server.testing.guest import Guest
from vfu_server.testing.wire import ReplyError
from vfu_server.uapi import IrqIndex, MigState

Result = TypeVar("Result")

CHUNK = 1 << 20
"""As much as QEMU asks for at once."""
SWITCH_OVER = 1 << 20
"""Bytes left to give with which a pre-copy is good enough: the device is stopped for the rest."""
MAX_ROUNDS = 30
MAX_VAIN_ROUNDS = 3
"""Rounds that may leave as much as the one before: a device that changes faster than it is read is stopped then."""
FIRST_PASS_DEADLINE = 30.0
"""Seconds without a byte after which a first pass that is not complete is given up."""
_LOGGED_AT_ONCE = 1 << 34


@dataclass(frozen=True, slots=True)
class Step:
    """One step and how long it took, in seconds."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class MigrationRecord:
    """What a migration did. `downtime` is from the request for STOP_COPY to the destination's RUNNING, in seconds."""

    steps: tuple[Step, ...]
    pre_copy_bytes: int
    stop_copy_bytes: int
    memory_bytes: int
    downtime: float
    rounds: int = 0
    """Rounds of pre-copy."""

    def seconds(self, name: str) -> float:
        """Time of step `name`."""
        return sum(step.seconds for step in self.steps if step.name == name)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a migration is: the step that goes on, bytes of state so far, rounds of pre-copy, and what is about left
    of it in bytes; None where the source does not tell.
    """

    step: str
    state_bytes: int = 0
    rounds: int = 0
    left: int | None = None


@dataclass(slots=True)
class VmmPart:
    """What a VMM moves besides the device's state; each hook returns the bytes of memory that it copied.

    `begun`: migration starts, the device runs. `stopped`: the source is in STOP_COPY. `arrange`: the destination has
    all data and is still RESUMING. `failed`: the source runs again.
    """

    begun: Callable[[], int] = field(default=lambda: 0)
    stopped: Callable[[], int] = field(default=lambda: 0)
    arrange: Callable[[], None] = field(default=lambda: None)
    failed: Callable[[], None] = field(default=lambda: None)


def save(client: Client, chunk: int = CHUNK) -> Iterator[bytes]:
    """The data of a device that is in STOP_COPY, up to the read that gives nothing."""
    while data := client.mig_data_read(chunk):
        yield data


def save_early(client: Client, chunk: int = CHUNK) -> Iterator[bytes]:
    """The data of a device that is in PRE_COPY, until it has nothing more for now."""
    try:
        yield from save(client, chunk)
    except ReplyError as error:
        if error.errno != errno.ENOMSG:
            raise


def load(client: Client, chunks: Iterable[bytes]) -> int:
    """Give data to a device that is in RESUMING; returns the bytes given."""
    total = 0
    for data in chunks:
        client.mig_data_write(data)
        total += len(data)
    return total


def migrate(
    source: Client,
    destination: Client,
    *,
    vmm: VmmPart | None = None,
    pre_copy: bool | None = None,
    chunk: int = CHUNK,
    tell: Callable[[Progress], None] = lambda _progress: None,
) -> MigrationRecord:
    """Move the state of the device behind `source` into the one behind `destination`.

    PRE_COPY is used if both devices have it, unless `pre_copy` says: in rounds, until little is left or nothing is
    gained. `tell` is called at each step and for each chunk. On success the destination is RUNNING and the source STOP.
    On any failure the source is put back to RUNNING and the failure raised, with notes that say in which step it came
    and what became of the source; the destination is left as it is, to be reset or dropped. A destination that did not
    answer whether it runs is dropped first: the two never run both.
    """
    return _Migration(source, destination, vmm or VmmPart(), pre_copy, chunk, tell).run()


class _Migration:
    def __init__(
        self,
        source: Client,
        destination: Client,
        vmm: VmmPart,
        pre_copy: bool | None,
        chunk: int,
        tell: Callable[[Progress], None],
    ) -> None:
        self.source, self.destination = source, destination
        self.vmm, self.pre_copy, self.chunk, self.tell = vmm, pre_copy, chunk, tell
        self.steps: list[Step] = []
        self.step = "start"
        self.state_bytes = self.rounds = 0
        self.left: int | None = None

    def run(self) -> MigrationRecord:
        try:
            return self._run()
        except BaseException as error:
            error.add_note(f"migration failed in step {self.step!r}")
            self._recover(error)
            raise

    def _run(self) -> MigrationRecord:
        early = 0
        memory = self.timed("begin", self.vmm.begun)
        self.timed("destination RESUMING", lambda: self.destination.set_mig_state(MigState.RESUMING))
        if self._wants_pre_copy():
            self.timed("source PRE_COPY", lambda: self.source.set_mig_state(MigState.PRE_COPY))
            early = self.timed("pre-copy data", self._pre_copy)
        stopped_at = time.monotonic()
        self.timed("source STOP_COPY", lambda: self.source.set_mig_state(MigState.STOP_COPY))
        memory += self.timed("memory", self.vmm.stopped)
        late = self.timed("stop-copy data", lambda: self._load(save(self.source, self.chunk)))
        self.timed("arrange", self.vmm.arrange)
        self.timed("destination RUNNING", lambda: self.destination.set_mig_state(MigState.RUNNING))
        downtime = time.monotonic() - stopped_at
        # from here on the destination owns the device
        self.timed("source STOP", lambda: self.source.set_mig_state(MigState.STOP))
        return MigrationRecord(tuple(self.steps), early, late, memory, downtime, self.rounds)

    def _load(self, chunks: Iterable[bytes]) -> int:
        return load(self.destination, self._counted(chunks))

    def _counted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for data in chunks:
            self.state_bytes += len(data)
            if self.left is not None:
                self.left = max(0, self.left - len(data))
            self._tell()
            yield data

    def _tell(self) -> None:
        self.tell(Progress(self.step, self.state_bytes, self.rounds, self.left))

    def _pre_copy(self) -> int:
        """Rounds of pre-copy, until the first pass is through and what is left is little, or does not become less."""
        total = vain = 0
        deadline = time.monotonic() + FIRST_PASS_DEADLINE
        before = self._ask()
        while True:
            self.rounds += 1
            limit = None if before is None else before.initial_bytes + before.dirty_bytes + self.chunk
            given = self._load(_up_to(save_early(self.source, self.chunk), limit))
            total += given
            now = self._ask()
            if before is None or now is None:
                return total
            if now.initial_bytes:
                deadline = time.monotonic() + FIRST_PASS_DEADLINE if given else deadline
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"the source has {now.initial_bytes} bytes of its first pass to give and gave none for "
                        f"{FIRST_PASS_DEADLINE:g} s"
                    )
            else:
                vain = vain + 1 if now.dirty_bytes >= before.initial_bytes + before.dirty_bytes else 0
                if now.dirty_bytes <= SWITCH_OVER or vain >= MAX_VAIN_ROUNDS or self.rounds >= MAX_ROUNDS:
                    return total
            before = now

    def _ask(self) -> PrecopyInfo | None:
        """What the source has still to give; None if it cannot say."""
        try:
            info = self.source.precopy_info()
        except ReplyError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY):
                raise
            return None
        self.left = info.initial_bytes + info.dirty_bytes
        return info

    def _wants_pre_copy(self) -> bool:
        if self.pre_copy is not None:
            return self.pre_copy
        flags = self.source.migration_flags() & self.destination.migration_flags()
        return bool(flags & uapi.MIGRATION_PRE_COPY)

    def timed(self, name: str, action: Callable[[], Result]) -> Result:
        self.step = name
        self._tell()
        begun = time.monotonic()
        result = action()
        self.steps.append(Step(name, time.monotonic() - begun))
        return result

    def _recover(self, error: BaseException) -> None:
        if self.step == "source STOP":
            error.add_note("the destination runs; the source was not stopped")
            return
        if self.step == "destination RUNNING" and not isinstance(error, ReplyError):
            self.destination.close()
            error.add_note("the destination did not say whether it runs: its connection was closed")
        try:
            self.source.set_mig_state(MigState.RUNNING)
            self.vmm.failed()
        except Exception as second:  # noqa: BLE001 - the first failure is the one to raise
            error.add_note(f"the source could not be put back to RUNNING: {second}")
        else:
            error.add_note("the source runs again")


def _up_to(chunks: Iterator[bytes], limit: int | None) -> Iterator[bytes]:
    """The chunks until `limit` bytes were given; all without a limit."""
    given = 0
    for data in chunks:
        yield data
        given += len(data)
        if limit is not None and given >= limit:
            return


def migrate_guest(
    source: Guest, destination: Guest, *, pre_copy: bool | None = None, chunk: int = CHUNK
) -> MigrationRecord:
    """Move a whole guest: its memory (unless both share it), the device, COMMAND and the interrupts.

    `destination` is plugged in and reset (`plug_in`, `machine_reset`), without firmware. Memory is copied whole while
    the device runs and again where the device's DMA log says so; without a log it is copied after the stop. Of config
    space COMMAND alone is written: as with QEMU all else, BARs included, is part of the device's state.
    """
    part = _GuestPart(source, destination)
    vmm = VmmPart(part.begun, part.stopped, part.arrange, part.failed)
    return migrate(source.client, destination.client, vmm=vmm, pre_copy=pre_copy, chunk=chunk)


class _GuestPart:
    def __init__(self, source: Guest, destination: Guest) -> None:
        self.source, self.destination = source, destination
        self.logged = False
        self.command = 0

    def begun(self) -> int:
        if self.source.memory is self.destination.memory:
            return 0
        try:
            ranges = [(block.iova, block.size) for block in self.source.memory.blocks]
            self.source.client.dma_logging_start(ranges)
        except ReplyError:
            return 0
        self.logged = True
        return self._copy_all()

    def stopped(self) -> int:
        self.command = self.source.config.read(uapi.PCI_COMMAND, 2)
        if self.source.memory is self.destination.memory:
            return 0
        if not self.logged:
            return self._copy_all()
        copied = 0
        for block in self.source.memory.blocks:
            for start in range(block.iova, block.end, _LOGGED_AT_ONCE):
                length = min(_LOGGED_AT_ONCE, block.end - start)
                bitmap = self.source.client.dma_logging_report(start, length)
                for page in dirty_pages(bitmap, start):
                    self.source.memory.copy_to(self.destination.memory, page, uapi.PAGE_SIZE)
                    copied += uapi.PAGE_SIZE
        self.source.client.dma_logging_stop()
        self.logged = False
        return copied

    def arrange(self) -> None:
        target = self.destination
        target.config.write(uapi.PCI_COMMAND, 2, self.command)
        used = self.source.interrupts
        if used is not None and used.index != IrqIndex.INTX:
            target.arm_interrupts(used.index, len(used.fds))
        target.bars, target.addresses = self.source.bars, dict(self.source.addresses)

    def failed(self) -> None:
        if self.logged:
            self.source.client.dma_logging_stop()
            self.logged = False

    def _copy_all(self) -> int:
        for block in self.source.memory.blocks:
            self.source.memory.copy_to(self.destination.memory, block.iova, block.size)
        return sum(block.size for block in self.source.memory.blocks)
