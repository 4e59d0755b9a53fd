"""The e-switch set up as the kernel does it, and what cannot be set up."""

import struct

import pytest

from tests.plugins.mlx5_model.bench import Card
from tests.plugins.mlx5_model.raw import Buffer, EventQueue, Raw, StatusError, put, words

BAD_OP, BAD_PARAM, BAD_RES, BUSY, BAD_STATE, BAD_INDEX = 2, 3, 5, 6, 9, 0xA
FDB = 4


def status(call, *args, **kwargs) -> int:
    with pytest.raises(StatusError) as caught:
        call(*args, **kwargs)
    return caught.value.status


@pytest.fixture
def card():
    return Card(vfs=2)


@pytest.fixture
def raw(card):
    return Raw(card.pf).boot()


def create_table(log: int = 6, level: int = 0, kind: int = FDB) -> bytes:
    return put(0x40, (0, 16, 0x930), (0x10, 24, kind), (0x18, 16, level), (0x18, 0, log))


def create_group(table: int, first: int, last: int, *, mac: bytes = bytes(6), port: int = 0) -> bytes:
    criteria = (1 if any(mac) else 0) | (2 if port else 0)
    fields = [(0x10, 24, FDB), (0x14, 0, table), (0x1C, 0, first), (0x24, 0, last), (0x3C, 0, criteria)]
    data = bytearray(put(0x400, (0, 16, 0x933), *fields, (0x84, 0, port)))
    data[0x48:0x4E] = mac
    return bytes(data)


def set_entry(table, group, index, ways, *, mac=bytes(6), port=0, action=4, modify=False) -> bytes:
    fields = [(0x10, 24, FDB), (0x14, 0, table), (0x20, 0, index), (0x44, 0, group), (0x4C, 0, action)]
    more = [(4, 0, 1), (0x18, 0, 4)] if modify else []
    data = bytearray(put(0x340, (0, 16, 0x936), *fields, *more, (0x50, 0, len(ways)), (0xC4, 0, port)))
    data[0x88:0x8E] = mac
    return bytes(data) + b"".join(struct.pack(">II", way << 24 | target, 0) for way, target in ways)


def on_table(opcode: int, table: int, op_mod: int = 0, **more: int) -> bytes:
    fields = [(int(at, 0), 0, value) for at, value in more.items()]
    return put(0x40, (0, 16, opcode), (4, 0, op_mod), (0x10, 24, FDB), (0x14, 0, table), *fields)


def number(raw: Raw, data: bytes) -> int:
    return words(raw.command(data))[2] & 0xFFFFFF


def test_what_the_kernel_does(card, raw):
    table = number(raw, create_table())
    raw.command(on_table(0x92F, table))
    groups = [
        number(raw, create_group(table, 0, 61, mac=b"\xff" * 6)),
        number(raw, create_group(table, 62, 62, mac=b"\1" + bytes(5))),
        number(raw, create_group(table, 63, 63, port=0xFFFF)),
    ]
    for vport in (0, 1, 2):
        own = put(16, (0, 16, 0x751), (4, 0, 1), (8, 31, 1), (8, 0, vport), (12, 4, 2))
        raw.command(own)
        found = raw.command(put(16, (0, 16, 0x754), (8, 31, 1), (8, 0, vport)), 0x110 + 16)
        mac = found[0x106:0x10C]
        assert mac[5] == vport
        assert found[0x103] == 1
        assert found[0x112:0x118] == mac
        raw.command(put(0x110, (0, 16, 0x753), (8, 31, 1), (8, 0, vport), (12, 3, 1), (12, 1, 1)))
        assert not any(raw.command(put(16, (0, 16, 0x752), (8, 31, 1), (8, 0, vport)), 0x110)[0x10:])
        raw.command(set_entry(table, groups[0], vport, [(0, vport)], mac=mac))
        entry = bytearray(put(0x40, (0, 16, 0x829), (0x14, 0, vport)))
        entry[0x22:0x28] = mac
        raw.command(bytes(entry))
        raw.command(put(0x200, (0, 16, 0x755), (8, 31, 1), (8, 0, vport), (12, 5, 1), (0x104, 0, 1 << 31 | 0xB)))
    raw.command(set_entry(table, groups[0], 9, [(0, 1), (0, 2), (8, 0)], mac=b"\xff" * 6))
    raw.command(set_entry(table, groups[0], 9, [(0, 1), (8, 0)], mac=b"\xff" * 6, modify=True))
    assert words(raw.command(put(16, (0, 16, 0x750), (4, 0, 1), (8, 31, 1), (8, 0, 1))))[3] & 0xFF == 0x21
    raw.enable_vf(0)
    raw.enable_vf(1)
    assert (card.state()["flow_entries"], card.violations) == (4, 0)
    for index in (0, 1, 2, 9):
        raw.command(on_table(0x938, table, **{"0x20": index}))
    for group in groups:
        raw.command(on_table(0x934, table, **{"0x18": group}))
    raw.command(on_table(0x92F, table, 1))
    raw.command(on_table(0x931, table))
    for index in range(3):
        raw.command(put(0x40, (0, 16, 0x82B), (0x14, 0, index)))
    state = card.state()
    assert (state["flow_tables"], state["l2_entries"], state["violations"]) == (0, 0, 0)


