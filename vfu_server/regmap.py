"""Registers as declared tables: one block is read by policy, save, restore, trace, dump, documentation and model alike.

A block knows offsets, widths and meanings; it does no input or output itself (a `read` function is handed in) and must
not know who asks. The tables for lookup are built once, and looking up uses ints only, so a trace of each access can
afford it.
"""

import enum
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vfu_server.errors import PluginError
from vfu_server.policy import WIDTHS_REGISTER, Answers, Rule

Read = Callable[[int, int], int]
"""`read(offset, width)`: one access of the block's region."""


class Access(enum.Enum):
    """What software may do with a register."""

    RO = "RO"
    """Reads give a value, writes do nothing."""
    RW = "RW"
    """Reads and writes."""
    W1C = "W1C"
    """Reads give a value, ones that are written clear bits."""
    RC = "RC"
    """A read clears the register: nothing may read it by the way."""
    WO = "WO"
    """Writes act, reads give nothing of use."""
    RSVD = "RSVD"
    """Reserved: neither read nor written by us."""


READABLE = frozenset({Access.RO, Access.RW, Access.W1C})
"""Accesses whose registers can be read without changing anything."""
WRITABLE = frozenset({Access.RW, Access.W1C, Access.WO})


class Save(enum.Enum):
    """Whether a register's value travels."""

    NONE = "NONE"
    """It does not."""
    SAVE = "SAVE"
    """Read when the device is saved, written back when it is restored."""
    DERIVED = "DERIVED"
    """Read when the device is saved, not written back as it is: the hardware forms it, or code restores it."""


@dataclass(frozen=True, slots=True)
class Field:
    """Bits `high` to `low` (both inclusive) of a register; `values` names some of the numbers they may hold."""

    name: str
    high: int
    low: int
    values: Mapping[int, str] = field(default_factory=dict)

    @property
    def mask(self) -> int:
        """The field's bits, in place."""
        return ((1 << (self.high - self.low + 1)) - 1) << self.low

    def get(self, value: int) -> int:
        """The field's number within a register's value."""
        return (value & self.mask) >> self.low

    def put(self, value: int, number: int) -> int:
        """`value` with the field set to `number`, cut to its width."""
        return (value & ~self.mask) | ((number << self.low) & self.mask)

    def text(self, value: int) -> str:
        """The field of `value` for a reader: `busy`, `status=3 (halted)`."""
        number = self.get(value)
        name = self.values.get(number)
        if name is not None:
            return f"{self.name}={number:#x} ({name})"
        if self.high == self.low:
            return self.name
        return f"{self.name}={number:#x}"


@dataclass(frozen=True, slots=True)
class Register:
    """One register: `offset` in bytes from the block's (or array element's) start, `width` 1, 2, 4 or 8 bytes.

    `reset` is the value after reset where it is known. `order` sorts restores: lower first, equal ones as declared.
    Bits without a field are not wrong; they are shown by position.
    """

    name: str
    offset: int
    width: int
    access: Access
    save: Save = Save.NONE
    reset: int | None = None
    fields: Sequence[Field] = ()
    order: int = 0
    doc: str = ""

    @property
    def end(self) -> int:
        """First byte behind the register."""
        return self.offset + self.width

    @property
    def mask(self) -> int:
        """All bits of the register."""
        return (1 << (8 * self.width)) - 1

    def field(self, name: str) -> Field:
        """The field `name`. PluginError if there is none."""
        for candidate in self.fields:
            if candidate.name == name:
                return candidate
        raise PluginError(f"register {self.name!r} has no field {name!r}")

    def decode(self, value: int) -> str:
        """`value` for a reader: `status 0x81 [busy irq_wanted]`; bits that no field names appear as `bit5`."""
        parts = [f.text(value) for f in self.fields if f.get(value) or 0 in f.values]
        known = 0
        for f in self.fields:
            known |= f.mask
        unknown = value & ~known if self.fields else 0
        parts += [f"bit{bit}" for bit in range(unknown.bit_length()) if unknown >> bit & 1]
        shown = f"{self.name} {value:#0{2 + 2 * self.width}x}"
        return f"{shown} [{' '.join(parts)}]" if parts else shown


