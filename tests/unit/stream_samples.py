"""Streams to test with, and a forger of streams whose sums are right."""

import struct

import pytest

from vfu_server.crc32c import crc32c
from vfu_server.device import Section, StateIdentity
from vfu_server.errors import StreamFormatError
from vfu_server.host_device import Identity
from vfu_server.stream import Origin, StreamHeader, StreamReader, StreamSection, StreamWriter

HEADER = StreamHeader(
    "generic_dmaq",
    "0.1",
    StateIdentity("edu", 1, "", 0x5),
    Identity(0x1234, 0x11E8, 0x1AF4, 0x1100, 0x10, 0x00FF00, ""),
)
SERVER, PLUGIN = Origin.SERVER, Origin.PLUGIN


def written(sections, header=HEADER, crc=crc32c, end=True):
    """A whole stream; an int stands for padding of that length."""
    writer = StreamWriter(header, crc)
    pieces = [writer.begin()]
    for item in sections:
        pieces += writer.padding(item) if isinstance(item, int) else writer.section(item.section, item.origin)
    if end:
        pieces.append(writer.end())
    data = b"".join(pieces)
    assert writer.length == len(data)
    return data


def read(data, crc=crc32c, known=None, cuts=()):
    reader = StreamReader(crc, known=known)
    items, at = [], 0
    for cut in (*sorted(cuts), len(data)):
        items += reader.push(data[at:cut])
        at = cut
    reader.finish()
    return items


def plugin_section(tag, payload, version=1, optional=False):
    return StreamSection(PLUGIN, Section(tag, version, payload, optional))


THREE = [
    StreamSection(SERVER, Section("config", 1, bytes(range(40)))),
    plugin_section("regs", b"\x12\x34\x56\x78" * 5, version=7),
    plugin_section("empty", b"", optional=True),
]
STREAM = written(THREE)


def push_all(reader, data):
    items = reader.push(data)
    reader.finish()
    return items


def refuses(data, crc=crc32c, known=None):
    """The reader's word against `data`; no other exception may come out, and it repeats itself."""
    reader = StreamReader(crc, known=known)
    with pytest.raises(StreamFormatError) as first:
        push_all(reader, data)
    with pytest.raises(StreamFormatError) as second:
        reader.push(b"\0")
    with pytest.raises(StreamFormatError) as third:
        reader.finish()
    assert str(first.value) == str(second.value) == str(third.value)
    assert str(first.value).startswith("device state stream, byte ")
    return str(first.value)


def records(data):
    """Header, section records with their payload, end record; split by the documented lengths."""
    at = struct.unpack_from("<H", data, 10)[0]
    parts = [data[:at]]
    while at < len(data):
        chunk = struct.unpack_from("<I", data, at + 40)[0] + 4 if data[at : at + 4] == b"SECT" else -20
        parts.append(data[at : at + 48 + chunk])
        at += 48 + chunk
    return parts


class Forger:
    """Writes any fields with the sums that belong there."""

    def __init__(self, crc=crc32c):
        self.crc, self.value, self.data, self.sequence = crc, 0, b"", 0

    def summed(self, data):
        self.value = self.crc(data, self.value)
        self.data += data + struct.pack("<I", self.value)
        return self

    def header(self, strings=(b"p", b"1", b"v", b"", b""), tail=b"", zero=b"", length=None):
        body = struct.pack("<IQHHHHIB3s", 1, 2, 3, 4, 5, 6, 7, 8, zero)
        body += b"".join(bytes([len(s)]) + s for s in strings) + tail
        return self.summed(struct.pack("<8sHH", b"VFUSTATE", 1, length or 16 + len(body)) + body)

    def record(self, mark, body, sequence=None):
        self.summed(struct.pack("<4sI", mark, self.sequence if sequence is None else sequence) + body)
        self.sequence += 1
        return self

    def section(self, payload=b"", tag=b"t", version=1, flags=0, origin=1, zero=0, length=None, offset=0, chunk=None):
        length, chunk = (len(payload) if field is None else field for field in (length, chunk))
        fields = (tag, version, flags, origin, zero, length, offset, chunk)
        self.record(b"SECT", struct.pack("<16sIBBHIII", *fields))
        if chunk:
            self.value = self.crc(payload, self.value)
            self.data += payload
        return self.summed(b"")

    def end(self, sections, zero=0, length=None):
        return self.record(b"DONE", struct.pack("<IIQ", sections, zero, len(self.data) if length is None else length))


def begun():
    return Forger().header()
