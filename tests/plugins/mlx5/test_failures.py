"""The failure matrix of this plugin: at each command and each access of a migration, on either side, something fails.

The places are those that a migration without failures came by, with pre-copy and the log of pages. Whatever fails, the
guest goes on with every frame exactly once: at the destination if the migration ended well, else at the source; or,
where nobody can know any more what the function does, the source says ERROR and a reset brings it back. The next
migration works. The usual run comes by a spread of the places, the slow one by all.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from plugins.mlx5.models.traffic import Traffic, TrafficError
from tests.end_to_end.served import until
from tests.plugins.mlx5.faults import SECONDS, Side, refuse
from tests.plugins.mlx5.served import MB, GuestPort
from vfu_server.errors import VfuServerError
from vfu_server.testing import Guest, GuestMemory, ReplyError, migrate_guest
from vfu_server.uapi import MigState

SIDES = ("source", "destination")
FEW = 2
"""Places of each kind and side that belong to the usual run."""
FRAMES = 10
MEMORY = 2 * MB
FIRMWARE = {
    "status": "status:any:0x4:0x77",
    "delivery": "delivery:any:6",
    "lost": "lost:any",
    "token": "bad-token",
    "starvation": "page-starvation",
    "health": "health:8",
}
"""What the firmware does with one command, by its name as a fault of the model."""
UNKNOWN = frozenset({"lost", "token"})
"""Of these nobody may know what has become of the function: its state may be ERROR, left by a reset."""


class Pair:
    """Both sides; one that was left in disorder is made anew."""

    def __init__(self) -> None:
        self._sides: dict[str, Side] = {}

    def side(self, name: str) -> Side:
        if name not in self._sides:
            self._sides[name] = Side()
        return self._sides[name]

    def drop(self, *names: str) -> None:
        for name in names:
            if name in self._sides:
                self._sides.pop(name).close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    found = Pair()
    yield found
    found.drop(*SIDES)


class Attempt:
    """One migration of a guest at work, and what became of it."""

    def __init__(self, stack: ExitStack, pair: Pair) -> None:
        until(lambda: all(pair.side(name).is_up for name in SIDES), "both to be up", SECONDS)
        memories = [stack.enter_context(GuestMemory.of(MEMORY)) for _ in SIDES]
        clients = [pair.side(name).client() for name in SIDES]
        guests = [Guest(client, memory) for client, memory in zip(clients, memories, strict=True)]
        self.here, self.there = (stack.enter_context(guest) for guest in guests)
        for guest in guests:
            guest.plug_in()
            until(lambda guest=guest: _is_granted(guest.machine_reset), "a reset", SECONDS)
        self.here.firmware()
        self.traffic = Traffic(GuestPort(self.here))
        self.traffic.start()
        self.traffic.run(FRAMES)
        self.traffic.post(FRAMES)
        self.failed: VfuServerError | None = None

    def run(self) -> None:
        try:
            migrate_guest(self.here, self.there)
        except VfuServerError as error:
            self.failed = error

    @property
    def is_at(self) -> str:
        """Where the guest has to be."""
        return "destination" if self.failed is None else "source"

    def go_on(self) -> str:
        """The guest goes on where it is, with every frame exactly once; or, its state being unknown, as new."""
        guest = self.there if self.failed is None else self.here
        state = guest.client.mig_state()
        if self.failed is not None and "the source runs again" not in self.failed.__notes__:
            assert state is MigState.ERROR, (state, self.failed, self.failed.__notes__)
            return self.begin_anew()
        assert state is MigState.RUNNING, state
        if self.failed is None:
            self.traffic.moved(GuestPort(self.there))
        self.traffic.finish()
        self.traffic.run(FRAMES)
        return "moved" if self.failed is None else "the source runs"

    def begin_anew(self) -> str:
        """Whoever has the guest resets its function, which then works."""
        guest = self.there if self.failed is None else self.here
        until(lambda: _is_granted(guest.machine_reset), "a reset", SECONDS)
        guest.firmware()
        assert guest.client.mig_state() is MigState.RUNNING
        traffic = Traffic(GuestPort(guest))
        traffic.start()
        traffic.run(FRAMES)
        return f"{self.is_at} reset"


def _is_granted(step: Callable[[], object]) -> bool:
    """A physical function that has died is brought up again within seconds; until then resets are refused."""
    try:
        step()
    except ReplyError:
        return False
    return True


def record(pair: Pair, side: str, *, commands: bool) -> list[str]:
    """The places that a migration without failures comes by."""
    with ExitStack() as stack:
        attempt = Attempt(stack, pair)
        pair.side(side).orders.arm(0, refuse, commands=commands)
        attempt.run()
        assert attempt.go_on() == "moved", attempt.failed
        return list(pair.side(side).orders.calls)


def strike_at(pair: Pair, name: str, nth: int, kind: str) -> str:
    """A migration that is struck at place `nth`, and then one that is not. What became of the first."""
    side = pair.side(name)
    strikes = {"access": refuse, "dead": side.kill}
    with ExitStack() as stack:
        attempt = Attempt(stack, pair)
        before = {name: side.count(name) for name in ("recoveries", "timeouts")}
        strike = strikes.get(kind) or (lambda: side.order(FIRMWARE[kind]))
        side.orders.arm(nth, strike, commands=kind != "access")
        attempt.run()
        struck = side.orders.struck
        side.orders.arm(0, refuse, commands=True)
        assert struck or attempt.failed is None, f"nothing failed but the migration: {attempt.failed}"
        if not struck:
            result = f"not come by, {attempt.go_on()}"
        elif kind == "dead":
            result = "gone with its card" if attempt.is_at == name else attempt.go_on()
        elif kind == "health":
            until(lambda: side.count("recoveries") > before["recoveries"], "a recovery", SECONDS)
            until(lambda: side.is_up, "the end of a recovery", SECONDS)
            result = attempt.begin_anew() if attempt.is_at == name else attempt.go_on()
        else:
            side.order(FIRMWARE[kind], 0) if kind in FIRMWARE else None
            result = attempt.go_on()
            assert "reset" not in result or kind in UNKNOWN, (result, attempt.failed)
            if kind == "lost":  # one that feeds pages holds the others up until it is given up
                until(lambda: side.count("timeouts") > before["timeouts"], "the end of patience", SECONDS)
    if kind == "dead" and struck:
        pair.drop(name)
    with ExitStack() as stack:
        attempt = Attempt(stack, pair)
        attempt.run()
        assert attempt.go_on() == "moved", attempt.failed
    if kind == "lost" and struck:
        pair.drop(name)  # its entry is never given back: there are only so many
    return result


def all_of(pair: Pair, side: str, kind: str, count: int | None) -> str:
    """Strike at all places, or at `count` of them, spread; a line that says what became of them."""
    places = record(pair, side, commands=kind != "access")
    step = 1 if count is None else max(1, len(places) // count)
    chosen = range(step // 2, len(places), step)
    results: Counter[str] = Counter()
    wrong = []
    for n in chosen:
        try:
            results[strike_at(pair, side, n + 1, kind)] += 1
        except (AssertionError, VfuServerError, TrafficError, OSError) as error:
            wrong.append(f"{places[n]} ({n + 1}): {error!r} {getattr(error, '__notes__', '')}")
            pair.drop(*SIDES)
    line = f"{kind} at {len(chosen)} of {len(places)} places of the {side}: {dict(results)}"
    assert not wrong, "\n".join([line, *wrong])
    return line


@pytest.mark.deadline(1800)
@pytest.mark.parametrize("count", [FEW, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("kind", ["access", *FIRMWARE, "dead"])
@pytest.mark.parametrize("side", SIDES)
def test_whatever_fails_the_guest_goes_on(pair, record_property, side, kind, count):
    line = all_of(pair, side, kind, count)
    record_property("places", line)
    print(line)