def test_what_cannot_be(raw):
    assert status(raw.command, create_table(kind=9)) == BAD_PARAM
    assert status(raw.command, create_table(log=23)) == BAD_PARAM
    table = number(raw, create_table())
    low = number(raw, create_group(table, 0, 9, mac=b"\xff" * 6))
    assert status(raw.command, create_group(table, 9, 20)) == BAD_PARAM
    assert status(raw.command, create_group(table, 60, 64)) == BAD_PARAM
    assert status(raw.command, create_group(table + 5, 20, 21)) == BAD_RES
    assert status(raw.command, set_entry(table, low, 10, [(0, 1)])) == BAD_PARAM
    assert status(raw.command, set_entry(table, low, 1, [(0, 7)])) == BAD_RES
    assert status(raw.command, set_entry(table, low, 1, [(1, table)])) == BAD_PARAM
    assert status(raw.command, set_entry(table, low, 1, [])) == BAD_PARAM
    assert status(raw.command, set_entry(table, low, 1, [(0, 1)], port=3)) == BAD_PARAM
    assert status(raw.command, set_entry(table, low, 1, [(0, 1)], modify=True)) == BAD_STATE
    raw.command(set_entry(table, low, 1, [(0, 1)]))
    assert status(raw.command, set_entry(table, low, 1, [(0, 1)])) == BAD_STATE
    assert status(raw.command, on_table(0x934, table, **{"0x18": low})) == BUSY
    assert status(raw.command, on_table(0x931, table)) == BUSY
    assert status(raw.command, on_table(0x938, table, **{"0x20": 2})) == BAD_RES
    assert status(raw.command, put(0x40, (0, 16, 0x829), (0x14, 0, 256), (0x24, 0, 1))) == BAD_INDEX
    assert status(raw.simple, 0x750, 1, 1 << 31 | 9) == BAD_RES
    assert status(raw.simple, 0x750, 1, 1) == BAD_PARAM


def test_a_pf_that_manages_nothing():
    card = Card(caps={"eswitch_manager": 0, "vport_group_manager": 0})
    raw = Raw(card.pf).boot()
    assert status(raw.command, create_table()) == BAD_OP
    assert status(raw.simple, 0x750, 1, 1 << 31 | 1) == BAD_OP


def test_tables_that_are_left_are_leaks(card, raw):
    raw.command(create_table())
    raw.simple(0x103)
    assert card.state()["violation.leak"] == 3


VPORT_CHANGE = 0x0D
UNICAST, MULTICAST = 0, 1


def wanting(kind: int, *macs: int, promisc: int | None = None, opcode: int = 0x755) -> bytes:
    """A VF's own driver asks for other frames."""
    head = put(
        0x200,
        (0, 16, opcode),
        (0xC, 0, (4 if promisc is None else 0) | (0 if promisc is None else 0x10)),
        (0x1F0, 29, promisc or 0),
        (0x1F0, 24, kind if promisc is None else 0),
        (0x1F0, 0, len(macs)),
    )
    return head + b"".join(mac.to_bytes(8, "big") for mac in macs)


