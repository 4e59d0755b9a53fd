"""A function's command queue: entries and mailboxes fetched by DMA, checked, and given back in any order.

It knows the entry's and the mailbox's form (rdma-core's and Linux's drivers agree on it) and nothing of what commands
do. Checks that no document orders are marked (model).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from plugins.mlx5.models.orders import Orders
from plugins.mlx5.models.status import Delivery, Status, Violations
from vfu_server.model import Bus, BusError

logger = logging.getLogger(__name__)

LOG_SIZE, LOG_STRIDE = 5, 6
ENTRY = 64
TYPE_PCI = 7
MAILBOX = 576
MAILBOX_DATA = 512
MAILBOX_ALIGNMENT = 1024
INLINE = 16
MOST_BYTES = 1 << 21
"""The longest command that is taken (model)."""
_OUTPUT, _OUT_POINTER, _TOKEN, _SIGNATURE, _OWNER = 0x20, 0x30, 0x3C, 0x3D, 0x3F


def xor(data: bytes) -> int:
    """All bytes, exclusive or: by folding, as commands can be long."""
    number, size = int.from_bytes(data, "big"), len(data)
    while size > 1:
        half = (size + 1) // 2
        number = (number >> 8 * half) ^ (number & ((1 << 8 * half) - 1))
        size = half
    return number & 0xFF


@dataclass(slots=True)
class Request:
    """One command: `data` its whole input, `room` the bytes that the driver has for the output."""

    entry: int
    token: int
    data: bytes
    room: int
    generation: int
    mailboxes: list[tuple[int, bytes]] = field(default_factory=list)
    """The output's blocks: where they are, and what the driver left in them."""

    @property
    def opcode(self) -> int:
        """The first 16 bits."""
        return int.from_bytes(self.data[:2], "big")


class _DeliveryError(Exception):
    def __init__(self, delivery: Delivery, text: str) -> None:
        super().__init__(text)
        self.delivery = delivery


