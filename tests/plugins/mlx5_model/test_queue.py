"""The command queue: what is wrong with an entry or a mailbox is found; signatures; faults of delivery."""

import pytest

from tests.plugins.mlx5_model.bench import Card
from tests.plugins.mlx5_model.raw import PAGE, DeliveryError, Raw, StatusError, put, words, xor

LONG = put(0x20, (0, 16, 0x805), (4, 0, 1), (8, 0, 0x7004))


@pytest.fixture
def card():
    return Card()


@pytest.fixture
def raw(card):
    return Raw(card.pf).boot()


@pytest.mark.parametrize(
    ("spoil", "delivery"),
    [
        ({"type": 6}, 0x10),
        ({"reserved": 1}, 9),
        ({"signature": 1}, 1),
        ({"in_length": 8}, 7),
        ({"in_length": 1 << 24}, 7),
        ({"out_length": 8}, 8),
        ({"mailbox_token": 0xEE}, 2),
        ({"number": 1}, 3),
        ({"pointer": 0x100200}, 5),
        ({"out_pointer": 0x100200}, 4),
        ({"pointer": 1 << 40}, 6),
    ],
    ids=lambda found: "-".join(found) if isinstance(found, dict) else "",
)
def test_each_mistake_has_its_delivery_status(card, raw, spoil, delivery):
    with pytest.raises(DeliveryError) as caught:
        raw.command(LONG, 0x20, **spoil)
    assert caught.value.delivery == delivery
    assert card.state()["violation.delivery"] == 1
    assert raw.port.load(raw.queue + 0x20, 1)[0] != 0, "who looks at the output only sees an error too"
    raw.command(LONG, 0x20)


def test_signatures_are_not_wanted_but_wrong_ones_are_found(card, raw):
    raw.sign = False
    raw.command(LONG, 0x20)
    assert card.violations == 0


def test_an_entry_of_the_driver_is_not_touched(card, raw):
    raw.write32(0x18, 2)
    card.clock.advance(1)
    assert card.state()["violation.doorbell"] == 1


def test_an_entry_in_use_is_not_taken_again(card, raw):
    raw.serve_pages = False
    card.order("lost:0x10a", -1)
    raw.post(put(16, (0, 16, 0x10A)), 0x70)
    card.clock.advance(1)
    raw.write32(0x18, 1)
    card.clock.advance(1)
    assert card.state()["violation.entry-in-use"] == 1


def test_chains_may_be_longer_than_needed(card, raw):
    """Blocks behind the last one that is used are not looked at, whatever they hold."""
    raw.post(LONG, 0x20)
    card.clock.advance(1)
    block = bytearray(raw.port.load(raw.inbox[0], 576))
    block[0x230:0x238] = (0x123).to_bytes(8, "big")
    block[0x23D] = raw.token
    raw.port.store(raw.inbox[0], bytes(block))
    raw.port.store(raw.queue + 0x3F, b"\1")
    head = bytearray(raw.port.load(raw.queue, 64))
    head[0x3D] = 0
    raw.port.store(raw.queue, bytes(head))
    raw.write32(0x18, 1)
    raw.finish()
    raw.output(0x20)
    assert card.violations == 0


def test_many_entries_at_once(card, raw):
    """Each is given back, and its event has its bit."""
    raw.eq.read()
    data = put(16, (0, 16, 0x10A))
    for entry in range(1, 12):
        head = bytearray(64)
        head[0] = 7
        head[4:8] = (16).to_bytes(4, "big")
        head[16:32] = data
        head[0x38:0x3C] = (16).to_bytes(4, "big")
        head[0x3C], head[0x3F] = entry, 1
        raw.port.store(raw.queue + 64 * entry, bytes(head))
    raw.write32(0x18, 0xFFE)
    raw.port.wait(lambda: not any(raw.owned(entry) for entry in range(1, 12)))
    bits = [int.from_bytes(event[0x20:0x24], "big") for event in raw.eq.read() if event[1] == 0xA]
    assert sorted(bits) == [1 << entry for entry in range(1, 12)]


