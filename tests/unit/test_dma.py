"""DMA maps: what is refused with which errno, what a map without a file is, and dirty bitmaps of any size."""

import contextlib
import errno
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_server.dma import (
    CURE,
    BarPlacement,
    DmaUnmap,
    MapKind,
    all_dirty,
    bar_placements,
    bitmap_bytes,
    decide_map,
    explain_map_failure,
    parse_dma_map,
    parse_dma_unmap,
)
from vfu_server.errors import ClientError
from vfu_server.host_device import DmaMap, RegionInfo

PAGE = 4096
READ, WRITE, RW = 1, 2, 3
TOP = 1 << 64


def map_message(iova=0, size=PAGE, flags=RW, offset=0, argsz=32):
    return struct.pack("<IIQQQ", argsz, flags, offset, iova, size)


def refusal(parse, *args):
    with pytest.raises(ClientError) as refused:
        parse(*args)
    return refused.value.errno


# --- maps


def test_a_map_as_qemu_sends_it():
    assert parse_dma_map(map_message(0x100000, 0x7FF00000, 3, 0x100000), 9) == DmaMap(
        0x100000, 0x7FF00000, RW, 9, 0x100000
    )
    assert parse_dma_map(map_message(0, 0x1000, 1, 0x5000), 0) == DmaMap(0, 0x1000, READ, 0, 0x5000)
    assert parse_dma_map(map_message(0xFEBF9000, 0x1000, 3, 0)) == DmaMap(0xFEBF9000, 0x1000, RW, -1, 0)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (map_message()[:31], errno.EINVAL),
        (b"", errno.EINVAL),
        (map_message(argsz=31), errno.EINVAL),
        (map_message(flags=0), errno.EINVAL),
        (map_message(flags=4 | RW), errno.EINVAL),
        (map_message(flags=8 | RW), errno.EINVAL),
        (map_message(flags=0x80000001), errno.EINVAL),
        (map_message(size=0), errno.EINVAL),
        (map_message(iova=1), errno.EINVAL),
        (map_message(iova=0x800), errno.EINVAL),
        (map_message(size=0x1800), errno.EINVAL),
        (map_message(offset=0x10), errno.EINVAL),
        (map_message(iova=TOP - PAGE, size=2 * PAGE), errno.EOVERFLOW),
        (map_message(iova=PAGE, size=TOP - PAGE + 0), 0),
        (map_message(iova=2 * PAGE, size=TOP - PAGE), errno.EOVERFLOW),
        (map_message(offset=(1 << 63) - PAGE), errno.EOVERFLOW),
        (map_message(offset=TOP - PAGE), errno.EOVERFLOW),
        (map_message(offset=(1 << 63) - 2 * PAGE), 0),
        (map_message(iova=TOP - PAGE), 0),
        (map_message(flags=WRITE), 0),
    ],
)
def test_maps_are_checked(message, expected):
    if expected:
        assert refusal(parse_dma_map, message, 5) == expected
    elif struct.unpack("<IIQQQ", message)[4] < 1 << 62:
        assert parse_dma_map(message, 5).fd == 5
    else:
        assert parse_dma_map(message).size == TOP - PAGE


def test_without_an_fd_its_offset_says_nothing():
    assert parse_dma_map(map_message(offset=123)) == DmaMap(0, PAGE, RW)


def unmap_message(iova=0, size=PAGE, flags=0, argsz=24, tail=b""):
    return struct.pack("<IIQQ", argsz, flags, iova, size) + tail


def test_unmaps():
    assert parse_dma_unmap(unmap_message(PAGE, 2 * PAGE), 64) == DmaUnmap(PAGE, 2 * PAGE)
    assert parse_dma_unmap(unmap_message(0, 0, 2), 64) == DmaUnmap(0, 0, everything=True)
    whole = unmap_message(0, TOP - PAGE)
    assert parse_dma_unmap(whole, 64).size == TOP - PAGE
    dirty = unmap_message(0, 65 * PAGE, 1, tail=struct.pack("<QQ", PAGE, 16))
    assert parse_dma_unmap(dirty, 16) == DmaUnmap(0, 65 * PAGE, False, PAGE, 16)
    roomy = unmap_message(0, 0x200000, 1, tail=struct.pack("<QQ", 0x200000, 1 << 20))
    assert parse_dma_unmap(roomy, 64).bitmap_size == 8


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (unmap_message()[:23], errno.EINVAL),
        (unmap_message(argsz=23), errno.EINVAL),
        (unmap_message(flags=4), errno.EINVAL),
        (unmap_message(flags=8), errno.EINVAL),
        (unmap_message(flags=2), errno.EINVAL),
        (unmap_message(iova=PAGE, size=0, flags=2), errno.EINVAL),
        (unmap_message(size=0, flags=3, tail=bytes(16)), errno.EINVAL),
        (unmap_message(size=0), errno.EINVAL),
        (unmap_message(iova=8), errno.EINVAL),
        (unmap_message(size=PAGE + 1), errno.EINVAL),
        (unmap_message(iova=TOP - PAGE, size=2 * PAGE), errno.EOVERFLOW),
        (unmap_message(flags=1), errno.EINVAL),
        (unmap_message(flags=1, tail=struct.pack("<QQ", 0, 8)), errno.EINVAL),
        (unmap_message(flags=1, tail=struct.pack("<QQ", 2048, 8)), errno.EINVAL),
        (unmap_message(flags=1, tail=struct.pack("<QQ", 3 * PAGE, 8)), errno.EINVAL),
        (unmap_message(flags=1, tail=struct.pack("<QQ", 2 * PAGE, 8)), errno.EINVAL),
        (unmap_message(flags=1, tail=struct.pack("<QQ", PAGE, 7)), errno.EINVAL),
        (unmap_message(size=1 << 40, flags=1, tail=struct.pack("<QQ", PAGE, 1 << 30)), errno.E2BIG),
    ],
)
def test_unmaps_are_checked(message, expected):
    assert refusal(parse_dma_unmap, message, 1 << 20) == expected


