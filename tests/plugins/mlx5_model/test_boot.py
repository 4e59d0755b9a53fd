"""The PF from power on to power off: order, capabilities, pages, and each thing that a driver may not do there."""

import struct

import pytest

from tests.plugins.mlx5_model.bench import Card
from tests.plugins.mlx5_model.raw import EventQueue, Raw, StatusError, create_mkey, put, words

BAD_OP, BAD_PARAM, BAD_SYS, BAD_RES, BUSY, LIMIT, BAD_STATE, NO_RES = 2, 3, 4, 5, 6, 8, 9, 0xF
IN_LENGTH, OUT_LENGTH = 0x50, 0x51


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


def tear_down(raw: Raw) -> None:
    raw.eq.close()
    raw.eq = None
    raw.simple(0x103)
    for function in list(raw.given):
        while raw.given[function]:
            assert raw.take(function, 16)
    raw.simple(0x105)


def test_boot_and_tear_down_leave_nothing(card, raw):
    raw.enable_vf()
    assert card.state()["pages[1]"] == 8
    raw.simple(0x105, 0, 1)
    raw.settle()
    assert card.state()["pages[1]"] == 0
    tear_down(raw)
    state = card.state()
    assert (state["stage"], state["pages[0]"], state["violations"]) == (0, 0, 0)
    raw.boot()
    assert card.state()["violations"] == 0


def test_a_new_queue_needs_time_and_an_address(card):
    raw = Raw(card.pf)
    assert raw.read32(0x1FC) >> 31 == 1
    raw.write32(0x18, 1)
    assert card.violations == 1
    raw.power_on()
    assert raw.read32(0x14) & 0xFFFFF000 == raw.queue
    raw.simple(0x104)
    assert card.violations == 1


def test_reserved_bits_of_the_queue_address_count(card):
    raw = Raw(card.pf)
    raw.port.wait(lambda: not raw.read32(0x1FC) >> 31)
    raw.write32(0x14, raw.queue | 0x65)
    assert card.violations == 1
    raw.write32(0x18, 1)
    assert card.violations == 2


def test_registers_of_the_segment(card, raw):
    assert raw.read32(0) == 43 << 16 | 28
    assert raw.read32(4) == 5 << 16 | 1014
    assert raw.read32(0xFFC) != 0
    first = raw.read32(0x1010)
    assert raw.read32(0x1010) != first
    assert raw.read32(0x23C) == 0
    raw.write32(0x230, 1)
    assert card.violations == 1
    assert card.pf.read(0, 0x1FC, 1) == raw.read32(0x1FC) >> 24
    assert card.pf.read(0, 0, 8).to_bytes(8, "little") == struct.pack(">II", raw.read32(0), raw.read32(4))


def test_order_of_boot(card):
    raw = Raw(card.pf)
    raw.power_on()
    assert status(raw.simple, 0x10A, room=0x70) == BAD_SYS
    raw.simple(0x104)
    assert status(raw.simple, 0x104) == BAD_SYS
    assert status(raw.simple, 0x802) == BAD_SYS
    init = put(0x20, (0, 16, 0x102))
    assert status(raw.command, init) == BAD_SYS
    raw.feed(1)
    assert status(raw.command, init) == BAD_SYS
    raw.feed(2)
    raw.command(init)
    assert status(raw.command, init) == BAD_SYS
    assert status(raw.simple, 0x105) == BAD_SYS


def test_pages_have_to_come_back_before_disable(raw):
    raw.eq.close()
    raw.simple(0x103)
    assert status(raw.simple, 0x105) == BAD_SYS


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ([0], BAD_PARAM),
        ([0x100800], BAD_PARAM),
        ([1 << 40], BAD_PARAM),
        ([0x700000] * 2, BAD_PARAM),
        ([4096] * 9, LIMIT),
    ],
    ids=["zero", "unaligned", "no memory", "twice", "too many"],
)
def test_bad_pages_are_refused_and_none_is_kept(card, pages, expected):
    raw = Raw(card.pf)
    raw.power_on()
    raw.simple(0x104)
    head = put(16, (0, 16, 0x108), (4, 0, 1), (12, 0, len(pages)))
    assert status(raw.command, head + struct.pack(f">{len(pages)}Q", *pages)) == expected
    assert card.state()["pages[0]"] == 0
    assert card.violations == 1
    raw.feed(1)
    assert card.state()["pages[0]"] == 4


def test_a_page_that_is_used_by_somebody_else_shows(card, raw):
    raw.port.store(raw.given[0][5] + 100, b"oops")
    raw.eq.close()
    raw.simple(0x103)
    raw.take(0, 24)
    assert card.state()["health"] == 0xB
    assert raw.read32(0x23C) >> 16 & 0xFF == 0xB
    assert raw.read32(0x238) >> 31 == 1
    assert card.violations == 1


