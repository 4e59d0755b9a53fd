"""The cases of the matrix: every place that a run without faults comes by, times every fault that can strike there.

Nothing is picked by hand: calls of the plugins, calls of the doors, operations of the VMMs and chunks of data are those
of a run that was watched.
"""

import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.matrix.vmm import Flow, Op, Vmm
from tests.matrix.world import DEATHS, Side, World
from vfu_server.errors import HostError
from vfu_server.testing.failing import COROUTINES, Call, Failure, Hang, Meanwhile, Overrun, Oversize, Raise
from vfu_server.uapi import MigState

SIDES = ("source", "destination")
FLOWS = (
    Flow("stop-copy"),
    Flow("p2p", p2p=True, stepwise=True),
    Flow("pre-copy", pre_copy=True),
    Flow("pre-copy p2p", pre_copy=True, p2p=True, stepwise=True),
    Flow("cancelled in PRE_COPY", pre_copy=True, cancel=MigState.PRE_COPY),
    Flow("cancelled in PRE_COPY_P2P", pre_copy=True, p2p=True, stepwise=True, cancel=MigState.PRE_COPY_P2P),
    Flow("cancelled in STOP_COPY", pre_copy=True, p2p=True, cancel=MigState.STOP_COPY),
    Flow("large sections", pages=6, page=3 << 19, chunk=1 << 20),
)
GUESTS = frozenset({"trap_read", "trap_write"})
"""Calls that are the guest's, not the migration's."""
ERRNO = errno.EREMOTEIO
OVERRUN = 6.0
"""Seconds that a plugin takes which cannot be cancelled: longer than any client waits."""

DATA = ("lost", "short", "shorter", "twice", "swapped", "first bit", "middle bit", "last bit", "foreign", "longer")
"""What can happen to a chunk on its way."""


@dataclass(frozen=True, slots=True)
class Case:
    """`kind` of fault at `place`: a call ('stop 1'), a door's call ('host read 3'), an operation or a chunk."""

    flow: Flow
    side: str
    place: str
    kind: str

    def __str__(self) -> str:
        return f"{self.flow.name}: {self.side}, {self.place}: {self.kind}"

    @property
    def cause(self) -> str:
        """What an ordered error says of itself."""
        return f"ordered for {self.side} at {self.place.rpartition(' ')[0]}"


@dataclass(frozen=True, slots=True)
class Watched:
    """What a run without faults came by."""

    calls: dict[str, tuple[Call, ...]]
    host_calls: dict[str, tuple[Call, ...]]
    ops: tuple[str, ...]
    op_sides: dict[str, str]
    chunks: tuple[bytes, ...]


def watch(world: World, flow: Flow) -> Watched:
    """One run, without faults."""
    sides = [Side(world, name, flow.shape) for name in SIDES]
    op_sides: dict[str, str] = {}
    chunks: list[bytes] = []

    def put(_vmm: Vmm, _index: int, data: bytes) -> list[bytes]:
        chunks.append(data)
        return [data]

    def before(op: Op) -> None:
        op_sides[op.name] = op.side

    try:
        vmm = Vmm(world, flow, *sides, before=before, put=put)
        vmm.begin()
        marks = [(len(side.device.calls), len(side.host.calls)) for side in sides]
        vmm.run()
        assert vmm.outcome == ("recovered" if flow.cancel else "completed"), vmm.error
        calls = {side.name: since(side.device.calls, mark) for side, (mark, _) in zip(sides, marks, strict=True)}
        host = {side.name: since(side.host.calls, mark) for side, (_, mark) in zip(sides, marks, strict=True)}
        return Watched(calls, host, tuple(vmm.names), op_sides, tuple(chunks))
    finally:
        for side in sides:
            side.close()


def since(calls: Sequence[Call], mark: int) -> tuple[Call, ...]:
    """The calls after the first `mark`, counted anew."""
    counts: Counter[str] = Counter()
    found = []
    for call in calls[mark:]:
        counts[call.method] += 1
        found.append(Call(call.method, counts[call.method]))
    return tuple(found)


