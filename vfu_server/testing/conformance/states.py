"""The state machine as a client sees it, stops after use, and clients that vanish."""

from vfu_server import migration
from vfu_server.errors import StateError
from vfu_server.testing.client import Client
from vfu_server.testing.conformance.bench import Bench
from vfu_server.testing.conformance.records import Failed, NotJudged, check
from vfu_server.testing.wire import ReplyError
from vfu_server.uapi import MigState

TOO_LONG = "took longer than"
"""What the server says of a plugin that did not come back in its time."""


@check("states", "every wish for a state is met or refused, and the state is then what it was said to be")
def states(bench: Bench) -> str:
    """Every wish for a state is met or refused, and the state is then what it was said to be."""
    tried = 0
    with bench.guest() as guest:
        client = guest.client
        flags = client.migration_flags()
        known = sorted(migration.states(flags))
        for start in known:
            for wish in (*known, *(state for state in MigState if state not in known)):
                try:
                    _reach(client, start)
                except ReplyError as error:
                    raise Failed(
                        f"wish {tried + 1}: {start.name} cannot be reached again: {error}; {bench.why()}"
                    ) from error
                _wish(client, flags, start, wish)
                tried += 1
        _back(client)
        if client.mig_state() is not MigState.RUNNING:
            raise Failed(f"at the end it is in {client.mig_state().name}, not in RUNNING")
    return f"{tried} wishes among {len(known)} states"


def _reach(client: Client, state: MigState) -> None:
    _back(client)
    client.set_mig_state(state)
    if client.mig_state() is not state:
        raise Failed(f"asked for {state.name}, it is in {client.mig_state().name}")


def _back(client: Client) -> None:
    if client.mig_state() in (MigState.RESUMING, MigState.ERROR):
        client.reset()
    client.set_mig_state(MigState.RUNNING)


def _wish(client: Client, flags: int, start: MigState, wish: MigState) -> None:
    expected: MigState | None = wish
    try:
        migration.path(flags, start, wish)
    except StateError:
        expected = None
    if start is MigState.RESUMING and wish is not start:
        expected = None  # no state was loaded
    try:
        client.set_mig_state(wish)
    except ReplyError as error:
        if expected is not None:
            raise Failed(f"{start.name} -> {wish.name} was refused with errno {error.errno}") from error
        expected = start
    else:
        if expected is None:
            raise Failed(f"{start.name} -> {wish.name} was taken, and must be refused")
    if (found := client.mig_state()) is not expected:
        raise Failed(f"after the wish {start.name} -> {wish.name} it is in {found.name}, not in {expected.name}")


@check("stop", "a device that was used comes to rest in time, or goes on as if nothing had been")
def stop(bench: Bench) -> str:
    """A device that was used comes to rest in time, or goes on as if nothing had been."""
    chance, stopped, refused = bench.chance(), 0, 0
    for _ in range(10):
        with bench.guest() as guest:
            client = guest.client
            bench.disturb(client, chance, 40)
            try:
                client.set_mig_state(MigState.STOP)
                stopped += 1
                client.set_mig_state(MigState.RUNNING)
            except ReplyError:
                refused += 1
                if (state := client.mig_state()) is not MigState.RUNNING:
                    raise Failed(f"a stop was refused, and it is in {state.name}; {bench.why()}") from None
        late = [record.getMessage() for record in bench.loop.records if TOO_LONG in record.getMessage()]
        if late:
            raise Failed(f"a stop had no deadline of its own below the server's: {late[0]}")
    if not stopped:
        raise NotJudged(f"no stop succeeded after random writes: {bench.why()}")
    return f"{stopped} of {stopped + refused} stops after random writes; the others were refused and it ran on"


@check("clients", "a client may vanish in any state: the next one finds a device as new")
def clients(bench: Bench) -> str:
    """A client may vanish in any state: the next one finds a device as new."""
    bench.renew("source")
    fresh = bench.undisturbed()
    with bench.guest() as guest:
        known = sorted(migration.states(guest.client.migration_flags()))
    for state in known:
        with bench.guest() as guest:
            bench.disturb(guest.client, bench.chance(), 3)
            guest.client.set_mig_state(state)
        with bench.guest() as guest:
            if guest.client.mig_state() is not MigState.RUNNING:
                raise Failed(f"after a client that vanished in {state.name} it is in {guest.client.mig_state().name}")
            if bench.difference(fresh, bench.saved(guest.client)):
                raise Failed(f"after a client that vanished in {state.name} its state is not a new device's")
    return f"{len(known)} states"