@dataclass(frozen=True, slots=True)
class Array:
    """`count` equal groups of registers, the first at `first`, each `stride` bytes behind the one before.

    The register `status` of element 2 of array `channel` is named `channel[2].status`.
    """

    name: str
    first: int
    stride: int
    count: int
    registers: Sequence[Register]

    def element(self, index: int) -> Iterator[Register]:
        """The registers of element `index`, named and placed for the block."""
        base = self.first + index * self.stride
        for r in self.registers:
            name = f"{self.name}[{index}].{r.name}"
            yield Register(name, base + r.offset, r.width, r.access, r.save, r.reset, r.fields, r.order, r.doc)


@dataclass(frozen=True, slots=True)
class RuleShape:
    """What a policy says of one register or gap; the table knows the rest of the `Rule`."""

    read: Answers
    write: Answers
    reason: str = ""
    widths: int = WIDTHS_REGISTER


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table for documentation, already text."""

    offset: str
    width: str
    name: str
    access: str
    save: str
    reset: str
    doc: str


@dataclass(frozen=True)
class Block:
    """The registers of one region (or a part of it), `size` bytes, ascending whatever the order of declaration.

    Raises PluginError for a table that cannot be meant: overlap, a register that is not aligned to its width or lies
    outside, two of one name, an unknown access or save, a field outside of its register, a reset value that does not
    fit.
    """

    name: str
    size: int
    registers: Sequence[Register] = ()
    arrays: Sequence[Array] = ()
    ordered: tuple[Register, ...] = field(init=False, repr=False, compare=False)
    """All registers, arrays expanded, by offset."""
    _starts: list[int] = field(init=False, repr=False, compare=False)
    _names: dict[str, Register] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        declared = list(self.registers)
        for array in self.arrays:
            _check_array(self.name, array)
            for index in range(array.count):
                declared.extend(array.element(index))
        names: dict[str, Register] = {}
        for register in declared:
            _check_register(self.name, self.size, register)
            if register.name in names:
                raise PluginError(f"block {self.name!r}: two registers are named {register.name!r}")
            names[register.name] = register
        ordered = sorted(declared, key=lambda r: r.offset)
        for before, after in itertools.pairwise(ordered):
            if before.end > after.offset:
                raise PluginError(
                    f"block {self.name!r}: registers {before.name!r} and {after.name!r} overlap at {after.offset:#x}"
                )
        object.__setattr__(self, "ordered", tuple(ordered))
        object.__setattr__(self, "_starts", [r.offset for r in ordered])
        object.__setattr__(self, "_names", names)

    def __getitem__(self, name: str) -> Register:
        """The register `name`. PluginError if there is none."""
        try:
            return self._names[name]
        except KeyError:
            raise PluginError(f"block {self.name!r} has no register {name!r}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[Register]:
        return iter(self.ordered)

    def __len__(self) -> int:
        return len(self.ordered)

    def at(self, offset: int) -> Register | None:
        """The register that owns the byte at `offset`, or None in a gap."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0:
            return None
        register = self.ordered[index]
        return register if offset < register.offset + register.width else None

    def decode(self, offset: int, value: int) -> str:
        """An access at `offset` for a reader. Inside of a register only the place is told, in a gap the bare offset."""
        register = self.at(offset)
        if register is None:
            return f"{self.name}+{offset:#x} {value:#x}"
        if register.offset != offset:
            return f"{register.name}+{offset - register.offset} {value:#x}"
        return register.decode(value)

    def dump(self, read: Read) -> str:
        """All registers as they are now, a line each.

        What a read would change (RC) or cannot give (WO, RSVD) is named, not read.
        """
        lines = []
        for r in self.ordered:
            text = (
                r.decode(read(r.offset, r.width)) if r.access in READABLE else f"{r.name} ({r.access.value}, not read)"
            )
            lines.append(f"{r.offset:#06x} {text}")
        return "\n".join(lines)

    @property
    def saved(self) -> tuple[Register, ...]:
        """The registers whose value travels (SAVE and DERIVED), in restore order."""
        return tuple(sorted((r for r in self._names.values() if r.save is not Save.NONE), key=lambda r: r.order))

    def snapshot(self, read: Read) -> dict[str, int]:
        """The values of `saved`, by name, in restore order; each read in one access of its width."""
        return {r.name: read(r.offset, r.width) for r in self.saved}

    def gaps(self) -> Iterator[tuple[int, int]]:
        """The `(offset, length)` that no register covers."""
        at = 0
        for r in self.ordered:
            if r.offset > at:
                yield at, r.offset - at
            at = r.end
        if at < self.size:
            yield at, self.size - at

    def rules(self, region: int, shape: Callable[[Register], RuleShape], gap: RuleShape, start: int = 0) -> list[Rule]:
        """Access rules that cover every byte: one for each register, as `shape` says, and one for each gap.

        `start` is where the block begins in region `region`.
        """
        found = []
        for r in self.ordered:
            s = shape(r)
            found.append(Rule(region, start + r.offset, r.width, s.read, s.write, r.name, s.reason or r.doc, s.widths))
        for offset, length in self.gaps():
            name = f"no register {offset:#x}+{length:#x}"
            found.append(Rule(region, start + offset, length, gap.read, gap.write, name, gap.reason, gap.widths))
        return sorted(found, key=lambda rule: rule.start)

    def rows(self) -> list[Row]:
        """The table for documentation; an array's elements are shown once, with the first's place and the stride."""
        found = [(r.offset, _row(r, "", r.name)) for r in self.registers]
        for a in self.arrays:
            suffix = f" + {a.stride:#x}*n"
            found += [(r.offset, _row(r, suffix, r.name.replace("[0]", "[n]", 1))) for r in a.element(0)]
        return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def _row(register: Register, suffix: str, name: str) -> Row:
    reset = "" if register.reset is None else f"{register.reset:#x}"
    offset = f"{register.offset:#x}{suffix}"
    return Row(offset, str(register.width), name, register.access.value, register.save.value, reset, register.doc)


