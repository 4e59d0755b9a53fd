"""The VF's data path: frames come back, errors stop a pair, resets, interrupts, and frames that nobody sent."""

import struct

import pytest

from plugins.mlx5.models.traffic import Traffic, TrafficError
from tests.plugins.mlx5_model.bench import Card
from tests.plugins.mlx5_model.raw import Raw, put, words


@pytest.fixture
def card():
    card = Card()
    Raw(card.pf).boot().enable_vf()
    return card


@pytest.fixture
def traffic(card):
    traffic = Traffic(card.vfs[0], pairs=(0, 1, 2, 3))
    traffic.start()
    return traffic


def test_rings_wrap(card, traffic):
    traffic.run(300)
    assert [lane.received for lane in traffic.lanes] == [300] * 4
    assert card.state()["violations"] + card.state()["guest_violations"] == 0


def test_interrupts_come_once_for_each_arm(card, traffic):
    traffic.finish()
    card.vfs[0].bus.messages.clear()
    traffic.post(3)
    card.clock.advance(0.1)
    assert sorted(card.vfs[0].bus.messages) == [1, 2, 3, 4]
    traffic.finish()


def test_a_vf_that_is_not_enabled_has_no_engine():
    card = Card()
    with pytest.raises(TrafficError):
        Traffic(card.vfs[0]).start()


def test_frames_that_the_device_makes(card):
    traffic = Traffic(card.vfs[0], pairs=(1,))
    traffic.start()
    traffic.generate(1, 100, 1000)
    card.vfs[0].wait(lambda: traffic.poll() >= 0 and traffic.lanes[0].received >= 200, "frames")
    traffic.generate(1, 0, 0)
    card.clock.advance(0.1)
    traffic.poll()
    assert traffic.register(0x2C) == traffic.lanes[0].received
    assert card.state()["violations"] + card.state()["guest_violations"] == 0


def test_a_wire_that_is_full_loses_generated_frames(card):
    traffic = Traffic(card.vfs[0], pairs=(1,))
    traffic.start()
    traffic.set_register(0x100 + 0x80 + 0x30, 0)
    traffic.generate(1, 100, 2000)
    card.clock.advance(0.01)
    assert traffic.register(0x28) > 0
    assert traffic.register(0x2C) <= 8


def test_memory_that_is_not_there_stops_the_pair(card, traffic):
    card.vfs[0].bus.holes.append((0x110000, 0x111000))
    traffic.post(1)
    card.clock.advance(0.1)
    assert traffic.register(0x100 + 0x58) == 1
    assert traffic.register(0x100 + 0x30) == 0
    assert traffic.register(0x180 + 0x58) == 0
    assert card.state()["guest_violation.engine"] == 1
    with pytest.raises(TimeoutError):
        traffic.finish()


def test_without_bus_mastering_nothing_is_started(card, traffic):
    card.models["vf0"].config.write(4, b"\2\0")
    traffic.post(3)
    card.clock.advance(0.1)
    assert traffic.poll() == 0
    card.models["vf0"].config.write(4, b"\6\0")
    traffic.post(1)
    traffic.finish()
    assert card.state()["guest_violations"] == 0


def test_wrong_descriptors_stop_the_pair(card, traffic):
    port = card.vfs[0]
    port.store(0x100000, struct.pack(">QIIQQ", 0x110000, 4000, 0, 1, 0))
    port.write(0, 0x20800, 4, int.from_bytes(struct.pack(">I", 1), "little"))
    card.clock.advance(0.1)
    assert traffic.register(0x100 + 0x58) == 2


def test_doorbells_beyond_the_ring_stop_the_pair(card, traffic):
    card.vfs[0].write(0, 0x20800, 4, int.from_bytes(struct.pack(">I", 500), "little"))
    assert traffic.register(0x100 + 0x58) == 3


def test_a_pair_starts_anew_after_an_error(card, traffic):
    card.vfs[0].write(0, 0x20800, 4, int.from_bytes(struct.pack(">I", 500), "little"))
    traffic.set_register(0x08, 2)
    again = Traffic(card.vfs[0], pairs=(0,))
    again.start()
    again.run(70)


def test_writes_that_mean_nothing_are_counted(card):
    port = card.vfs[0]
    port.write(0, 0x10004, 4, 1)
    port.write(0, 0x10100, 2, 1)
    port.write(0, 0x30000, 4, 1)
    port.write(0, 0x20100, 4, 1)
    assert card.state()["guest_violation.engine"] == 4
    assert port.read(0, 0x30000, 4) == 0
    assert port.read(0, 0x10000, 8).to_bytes(8, "little") == b"NIC1" + struct.pack(">I", 4)


def test_a_reset_is_a_new_life(card, traffic):
    traffic.run(10)
    card.models["vf0"].reset()
    card.clock.advance(0.1)
    fresh = Traffic(card.vfs[0], pairs=(0, 1, 2, 3))
    fresh.start()
    fresh.run(10)
    assert card.state()["violations"] + card.state()["guest_violations"] == 0


def test_the_vfs_own_command_queue(card):
    raw = Raw(card.vfs[0], end=4 << 20)
    raw.power_on()
    assert words(raw.simple(0x10A, room=0x70))[2] & 0xFFFF == 0
    raw.simple(0x10B, 0, 1)
    assert words(raw.simple(0x10A, room=0x70))[2] & 0xFFFF == 1
    assert words(raw.cap(0, 1))[1] & 0xFFFF == 0x21
    assert card.state()["violations"] + card.state()["guest_violations"] == 0


def test_commands_of_a_suspended_vf_wait(card):
    """Posted before or after the suspend: they are done when it goes on, here or elsewhere."""
    raw, pf = Raw(card.vfs[0], end=4 << 20), Raw(card.pf, start=20 << 20)
    pf.queue = card.models["pf"]._queue.address
    raw.power_on()
    pf.token = 99
    pf.suspend(0x21, 0)
    raw.post(put(16, (0, 16, 0x10A)), 0x70)
    card.clock.advance(1.0)
    assert raw.owned()
    pf.suspend(0x21, 1)
    pf.go(0x21)
    raw.finish()
    assert raw.output(0x70)