def test_wrong_lists_of_pages(card):
    raw = Raw(card.pf)
    raw.power_on()
    raw.simple(0x104)
    head = put(16, (0, 16, 0x108), (4, 0, 1), (12, 0, 2))
    assert status(raw.command, head + bytes(8)) == IN_LENGTH
    assert status(raw.command, put(16, (0, 16, 0x108), (4, 0, 2), (12, 0, 4)), 16) == OUT_LENGTH
    assert status(raw.simple, 0x108, 0, 0, 1) == BAD_PARAM
    assert status(raw.simple, 0x108, 3) == BAD_PARAM
    assert status(raw.simple, 0x108, 0, 9) == BAD_RES


def test_a_vf_waits_for_its_pages(card, raw):
    vf = Raw(card.vfs[0])
    card.clock.advance(1.0)
    raw.serve_pages = False
    raw.simple(0x104, 0, 1)
    raw.settle()
    requests = [event for event in raw.eq.kept if event[1] == 0xB]
    assert [struct.unpack(">HHi", event[0x20:0x28]) for event in requests] == [(0, 1, 8)]
    assert vf.read32(0x1FC) >> 31 == 1
    raw.give(1, 3)
    assert vf.read32(0x1FC) >> 31 == 1
    raw.give(1, 5)
    assert vf.read32(0x1FC) >> 31 == 0
    assert card.violations == 0


def test_a_driver_without_memory(card, raw):
    raw.serve_pages = False
    raw.simple(0x104, 0, 1)
    raw.simple(0x108, 0, 1)
    assert card.state()["vf[0].enabled"] == 0
    assert status(raw.simple, 0x108, 0, 1) == BAD_PARAM
    raw.serve_pages = True
    raw.eq.read()
    raw.enable_vf()
    assert card.state()["vf[0].enabled"] == 1


def test_requests_wait_for_an_event_queue(card):
    raw = Raw(card.pf).boot(eq=False)
    raw.simple(0x104, 0, 1)
    raw.settle()
    assert card.state()["vf[0].enabled"] == 0
    raw.eq = EventQueue(raw, 0xC00)
    raw.settle()
    assert card.state()["vf[0].enabled"] == 1


def test_functions_by_vhca_id_and_release_all(card):
    def changes(block: bytearray) -> None:
        block[0x54] |= 0x80
        block[0x28] |= 0x04

    raw = Raw(card.pf).boot(changes=changes)
    vhca = raw.enable_vf(1)
    assert list(raw.given) == [0, 0x1F, vhca] or list(raw.given) == [0, vhca]
    raw.simple(0x105, 0, 2)
    raw.settle()
    assert vhca not in raw.given
    assert card.state()["pages[2]"] == 0
    assert card.violations == 0


def test_a_card_that_never_asks(card):
    card = Card(caps={"page_request_disable": 1})
    raw = Raw(card.pf).boot()
    raw.enable_vf()
    assert card.state()["pages[1]"] == 0
    assert card.state()["vf[0].enabled"] == 1


def test_vhca_ids_are_found_by_capabilities(raw):
    assert words(raw.cap(0, 1))[1] & 0xFFFF == 0x1F
    assert words(raw.cap(0, 1, 1))[1] & 0xFFFF == 0x21
    assert words(raw.cap(0, 1, 2))[1] & 0xFFFF == 0x24
    assert status(raw.cap, 0, 1, 3) == BAD_RES
    assert status(raw.cap, 0x77, 1) == BAD_PARAM
    found = raw.simple(0x100, 1, 1 << 31 | 1 << 28 | 0x24, room=0x1010)
    assert words(found[16:])[1] & 0xFFFF == 0x24


def test_capabilities_cannot_be_made_up(card):
    raw = Raw(card.pf)
    raw.power_on()
    raw.simple(0x104)
    block = raw.cap(0, 1)
    head = put(16, (0, 16, 0x109))
    for at, bit in ((0xD1, 4), (0x300, 1), (7, 1)):
        wrong = bytearray(block)
        wrong[at] ^= bit
        assert status(raw.command, head + bytes(wrong)) == BAD_PARAM
    assert status(raw.command, head + block[:-8]) == IN_LENGTH
    assert status(raw.command, put(16, (0, 16, 0x109), (4, 0, 1)) + block) == BAD_PARAM
    raw.command(head + block)


def test_missing_bits_are_missing():
    card = Card(caps={"migration": 0, "hca_cap_2": 0})
    raw = Raw(card.pf).boot()
    general = raw.cap(0, 1)
    assert not general[0xD1] & 4
    assert not general[4] & 0x80


def test_issi_and_adapter(raw):
    assert words(raw.simple(0x10A, room=0x70))[2] & 0xFFFF == 1
    assert status(raw.simple, 0x10B, 0, 7) == BAD_PARAM
    assert raw.simple(0x101, room=0x110)[0x100:].rstrip(b"\0") == b"MT_0000000838"


def test_access_registers(raw):
    head = put(16, (0, 16, 0x805), (4, 0, 1), (8, 0, 0xC00E))
    assert words(raw.command(head + bytes(0x40), 0x50)[0x10:])[10] == 1 << 29 | 3
    assert status(raw.command, head + bytes(0x30), 0x50) == IN_LENGTH
    assert status(raw.command, head + bytes(0x40), 0x40) == OUT_LENGTH
    assert status(raw.command, put(0x20, (0, 16, 0x805), (8, 0, 0x1234)), 0x20) == BAD_PARAM
    wrong = put(0x20, (0, 16, 0x805), (8, 0, 0x7004), (0x14, 0, 1))
    assert status(raw.command, wrong, 0x20) == BAD_PARAM


