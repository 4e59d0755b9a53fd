"""Bitmaps of guest pages against their plain meaning: sets of byte ranges."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_server.libvfio_user.bitmap import PageBitmap

PAGE = 4096
TOP = 1 << 64

page_sizes = st.sampled_from([PAGE, 2 * PAGE, 8 * PAGE, 512 * PAGE])
places = st.one_of(st.integers(0, 40), st.integers(2000, 2040)).map(lambda n: n * PAGE)


def pages_of(bitmap):
    """The pages that are set, as numbers."""
    return {n for n in range(8 * len(bitmap.bits)) if bitmap.bits[n // 8] >> n % 8 & 1}


def ranges(bitmap):
    return [
        (bitmap.iova + n * bitmap.page_size, bitmap.iova + (n + 1) * bitmap.page_size) for n in sorted(pages_of(bitmap))
    ]


def touched(bitmap, pieces):
    """Pages of `bitmap` that share a byte with one of `pieces`."""
    return {
        n
        for n in range(bitmap.pages)
        for start, end in pieces
        if start < bitmap.iova + (n + 1) * bitmap.page_size and bitmap.iova + n * bitmap.page_size < end
    }


@st.composite
def bitmaps(draw):
    found = PageBitmap(draw(places), draw(page_sizes), draw(st.integers(1, 200)))
    for page in draw(st.sets(st.integers(0, found.pages - 1), max_size=8)):
        found.fill(found.iova + page * found.page_size, 1)
    return found


@given(to=bitmaps(), other=bitmaps())
def test_merging_sets_what_shares_a_byte_and_nothing_else(to, other):
    wanted = pages_of(to) | touched(to, ranges(other))
    before = bytes(other.bits)
    to.merge(other)
    assert pages_of(to) == wanted
    assert bytes(other.bits) == before
    assert len(to.bits) % 8 == 0


@given(base=places, size=page_sizes, first=st.integers(0, 30), pages=st.integers(1, 300), data=st.data())
def test_merging_a_part_of_the_same_grid(base, size, first, pages, data):
    to = PageBitmap(base, size, 350)
    part = PageBitmap(base + first * size, size, pages)
    chosen = data.draw(st.sets(st.integers(0, pages - 1)))
    for page in chosen:
        part.fill(part.iova + page * size, size)
    to.merge(part)
    assert pages_of(to) == {first + page for page in chosen if first + page < 350}


@given(bitmap=bitmaps(), start=st.integers(0, 300 * PAGE), length=st.integers(1, 2000 * PAGE))
def test_filling_takes_a_page_in_part_and_clearing_only_a_whole_one(bitmap, start, length):
    before = pages_of(bitmap)
    covered = touched(bitmap, [(start, start + length)])
    whole = {
        n
        for n in covered
        if start <= bitmap.iova + n * bitmap.page_size and bitmap.iova + (n + 1) * bitmap.page_size <= start + length
    }
    bitmap.fill(start, length)
    assert pages_of(bitmap) == before | covered
    assert bitmap.any() == bool(before | covered)
    bitmap.clear(start, length)
    assert pages_of(bitmap) == (before | covered) - whole


def test_the_last_pages_of_the_address_space():
    top = PageBitmap.of(TOP - 64 * PAGE, 64 * PAGE, PAGE)
    top.merge(PageBitmap(TOP - 2 * PAGE, PAGE, 2, b"\x02"))
    assert pages_of(top) == {63}
    coarse = PageBitmap(TOP - 512 * PAGE, 512 * PAGE, 1)
    coarse.merge(top)
    assert pages_of(coarse) == {0}
    everything = PageBitmap(0, 1 << 60, 16)
    everything.merge(top)
    assert pages_of(everything) == {15}
    top.merge(everything)
    assert pages_of(top) == set(range(64))


def test_bits_behind_the_last_page_are_nobodys():
    to = PageBitmap(0, PAGE, 64)
    to.merge(PageBitmap(0, PAGE, 3, b"\xff"))
    assert pages_of(to) == {0, 1, 2}
    to.merge(PageBitmap(16 * PAGE, 2 * PAGE, 3, b"\xff"))
    assert pages_of(to) == {0, 1, 2, *range(16, 22)}


def test_a_tebibyte_costs_no_step_for_each_page():
    """A step for each page, at 50 ns, would take 13 s."""
    began = time.process_time()
    one = PageBitmap.of(0, 1 << 40, PAGE)
    one.fill(0, 1 << 40)
    assert one.bits.count(0xFF) == len(one.bits) == 32 << 20
    coarse = PageBitmap.of(0, 1 << 40, 512 * PAGE)
    coarse.fill(0, 1 << 39)
    one.merge(coarse)
    many = PageBitmap.of(0, 1 << 40, PAGE)
    for i in range(65535):
        many.fill(2 * i * PAGE, PAGE)
    assert many.bits.count(0x55) == 65535 // 4
    one.merge(many)
    assert time.process_time() - began < 2


@given(bitmaps(), st.integers(0, 220), st.integers(1, 220), st.sampled_from([1, 2]))
def test_a_part_in_place_is_that_part_and_nothing_else(bitmap, first, pages, factor):
    """What is set there is set in the whole; a part that does not begin with a word has no place."""
    iova, end = bitmap.iova + first * bitmap.page_size, bitmap.iova + (first + pages) * bitmap.page_size
    place = bitmap.from_page(iova, end, factor * bitmap.page_size)
    fits = factor == 1 and first % 64 == 0 and first + pages <= bitmap.pages
    assert (place is not None) == fits
    if place is not None:
        before = pages_of(bitmap)
        part = PageBitmap.within(place, iova, end - iova, bitmap.page_size)
        part.fill(iova, bitmap.page_size)
        assert pages_of(bitmap) == before | {first}


@given(bitmaps())
def test_memory_of_somebody_elses(bitmap):
    """It is taken as it is, and wiped to its last bit; too little is refused."""
    memory = bytearray(bitmap.bits) + b"\xff"
    within = PageBitmap.within(memory, bitmap.iova, bitmap.length, bitmap.page_size)
    assert pages_of(within) == pages_of(bitmap)
    memory[:] = b"\xff" * len(memory)
    within.wipe()
    assert memory == bytes(len(bitmap.bits)) + b"\xff"
    with pytest.raises(ValueError, match="are no bitmap"):
        PageBitmap.within(memory[: len(bitmap.bits) - 1], bitmap.iova, bitmap.length, bitmap.page_size)
