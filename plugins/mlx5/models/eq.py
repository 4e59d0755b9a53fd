"""Event queues: entries that the hardware writes, what the driver says of them by doorbell, and the interrupts.

It must not know what events mean. Form and ownership as both known drivers use them; see also `messages.EQE`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from plugins.mlx5.models.messages import EQE
from plugins.mlx5.models.orders import Orders
from plugins.mlx5.models.status import RefusedError, Status, Violations
from vfu_server.model import Bus, BusError

ENTRY = 64
MOST_LOG_SIZE = 22
PAGE = 4096
CI_MASK = 0xFFFFFF
EQ_OVERRUN, EQ_IN_ERROR = 0xC, 0xD
ARMED, FIRED = 0x9, 0xA

COMPLETION, CQ_ERROR, QP_ERROR, COMMAND, PAGE_REQUEST, OBJECT_CHANGE = 0x00, 0x04, 0x05, 0x0A, 0x0B, 0x27
VPORT_CHANGE = 0x0D
QP_ACCESS_ERROR = 0x11


@dataclass(frozen=True, slots=True)
class Ring:
    """A queue's memory: pages of `page_size` bytes that follow each other."""

    pages: tuple[int, ...]
    page_size: int

    def at(self, offset: int) -> int:
        """The IOVA of a byte; entries never cross a page."""
        return self.pages[offset // self.page_size] + offset % self.page_size

    @classmethod
    def checked(cls, pages: Iterable[int], log_page_size: int, size: int, what: str) -> "Ring":
        """Pages as a command names them; `log_page_size` counts from 4 KiB."""
        page_size = PAGE << log_page_size
        ring = cls(tuple(pages), page_size)
        needed = max(1, -(-size // page_size))
        if len(ring.pages) != needed:
            raise RefusedError(
                Status.BAD_PARAM, 0x301, f"{what} of {size} bytes needs {needed} pages, not {len(ring.pages)}"
            )
        for page in ring.pages:
            if page == 0 or page % page_size:
                raise RefusedError(Status.BAD_PARAM, 0x302, f"{what} cannot have a page at {page:#x}")
        return ring


@dataclass(slots=True)
class EventQueue:
    """`producer` and `consumer` count entries since the beginning; both go on beyond the queue's size."""

    number: int
    ring: Ring
    log_size: int
    log_page_size: int
    uar: int
    vector: int
    mask: int
    armed: bool = False
    producer: int = 0
    consumer: int = 0
    overrun: bool = False
    users: set[int] = field(default_factory=set)
    """Completion queues that send their events here."""


class EventQueues:
    """All event queues of the PF. `fail` is called with a health syndrome."""

    def __init__(
        self, bus: Callable[[], Bus], orders: Orders, violations: Violations, fail: Callable[[int], None]
    ) -> None:
        self._bus = bus
        self._orders = orders
        self._violations = violations
        self._fail = fail
        self._queues: dict[int, EventQueue] = {}
        self._next = 1
        self._generation = 0

    def reset(self) -> None:
        """All are gone."""
        self._queues.clear()
        self._generation += 1

    def __len__(self) -> int:
        return len(self._queues)

    def create(self, ring: Ring, log_size: int, log_page_size: int, uar: int, vector: int, mask: int) -> int:
        """A new queue; its number. The driver has to have marked all entries as not written."""
        number: int = next(n for n in (*range(self._next, 256), *range(1, self._next)) if n not in self._queues)
        self._next = number % 255 + 1
        generation = self._generation
        try:
            for page_number in range(len(ring.pages)):
                length = min(ring.page_size, (ENTRY << log_size) - page_number * ring.page_size)
                owners = self._bus().dma_read(ring.pages[page_number], length)[ENTRY - 1 :: ENTRY]
                if any(not owner & 1 for owner in owners):
                    self._violations.note("eq-owner", "entries of a new event queue are not marked as not written")
                    break
        except BusError as error:
            raise RefusedError(Status.BAD_PARAM, 0x303, f"the event queue is no memory: {error}") from error
        if generation != self._generation:
            raise RefusedError(Status.BAD_SYS_STATE, 0x306, "the function was reset", mistake=False)
        self._queues[number] = EventQueue(number, ring, log_size, log_page_size, uar, vector, mask)
        return number

    def destroy(self, number: int) -> None:
        """A queue goes; one that completion queues use does not."""
        queue = self.get(number)
        if queue.users:
            raise RefusedError(Status.BUSY, 0x304, f"event queue {number} is used by completion queues {queue.users}")
        del self._queues[number]

    def get(self, number: int) -> EventQueue:
        """A queue by its number."""
        queue = self._queues.get(number)
        if queue is None:
            raise RefusedError(Status.BAD_RES, 0x305, f"there is no event queue {number}")
        return queue

    def uses(self, uar: int) -> bool:
        """Whether a queue's doorbells are in that page."""
        return any(queue.uar == uar for queue in self._queues.values())

    def subscribes(self, event: int) -> bool:
        """Whether a queue takes events of that type."""
        return any(queue.mask >> event & 1 for queue in self._queues.values())

    def send(self, event: int, data: bytes = b"", sub_type: int = 0) -> bool:
        """An event to every queue that takes its type; False if there is none. `data`: what follows from byte 0x20."""
        queues = [queue for queue in self._queues.values() if queue.mask >> event & 1]
        for queue in queues:
            self._put(queue, event, sub_type, data)
        return bool(queues)

    def complete(self, number: int, cqn: int) -> None:
        """A completion event to one queue."""
        queue = self._queues.get(number)
        if queue is not None:
            self._put(queue, COMPLETION, 0, bytes(0x18) + cqn.to_bytes(4, "big"))

    def doorbell(self, uar: int, value: int, *, arm: bool) -> None:
        """A write of the EQ doorbell in page `uar`: number and consumer index."""
        number, consumer = value >> 24, value & CI_MASK
        queue = self._queues.get(number)
        if queue is None or queue.uar != uar:
            self._violations.note("eq-doorbell", f"doorbell of event queue {number} in page {uar}")
            return
        ahead = (consumer - queue.consumer) & CI_MASK
        if ahead > queue.producer - queue.consumer:
            self._violations.note("eq-doorbell", f"event queue {number} was read beyond its end: {consumer:#x}")
            return
        queue.consumer += ahead
        if arm:
            queue.armed = True
            self._interrupt(queue)

    def _put(self, queue: EventQueue, event: int, sub_type: int, data: bytes) -> None:
        if self._orders.take("event-lost"):
            return
        if queue.producer - queue.consumer >= 1 << queue.log_size:
            if not queue.overrun:
                queue.overrun = True
                self._violations.note("eq-overrun", f"event queue {queue.number} was not read in time")
                self._fail(EQ_OVERRUN)
            return
        owner = queue.producer >> queue.log_size & 1
        entry = EQE.pack({"type": event, "sub_type": sub_type, "data": int.from_bytes(data.ljust(0x1C, b"\0"), "big")})
        at = queue.ring.at((queue.producer % (1 << queue.log_size)) * ENTRY)
        queue.producer += 1
        try:
            self._bus().dma_write(at, entry[:-1])
            self._bus().dma_write(at + ENTRY - 1, bytes([owner]))
        except BusError as error:
            self._violations.note("eq-memory", f"event queue {queue.number}: {error}")
            self._fail(EQ_IN_ERROR)
            return
        self._interrupt(queue)

    def _interrupt(self, queue: EventQueue) -> None:
        if queue.armed and queue.producer > queue.consumer:
            queue.armed = False
            self._bus().message(queue.vector)
