"""The device state stream: round trips, and that no wrong byte, record or length gets through."""

import random
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.stream_samples import (
    HEADER,
    PLUGIN,
    SERVER,
    STREAM,
    THREE,
    Forger,
    plugin_section,
    push_all,
    read,
    records,
    refuses,
    written,
)
from vfu_server.crc32c import crc32c
from vfu_server.device import Section, StateIdentity
from vfu_server.errors import MigrationError, PluginError, StreamFormatError
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


def test_every_changed_byte_is_found():
    for at in range(len(STREAM)):
        for change in (0x01, 0x80, 0xFF):
            refuses(STREAM[:at] + bytes([STREAM[at] ^ change]) + STREAM[at + 1 :])


def test_every_truncation_is_found():
    ends = {12, len(records(STREAM)[0])}  # where one thing ends and the next begins
    at = 0
    for part in records(STREAM):
        ends |= {at + 8, at + 48, at + len(part) - 4, at + len(part)} if part[:4] == b"SECT" else {at + 8}
        at += len(part)
    ends.add(len(STREAM))
    for length in range(len(STREAM)):
        said = refuses(STREAM[:length])
        assert said.startswith(f"device state stream, byte {length}: expected ")
        assert said.endswith(", found the end of the data")
        missing = int(said.split(" bytes more at least")[0].rsplit("(")[-1])
        assert length + missing in ends


def test_a_wrong_sum_is_named_with_its_place():
    assert f"byte {len(STREAM) - 4}: expected the end record with the sum" in refuses(STREAM[:-1] + b"\0")
    payload = len(records(STREAM)[0]) + 48
    damaged = STREAM[:payload] + b"\xff" + STREAM[payload + 1 :]
    assert f"byte {payload + 40}: expected the payload of section 'config' (version 1, server's)" in refuses(damaged)


def test_nothing_may_follow_the_end():
    assert "nothing behind the end record, found 1 bytes more" in refuses(STREAM + b"\0")
    refuses(STREAM + STREAM)
    reader = StreamReader(crc32c)
    reader.push(STREAM)
    reader.finish()
    assert reader.push(b"") == []
    with pytest.raises(StreamFormatError, match=f"byte {len(STREAM)}: expected nothing"):
        reader.push(STREAM)


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


def test_padding_may_be_skipped_by_whoever_does_not_know_it():
    padding = records(written([3]))[1]
    assert padding[8:15] == b"padding"
    assert padding[28] == 3


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
