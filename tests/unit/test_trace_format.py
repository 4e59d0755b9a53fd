"""The reader of traces: sound ones in full, anything else by a TraceError that names the place."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_server.policy import Answer, StateClass
from vfu_server.trace_format import HEAD, MAGIC, RECORD, Access, Kind, Mark, TraceError, TraceHeader, TraceReader

HEADER = TraceHeader("0.1", "edu", "generic_dmaq", "edu", 0x1234, 0x11E8, 10, 20, ((0, 4096, 8192),))


def record(kind=0, *, time=1, offset=0, value=0, width=4, took=2, errno=0, region=0, answer=1, state_class=0):
    return RECORD.pack(time, offset, value, width, took, errno, region, kind, answer, state_class)


def read(data):
    reader = TraceReader(io.BytesIO(data), "x.trace")
    return reader, list(reader.entries())


def test_header_comes_back():
    reader, found = read(HEADER.pack())
    assert reader.header == HEADER
    assert found == []
    assert not reader.cut_short


def test_accesses_and_marks():
    more = [record(Kind.MORE, offset=8, value=0x0B0A09), record(Kind.LOST, value=7), record(Kind.CLIENT)]
    data = HEADER.pack() + record(1, value=0x0807060504030201, width=11, region=2) + b"".join(more)
    data += record(0, width=2, value=0xAABBCC, errno=0, answer=Answer.SHADOW, state_class=StateClass.STOPPED)
    data += record(0, value=5, errno=22)
    _, found = read(data)
    assert found == [
        Access(0, 1, 2, True, 2, 0, 11, bytes(range(1, 12)), Answer.PASS, StateClass.RUNNING, 0),
        Mark(Kind.LOST, 1, 7),
        Mark(Kind.CLIENT, 1),
        Access(1, 1, 2, False, 0, 0, 2, b"\xcc\xbb", Answer.SHADOW, StateClass.STOPPED, 0),
        Access(2, 1, 2, False, 0, 0, 4, b"", Answer.PASS, StateClass.RUNNING, 22),
    ]
    assert found[0].value == int.from_bytes(bytes(range(1, 12)), "little")


@pytest.mark.parametrize("cut", [1, 39])
def test_record_that_is_cut_short_is_told_and_left_out(cut):
    reader, found = read(HEADER.pack() + record() + record()[:cut])
    assert len(found) == 1
    assert reader.cut_short


def test_access_without_its_further_bytes_at_the_end_is_left_out():
    reader, found = read(HEADER.pack() + record() + record(1, width=24) + record(Kind.MORE))
    assert len(found) == 1
    assert reader.cut_short


AT = len(HEADER.pack()) + RECORD.size


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (record(9), "unknown kind 9"),
        (record(Kind.MORE), "further bytes of no access"),
        (record(region=9), "no access has region 9"),
        (record(width=0), "and 0 bytes"),
        (record(width=(1 << 20) + 1), "and 1048577 bytes"),
        (record(answer=6), "unknown answer 6"),
        (record(state_class=5), "state class 5"),
    ],
)
def test_record_that_cannot_be_meant(bad, words):
    with pytest.raises(TraceError) as told:
        read(HEADER.pack() + record() + bad)
    assert words in str(told.value)
    assert f"at byte {AT:#x}" in str(told.value)


def test_access_that_is_interrupted():
    with pytest.raises(TraceError, match="an access of 24 bytes has only 8"):
        read(HEADER.pack() + record(1, width=24) + record())


def header(text, *, magic=MAGIC, version=1, size=RECORD.size, length=None):
    return HEAD.pack(magic, version, size, HEAD.size + len(text) if length is None else length) + text


GOOD = json.loads(HEADER.pack()[HEAD.size :])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no trace"),
        (b"VFUTRAC", "no trace"),
        (header(b"{}", magic=b"ELF and so"[:8]), "no trace"),
        (header(b"{}", version=2), "a trace of format 2, this program reads format 1"),
        (header(b"{}", size=48), "format"),
        (header(b"{}", length=5), "a header of 5 bytes"),
        (header(b"{}", length=1 << 30), "a header of 1073741824 bytes"),
        (header(b"{}"), "the header cannot be read"),
        (header(b"[" * 60000), "the header cannot be read"),
        (header(b"\xff"), "the header cannot be read"),
        (header(json.dumps({**GOOD, "device": 5}).encode()), "device is 5"),
        (header(json.dumps({**GOOD, "vendor": True}).encode()), "vendor is True"),
        (header(json.dumps({**GOOD, "mapped": [[1, 2]]}).encode()), "mapped is"),
        (header(json.dumps({**GOOD, "mapped": [[1, 2, "x"]]}).encode()), "mapped is"),
    ],
)
def test_header_that_is_not_ours(data, words):
    with pytest.raises(TraceError) as told:
        read(data)
    assert words in str(told.value)


def test_header_of_a_later_version_may_say_more():
    reader, _ = read(header(json.dumps({**GOOD, "weather": "fine"}).encode()))
    assert reader.header == HEADER


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(tail):
    for data in (tail, HEADER.pack() + tail, header(tail)):
        try:
            _, found = read(data)
        except TraceError:
            continue
        assert all(isinstance(entry, (Access, Mark)) for entry in found)


def test_what_is_no_regular_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "fifo")
    for path, words in (
        (tmp_path / "fifo", "no regular file"),
        (tmp_path / "none", "No such file"),
        (tmp_path, "is no"),
    ):
        with pytest.raises(TraceError, match=words):
            TraceReader.open(str(path))
