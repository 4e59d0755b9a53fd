"""What is remembered of written pages until somebody is told, against a plain set."""

from hypothesis import given
from hypothesis import strategies as st

from tests.data_plane.sources import pages_in
from vfu_server.libvfio_user.bitmap import PageBitmap
from vfu_server.session_written import CHUNK, MAX_CHUNKS, WrittenPages

PAGE = 4096
TOP = 1 << 64
spots = st.one_of(st.integers(0, 40), st.integers(CHUNK // PAGE - 20, CHUNK // PAGE + 20))


def told(written, iova, length, page_size=PAGE):
    into = PageBitmap.of(iova, length, page_size)
    written.take(into, length)
    return pages_in(into.bits, iova, page_size)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), spots, st.sets(st.integers(0, 99), max_size=9)),
        st.tuples(st.just("range"), spots, st.integers(1, 60)),
        st.tuples(st.just("take"), spots, st.integers(1, 60)),
    ),
    max_size=12,
)


@given(steps=steps)
def test_each_page_is_told_once(steps):
    written, owed = WrittenPages(), set()
    for what, first, more in steps:
        if what == "add":
            bitmap = PageBitmap(first * PAGE, PAGE, 100)
            for page in more:
                bitmap.fill((first + page) * PAGE, PAGE)
            written.add(bitmap)
            owed |= {(first + page) * PAGE for page in more}
        elif what == "range":
            written.add_range(first * PAGE, more * PAGE)
            owed |= {page * PAGE for page in range(first, first + more)}
        else:
            asked = {page * PAGE for page in range(first, first + more)}
            assert told(written, first * PAGE, more * PAGE) == owed & asked
            owed -= asked
    assert told(written, 0, 4 * CHUNK) == owed
    assert told(written, 0, 4 * CHUNK) == set()
    assert not written.overflowed


def test_larger_pages_are_told_whole_and_forgotten_as_far_as_they_were_asked_for():
    written = WrittenPages()
    written.add_range(6 * PAGE, 4 * PAGE)
    assert told(written, 0, 8 * PAGE, 8 * PAGE) == {0}
    assert told(written, 0, 16 * PAGE) == {8 * PAGE, 9 * PAGE}


def test_the_ends_of_the_address_space():
    written = WrittenPages()
    written.add_range(TOP - PAGE, PAGE)
    written.add_range(0, PAGE)
    assert told(written, TOP - 2 * PAGE, 2 * PAGE) == {TOP - PAGE}
    assert told(written, 0, 1 << 50, 1 << 49) == {0}


def test_what_is_scattered_too_widely_becomes_everything():
    written = WrittenPages()
    for n in range(MAX_CHUNKS):
        written.add_range(n * CHUNK, PAGE)
    assert not written.overflowed
    assert told(written, (MAX_CHUNKS - 1) * CHUNK, 2 * PAGE) == {(MAX_CHUNKS - 1) * CHUNK}
    written.add_range((MAX_CHUNKS + 5) * CHUNK, PAGE)
    written.add_range((MAX_CHUNKS + 7) * CHUNK, PAGE)
    assert written.overflowed
    for _ in range(2):
        assert told(written, 1 << 60, 3 * PAGE) == {1 << 60, (1 << 60) + PAGE, (1 << 60) + 2 * PAGE}
    written.add_range(0, TOP)
    written.clear()
    assert told(written, 0, 1 << 50, 1 << 49) == set()
    written.add_range(0, TOP)  # costs no more than the limit
    assert written.overflowed
