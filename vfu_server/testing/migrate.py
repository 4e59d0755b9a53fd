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
from vfu_server.testing.client import Client, dirty_pages
from vfu_server.testing.guest import Guest
from vfu_server.testing.wire import ReplyError
from vfu_server.uapi import IrqIndex, MigState

Result = TypeVar("Result")

CHUNK = 1 << 20
"""As much as QEMU asks for at once."""
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

    def seconds(self, name: str) -> float:
        """Time of step `name`."""
        return sum(step.seconds for step in self.steps if step.name == name)


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
) -> MigrationRecord:
    """Move the state of the device behind `source` into the one behind `destination`.

    PRE_COPY is used if both devices have it, unless `pre_copy` says. On success the destination is RUNNING and the
    source STOP. On any failure the source is put back to RUNNING and the failure raised, with notes that say in which
    step it came and what became of the source; the destination is left as it is, to be reset or dropped.
    """
    return _Migration(source, destination, vmm or VmmPart(), pre_copy, chunk).run()


class _Migration:
    def __init__(self, source: Client, destination: Client, vmm: VmmPart, pre_copy: bool | None, chunk: int) -> None:
        self.source, self.destination = source, destination
        self.vmm, self.pre_copy, self.chunk = vmm, pre_copy, chunk
        self.steps: list[Step] = []
        self.step = "start"

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
            early = self.timed("pre-copy data", lambda: load(self.destination, save_early(self.source, self.chunk)))
        stopped_at = time.monotonic()
        self.timed("source STOP_COPY", lambda: self.source.set_mig_state(MigState.STOP_COPY))
        memory += self.timed("memory", self.vmm.stopped)
        late = self.timed("stop-copy data", lambda: load(self.destination, save(self.source, self.chunk)))
        self.timed("arrange", self.vmm.arrange)
        self.timed("destination RUNNING", lambda: self.destination.set_mig_state(MigState.RUNNING))
        downtime = time.monotonic() - stopped_at
        # from here on the destination owns the device
        self.timed("source STOP", lambda: self.source.set_mig_state(MigState.STOP))
        return MigrationRecord(tuple(self.steps), early, late, memory, downtime)

    def _wants_pre_copy(self) -> bool:
        if self.pre_copy is not None:
            return self.pre_copy
        flags = self.source.migration_flags() & self.destination.migration_flags()
        return bool(flags & uapi.MIGRATION_PRE_COPY)

    def timed(self, name: str, action: Callable[[], Result]) -> Result:
        self.step = name
        begun = time.monotonic()
        result = action()
        self.steps.append(Step(name, time.monotonic() - begun))
        return result

    def _recover(self, error: BaseException) -> None:
        if self.step == "source STOP":
            error.add_note("the destination runs; the source was not stopped")
            return
        try:
            self.source.set_mig_state(MigState.RUNNING)
            self.vmm.failed()
        except Exception as second:  # noqa: BLE001 - the first failure is the one to raise
            error.add_note(f"the source could not be put back to RUNNING: {second}")
        else:
            error.add_note("the source runs again")


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
