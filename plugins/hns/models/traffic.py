"""A guest under load: queues kept full without pause, every completion seen exactly once, every result looked at.

    python -m plugins.hns.models.traffic --socket-path P [--kind zip] [--queues 4] [--seconds 10]

`Traffic` goes on over a migration: `move` gives it the guest at the other side. Interrupt driven: what no interrupt
tells of is never seen, so a lost one shows as a deadline. Built on the test kit's client; the server never imports it.
"""

import argparse
import os
import sys
import time
import weakref
from collections import deque
from dataclasses import dataclass

from plugins.hns.models.guest_driver import DeviceError, GuestDriver, Layout
from plugins.hns.models.traffic_work import ALGORITHM, COPY, DEFLATE, INFLATE, Job
from plugins.hns.registers import KIND_OF_VF, VENDOR
from vfu_server.errors import DeadlineError, VfuServerError
from vfu_server.testing import Guest, Interrupts

VECTORS = 4
_POLL_SECONDS = 0.0005
_ENTRY_SIZE = {"zip": 128, "sec": 128, "hpre": 64}


class GuestPort:
    """A guest of the test kit as the driver's port. With `halves` the mailbox's store comes as two of 8 bytes."""

    def __init__(self, guest: Guest, *, halves: bool = False) -> None:
        self.guest = guest
        self._halves = halves

    def read(self, region: int, offset: int, width: int) -> int:
        """A load of the guest's."""
        return self.guest.read(region, offset, width)

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """A store of the guest's."""
        self.guest.write(region, offset, width, value)

    def store(self, region: int, offset: int, data: bytes) -> None:
        """16 bytes, in one message or two."""
        if self._halves:
            for at in (0, 8):
                self.guest.write(region, offset + at, 8, int.from_bytes(data[at : at + 8], "little"))
        else:
            self.guest.client.region_write(region, offset, data)

    def load_memory(self, iova: int, length: int) -> bytes:
        """The guest's memory."""
        return self.guest.memory.read(iova, length)

    def store_memory(self, iova: int, data: bytes) -> None:
        """The guest's memory."""
        self.guest.memory.write(iova, data)

    def pause(self) -> None:
        """Serve the device's DMA meanwhile."""
        self.guest.client.serve(_POLL_SECONDS)


