"""Accesses of all kinds in all states: answered or refused, and without effect on a device that is stopped."""

import contextlib
import random

from vfu_server.testing.client import Client
from vfu_server.testing.conformance.bench import BARS, Bench
from vfu_server.testing.conformance.records import Failed, check
from vfu_server.testing.wire import ReplyError
from vfu_server.uapi import MigState

MANY = 300
WIDTHS = (1, 2, 4, 8, 3, 5, 16, 64)


def _poke(bench: Bench, client: Client, chance: random.Random, count: int) -> tuple[int, int]:
    """Reads and writes at borders of rules and anywhere, in any width: (answered, refused)."""
    answered = refused = 0
    sizes = {index: size for index, size in bench.sizes().items() if size and index in BARS}
    places = [(rule.region, at) for rule in bench.device.policy.rules for at in (rule.start, rule.end - 1)]
    for _ in range(count if sizes else 0):
        region, offset = chance.choice(places) if places and chance.random() < 0.6 else (chance.choice([*sizes]), None)
        if region not in sizes:
            continue
        if offset is None:
            offset = chance.randrange(sizes[region])
        width = chance.choice(WIDTHS)
        with contextlib.suppress(ReplyError):
            refused += 1
            if chance.random() < 0.5:
                client.region_read(region, offset, width)
            else:
                client.region_write(region, offset, chance.randbytes(width))
            refused, answered = refused - 1, answered + 1
    return answered, refused


@check("accesses", "accesses of any kind are answered or refused, in every state", migrates=False)
def accesses(bench: Bench) -> str:
    """Accesses of any kind are answered or refused, in every state."""
    chance, answered, refused = bench.chance(), 0, 0
    wishes = [MigState.RUNNING]
    if bench.capabilities.migratable:
        wishes += [MigState.STOP, MigState.RESUMING, *([MigState.RUNNING_P2P] if bench.capabilities.p2p else [])]
    for state in wishes:
        with bench.guest() as guest:
            guest.client.set_mig_state(state) if state is not MigState.RUNNING else None
            good, bad = _poke(bench, guest.client, chance, MANY)
            answered, refused = answered + good, refused + bad
            guest.client.get_info()  # it is still served
    return f"{answered} answered, {refused} refused, in {len(wishes)} states"


@check("stopped", "no access changes a device that is stopped")
def stopped(bench: Bench) -> str:
    """No access changes a device that is stopped."""
    with bench.guest() as guest:
        client = guest.client
        bench.disturb(client, bench.chance(), 3)
        before = bench.saved(client)
        client.set_mig_state(MigState.STOP)
        answered, refused = _poke(bench, client, bench.chance(), MANY)
        told = bench.difference(before, bench.saved(client))
        if told:
            raise Failed(f"accesses while it was stopped have changed what is saved: {told}")
    return f"{answered} answered, {refused} refused"
