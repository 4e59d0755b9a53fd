"""Page trackers: which pages a VF has written since its tracker was made or last told, and the telling.

A report goes through a queue pair as messages of addresses; the state travels in the top bits of each immediate. It
must not know commands.
"""

from dataclasses import dataclass, field

from plugins.mlx5.models.caps import PAGE_TRACK_TYPE
from plugins.mlx5.models.eq import OBJECT_CHANGE, EventQueues
from plugins.mlx5.models.orders import Orders
from plugins.mlx5.models.status import RefusedError, Status
from plugins.mlx5.models.transport import READY_TO_SEND, Transport

TRACKING, REPORTING, FAILED = 0, 1, 2
ADDRESS = 8


@dataclass(slots=True)
class Track:
    """One tracker: the pages of `ranges` that VHCA `vhca_id` has written, by number."""

    number: int
    vhca_id: int
    log_page_size: int
    log_addr_space: int
    log_msg_size: int
    qpn: int
    ranges: tuple[tuple[int, int], ...]
    state: int = TRACKING
    pages: set[int] = field(default_factory=set)


class Tracker:
    """All trackers of the card."""

    def __init__(self, transport: Transport, events: EventQueues, orders: Orders) -> None:
        self._transport = transport
        self._events = events
        self._orders = orders
        self._tracks: dict[int, Track] = {}
        self._next = 7

    def reset(self) -> None:
        """All are gone."""
        self._tracks.clear()

    def numbers(self) -> dict[str, int]:
        """How many there are, and the pages that they would tell."""
        found = {"trackers": len(self._tracks)}
        for number, track in self._tracks.items():
            found[f"tracker[{number}].pages"] = len(track.pages)
            found[f"tracker[{number}].state"] = track.state
        return found

    def __len__(self) -> int:
        return len(self._tracks)

    def wrote(self, vhca_id: int, iova: int, length: int) -> None:
        """The VF has written memory."""
        for track in self._tracks.values():
            if track.vhca_id != vhca_id:
                continue
            for page in range(iova >> track.log_page_size, (iova + length - 1 >> track.log_page_size) + 1):
                start = page << track.log_page_size
                size = 1 << track.log_page_size
                if any(start < at + count and at < start + size for at, count in track.ranges):
                    track.pages.add(page)

    def create(
        self,
        vhca_id: int,
        log_page_size: int,
        log_addr_space: int,
        log_msg_size: int,
        qpn: int,
        ranges: tuple[tuple[int, int], ...],
    ) -> int:
        """A new tracker; its number."""
        pair = self._transport.pair(qpn)
        if pair.state != READY_TO_SEND:
            raise RefusedError(Status.BAD_QP_STATE, 0x701, f"QP {qpn:#x} is not ready to send")
        if any(track.vhca_id == vhca_id for track in self._tracks.values()):
            raise RefusedError(Status.LIMIT, 0x702, f"VHCA {vhca_id:#x} is tracked already")
        number, self._next = self._next, self._next + 1
        pair.users.add(number)
        self._tracks[number] = Track(number, vhca_id, log_page_size, log_addr_space, log_msg_size, qpn, ranges)
        return number

    def get(self, number: int) -> Track:
        """A tracker by its number."""
        track = self._tracks.get(number)
        if track is None:
            raise RefusedError(Status.BAD_RES, 0x703, f"there is no object {number} of type {PAGE_TRACK_TYPE:#x}")
        return track

    def destroy(self, number: int) -> None:
        """A tracker goes, in whatever state."""
        track = self.get(number)
        self._transport.pair(track.qpn).users.discard(number)
        del self._tracks[number]

    def report(self, number: int, start: int, length: int) -> None:
        """Tell the written pages of a range, and forget them. The telling goes on after the command has ended."""
        track = self.get(number)
        if track.state != TRACKING:
            raise RefusedError(Status.BAD_RES_STATE, 0x704, f"tracker {number} is in state {track.state}")
        size = 1 << track.log_page_size
        if not length or start % size or length % size:
            raise RefusedError(Status.BAD_PARAM, 0x705, f"a report of {start:#x} + {length:#x}")
        first, last = start >> track.log_page_size, start + length >> track.log_page_size
        pages = sorted(page for page in track.pages if first <= page < last)
        track.pages.difference_update(pages)
        track.state = REPORTING
        step = (1 << track.log_msg_size) // ADDRESS
        messages = [
            b"".join((page << track.log_page_size).to_bytes(ADDRESS, "big") for page in pages[at : at + step])
            for at in range(0, len(pages), step)
        ]
        if self._orders.take("tracker-error"):
            self._send(track, [], FAILED)
        else:
            self._send(track, messages, TRACKING)

    def _send(self, track: Track, messages: list[bytes], end: int) -> None:
        """The messages, then one without data that ends the report (model)."""
        state, data = (REPORTING, messages[0]) if messages else (end, b"")

        def done(arrived: bool) -> None:
            if self._tracks.get(track.number) is not track:
                return
            if arrived and messages:
                self._send(track, messages[1:], end)
                return
            self._change(track, end if arrived else FAILED)

        if not messages:
            # the state changes before the message that tells it can be read
            track.state = end
        self._transport.send(track.qpn, state << 28, data, done)

    def _change(self, track: Track, state: int) -> None:
        track.state = state
        data = b"\0\0" + PAGE_TRACK_TYPE.to_bytes(2, "big") + track.number.to_bytes(4, "big")
        self._events.send(OBJECT_CHANGE, data)