def _check_array(block: str, array: Array) -> None:
    where = f"block {block!r}: array {array.name!r}"
    if array.count < 1 or array.stride < 1 or array.first < 0:
        raise PluginError(f"{where} has first {array.first}, stride {array.stride}, count {array.count}")
    if not array.registers:
        raise PluginError(f"{where} has no register")
    for register in array.registers:
        if register.offset < 0 or register.end > array.stride:
            raise PluginError(
                f"{where}: register {register.name!r} lies outside of the stride of {array.stride:#x} bytes"
            )


def _check_register(block: str, size: int, register: Register) -> None:
    where = f"block {block!r}: register {register.name!r}"
    if not register.name:
        raise PluginError(f"block {block!r}: the register at {register.offset:#x} has no name")
    if register.width not in (1, 2, 4, 8):
        raise PluginError(f"{where} is {register.width} bytes wide, not 1, 2, 4 or 8")
    if register.offset % register.width:
        raise PluginError(f"{where} at {register.offset:#x} is not aligned to its width of {register.width}")
    if register.offset < 0 or register.end > size:
        raise PluginError(f"{where} at {register.offset:#x} lies outside of the block of {size:#x} bytes")
    for said, kind in ((register.access, Access), (register.save, Save)):
        if not isinstance(said, kind):
            raise PluginError(f"{where} has the unknown {kind.__name__.lower()} {said!r}")
    if register.save is not Save.NONE and register.access not in READABLE:
        raise PluginError(f"{where} is {register.access.value}: it cannot be read, so it cannot be saved")
    if register.reset is not None and not 0 <= register.reset <= register.mask:
        raise PluginError(f"{where}: reset value {register.reset:#x} does not fit {register.width} bytes")
    taken = 0
    for f in register.fields:
        if not 0 <= f.low <= f.high < 8 * register.width:
            raise PluginError(
                f"{where}: field {f.name!r} bits {f.high}:{f.low} lie outside of {8 * register.width} bits"
            )
        if taken & f.mask:
            raise PluginError(f"{where}: field {f.name!r} bits {f.high}:{f.low} overlap another field")
        taken |= f.mask
