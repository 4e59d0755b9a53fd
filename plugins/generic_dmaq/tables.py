"""The tables of a profile's file, each read into its record, with all that can be checked before a device is there.

Knows the form of the tables; which of them a file must have is in `profile`.
"""

import re

from plugins.generic_dmaq.drain import Queue
from plugins.generic_dmaq.form import Area, Interrupts, Match, Plan, QueueTable
from plugins.generic_dmaq.registers import MAX_BAR, BarTable, bar_from
from plugins.generic_dmaq.toml_reader import Table
from plugins.generic_dmaq.transforms import ByHook, transform_from
from vfu_server.policy import Answer
from vfu_server.regmap import READABLE, WRITABLE, Register, Save
from vfu_server.uapi import PAGE_SIZE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


def name_from(table: Table) -> str:
    """The `name` of a table: a plain word."""
    name = table.text("name")
    if not NAME.fullmatch(name):
        raise table.error("name", f"must be 1 to 32 letters, digits, - or _, not {name!r}")
    return name


class Bars:
    """All `[[bar]]` tables: the blocks as declared, and what is said of their registers and areas."""

    def __init__(self, top: Table) -> None:
        self.bars: list[BarTable] = []
        self.plans: dict[str, Plan] = {}
        self.counts_from: dict[str, str] = {}
        self.areas: list[Area] = []
        self._taken: set[str] = set()
        for table in top.tables("bar"):
            self._add(table)
        if not self.bars:
            raise top.error("", "there is no [[bar]]")

    def _add(self, table: Table) -> None:
        bar = bar_from(table)
        if bar.index in [other.index for other in self.bars]:
            raise table.error("index", f"BAR{bar.index} is there twice")
        for one, register in zip(table.tables("register"), bar.registers, strict=True):
            self._name(one, register.name)
            self.plans[register.name] = plan_from(one, register)
        for one, array in zip(table.tables("array"), bar.arrays, strict=True):
            self._name(one, array.name)
            for inner, register in zip(one.tables("register"), array.registers, strict=True):
                name_from(inner)
                self.plans[f"{array.name}.{register.name}"] = plan_from(inner, register)
            if one.has("count_from"):
                self.counts_from[array.name] = one.text("count_from")
            one.finish()
        self.areas += _areas(table, bar)
        self.bars.append(bar)
        table.finish()

    def _name(self, table: Table, name: str) -> None:
        """Registers and arrays are told apart by name over all BARs."""
        if name_from(table) in self._taken:
            raise table.error("name", f"{name!r} is there twice")
        self._taken.add(name)


class Names:
    """What the registers of a profile are called, within and outside of arrays; complains about what is not there."""

    def __init__(self, bars: list[BarTable]) -> None:
        self.plain = {r.name: r for bar in bars for r in bar.registers}
        self.arrays = {a.name: {r.name: r for r in a.registers} for bar in bars for a in bar.arrays}

    def register(self, table: Table, key: str, name: str, array: str = "") -> Register:
        """The register that `key` names, in `array` or outside of arrays."""
        scope = self.arrays[array] if array else self.plain
        if name not in scope:
            raise table.error(key, f"there is no register {name!r}" + (f" in array {array!r}" if array else ""))
        return scope[name]

    def readable_field(self, table: Table, key: str, path: str, what: str = "", array: str = "") -> None:
        """`path` is `register.field` of a register that can be read."""
        name, _, wanted = path.rpartition(".")
        register = self.register(table, key, name, array)
        if wanted not in [f.name for f in register.fields]:
            raise table.error(key, f"{what}register {name!r} has no field {wanted!r}")
        if register.access not in READABLE:
            raise table.error(key, f"{what}register {name!r} cannot be read ({register.access.value})")


def match_from(table: Table) -> Match:
    """The `[match]` table."""
    found = Match(
        table.integer("vendor", 0, 0xFFFF), table.integers("device", 0, 0xFFFF), table.integers("revision", 0, 0xFF)
    )
    if not found.devices:
        raise table.error("", "device is missing")
    table.finish()
    return found


def plan_from(table: Table, register: Register) -> Plan:
    """What a register's table says besides its place."""
    default = {Save.NONE: "none", Save.SAVE: "plain", Save.DERIVED: "hook"}[register.save]
    restore = transform_from(table, "restore", default, register.width)
    if register.save is Save.NONE and table.has("restore"):
        raise table.error("restore", f"{register.name!r} is not saved, so it is not restored")
    if register.save is Save.SAVE and register.access not in WRITABLE:
        raise table.error("save", f"{register.name!r} cannot be written: DERIVED, with a way to restore it, is meant")
    reads_act = table.flag("reads_act", False)
    can_show = register.access in READABLE and not reads_act
    stopped = Answer.SHADOW if can_show else Answer.DISCARD
    if table.has("stopped"):
        stopped = Answer[table.word("stopped", ("shadow", "discard")).upper()]
        if stopped is Answer.SHADOW and not can_show:
            why = "its reads act" if reads_act else f"it is {register.access.value}"
            raise table.error("stopped", f"{register.name!r} cannot be shown: {why}")
    if reads_act and isinstance(restore, ByHook):
        raise table.error("reads_act", f"{register.name!r} is restored by a hook, which cannot undo each read")
    mask = restore.mask(register)
    verify = table.integer("verify", 0, register.mask, mask)
    plan = Plan(restore, verify, stopped, table.text("reason", ""), reads_act)
    if plan.verify & ~mask:
        raise table.error("verify", f"bits {plan.verify & ~mask:#x} are not restored, so they cannot be compared")
    table.finish()
    return plan


