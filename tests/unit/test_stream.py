"""The device state stream: round trips, and that no wrong byte, record or length gets through."""

import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_server.crc32c import crc32c
from vfu_server.device import Section, StateIdentity
from vfu_server.errors import MigrationError, PluginError, StreamFormatError, StreamMismatchError
from vfu_server.host_device import Identity
from vfu_server.stream import (
    MAX_CHUNK,
    MAX_SECTION,
    Origin,
    StreamEnd,
    StreamHeader,
    StreamReader,
    StreamSection,
    StreamWriter,
)

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


# --- round trips

printable = st.text(st.characters(categories=["L", "N", "P", "Zs"], exclude_characters="\u00a0"), max_size=40).filter(
    str.isprintable
)
u16, u32 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)
headers = st.builds(
    StreamHeader,
    printable,
    printable,
    st.builds(StateIdentity, printable, u32, printable, st.integers(0, (1 << 64) - 1)),
    st.builds(Identity, u16, u16, u16, u16, st.integers(0, 255), u32, printable),
)
tags = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=16)
sections = st.builds(
    StreamSection, st.sampled_from(Origin), st.builds(Section, tags, u32, st.binary(max_size=60), st.booleans())
)


@given(headers, st.lists(st.one_of(sections, st.integers(0, 30)), max_size=6), st.data())
def test_what_was_written_is_read_in_any_pieces(header, items, data):
    stream = written(items, header)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=20))
    kept = [item for item in items if not isinstance(item, int)]
    end = StreamEnd(len(items), len(items) - len(kept), len(stream))
    assert read(stream, cuts=cuts) == [header, *kept, end]


def test_byte_by_byte():
    assert read(STREAM, cuts=range(1, len(STREAM))) == [HEADER, *THREE, StreamEnd(3, 0, len(STREAM))]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_taken(kind):
    reader = StreamReader(crc32c)
    assert len(reader.push(kind(STREAM))) == 5
    assert reader.complete


def test_items_come_as_soon_as_they_are_whole():
    reader = StreamReader(crc32c)
    came = {}
    for at in range(len(STREAM)):
        for item in reader.push(STREAM[at : at + 1]):
            came[at + 1] = item
    header = struct.unpack_from("<H", STREAM, 10)[0]
    assert list(came) == [
        header,
        header + 52 + 40,
        header + 104 + 60,
        header + 156 + 60,
        header + 156 + 60 + 28,
    ]
    assert list(came.values()) == [HEADER, *THREE, StreamEnd(3, 0, len(STREAM))]


