"""An event ring: the EQ (completion queues with news) or the AEQ (errors), its seven context words, its interrupt.

(model) An interrupt is sent when an entry was written, the mask is open and no interrupt is unanswered; a doorbell
answers it, and sends another if entries lie behind its index; opening the mask sends one that was held back. It must
not know queues or who has news.
"""

from plugins.hns.registers import CONTEXT_WORDS
from vfu_server.model import BusError, Model

ENTRY_SIZE = 4
_PHASE = 1 << 16
HEAD_TAIL, BASE_LOW, BASE_HIGH, SHAPE = 0, 1, 2, 6


class EventRing:
    """One ring of `owner`, told by MSI vector `vector`.

    `words` are EQC or AEQC as the migration registers and the mailbox show them: 0 head and tail, 1 and 2 the base,
    6 depth - 1 and phase; the others are kept as they are.
    """

    def __init__(self, owner: Model, vector: int) -> None:
        self._owner = owner
        self._vector = vector
        self.words: list[int] = []
        self.masked = True
        self.unanswered = False
        self.overflowed = False
        """An entry found no room, and this was told; until the next doorbell."""
        self.written = 0
        self.lost = 0
        self.reset()

    def reset(self) -> None:
        """Start values: no ring, masked."""
        self.words = [0] * CONTEXT_WORDS
        self.masked = True
        self.unanswered = False
        self.overflowed = False

    @property
    def head(self) -> int:
        """The next entry that the driver reads."""
        return self.words[HEAD_TAIL] & 0xFFFF

    @property
    def tail(self) -> int:
        """The next entry that is written."""
        return self.words[HEAD_TAIL] >> 16

    @property
    def base(self) -> int:
        """IOVA of the ring; 0: there is none."""
        return self.words[BASE_LOW] | self.words[BASE_HIGH] << 32

    @property
    def depth(self) -> int:
        """Entries of the ring."""
        return (self.words[SHAPE] & 0xFFFF) + 1

    @property
    def source(self) -> int:
        """Interrupt source (model): bit 0 while entries are unread."""
        return int(self.base != 0 and self.head != self.tail)

    @property
    def full(self) -> bool:
        """One more entry would look like none."""
        return (self.tail + 1) % self.depth == self.head

    def set_words(self, words: list[int]) -> None:
        """A new context, by mailbox or by the migration registers: nothing is unanswered."""
        self.words = list(words)
        self.unanswered = False

    def set_word(self, index: int, value: int) -> None:
        """One word of the migration registers."""
        self.words[index] = value
        self.unanswered = False

    def set_mask(self, value: int) -> None:
        """The mask register."""
        self.masked = bool(value & 1)
        if self.source:
            self._signal()

    def doorbell(self, index: int) -> bool:
        """The driver reads on at `index`. False if the ring has no such entry."""
        if not self.base or index >= self.depth:
            return False
        self.words[HEAD_TAIL] = self.words[HEAD_TAIL] & ~0xFFFF | index
        self.unanswered = self.overflowed = False
        if self.source:
            self._signal()
        return True

    def post(self, value: int) -> bool:
        """Write an entry with the bits of `value` beside the phase. From callbacks only. False: no ring, or it is full.

        An entry that memory does not take is lost, and counted.
        """
        if not self.base or self.full or self.tail >= self.depth:
            return False
        words, where = self.words, self.base + ENTRY_SIZE * self.tail
        entry = value | words[SHAPE] & _PHASE
        tail = (self.tail + 1) % self.depth
        words[HEAD_TAIL] = words[HEAD_TAIL] & 0xFFFF | tail << 16
        if not tail:
            words[SHAPE] ^= _PHASE
        try:
            self._owner.bus.dma_write(where, entry.to_bytes(ENTRY_SIZE, "little"))
        except BusError:
            self.lost += 1
            return True
        self.written += 1
        if words is self.words:  # else a reset came while the client was asked
            self._signal()
        return True

    def _signal(self) -> None:
        if self.masked or self.unanswered:
            return
        self.unanswered = True
        if not self._owner.faults.take("lost-interrupt"):
            self._owner.bus.message(self._vector)
