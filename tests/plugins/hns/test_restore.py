"""Every word of a state gets into the hardware: one that a restore leaves out is missed, whichever it is.

Golden and generated streams do not show that by themselves: a word that drivers leave at 0 is what a reset left.
"""

import random

import pytest

from plugins.hns import mailbox as mb
from plugins.hns.blob import SIZE, Match, State, ring_address
from plugins.hns.mailbox import Mailbox
from plugins.hns.registers import CONTEXT_WORDS, VF, ZIP
from plugins.hns.window import Window
from tests.end_to_end.streams import Parts
from tests.golden.of_hns import GET, GOLDEN, HnsPlace
from tests.golden.trial import into, run
from vfu_server.errors import RestoreError

(STREAM,) = GOLDEN
KEPT = ("aeq_int_mask", "eq_int_mask", "page_size", "vf_state")
WRITTEN = ("ifc_int_source", "ifc_int_mask", "ifc_int_set", "queue_isolation")
"""They act when they are written, or must be alike before: whether they were written is looked at."""
WORDS = tuple(f"{ring}{n}" for ring in ("eqc", "aeqc") for n in range(CONTEXT_WORDS))
TABLES = (mb.SQC_TABLE, mb.CQC_TABLE)


def state_of(bits: int) -> tuple[Match, State]:
    """All words different, and different from what a reset leaves, for one of the values of `bits` at least."""
    chance = random.Random(bits)

    def ring() -> tuple[int, ...]:
        head_tail = chance.randrange(1, 200) | chance.randrange(1, 200) << 16
        low, high, third, fourth, fifth = (chance.randrange(1, 1 << 32) & ~31 | 32 for _ in range(5))
        return (head_tail, low, high, third, fourth, fifth, 0xFF | (bits & 1) << 16)

    eqc, aeqc = ring(), ring()
    sqc, cqc = (chance.randrange(1, 1 << 40) << 12 for _ in range(2))
    state = State(bits, bits, 0, 0, 0, 1 + bits, eqc, aeqc, ring_address(eqc), ring_address(aeqc), sqc, cqc)
    return Match(16, ZIP.vf_id, 1, 64), state


def stream_of(match: Match, state: State) -> Parts:
    payload = match.encode() + state.encode()
    assert len(payload) == SIZE
    return STREAM.parts().with_section("kernel", lambda _: payload)


def missed(bits: int) -> list[str]:
    """What is noticed when such a state is loaded; nothing: all of it is there."""
    match, state = state_of(bits)
    parts = stream_of(match, state)
    found: list[str] = []

    async def body(place: HnsPlace) -> None:
        verdict = await into(place, STREAM, parts.data(), random.Random(1))
        if verdict.refused is not None:
            assert isinstance(verdict.refused, RestoreError), verdict.refused
            found.append(str(verdict.refused))
        found.extend(verdict.wrong)
        written = {at for at, _ in place.host.writes}
        found.extend(name for name in WRITTEN if VF[name].offset not in written)

    run(STREAM, body)
    return found


@pytest.mark.parametrize("bits", [0, 1])
def test_all_of_a_state_arrives(bits):
    assert missed(bits) == []


@pytest.mark.parametrize("name", [*KEPT, *WRITTEN, *WORDS])
def test_a_register_that_is_left_out_is_missed(monkeypatch, name):
    write = Window.write
    monkeypatch.setattr(Window, "write", lambda self, to, value: None if to == name else write(self, to, value))
    assert [found for bits in (0, 1) for found in missed(bits)]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_is_left_out_is_missed(monkeypatch, table):
    do = Mailbox._do

    async def without(self, request):
        return 0 if request.command == table and not request.get else await do(self, request)

    monkeypatch.setattr(Mailbox, "_do", without)
    assert missed(0)


ORDER = (
    "vf_state",
    *("aeq_int_mask", "eq_int_mask", "ifc_int_source", "ifc_int_mask", "ifc_int_set", "queue_isolation", "page_size"),
    *WORDS,
    *("mailbox0", "mailbox0"),
    *("ifc_int_source", "ifc_int_mask"),
)
"""As the kernel's driver has it: state, masks, rings, both tables by mailbox, then the PF's message is answered."""


def test_all_is_written_in_the_kernels_order():
    match, state = state_of(0)
    written: list[int] = []

    async def body(place: HnsPlace) -> None:
        verdict = await into(place, STREAM, stream_of(match, state).data(), random.Random(1))
        assert (verdict.refused, verdict.wrong) == (None, ())
        written.extend(at for at, word in place.host.writes if at != VF["mailbox0"].offset or not word & GET)

    run(STREAM, body)
    assert written[: len(ORDER)] == [VF[name].offset for name in ORDER]
