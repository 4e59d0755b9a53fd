"""The e-switch as its manager sets it up: flow tables, groups and entries, the table of MACs, and the vports.

It keeps the books and refuses what cannot be; frames do not pass through it (a VF's wire leads back to it, model). It
must not know the commands' forms.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plugins.mlx5.models.status import RefusedError, Status

EGRESS_ACL, INGRESS_ACL, FDB = 2, 3, 4
UPLINK = 0xFFFF
ALLOW, DROP, FORWARD = 1, 2, 4
TO_VPORT, TO_TABLE, TO_UPLINK = 0, 1, 8
DOWN, UP, AUTO = 0, 1, 2
BROADCAST = (1 << 48) - 1
UNICAST, MULTICAST, PROMISC = 0, 1, 3
"""What of a vport may change: the numbers of its lists, and the bits by which an event is asked for."""
MOST_MACS = 128


@dataclass(frozen=True, slots=True)
class Group:
    """Entries `first` to `last` of a table, that match by `criteria` on bits of the MAC and of the source port."""

    number: int
    first: int
    last: int
    criteria: int
    mac_mask: int
    port_mask: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What an entry matches and does; `destinations` are (type, id)."""

    group: int
    action: int
    mac: int
    port: int
    destinations: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Table:
    """A flow table of 2^log_size entries."""

    number: int
    kind: int
    level: int
    log_size: int
    miss: int | None
    groups: dict[int, Group] = field(default_factory=dict)
    entries: dict[int, Entry] = field(default_factory=dict)


@dataclass(slots=True)
class Vport:
    """A port of the e-switch: 0 the PF, i + 1 VF i, UPLINK the wire."""

    number: int
    mac: int
    admin: int = DOWN
    speed: int = 0
    armed: int = 0
    """Bits of what the next change of is told; then none."""
    guid: int = 0
    vlan: int = 0
    promisc: int = 0
    lists: dict[int, list[int]] = field(default_factory=dict)
    """What its own driver has asked for; a list that is not there is as after a reset."""

    def macs(self, kind: int) -> list[int]:
        """The list of unicast or multicast addresses that the port's own driver wants."""
        usual = {UNICAST: [self.mac], MULTICAST: [BROADCAST]}
        return self.lists.get(kind, usual.get(kind, []))

    def wanted(self) -> dict[str, Any]:
        """What its own driver has asked for, as part of a function's saved state."""
        return {"promisc": self.promisc, "lists": {str(kind): macs for kind, macs in self.lists.items()}}

    def want(self, wanted: Mapping[str, Any]) -> bool:
        """Counterpart of `wanted`, as a whole. Returns whether somebody has asked to be told of the change."""
        before = {**{kind: self.macs(kind) for kind in (UNICAST, MULTICAST)}, PROMISC: [self.promisc]}
        self.promisc = int(wanted["promisc"])
        self.lists = {int(kind): [int(mac) for mac in macs] for kind, macs in wanted["lists"].items()}
        after = {**{kind: self.macs(kind) for kind in (UNICAST, MULTICAST)}, PROMISC: [self.promisc]}
        told = any(self.armed >> kind & 1 and before[kind] != after[kind] for kind in after)
        if told:
            self.armed = 0
        return told


