"""Something fails at each step of a migration: a call of the plugin, or an access of the plugin to its hardware.

Then the guest's device runs at one side, the client was told, and the next client finds a device as new.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass

from vfu_server.errors import HostError, VfuServerError
from vfu_server.testing.client import Client
from vfu_server.testing.conformance.bench import SIDES, Bench
from vfu_server.testing.conformance.records import Failed, check
from vfu_server.testing.failing import Call, Raise
from vfu_server.testing.migrate import migrate
from vfu_server.uapi import MigState

MOST = 24
"""Failures of the hardware on each side, spread over all accesses; trying each could take hours."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a migration without failures came by on one side."""

    calls: tuple[Call, ...]
    accesses: tuple[tuple[Call, ...], ...]
    """Of each door: the device's own, and those of its companions."""


def _watch(bench: Bench) -> dict[str, _Seen]:
    with bench.guest() as source, bench.guest("destination") as destination:
        marks = {name: len(bench.served(name).device.calls) for name in SIDES}
        doors = {name: [(door, len(door.calls)) for door in bench.doors(name)] for name in SIDES}
        _move(bench, source.client, destination.client)
        return {
            name: _Seen(
                _counted(bench.served(name).device.calls[mark:]),
                tuple(_counted(door.calls[before:]) for door, before in doors[name]),
            )
            for name, mark in marks.items()
        }


def _counted(calls: Sequence[Call]) -> tuple[Call, ...]:
    """Calls, each method counted from 1."""
    counts: dict[str, int] = {}
    found = []
    for call in calls:
        counts[call.method] = counts.get(call.method, 0) + 1
        found.append(Call(call.method, counts[call.method]))
    return tuple(found)


def _move(bench: Bench, source: Client, destination: Client) -> None:
    try:
        migrate(source, destination)
    except VfuServerError as error:
        raise Failed(f"a migration without any failure fails: {error}; {bench.why()}") from error


@check("plugin-faults", "whatever call of the plugin fails, the device runs at one side and comes back")
def plugin_faults(bench: Bench) -> str:
    """Whatever call of the plugin fails, the device runs at one side and comes back."""
    seen = _watch(bench)
    cases = 0
    for side in SIDES:
        for call in _first_and_last(seen[side].calls):
            with bench.guest() as source, bench.guest("destination") as destination:
                error = HostError(f"ordered for {call}", errno.EREMOTEIO)
                bench.served(side).device.order(call.method, Raise(error), call.nth)
                _try(bench, f"{call} of the {side}", source.client, destination.client)
                cases += 1
    _watch(bench)
    return f"{cases} failures"


@check("door-faults", "whatever access to the hardware fails, the device runs at one side and comes back")
def door_faults(bench: Bench) -> str:
    """Whatever access to the hardware fails, the device runs at one side and comes back."""
    seen = _watch(bench)
    cases = struck = 0
    for side in SIDES:
        for number, accesses in enumerate(seen[side].accesses):
            whose = "" if not number else f"companion {number} of the "
            for call in _spread(accesses):
                cases, struck = (
                    cases + 1,
                    struck + _fail_at(bench, side, number, call, f"{call} at the {whose}{side}'s door"),
                )
    _watch(bench)
    companions = sum(len(seen[side].accesses) - 1 for side in SIDES)
    return f"{cases} failures, {struck} of which struck, at {len(SIDES)} doors and {companions} of companions"


def _fail_at(bench: Bench, side: str, number: int, call: Call, what: str) -> int:
    """A migration during which an access fails at door `number` of a side; whether it was come by."""
    with bench.guest() as source, bench.guest("destination") as destination:
        door = bench.doors(side)[number]
        before = len(door.struck)
        door.order(call.method, HostError(f"ordered for {call}", errno.EREMOTEIO), call.nth)
        _try(bench, what, source.client, destination.client)
        door.orders.clear()
        return len(door.struck) - before


def _first_and_last(calls: Sequence[Call]) -> list[Call]:
    by_method: dict[str, list[Call]] = {}
    for call in calls:
        by_method.setdefault(call.method, []).append(call)
    found = [call for group in by_method.values() for call in dict.fromkeys((group[0], group[-1]))]
    return [call for call in found if not call.method.startswith("trap_")]  # those are the guest's


def _spread(calls: Sequence[Call]) -> list[Call]:
    step = max(1, -(-len(calls) // MOST))
    return list(calls[::step])


def _try(bench: Bench, what: str, source: Client, destination: Client) -> None:
    failed: VfuServerError | None = None
    mark = _loads(bench)
    try:
        migrate(source, destination)
    except VfuServerError as error:
        failed = error
    runs = [name for name, client in zip(SIDES, (source, destination), strict=True) if _runs(client)]
    if failed is not None and mark == _loads(bench):
        runs = [name for name in runs if name == "source"]  # the destination has never had the guest's device
    expected = ["source"] if failed is not None else ["destination"]
    if runs != expected:
        raise Failed(f"after {what} failed ({failed}), the device runs at {runs or 'no side'}, not at {expected[0]}")
    if found := bench.loop.tracebacks():
        raise Failed(f"after {what} failed: {found[0]}")


def _loads(bench: Bench) -> int:
    """How often the destination's plugin has written a state to its hardware."""
    return sum(call.method == "load_done" for call in bench.served("destination").device.calls)


def _runs(client: Client) -> bool:
    return client.mig_state() is MigState.RUNNING
