"""DMA maps: what is refused with which errno, what a map without a file is, and what is watched."""

import contextlib
import errno
import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_server.dma import (
    CURE,
    BarPlacement,
    DmaUnmap,
    MapKind,
    bar_placements,
    decide_map,
    explain_map_failure,
    logging_ranges,
    parse_dma_map,
    parse_dma_unmap,
)
from vfu_server.errors import ClientError
from vfu_server.feature import MAX_LOGGING_RANGES
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


def test_a_peers_memory_goes_into_the_iommu_where_it_is_allowed():
    decision = decide_map(DmaMap(0, PAGE, RW, 7, 1 << 40), BARS, memory_fd=False, p2p=True)
    assert (decision.kind, decision.into_iommu, decision.migratable) == (MapKind.P2P, True, True)
    assert "another device" in decision.text
    assert decide_map(DmaMap(0xFE000000, PAGE, RW), BARS, p2p=True).kind is MapKind.PEER, "there is nothing to map"


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


@pytest.mark.parametrize(
    ("kind", "error", "cause"),
    [
        (MapKind.P2P, errno.EFAULT, "iommufd"),
        (MapKind.P2P, errno.ENOSPC, "dma_entry_limit"),
        (MapKind.UNREACHABLE, errno.ENOSPC, "remember"),
    ],
)
def test_a_failed_map_of_another_kind_is_explained_otherwise(kind, error, cause):
    assert cause in explain_map_failure(DmaMap(0, PAGE, RW, 3, 0), error, 1, kind)


# --- what a device is told to watch


def test_the_clients_ranges_are_watched_as_they_are():
    assert logging_ranges([(PAGE, PAGE), (0, PAGE)], [DmaMap(1 << 30, PAGE, RW)], PAGE) == ((0, PAGE), (PAGE, PAGE))


def test_without_ranges_all_that_is_mapped_is_watched():
    maps = [DmaMap(0, PAGE, RW), DmaMap(PAGE, PAGE, RW), DmaMap(9 * PAGE, PAGE, RW)]
    assert logging_ranges([], maps, PAGE) == ((0, 2 * PAGE), (9 * PAGE, PAGE))
    assert logging_ranges([], maps, 4 * PAGE) == ((0, 4 * PAGE), (8 * PAGE, 4 * PAGE))
    assert logging_ranges([], maps, 8 * PAGE) == ((0, 16 * PAGE),)
    assert logging_ranges([], [], PAGE) == ((0, 1 << 32),)


def test_the_last_page_of_all_cannot_be_watched():
    assert logging_ranges([], [DmaMap(TOP - 3 * PAGE, 3 * PAGE, RW)], PAGE) == ((TOP - 3 * PAGE, 2 * PAGE),)
    assert logging_ranges([], [DmaMap(TOP - PAGE, PAGE, RW)], PAGE) == ((0, 1 << 32),)


@given(pieces=st.lists(st.tuples(st.integers(1, 99), st.integers(1, 9)), min_size=1, max_size=700))
def test_at_most_as_many_ranges_as_the_kernel_takes(pieces):
    maps, at = [], 0
    for gap, pages in pieces:
        maps.append(DmaMap((at + gap) * PAGE, pages * PAGE, RW))
        at += gap + pages
    found = logging_ranges([], maps, PAGE)
    assert 1 <= len(found) <= MAX_LOGGING_RANGES
    assert all(before + length < after for (before, length), (after, _) in itertools.pairwise(found))
    watched = [m for m in maps if any(start <= m.iova and m.iova + m.size <= start + n for start, n in found)]
    assert watched == maps
    assert found[0][0] == maps[0].iova
    assert sum(found[-1]) == maps[-1].iova + maps[-1].size
    if len(pieces) <= MAX_LOGGING_RANGES:
        assert sum(length for _, length in found) == sum(m.size for m in maps)
