"""A guest's driver for a VF, as the kernel's does it: mailbox, contexts, rings, doorbells, events. All in guest memory.

Source of order and layouts: Linux 7.2.8, drivers/crypto/hisilicon/qm.c. What it remembers is what a guest has in its
RAM, so after a migration it goes on with another `port`. It must not know sockets, the model's inside or what entries
ask for.
"""

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from plugins.hns.registers import DOORBELL_PAGE, DOORBELL_REGION, DOORBELL_SQ_CQ, FUNCTION, MAILBOX, QM_REGION
from vfu_server.errors import DeadlineError, VfuServerError

_BUSY, _GET = 1 << 13, 1 << 14
_PAGE = 4096
_CQE, _EQE = 16, 4
_EQ_DOORBELL = FUNCTION["doorbell_eq_aeq"].offset
_SQ_DOORBELL = FUNCTION["doorbell_sq_cq"].offset


class Port(Protocol):
    """How the driver reaches its device and its memory."""

    def read(self, region: int, offset: int, width: int) -> int:
        """A load."""
        ...

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """A store of up to 8 bytes."""
        ...

    def store(self, region: int, offset: int, data: bytes) -> None:
        """One store of 16 bytes."""
        ...

    def load_memory(self, iova: int, length: int) -> bytes:
        """The guest's own memory."""
        ...

    def store_memory(self, iova: int, data: bytes) -> None:
        """The guest's own memory."""
        ...

    def pause(self) -> None:
        """Between two looks at a register: let the device go on."""
        ...


class DeviceError(VfuServerError):
    """The device did what it must not do: an entry twice, a wrong result, a failed command."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rings are in guest memory, from `start` on, and how large they are. Depths are powers of two.

    `entry_size`: bytes of a submission entry, 128 for ZIP and SEC2, 64 for HPRE.
    """

    start: int
    queues: int
    entry_size: int
    depth: int = 64
    eq_depth: int = 256
    aeq_depth: int = 64

    @property
    def eq(self) -> int:
        """IOVA of the EQ."""
        return self.start

    @property
    def aeq(self) -> int:
        """IOVA of the AEQ."""
        return self.eq + _whole(self.eq_depth * _EQE)

    @property
    def sqc_table(self) -> int:
        """IOVA of all SQC; those of all CQC are in the second half of the same range."""
        return self.aeq + _whole(self.aeq_depth * _EQE)

    @property
    def cqc_table(self) -> int:
        """IOVA of all CQC."""
        return self.sqc_table + 32 * self.queues

    @property
    def buffer(self) -> int:
        """IOVA of the page for mailbox contexts."""
        return self.sqc_table + _whole(64 * self.queues)

    def sq(self, queue: int) -> int:
        """IOVA of a submission queue; its completion queue lies behind it."""
        return self.buffer + _PAGE + queue * self._queue_size

    def cq(self, queue: int) -> int:
        """IOVA of a completion queue."""
        return self.sq(queue) + self.depth * self.entry_size

    @property
    def end(self) -> int:
        """First IOVA behind everything."""
        return self.sq(self.queues)

    @property
    def _queue_size(self) -> int:
        return _whole(self.depth * (self.entry_size + _CQE))