class CommandQueue:
    """The queue at `address` (None: the driver has named none). `execute` is called with each command that is sound;
    whoever executes calls `finish` once, now or later. `finished` hears of each entry that was given back.
    """

    def __init__(
        self,
        bus: Callable[[], Bus],
        execute: Callable[[Request], None],
        finished: Callable[[int], None],
        orders: Orders,
        violations: Violations,
    ) -> None:
        self.address: int | None = None
        self.checksums = False
        """Signatures have to be there and right, of entries and mailboxes."""
        self.held = False
        """Commands that are posted wait (a suspended function starts nothing)."""
        self._bus = bus
        self._execute = execute
        self._finished = finished
        self._orders = orders
        self._violations = violations
        self._generation = 0
        self._running: set[int] = set()
        self._waiting = 0
        self.executed = 0

    def reset(self) -> None:
        """Forget the queue; commands that run are never given back."""
        self.address = None
        self.checksums = False
        self.held = False
        self._generation += 1
        self._running.clear()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """The doorbell bits of entries that were not fetched yet."""
        return self._waiting

    def restore(self, waiting: int) -> None:
        """A state is loaded: entries whose doorbell was rung and that nobody fetched."""
        self._generation += 1
        self._running.clear()
        self._waiting = waiting

    def doorbell(self, vector: int) -> None:
        """A write of the doorbell: a bit for each entry that was posted."""
        if self.address is None:
            self._violations.note("doorbell", f"command doorbell {vector:#x} before the queue has an address")
            return
        self._waiting |= vector
        self.go_on()

    def go_on(self) -> None:
        """Fetch what waits, unless held. As callbacks: the client waits for its write and may not serve memory."""
        if self.held:
            return
        vector, self._waiting = self._waiting, 0
        generation = self._generation
        for entry in range(1 << LOG_SIZE):
            if vector >> entry & 1:
                self._bus().call_later(0.0, lambda entry=entry: self._fetch(entry, generation))  # type: ignore[misc]

    def finish(self, request: Request, output: bytes, delivery: int = Delivery.OK) -> None:
        """Give an entry back: output, then status byte and ownership, then whoever wants to know."""
        if request.generation != self._generation:
            return
        if self._orders.take_for("lost", request.opcode) is not None:
            logger.info("command %#x is never given back, as ordered", request.opcode)
            return
        try:
            self._put(request, output, delivery)
        except BusError as error:
            self._violations.note("command-memory", f"entry {request.entry}: {error}")
        if request.generation != self._generation:  # the client went while it was written
            return
        self._running.discard(request.entry)
        self.executed += 1
        self._finished(request.entry)

    # inside

    def _fetch(self, entry: int, generation: int) -> None:
        if generation != self._generation or self.address is None:
            return
        if self.held:
            self._waiting |= 1 << entry
            return
        if entry in self._running:
            self._violations.note("entry-in-use", f"entry {entry} was posted while it is with the hardware")
            return
        try:
            head = self._bus().dma_read(self.address + (entry << LOG_STRIDE), ENTRY)
        except BusError as error:
            self._violations.note("command-memory", f"entry {entry}: {error}")
            return
        if generation != self._generation:
            return
        if not head[_OWNER] & 1:
            self._violations.note("doorbell", f"entry {entry} was posted without being the hardware's")
            return
        self._running.add(entry)
        request = Request(entry, head[_TOKEN], head[0x10:0x20], int.from_bytes(head[0x38:0x3C], "big"), generation)
        try:
            self._check(head)
            self._gather(request, head)
        except _DeliveryError as error:
            self._violations.note("delivery", f"entry {entry}: {error}")
            request.mailboxes = []
            self.finish(request, _refusal(), error.delivery)
            return
        if generation != self._generation:
            return
        ordered = self._orders.take_for("delivery", request.opcode)
        if ordered:
            request.mailboxes = []
            self.finish(request, _refusal(), ordered[0] & 0x7F)
            return
        self._execute(request)

    def _check(self, head: bytes) -> None:
        if head[0] != TYPE_PCI:
            raise _DeliveryError(Delivery.TYPE, f"type {head[0]:#x}")
        if any(head[1:4]) or head[0x3E] or head[_OWNER] != 1:
            raise _DeliveryError(Delivery.RESERVED, f"reserved bytes {head[1:4].hex()} {head[0x3E:].hex()}")
        if (self.checksums or head[_SIGNATURE]) and xor(head) != 0xFF:
            raise _DeliveryError(Delivery.SIGNATURE, f"signature {head[_SIGNATURE]:#x}")
        in_length, room = int.from_bytes(head[4:8], "big"), int.from_bytes(head[0x38:0x3C], "big")
        if not INLINE <= in_length <= MOST_BYTES:
            raise _DeliveryError(Delivery.IN_LENGTH, f"input of {in_length} bytes")
        if not INLINE <= room <= MOST_BYTES:
            raise _DeliveryError(Delivery.OUT_LENGTH, f"output of {room} bytes")

    def _gather(self, request: Request, head: bytes) -> None:
        in_length = int.from_bytes(head[4:8], "big")
        if in_length > INLINE:
            first = int.from_bytes(head[8:0x10], "big")
            blocks = self._chain(first, in_length, request.token, Delivery.IN_POINTER)
            data = b"".join(block[:MAILBOX_DATA] for _, block in blocks)[: in_length - INLINE]
            request.data += data
        if request.room > INLINE:
            first = int.from_bytes(head[_OUT_POINTER : _OUT_POINTER + 8], "big")
            request.mailboxes = self._chain(first, request.room, request.token, Delivery.OUT_POINTER)

    def _chain(self, at: int, length: int, token: int, pointer: Delivery) -> list[tuple[int, bytes]]:
        """The blocks that `length` bytes need: a chain may be longer, what lies behind is not looked at."""
        found: list[tuple[int, bytes]] = []
        for number in range(-(-(length - INLINE) // MAILBOX_DATA)):
            if at == 0 or at % MAILBOX_ALIGNMENT:
                raise _DeliveryError(pointer, f"mailbox {number} at {at:#x}")
            try:
                block = self._bus().dma_read(at, MAILBOX)
            except BusError as error:
                raise _DeliveryError(Delivery.INTERNAL, str(error)) from error
            if int.from_bytes(block[0x238:0x23C], "big") != number:
                raise _DeliveryError(Delivery.BLOCK_NUMBER, f"mailbox {number} has number {block[0x238:0x23C].hex()}")
            if block[0x23D] != token:
                raise _DeliveryError(Delivery.TOKEN, f"mailbox {number} has token {block[0x23D]:#x}, not {token:#x}")
            if any(block[0x200:0x230]) or block[0x23C]:
                raise _DeliveryError(Delivery.RESERVED, f"mailbox {number} has ones in reserved bytes")
            if not self._is_signed(block, pointer is Delivery.IN_POINTER):
                raise _DeliveryError(Delivery.SIGNATURE, f"mailbox {number} has signatures {block[0x23E:].hex()}")
            found.append((at, block))
            at = int.from_bytes(block[0x230:0x238], "big")
        return found

    def _is_signed(self, block: bytes, whole: bool) -> bool:
        if (self.checksums or block[0x23E]) and xor(block[0x200:0x23F]) != 0xFF:
            return False
        return not (whole and (self.checksums or block[0x23F]) and xor(block) != 0xFF)

    def _put(self, request: Request, output: bytes, delivery: int) -> None:
        bus = self._bus()
        assert self.address is not None
        for number, (at, block) in enumerate(request.mailboxes):
            start = INLINE + number * MAILBOX_DATA
            full = output[start : start + MAILBOX_DATA].ljust(MAILBOX_DATA, b"\0") + block[MAILBOX_DATA:]
            if self.checksums:
                full = _signed(full)
            bus.dma_write(at, full)
        entry = self.address + (request.entry << LOG_STRIDE)
        bus.dma_write(entry + _OUTPUT, output[:INLINE].ljust(INLINE, b"\0"))
        owner = delivery << 1
        if self._orders.take("bad-token"):
            bus.dma_write(entry + _TOKEN, bytes([request.token ^ 0xFF]))
        wrong = self._orders.take("bad-signature")
        if self.checksums or wrong:
            whole = bus.dma_read(entry, ENTRY)
            signature = ~xor(whole[:_SIGNATURE] + whole[_SIGNATURE + 1 : _OWNER] + bytes([owner])) & 0xFF
            bus.dma_write(entry + _SIGNATURE, bytes([signature ^ (0xFF if wrong else 0)]))
        bus.dma_write(entry + _OWNER, bytes([owner]))


def _signed(block: bytes) -> bytes:
    control = ~xor(block[0x200:0x23E]) & 0xFF
    block = block[:0x23E] + bytes([control])
    return block + bytes([~xor(block) & 0xFF])


def _refusal() -> bytes:
    return bytes([Status.INTERNAL]).ljust(INLINE, b"\0")
