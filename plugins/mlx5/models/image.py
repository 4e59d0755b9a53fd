"""The form of a saved state (model): parts with headers, the engine's own state, and blocks of a keyed pattern.

What real firmware writes is nobody's business but its own. This form is made so that any wrong, missing, repeated or
reordered byte is found when it is loaded, and so that big states need no memory: blocks are made when they are written
and checked when they are read. It must not know commands, DMA or who moves what.

A body is META bytes (length, CRC, JSON, raw bytes, zeros) and then blocks. A SAVE gives one part of one body:

    header   64 bytes: magic, kind, flags, ordinal, series, offset in the body, length of the part, length of the body,
             size of the whole state, CRC-32 of all that
    part     bytes of the body
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEADER = struct.Struct(">8sBBHIQQQQQI4x")
HEADER_SIZE = HEADER.size
MAGIC = b"CXVHCA01"
FULL, INCREMENTAL = 1, 2
FINAL = 1
"""Flag: with this body the state is complete, and may run."""
FIXED = 32 << 10
META = FIXED - HEADER_SIZE
SMALL_BLOCK, BIG_BLOCK = 4 << 10, 64 << 10
BIG_FROM = 64 << 20
UNIT = 4096
_BLOCK_HEAD = struct.Struct(">QQ")
_META_HEAD = struct.Struct(">III")


class WrongImageError(Exception):
    """Bytes that are no image, or not the one that is due."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a state of `size` bytes is cut: `blocks` of `block_size` bytes, the last one may be shorter."""

    size: int

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        return BIG_BLOCK if self.size >= BIG_FROM else SMALL_BLOCK

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-(self.size - FIXED) // self.block_size)

    def length(self, block: int) -> int:
        """Bytes of that block."""
        return min(self.block_size, self.size - FIXED - block * self.block_size)


class Pattern:
    """The blocks of one card's VF: bytes that follow from the key, the block's number and its version."""

    def __init__(self, key: bytes, geometry: Geometry) -> None:
        self.key = key
        self._geometry = geometry
        self._size = geometry.block_size
        self._base = hashlib.shake_128(key).digest(2 * self._size)

    def block(self, number: int, version: int) -> bytes:
        """A block's bytes, number and version first."""
        start = (number * 2654435761 + version * 40503) % self._size
        length = self._geometry.length(number)
        return _BLOCK_HEAD.pack(number, version) + self._base[start : start + length - _BLOCK_HEAD.size]


def pack_meta(state: Mapping[str, Any], data: bytes) -> bytes:
    """The first META bytes of a body."""
    text = json.dumps(state, separators=(",", ":")).encode()
    meta = _META_HEAD.pack(len(text), len(data), zlib.crc32(text + data)) + text + data
    if len(meta) > META:
        raise WrongImageError(f"{len(meta)} bytes of state do not fit")
    return meta.ljust(META, b"\0")


def unpack_meta(meta: bytes) -> tuple[dict[str, Any], bytes]:
    """Counterpart of `pack_meta`."""
    length, extra, crc = _META_HEAD.unpack_from(meta)
    at = _META_HEAD.size
    text, data = meta[at : at + length], meta[at + length : at + length + extra]
    if zlib.crc32(text + data) != crc or meta[at + length + extra :].strip(b"\0"):
        raise WrongImageError("the state's sum is wrong")
    found: dict[str, Any] = json.loads(text)
    return found, data


class Body:
    """What is saved at one moment: `meta`, and `blocks` in ascending order with the versions of that moment."""

    def __init__(
        self,
        kind: int,
        meta: bytes,
        blocks: Sequence[int],
        versions: Mapping[int, int],
        pattern: Pattern,
        geometry: Geometry,
        *,
        final: bool,
    ) -> None:
        self.kind = kind
        self.final = final
        self.blocks = blocks
        self.position = 0
        """Bytes that were saved already."""
        self._meta = meta
        self._versions = versions
        self._pattern = pattern
        self._geometry = geometry
        last = geometry.length(blocks[-1]) if blocks else 0
        self.length = META + max(0, len(blocks) - 1) * geometry.block_size + last

    @property
    def left(self) -> int:
        """Bytes that are to be saved still."""
        return self.length - self.position

    def header(self, series: int, ordinal: int, length: int) -> bytes:
        """The header of a part of `length` bytes that begins at `position`."""
        flags = FINAL if self.final else 0
        fields = (MAGIC, self.kind, flags, 0, ordinal, series, self.position, length, self.length, self._geometry.size)
        return HEADER.pack(*fields, zlib.crc32(HEADER.pack(*fields, 0)))

    def render(self, offset: int, length: int) -> bytes:
        """Bytes of the body."""
        end = offset + length
        parts = []
        if offset < META:
            parts.append(self._meta[offset : min(end, META)])
            offset = min(end, META)
        size = self._geometry.block_size
        while offset < end:
            index, inside = divmod(offset - META, size)
            number = self.blocks[index]
            block = self._pattern.block(number, self._versions.get(number, 0))
            part = block[inside : inside + end - offset]
            parts.append(part)
            offset += len(part)
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Part:
    """An image's header, taken apart."""

    kind: int
    final: bool
    ordinal: int
    series: int
    offset: int
    length: int
    body: int
    size: int


