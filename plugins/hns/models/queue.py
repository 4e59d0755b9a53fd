"""One queue of a function: its two contexts in the cache, doorbells that wait for them, and whether it may work.

(model) Contexts are in a cache: the mailbox fills it, a touch of a queue that is not there loads it from the tables in
guest memory. A doorbell that comes before the load waits here; of several the last counts, as with hardware. It must
not know DMA, time or events.
"""

from dataclasses import dataclass

from plugins.hns.models.contexts import CLOSED, Cqc, Sqc

SQ, CQ, EQ, AEQ = range(4)


@dataclass(frozen=True, slots=True)
class Doorbell:
    """One 64-bit store, taken apart (V2 and later)."""

    queue: int
    command: int
    random: int
    index: int
    priority: int


def parse_doorbell(value: int) -> Doorbell:
    """The fields of a doorbell."""
    return Doorbell(value & 0xFFF, value >> 12 & 0xF, value >> 16 & 0xFFFF, value >> 32 & 0xFFFF, value >> 48 & 0xFFFF)


class Queue:
    """Queue `number` of a function. Who waits for memory compares contexts by identity to see that they went."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sqc: Sqc | None = None
        self.cqc: Cqc | None = None
        self.dirty = False
        self.paused = False
        self.stopped = False
        """Closed; takes no SQ doorbells until it gets a new SQC."""
        self.broken = False
        """Stopped by an error; the same."""
        self.at_hand = False
        self.scheduled = False
        self.touched = False
        """Somebody wants its contexts in the cache."""
        self.restart = False
        self.waiting_sq: Doorbell | None = None
        self.waiting_cq: Doorbell | None = None

    @property
    def cached(self) -> bool:
        """Both contexts are here."""
        return self.sqc is not None and self.cqc is not None

    @property
    def pending(self) -> bool:
        """Something waits for the contexts."""
        return self.touched or self.restart or self.waiting_sq is not None or self.waiting_cq is not None

    @property
    def may_work(self) -> bool:
        """Neither paused nor stopped."""
        return self.cached and not (self.paused or self.stopped or self.broken)

    @property
    def has_work(self) -> bool:
        """Entries between head and tail."""
        return self.sqc is not None and self.sqc.waiting > 0

    @property
    def event_due(self) -> bool:
        """(model) An event is wanted and completions lie unread already: it comes at once, none is missed."""
        return self.cqc is not None and self.cqc.event_wanted and self.cqc.unread > 0

    def forget(self) -> None:
        """The cache is emptied: contexts, errors and waiting doorbells are gone. A pause stays."""
        self.drop_contexts()
        self.stopped = self.broken = self.touched = self.restart = False
        self.waiting_sq = self.waiting_cq = None

    def close(self) -> None:
        """(model) Stopped by the mailbox: marked in the SQC, so that it stays stopped wherever that goes."""
        if self.sqc is not None:
            self.sqc.random = CLOSED
            self.stopped = self.dirty = True

    def drop_contexts(self) -> None:
        """The next touch loads them again."""
        self.sqc = self.cqc = None
        self.dirty = False

    def wait(self, doorbell: Doorbell) -> None:
        """Keep a doorbell until `apply`."""
        if doorbell.command == CQ:
            self.waiting_cq = doorbell
        elif doorbell.priority == 1:
            self.restart = True
        else:
            self.waiting_sq = doorbell

    def apply(self) -> list[str]:
        """Do what waited, contexts are here; returns what was wrong with it."""
        wrong = []
        if self.waiting_cq is not None:
            wrong.append(self._apply_cq(self.waiting_cq))
        if self.waiting_sq is not None:
            wrong.append(self._apply_sq(self.waiting_sq))
        self.waiting_sq = self.waiting_cq = None
        self.touched = False
        return [name for name in wrong if name]

    def _apply_sq(self, doorbell: Doorbell) -> str:
        sqc = self.sqc
        if sqc is None or self.stopped or self.broken:
            return "doorbell_stopped"
        if doorbell.random != sqc.random:
            return "doorbell_random"
        if doorbell.index >= sqc.depth or (doorbell.index - sqc.head) % sqc.depth < sqc.waiting:
            return "doorbell_index"
        if doorbell.index != sqc.tail:
            sqc.advance_tail(doorbell.index)
            self.dirty = True
        return ""

    def _apply_cq(self, doorbell: Doorbell) -> str:
        cqc = self.cqc
        if cqc is None:
            return "doorbell_stopped"
        if doorbell.random != cqc.random:
            return "doorbell_random"
        if doorbell.index >= cqc.depth or (doorbell.index - cqc.head) % cqc.depth > cqc.unread:
            return "doorbell_index"
        cqc.head = doorbell.index
        if doorbell.priority & 1:
            cqc.event_wanted = True
        self.dirty = True
        return ""