class _Eventfds:
    """Copies of a VMM's eventfds, which outlive it: an interrupt that was sent is not lost with the guest object."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.fds = [os.dup(fd) for fd in interrupts.fds]
        weakref.finalize(self, _close, self.fds)

    def count(self, vector: int) -> int:
        """How often `vector` was signalled since it was last looked at."""
        try:
            return os.eventfd_read(self.fds[vector])
        except BlockingIOError:
            return 0


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Count:
    """What was done: `in_flight` is what is submitted and not completed."""

    submitted: int
    completed: int
    interrupts: int
    events: int
    in_flight: int


class Traffic:
    """Load on `queues` queues of the VF that `guest` (started) has. Memory from `start` on is its own.

    Operation of a queue: with ZIP copy, deflate and inflate in turn, else copy.
    """

    def __init__(
        self,
        guest: Guest,
        kind: str = "zip",
        *,
        queues: int = 4,
        start: int = 0x100000,
        depth: int = 32,
        size: int = 1024,
        isolation: bool = False,
        halves: bool = False,
        timeout: float = 30.0,
    ) -> None:
        self.kind = kind
        self.timeout = timeout
        self._halves = halves
        self._size = size
        layout = Layout(start, queues, _ENTRY_SIZE[kind], depth)
        self.driver = GuestDriver(GuestPort(guest, halves=halves), layout, isolation=isolation, timeout=timeout)
        self._guest = guest
        self._eventfds = _Eventfds(guest.enable_msi(VECTORS))
        operations = (COPY, DEFLATE, INFLATE) if kind == "zip" else (COPY,)
        self._operations = [operations[queue % len(operations)] for queue in range(queues)]
        self._jobs: list[deque[Job]] = [deque() for _ in range(queues)]
        self._next = [0] * queues
        self._interrupt_carried = self._error_carried = False
        self._submitted = self._completed = self._told = self._events = 0
        self.driver.start({queue: ALGORITHM[name] for queue, name in enumerate(self._operations)})

    @property
    def end(self) -> int:
        """First IOVA behind the memory that is used."""
        return self._buffer(self.driver.layout.queues, 0)

    def count(self) -> Count:
        """What was done until now."""
        in_flight = sum(len(jobs) for jobs in self._jobs)
        return Count(self._submitted, self._completed, self._told, self._events, in_flight)

    def submit(self) -> int:
        """Fill every queue; returns how many entries that took."""
        before = self._submitted
        for queue, jobs in enumerate(self._jobs):
            while self.driver.room(queue):
                self._submit(queue, jobs)
        return self._submitted - before

    def handle(self, seconds: float = 0.0) -> bool:
        """Wait up to `seconds` for the event interrupt and handle it; False if none came. DeviceError: a mistake."""
        self._look_for_errors()
        if not self._interrupt_carried and not self._eventfds.count(0):
            if not self._guest.client.wait_readable(self._eventfds.fds[0], seconds):
                return False
            self._eventfds.count(0)
        self._interrupt_carried = False
        self._told += 1
        for queue in self.driver.events():
            self._events += 1
            self._collect(queue)
        self._look_for_errors()
        return True

    def run(self, seconds: float) -> None:
        """Load for `seconds`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.submit()
            self.handle(min(0.05, max(0.0, until - time.monotonic())))

    def run_entries(self, count: int) -> None:
        """Load until `count` more entries are completed. DeadlineError."""
        wanted, deadline = self._completed + count, time.monotonic() + self.timeout
        while self._completed < wanted:
            self.submit()
            self.handle(0.05)
            if time.monotonic() > deadline:
                raise DeadlineError(f"{wanted - self._completed} of {count} entries are not completed in time")

    def finish(self) -> Count:
        """Submit nothing more and wait for everything. DeadlineError says what never came."""
        deadline = time.monotonic() + self.timeout
        while any(self._jobs):
            self.handle(0.05)
            if time.monotonic() > deadline:
                waiting = {queue: len(jobs) for queue, jobs in enumerate(self._jobs) if jobs}
                raise DeadlineError(f"never completed, by queue: {waiting}")
        return self.count()

    def move(self, guest: Guest, interrupts: Interrupts | None = None) -> None:
        """Go on with the device of another guest, after a migration; memory has moved already.

        `interrupts` are what that guest's VMM armed; else MSI is switched on here. An interrupt that the old guest was
        sent and has not handled goes along, as with a virtual machine; that guest may be closed already.
        """
        self._interrupt_carried |= bool(self._eventfds.count(0))
        self._error_carried |= bool(self._eventfds.count(1))
        self._guest = guest
        self.driver.port = GuestPort(guest, halves=self._halves)
        self._eventfds = _Eventfds(guest.enable_msi(VECTORS) if interrupts is None else interrupts)

    def _look_for_errors(self) -> None:
        told, self._error_carried = self._error_carried or self._eventfds.count(1), False
        if told and (errors := self.driver.errors()):
            raise DeviceError(f"the device reports errors (queue, type): {errors}")

    def _buffer(self, queue: int, index: int) -> int:
        layout = self.driver.layout
        return layout.end + (queue * layout.depth + index) * 3 * self._size

    def _submit(self, queue: int, jobs: "deque[Job]") -> None:
        index = self.driver.rings[queue].sq_tail
        source = self._buffer(queue, index)
        tag = queue << 40 | self._next[queue]
        job = Job(self.kind, self._operations[queue], tag, source, source + self._size, self._size)
        given = job.input
        self.driver.port.store_memory(source, given.ljust(3 * self._size, b"\xee"))
        jobs.append(job)
        self._next[queue] += 1
        self._submitted += 1
        self.driver.submit(queue, job.entry(len(given), self.driver.layout.entry_size))

    def _collect(self, queue: int) -> None:
        jobs = self._jobs[queue]
        for completion in self.driver.completions(queue):
            job = jobs.popleft()
            index = (job.source - self._buffer(queue, 0)) // (3 * self._size)
            if completion.sq_index != index:
                raise DeviceError(f"queue {queue}: entry {completion.sq_index} is completed, not {index}")
            result = self.driver.port.load_memory(job.destination, 2 * self._size)
            job.check(self.driver.entry(queue, index), result)
            self._completed += 1


def use(guest: Guest) -> None:
    """Load the driver for the VF that a started guest has, and let some queues work until they are empty."""
    kind = KIND_OF_VF[guest.config.read(2, 2)].name
    traffic = Traffic(guest, kind, queues=2, start=0x10000, depth=8, size=256)
    traffic.driver.write("ifc_int_mask", 0)  # it hears its PF, as the kernel's driver does
    traffic.run_entries(20)
    traffic.finish()


def main(argv: list[str] | None = None) -> int:
    """Load on the VF at a socket; one line says what was done. 1: something was wrong, and what."""
    parser = argparse.ArgumentParser(prog="traffic", description="Load on a HiSilicon VF behind a vfio-user socket.")
    parser.add_argument("--socket-path", required=True, metavar="P")
    parser.add_argument("--kind", choices=tuple(_ENTRY_SIZE), default="zip")
    parser.add_argument("--queues", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args(argv)
    try:
        with Guest.connect(options.socket_path) as guest:
            guest.start()
            if guest.config.read(0, 2) != VENDOR:
                raise DeviceError("this is no device of HiSilicon's")
            traffic = Traffic(guest, options.kind, queues=options.queues)
            traffic.run(options.seconds)
            sys.stdout.write(f"{traffic.finish()}\n")
            traffic.driver.stop()
    except (VfuServerError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
