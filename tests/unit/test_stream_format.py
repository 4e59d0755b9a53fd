"""The stream's layouts: what a hostile peer may write, its sums right; identity; the sum; the documented example."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.stream_samples import HEADER, SERVER, Forger, begun, plugin_section, push_all, read, refuses, written
from vfu_server.crc32c import crc32c
from vfu_server.device import Section, StateIdentity
from vfu_server.errors import StreamFormatError, StreamMismatchError
from vfu_server.host_device import Identity
from vfu_server.stream import MAX_SECTION, StreamEnd, StreamHeader, StreamReader, StreamSection

# --- a hostile peer, whose sums are right


def test_the_forger_writes_what_the_writer_does():
    good = Forger().header().section(b"abc").end(1)
    assert read(good.data)[1] == plugin_section("t", b"abc")
    parts = Forger().header().section(b"ab", length=3).section(b"c", length=3, offset=2).end(1)
    assert read(parts.data)[1] == plugin_section("t", b"abc")


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
        (begun().section(b"abc", tag=b"a\x7f"), "tag"),
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