@given(st.binary(max_size=64))
def test_any_bytes_are_taken_or_refused(payload):
    for parse in (lambda: parse_dma_map(payload, 3), lambda: parse_dma_unmap(payload, 4096)):
        with contextlib.suppress(ClientError):
            taken = parse()
            assert taken.iova % PAGE == taken.size % PAGE == 0
            assert taken.iova + taken.size <= TOP


# --- what a map is


def config(command, *bars):
    space = bytearray(256)
    struct.pack_into("<H", space, 4, command)
    struct.pack_into(f"<{len(bars)}I", space, 0x10, *bars)
    return bytes(space)


def regions(*sizes):
    return [RegionInfo(index, size) for index, size in enumerate(sizes)]


def test_placements_by_config_space():
    space = config(0x6, 0xFEBF0000, 0xC001, 0x0000000C, 0x0000008F, 0, 0xFEB00008)
    placed = bar_placements("dev", space, regions(0x10000, 0x100, 0x4000, 0, 0x1000, 0x100))
    assert placed == (
        BarPlacement("dev", 0, 0xFEBF0000, 0xFEC00000),
        BarPlacement("dev", 2, 0x8F00000000, 0x8F00004000),
        BarPlacement("dev", 5, 0xFEB00000, 0xFEB01000),
    )
    assert bar_placements("dev", config(0x5, 0xFEBF0000), regions(0x10000)) == ()
    assert bar_placements("dev", config(0x2, 0), regions(0x10000)) == ()
    assert bar_placements("dev", config(0x2, 0xFEBF0000), regions(0)) == ()
    assert bar_placements("dev", config(0x2, 0xFFFFFFF4, 0xFFFFFFFF), regions(0x10000)) == ()
    assert bar_placements("dev", config(0x2, *[0xFFFFFFFC] * 6), regions(*[0x1000] * 6))[-1].bar == 5
    assert bar_placements("dev", b"", regions(0x1000)) == ()
    at_the_top = config(0x2, 0xFFFFF00C, 0xFFFFFFFF)
    assert bar_placements("dev", at_the_top, regions(0x1000)) == (BarPlacement("dev", 0, TOP - PAGE, TOP),)
    last_says_64_bits = config(0x2, 0, 0, 0, 0, 0, 0xFEB00004, 0x12345678)
    assert bar_placements("dev", last_says_64_bits, regions(0, 0, 0, 0, 0, 0x1000))[0].start == 0xFEB00000


BARS = [BarPlacement("0000:06:00.1", 2, 0xFE000000, 0xFE010000), BarPlacement("0000:06:00.2", 0, 1 << 40, 1 << 41)]


@pytest.mark.parametrize(
    ("dma_map", "memory_fd", "kind"),
    [
        (DmaMap(0, 1 << 30, RW, 7, 0), True, MapKind.MEMORY),
        (DmaMap(0xFE000000, PAGE, RW, 7, 0), True, MapKind.MEMORY),
        (DmaMap(0, 1 << 30, RW, 7, 0), False, MapKind.PEER),
        (DmaMap(0xFE000000, 0x10000, RW), True, MapKind.PEER),
        (DmaMap(0xFE00F000, PAGE, READ), True, MapKind.PEER),
        (DmaMap((1 << 41) - PAGE, PAGE, RW), True, MapKind.PEER),
        (DmaMap(0xFDFFF000, 2 * PAGE, RW), True, MapKind.UNREACHABLE),
        (DmaMap(0xFE00F000, 2 * PAGE, RW), True, MapKind.UNREACHABLE),
        (DmaMap(0xFE010000, PAGE, RW), True, MapKind.UNREACHABLE),
        (DmaMap(0, 1 << 30, RW), True, MapKind.UNREACHABLE),
        (DmaMap(0, 1 << 30, WRITE), True, MapKind.UNREACHABLE),
        (DmaMap(0xFFFC0000, 0x40000, READ), True, MapKind.ROM),
    ],
)
def test_what_is_behind_a_map(dma_map, memory_fd, kind):
    decision = decide_map(dma_map, BARS, memory_fd=memory_fd)
    assert decision.kind is kind
    assert decision.into_iommu == (kind is MapKind.MEMORY)
    assert decision.migratable == (kind is not MapKind.UNREACHABLE)
    assert (f"{dma_map.iova:#x}+{dma_map.size:#x}" in decision.text) == (kind is not MapKind.MEMORY)


