"""The kernel's records: any segmentation gives the same parts, what cannot be is refused with the kernel's errno."""

import errno
import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.mlx5.decode import decode
from plugins.mlx5.identity import BARE_VARIANT, VARIANT
from plugins.mlx5.records import Begin, End, Piece, RecordReader, image_header, stop_copy_size
from vfu_server.device import Section
from vfu_server.errors import StreamFormatError


def record(tag, data, flags=0):
    return struct.pack("<QII", len(data), flags, tag) + data


def read(stream, cuts):
    reader, found = RecordReader(), []
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        for part in reader.push(stream[start:end]):
            if isinstance(part, Begin):
                found.append((part.tag, part.flags, b""))
            elif isinstance(part, Piece):
                tag, flags, data = found[-1]
                found[-1] = (tag, flags, data + bytes(part.data))
            else:
                assert isinstance(part, End)
                assert part.tag == found[-1][0]
    return reader, found


@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=5),
    st.binary(max_size=20),
    st.integers(0, 0xFFFFFFFF),
    st.lists(st.integers(0, 400), max_size=12),
)
@settings(max_examples=120, deadline=None)
def test_any_segmentation_gives_the_same_records(images, unknown, size, cuts):
    stream = stop_copy_size(size) + record(77, unknown, 1)
    stream += b"".join(image_header(len(image)) + image for image in images)
    reader, found = read(stream, cuts)
    reader.finish()
    expected = [(1, 1, struct.pack("<Q", size)), (77, 1, unknown), *((0, 0, image) for image in images)]
    assert found == expected
    assert (reader.announced, reader.images, reader.position) == (size, len(images), len(stream))


@pytest.mark.parametrize(
    ("stream", "number", "text"),
    [
        (struct.pack("<QII", 1 << 32, 0, 0), errno.ENOMEM, "image of 4294967296 bytes"),
        (struct.pack("<QII", 0, 0, 0), errno.EINVAL, "empty image"),
        (record(2, b"x"), errno.EOPNOTSUPP, "unknown tag 0x2"),
        (struct.pack("<QII", 1 << 30, 1, 2), errno.ENOMEM, "unknown tag 0x2"),
        (record(1, b"short", 1), errno.EINVAL, "8 are due"),
        (record(1, bytes(4) + b"\1" + bytes(3), 1), errno.ENOMEM, "stop-copy size of 4294967296"),
        (stop_copy_size(9) + stop_copy_size(9), errno.EINVAL, "at the beginning"),
        (record(0, b"x") + stop_copy_size(9), errno.EINVAL, "at the beginning"),
    ],
)
def test_what_cannot_be_is_refused(stream, number, text):
    with pytest.raises(StreamFormatError, match=text) as caught:
        read(stream, [])
    assert caught.value.errno == number


@pytest.mark.parametrize("stream", [b"", stop_copy_size(1), record(0, b"whole")[:-1], record(0, b"whole") + b"\1"])
def test_an_end_too_early_is_noticed(stream):
    reader, _ = read(stream, [3])
    with pytest.raises(StreamFormatError):
        reader.finish()


@given(st.binary(max_size=64))
@settings(max_examples=100, deadline=None)
def test_a_section_of_anything_has_lines(payload):
    for variant in (VARIANT, BARE_VARIANT):
        assert all(isinstance(line, str) for line in decode(variant, Section("kernel", 1, payload)))


def test_sections_that_begin_a_record_say_which():
    lines = list(decode(VARIANT, Section("kernel", 1, stop_copy_size(4096))))
    assert lines == ["record: stop-copy size, 8 bytes, 8 of them here", "kept for stop-copy: 4096 bytes"]
    (line,) = decode(VARIANT, Section("kernel", 1, image_header(1000) + b"some"))
    assert line == "record: firmware image, 1000 bytes, 4 of them here"
