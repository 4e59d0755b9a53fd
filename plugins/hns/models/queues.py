"""All queues of a function: doorbells, the context cache and its tables, entries one after another, pause and drain.

(model) Each queue does one entry at a time, all queues at the same time. What needs DMA happens in callbacks, never in
an access of the client; where the client serves memory by messages, accesses (a reset too) may come in between, so
what was begun is looked at again before it goes on. It must not know registers or the mailbox's form.
"""

from collections.abc import Callable, Sequence

from plugins.hns.models.contexts import CLOSED, SIZE, Cqc, Sqc, complaint, cq_complaint
from plugins.hns.models.processor import Processor
from plugins.hns.models.queue import CQ, SQ, Doorbell, Queue
from plugins.hns.models.work import ENTRY_SIZE
from vfu_server.model import BusError, Model

WRITE_BACK_SECONDS = 2e-5

Ended = Callable[[bool], None]
"""Called once with whether it worked, from a callback."""
_Verdict = Callable[[], bool | None]
"""Whether it worked; None: not yet."""


class Queues:
    """The queues 0..count-1 of `owner`, all numbers being the function's own."""

    def __init__(
        self, owner: Model, kind: str, entry_seconds: float, processor: Processor, violated: Callable[[str], None]
    ) -> None:
        self._owner = owner
        self._entry_size = ENTRY_SIZE[kind]
        self._entry_seconds = entry_seconds
        self._processor = processor
        self._violated = violated
        self._waiters: list[tuple[_Verdict, Ended]] = []
        self._epoch = 0
        self.queues: list[Queue] = []
        self.tables = [0, 0]
        """IOVAs of the tables of all SQC and of all CQC."""
        self.doorbells = 0
        self.restarts = 0
        self.write_backs = 0

    @property
    def paused(self) -> int:
        """How many queues are paused."""
        return sum(queue.paused for queue in self.queues)

    @property
    def live(self) -> bool:
        """A queue that may work has its contexts here."""
        return any(queue.may_work for queue in self.queues)

    # life

    def start(self, count: int) -> None:
        """Start values: queues 0..count-1, all of them new: nothing at hand, not paused, no tables."""
        self._epoch += 1
        self.tables = [0, 0]
        for queue in self.queues:
            queue.forget()
        self.queues = [Queue(number) for number in range(count)]
        self._waiters = []

    # the driver's doorbells: no DMA here

    def doorbell(self, bell: Doorbell) -> None:
        """SQ or CQ doorbell of a queue of the function."""
        self.doorbells += 1
        if bell.command not in (SQ, CQ):
            self._violated("doorbell_command")
            return
        if bell.queue >= len(self.queues):
            self._violated("doorbell_queue")
            return
        if bell.priority > 1:
            self._violated("doorbell_priority")
            return
        queue = self.queues[bell.queue]
        if bell.command == SQ and not bell.priority and (queue.stopped or queue.broken):
            self._violated("doorbell_stopped")
            return
        queue.wait(bell)
        if queue.cached and not queue.restart:
            self._apply(queue)
        self._kick(queue)

    def room_for_events(self) -> None:
        """The EQ was read: those whose event found no room try again."""
        for queue in self.queues:
            if queue.event_due and not queue.paused:
                self._kick(queue)

    # contexts and tables: from callbacks

    def set_table(self, which: int, base: int) -> None:
        """The table of all SQC (0) or CQC (1) is at `base`: the cache is forgotten, entries are read when touched."""
        self._epoch += 1
        self.tables[which] = base
        for queue in self.queues:
            queue.forget()

    def set_context(self, which: int, number: int, data: bytes) -> bool:
        """Mailbox: a new SQC (0) or CQC (1) of queue `number`. False if it cannot be.

        (model) A new SQC begins a new queue: stopped, broken and paused are over.
        """
        queue = self.queues[number]
        if not self.tables[which]:
            return False
        if which == 0:
            sqc = Sqc.parse(data)
            if complaint(sqc, self._entry_size, number):
                return False
            queue.forget()
            queue.sqc, queue.paused = sqc, False
        else:
            cqc = Cqc.parse(data)
            if cq_complaint(cqc):
                return False
            queue.cqc = cqc
        queue.dirty = True
        return True

    def get_context(self, which: int, number: int) -> bytes | None:
        """The SQC (0) or CQC (1) of queue `number`, from the cache or its table; None if there is none."""
        queue = self.queues[number]
        found = (queue.sqc, queue.cqc)[which]
        if found is not None:
            return found.pack()
        return self._read_table(which, number)

    def write_back(self, ended: Ended) -> None:
        """Cached contexts go to the tables, a while from now; (model) those of queues at rest leave the cache."""
        epoch = self._epoch
        self._owner.bus.call_later(WRITE_BACK_SECONDS, lambda: self._write_back(ended, epoch))

    # pause and drain: from callbacks

    def pause(self, ended: Ended) -> None:
        """Entries at hand are finished, doorbells are taken, nothing is begun."""
        for queue in self.queues:
            queue.paused = True
        self._wait(lambda: None if any(queue.at_hand for queue in self.queues) else True, ended)

    def drain(self, numbers: Sequence[int], ended: Ended) -> None:
        """(model) The queues run empty and are closed then. It fails where work is left in a paused queue."""
        queues = [self.queues[number] for number in numbers]
        for queue in queues:
            queue.touched = True
            self._kick(queue)

        def verdict() -> bool | None:
            if any(queue.scheduled or queue.at_hand for queue in queues):
                return None
            empty = all(queue.broken or not queue.cached or not queue.has_work for queue in queues)
            if empty:
                for queue in queues:
                    queue.close()
            return empty

        self._wait(verdict, ended)

    # inside

    def _wait(self, verdict: _Verdict, ended: Ended) -> None:
        self._waiters.append((verdict, ended))
        self._settle()

    def _settle(self) -> None:
        for waiter in list(self._waiters):
            worked = waiter[0]()
            if worked is not None:
                self._waiters.remove(waiter)
                waiter[1](worked)

    def _apply(self, queue: Queue) -> None:
        for name in queue.apply():
            self._violated(name)

    def _kick(self, queue: Queue) -> None:
        if not queue.scheduled:
            queue.scheduled = True
            self._owner.bus.call_later(0, lambda: self._step(queue))

    def _is_ours(self, queue: Queue) -> bool:
        return queue.number < len(self.queues) and self.queues[queue.number] is queue

    def _step(self, queue: Queue) -> None:
        """One turn of a queue: finish the entry at hand, take what waited, begin the next entry."""
        if not self._is_ours(queue):
            return
        if queue.at_hand:
            self._processor.process(queue)
            queue.at_hand = False
        if queue.pending:
            self._absorb(queue)
        if queue.event_due and not queue.paused:
            self._processor.notify(queue)
        if not self._is_ours(queue):
            return
        if queue.may_work and queue.has_work:
            queue.at_hand = True
            self._owner.bus.call_later(self._entry_seconds, lambda: self._step(queue))
        else:
            queue.scheduled = False
            if queue.pending:  # it came while the client was asked for memory
                self._kick(queue)
        self._settle()

    def _absorb(self, queue: Queue) -> None:
        if queue.restart:
            queue.restart = queue.paused = False
            self.restarts += 1
            queue.touched = True
            if not queue.dirty:
                queue.drop_contexts()
        if not self._load(queue):
            if queue.waiting_sq is not None or queue.waiting_cq is not None:
                self._violated("doorbell_unset")
            queue.waiting_sq = queue.waiting_cq = None
            queue.touched = False
            return
        self._apply(queue)

    def _load(self, queue: Queue) -> bool:
        """Fill the cache from the tables, where it is empty."""
        epoch = self._epoch
        if queue.sqc is None:
            data = self._read_table(0, queue.number)
            if data is None or epoch != self._epoch:
                return False
            sqc = Sqc.parse(data)
            if complaint(sqc, self._entry_size, queue.number):
                return False
            queue.sqc, queue.stopped = sqc, sqc.random == CLOSED
        if queue.cqc is None:
            data = self._read_table(1, queue.number)
            if data is None or epoch != self._epoch:
                return False
            cqc = Cqc.parse(data)
            if cq_complaint(cqc):
                queue.sqc = queue.sqc if queue.dirty else None
                return False
            queue.cqc = cqc
        return True

    def _read_table(self, which: int, number: int) -> bytes | None:
        if not self.tables[which]:
            return None
        try:
            return self._owner.bus.dma_read(self.tables[which] + SIZE * number, SIZE)
        except BusError:
            self._processor.dma_errors += 1
            return None

    def _write_back(self, ended: Ended, epoch: int) -> None:
        worked = True
        for queue in self.queues:
            if queue.pending:
                self._absorb(queue)
            if epoch != self._epoch:
                return
            if queue.dirty:
                worked = self._write_contexts(queue) and worked
            if epoch != self._epoch:
                return
            at_rest = queue.paused or not (queue.has_work or queue.event_due)
            if worked and at_rest and not (queue.dirty or queue.at_hand or queue.pending):
                queue.drop_contexts()
        self.write_backs += 1
        ended(worked)

    def _write_contexts(self, queue: Queue) -> bool:
        queue.dirty = False  # a doorbell that comes meanwhile sets it again
        try:
            for table, context in zip(self.tables, (queue.sqc, queue.cqc), strict=True):
                if context is not None:
                    self._owner.bus.dma_write(table + SIZE * queue.number, context.pack())
        except BusError:
            self._processor.dma_errors += 1
            queue.dirty = True
            return False
        return True
