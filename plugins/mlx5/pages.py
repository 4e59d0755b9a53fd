"""Memory that the firmware works with: pages given to it and taken back, per function, in our DMA space.

It knows of a function only its number (0: the physical function itself, n + 1: its virtual function n). When pages are
due is `boot`'s and `events`' to say. Source: Linux' mlx5_core (pagealloc.c).
"""

import errno
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from plugins.mlx5.buffers import released
from plugins.mlx5.commands import Commands
from plugins.mlx5.layouts import MANAGE_PAGES, QUERY_PAGES
from plugins.mlx5.status import CommandError, CommandLostError, PfDeadError
from vfu_server.dma_memory import DmaBuffer, DmaMemory
from vfu_server.errors import DeviceGoneError, HostError, VfuServerError

log = logging.getLogger(__name__)

PAGE: Final = 4096
BATCH: Final = 512
"""Pages of one command, and of one piece of our memory."""
MAX_PAGES: Final = 1 << 20
"""What we give in all, 4 GiB: firmware gone mad must not take the machine's memory."""
MAX_TAKE: Final = 50000
BOOT: Final = 1
INIT: Final = 2
_CANNOT, _GIVE, _TAKE = 0, 1, 2
ATTEMPTS: Final = 3
_PAUSE: Final = 0.02


@dataclass(eq=False)
class _Piece:
    """Memory that pages are cut from; freed when none of it is out any more."""

    buffer: DmaBuffer
    out: int


class Pages:
    """All pages that the firmware has from us."""

    def __init__(self, queue: Commands, memory: DmaMemory) -> None:
        self._queue = queue
        self._memory = memory
        self._given: dict[int, dict[int, _Piece]] = {}
        """By function, by iova."""

    @property
    def total(self) -> int:
        """Pages that are out."""
        return sum(len(pages) for pages in self._given.values())

    def of(self, function: int) -> int:
        """Pages that `function` has."""
        return len(self._given.get(function, {}))

    async def give_what_is_due(self, moment: int) -> int:
        """Ask what the firmware needs at `moment` (BOOT or INIT) and give it; returns the number of pages."""
        answer = await self._queue.call(QUERY_PAGES, op_mod=moment)
        count = signed(answer["num_pages"])
        if count > 0:
            await self.give(answer["function_id"], count)
        return max(0, count)

    async def give(self, function: int, count: int) -> None:
        """Give `function` that many pages. HostError ENOMEM: there is no memory, and the firmware was told so."""
        while count > 0:
            step = min(count, BATCH)
            try:
                if self.total + step > MAX_PAGES:
                    raise HostError(f"the firmware has {self.total} pages already and wants more", errno.ENOMEM)
                buffer = await self._memory.allocate(step * PAGE)
            except HostError:
                await self._manage(_CANNOT, function)
                raise
            try:
                await self._give(function, buffer)
            except CommandError:
                await released(self._manage(_CANNOT, function), self._queue.name)  # or who needs them waits for ever
                raise
            count -= step

    async def _give(self, function: int, buffer: DmaBuffer) -> None:
        places = range(buffer.iova, buffer.iova + buffer.size, PAGE)
        mine = self._given.setdefault(function, {})
        # first: a command that is lost may have been obeyed
        mine.update(dict.fromkeys(places, _Piece(buffer, len(places))))
        try:
            await self._manage(_GIVE, function, places)
        except CommandLostError:
            raise
        except HostError:
            for place in places:
                del mine[place]
            await self._memory.free(buffer)
            raise

    async def _manage(self, what: int, function: int, places: Sequence[int] = ()) -> None:
        """MANAGE_PAGES, again if the firmware has not heard of it: for whoever needs the pages waits until it has."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                tail = b"".join(place.to_bytes(8, "big") for place in places)
                values = {"function_id": function, "count": len(places)}
                await self._queue.call(MANAGE_PAGES, values, op_mod=what, pages=True, tail=tail)
            except (CommandLostError, DeviceGoneError, PfDeadError):
                raise
            except HostError as error:
                if attempt == ATTEMPTS or (isinstance(error, CommandError) and error.status):
                    raise
                log.info("%s: %s; trying again", self._queue.name, error)
            else:
                return

    async def take(self, function: int, count: int) -> int:
        """Take up to `count` pages back; returns how many came. HostError: what came is not ours."""
        taken = 0
        count = min(count, MAX_TAKE, self.of(function))
        while taken < count:
            step = min(count - taken, BATCH)
            answer = await self._queue.call(
                MANAGE_PAGES, op_mod=_TAKE, pages=True, function_id=function, count=step, room=8 * step
            )
            came = answer["count"]
            if came > step:
                raise HostError(f"MANAGE_PAGES gave {came} pages back, {step} were asked for", errno.EINVAL)
            for at in range(came):
                await self._came_back(function, int.from_bytes(answer.tail[8 * at : 8 * at + 8], "big"))
            taken += came
            if not came:
                break
        return taken

    async def _came_back(self, function: int, place: int) -> None:
        piece = self._given.get(function, {}).pop(place, None)
        if piece is None:
            raise HostError(f"MANAGE_PAGES gave back page {place:#x}, which function {function} has not got")
        piece.out -= 1
        if not piece.out:
            await self._memory.free(piece.buffer)

    async def reclaim(self, function: int, patience: float) -> int:
        """Take all pages of `function` back; returns how many stay out after `patience` seconds without progress."""
        deadline = trio.current_time() + patience
        while self.of(function) and trio.current_time() < deadline:
            if await self.take(function, self.of(function)):
                deadline = trio.current_time() + patience
            else:
                await trio.sleep(_PAUSE)
        return self.of(function)

    async def forget(self, function: int) -> None:
        """The firmware has let go of all pages of `function` without giving them back one by one."""
        for place in list(self._given.get(function, {})):
            await self._came_back(function, place)

    async def forget_all(self) -> None:
        """The device was reset: it has none any more."""
        for function in list(self._given):
            await self.forget(function)

    async def on_request(self, function: int, count: int, *, release_all: bool) -> None:
        """What a PAGE_REQUEST event asks for. A failure is logged: nobody waits for it."""
        try:
            if release_all:
                await self.forget(function)
            elif count > 0:
                await self.give(function, count)
            elif count < 0:
                await self.take(function, -count)
        except VfuServerError as error:
            log.warning("%s: pages for function %d (%+d): %s", self._queue.name, function, count, error)


def signed(value: int) -> int:
    """A dword as the count that it means."""
    return value - (1 << 32) if value >> 31 else value