@pytest.mark.parametrize(
    ("data", "room", "expected"),
    [
        (put(16, (0, 16, 0x7FF)), 16, BAD_OP),
        (put(16, (0, 16, 0x802), (0, 0, 1)), 16, BAD_PARAM),
        (put(16, (0, 16, 0x802), (4, 0, 1)), 16, BAD_PARAM),
        (put(16, (0, 16, 0x802), (4, 16, 1)), 16, BAD_PARAM),
        (put(16, (0, 16, 0x802), (12, 0, 1)), 16, BAD_PARAM),
        (put(32, (0, 16, 0x802)), 16, IN_LENGTH),
        (put(16, (0, 16, 0x118)), 16, IN_LENGTH),
        (put(16, (0, 16, 0x117)), 16, OUT_LENGTH),
        (put(16, (0, 16, 0x104), (8, 31, 1)), 16, BAD_PARAM),
        (put(16, (0, 16, 0x104), (8, 0, 9)), 16, BAD_RES),
        (put(16, (0, 16, 0x103), (8, 0, 3)), 16, BAD_PARAM),
        (put(16, (0, 16, 0x803), (8, 0, 0x20)), 16, BAD_RES),
        (put(16, (0, 16, 0x801), (8, 0, 0x20)), 16, BAD_RES),
        (put(16, (0, 16, 0x302), (8, 0, 0x20)), 16, BAD_RES),
    ],
)
def test_each_mistake_has_its_status_and_is_counted(card, raw, data, room, expected):
    assert status(raw.command, data, room) == expected
    assert card.violations == 1


def test_leaks_are_counted(card, raw):
    raw.simple(0x800)
    raw.simple(0x103)
    assert card.state()["violation.leak"] == 3  # a PD, an event queue, a doorbell page


def test_a_reset_forgets_everything(card, raw):
    raw.enable_vf()
    card.models["pf"].reset()
    state = card.state()
    assert (state["stage"], state["vf[0].enabled"], state["eqs"]) == (0, 0, 0)
    raw.eq = None
    raw.given.clear()
    raw.boot().enable_vf()
    assert card.violations == 0


def test_reset_by_the_nic_interface(card, raw):
    raw.write32(0x14, 7 << 8)
    assert card.state()["stage"] == 0
    raw.eq = None
    raw.boot()


def test_a_disabled_interface_takes_no_commands(card, raw):
    raw.simple(0x103, 0, 2)
    raw.write32(0x14, 1 << 8)
    assert raw.read32(0x14) >> 8 & 7 == 1
    raw.write32(0x18, 1)
    assert card.violations == 1


def test_keys_are_checked(card, raw):
    pd = words(raw.simple(0x800))[2]
    good = create_mkey(pd, 0x3000, [0x100000, 0x101000, 0x102000])
    index = words(raw.command(good))[2]
    assert status(raw.simple, 0x801, 0, pd) == BUSY
    for at, value in ((0x10, 0x40), (0x11, 1), (0x4B, 11), (0x47, 9), (0x63, 1), (0x34, 1), (0x117, 1), (0x1C, 0x80)):
        wrong = bytearray(good)
        wrong[at] ^= value
        assert status(raw.command, bytes(wrong)) == BAD_PARAM, hex(at)
    assert status(raw.command, create_mkey(pd + 9, 0x1000, [0x100000])) == BAD_RES
    assert status(raw.command, create_mkey(pd, 0x4000, [0x100000])) == BAD_PARAM
    raw.simple(0x202, 0, index)
    raw.simple(0x801, 0, pd)
    assert status(raw.simple, 0x202, 0, index) == BAD_RES


def test_event_queues_wrap_and_overrun(card, raw):
    raw.eq.close()
    queue = EventQueue(raw, 0x400, log=3)
    for _ in range(20):
        raw.simple(0x10A, room=0x70)
        assert len(queue.read()) <= 8
    assert queue.ci >= 20
    assert card.violations == 0
    for _ in range(9):
        raw.simple(0x10A, room=0x70)
    assert card.state()["violation.eq-overrun"] == 1
    assert card.state()["health"] == 0xC


def test_interrupts_come_when_armed(card, raw):
    raw.settle()
    card.pf.interrupts(0)
    raw.simple(0x10A, room=0x70)
    before = card.pf.interrupts(0)
    raw.eq.read()
    assert before <= 1
    raw.eq.arm()
    raw.simple(0x10A, room=0x70)
    assert card.pf.interrupts(0) == 1


def test_doorbells_of_nobody_are_counted(card, raw):
    raw.write32(0x50040, 0x01000000)
    raw.write32(raw.eq.uar * 4096 + 0x40, 0x77000000)
    raw.write32(raw.eq.uar * 4096 + 0x48, raw.eq.number << 24 | 0x500)
    raw.write32(raw.eq.uar * 4096 + 0x60, 1)
    assert card.violations == 4