@pytest.mark.parametrize("length", [MAX_CHUNK - 1, MAX_CHUNK, MAX_CHUNK + 1, 2 * MAX_CHUNK, MAX_SECTION])
def test_large_sections_go_in_chunks(length):
    payload = random.Random(length).randbytes(length)
    writer = StreamWriter(HEADER, zlib.crc32)
    pieces = [writer.begin(), *writer.section(Section("big", 1, payload), PLUGIN), writer.end()]
    assert max(len(piece) for piece in pieces) <= MAX_CHUNK
    chunks = -(-length // MAX_CHUNK)
    assert len(pieces) == 2 + 3 * chunks
    reader = StreamReader(zlib.crc32)
    items = [item for piece in pieces for item in reader.push(piece)]
    assert items[1] == plugin_section("big", payload)
    assert items[2].length == sum(len(piece) for piece in pieces)


# --- the writer's refusals


@pytest.mark.parametrize(
    "section",
    [
        Section("", 1, b""),
        Section("seventeen-letters", 1, b""),
        Section("with blank", 1, b""),
        Section("umläut", 1, b""),
        Section("nul\0", 1, b""),
        Section("ok", -1, b""),
        Section("ok", 1 << 32, b""),
        Section("ok", 1, bytes(MAX_SECTION + 1)),
    ],
    ids=lambda section: f"{section.tag}-{section.version}-{len(section.payload)}",
)
def test_sections_that_cannot_be_written(section):
    writer = StreamWriter(HEADER, zlib.crc32)
    writer.begin()
    with pytest.raises(PluginError):
        writer.section(section, PLUGIN)


@pytest.mark.parametrize(
    "header",
    [
        StreamHeader("x" * 256, "1", HEADER.state, HEADER.device),
        StreamHeader("line\nbreak", "1", HEADER.state, HEADER.device),
        StreamHeader("p", "1", StateIdentity("v", 1 << 32), HEADER.device),
        StreamHeader("p", "1", StateIdentity("v", 1, features=-1), HEADER.device),
        StreamHeader("p", "1", HEADER.state, Identity(0x10000, 0, 0, 0, 0, 0)),
        StreamHeader("p", "1", HEADER.state, Identity(0, 0, 0, 0, 256, 0)),
        StreamHeader("\udc80", "1", HEADER.state, HEADER.device),
    ],
)
def test_headers_that_cannot_be_written(header):
    with pytest.raises(PluginError):
        StreamWriter(header, crc32c).begin()


def test_the_writer_keeps_its_order():
    writer = StreamWriter(HEADER, crc32c)
    with pytest.raises(MigrationError):
        writer.end()
    with pytest.raises(MigrationError):
        list(writer.section(Section("a", 1, b""), PLUGIN))
    writer.begin()
    with pytest.raises(MigrationError):
        writer.begin()
    half = writer.section(Section("a", 1, b"abc"), PLUGIN)
    next(half)
    with pytest.raises(MigrationError):
        writer.end()
    with pytest.raises(MigrationError):
        list(writer.section(Section("b", 1, b""), PLUGIN))
    list(half)
    writer.end()
    with pytest.raises(MigrationError):
        list(writer.padding(4))


# --- faults of the transport


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


def test_every_changed_byte_is_found():
    for at in range(len(STREAM)):
        for change in (0x01, 0x80, 0xFF):
            refuses(STREAM[:at] + bytes([STREAM[at] ^ change]) + STREAM[at + 1 :])


def test_every_truncation_is_found():
    for length in range(len(STREAM)):
        assert "found the end of the data" in refuses(STREAM[:length])


def test_nothing_may_follow_the_end():
    assert "nothing behind the end record, found 1 bytes more" in refuses(STREAM + b"\0")
    refuses(STREAM + STREAM)
    reader = StreamReader(crc32c)
    reader.push(STREAM)
    reader.finish()
    assert reader.push(b"") == []
    with pytest.raises(StreamFormatError, match=f"byte {len(STREAM)}: expected nothing"):
        reader.push(STREAM)


def records(data):
    """Header, section records with their payload, end record; split by the documented lengths."""
    at = struct.unpack_from("<H", data, 10)[0]
    parts = [data[:at]]
    while at < len(data):
        chunk = struct.unpack_from("<I", data, at + 40)[0] + 4 if data[at : at + 4] == b"SECT" else -20
        parts.append(data[at : at + 48 + chunk])
        at += 48 + chunk
    return parts


def test_records_dropped_doubled_or_moved_are_found():
    parts = records(written([*THREE, *THREE, 3, plugin_section("same", b"x"), plugin_section("same", b"x")]))
    assert b"".join(parts) != STREAM
    assert len(parts) == 11
    for i in range(len(parts)):
        refuses(b"".join(parts[:i] + parts[i + 1 :]))
        refuses(b"".join([*parts[:i], parts[i], *parts[i:]]))
        for j in range(i + 1, len(parts)):
            swapped = list(parts)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            refuses(b"".join(swapped))


def test_records_of_another_stream_are_found():
    """Two saves of one device that differ in one section only: no record of one fits into the other behind it."""
    common, other = [plugin_section("a", b"1"), plugin_section("b", b"2")], [plugin_section("a", b"1")]
    first = records(written([*common, *THREE]))
    second = records(written([*other, plugin_section("b", b"3"), *THREE]))
    same = [i for i, (one, two) in enumerate(zip(first, second, strict=True)) if one == two]
    assert same == [0, 1]
    for i in range(len(first)):
        for j in range(i + 1, len(first) + 1):
            mixed = first[:i] + second[i:j] + first[j:]
            if mixed not in (first, second):
                refuses(b"".join(mixed))


def test_random_damage_is_found():
    luck = random.Random(20261122)
    stream = written([*THREE, 5])
    for _ in range(10_000):
        damaged = bytearray(stream)
        match luck.randrange(4):
            case 0:
                for _ in range(luck.randrange(1, 5)):
                    damaged[luck.randrange(len(damaged))] = luck.randrange(256)
            case 1:
                start = luck.randrange(len(damaged))
                del damaged[start : start + luck.randrange(1, 40)]
            case 2:
                start, source = luck.randrange(len(damaged)), luck.randrange(len(damaged))
                damaged[start:start] = damaged[source : source + luck.randrange(1, 40)]
            case _:
                start, size = luck.randrange(len(damaged)), luck.randrange(1, 40)
                damaged[start : start + size] = luck.randbytes(size)
        if damaged == stream:
            continue
        try:
            push_all(StreamReader(crc32c), damaged)
        except StreamFormatError:
            continue
        raise AssertionError(damaged.hex())


# --- a hostile peer, whose sums are right


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


def test_the_forger_writes_what_the_writer_does():
    good = Forger().header().section(b"abc").end(1)
    assert read(good.data)[1] == plugin_section("t", b"abc")
    parts = Forger().header().section(b"ab", length=3).section(b"c", length=3, offset=2).end(1)
    assert read(parts.data)[1] == plugin_section("t", b"abc")


def begun():
    return Forger().header()


@pytest.mark.parametrize(
    ("forged", "said"),
    [
        (Forger().header(length=51), "sum"),
        (Forger().header(tail=b"x"), "header's end"),
        (Forger().header(strings=(b"p", b"1", b"v", b"")), "firmware of the device"),
        (Forger().header(strings=(b"p", b"1", b"v", b""), tail=b"\x09short"), "firmware of the device"),
        (Forger().header(strings=(b"p\n", b"1", b"v", b"", b"")), "printable"),
        (Forger().header(strings=(b"\xff", b"1", b"v", b"", b"")), "printable"),
        (Forger().header(strings=(b"\\xff\xff", b"1", b"v", b"", b"")), "printable"),
        (Forger().header(zero=b"\1"), "zeros"),
        (begun().record(b"TAIL", bytes(20)), "a record"),
        (begun().section(b"abc", tag=b""), "tag"),
        (begun().section(b"abc", tag=b"a\0b"), "tag"),
        (begun().section(b"abc", tag=b"a b"), "tag"),
        (begun().section(b"abc", tag=b"\xc3\xa4"), "tag"),
        (begun().section(b"abc", flags=4), "flags"),
        (begun().section(b"abc", origin=2), "origin"),
        (begun().section(b"abc", zero=1), "flags"),
        (begun().section(b"abc", length=2), "bytes inside section"),
        (begun().section(b"abc", length=MAX_SECTION + 1), "at most"),
        (begun().section(b"abc", length=0xFFFFFFFF), "at most"),
        (begun().section(b"", length=3), "bytes inside section"),
        (begun().section(b"abc", length=4, offset=0xFFFFFFFF), "bytes inside section"),
        (begun().section(b"abc", length=4, offset=1), "from 0 on"),
        (begun().section(b"ab", length=6).section(b"cd", length=6, offset=4), "from 2 on"),
        (begun().section(b"ab", length=6).section(b"cd", length=6, offset=0), "from 2 on"),
        (begun().section(b"ab", length=6).section(b"cd", length=6, offset=2, tag=b"u"), "rest of section"),
        (begun().section(b"ab", length=6).section(b"cd", length=6, offset=2, version=2), "rest of section"),
        (begun().section(b"ab", length=6).section(b"cd", length=6, offset=2, origin=0), "rest of section"),
        (begun().section(b"ab", length=6).section(b"cd", length=5, offset=2), "rest of section"),
        (begun().section(b"ab", length=6, flags=1).section(b"cd", length=6, offset=2), "rest of section"),
        (begun().section(b"ab", length=6).end(0), "rest of section"),
        (begun().section(b"ab", length=6).end(1), "rest of section"),
        (begun().section(b"ab").end(0), "an end of 1 sections"),
        (begun().section(b"ab").end(2), "an end of 1 sections"),
        (begun().end(0, zero=1), "an end of 0 sections"),
        (begun().end(0, length=7), "an end of 0 sections"),
        (begun().record(b"DONE", struct.pack("<IIQ", 0, 0, 0), sequence=1), "record number 0"),
        (begun().section(b"x").record(b"DONE", struct.pack("<IIQ", 1, 0, 0), sequence=0), "record number 1"),
    ],
)
def test_fields_with_right_sums_are_checked(forged, said):
    assert said in refuses(forged.data)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"QEVM" + bytes(20), "byte 0: expected the magic"),
        (struct.pack("<8sHH", b"VFUSTATE", 2, 100), "format version 1, found 2"),
        (struct.pack("<8sHH", b"VFUSTATE", 0, 100), "format version 1, found 0"),
        (struct.pack("<8sHH", b"VFUSTATE", 1, 48), "a header of 49 to 1324 bytes, found 48"),
        (struct.pack("<8sHH", b"VFUSTATE", 1, 1325), "a header of 49 to 1324 bytes, found 1325"),
        (struct.pack("<8sHH", b"VFUSTATE", 1, 0xFFFF), "found 65535"),
    ],
)
def test_a_wrong_start_is_named_before_more_is_read(start, said):
    assert said in refuses(start)


