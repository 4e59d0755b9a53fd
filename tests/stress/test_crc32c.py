"""The sum by instruction, three lanes at a time, is the sum by table, which is the sum of plain Python."""

import random

from hypothesis import given
from hypothesis import strategies as st

from vfu_server.crc32c import crc32c as plain
from vfu_server.libvfio_user.native import crc32c, ffi, lib

LANES = 3 * 4096
NOISE = random.Random(4).randbytes(4 * LANES)


def by_table(data, crc=0):
    return lib.vs_crc32c_table(crc, ffi.from_buffer(data), len(data))


@given(
    st.integers(0, 64),
    st.one_of(
        st.integers(0, 64), st.builds(lambda lanes, more: lanes * LANES + more, st.integers(1, 3), st.integers(-9, 9))
    ),
    st.integers(0, 0xFFFFFFFF),
)
def test_lanes_are_joined_right(start, length, crc):
    data = memoryview(NOISE)[start : start + length]
    assert crc32c(data, crc) == by_table(data, crc)


def test_the_table_is_right():
    assert by_table(b"123456789") == crc32c(b"123456789") == 0xE3069283
    assert by_table(NOISE[:4097], 7) == plain(NOISE[:4097], 7)
