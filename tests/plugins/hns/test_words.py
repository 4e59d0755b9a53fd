"""Words that the hardware and the kernel's driver read: mailbox commands, doorbells, VFT words, the blob."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import trio_test

from plugins.hns import decode as decoding
from plugins.hns import mailbox as mb
from plugins.hns import registers
from plugins.hns.blob import (
    MAGIC_V1,
    MAGIC_V2,
    MATCH_SIZE,
    NOT_READY,
    SIZE,
    Match,
    State,
    decode_match,
    decode_state,
)
from plugins.hns.doorbell import AEQ, CQ, EQ, SQ, Doorbell, restart
from plugins.hns.loading import Loading
from plugins.hns.mailbox import Request
from plugins.hns.vft import Queues, queues_of
from vfu_server.device import Section
from vfu_server.errors import StreamFormatError

WORD = st.integers(0, (1 << 32) - 1)
WORDS = st.tuples(*[WORD] * 7)
IOVA = st.integers(0, (1 << 64) - 1)
STATES = st.builds(State, *[WORD] * 6, WORDS, WORDS, *[IOVA] * 4)
MATCHES = st.builds(Match, WORD, WORD, WORD, WORD, st.integers(0, 1), minor=st.integers(0, 0xFFFF))


@pytest.mark.parametrize(
    ("request_", "stored"),
    [
        (Request(mb.PAUSE_FUNCTION), "0e200000 00000000 00000000 00000000"),
        (Request(mb.SQC_TABLE, base=0x123456000), "04200000 00604523 01000000 00000000"),
        (Request(mb.SQC_VFT, get=True), "06600000 00000000 00000000 00000000"),
        (Request(mb.SQC, queue=5, base=0x89ABCDE0), "00200500 e0cdab89 00000000 00000000"),
        (Request(mb.STOP_QUEUE, queue=3), "08200300 00000000 00000000 00000000"),
    ],
)
def test_mailbox_commands_as_they_are_stored(request_, stored):
    assert request_.encode() == bytes.fromhex(stored)


def test_a_command_names_its_operation():
    assert Request(mb.PAUSE_FUNCTION).text == "mailbox: pause function"
    assert Request(mb.STOP_QUEUE, queue=3).text == "mailbox: stop queue 3"
    assert Request(mb.SQC_TABLE, get=True).text == "mailbox: get SQC table"
    assert Request(mb.SQC, queue=5).text == "mailbox: set SQC of queue 5"


@pytest.mark.parametrize(
    ("doorbell", "word"),
    [
        (Doorbell(SQ, 3, 17), 0x0000001100000003),
        (Doorbell(CQ, 3, 18, 1), 0x0001001200001003),
        (Doorbell(EQ, 0, 5), 0x0000000500002000),
        (Doorbell(AEQ, 0, 2), 0x0000000200003000),
        (restart(3), 0x0001000000000003),
    ],
)
def test_doorbells(doorbell, word):
    assert doorbell.word() == word


def test_queues_of_a_vft_word():
    assert queues_of(0x0003F00400000000) == Queues(32, 64)
    assert queues_of(0x0003F00400000000 & ~(1 << 44)) == Queues(0, 0)  # not valid
    assert queues_of(0) == Queues(0, 0)
    assert queues_of(1 << 44) == Queues(1, 0)
    assert queues_of((1 << 64) - 1).count == 1024


def test_the_match_part_as_the_kernel_writes_it():
    stored = "dedecadeedfeccaa 2000000051a20000 0100000040000000 0000000001000000 0000000000000000"
    match = Match(queues=32, device=registers.ZIP.vf_id, isolation=1, first_queue=64)
    assert match.encode() == bytes.fromhex(stored)
    assert decode_match(bytes.fromhex(stored)) == match


@given(MATCHES, STATES)
def test_the_blob_comes_back_as_it_went(match, state):
    data = match.encode() + state.encode()
    assert (len(match.encode()), len(data)) == (MATCH_SIZE, SIZE) == (40, 176)
    assert decode_match(data) == match
    assert decode_state(data) == state


def test_fields_are_where_the_kernel_has_them():
    state = State(*range(1, 7), tuple(range(10, 17)), tuple(range(20, 27)), 30, 31, 32, 33)
    data = Match(1, 2, 3, 4, NOT_READY).encode() + state.encode()

    def word(at: int, size: int = 4) -> int:
        return int.from_bytes(data[at : at + size], "little")

    assert [word(at) for at in (8, 12, 16, 20, 24)] == [1, 2, 3, 4, 1]
    assert (word(28, 2), word(30, 2)) == (1, 0)
    assert [word(at) for at in range(40, 64, 4)] == [1, 2, 3, 4, 5, 6]
    assert [word(at) for at in range(64, 92, 4)] == list(range(10, 17))
    assert [word(at) for at in range(92, 120, 4)] == list(range(20, 27))
    assert data[120:144] == bytes(24)
    assert [word(at, 8) for at in (144, 152, 160, 168)] == [30, 31, 32, 33]


@given(STATES)
def test_addresses_of_the_old_layout_come_from_the_context_words(state):
    data = Match(1, 2, 3, 4, magic=MAGIC_V1, major=7).encode() + state.encode()
    assert decode_match(data).major == 0  # reserved words there
    found = decode_state(data)
    assert found.eqe == state.eqc[2] << 32 | state.eqc[1]
    assert found.aeqe == state.aeqc[2] << 32 | state.aeqc[1]
    assert dataclasses.replace(found, eqe=state.eqe, aeqe=state.aeqe) == state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eqe": 0x1020}, "EQEs are at 0x1020 and, by their context, at 0x1000"),
        ({"aeqe": 0}, "AEQEs are at 0x0 and, by their context, at 0x300002000"),
        ({"eqc": (0, 0x1000, 1, 0, 0, 0, 7)}, "EQEs are at 0x1000 and, by their context, at 0x100001000"),
    ],
)
@trio_test
async def test_a_state_that_tells_two_places_of_a_ring_is_not_loaded(change, words):
    async def check(match):
        assert match.queues == 16

    good = State(0, 0, 0, 0, 0, 0, (0, 0x1000, 0, 0, 0, 0, 7), (0, 0x2000, 3, 0, 0, 0, 7), 0x1000, 0x300002000, 5, 6)
    for state, magic in ((good, MAGIC_V2), (dataclasses.replace(good, **change), MAGIC_V1)):
        loading = Loading(check)
        await loading.add(Match(16, 2, 1, 64, magic=magic).encode() + state.encode())
        assert loading.result()[1] is not None  # the old layout tells one place only
    loading = Loading(check)
    await loading.add(Match(16, 2, 1, 64).encode() + dataclasses.replace(good, **change).encode())
    with pytest.raises(StreamFormatError, match=words):
        loading.result()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Match(1, 2, 3, 4, magic=5).encode(), "begins with 0x5"),
        (Match(1, 2, 3, 4, major=2).encode(), "version 2.0"),
        (Match(1, 2, 3, 4, 2).encode(), "state is 0x2"),
        (Match(1, 2, 3, 4).encode()[:39], "39 bytes"),
    ],
)
def test_what_is_no_match_part_is_refused(data, words):
    with pytest.raises(StreamFormatError, match=words):
        decode_match(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_state_or_refused_by_name(data):
    try:
        state = decode_state(data)
    except StreamFormatError:
        return
    assert len(data) == SIZE
    assert decode_match(data)
    assert state


@given(st.sampled_from(["kernel", "mailbox", "other"]), st.integers(0, 2), st.binary(max_size=200))
def test_any_section_is_told_or_refused_by_name(tag, version, payload):
    try:
        lines = list(decoding.decode(Section(tag, version, payload)))
    except StreamFormatError:
        return
    assert version == 1
    assert all(lines)


def test_a_section_in_words():
    match = Match(queues=32, device=0xA251, isolation=1, first_queue=64)
    state = State(0, 1, 0, 0, 0, 2, (5, 0x1000, 0, 0, 0, 0, 0x107FF), (0, 0x3000, 0, 0, 0, 0, 0), 1, 2, 3, 4)
    first = list(decoding.decode(Section("kernel", 1, match.encode())))
    assert first == ["zip VF 0xa251, 32 queues from 64 on, version 1.0", "queue isolation 0x1, ready"]
    second = list(decoding.decode(Section("kernel", 1, state.encode())))
    assert "eqc0 0x00000005 [head=0x5]" in second[6]
    assert "page_size 0x00000002 [size=0x2 (64K)]" in second
    assert list(decoding.decode(Section("kernel", 1, match.encode() + state.encode()))) == first + second
    words = list(decoding.decode(Section("mailbox", 1, Request(mb.SQC, queue=5).encode())))
    assert words[0] == "mailbox0 0x00052000 [busy op=0x0 (set) queue=0x5]"
