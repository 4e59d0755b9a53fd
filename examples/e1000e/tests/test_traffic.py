"""Frames go on while the function moves: each sent once, each answer received once at most and undamaged."""

import e1000e
import pytest
from e1000e.traffic import Traffic

from vfu_server.testing import migrate_guest

MODEL = "e1000e.model"
SECONDS = 60.0
ADDRESS = bytes.fromhex("020000c0ffee")
START = 0x10000
MOVES, FRAMES, BURST = 4, 24, 12


def traffic_of(guest, messages="msi"):
    traffic = Traffic(guest, START, ADDRESS, SECONDS)
    traffic.bring_up(messages)
    return traffic


def seen(*models):
    """What stations have seen: frames, the sum of their numbers, and how many came again."""
    states = [model.registers() for model in models]
    return tuple(sum(state[f"station.{name}"] for state in states) for name in ("frames", "numbers", "repeated"))


def assert_each_was_sent_once(traffic, *models):
    sent = traffic.count.sent
    assert seen(*models) == (sent, sent * (sent - 1) // 2, 0)


@pytest.mark.parametrize("messages", ["msi", "msix", "intx"])
def test_frames_go_on_while_it_moves(vfu_pair, messages):
    pair = vfu_pair(e1000e, MODEL)
    here, there = pair.source, pair.destination
    traffic = traffic_of(here, messages)
    for _ in range(MOVES):
        traffic.exchange(FRAMES)
        traffic.send(BURST)  # on their way while it is stopped
        migrate_guest(here, there)
        traffic.move(there)
        here.machine_reset()
        here, there = there, here
        traffic.one_by_interrupt()
        traffic.exchange(FRAMES)
    assert traffic.count.sent == MOVES * (2 * FRAMES + BURST + 1)
    assert traffic.count.lost <= MOVES * BURST
    assert traffic.count.interrupts > 0
    assert_each_was_sent_once(traffic, *pair.models)
