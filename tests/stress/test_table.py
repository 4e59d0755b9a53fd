"""The table as C walks it against the policy read byte by byte: widths, spans over rules, gaps, all classes."""

import random
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stress.table import SIZES, Presented, expected, never_all_ones, policy_rules, refusal
from vfu_server.policy import Answer, StateClass
from vfu_server.testing import Client, ReplyError

ACCESSES = 300


def near_an_edge(rng, rules, region):
    """Offsets where something changes are looked at more often than the rest."""
    edges = [edge for rule in rules if rule.region == region for edge in (rule.start, rule.end)]
    offset = rng.choice(edges) + rng.randint(-9, 3) if rng.random() < 0.7 else rng.randrange(SIZES[region])
    return max(0, offset)


def answered(presented, client, write, region, offset, width, data):
    """What was answered, as `expected` tells it, judged by who was asked and by the reply."""
    hardware, traps = len(presented.device.log), len(presented.traps.log)
    try:
        got = client.region_write(region, offset, data) if write else client.region_read(region, offset, width)
    except ReplyError as error:
        assert (len(presented.device.log), len(presented.traps.log)) == (hardware, traps), "refused and done"
        return refusal(error.errno)
    reached, trapped = presented.device.log[hardware:], presented.traps.log[traps:]
    assert len(reached) + len(trapped) <= 1
    for access in reached + trapped:
        assert (access.write, access.region, access.offset) == (write, region, offset)
        assert access.data == (data if write else got)
    if reached:
        return Answer.PASS
    if trapped:
        return Answer.TRAP
    kept = presented.context.take_kept_writes() if write else []
    if kept:
        assert [(k.region, k.offset, k.value.to_bytes(k.width, "little")) for k in kept] == [(region, offset, data)]
        return Answer.SHADOW
    return Answer.DISCARD if write or got == b"\xff" * width else Answer.SHADOW


@pytest.mark.deadline(120)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 32))
def test_each_access_is_answered_as_the_policy_says(seed):
    rules = policy_rules(seed)
    rng = random.Random(seed)
    presented = Presented(rules)
    ours, theirs = socket.socketpair()
    presented.context.attach(theirs.detach())
    try:
        with Client(ours) as client:
            client.negotiate()
            for state_class in rng.sample([*StateClass], len(StateClass)):
                presented.context.set_class(state_class)
                for _ in range(ACCESSES // len(StateClass)):
                    region = rng.choice([*SIZES])
                    width = rng.choice([1, 2, 4, 8, 3, 5, 8])
                    offset = min(near_an_edge(rng, rules, region), SIZES[region] - width)
                    write = rng.random() < 0.5
                    data = never_all_ones(rng.randbytes(width))
                    wanted = expected(rules, region, offset, width, write, state_class)
                    got = answered(presented, client, write, region, offset, width, data)
                    assert got == wanted, (state_class, region, hex(offset), width, write)
    finally:
        presented.close()
