"""Queue contexts, SQC and CQC: 32 bytes each as they lie in a queue table, a mailbox buffer or the cache.

Source: Linux 7.2.8, drivers/crypto/hisilicon/qm.c (struct qm_sqc, struct qm_cqc). It must not know who keeps them.
"""

import struct
from dataclasses import astuple, dataclass
from typing import ClassVar, Self

SIZE = 32
CQE_SIZE = 16
CLOSED = 0xAAAA
"""What a driver writes as `random` of a queue that it closes behind the hardware's back."""

_WRAP = 1 << 6
_PHASE = 1
_EVENT = 2


@dataclass(slots=True)
class _Context:
    """What both kinds begin with. `shape`: depth - 1 in bits 11:0, log2 of an entry's size in 15:12."""

    layout: ClassVar[struct.Struct]

    head: int
    tail: int
    base: int
    shape: int
    random: int
    reserved18: int
    pasid: int
    flags: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """From 32 bytes."""
        return cls(*cls.layout.unpack(data))

    def pack(self) -> bytes:
        """To 32 bytes."""
        return self.layout.pack(*astuple(self))

    @property
    def depth(self) -> int:
        """Entries of the ring."""
        return (self.shape & 0xFFF) + 1


@dataclass(slots=True)
class Sqc(_Context):
    """A submission queue's context."""

    layout = struct.Struct("<HHQIHHHHHHI")

    cq: int
    service: int
    reserved28: int

    @property
    def entry_size(self) -> int:
        """Bytes of an entry."""
        return 1 << (self.shape >> 12 & 0xF)

    @property
    def algorithm(self) -> int:
        """Algorithm type: for ZIP 0 compresses, 1 decompresses."""
        return self.service >> 8 & 0xF

    @property
    def waiting(self) -> int:
        """Entries between head and tail."""
        return (self.tail - self.head) % self.depth

    def advance_tail(self, tail: int) -> None:
        """The driver has filled entries up to `tail`; the wrap bit flips when the ring's end is passed."""
        if tail < self.tail:
            self.flags ^= _WRAP
        self.tail = tail


@dataclass(slots=True)
class Cqc(_Context):
    """A completion queue's context. `state`: bit 0 phase, bit 1 c_flag."""

    layout = struct.Struct("<HHQIHHHHII")

    state: int
    reserved28: int

    @property
    def phase(self) -> int:
        """The phase bit of the next entry."""
        return self.state & _PHASE

    @property
    def event_wanted(self) -> bool:
        """c_flag: the next completion is to be told by an event."""
        return bool(self.state & _EVENT)

    @event_wanted.setter
    def event_wanted(self, wanted: bool) -> None:
        self.state = self.state | _EVENT if wanted else self.state & ~_EVENT

    @property
    def unread(self) -> int:
        """Completions that the driver has not told us to have read."""
        return (self.tail - self.head) % self.depth

    @property
    def full(self) -> bool:
        """One more would look like none."""
        return self.unread == self.depth - 1

    def advance_tail(self) -> None:
        """One entry was written; wrap bit and phase flip at the ring's end."""
        self.tail = (self.tail + 1) % self.depth
        if not self.tail:
            self.flags ^= _WRAP
            self.state ^= _PHASE


def complaint(sqc: Sqc, entry_size: int, number: int) -> str:
    """What makes an SQC of queue `number` impossible; empty if nothing does."""
    if not sqc.base:
        return "base 0"
    if sqc.entry_size != entry_size:
        return f"entries of {sqc.entry_size} bytes, not {entry_size}"
    if sqc.cq != number:
        return f"completion queue {sqc.cq} for queue {number}"
    return _ring_complaint(sqc.head, sqc.tail, sqc.depth)


def cq_complaint(cqc: Cqc) -> str:
    """What makes a CQC impossible; empty if nothing does."""
    if not cqc.base:
        return "base 0"
    if cqc.shape >> 12 & 0xF != 4:
        return "entries of a size other than 16 bytes"
    return _ring_complaint(cqc.head, cqc.tail, cqc.depth)


def _ring_complaint(head: int, tail: int, depth: int) -> str:
    if depth < 2:
        return f"depth {depth}"
    if head >= depth or tail >= depth:
        return f"head {head} or tail {tail} outside of a ring of {depth}"
    return ""
