"""Which pages a virtual function writes, from the firmware's own log: the page tracker object, and its reports.

It knows ranges and addresses, not who asks or what a client's memory is. Source: Linux' mlx5-vfio-pci (cmd.c,
mlx5vf_start_page_tracker and what follows).
"""

import errno
import itertools
import logging
from collections.abc import Sequence
from typing import Final

import trio

from plugins.mlx5 import events
from plugins.mlx5.boot import Caps, query_caps
from plugins.mlx5.buffers import released
from plugins.mlx5.commands import Bound, Commands
from plugins.mlx5.contexts import (
    ADV_VIRTUALIZATION,
    CAP_ADV_VIRTUALIZATION,
    EQE_CQ,
    EQE_OBJECT,
    EQE_QP,
    PAGE_TRACK_TYPE,
)
from plugins.mlx5.events import EventQueue
from plugins.mlx5.layouts import CREATE_OBJECT, DESTROY_OBJECT, MODIFY_OBJECT, QUERY_OBJECT
from plugins.mlx5.loopback import LoopbackPair, Message
from plugins.mlx5.pf import PhysicalFunction, VirtualFunction
from plugins.mlx5.status import PfDeadError
from vfu_server.errors import HostError

log = logging.getLogger(__name__)

TRACKING, REPORTING, ERROR = 0, 1, 2
SELECT_STATE_AND_RANGE: Final = 3
TRACK_TYPE: Final = 1
ADDRESS: Final = 8
REPORT_SECONDS: Final = 10.0
"""Silence for so long is no report any more."""
ASK_EVERY: Final = 0.2
FIRST_PAUSE, LONGEST_PAUSE = 0.0001, 0.01
Ranges = Sequence[tuple[int, int]]
"""`(iova, length)` in bytes, ascending."""


