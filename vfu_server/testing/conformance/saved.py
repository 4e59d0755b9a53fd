"""Saves that are repeatable, loads that give the same state, restores that are verified."""

from vfu_server.testing.conformance.bench import Bench
from vfu_server.testing.conformance.records import Failed, NotJudged, check
from vfu_server.testing.conformance.streams import try_load
from vfu_server.testing.migrate import migrate, save, save_early
from vfu_server.uapi import MigState


def _same(bench: Bench, first: bytes, second: bytes, what: str) -> None:
    if told := bench.difference(first, second):
        raise Failed(f"{what}: {told}")


@check("save-twice", "a stopped device that is saved twice gives the same bytes")
def save_twice(bench: Bench) -> str:
    """A stopped device that is saved twice gives the same bytes."""
    first = b""
    for use in (False, True):
        with bench.guest() as guest:
            client = guest.client
            if use:
                bench.disturb(client, bench.chance(), 5)
            first = bench.saved(client)
            client.set_mig_state(MigState.STOP)
            _same(bench, first, bench.saved(client), "two saves of a stopped device differ")
            client.set_mig_state(MigState.RUNNING)
    return f"{len(first)} bytes"


@check("load", "a state that is loaded and saved again is the same state")
def load(bench: Bench) -> str:
    """A state that is loaded and saved again is the same state."""
    fresh, used = bench.undisturbed(), bench.used()
    for stream in (fresh, used, fresh):
        with bench.guest("destination") as guest:
            if not try_load(guest.client, stream):
                raise Failed(f"it does not take a state of its own; {bench.why()}")
            _same(bench, stream, bench.saved(guest.client), "after a load the saved state is another")
            guest.client.set_mig_state(MigState.RUNNING)
    return f"{len(used)} bytes" + ("" if used != fresh else "; random writes changed nothing that travels")


@check("migrate", "a device moves back and forth and ends with the state that it began with")
def moves(bench: Bench) -> str:
    """A device moves back and forth and ends with the state that it began with."""
    rounds = 5
    with bench.guest() as source, bench.guest("destination") as destination:
        here, there = source.client, destination.client
        bench.disturb(here, bench.chance(), 3)
        for _ in range(2 * rounds):
            migrate(here, there)
            here.set_mig_state(MigState.RUNNING)
            here.set_mig_state(MigState.STOP)
            here, there = there, here
            if (here.mig_state(), there.mig_state()) != (MigState.RUNNING, MigState.STOP):
                raise Failed(f"after a migration they are in {here.mig_state().name} and {there.mig_state().name}")
    return f"{2 * rounds} migrations"


@check("pre-copy", "a state that was given early and completed is the whole state")
def pre_copy(bench: Bench) -> str:
    """A state that was given early and completed is the whole state."""
    if not bench.capabilities.pre_copy:
        raise NotJudged("pre-copy is not offered")
    with bench.guest() as guest:
        client = guest.client
        whole = bench.saved(client)
        client.set_mig_state(MigState.RUNNING)
        client.set_mig_state(MigState.PRE_COPY)
        early = b"".join(save_early(client))
        info = client.precopy_info()
        if info.initial_bytes:
            raise Failed(f"all that there was has been read, and initial_bytes is {info.initial_bytes}")
        client.set_mig_state(MigState.STOP_COPY)
        stream = early + b"".join(save(client))
    with bench.guest("destination") as guest:
        if not try_load(guest.client, stream):
            raise Failed(f"it does not take a state that was given early in parts; {bench.why()}")
        _same(bench, whole, bench.saved(guest.client), "given early, the state is another than given at once")
    return f"{len(early)} bytes early, {len(stream) - len(early)} late"


@check("verified", "a restore that the hardware did not take is noticed")
def verified(bench: Bench) -> str:
    """A restore that the hardware did not take is noticed."""
    fresh, used = bench.undisturbed(), bench.used()
    if not bench.difference(fresh, used):
        raise NotJudged("random writes changed nothing that travels: what a restore writes is what a reset left")
    door = bench.door("destination")
    with bench.guest("destination") as guest:
        door.lossy, door.lost = True, 0
        taken = try_load(guest.client, used)
        door.lossy = False
        if not door.lost:
            raise NotJudged("a restore writes to no BAR")
        if taken and not bench.difference(used, bench.saved(guest.client)):
            raise NotJudged("the state got there in spite of lost writes")
        if taken:
            raise Failed(f"{door.lost} writes of a restore were lost, and load_done did not notice: read back, compare")
        guest.client.reset()
        if guest.client.mig_state() is not MigState.RUNNING:
            raise Failed("a reset does not bring a device back whose restore has failed")
    return f"{door.lost} writes were lost, and the restore was refused"
