"""One entry of a queue: fetched, worked, its result and its completion written, the event told if one is wanted.

(model) Results go into the entry in place, then the completion, then the event. From callbacks only: every DMA may let
the client in, who may reset the function; then nothing more of the entry happens. It must not know doorbells, caches
or who is paused.
"""

import struct

from plugins.hns.models.contexts import CQE_SIZE
from plugins.hns.models.eq import EventRing
from plugins.hns.models.queue import Queue
from plugins.hns.models.work import run
from vfu_server.model import BusError, Model

CQ_OVERFLOW, EQ_OVERFLOW, CQE_ERROR = 0, 1, 2
"""Types of AEQ entries."""
_TYPE = 17
_CQE = struct.Struct("<IHHHHHH")


class Processor:
    """Works for the queues of `owner`, a function of kind `kind`."""

    def __init__(self, owner: Model, kind: str, events: EventRing, errors: EventRing) -> None:
        self._owner = owner
        self._kind = kind
        self._events = events
        self._errors = errors
        self.completed = 0
        self.dma_errors = 0

    def process(self, queue: Queue) -> None:
        """Do the entry at the head. A queue whose context went meanwhile is left alone."""
        sqc, cqc, bus, faults = queue.sqc, queue.cqc, self._owner.bus, self._owner.faults
        if sqc is None or cqc is None or not sqc.waiting:
            return
        if cqc.full:
            self._break(queue, CQ_OVERFLOW)
            return
        where, index = sqc.base + sqc.head * sqc.entry_size, sqc.head
        try:
            entry = run(self._kind, bus.dma_read(where, sqc.entry_size), sqc.algorithm, bus, faults)
            if queue.sqc is not sqc or queue.cqc is not cqc:
                return
            bus.dma_write(where, entry)
            if faults.take("cqe-error"):
                raise BusError("ordered")
            if not faults.take("lost-completion"):
                cqe = _CQE.pack(0, 0, 0, index, queue.number, 0, cqc.phase)
                bus.dma_write(cqc.base + CQE_SIZE * cqc.tail, cqe)
        except BusError:
            self.dma_errors += 1
            if queue.sqc is sqc:
                self._break(queue, CQE_ERROR)
            return
        if queue.sqc is not sqc or queue.cqc is not cqc:
            return
        sqc.head = (sqc.head + 1) % sqc.depth
        cqc.advance_tail()
        queue.dirty = True
        self.completed += 1
        self.notify(queue)

    def notify(self, queue: Queue) -> None:
        """Tell of unread completions, if an event is wanted."""
        cqc = queue.cqc
        if cqc is None or not queue.event_due or not self._events.base:
            return
        if self._events.full:
            if not self._events.overflowed:
                self._events.overflowed = True
                self._post_error(queue, EQ_OVERFLOW)
            return
        cqc.event_wanted = False
        queue.dirty = True
        if not self._events.post(queue.number):
            cqc.event_wanted = True

    def _break(self, queue: Queue, kind: int) -> None:
        queue.broken = True
        self._post_error(queue, kind)

    def _post_error(self, queue: Queue, kind: int) -> None:
        self._errors.post(queue.number | kind << _TYPE)
