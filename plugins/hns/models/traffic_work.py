"""Entries for load tests and what must come of them: copies with any kind, deflate and inflate with ZIP.

Each has data of its own, told by queue and number, so that a result in the wrong place or from another time shows. It
must not know rings or doorbells.
"""

import random
import struct
import zlib
from dataclasses import dataclass

from plugins.hns.models.guest_driver import DeviceError

COPY, DEFLATE, INFLATE = "copy", "deflate", "inflate"
ALGORITHM = {COPY: 0, DEFLATE: 0, INFLATE: 1}
"""The queue's algorithm type for an operation."""
_FIELDS = {"zip": (18, 20, 14, 26), "sec": (10, 12, None, 14), "hpre": (10, 12, None, 14)}
"""Dwords of source, destination, room and tag, by kind."""


@dataclass(frozen=True, slots=True)
class Job:
    """One entry: `source` and `destination` are its own `size` bytes (the destination twice that) of guest memory."""

    kind: str
    operation: str
    tag: int
    source: int
    destination: int
    size: int

    @property
    def data(self) -> bytes:
        """What goes in, for inflate what must come out. Half of it repeats, so that it packs."""
        half = self.size // 2
        return random.Random(self.tag).randbytes(self.size - half) + bytes([self.tag & 0xFF]) * half

    @property
    def input(self) -> bytes:
        """What is put at `source`."""
        return _pack(self.data) if self.operation == INFLATE else self.data

    def entry(self, length: int, entry_size: int) -> bytes:
        """The entry for an input of `length` bytes."""
        words = [0] * (entry_size // 4)
        source, destination, room, tag = _FIELDS[self.kind]
        words[4] = length
        words[9] = 0xFF if self.operation == COPY else 1 | 2 << 12
        if self.kind == "zip":
            words[7] = 3 << 28
        if room is not None:
            words[room] = 2 * self.size
        for at, value in ((source, self.source), (destination, self.destination), (tag, self.tag)):
            words[at], words[at + 1] = value & 0xFFFFFFFF, value >> 32
        return struct.pack(f"<{len(words)}I", *words)

    def check(self, entry: bytes, result: bytes) -> None:
        """The finished entry and `2 * size` bytes at the destination. DeviceError for anything that is not right."""
        words = struct.unpack(f"<{len(entry) // 4}I", entry)
        at = _FIELDS[self.kind][3]
        tag, status, produced = words[at] | words[at + 1] << 32, words[3] & 0xFF, words[1]
        if tag != self.tag:
            raise DeviceError(f"the entry of {self.tag:#x} came back as {tag:#x}")
        if status not in (0, 0x0D):
            raise DeviceError(f"the entry of {self.tag:#x} ended with status {status:#x}")
        if self.kind != "zip" and words[2] != zlib.crc32(self.data):
            raise DeviceError(f"the entry of {self.tag:#x} has another checksum")
        found = result[:produced]
        if self.operation == DEFLATE:
            found = zlib.decompress(found, -15)
        if found != self.data:
            raise DeviceError(f"the result of {self.tag:#x} is wrong ({self.operation}, {produced} bytes)")


def _pack(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()
