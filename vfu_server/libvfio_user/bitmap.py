"""Bitmaps of guest pages, merged in C: what was written of a range, in pages of any size.

It knows no device and nobody who asks.
"""

from typing import Self

from vfu_server.libvfio_user.native import ffi, lib

WORD = 8
"""Bytes."""


def words(pages: int) -> int:
    """Bytes of a bitmap of so many pages: whole words."""
    return -(-pages // (8 * WORD)) * WORD


class PageBitmap:
    """Bit k of the little-endian `bits` is the page at `iova + k * page_size`; whole 64-bit words, unused bits 0."""

    __slots__ = ("bits", "iova", "page_size", "pages")

    def __init__(self, iova: int, page_size: int, pages: int, bits: bytes | bytearray = b"") -> None:
        self.iova = iova
        self.page_size = page_size
        self.pages = pages
        self.bits: bytearray | memoryview = bytearray(words(pages))  # once: new memory costs more than its use
        self.bits[: len(bits)] = bits

    @classmethod
    def of(cls, iova: int, length: int, page_size: int) -> Self:
        """An empty one for `[iova, iova + length)`; the last page may reach over the end."""
        return cls(iova, page_size, -(-length // page_size))

    @classmethod
    def within(cls, bits: bytearray | memoryview, iova: int, length: int, page_size: int) -> Self:
        """For `[iova, iova + length)`, in memory of somebody else's, with the bits that it holds already.

        Raises ValueError if there is too little of it.
        """
        found = cls(iova, page_size, 0)
        found.pages = -(-length // page_size)
        size = words(found.pages)
        if len(bits) < size:
            raise ValueError(f"{len(bits)} bytes are no bitmap of {found.pages} pages")
        found.bits = memoryview(bits)[:size]
        return found

    def from_page(self, iova: int, end: int, page_size: int) -> memoryview | None:
        """The bits of `[iova, end)` in place, if that has this bitmap's pages and begins with a word of it."""
        first, over = divmod(iova - self.iova, self.page_size)
        last = -(-(end - self.iova) // self.page_size)
        if page_size != self.page_size or over or first % (8 * WORD) or not 0 <= first < last <= self.pages:
            return None
        return memoryview(self.bits)[first // 8 :]

    @property
    def length(self) -> int:
        """Bytes that it stands for."""
        return self.pages * self.page_size

    def merge(self, other: "PageBitmap") -> None:
        """Set each page that shares a byte with a page set in `other`; what lies outside is left out."""
        self.merge_bits(other.iova, other.page_size, other.pages, other.bits)

    def merge_bits(self, iova: int, page_size: int, pages: int, bits: bytes | bytearray | memoryview) -> None:
        """`merge` of a bitmap that lies somewhere else: `bits` has at least `pages` of them."""
        if len(bits) * 8 < pages:
            raise ValueError(f"{len(bits)} bytes are no bitmap of {pages} pages")
        own, given = ffi.from_buffer("uint8_t[]", self.bits), ffi.from_buffer("uint8_t[]", bits)
        to = ffi.new("struct vs_bitmap *", (own, self.iova, self.page_size, self.pages))
        lib.vs_bitmap_merge(to, ffi.new("struct vs_bitmap *", (given, iova, page_size, pages)))

    def fill(self, iova: int, length: int) -> None:
        """Set each page that shares a byte with the range; what lies outside is left out."""
        start, end = max(iova, self.iova), min(iova + length, self.iova + self.length)
        if start < end:
            first, last = (start - self.iova) // self.page_size, -(-(end - self.iova) // self.page_size)
            lib.vs_bitmap_fill(ffi.from_buffer("uint8_t[]", self.bits), first, last, 1)

    def clear(self, iova: int, length: int) -> None:
        """Clear each page that lies in the range as a whole."""
        start, end = max(iova, self.iova), min(iova + length, self.iova + self.length)
        if start < end:
            first, last = -(-(start - self.iova) // self.page_size), (end - self.iova) // self.page_size
            lib.vs_bitmap_fill(ffi.from_buffer("uint8_t[]", self.bits), first, last, 0)

    def wipe(self) -> None:
        """Clear all bits, unused ones too."""
        lib.vs_bitmap_fill(ffi.from_buffer("uint8_t[]", self.bits), 0, 8 * len(self.bits), 0)

    def any(self) -> bool:
        """Whether a page is set."""
        bits = self.bits if isinstance(self.bits, bytearray) else bytes(self.bits)
        return bits.count(0) != len(bits)
