"""The failure matrix of this plugin: every access of a migration, on either side, fails once.

Whatever fails, the guest goes on with every entry exactly once: at the target if the migration ended well, else at the
source. Every `EVERY`th place belongs to the usual run, the others are marked slow.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest

from plugins.hns.models.traffic import Traffic
from tests.model_process import ModelProcess
from tests.plugins.hns.faults import Side
from tests.plugins.hns.served import MEMORY, MODULE, SECONDS
from vfu_server.testing import Guest, GuestMemory, ReplyError, migrate_guest
from vfu_server.uapi import MigState

EVERY = 9
MOST = 270
"""Accesses of one side of a migration, at most: more than that would be places that no case comes by."""
PLACES = [pytest.param(n, marks=[] if n % EVERY == 1 else [pytest.mark.slow]) for n in range(1, MOST + 1)]


Sides = Mapping[str, Side]


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> Iterator[Sides]:
    folder = tmp_path_factory.mktemp("f")
    with ExitStack() as stack:
        found = {}
        for name in ("source", "destination"):
            (folder / name).mkdir()
            arguments = ("zip", "--queues", "4")
            model = stack.enter_context(ModelProcess(folder / name, *arguments, module=MODULE, time_scale=1.0))
            found[name] = Side(str(model.path))
            stack.callback(found[name].close)
        yield found


def migrate_with(sides: Sides, side: str, nth: int) -> tuple[int, bool]:
    """Move a guest under load while the `nth` access of `side` fails. Accesses of that side, whether it was moved."""
    orders = sides[side].orders
    with ExitStack() as stack:
        guests = []
        for each in sides.values():
            memory = stack.enter_context(GuestMemory.of(MEMORY))
            guests.append(stack.enter_context(Guest(each.client(SECONDS), memory)))
        here, there = guests
        here.start()
        there.plug_in()
        there.machine_reset()
        traffic = Traffic(here, queues=3, depth=8, size=256, timeout=SECONDS)
        traffic.run_entries(10)
        traffic.submit()
        orders.arm(nth)
        failed = None
        try:
            migrate_guest(here, there)
        except ReplyError as error:
            failed = error
        moved = failed is None
        count, struck = len(orders.calls), orders.struck
        orders.arm(0)
        if moved:
            assert there.client.mig_state() is MigState.RUNNING
            traffic.move(there, there.interrupts)
        else:
            assert struck, "nothing failed but the migration"
            assert "the source runs again" in failed.__notes__
            assert here.client.mig_state() is MigState.RUNNING
        traffic.run_entries(10)
        assert traffic.finish().in_flight == 0
        return count, moved


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_migration_has_no_more_accesses_than_there_are_cases(sides, side):
    count, moved = migrate_with(sides, side, 0)
    assert moved
    assert 20 < count <= MOST


@pytest.mark.parametrize("nth", PLACES)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_an_access_that_fails_costs_the_migration_and_nothing_else(sides, side, nth):
    migrate_with(sides, side, nth)