def _areas(table: Table, bar: BarTable) -> list[Area]:
    found: list[Area] = []
    block = bar.block("profile", {})
    for one in table.tables("area"):
        offset = one.integer("offset", 0, MAX_BAR)
        length = one.integer("length", 1, MAX_BAR)
        area = Area(bar.index, one.text("name"), offset, length, one.flag("map", False), one.text("reason"))
        if offset + length > bar.size:
            raise one.error("length", f"the area ends behind the BAR of {bar.size:#x} bytes")
        if any(r.offset < offset + length and offset < r.end for r in block):
            raise one.error("offset", "there are registers in the area")
        if any(a.offset < offset + length and offset < a.offset + a.length for a in found):
            raise one.error("offset", "the area overlaps another one")
        if area.mapped and (offset % PAGE_SIZE or length % PAGE_SIZE):
            raise one.error("map", f"an area can be mapped in whole pages of {PAGE_SIZE} bytes only")
        one.finish()
        found.append(area)
    return found


def queue_from(table: Table, names: Names) -> QueueTable:
    """A `[[queue]]` table."""
    array = table.text("array", "")
    if array and array not in names.arrays:
        raise table.error("array", f"there is no array {array!r}")
    queue = Queue(
        name=table.text("name"),
        doorbells=table.texts("doorbells"),
        busy=table.texts("busy"),
        idle=table.text("idle", ""),
        idle_values=table.integers("idle_values", 0, (1 << 63) - 1),
        head=table.text("head", ""),
        tail=table.text("tail", ""),
        show=table.texts("show"),
    )
    for path in queue.busy:
        names.readable_field(table, "busy", path, array=array)
    if queue.idle:
        names.readable_field(table, "idle", queue.idle, array=array)
    if bool(queue.idle) != bool(queue.idle_values) or bool(queue.head) != bool(queue.tail):
        raise table.error("", "idle goes with idle_values, and head with tail")
    if not (queue.busy or queue.idle or queue.head):
        raise table.error("", "there is no busy, idle or head: nothing says when the queue is empty")
    for key, said in (("head", (queue.head,)), ("tail", (queue.tail,)), ("show", queue.show)):
        for name in filter(None, said):
            if names.register(table, key, name, array).access not in READABLE:
                raise table.error(key, f"register {name!r} cannot be read")
    if not queue.doorbells:
        raise table.error("", "doorbells is missing: what starts work must be named")
    for name in queue.doorbells:
        if names.register(table, "doorbells", name, array).access not in WRITABLE:
            raise table.error("doorbells", f"register {name!r} cannot be written")
    table.finish()
    return QueueTable(queue, array)


def identity_from(table: Table, names: Names) -> tuple[str, ...]:
    """The `[identity]` table: registers that must be equal on both sides."""
    found = table.texts("registers")
    for name in found:
        if names.register(table, "registers", name).access not in READABLE:
            raise table.error("registers", f"register {name!r} cannot be read")
    table.finish()
    return found


def interrupts_from(table: Table, names: Names) -> Interrupts:
    """The `[interrupts]` table."""
    found = Interrupts(
        table.integer("intx", 0, 1, 0),
        table.integer("msi", 0, 32, 0),
        table.integer("msix", 0, 2048, 0),
        _writes(table.table("mask"), names),
        _writes(table.table("clear"), names),
    )
    table.finish()
    return found


def _writes(table: Table, names: Names) -> tuple[tuple[str, int], ...]:
    found = []
    for name in table:
        register = names.register(table, name, name)
        if register.access not in WRITABLE:
            raise table.error(name, f"register {name!r} cannot be written")
        found.append((name, table.integer(name, 0, register.mask)))
    return tuple(found)


def dma_bits_from(table: Table) -> int:
    """The `[dma]` table: how many bits of an address the device has."""
    bits = table.integer("bits", 12, 64)
    table.finish()
    return bits


def reset_from(table: Table) -> str:
    """The `[reset]` table: by the function's own reset, or by writing registers."""
    kind = table.word("kind", ("function", "registers"))
    table.finish()
    return kind


def p2p_reason_from(table: Table) -> str:
    """The `[policy]` table: why P2P is not offered."""
    reason = table.text(
        "p2p_reason", "a peer can ring a doorbell, and the device would start DMA: it cannot only accept"
    )
    table.finish()
    return reason
