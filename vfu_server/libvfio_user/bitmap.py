"""Bitmaps of guest pages, merged in C: what was written of a range, in pages of any size.

It knows no device and nobody who asks.
"""

from typing import Self

from vfu_server.libvfio_user.native import ffi, lib

WORD = 8


class PageBitmap:
    """Bit k of the little-endian `bits` is the page at `iova + k * page_size`; whole 64-bit words, unused bits 0."""

    __slots__ = ("bits", "iova", "page_size", "pages")

    def __init__(self, iova: int, page_size: int, pages: int, bits: bytes | bytearray = b"") -> None:
        self.iova = iova
        self.page_size = page_size
        self.pages = pages
        self.bits = bytearray(-(-pages // (8 * WORD)) * WORD)  # once: new memory costs more than what is done with it
        self.bits[: len(bits)] = bits

    @classmethod
    def of(cls, iova: int, length: int, page_size: int) -> Self:
        """An empty one for `[iova, iova + length)`; the last page may reach over the end."""
        return cls(iova, page_size, -(-length // page_size))

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

    def any(self) -> bool:
        """Whether a page is set."""
        return self.bits.count(0) != len(self.bits)