def arm(raw: Raw, number: int, what: int) -> None:
    raw.command(put(0x200, (0, 16, 0x755), (8, 31, 1), (8, 0, number), (0xC, 0, 0x20), (0x104, 0, 1 << 31 | what)))


def listed(raw: Raw, number: int, kind: int) -> list[int]:
    out = raw.command(put(16, (0, 16, 0x754), (8, 31, 1), (8, 0, number), (0xC, 24, kind)), 0x110 + 64)
    count = words(out[0x100:0x104])[0] & 0xFFFF
    return [int.from_bytes(out[0x110 + 8 * n : 0x118 + 8 * n], "big") for n in range(count)]


def changes(raw: Raw, kept: EventQueue) -> list[int]:
    """The vports of which a change was told."""
    raw.settle()
    found = kept.read()
    assert {event[1] for event in found} <= {VPORT_CHANGE}
    return [int.from_bytes(event[0x22:0x24], "big") for event in found]


def test_a_change_that_was_asked_for_is_told_once(card, raw):
    queue = EventQueue(raw, 1 << VPORT_CHANGE)
    raw.enable_vf(0)
    vf = Raw(card.vfs[0], end=4 << 20)
    vf.power_on()
    own = listed(raw, 1, UNICAST)[0]
    vf.command(wanting(UNICAST, own, 0x02AA))
    assert changes(raw, queue) == [], "nobody has asked"
    arm(raw, 1, 0b0001)
    vf.command(wanting(UNICAST, own, 0x02AA))
    vf.command(wanting(MULTICAST, 0x3333_0000_0001))
    vf.command(wanting(0, promisc=4))
    assert changes(raw, queue) == [], "nothing of what was asked for has changed"
    vf.command(wanting(UNICAST, own, 0x02BB, 0x02CC))
    vf.command(wanting(UNICAST, own))
    assert changes(raw, queue) == [1], "the next one is for who asks again"
    assert (listed(raw, 1, UNICAST), listed(raw, 1, MULTICAST)) == ([own], [0x3333_0000_0001])
    arm(raw, 1, 0b1010)
    vf.command(wanting(0, promisc=0))
    assert changes(raw, queue) == [1]
    arm(raw, 1, 0b1010)
    card.models["vf0"].reset()
    assert changes(raw, queue) == [1], "a reset forgets its lists"
    assert listed(raw, 1, MULTICAST) == [(1 << 48) - 1]
    assert card.violations == 0


def test_what_a_vf_cannot_want(card, raw):
    raw.enable_vf(0)
    vf = Raw(card.vfs[0], end=4 << 20)
    vf.power_on()
    assert status(vf.command, wanting(UNICAST, 1 << 40)) == BAD_PARAM
    assert status(vf.command, wanting(MULTICAST, 0x02AA)) == BAD_PARAM
    assert status(vf.command, wanting(2, 0x02AA)) == BAD_PARAM
    assert status(vf.command, wanting(UNICAST, *range(2, 200))) == BAD_PARAM
    assert status(vf.simple, 0x754, 0, 1 << 31 | 2, room=0x110) == BAD_PARAM
    assert card.violations == 0


def test_what_a_vf_wants_moves_with_it_and_is_told_over_there():
    here, there = Card(vfs=1, seed="a"), Card(vfs=1, seed="b")
    raws = [Raw(each.pf).boot() for each in (here, there)]
    ids = [raw.enable_vf(0) for raw in raws]
    vf = Raw(here.vfs[0], end=4 << 20)
    vf.power_on()
    vf.command(wanting(UNICAST, 0x02AA, 0x02BB))
    queue = EventQueue(raws[1], 1 << VPORT_CHANGE)
    arm(raws[1], 1, 1)
    for raw, vhca in zip(raws, ids, strict=True):
        raw.stop(vhca)
    images = raws[0].save_all(ids[0], Buffer(raws[0], 2 << 20))
    buffer = Buffer(raws[1], 2 << 20)
    for image in images:
        raws[1].load(ids[1], buffer, image)
    assert changes(raws[1], queue) == [1]
    assert listed(raws[1], 1, UNICAST) == [0x02AA, 0x02BB]