def test_with_checksums_everything_is_signed(card):
    def changes(block: bytearray) -> None:
        block[0x42] |= 0x40
        raw.sign_boxes = True

    raw = Raw(card.pf)
    raw.boot(changes=changes, eq=False)
    raw.command(LONG, 0x20)
    block = raw.port.load(raw.outbox[0], 576)
    assert xor(block[0x200:0x23F]) == xor(block) == 0xFF
    raw.sign_boxes = False
    with pytest.raises(DeliveryError) as caught:
        raw.command(LONG, 0x20)
    assert caught.value.delivery == 1
    for entry in range(2):
        raw.post(put(16, (0, 16, 0x802)), 16)
        raw.finish()
        head = raw.port.load(raw.queue, 64)
        assert xor(head) == 0xFF
        assert raw.output()[0] == 0, entry


# --- ordered faults ---------------------------------------------------------------------------------------------------


def test_any_status_for_any_command(card, raw):
    card.order("status:0x802:0x9:0xabc", 2)
    for _ in range(2):
        with pytest.raises(StatusError) as caught:
            raw.simple(0x802)
        assert (caught.value.status, caught.value.syndrome) == (9, 0xABC)
    raw.simple(0x802)
    card.order("status:any:0x6")
    with pytest.raises(StatusError) as caught:
        raw.simple(0x800)
    assert caught.value.status == 6
    assert card.violations == 0


def test_delivery_as_ordered(card, raw):
    card.order("delivery:0x802:0x6")
    with pytest.raises(DeliveryError) as caught:
        raw.simple(0x802)
    assert caught.value.delivery == 6
    assert card.violations == 0


def test_a_lost_completion(card, raw):
    uars = card.state()["uars"]
    card.order("lost:0x802")
    raw.post(put(16, (0, 16, 0x802)))
    card.clock.advance(10)
    assert raw.owned()
    assert card.state()["uars"] == uars + 1


def test_a_wrong_token_and_a_wrong_signature(card, raw):
    card.order("bad-token")
    raw.post(put(16, (0, 16, 0x802)))
    raw.finish()
    assert raw.port.load(raw.queue + 0x3C, 1)[0] == raw.token ^ 0xFF
    card.order("bad-signature")
    raw.post(put(16, (0, 16, 0x802)))
    raw.finish()
    assert xor(raw.port.load(raw.queue, 64)) == 0


def test_a_lost_event(card, raw):
    raw.settle()
    raw.poll()
    raw.eq.kept.clear()
    card.order("event-lost")
    raw.simple(0x802)
    raw.poll()
    assert raw.eq.kept == []
    raw.simple(0x802)
    raw.poll()
    assert [event[1] for event in raw.eq.kept] == [0xA]


def test_health(card, raw):
    card.order("health:0x8")
    assert raw.read32(0x23C) >> 16 & 0xFF == 8
    assert raw.read32(0x238) >> 31 == 1
    counter = raw.read32(0x1010)
    assert raw.read32(0x1010) == counter
    raw.post(put(16, (0, 16, 0x802)))
    card.clock.advance(5)
    assert raw.owned(), "firmware that died does nothing"
    assert card.violations == 0
    card.models["pf"].reset()
    assert raw.read32(0x23C) == 0


def test_a_counter_that_stands_and_a_function_that_is_gone(card, raw):
    card.order("health-stuck", -1)
    assert raw.read32(0x1010) == raw.read32(0x1010)
    card.order("health-stuck", 0)
    assert raw.read32(0x1010) != raw.read32(0x1010)
    card.order("firmware-dead", -1)
    assert raw.read32(0x230) == 0xFFFFFFFF
    card.order("firmware-dead", 0)
    assert raw.read32(0x230) != 0xFFFFFFFF


def test_pages_that_never_come(card, raw):
    card.order("page-stall")
    raw.simple(0x104, 0, 1)
    raw.settle()
    assert card.state()["vf[0].enabled"] == 0
    assert card.state()["pages[1].asked"] == 8


def test_words_of_a_doorbell_page_that_went(card, raw):
    uar = words(raw.simple(0x802))[2]
    raw.simple(0x803, 0, uar)
    raw.write32(uar * PAGE + 0x40, 0)
    assert card.state()["violation.uar"] == 1
    with pytest.raises(StatusError) as caught:
        raw.simple(0x803, 0, raw.eq.uar)
    assert caught.value.status == 6