class PageTracker:
    """The log of one virtual function. After an error in it everything counts as written: `report` raises EIO."""

    def __init__(self, pf: PhysicalFunction, function: VirtualFunction) -> None:
        self._pf = pf
        self._function = function
        self._commands: Commands = Bound(pf.queue)
        self._pair: LoopbackPair | None = None
        self._completions: EventQueue | None = None
        self._object: int | None = None
        self._left: int | None = None
        """An object that the firmware would not destroy: there is room for one, so that is tried again."""
        self._asking = trio.Lock()
        """Around the object's end and every question about its state: once destroyed, its number may be another's."""
        self._page = 0
        self._broken = ""
        self._events: events.EventQueue | None = None
        self.reports = 0
        self.pages = 0

    async def start(self, ranges: Ranges, page_size: int) -> int:
        """Begin to follow `ranges`; returns the page size in bytes that is really used. HostError EOPNOTSUPP: they are
        larger or smaller than the firmware can follow.
        """
        await self.stop()
        pf = self._pf
        await self._destroy(self._left)
        commands = self._commands = Bound(pf.queue)
        caps = await query_caps(commands, CAP_ADV_VIRTUALIZATION, ADV_VIRTUALIZATION)
        merged = merge(ranges, max(1, caps["max_num_range"]))
        space = _space(merged, caps)
        log_page = min(max(page_size.bit_length() - 1, caps["log_min_page_size"]), caps["log_max_page_size"])
        log_message = caps["log_max_msg_size"]
        queue = pf.events
        if queue is None:
            raise HostError(f"{pf.host.name}: it is not up", errno.ENXIO)
        self._broken, self._page = "", 1 << log_page
        try:
            # nobody knows whether a completion queue may name the queue of the other events
            self._completions = EventQueue(pf.host, commands, pf.memory, pf.uar, types=())
            await self._completions.open()
            pair = LoopbackPair(commands, pf.memory, pf.adapter.general, pf.uar, self._completions.eqn)
            self._pair = pair
            await pair.open(log_message)
            self._listen(queue)
            answer = await commands.call(
                CREATE_OBJECT,
                op_mod=PAGE_TRACK_TYPE,
                tail=b"".join(at.to_bytes(8, "big") + length.to_bytes(8, "big") for at, length in merged),
                vhca_id=self._function.vhca_id,
                track_type=TRACK_TYPE,
                log_addr_space_size=space,
                log_page_size=log_page,
                log_msg_size=log_message,
                reporting_qpn=pair.sender,
                num_ranges=len(merged),
            )
            self._object = answer["obj_id"]
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.stop()
            raise
        return self._page

    async def stop(self) -> None:
        """Forget the log. Harmless if there is none; what cannot be given back is logged."""
        self._listen(None)
        number, self._object = self._object, None
        pair, self._pair = self._pair, None
        try:
            async with self._asking:
                await self._destroy(number)
        finally:
            if pair is not None:
                await pair.close()
            completions, self._completions = self._completions, None
            if completions is not None:
                await released(completions.close(), self._pf.host.name)

    async def _destroy(self, number: int | None) -> None:
        if number is None:
            return
        self._left = None
        try:
            await self._commands.call(DESTROY_OBJECT, op_mod=PAGE_TRACK_TYPE, obj_id=number)
        except PfDeadError as error:
            log.debug("%s: the log of pages is gone already: %s", self._pf.host.name, error)
        except HostError as error:
            log.warning("%s: the log of pages cannot be ended: %s", self._pf.host.name, error)
            self._left = number

    async def report(self, iova: int, length: int, page_size: int) -> bytes:
        """The pages of a range that were written since it was last asked for: a bit each, lowest first, in whole
        64-bit words. HostError EIO: the log is lost.
        """
        pair, number = self._pair, self._object
        if pair is None or number is None:
            raise HostError(f"{self._pf.host.name}: no log is kept", errno.EINVAL)
        if self._broken:
            raise HostError(f"{self._pf.host.name}: the log is lost: {self._broken}", errno.EIO)
        bitmap = bytearray(-(-length // (page_size * 64)) * 8)
        await self._commands.call(
            MODIFY_OBJECT,
            op_mod=PAGE_TRACK_TYPE,
            obj_id=number,
            modify_field_select=SELECT_STATE_AND_RANGE,
            state=REPORTING,
            range_start_address=iova,
            length=length,
        )
        try:
            with trio.CancelScope(shield=True):  # a report that is half read would be taken for the next one
                await self._collect(pair, number, _Bits(bitmap, iova, length, page_size, self._page))
        except HostError as error:
            self._broken = str(error)
            raise
        self.reports += 1
        return bytes(bitmap)

    async def _collect(self, pair: LoopbackPair, number: int, bits: "_Bits") -> None:
        quiet_until = trio.current_time() + REPORT_SECONDS
        ask_at = trio.current_time() + ASK_EVERY
        pause, state = FIRST_PAUSE, REPORTING
        while state == REPORTING:
            if self._broken:
                raise HostError(f"page tracker: {self._broken}", errno.EIO)
            message = pair.poll()
            if message is not None:
                state = self._take(message, bits)
                quiet_until, pause = trio.current_time() + REPORT_SECONDS, FIRST_PAUSE
                await trio.lowlevel.checkpoint()
                continue
            now = trio.current_time()
            if now >= quiet_until:
                raise HostError(f"page tracker: no report within {REPORT_SECONDS} s", errno.EIO)
            if now >= ask_at:
                asked, ask_at = await self._state(number), now + ASK_EVERY
                if asked is None:
                    raise HostError("page tracker: its log was ended", errno.EIO)
                state = asked
                if state == TRACKING:
                    state = self._drain(pair, bits)
                continue
            await trio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        if state != TRACKING:
            raise HostError(f"page tracker: it is in state {state}: its log is lost", errno.EIO)

    def _drain(self, pair: LoopbackPair, bits: "_Bits") -> int:
        """What came before the state was seen to have changed."""
        state = TRACKING
        while (message := pair.poll()) is not None:
            state = self._take(message, bits)
        return state

    async def _state(self, number: int) -> int | None:
        """What the object says; None: it is ours no more."""
        async with self._asking:
            if self._object != number:
                return None
            return (await self._commands.call(QUERY_OBJECT, op_mod=PAGE_TRACK_TYPE, obj_id=number))["state"]

    def _take(self, message: Message, bits: "_Bits") -> int:
        if len(message.data) % ADDRESS:
            raise HostError(f"page tracker: a report of {len(message.data)} bytes", errno.EIO)
        self.pages += len(message.data) // ADDRESS
        for at in range(0, len(message.data), ADDRESS):
            bits.set(int.from_bytes(message.data[at : at + ADDRESS], "big"))
        return message.immediate >> 28

    # what breaks a log

    def _listen(self, queue: events.EventQueue | None) -> None:
        watched = (
            (events.CQ_ERROR, self._on_cq_error),
            (events.QP_CATASTROPHIC, self._on_qp_error),
            (events.QP_REQUEST_ERROR, self._on_qp_error),
            (events.QP_ACCESS_ERROR, self._on_qp_error),
            (events.OBJECT_CHANGE, self._on_object),
        )
        if self._events is not None:
            for kind, handler in watched:
                self._events.off(kind, handler)
        self._events = queue
        if queue is not None:
            for kind, handler in watched:
                queue.on(kind, handler)

    async def _on_cq_error(self, event: bytes) -> None:
        if self._pair is not None and EQE_CQ.get(event, "cqn") == self._pair.numbers[0]:
            self._broken = f"completion queue error {EQE_CQ.get(event, 'error'):#x}"

    async def _on_qp_error(self, event: bytes) -> None:
        mine = self._pair is not None and EQE_QP.get(event, "qpn") in self._pair.numbers[1:]
        if mine and EQE_QP.get(event, "queue_type") == 0:
            self._broken = "queue pair error"

    async def _on_object(self, event: bytes) -> None:
        """The object's state has changed by itself: an error shows here even if no report comes."""
        number = EQE_OBJECT.get(event, "obj_id")
        if EQE_OBJECT.get(event, "obj_type") != PAGE_TRACK_TYPE or number != self._object:
            return
        try:
            if await self._state(number) == ERROR:
                self._broken = "the tracker is in error"
        except HostError as error:
            self._broken = str(error)


class _Bits:
    """A bitmap over a range, filled by addresses of pages of another size."""

    def __init__(self, bitmap: bytearray, iova: int, length: int, page_size: int, tracked: int) -> None:
        self._bitmap = bitmap
        self._iova = iova
        self._end = iova + length
        self._page = page_size
        self._tracked = tracked

    def set(self, address: int) -> None:
        """A tracked page was written. What lies outside of the range is nobody's question."""
        first = max(address, self._iova)
        last = min(address + self._tracked, self._end)
        for page in range((first - self._iova) // self._page, -(-(last - self._iova) // self._page)):
            self._bitmap[page >> 3] |= 1 << (page & 7)


def merge(ranges: Ranges, most: int) -> list[tuple[int, int]]:
    """At most `most` ranges that cover `ranges`: the nearest ones are joined."""
    found = sorted(ranges)
    while len(found) > most:
        gaps = [after[0] - (before[0] + before[1]) for before, after in itertools.pairwise(found)]
        at = gaps.index(min(gaps))
        (start, length), (other, more) = found[at], found[at + 1]
        found[at : at + 2] = [(start, max(start + length, other + more) - start)]
    return found


def _space(ranges: Ranges, caps: Caps) -> int:
    """log2 of all that is followed, rounded up."""
    total = sum(length for _, length in ranges)
    space = max(0, (total - 1).bit_length())
    low, high = caps["log_min_addr_space"], caps["log_max_addr_space"]
    if not total or not low <= space <= high:
        raise HostError(
            f"{total} bytes cannot be followed: the firmware's log takes 2^{low} to 2^{high}", errno.EOPNOTSUPP
        )
    return space