class Eswitch:
    """All of it; `vfs` VFs."""

    def __init__(self, vfs: int) -> None:
        self._vfs = vfs
        self._tables: dict[int, Table] = {}
        self._roots: dict[int, int] = {}
        self._l2: dict[int, int] = {}
        self._vports: dict[int, Vport] = {}
        self._next_table = 0x11
        self._next_group = 0x31
        self.reset()

    def reset(self) -> None:
        """As after a reset of the PF."""
        self._tables.clear()
        self._roots.clear()
        self._l2.clear()
        self._vports = {n: Vport(n, 0x0200_0000_1500 + n) for n in (*range(self._vfs + 1), UPLINK)}

    def numbers(self) -> dict[str, int]:
        """How much there is."""
        return {
            "flow_tables": len(self._tables),
            "flow_entries": sum(len(table.entries) for table in self._tables.values()),
            "l2_entries": len(self._l2),
        }

    def vport(self, number: int) -> Vport:
        """A port."""
        port = self._vports.get(number)
        if port is None:
            raise RefusedError(Status.BAD_RES, 0x901, f"there is no vport {number:#x}")
        return port

    def table(self, kind: int, number: int) -> Table:
        """A flow table of that kind."""
        table = self._tables.get(number)
        if table is None or table.kind != kind:
            raise RefusedError(Status.BAD_RES, 0x902, f"there is no flow table {number:#x} of type {kind}")
        return table

    def create_table(self, kind: int, level: int, log_size: int, miss: int | None) -> int:
        """A new table; its number."""
        if miss is not None and self.table(kind, miss).level <= level:
            raise RefusedError(Status.BAD_PARAM, 0x903, "a miss leads to a table of no higher level")
        number, self._next_table = self._next_table, self._next_table + 1
        self._tables[number] = Table(number, kind, level, log_size, miss)
        return number

    def destroy_table(self, kind: int, number: int) -> None:
        """A table goes; one with groups, that is a root, or that others lead to does not."""
        table = self.table(kind, number)
        targets = {
            target
            for other in self._tables.values()
            for entry in other.entries.values()
            for way, target in entry.destinations
            if way == TO_TABLE
        } | {other.miss for other in self._tables.values()}
        if table.groups or self._roots.get(kind) == number or number in targets:
            raise RefusedError(Status.BUSY, 0x904, f"flow table {number:#x} is in use")
        del self._tables[number]

    def set_root(self, kind: int, number: int | None) -> None:
        """Where frames enter; None: as after a reset."""
        if number is None:
            self._roots.pop(kind, None)
        else:
            self._roots[kind] = self.table(kind, number).number

    def create_group(self, kind: int, table: int, first: int, last: int, criteria: int, mac: int, port: int) -> int:
        """A new group of entries that no other group has; its number."""
        owner = self.table(kind, table)
        if not first <= last < 1 << owner.log_size:
            raise RefusedError(Status.BAD_PARAM, 0x905, f"entries {first} to {last} of 2^{owner.log_size}")
        if any(first <= group.last and group.first <= last for group in owner.groups.values()):
            raise RefusedError(Status.BAD_PARAM, 0x906, "two groups share entries")
        number, self._next_group = self._next_group, self._next_group + 1
        owner.groups[number] = Group(number, first, last, criteria, mac, port)
        return number

    def destroy_group(self, kind: int, table: int, number: int) -> None:
        """A group goes; one with entries does not."""
        owner = self.table(kind, table)
        if number not in owner.groups:
            raise RefusedError(Status.BAD_RES, 0x907, f"flow table {table:#x} has no group {number:#x}")
        if any(entry.group == number for entry in owner.entries.values()):
            raise RefusedError(Status.BUSY, 0x908, f"group {number:#x} has entries")
        del owner.groups[number]

    def set_entry(self, kind: int, table: int, index: int, entry: Entry, *, modify: bool) -> None:
        """A new entry, or another one in the place of one that is there."""
        owner = self.table(kind, table)
        group = owner.groups.get(entry.group)
        if group is None or not group.first <= index <= group.last:
            raise RefusedError(Status.BAD_PARAM, 0x909, f"group {entry.group:#x} has no entry {index}")
        if modify is not (index in owner.entries):
            raise RefusedError(Status.BAD_RES_STATE, 0x90A, f"entry {index} is there, or is not")
        if entry.mac & ~group.mac_mask or entry.port & ~group.port_mask:
            raise RefusedError(Status.BAD_PARAM, 0x90B, "a value outside of the group's mask")
        for way, target in entry.destinations:
            if way == TO_VPORT:
                self.vport(target)
            elif way == TO_TABLE:
                if self.table(kind, target).level <= owner.level:
                    raise RefusedError(Status.BAD_PARAM, 0x903, "an entry leads to a table of no higher level")
            elif way != TO_UPLINK:
                raise RefusedError(Status.BAD_PARAM, 0x90C, f"there is no way of type {way}")
        owner.entries[index] = entry

    def delete_entry(self, kind: int, table: int, index: int) -> None:
        """An entry goes."""
        owner = self.table(kind, table)
        if index not in owner.entries:
            raise RefusedError(Status.BAD_RES, 0x90D, f"flow table {table:#x} has no entry {index}")
        del owner.entries[index]

    def set_mac(self, index: int, mac: int | None) -> None:
        """An entry of the table of MACs that the wire may send to; None: it goes."""
        if mac is None and index not in self._l2:
            raise RefusedError(Status.BAD_RES, 0x90E, f"the table of MACs has no entry {index}")
        if mac is None:
            del self._l2[index]
        else:
            self._l2[index] = mac
