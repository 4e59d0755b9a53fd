"""kill -9 of each server and each VMM at every message of a migration, all of them processes of their own.

Whatever dies, the guest runs in one place at most, with all of its state; nowhere only if what it lived by was killed.
Whoever is left serves on, and a server that is started again after its death finds a device that works.
"""

import pytest

from tests.kills.flow import Migration, deaths, ops
from tests.kills.sides import SECONDS
from vfu_server.uapi import MigState

EVERY = 11
CASES = list(deaths())


def sampled():
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] if n % EVERY else []) for n, case in enumerate(CASES)
    ]


def begin(pair):
    for side in pair:
        if side.client is not None:
            side.client.close()
        if not side.alive:
            side.start()
        side.connect()
    return Migration(*pair)


def fresh_digest(side):
    return side.client.ask("digest")


def runs(side, digest):
    """Whether the guest runs here: its VMM and its server live, and the device has its state and is RUNNING."""
    if not side.with_client:
        return False
    return MigState(side.client.ask("what state")) is MigState.RUNNING and side.client.ask("digest") == digest


def others_may_come(side, fresh):
    """The next VMM finds a device as new, which stops, saves and starts; nothing of the last one is left."""
    if not side.alive:
        side.buried()
        side.server.__exit__()
        side.start()
    side.client.close()
    side.connect()
    assert MigState(side.client.ask("what state")) is MigState.RUNNING
    assert side.client.ask("digest") == fresh, f"{side.name}: the last guest's state is still there"
    side.state(MigState.STOP_COPY)
    assert side.read(4096)
    side.state(MigState.RUNNING)
    side.client.ask("change", page=2)
    assert side.client.ask("digest") != fresh
    files, memory = side.held()
    side.files, side.memory = side.files or files, side.memory or memory
    assert memory == side.memory > 0, f"{side.name}: a guest's memory is held {memory} times, {side.memory} at first"
    assert files <= side.files + 2, f"{side.name}: {files} files are open, {side.files} were at first"
    assert "Traceback" not in side.said()


def test_without_a_death(pair):
    migration = begin(pair)
    fresh = fresh_digest(pair[1])
    migration.run()
    assert (migration.outcome, tuple(migration.done)) == ("completed", ops()), migration.error
    assert runs(pair[1], migration.digest)
    assert not runs(pair[0], migration.digest)
    for side in pair:
        others_may_come(side, fresh)


@pytest.mark.parametrize("death", sampled())
def test_a_death(pair, death):
    migration = begin(pair)
    source, destination = pair
    fresh = fresh_digest(destination)
    migration.death = death
    migration.run()
    assert migration.struck, f"{death} was not come by: {migration.error}"
    assert migration.outcome in expected(migration), f"{migration.outcome} {migration.error}"
    there, here = runs(destination, migration.digest), runs(source, migration.digest)
    assert (here, there) == {
        "completed": (False, True),
        "recovered": (True, False),
        "lost": (False, False),
    }[migration.outcome], f"{migration.outcome}: runs at the source {here}, at the destination {there}"
    tells(pair, death)
    for side in pair:
        others_may_come(side, fresh)


def expected(migration):
    """The guest is lost only with its own VMM or server, at whichever side it lives by then."""
    victim, _, _ = migration.death.victim.partition("'")
    before = ops().index(migration.death.op)
    over = ops().index("destination RUNNING")
    if before < over or (before == over and victim == "destination"):
        if victim == "source":
            # Its VMM sees its server's end by then only if it still has to ask it.
            asked = any(op.startswith("source") for op in ops()[before:over])
            return {"lost"} if asked else {"completed"}
        return {"recovered"}
    return {"completed"} if victim == "source" else {"lost"}


def tells(pair, death):
    """A server whose VMM was killed amid a migration says so, with the state."""
    for side in pair:
        if death.victim == f"{side.name}'s client" and side.alive:
            side.server.wait_log("client disconnected in state", SECONDS)


def test_the_matrix_is_whole():
    assert len(CASES) == len({str(case) for case in CASES}) > 80
    assert {case.op for case in CASES} == set(ops())