@given(st.binary(max_size=300))
def test_any_bytes_are_answered_by_name(data):
    with pytest.raises(StreamFormatError):
        push_all(StreamReader(crc32c), data)


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "payload": st.binary(max_size=8),
        "tag": st.sampled_from([b"t", b"u", b"", b"\0t"]),
        "version": st.integers(0, 2),
        "flags": st.integers(0, 4),
        "origin": st.integers(0, 2),
        "length": st.integers(0, 12),
        "offset": st.integers(0, 12),
        "chunk": st.integers(0, 12),
    },
)


@given(st.lists(FIELDS, max_size=5), st.integers(0, 5))
def test_any_fields_with_right_sums_are_taken_or_named(records, count):
    forger = begun()
    for fields in records:
        forger.section(**fields)
    forger.end(count)
    try:
        items = push_all(StreamReader(crc32c), forger.data)
    except StreamFormatError:
        return
    assert items[-1].sections == count
    assert all(len(item.section.payload) <= 12 for item in items[1:-1])


# --- what is known


def test_unknown_sections_are_skipped_or_refused_by_name():
    asked = []

    def known(origin, tag, version):
        asked.append((origin, tag, version))
        return tag in ("config", "regs") and version < 9

    stream = written([*THREE, 9, plugin_section("regs", b"new", version=9, optional=True)])
    items = read(stream, known=known)
    assert items[1:] == [*THREE[:2], StreamEnd(5, 3, len(stream))]
    assert asked == [(SERVER, "config", 1), (PLUGIN, "regs", 7), (PLUGIN, "empty", 1), (PLUGIN, "regs", 9)]
    required = written([*THREE, plugin_section("secret", bytes(10), version=3)])
    said = refuses(required, known=known)
    assert "'secret' (version 3, plugin's), which may not be skipped" in said


