"""vfu_server.regmap: what a block refuses, how it is looked up, printed, read for a save, and turned into rules."""

from bisect import bisect_right

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_server.errors import PluginError
from vfu_server.policy import Answer, Answers, Policy
from vfu_server.regmap import READABLE, Access, Array, Block, Field, Register, RuleShape, Save

STATUS = Register(
    "status",
    0x20,
    4,
    Access.RW,
    Save.SAVE,
    reset=0x81,
    fields=(Field("computing", 0, 0), Field("state", 6, 4, {0: "off", 3: "on"}), Field("irq", 7, 7)),
)


def block(*registers: Register, size: int = 0x1000, arrays: tuple[Array, ...] = ()) -> Block:
    return Block("test", size, registers, arrays)


@pytest.mark.parametrize(
    ("registers", "said"),
    [
        ((Register("a", 0, 4, Access.RO), Register("b", 2, 2, Access.RO)), "'a' and 'b' overlap at 0x2"),
        ((Register("a", 0, 4, Access.RO), Register("a", 4, 4, Access.RO)), "two registers are named 'a'"),
        ((Register("a", 2, 4, Access.RO),), "not aligned to its width of 4"),
        ((Register("a", 0, 3, Access.RO),), "3 bytes wide"),
        ((Register("a", 0x1000, 4, Access.RO),), "outside of the block"),
        ((Register("", 0, 4, Access.RO),), "has no name"),
        ((Register("a", 0, 4, "RX"),), "unknown access 'RX'"),
        ((Register("a", 0, 4, Access.RO, "YES"),), "unknown save 'YES'"),
        ((Register("a", 0, 4, Access.WO, Save.SAVE),), "cannot be saved"),
        ((Register("a", 0, 1, Access.RO, reset=0x100),), "reset value 0x100 does not fit"),
        ((Register("a", 0, 1, Access.RO, fields=(Field("f", 8, 0),)),), "'f' bits 8:0 lie outside of 8 bits"),
        (
            (Register("a", 0, 1, Access.RO, fields=(Field("f", 3, 0), Field("g", 3, 3))),),
            "'g' bits 3:3 overlap another",
        ),
    ],
)
def test_a_table_that_cannot_be_meant_is_named(registers: tuple[Register, ...], said: str) -> None:
    with pytest.raises(PluginError, match=said):
        block(*registers)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (Array("q", 0, 8, 0, (Register("a", 0, 4, Access.RO),)), "count 0"),
        (Array("q", 0, 8, 2, ()), "has no register"),
        (Array("q", 0, 8, 2, (Register("a", 8, 4, Access.RO),)), "outside of the stride of 0x8"),
        (Array("q", 0x20, 4, 2, (Register("a", 0, 4, Access.RO),)), "overlap at 0x20"),
    ],
)
def test_an_array_that_cannot_be_meant_is_named(array: Array, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        block(STATUS, arrays=(array,))


def test_array_elements_have_names_and_places() -> None:
    queue = Array("queue", 0x100, 0x10, 3, (Register("head", 0, 2, Access.RW), Register("tail", 8, 8, Access.RO)))
    found = block(STATUS, arrays=(queue,))
    assert [r.name for r in found][:3] == ["status", "queue[0].head", "queue[0].tail"]
    assert found["queue[2].tail"].offset == 0x128
    assert found.at(0x12F) is found["queue[2].tail"]
    assert found.at(0x130) is None
    assert "queue[3].head" not in found
    assert [(row.offset, row.name) for row in found.rows()] == [
        ("0x20", "status"),
        ("0x100 + 0x10*n", "queue[n].head"),
        ("0x108 + 0x10*n", "queue[n].tail"),
    ]


def test_an_unknown_name_is_an_error_of_the_plugin() -> None:
    with pytest.raises(PluginError, match="no register 'nothing'"):
        block(STATUS)["nothing"]
    with pytest.raises(PluginError, match="no field 'nothing'"):
        STATUS.field("nothing")


@pytest.mark.parametrize(
    ("offset", "value", "text"),
    [
        (0x20, 0x81, "status 0x00000081 [computing state=0x0 (off) irq]"),
        (0x20, 0x30, "status 0x00000030 [state=0x3 (on)]"),
        (0x20, 0x50, "status 0x00000050 [state=0x5]"),
        (0x20, 0x80000102, "status 0x80000102 [state=0x0 (off) bit1 bit8 bit31]"),
        (0x22, 0x1, "status+2 0x1"),
        (0x24, 0x1, "test+0x24 0x1"),
    ],
)
def test_decode_shows_fields_and_what_is_unknown(offset: int, value: int, text: str) -> None:
    assert block(STATUS).decode(offset, value) == text


def test_fields_are_cut_out_and_put_in() -> None:
    state = STATUS.field("state")
    assert (state.mask, state.get(0xB1), state.put(0xFF, 2), state.put(0, 0x1F)) == (0x70, 3, 0xAF, 0x70)


def test_dump_reads_only_what_reading_does_not_change() -> None:
    registers = [Register(access.value, 4 * n, 4, access) for n, access in enumerate(Access)]
    seen: list[int] = []

    def read(offset: int, width: int) -> int:
        seen.append(offset)
        return offset

    text = block(*registers).dump(read)
    assert seen == [r.offset for r in registers if r.access in READABLE]
    assert "0x000c RC (RC, not read)" in text
    assert "0x0004 RW 0x00000004" in text


def test_snapshot_follows_the_restore_order_and_uses_the_registers_width() -> None:
    registers = (
        Register("late", 0, 4, Access.RW, Save.SAVE, order=2),
        Register("no", 4, 4, Access.RW),
        Register("wide", 8, 8, Access.RW, Save.SAVE),
        Register("shown", 16, 2, Access.RO, Save.DERIVED, order=1),
    )
    found = block(*registers).snapshot(lambda offset, width: offset << 8 | width)
    assert list(found.items()) == [("wide", 0x808), ("shown", 0x1002), ("late", 0x004)]


RUN = Answers.while_running(Answer.PASS, Answer.DISCARD)
SHAPE = RuleShape(RUN, RUN, "because")


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """A valid block: registers of random widths at random places that do not overlap."""
    size, at, registers = 0x200, 0, []
    for n in range(draw(st.integers(0, 12))):
        width = draw(st.sampled_from((1, 2, 4, 8)))
        at = (at + draw(st.integers(0, 24)) + width - 1) // width * width
        if at + width > size:
            break
        registers.append(Register(f"r{n}", at, width, draw(st.sampled_from(Access))))
        at += width
    return Block("random", size, draw(st.permutations(registers)))


@given(blocks())
def test_every_byte_has_exactly_one_owner(found: Block) -> None:
    owners: list[Register | None] = [None] * found.size
    for register in found.registers:
        owners[register.offset : register.end] = [register] * register.width
    assert [found.at(offset) for offset in range(found.size)] == owners
    assert found.at(found.size) is None
    rules = found.rules(2, lambda register: SHAPE, SHAPE, start=0x1000)
    policy = Policy(rules)
    sizes = {2: 0x1000 + found.size}
    policy.check(sizes)
    assert list(policy.gaps(sizes)) == [(2, 0, 0x1000)]
    starts = [rule.start for rule in rules]
    for offset, owner in enumerate(owners):
        rule = rules[bisect_right(starts, 0x1000 + offset) - 1]
        assert rule.name == owner.name if owner else rule.name.startswith("no register")


@given(st.integers(0, 2**32 - 1))
def test_decode_loses_no_bit(value: int) -> None:
    text = STATUS.decode(value)
    shown = sum(1 << int(word[3:]) for word in text.rstrip("]").split() if word.startswith("bit"))
    for f in STATUS.fields:
        shown |= value & f.mask
    assert shown == value
    assert f"{value:#010x}" in text


@given(st.integers(0, 2**64 - 1), st.integers(0, 63), st.integers(0, 63), st.integers(0, 2**64 - 1))
def test_put_changes_the_field_only(value: int, a: int, b: int, number: int) -> None:
    f = Field("f", max(a, b), min(a, b))
    changed = f.put(value, number)
    assert f.get(changed) == number & ((1 << (f.high - f.low + 1)) - 1)
    assert (changed ^ value) & ~f.mask == 0
