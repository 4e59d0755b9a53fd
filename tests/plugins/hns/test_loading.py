"""A state that comes in, in any pieces and from anybody: checked once it can be, never given out unchecked."""

import errno
import itertools

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from plugins.hns.blob import Match, State
from plugins.hns.loading import Loading
from vfu_server.errors import MigrationError, StreamFormatError, StreamMismatchError

EQC, AEQC = (0, 0x1000, 0, 0, 0, 0, 0), (0, 0x2000, 0, 0, 0, 0, 0)
STATE = State(0, 0, 0, 0, 0, 0, EQC, AEQC, 0x1000, 0x2000, 0x3000, 0x4000)
MATCH = Match(16, 0xA251, 1, 64)
BLOB = MATCH.encode() + STATE.encode()


class Checked:
    """Counts the checks; refuses if told so."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.matches: list[Match] = []
        self.refuses = refuses

    async def __call__(self, match: Match) -> None:
        self.matches.append(match)
        if self.refuses:
            raise StreamMismatchError("not this one")


def load(loading: Loading, *pieces: bytes) -> None:
    async def run() -> None:
        for piece in pieces:
            await loading.add(piece)

    trio.run(run)


@given(st.lists(st.integers(0, len(BLOB)), max_size=8))
def test_any_pieces_are_one_state_and_are_checked_once(cuts):
    check = Checked()
    loading = Loading(check)
    places = [0, *sorted(cuts), len(BLOB)]
    load(loading, *(BLOB[a:b] for a, b in itertools.pairwise(places)))
    assert loading.result() == (MATCH, STATE)
    assert check.matches == [MATCH]


@pytest.mark.parametrize("size", [0, 1, 39])
def test_less_than_a_match_part_is_nothing(size):
    loading = Loading(Checked())
    load(loading, BLOB[:size])
    with pytest.raises(StreamFormatError, match="match part"):
        loading.result()


@pytest.mark.parametrize("size", [41, 100, 175])
def test_a_state_that_is_cut_short_is_refused(size):
    loading = Loading(Checked())
    load(loading, BLOB[:size])
    with pytest.raises(StreamFormatError, match=f"{size} bytes"):
        loading.result()


def test_a_byte_more_is_refused_as_the_kernel_does():
    loading = Loading(Checked())
    with pytest.raises(StreamFormatError, match="longer") as refused:
        load(loading, BLOB, b"x")
    assert refused.value.errno == errno.ENOMEM


def test_what_was_refused_is_never_given_out():
    loading = Loading(Checked(refuses=True))
    with pytest.raises(StreamMismatchError):
        load(loading, BLOB)
    with pytest.raises(StreamFormatError):
        loading.result()


@given(st.binary(max_size=200))
def test_a_strangers_bytes_are_a_state_or_refused_by_name(data):
    loading = Loading(Checked())
    try:
        load(loading, data)
        loading.result()
    except MigrationError:
        return
    assert len(data) in (40, 176)
