"""Memory pages that drivers lend to the firmware: who needs how many, who gave which, and what is kept in them.

The firmware fills each page that it is given and looks later whether its words are still there, so that a page that is
no memory, is given twice or is used by somebody else shows. It must not know commands; events are sent by whoever owns
the queues.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from plugins.mlx5.models.status import RefusedError, Status, Violations
from vfu_server.model import Bus, BusError

PAGE = 4096
ICM_PAGE_ERROR = 0xB
PF = 0
"""The number of the PF among functions; VF i is i + 1."""
_TAG = struct.Struct(">8sQQQ")
_MAGIC = b"ICMPAGE\0"
SAMPLE = 64
"""How many pages one look at a function's memory visits."""


@dataclass(slots=True)
class Lender:
    """The books of one function. `asked`: requested and not given yet; `spare`: given, and to be taken back."""

    pages: list[int] = field(default_factory=list)
    asked: int = 0
    spare: int = 0
    looked: int = 0
    waiting: list[Callable[[bool], None]] = field(default_factory=list)
    """Who is called when everything that was asked for is there (True), or cannot be given (False)."""


class PageBank:
    """The pages of all functions. `fail` is called with a health syndrome when a page does not hold what it should."""

    def __init__(self, bus: Callable[[], Bus], violations: Violations, fail: Callable[[int], None]) -> None:
        self._bus = bus
        self._violations = violations
        self._fail = fail
        self._owners: dict[int, int] = {}
        self._lenders: dict[int, Lender] = {}
        self._generation = 0

    def reset(self) -> None:
        """A reset of the PF: nothing is remembered, nobody is called."""
        self._owners.clear()
        self._lenders.clear()
        self._generation += 1

    def of(self, function: int) -> Lender:
        """A function's books."""
        return self._lenders.setdefault(function, Lender())

    def count(self, function: int) -> int:
        """How many pages a function has."""
        return len(self.of(function).pages)

    def give(self, function: int, pages: list[int]) -> None:
        """Pages come: all are taken or none."""
        lender = self.of(function)
        if len(pages) > lender.asked:
            raise RefusedError(
                Status.LIMIT, 0x201, f"function {function} asked for {lender.asked} pages, not {len(pages)}"
            )
        for number, page in enumerate(pages):
            if page == 0 or page % PAGE:
                raise RefusedError(Status.BAD_PARAM, 0x202, f"there cannot be a page at {page:#x}")
            if page in self._owners or page in pages[:number]:
                raise RefusedError(Status.BAD_PARAM, 0x203, f"the page at {page:#x} was given before")
        generation = self._generation
        for page in pages:
            try:
                self._fill(function, page)
                self._look(function, page)
            except BusError as error:
                raise RefusedError(Status.BAD_PARAM, 0x204, f"the page at {page:#x} is no memory: {error}") from error
        if generation != self._generation:  # memory made us wait, and the PF was reset meanwhile
            raise RefusedError(Status.BAD_SYS_STATE, 0x206, "the function was reset", mistake=False)
        lender.pages += pages
        lender.asked -= len(pages)
        self._owners.update(dict.fromkeys(pages, function))
        if not lender.asked:
            self._call(lender, True)

    def cannot_give(self, function: int) -> None:
        """The driver has no memory."""
        lender = self.of(function)
        if not lender.asked:
            raise RefusedError(Status.BAD_PARAM, 0x205, f"function {function} asked for no pages")
        lender.asked = 0
        self._call(lender, False)

    def take(self, function: int, most: int, *, everything: bool) -> list[int]:
        """Up to `most` pages go back: those that are spare, or `everything` at the end of the function's life."""
        lender = self.of(function)
        count = min(most, len(lender.pages) if everything else lender.spare)
        taken = lender.pages[len(lender.pages) - count :]
        for page in taken:
            self._check(function, page)
            self._owners.pop(page, None)
        del lender.pages[len(lender.pages) - count :]
        lender.spare = max(0, min(lender.spare - count, len(lender.pages)))
        lender.looked = 0
        return taken

    def forget(self, function: int) -> int:
        """All pages of a function go back without a command; how many these were."""
        lender = self.of(function)
        for page in lender.pages:
            self._check(function, page)
            self._owners.pop(page, None)
        count = len(lender.pages)
        self._lenders[function] = Lender()
        return count

    def withdraw(self, function: int) -> None:
        """What was asked for is not needed any more."""
        lender = self.of(function)
        lender.asked = 0
        self._call(lender, False)

    def visit(self, function: int) -> None:
        """The firmware uses a function's memory: it looks at some pages, in turn, and writes them anew."""
        lender = self.of(function)
        for _ in range(min(SAMPLE, len(lender.pages))):
            page = lender.pages[lender.looked % len(lender.pages)]
            lender.looked += 1
            if self._check(function, page):
                try:
                    self._fill(function, page)
                except BusError as error:
                    self._lost(f"the page at {page:#x} is no memory any more: {error}")

    def numbers(self) -> dict[str, int]:
        """Pages of each function."""
        found = {}
        for function, lender in sorted(self._lenders.items()):
            found[f"pages[{function}]"] = len(lender.pages)
            found[f"pages[{function}].asked"] = lender.asked
        return found

    # inside

    def _call(self, lender: Lender, given: bool) -> None:
        waiting, lender.waiting = lender.waiting, []
        for callback in waiting:
            callback(given)

    def _words(self, function: int, page: int) -> bytes:
        return _TAG.pack(_MAGIC, function, page, ~page & (1 << 64) - 1) * (PAGE // _TAG.size)

    def _fill(self, function: int, page: int) -> None:
        self._bus().dma_write(page, self._words(function, page))

    def _look(self, function: int, page: int) -> None:
        if self._bus().dma_read(page, PAGE) != self._words(function, page):
            raise BusError("it does not hold what was written")

    def _check(self, function: int, page: int) -> bool:
        try:
            self._look(function, page)
        except BusError as error:
            self._lost(f"the page at {page:#x} of function {function}: {error}")
            return False
        return True

    def _lost(self, text: str) -> None:
        self._violations.note("page", text)
        self._fail(ICM_PAGE_ERROR)
