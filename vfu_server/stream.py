"""The device state stream written and read: order, sums, bounds. docs/design/stream-format.md shows each byte.

It knows no client, device or plugin, and moves no data: the writer yields buffers, the reader is pushed whatever came
in, in any pieces. Memory is bounded by the largest section, whatever the stream says.

Each CRC field holds the CRC32C of all bytes before it, from the first one of the stream, CRC fields left out. So every
byte is bound to all bytes before it: a record that was changed, dropped, doubled, moved, or taken from another stream
does not fit. Lengths are summed before they are believed. This finds the faults of any transport; it does not tell an
honest peer from one that computes its own sums, so what a section says is checked by whoever reads it.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, TypeAlias

from vfu_server.device import Section
from vfu_server.errors import MigrationError, StreamFormatError
from vfu_server.stream_format import (
    CRC,
    END,
    END_MARK,
    FLAG_OPTIONAL,
    FLAG_PADDING,
    FORMAT_VERSION,
    MAGIC,
    MAX_CHUNK,
    MAX_SECTION,
    PADDING_TAG,
    PREFIX,
    RECORD,
    SECTION,
    SECTION_MARK,
    Origin,
    SectionRecord,
    StreamHeader,
    UnfitError,
    check_section,
    header_length,
    pack_end,
    pack_header,
    pack_section,
    unpack_header,
    unpack_section,
)

__all__ = [
    "FORMAT_VERSION",
    "MAGIC",
    "MAX_CHUNK",
    "MAX_SECTION",
    "Crc32c",
    "Known",
    "Origin",
    "ReadableBuffer",
    "SectionRecord",
    "Seen",
    "StreamEnd",
    "StreamHeader",
    "StreamItem",
    "StreamReader",
    "StreamSection",
    "StreamWriter",
]

ReadableBuffer: TypeAlias = bytes | bytearray | memoryview
Crc32c: TypeAlias = Callable[[ReadableBuffer, int], int]
"""`crc32c(data, value)`: continues `value` (0 to begin, or an earlier result) over `data`."""
Known: TypeAlias = Callable[[Origin, str, int], bool]
"""`known(origin, tag, version)`: whether such a section can be read here."""
Seen: TypeAlias = Callable[[SectionRecord, int], None]
"""`seen(record, position)`: a section record that fits, at that byte of the stream; its payload comes behind it."""

_BODY: Final = {SECTION_MARK: SECTION.size + CRC.size, END_MARK: END.size + CRC.size}


@dataclass(frozen=True, slots=True)
class StreamSection:
    """A section that came in whole and whose sums were right."""

    origin: Origin
    section: Section


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The stream is complete: `sections` in all, `skipped` of them not given out (padding, too), in `length` bytes."""

    sections: int
    skipped: int
    length: int


StreamItem: TypeAlias = StreamHeader | StreamSection | StreamEnd


class StreamWriter:
    """Gives the bytes of one stream: `begin` once, then sections and padding, then `end` once."""

    def __init__(self, header: StreamHeader, crc32c: Crc32c) -> None:
        self._header = header
        self._crc32c = crc32c
        self._crc = 0
        self._sequence = 0
        self._sections = 0
        self._place = "the header"
        self.length = 0
        """Bytes given so far."""

    def begin(self) -> bytes:
        """The header. Raises PluginError for names or ids that do not fit."""
        self._go_on("the header", "a record")
        return self._summed(pack_header(self._header))

    def section(self, section: Section, origin: Origin) -> Iterator[ReadableBuffer]:
        """The buffers of one section, to be sent in this order, all of them; payload is not copied.

        Raises PluginError for a tag, version or length that cannot be.
        """
        check_section(section.tag, section.version, len(section.payload))
        return self._records(section, FLAG_OPTIONAL if section.optional else 0, origin)

    def padding(self, length: int) -> Iterator[ReadableBuffer]:
        """The buffers of a section that says nothing in `length` bytes: for a save that is slow to give its first."""
        section = Section(PADDING_TAG, 0, bytes(max(0, min(length, MAX_SECTION))), optional=True)
        return self._records(section, FLAG_OPTIONAL | FLAG_PADDING, Origin.SERVER)

    def end(self) -> bytes:
        """The end record. Nothing may follow."""
        self._go_on("a record", "nothing more")
        return self._summed(pack_end(self._number(), self._sections, self.length))

    def _records(self, section: Section, flags: int, origin: Origin) -> Iterator[ReadableBuffer]:
        self._go_on("a record", "the rest of a section")
        view = memoryview(section.payload)
        for offset in range(0, max(len(view), 1), MAX_CHUNK):
            chunk = view[offset : offset + MAX_CHUNK]
            record = SectionRecord(section.tag, section.version, flags, origin, len(view), offset, len(chunk))
            yield self._summed(pack_section(record, self._number()))
            if len(chunk):
                self._add(chunk)
                yield chunk
            yield self._summed(b"")
        self._sections += 1
        self._go_on("the rest of a section", "a record")

    def _go_on(self, with_what: str, then: str) -> None:
        if self._place != with_what:
            raise MigrationError(f"state stream: {self._place} is to be written, not {with_what}")
        self._place = then

    def _number(self) -> int:
        if self._sequence >> 32:
            raise MigrationError("state stream: no numbers are left for further records")
        self._sequence += 1
        return self._sequence - 1

    def _add(self, data: ReadableBuffer) -> None:
        self._crc = self._crc32c(data, self._crc)
        self.length += len(data)

    def _summed(self, data: bytes) -> bytes:
        self._add(data)
        self.length += CRC.size
        return data + CRC.pack(self._crc)