def cases(flow: Flow, seen: Watched) -> Iterator[Case]:
    """All cases of one flow."""
    for side in SIDES:
        for call in seen.calls[side]:
            yield from (Case(flow, side, str(call), kind) for kind in kinds(call))
        for call in seen.host_calls[side]:
            yield from (Case(flow, side, f"host {call}", kind) for kind in ("raises", "device gone"))
    yield from operations(flow, seen)
    if flow.cancel is None:
        for index in range(len(seen.chunks)):
            yield from (Case(flow, "destination", f"chunk {index}", kind) for kind in DATA)


def operations(flow: Flow, seen: Watched) -> Iterator[Case]:
    """What happens around the operations of the VMMs."""
    for name in seen.ops:
        for side in SIDES:
            yield Case(flow, side, f"before {name}", "device gone")
            yield Case(flow, side, f"before {name}", "client gone")
        if name != "write the rest":
            for death in DEATHS:
                yield Case(flow, seen.op_sides[name], f"at {name}", f"client dies {death}")


def kinds(call: Call) -> Iterator[str]:
    """What can go wrong with a call of a plugin."""
    if call.method in GUESTS:
        return
    yield from ("raises", "unexpected", "no memory", "device gone", "client gone")
    if call.method in COROUTINES:
        yield from ("hangs", "overruns")
    if call.method == "send":
        yield "too large"


# arming


def arm(case: Case, vmm: Vmm, seen: Watched) -> None:
    """Have the case's fault strike in the run to come."""
    side = {"source": vmm.source, "destination": vmm.destination}[case.side]
    if case.place.startswith("chunk "):
        vmm.put = _spoiler(int(case.place.split()[1]), case.kind, seen.chunks)
    elif case.place.startswith(("before ", "at ")):
        vmm.before = _intruder(case, side)
    elif case.place.startswith("host "):
        _, method, nth = case.place.split()
        if case.kind == "raises":
            side.host.order(method, HostError(case.cause, ERRNO), int(nth))
        else:
            side.host.order_cut(method, int(nth))
    else:
        method, _, nth = case.place.rpartition(" ")
        side.device.order(method, failure(case, side), int(nth))


def failure(case: Case, side: Side) -> Failure:
    """The plugin's fault."""
    world = side.world
    made: dict[str, Failure] = {
        "raises": Raise(HostError(case.cause, ERRNO)),
        "unexpected": Raise(LookupError(case.cause)),
        "no memory": Raise(MemoryError(case.cause)),
        "hangs": Hang(world.pause),
        "overruns": Overrun(OVERRUN, world.pause),
        "too large": Oversize(),
        "device gone": Meanwhile(side.host.cut),
        "client gone": Meanwhile(side.hang_up),
    }
    return made[case.kind]


def _intruder(case: Case, side: Side):
    name = case.place.partition(" ")[2]

    def before(op: Op) -> None:
        if op.name != name:
            return
        if case.kind == "device gone":
            side.world.call(side.host.cut)
        elif case.kind == "client gone":
            side.hang_up()
        else:
            side.client.death = case.kind.removeprefix("client dies ")

    return before


def _spoiler(wanted: int, kind: str, chunks: Sequence[bytes]):
    def put(vmm: Vmm, index: int, data: bytes) -> list[bytes]:
        if kind == "swapped" and len(chunks) > 1:
            first = min(wanted, len(chunks) - 2)
            if index == first:
                vmm.held = data
                return []
            if index == first + 1:
                held, vmm.held = vmm.held, b""
                return [data, held]
        return spoiled(kind, data, chunks[wanted - 1]) if index == wanted else [data]

    return put


def spoiled(kind: str, data: bytes, other: bytes) -> list[bytes]:
    """What arrives instead of `data`."""
    middle = len(data) // 2
    made = {
        "lost": [],
        "short": [data[:-1]],
        "shorter": [data[:middle]],
        "twice": [data, data],
        "swapped": [data[middle:], data[:middle]],
        "first bit": [bytes([data[0] ^ 0x80]) + data[1:]],
        "middle bit": [data[:middle] + bytes([data[middle] ^ 0x01]) + data[middle + 1 :]],
        "last bit": [data[:-1] + bytes([data[-1] ^ 0x10])],
        "foreign": [other if other != data else data[::-1]],
        "longer": [data, b"\0"],
    }
    return made[kind]