def parse_header(data: bytes) -> Part:
    """WrongImageError for what is none."""
    if len(data) < HEADER_SIZE:
        raise WrongImageError(f"an image of {len(data)} bytes")
    magic, kind, flags, reserved, ordinal, series, offset, length, body, size, crc = HEADER.unpack_from(data)
    plain = HEADER.pack(magic, kind, flags, reserved, ordinal, series, offset, length, body, size, 0)
    if magic != MAGIC or crc != zlib.crc32(plain) or plain[:60] + data[60:64] != plain[:60] + bytes(4):
        raise WrongImageError("the image's header is not as it was written")
    return Part(kind, bool(flags & FINAL), ordinal, series, offset, length, body, size)


class Reader:
    """Takes the parts of a series in their order. `versions` grows with the blocks that came."""

    def __init__(self, geometry: Geometry) -> None:
        self.versions: dict[int, int] = {}
        self.final = False
        """The last body that is complete made the state complete."""
        self.meta: tuple[dict[str, Any], bytes] | None = None
        """The state that came with the last complete body."""
        self._geometry = geometry
        self._series = 0
        self._ordinal = 0
        self._pattern: Pattern | None = None
        self._part: Part | None = None
        self._position = 0
        self._left = 0
        self._pending = b""
        self._state: tuple[dict[str, Any], bytes] | None = None
        self._last_block = -1

    @property
    def is_whole(self) -> bool:
        """No body is begun and not ended."""
        return self._part is None or self._position == self._part.body

    def begin(self, data: bytes, size: int) -> None:
        """The header of an image of `size` bytes."""
        part = parse_header(data)
        if part.size != self._geometry.size:
            raise WrongImageError(f"a state of {part.size} bytes, here they have {self._geometry.size}")
        if part.length != size - HEADER_SIZE or not 0 < part.length <= part.body - part.offset:
            raise WrongImageError(f"a part of {part.length} bytes in an image of {size}")
        if self._part is None:
            self._series = part.series
            if part.kind != FULL:
                raise WrongImageError("the first image is not a whole one")
        if part.series != self._series or part.ordinal != self._ordinal:
            raise WrongImageError(f"image {part.ordinal} of series {part.series:x}, image {self._ordinal} is due")
        if self.final:
            raise WrongImageError("the state was complete before")
        due = 0 if self.is_whole else self._position
        if part.offset != due:
            raise WrongImageError(f"a part from {part.offset}, the one from {due} is due")
        if part.offset == 0:
            self._pending, self._last_block, self._state = b"", -1, None
        self._part, self._position, self._left = part, part.offset, part.length
        self._ordinal += 1

    def feed(self, data: bytes) -> None:
        """More bytes of the part that was begun."""
        part = self._part
        if part is None or len(data) > self._left:
            raise WrongImageError("more bytes than the part has")
        self._position += len(data)
        self._left -= len(data)
        self._pending = self._pending + data if self._pending else data
        at = 0
        if self._state is None:
            if len(self._pending) < META:
                return
            self._state = unpack_meta(self._pending[:META])
            key = bytes.fromhex(self._state[0]["key"])
            if self._pattern is None or self._pattern.key != key:
                self._pattern = Pattern(key, self._geometry)
            at = META
        at = self._blocks(part, at)
        self._pending = self._pending[at:]
        if self._position == part.body:
            if self._pending:
                raise WrongImageError("the body ends within a block")
            if part.kind == FULL and self._last_block != self._geometry.blocks - 1:
                raise WrongImageError("blocks are missing at the end")
            self.meta, self.final = self._state, part.final

    def _blocks(self, part: Part, at: int) -> int:
        """Check the whole blocks from `at` of what is pending; where the rest begins."""
        pattern = self._pattern
        assert pattern is not None
        while len(self._pending) - at >= _BLOCK_HEAD.size:
            number, version = _BLOCK_HEAD.unpack_from(self._pending, at)
            in_order = number == self._last_block + 1 if part.kind == FULL else number > self._last_block
            if number >= self._geometry.blocks or not in_order:
                raise WrongImageError(f"block {number} after block {self._last_block}")
            length = self._geometry.length(number)
            if len(self._pending) - at < length:
                break
            if self._pending[at : at + length] != pattern.block(number, version):
                raise WrongImageError(f"block {number} is not as it was saved")
            if version:
                self.versions[number] = version
            self._last_block = number
            at += length
        return at