@dataclass(slots=True)
class Rings:
    """What the driver knows of a queue."""

    sq_tail: int = 0
    cq_head: int = 0
    phase: int = 1
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One CQE."""

    queue: int
    sq_index: int


class GuestDriver:
    """Drives queues 0..layout.queues-1 of the VF behind `port`. Waits end after `timeout` seconds: DeadlineError."""

    def __init__(self, port: Port, layout: Layout, *, isolation: bool = False, timeout: float = 30.0) -> None:
        self.port = port
        self.layout = layout
        self.isolation = isolation
        self.timeout = timeout
        self.rings = [Rings() for _ in range(layout.queues)]
        self.eq_head = self.aeq_head = 0
        self.eq_phase = self.aeq_phase = 1

    # registers and mailbox

    def read(self, name: str) -> int:
        """A 32-bit register by its name in the table."""
        return self.port.read(QM_REGION, FUNCTION[name].offset, 4)

    def write(self, name: str, value: int) -> None:
        """A 32-bit register by its name in the table."""
        self.port.write(QM_REGION, FUNCTION[name].offset, 4, value)

    def command(self, code: int, *, get: bool = False, queue: int = 0, base: int = 0) -> int:
        """A mailbox command; returns the answer. DeviceError if it fails."""
        self._wait_mailbox()
        word0 = code | _BUSY | (_GET if get else 0)
        self.port.store(QM_REGION, MAILBOX, struct.pack("<HHQI", word0, queue, base, 0))
        status = self._wait_mailbox() >> 9 & 0xF
        if status:
            raise DeviceError(f"mailbox command {code:#x} of queue {queue} ended with status {status}")
        low, high = (self.port.read(QM_REGION, MAILBOX + at, 4) for at in (4, 8))
        return low | high << 32

    def _wait_mailbox(self) -> int:
        deadline = time.monotonic() + self.timeout
        while (word := self.port.read(QM_REGION, MAILBOX, 4)) & _BUSY:
            if time.monotonic() > deadline:
                raise DeadlineError("the mailbox stays busy")
            self.port.pause()
        return word

    def context(self, code: int, data: bytes, queue: int = 0) -> None:
        """Set a context through the mailbox's buffer."""
        self.port.store_memory(self.layout.buffer, data)
        self.command(code, queue=queue, base=self.layout.buffer)

    # life

    def start(self, algorithms: dict[int, int] | None = None) -> None:
        """Load the driver: rings, tables, interrupts open, state ready; then every queue (algorithm type by queue)."""
        at = self.layout
        self.port.store_memory(at.start, bytes(at.end - at.start))
        self.rings = [Rings() for _ in range(at.queues)]
        self.eq_head = self.aeq_head = 0
        self.eq_phase = self.aeq_phase = 1
        self.context(2, struct.pack("<IQIIII", 0, at.eq, 0, 0, 0, at.eq_depth - 1 | 1 << 16))
        self.context(3, struct.pack("<IQIIII", 0, at.aeq, 0, 0, 0, at.aeq_depth - 1 | 1 << 16))
        self.command(4, base=at.sqc_table)
        self.command(5, base=at.cqc_table)
        self.write("page_size", 0)
        self.ring_aeq()
        self.ring_eq()
        self.write("eq_int_mask", 0)
        self.write("aeq_int_mask", 0)
        self.write("vf_state", 0)
        for queue in range(at.queues):
            self.start_queue(queue, (algorithms or {}).get(queue, 0))

    def start_queue(self, queue: int, algorithm: int = 0) -> None:
        """Contexts of one queue, both at their start."""
        at = self.layout
        self.port.store_memory(at.cq(queue), bytes(at.depth * _CQE))
        shape = at.depth - 1 | (at.entry_size.bit_length() - 1) << 12
        sqc = struct.pack("<HHQIHHHHHHI", 0, 0, at.sq(queue), shape, 0, 0, 0, 0, queue, 1 << 4 | algorithm << 8, 0)
        cqc = struct.pack("<HHQIHHHHII", 0, 0, at.cq(queue), at.depth - 1 | 4 << 12, 0, 0, 0, 0, 3, 0)
        self.context(0, sqc, queue)
        self.context(1, cqc, queue)
        self.rings[queue] = Rings()

    def stop(self) -> None:
        """Unload it: every queue runs empty and is stopped, interrupts are masked, the state is not ready."""
        for queue in range(self.layout.queues):
            self.command(8, queue=queue)
        self.write("eq_int_mask", 1)
        self.write("aeq_int_mask", 1)
        self.write("vf_state", 1)

    # work

    def room(self, queue: int) -> int:
        """Entries that may still be submitted."""
        return self.layout.depth - 1 - self.rings[queue].in_flight

    def submit(self, queue: int, entry: bytes) -> int:
        """Put an entry at the tail and ring; returns its index."""
        rings = self.rings[queue]
        index = rings.sq_tail
        self.port.store_memory(self.layout.sq(queue) + index * self.layout.entry_size, entry)
        rings.sq_tail = (index + 1) % self.layout.depth
        rings.in_flight += 1
        self._ring(queue, 0, rings.sq_tail, 0)
        return index

    def entry(self, queue: int, index: int) -> bytes:
        """An entry as it is in memory."""
        return self.port.load_memory(self.layout.sq(queue) + index * self.layout.entry_size, self.layout.entry_size)

    def completions(self, queue: int) -> Iterator[Completion]:
        """New completions; the CQ doorbell is rung behind each, and for the next event when there are no more."""
        rings = self.rings[queue]
        while (found := self._next_completion(queue, rings)) is not None:
            rings.cq_head = (rings.cq_head + 1) % self.layout.depth
            rings.phase ^= rings.cq_head == 0
            rings.in_flight -= 1
            self._ring(queue, 1, rings.cq_head, 0)
            yield found
        self._ring(queue, 1, rings.cq_head, 1)

    def _next_completion(self, queue: int, rings: Rings) -> Completion | None:
        cqe = self.port.load_memory(self.layout.cq(queue) + rings.cq_head * _CQE, _CQE)
        _, _, _, sq_index, told, _, word7 = struct.unpack("<IHHHHHH", cqe)
        if word7 & 1 != rings.phase:
            return None
        if told != queue or not rings.in_flight:
            raise DeviceError(f"queue {queue}: completion {cqe.hex()} at {rings.cq_head} belongs to nothing")
        return Completion(queue, sq_index)

    # events

    def events(self) -> list[int]:
        """Queues with news, in order of their events; the EQ doorbell is rung behind the last."""
        found = []
        while True:
            at = self.layout.eq + self.eq_head * _EQE
            eqe = int.from_bytes(self.port.load_memory(at, _EQE), "little")
            if eqe >> 16 & 1 != self.eq_phase:
                break
            found.append(eqe & 0xFFFF)
            self.eq_head = (self.eq_head + 1) % self.layout.eq_depth
            self.eq_phase ^= self.eq_head == 0
        self.ring_eq()
        return found

    def errors(self) -> list[tuple[int, int]]:
        """`(queue, type)` of each new entry of the AEQ; the doorbell is rung behind the last."""
        found = []
        while True:
            at = self.layout.aeq + self.aeq_head * _EQE
            entry = int.from_bytes(self.port.load_memory(at, _EQE), "little")
            if entry >> 16 & 1 != self.aeq_phase:
                break
            found.append((entry & 0xFFFF, entry >> 17 & 0xF))
            self.aeq_head = (self.aeq_head + 1) % self.layout.aeq_depth
            self.aeq_phase ^= self.aeq_head == 0
        self.ring_aeq()
        return found

    def ring_eq(self) -> None:
        """The EQ is read up to here."""
        self.port.write(QM_REGION, _EQ_DOORBELL, 8, 2 << 12 | self.eq_head << 32)

    def ring_aeq(self) -> None:
        """The AEQ is read up to here."""
        self.port.write(QM_REGION, _EQ_DOORBELL, 8, 3 << 12 | self.aeq_head << 32)

    def _ring(self, queue: int, command: int, index: int, priority: int) -> None:
        value = queue | command << 12 | index << 32 | priority << 48
        if self.isolation:
            self.port.write(DOORBELL_REGION, queue * DOORBELL_PAGE + DOORBELL_SQ_CQ, 8, value)
        else:
            self.port.write(QM_REGION, _SQ_DOORBELL, 8, value)


def _whole(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
