"""Protection domains and memory keys: which memory a number of 32 bits stands for, and what may be done to it.

It must not know who uses keys. Both known ways of writing a translation list are taken: bare addresses, and addresses
with access bits (read 1, write 2) where the key says so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from plugins.mlx5.models.status import RefusedError, Status
from vfu_server.model import Bus

READ, WRITE = 1, 2
LEAST_LOG_PAGE, MOST_LOG_PAGE = 12, 31
PIECE = 8 << 20


@dataclass(frozen=True, slots=True)
class Key:
    """`length` bytes from virtual address `start`; `pages` translate them, the first one holds `start`."""

    index: int
    variant: int
    pd: int
    start: int
    length: int
    log_page_size: int
    pages: tuple[int, ...]
    """Addresses with READ and WRITE in their lowest bits."""
    local_read: bool
    local_write: bool

    def pieces(self, at: int, length: int, access: int) -> Iterator[tuple[int, int]]:
        """`(iova, length)` of a range of virtual addresses, at most PIECE bytes each; BAD_RES outside or forbidden."""
        allowed = self.local_read if access == READ else self.local_write
        if not allowed or at < self.start or at + length > self.start + self.length:
            raise RefusedError(
                Status.BAD_RES, 0x401, f"key {self.index:#x} does not let {length} bytes at {at:#x} be used so"
            )
        size = 1 << self.log_page_size
        place = at - self.start + self.start % size
        while length:
            page = self.pages[place >> self.log_page_size]
            if not page & access:
                raise RefusedError(Status.BAD_RES, 0x402, f"a page of key {self.index:#x} forbids the access")
            part = min(length, size - place % size, PIECE)
            yield (page & ~(READ | WRITE)) + place % size, part
            place, length = place + part, length - part


class Keys:
    """The PDs and memory keys of the PF."""

    def __init__(self, bus: Callable[[], Bus]) -> None:
        self._bus = bus
        self._domains: dict[int, int] = {}
        self._keys: dict[int, Key] = {}
        self._next_domain = 0x101
        self._next_key = 0x1001

    def reset(self) -> None:
        """All are gone."""
        self._domains.clear()
        self._keys.clear()

    def numbers(self) -> dict[str, int]:
        """How many there are."""
        return {"pds": len(self._domains), "mkeys": len(self._keys)}

    def allocate_domain(self) -> int:
        """A new PD."""
        number, self._next_domain = self._next_domain, self._next_domain + 1
        self._domains[number] = 0
        return number

    def free_domain(self, number: int) -> None:
        """A PD goes; one in use does not."""
        self.use_domain(number, 0)
        if self._domains[number]:
            raise RefusedError(Status.BUSY, 0x403, f"PD {number:#x} has {self._domains[number]} users")
        del self._domains[number]

    def use_domain(self, number: int, change: int) -> None:
        """An object in the PD comes (1) or goes (-1); 0 only asks whether it is there."""
        if number not in self._domains:
            raise RefusedError(Status.BAD_RES, 0x404, f"there is no PD {number:#x}")
        self._domains[number] += change

    def create(
        self,
        *,
        variant: int,
        pd: int,
        start: int,
        length: int,
        log_page_size: int,
        pages: tuple[int, ...],
        local_read: bool,
        local_write: bool,
    ) -> int:
        """A new key; its index."""
        if not LEAST_LOG_PAGE <= log_page_size <= MOST_LOG_PAGE:
            raise RefusedError(Status.BAD_PARAM, 0x405, f"pages of 2^{log_page_size} bytes")
        size = 1 << log_page_size
        needed = -(-(start % size + length) // size)
        if not length or len(pages) < needed:
            raise RefusedError(Status.BAD_PARAM, 0x406, f"{length} bytes need {needed} entries, there are {len(pages)}")
        for page in pages[:needed]:
            if page & (size - 1) & ~(READ | WRITE):
                raise RefusedError(Status.BAD_PARAM, 0x407, f"no page of {size} bytes can be at {page:#x}")
        if any(page & ~(READ | WRITE) for page in pages[needed:]):
            raise RefusedError(Status.BAD_PARAM, 0x408, "entries behind the last needed one are not 0")
        self.use_domain(pd, 1)
        index, self._next_key = self._next_key, self._next_key + 1
        self._keys[index] = Key(
            index, variant, pd, start, length, log_page_size, pages[:needed], local_read, local_write
        )
        return index

    def destroy(self, index: int) -> None:
        """A key goes."""
        if index not in self._keys:
            raise RefusedError(Status.BAD_RES, 0x409, f"there is no key {index:#x}")
        self.use_domain(self._keys.pop(index).pd, -1)

    def get(self, number: int) -> Key:
        """The key that a number names: index, and the variant in its lowest byte."""
        key = self._keys.get(number >> 8)
        if key is None or key.variant != number & 0xFF:
            raise RefusedError(Status.BAD_RES, 0x40A, f"there is no key {number:#x}")
        return key

    def write(self, number: int, at: int, data: bytes) -> None:
        """Put bytes at a virtual address. RefusedError, BusError."""
        done = 0
        for iova, length in self.get(number).pieces(at, len(data), WRITE):
            self._bus().dma_write(iova, data[done : done + length])
            done += length

    def read(self, number: int, at: int, length: int) -> bytes:
        """Get bytes from a virtual address. RefusedError, BusError."""
        pieces = list(self.get(number).pieces(at, length, READ))
        return b"".join(self._bus().dma_read(iova, size) for iova, size in pieces)
