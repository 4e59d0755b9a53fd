"""Several devices of one virtual machine in this process: which of them can be migrated, and in which order they stop.

Devices of a machine may reach each other by DMA. While they stop, and while they start, none may still start DMA when
another does not take accesses any more: what it writes there would be lost. So all must have reached a P2P state before
the first one stops, and all must be back in one before the first one runs. VMMs keep that order by themselves (QEMU
does); here it is made sure of.

It must not know clients, sessions or how a state is reached.
"""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import trio

from vfu_server.device import Capabilities
from vfu_server.errors import StateError
from vfu_server.migration import Arc
from vfu_server.policy import STATE_CLASS, StateClass
from vfu_server.uapi import MigState

DEAF = frozenset({StateClass.STOPPED, StateClass.RESUMING})
"""The classes in which a device takes no accesses from its peers."""


@dataclass(slots=True)
class _Member:
    """`possible`: the classes that it may be in now: two while it is on its way. Empty without a client."""

    capabilities: Capabilities | None = None
    possible: frozenset[StateClass] = field(default_factory=frozenset)


class Machine:
    """The devices with those names, in the operator's order. A machine of one device asks for nothing."""

    def __init__(self, name: str, devices: Sequence[str]) -> None:
        self.name = name
        self._members = {device: _Member() for device in devices}
        self._complete = trio.Event()

    def join(self, device: str, capabilities: Capabilities) -> None:
        """What `device` can is known."""
        self._members[device].capabilities = capabilities
        if all(member.capabilities is not None for member in self._members.values()):
            self._complete.set()

    async def complete(self) -> None:
        """Wait until all have joined: before, nobody can say what a machine can."""
        await self._complete.wait()

    def refusal(self, device: str) -> str:
        """Why `device` is not migrated; empty if it may be.

        Of devices that cannot hold their DMA to each other back only one can be: the operator's first.
        """
        first = next(iter(self._members))
        if len(self._members) == 1 or self._in_step or device == first:
            return ""
        others = " and ".join(name for name in self._members if name != device)
        cannot = " and ".join(name for name, member in self._members.items() if not _p2p(member))
        return (
            f"it belongs to machine {self.name} together with {others}, and {cannot} cannot hold back DMA to the "
            f"others while they stop (P2P): of such a machine only one device is migrated, here {first}"
        )

    def present(self, device: str, state: MigState | None) -> None:
        """`device` has a client and is in `state`; None: it has none, and is nobody's peer."""
        self._members[device].possible = frozenset() if state is None else frozenset({STATE_CLASS[state]})

    def set_out(self, device: str, arc: Arc, target: int) -> None:
        """`device` begins `arc`, on the way to state `target`; `present` tells where it ended.

        Raises StateError (EBUSY) if others are not so far.

        A device on its way to RESUMING gives up its state, and has no guest whose DMA could be lost.
        """
        member = self._members[device]
        if len(self._members) > 1 and self._in_step and target != MigState.RESUMING:
            self._check(device, arc)
        member.possible = frozenset({arc.source_class, arc.target_class})

    def _check(self, device: str, arc: Arc) -> None:
        if arc.source_class is StateClass.P2P and arc.target_class is StateClass.STOPPED:
            if late := self._those_in(device, frozenset({StateClass.RUNNING})):
                raise StateError(
                    f"{arc}: {late} of machine {self.name} may still start DMA to this device: "
                    "all must be in a P2P state before one stops",
                    errno.EBUSY,
                )
        elif (
            arc.source_class is StateClass.P2P
            and arc.target_class is StateClass.RUNNING
            and (late := self._those_in(device, DEAF))
        ):
            raise StateError(
                f"{arc}: {late} of machine {self.name} takes no accesses from this device yet: "
                "all must be in a P2P state before one runs",
                errno.EBUSY,
            )

    def _those_in(self, device: str, classes: frozenset[StateClass]) -> str:
        found = [name for name, member in self._members.items() if name != device and member.possible & classes]
        return " and ".join(found)

    @property
    def _in_step(self) -> bool:
        """All can hold their DMA back."""
        return all(_p2p(member) for member in self._members.values())


def machines(of_devices: Mapping[str, str]) -> dict[str, Machine]:
    """By device: the machine that it belongs to. `of_devices`: its machine's name, or empty."""
    found: dict[str, Machine] = {}
    for device, name in of_devices.items():
        same = [other for other, its_name in of_devices.items() if name and its_name == name]
        first = same[0] if same else device
        found[device] = found[first] if first in found else Machine(name, same or [device])
    return found


def _p2p(member: _Member) -> bool:
    can = member.capabilities
    return can is not None and can.migratable and can.p2p
