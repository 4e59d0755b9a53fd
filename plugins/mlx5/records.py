"""The records of a saved state, as Linux' mlx5-vfio-pci writes and reads them, byte for byte.

It knows the format alone: no device, no door. Little-endian: le64 size of the data, le32 flags, le32 tag, the data.
Source: Linux' mlx5-vfio-pci (cmd.h, main.c).
"""

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vfu_server.errors import StreamFormatError

HEADER: Final = struct.Struct("<QII")
TAG_IMAGE: Final = 0
"""An image that the firmware has written."""
TAG_STOP_COPY_SIZE: Final = 1
"""Bytes that the source has kept for what it saves when the device is stopped; the first record, optional to obey."""
OPTIONAL: Final = 1
MAX_RECORD: Final = (1 << 32) - 1
MAX_UNKNOWN: Final = 1 << 20
"""Bytes of a record that nobody knows and that may be skipped: more is no such record."""
NAMES: Final = {TAG_IMAGE: "firmware image", TAG_STOP_COPY_SIZE: "stop-copy size"}


def image_header(size: int) -> bytes:
    """What goes ahead of an image of `size` bytes."""
    return HEADER.pack(size, 0, TAG_IMAGE)


def stop_copy_size(size: int) -> bytes:
    """The record that opens a stream."""
    return HEADER.pack(8, OPTIONAL, TAG_STOP_COPY_SIZE) + struct.pack("<Q", size)


@dataclass(frozen=True, slots=True)
class Begin:
    """A record's header has come."""

    tag: int
    flags: int
    size: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of a record's data."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class End:
    """The record is complete."""

    tag: int


Part = Begin | Piece | End


class RecordReader:
    """Takes a stream in pieces of any size and gives the parts of its records; checks tags, sizes and order.

    Raises StreamFormatError, with the errno that Linux' driver gives: ENOMEM for a record that is too large, EOPNOTSUPP
    for one that is unknown and not optional. After that the stream is unusable.
    """

    def __init__(self) -> None:
        self._head = bytearray()
        self._record: Begin | None = None
        self._left = 0
        self._value = bytearray()
        self.images = 0
        self.announced = 0
        """The stop-copy size that the stream has told."""
        self.position = 0

    def push(self, data: bytes | memoryview) -> Iterator[Part]:
        """The parts that `data` brings. Nothing is checked before the part is asked for."""
        view = memoryview(data)
        while view or (self._record is not None and not self._left):
            if self._record is None:
                taken = min(HEADER.size - len(self._head), len(view))
                self._head += view[:taken]
                view = view[taken:]
                self.position += taken
                if len(self._head) == HEADER.size:
                    yield self._begin()
                continue
            taken = min(self._left, len(view))
            if taken:
                piece, view = view[:taken], view[taken:]
                self._left -= taken
                self.position += taken
                if self._record.tag == TAG_STOP_COPY_SIZE:
                    self._value += piece
                yield Piece(piece)
            if not self._left:
                yield self._end(self._record)

    def finish(self) -> None:
        """There is no more: it must not end within a record, nor without any image."""
        if self._head or self._record is not None:
            raise StreamFormatError(f"the state ends within a record, behind {self.position} bytes")
        if not self.images:
            raise StreamFormatError("the state has no firmware image")

    def _begin(self) -> Begin:
        size, flags, tag = HEADER.unpack(self._head)
        self._head.clear()
        record = Begin(tag, flags, size)
        where = f"the record at byte {self.position - HEADER.size}"
        if tag == TAG_IMAGE:
            if size > MAX_RECORD:
                raise StreamFormatError(f"{where}: an image of {size} bytes", errno.ENOMEM)
            if not size:
                raise StreamFormatError(f"{where}: an empty image")
        elif tag == TAG_STOP_COPY_SIZE:
            if size != 8:
                raise StreamFormatError(f"{where}: a stop-copy size of {size} bytes, 8 are due")
            if self.images or self.announced:
                raise StreamFormatError(f"{where}: a stop-copy size, which belongs at the beginning")
        elif not flags & OPTIONAL:
            raise StreamFormatError(f"{where}: unknown tag {tag:#x}, which is not optional", errno.EOPNOTSUPP)
        elif size > MAX_UNKNOWN:
            raise StreamFormatError(f"{where}: {size} bytes of the unknown tag {tag:#x}", errno.ENOMEM)
        self._record, self._left = record, size
        return record

    def _end(self, record: Begin) -> End:
        if record.tag == TAG_IMAGE:
            self.images += 1
        elif record.tag == TAG_STOP_COPY_SIZE:
            (self.announced,) = struct.unpack("<Q", self._value)
            self._value.clear()
            if self.announced > MAX_RECORD:
                raise StreamFormatError(f"a stop-copy size of {self.announced} bytes", errno.ENOMEM)
        self._record = None
        return End(record.tag)