def test_the_texts_name_the_peer_and_the_cure():
    assert "BAR2 of 0000:06:00.1" in decide_map(DmaMap(0xFE000000, PAGE, RW), BARS).text
    assert CURE in decide_map(DmaMap(0, PAGE, RW), BARS).text
    assert "memory-backend-memfd" in CURE
    assert "share=on" in CURE


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (errno.ENOSPC, "dma_entry_limit"),
        (errno.ENOMEM, "RLIMIT_MEMLOCK"),
        (errno.EEXIST, "mapped already"),
        (errno.EFAULT, "shorter"),
        (errno.EINVAL, "reserved"),
        (errno.EIO, "refused"),
    ],
)
def test_a_failed_map_is_explained(error, cure):
    text = explain_map_failure(DmaMap(0x1000, 0x2000, RW, 3, 0), error, 65535)
    assert "0x1000+0x2000" in text
    assert errno.errorcode[error] in text
    assert "65535 maps" in text
    assert cure in text


# --- dirty bitmaps


@given(
    maps=st.lists(
        st.builds(
            DmaMap, st.integers(0, 80).map(PAGE.__mul__), st.integers(1, 80).map(PAGE.__mul__), st.integers(1, 3)
        ),
        max_size=5,
    ),
    iova=st.integers(0, 90 * PAGE),
    length=st.integers(1, 150 * PAGE),
    page_size=st.sampled_from([PAGE, 4 * PAGE, 64 * PAGE]),
)
def test_bitmaps_page_by_page(maps, iova, length, page_size):
    bitmap = all_dirty(maps, iova, length, page_size)
    pages = -(-length // page_size)
    assert len(bitmap) == bitmap_bytes(length, page_size) == (pages + 63) // 64 * 8
    for page in range(len(bitmap) * 8):
        start = iova + page * page_size
        end = min(start + page_size, iova + length)
        touched = any(m.prot & WRITE and m.iova < end and start < m.iova + m.size for m in maps) and start < end
        assert bool(bitmap[page // 8] >> page % 8 & 1) == touched


def test_bits_of_one_map():
    assert all_dirty([DmaMap(3 * PAGE, 2 * PAGE, RW)], 0, 64 * PAGE, PAGE) == bytes([0b11000]) + bytes(7)
    assert all_dirty([DmaMap(0, 64 * PAGE, WRITE)], 0, 64 * PAGE, PAGE) == b"\xff" * 8
    assert all_dirty([DmaMap(0, 64 * PAGE, READ)], 0, 64 * PAGE, PAGE) == bytes(8)
    assert all_dirty([], 0, PAGE, PAGE) == bytes(8)
    neighbours = [DmaMap(0, PAGE, RW), DmaMap(3 * PAGE, PAGE, RW)]
    assert all_dirty(neighbours, PAGE, 2 * PAGE, 64 * PAGE) == bytes(8)
    assert all_dirty([DmaMap(0, 2 * PAGE, RW)], 2 * PAGE + 8, PAGE, PAGE) == bytes(8)
    assert all_dirty([DmaMap(3 * PAGE, PAGE, RW)], PAGE // 2, 2 * PAGE + PAGE // 2, PAGE) == bytes(8)
    assert all_dirty([DmaMap(0, 1 << 63, RW)], TOP - 65 * PAGE, 65 * PAGE, PAGE) == bytes(16)
    assert all_dirty([DmaMap(TOP - PAGE, PAGE, RW)], TOP - 64 * PAGE, 64 * PAGE, PAGE) == bytes(7) + b"\x80"


def test_a_tebibyte_costs_no_step_for_each_page():
    """A step for each page, at 50 ns, would take 13 s."""
    tebibyte = 1 << 40
    began = time.process_time()
    one = all_dirty([DmaMap(0, tebibyte, RW)], 0, tebibyte, PAGE)
    assert time.process_time() - began < 1
    assert len(one) == 32 << 20
    assert one.count(0xFF) == len(one)
    many = [DmaMap(2 * i * PAGE, PAGE, RW) for i in range(65535)]
    began = time.process_time()
    scattered = all_dirty(many, 0, tebibyte, PAGE)
    assert time.process_time() - began < 1
    assert scattered.count(0x55) == 65535 // 4
