"""Pages that were written and that the client was not told of yet.

What is read from a source of dirty pages is gone there; it stays here until a reply carries it. It must not know where
the bits came from.
"""

from collections.abc import Iterator

from vfu_server.libvfio_user.bitmap import PageBitmap
from vfu_server.uapi import PAGE_SIZE

CHUNK_PAGES = 1 << 15
CHUNK = CHUNK_PAGES * PAGE_SIZE
"""Bytes of guest memory that one piece stands for: 4 KiB of bits."""
MAX_CHUNKS = 1 << 13
"""1 TiB of guest memory, 32 MiB of bits. A client that scatters its unmaps more widely is told that all was written."""


class WrittenPages:
    """The pages, by iova, 4 KiB each. Empty chunks take no room."""

    def __init__(self) -> None:
        self._chunks: dict[int, PageBitmap] = {}
        self.overflowed = False
        """Too much to remember: everything counts as written until `clear`."""

    def clear(self) -> None:
        """Forget all: a client that begins anew takes every page for written."""
        self._chunks.clear()
        self.overflowed = False

    def add(self, written: PageBitmap) -> None:
        """Remember the pages that are set."""
        if written.any():
            for chunk in self._chunks_of(written.iova, written.length, make=True):
                chunk.merge(written)
                self._drop_if_empty(chunk)

    def add_range(self, iova: int, length: int) -> None:
        """Remember all pages of a range."""
        for chunk in self._chunks_of(iova, length, make=True):
            chunk.fill(iova, length)

    def take(self, into: PageBitmap, length: int) -> None:
        """Set in `into` what is remembered of its first `length` bytes, and forget the pages that lie in them whole."""
        if self.overflowed:
            into.fill(into.iova, length)
            return
        for chunk in self._chunks_of(into.iova, length, make=False):
            into.merge(chunk)
            chunk.clear(into.iova, length)
            self._drop_if_empty(chunk)

    def _chunks_of(self, iova: int, length: int, *, make: bool) -> Iterator[PageBitmap]:
        """Those that touch the range; with `make` also those that are not there yet, as far as there is room."""
        numbers = range(iova // CHUNK, (iova + length - 1) // CHUNK + 1)
        if not make:
            yield from [self._chunks[n] for n in sorted(self._chunks) if n in numbers]
            return
        for number in numbers:
            if number not in self._chunks:
                if self.overflowed or len(self._chunks) >= MAX_CHUNKS:
                    self._chunks.clear()
                    self.overflowed = True
                    return
                self._chunks[number] = PageBitmap(number * CHUNK, PAGE_SIZE, CHUNK_PAGES)
            yield self._chunks[number]

    def _drop_if_empty(self, chunk: PageBitmap) -> None:
        if not chunk.any():
            self._chunks.pop(chunk.iova // CHUNK, None)