class StreamReader:
    """Takes the bytes of one stream in any pieces and gives what they say, each thing once its sums were right.

    `known` is asked at the first record of each section, before any of its payload is kept: what is not known is
    skipped if it is optional, and refused by name if it is not. Without `known` every section is given out. Padding
    never is.

    `seen` is told of every section record, padding too. Every fault is a StreamFormatError that says where and what was
    expected; the reader stays broken and says it again.
    """

    def __init__(self, crc32c: Crc32c, *, known: Known | None = None, seen: Seen | None = None) -> None:
        self._crc32c = crc32c
        self._seen = seen
        self._known: Known = known if known is not None else lambda _origin, _tag, _version: True
        self._crc = 0
        self._fault: StreamFormatError | None = None
        self._items: list[StreamItem] = []
        self._wait_for("a header", self._take_prefix, PREFIX.size)
        self._held = bytearray()
        self._start = b""
        self._sequence = 0
        self._sections = 0
        self._skipped = 0
        self._section: SectionRecord | None = None
        self._payload = io.BytesIO()
        self._whole = b""
        """A section's payload that came at once."""
        self._keep = False
        self._received = 0
        self._chunk_left = 0
        self.position = 0
        """Bytes taken so far."""
        self.complete = False
        """The end record has come."""

    def push(self, data: ReadableBuffer, leave: int = MAX_SECTION) -> list[StreamItem]:
        """Take `data`; returns what became complete with it, in order. Raises StreamFormatError.

        It stops where payload begins of which at least `leave` bytes come at once: see `position` and `push_payload`.
        """
        if self._fault is not None:
            raise self._fault
        self._items = []
        view = memoryview(data).cast("B")
        while len(view) and self._chunk_left < leave:
            if self.complete:
                self._fail("nothing behind the end record", f"{len(view)} bytes more", self.position)
            size = min(len(view), self._chunk_left or self._need - len(self._held))
            piece, view = view[:size], view[size:]
            self.position += size
            if self._chunk_left:
                self._take_payload(piece)
            else:
                self._hold(piece)
        return self._items

    def push_payload(self, pieces: Sequence[ReadableBuffer]) -> None:
        """Take the next `chunk_left` bytes, all of them, at once: copied once where they are a whole section."""
        if self._fault is not None:
            raise self._fault
        self._items = []
        size = sum(map(len, pieces))
        if not size or size != self._chunk_left:
            raise MigrationError(f"state stream: {size} bytes are not the payload that comes next")
        if self._keep and self._section is not None and size == self._section.length:
            self._whole = b"".join(pieces)
        elif self._keep:
            self._payload.writelines(pieces)
        for piece in pieces:
            self._crc = self._crc32c(piece, self._crc)
        self.position += size
        self._received += size
        self._chunk_left = 0

    @property
    def items(self) -> list[StreamItem]:
        """What the last push gave; if it raised, what had become complete before the fault."""
        return self._items

    @property
    def chunk_left(self) -> int:
        """Bytes of payload that come next, before anything else is to be looked at."""
        return self._chunk_left

    def finish(self) -> None:
        """No more bytes will come. Raises StreamFormatError if the stream is not complete."""
        if self._fault is not None:
            raise self._fault
        if not self.complete:
            missing = self._chunk_left or self._need - len(self._held)
            self._fail(f"{self._awaited} ({missing} bytes more at least)", "the end of the data", self.position)

    def _wait_for(self, awaited: str, take: Callable[[bytes], None], need: int) -> None:
        self._awaited, self._take, self._need = awaited, take, need

    def _hold(self, piece: memoryview) -> None:
        self._held += piece
        if len(self._held) == self._need:
            whole = bytes(self._held)
            self._held.clear()
            try:
                self._take(whole)
            except UnfitError as unfit:
                self._fail(unfit.expected, unfit.found, self.position - len(whole))

    def _fail(self, expected: str, found: str, at: int) -> NoReturn:
        self._fault = StreamFormatError(f"device state stream, byte {at}: expected {expected}, found {found}")
        self._payload, self._whole = io.BytesIO(), b""
        raise self._fault

    def _summed(self, data: bytes) -> bytes:
        """`data` without the CRC at its end, which must be the sum of everything up to there."""
        body, (found,) = data[: -CRC.size], CRC.unpack_from(data, len(data) - CRC.size)
        self._crc = self._crc32c(body, self._crc)
        if found != self._crc:
            self._fail(f"{self._awaited} with the sum {self._crc:#010x}", f"{found:#010x}", self.position - CRC.size)
        return body

    def _take_prefix(self, data: bytes) -> None:
        length = header_length(data)
        self._start = data
        self._wait_for("the rest of the header", self._take_header, length - len(data))

    def _take_header(self, data: bytes) -> None:
        self._items.append(unpack_header(self._summed(self._start + data)))
        self._wait_for("a record", self._take_record, RECORD.size)

    def _take_record(self, data: bytes) -> None:
        mark = RECORD.unpack(data)[0]
        self._start = data
        if mark == SECTION_MARK:
            self._wait_for("a section record", self._take_section, _BODY[mark])
        elif mark == END_MARK:
            self._wait_for("the end record", self._take_end, _BODY[mark])
        else:
            raise UnfitError(f"a record, {SECTION_MARK!r} or {END_MARK!r}", repr(mark))

    def _record_body(self, data: bytes) -> bytes:
        body = self._summed(self._start + data)
        number = RECORD.unpack_from(body)[1]
        if number != self._sequence:
            raise UnfitError(f"record number {self._sequence}", str(number))
        self._sequence += 1
        return body[RECORD.size :]

    def _take_section(self, data: bytes) -> None:
        record = unpack_section(self._record_body(data))
        if self._section is None:
            self._begin(record)
        elif record.section != self._section.section:
            raise UnfitError(f"the rest of section {self._section}", f"section {record}")
        if record.offset != self._received:
            raise UnfitError(f"bytes of section {record} from {self._received} on", f"those from {record.offset} on")
        if self._seen is not None:
            self._seen(record, self.position - RECORD.size - len(data))
        self._section = record
        self._chunk_left = record.chunk
        self._wait_for(f"the payload of section {record}", self._take_payload_sum, CRC.size)

    def _begin(self, record: SectionRecord) -> None:
        self._keep = not record.padding and self._known(record.origin, record.tag, record.version)
        if not self._keep and not record.padding and not record.optional:
            raise UnfitError("a section that is known here", f"section {record}, which may not be skipped")
        self._received = 0

    def _take_payload(self, piece: memoryview) -> None:
        self._crc = self._crc32c(piece, self._crc)
        self._chunk_left -= len(piece)
        self._received += len(piece)
        if self._keep:
            self._payload.write(piece)

    def _take_payload_sum(self, data: bytes) -> None:
        self._summed(data)
        record = self._section
        if record is None or self._received < record.length:
            self._wait_for(f"the rest of section {record}", self._take_record, RECORD.size)
            return
        self._section = None
        self._sections += 1
        if self._keep:
            payload, self._whole = self._whole or self._payload.getvalue(), b""
            self._items.append(
                StreamSection(record.origin, Section(record.tag, record.version, payload, record.optional))
            )
            self._payload = io.BytesIO()
        else:
            self._skipped += 1
        self._wait_for("a record", self._take_record, RECORD.size)

    def _take_end(self, data: bytes) -> None:
        before = self.position - RECORD.size - len(data)
        sections, zero, length = END.unpack(self._record_body(data))
        if self._section is not None:
            raise UnfitError(f"the rest of section {self._section}", "the end record")
        if (sections, zero, length) != (self._sections, 0, before):
            raise UnfitError(f"an end of {self._sections} sections in {before} bytes", f"{sections} in {length}")
        self.complete = True
        self._items.append(StreamEnd(self._sections, self._skipped, self.position))