def test_a_refused_section_is_refused_before_its_payload():
    stream = written([plugin_section("secret", bytes(100))])
    reader = StreamReader(crc32c, known=lambda _origin, _tag, _version: False)
    with pytest.raises(StreamFormatError, match="secret"):
        reader.push(stream[: len(records(stream)[0]) + 48])


# --- memory


def peak_of(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_announced_lengths_cost_nothing():
    reader = StreamReader(zlib.crc32)
    forger = Forger(zlib.crc32).header().section(b"x", length=MAX_SECTION, chunk=MAX_CHUNK)
    assert peak_of(lambda: reader.push(forger.data)) < 64 << 10
    with pytest.raises(StreamFormatError, match="payload of section 't'"):
        reader.finish()


@pytest.mark.parametrize("skipped", [True, False])
def test_memory_is_bounded_by_the_section_not_by_the_state(skipped):
    """64 MiB of state go through a writer and a reader; what is held is a section of 4 MiB, twice when handed out."""
    payload = bytes(4 << 20)
    writer = StreamWriter(HEADER, zlib.crc32)
    reader = StreamReader(zlib.crc32, known=lambda _origin, _tag, _version: not skipped)

    def work():
        reader.push(writer.begin())
        for _ in range(16):
            for piece in writer.section(Section("pages", 1, payload, optional=True), PLUGIN):
                reader.push(piece)
        assert reader.push(writer.end())[-1].length > 64 << 20

    assert peak_of(work) < (64 << 10 if skipped else 10 << 20)


def test_a_broken_reader_lets_go_of_what_it_held():
    reader = StreamReader(zlib.crc32)
    stream = written([plugin_section("big", bytes(MAX_CHUNK))], crc=zlib.crc32)
    damaged = stream[:-40] + b"\xff" + stream[-39:]

    def held():
        with pytest.raises(StreamFormatError):
            reader.push(damaged)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        assert held() < 256 << 10
    finally:
        tracemalloc.stop()


# --- identity


def test_another_device_is_named_with_all_differences():
    HEADER.check("generic_dmaq", HEADER.device)
    HEADER.check("generic_dmaq", Identity(0x1234, 0x11E8, 0x1AF4, 0x1100, 0x10, 0x00FF00, "other firmware"))
    with pytest.raises(StreamMismatchError) as refused:
        HEADER.check("mlx5", Identity(0x15B3, 0x101E, 0x1AF4, 0x1100, 0x11, 0x00FF00))
    assert str(refused.value) == (
        "the state is of another device: plugin generic_dmaq (here: mlx5), vendor 0x1234 (here: 0x15b3), "
        "device 0x11e8 (here: 0x101e), revision 0x10 (here: 0x11)"
    )


@pytest.mark.parametrize("field", ["vendor", "device", "subsystem_vendor", "subsystem", "revision", "class_code"])
def test_each_id_counts(field):
    values = {name: getattr(HEADER.device, name) for name in Identity.__slots__}
    with pytest.raises(StreamMismatchError, match=field.replace("_", " ")):
        HEADER.check("generic_dmaq", Identity(**(values | {field: values[field] ^ 1})))


# --- the sum, and the documented example


def test_crc32c_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0
    assert crc32c(memoryview(b"56789"), crc32c(b"1234")) == 0xE3069283


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "design" / "stream-format.md"


def test_the_documented_example_is_what_is_written():
    text = DOCUMENT.read_text(encoding="utf-8")
    block = text.split("```text\n", 1)[1].split("```", 1)[0]
    shown = bytes.fromhex("".join(line.split("|")[1] for line in block.splitlines()))
    offsets = [int(line.split("|")[0], 16) for line in block.splitlines()]
    lengths = [len(bytes.fromhex(line.split("|")[1])) for line in block.splitlines()]
    assert offsets == [sum(lengths[:i]) for i in range(len(lengths))]
    header = StreamHeader(
        "generic_dmaq",
        "0.1",
        StateIdentity("edu", 1, "", 0x5),
        Identity(0x1234, 0x11E8, 0x1AF4, 0x1100, 0x10, 0x00FF00, "fw1"),
    )
    example = [StreamSection(SERVER, Section("config", 1, b"\x06\x04")), 1]
    assert shown == written(example, header)
    assert read(shown) == [header, example[0], StreamEnd(2, 1, len(shown))]
