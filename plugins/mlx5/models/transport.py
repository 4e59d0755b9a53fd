"""Completion queues and queue pairs of the PF, as far as messages in loopback need them.

A queue pair sends what the hardware itself has to say (`send`) to its remote pair on the same function: receive
requests, completions and doorbell records are the driver's memory. It must not know what is sent.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from plugins.mlx5.models.eq import CQ_ERROR, QP_ACCESS_ERROR, EventQueues, Ring
from plugins.mlx5.models.keys import Keys
from plugins.mlx5.models.messages import CQE, RECEIVE_WQE
from plugins.mlx5.models.status import RefusedError, Status, Violations
from vfu_server.model import Bus, BusError

logger = logging.getLogger(__name__)

CQE_SIZE, WQE_SIZE = 64, 16
RNR_SECONDS = 1e-4
RECEIVED_WITH_IMMEDIATE = 3
COUNTER_MASK = 0xFFFF
CI_MASK = 0xFFFFFF
RESET, INIT, READY_TO_RECEIVE, READY_TO_SEND, ERROR = range(5)
NO_QUEUE = 3
OVERRUN = 1
"""Syndrome of a CQ error event."""


@dataclass(slots=True)
class CompletionQueue:
    """`producer` counts entries since the beginning; `sequence` is the one that an arm has to name."""

    number: int
    ring: Ring
    log_size: int
    uar: int
    eqn: int
    record: int
    producer: int = 0
    sequence: int = 0
    armed: bool = False
    broken: bool = False
    users: set[int] = field(default_factory=set)


@dataclass(slots=True)
class QueuePair:
    """A queue pair without sending queue; without receiving queue, `ring` is None."""

    number: int
    pd: int
    ring: Ring | None
    log_size: int
    record: int
    cqn: int
    state: int = RESET
    remote: int = 0
    patient: bool = False
    """A remote pair that has nothing posted is waited for without end."""
    consumer: int = 0
    users: set[int] = field(default_factory=set)


class Transport:
    """All completion queues and queue pairs of the PF."""

    def __init__(self, bus: Callable[[], Bus], keys: Keys, events: EventQueues, violations: Violations) -> None:
        self._bus = bus
        self._keys = keys
        self._events = events
        self._violations = violations
        self._completions: dict[int, CompletionQueue] = {}
        self._pairs: dict[int, QueuePair] = {}
        self._next_completion = 0x41
        self._next_pair = 0x4D
        self._generation = 0

    def reset(self) -> None:
        """All are gone."""
        self._completions.clear()
        self._pairs.clear()
        self._generation += 1

    def numbers(self) -> dict[str, int]:
        """How many there are."""
        return {"cqs": len(self._completions), "qps": len(self._pairs)}

    def uses(self, uar: int) -> bool:
        """Whether a completion queue's doorbells are in that page."""
        return any(queue.uar == uar for queue in self._completions.values())

    # completion queues

    def create_completions(self, ring: Ring, log_size: int, uar: int, eqn: int, record: int) -> int:
        """A new completion queue; its number."""
        events = self._events.get(eqn)
        number, self._next_completion = self._next_completion, self._next_completion + 1
        queue = CompletionQueue(number, ring, log_size, uar, eqn, record)
        generation = self._generation
        try:
            for page_number, page in enumerate(ring.pages):
                length = min(ring.page_size, (CQE_SIZE << log_size) - page_number * ring.page_size)
                owners = self._bus().dma_read(page, length)[CQE_SIZE - 1 :: CQE_SIZE]
                if any(owner >> 4 != 0xF for owner in owners):
                    self._violations.note("cqe-owner", "entries of a new CQ are not marked as invalid")
                    break
            self._bus().dma_read(record, 8)
        except BusError as error:
            raise RefusedError(Status.BAD_PARAM, 0x601, f"the completion queue is no memory: {error}") from error
        if generation != self._generation:
            raise RefusedError(Status.BAD_SYS_STATE, 0x60B, "the function was reset", mistake=False)
        self._completions[number] = queue
        events.users.add(number)
        return number

    def destroy_completions(self, number: int) -> None:
        """A completion queue goes; one in use does not."""
        queue = self.completions(number)
        if queue.users:
            raise RefusedError(Status.BUSY, 0x602, f"CQ {number:#x} is used by queue pairs {queue.users}")
        self._events.get(queue.eqn).users.discard(number)
        del self._completions[number]

    def completions(self, number: int) -> CompletionQueue:
        """A completion queue by its number."""
        queue = self._completions.get(number)
        if queue is None:
            raise RefusedError(Status.BAD_RES, 0x603, f"there is no CQ {number:#x}")
        return queue

    def arm(self, uar: int, value: int, cqn: int) -> None:
        """A write of the CQ doorbell in page `uar`."""
        queue = self._completions.get(cqn)
        if queue is None or queue.uar != uar:
            self._violations.note("cq-doorbell", f"doorbell of CQ {cqn:#x} in page {uar}")
            return
        if value >> 28 & 3 != queue.sequence & 3 or value >> 30:
            self._violations.note(
                "cq-doorbell", f"CQ {cqn:#x} armed with number {value >> 28}, not {queue.sequence & 3}"
            )
            return
        # reads of memory do not belong into a client's write
        self._bus().call_later(0.0, lambda: self._armed(queue, value))

    def _armed(self, queue: CompletionQueue, value: int) -> None:
        if self._completions.get(queue.number) is not queue:
            return
        try:
            record = int.from_bytes(self._bus().dma_read(queue.record + 4, 4), "big")
        except BusError as error:
            self._violations.note("cq-doorbell", f"CQ {queue.number:#x}: {error}")
            return
        if record != value:
            self._violations.note(
                "cq-doorbell", f"CQ {queue.number:#x} armed with {value:#x}, its record has {record:#x}"
            )
        queue.armed = True
        if (queue.producer - value) & CI_MASK:
            self._notify(queue)

    def _notify(self, queue: CompletionQueue) -> None:
        if queue.armed:
            queue.armed = False
            queue.sequence += 1
            self._events.complete(queue.eqn, queue.number)

    # queue pairs

    def create_pair(self, pd: int, ring: Ring | None, log_size: int, record: int, cqn: int) -> int:
        """A new queue pair in the state RESET; its number."""
        self._keys.use_domain(pd, 0)
        if ring is not None:
            queue = self.completions(cqn)
            try:
                self._bus().dma_read(record, 8)
            except BusError as error:
                raise RefusedError(Status.BAD_PARAM, 0x604, f"the doorbell record is no memory: {error}") from error
            queue.users.add(self._next_pair)
        number, self._next_pair = self._next_pair, self._next_pair + 1
        self._keys.use_domain(pd, 1)
        self._pairs[number] = QueuePair(number, pd, ring, log_size, record, cqn)
        return number

    def destroy_pair(self, number: int) -> None:
        """A queue pair goes; one in use does not."""
        pair = self.pair(number)
        if pair.users:
            raise RefusedError(Status.BUSY, 0x605, f"QP {number:#x} is used by objects {pair.users}")
        if pair.ring is not None:
            self.completions(pair.cqn).users.discard(number)
        self._keys.use_domain(pair.pd, -1)
        del self._pairs[number]

    def pair(self, number: int) -> QueuePair:
        """A queue pair by its number."""
        pair = self._pairs.get(number)
        if pair is None:
            raise RefusedError(Status.BAD_RES, 0x606, f"there is no QP {number:#x}")
        return pair

    def send(self, number: int, immediate: int, data: bytes, done: Callable[[bool], None]) -> None:
        """A message with an immediate from pair `number`; `done` with whether it arrived."""
        generation = self._generation
        self._bus().call_later(0.0, lambda: self._try(generation, number, immediate, data, done))

    def _try(self, generation: int, number: int, immediate: int, data: bytes, done: Callable[[bool], None]) -> None:
        if generation != self._generation:
            return
        source = self._pairs.get(number)
        target = None if source is None else self._pairs.get(source.remote)
        if source is None or source.state != READY_TO_SEND:
            done(False)
            return
        if target is None or target.state not in (READY_TO_RECEIVE, READY_TO_SEND) or target.remote != number:
            self._break(source, f"QP {number:#x} has no remote pair that listens")
            done(False)
            return
        try:
            posted = self._posted(target)
            if posted and target.ring is not None:
                self._deliver(target, target.ring, immediate, data)
        except (BusError, RefusedError) as error:
            if generation != self._generation:
                return
            self._break(target, str(error))
            self._break(source, f"its remote pair {target.number:#x} failed")
            done(False)
            return
        if posted:
            done(True)
        elif source.patient:
            self._bus().call_later(RNR_SECONDS, lambda: self._try(generation, number, immediate, data, done))
        else:
            self._break(source, f"QP {target.number:#x} has nothing posted")
            done(False)

    def _posted(self, pair: QueuePair) -> bool:
        if pair.ring is None:
            return False
        counter = int.from_bytes(self._bus().dma_read(pair.record, 4), "big")
        ahead = (counter - pair.consumer) & COUNTER_MASK
        if counter > COUNTER_MASK or ahead > 1 << pair.log_size:
            raise RefusedError(Status.BAD_PARAM, 0x607, f"QP {pair.number:#x}: receive counter {counter:#x}")
        return ahead > 0

    def _deliver(self, pair: QueuePair, ring: Ring, immediate: int, data: bytes) -> None:
        index = pair.consumer % (1 << pair.log_size)
        request = RECEIVE_WQE.unpack(self._bus().dma_read(ring.at(index * WQE_SIZE), WQE_SIZE))
        if request["byte_count"] < len(data):
            raise RefusedError(Status.BAD_PARAM, 0x608, f"{request['byte_count']} bytes posted for {len(data)}")
        if data:
            if self._keys.get(request["lkey"]).pd != pair.pd:
                raise RefusedError(Status.BAD_RES, 0x609, f"key {request['lkey']:#x} is of another PD")
            self._keys.write(request["lkey"], request["addr"], data)
        counter = pair.consumer & COUNTER_MASK
        pair.consumer += 1
        entry = CQE.pack(
            {
                "immediate": immediate,
                "byte_cnt": len(data),
                "qpn": pair.number,
                "wqe_counter": counter,
                "opcode": RECEIVED_WITH_IMMEDIATE,
            }
        )
        self._complete(self.completions(pair.cqn), entry)

    def _complete(self, queue: CompletionQueue, entry: bytes) -> None:
        consumer = int.from_bytes(self._bus().dma_read(queue.record, 4), "big")
        if queue.broken or (queue.producer - consumer) & CI_MASK >= 1 << queue.log_size:
            if not queue.broken:
                queue.broken = True
                data = queue.number.to_bytes(4, "big") + bytes(7) + bytes([OVERRUN])
                self._events.send(CQ_ERROR, data)
            raise RefusedError(Status.BAD_RES_STATE, 0x60A, f"CQ {queue.number:#x} was not read in time")
        owner = queue.producer >> queue.log_size & 1
        at = queue.ring.at(queue.producer % (1 << queue.log_size) * CQE_SIZE)
        queue.producer += 1
        self._bus().dma_write(at, entry[:-1])
        self._bus().dma_write(at + CQE_SIZE - 1, bytes([entry[-1] & 0xF0 | owner]))
        self._notify(queue)

    def _break(self, pair: QueuePair, text: str) -> None:
        """A queue pair is in error; who listens is told."""
        self._violations.note("qp-error", f"QP {pair.number:#x}: {text}")
        pair.state = ERROR
        self._events.send(QP_ACCESS_ERROR, bytes(0x18) + pair.number.to_bytes(4, "big"))
