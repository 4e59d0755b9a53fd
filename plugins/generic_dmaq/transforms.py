"""How a saved value gets back into a register, by name: the ways that a profile's table can say.

A transform writes and says which bits a read must then show. It must not wait, nor know the order of a restore.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from plugins.generic_dmaq.port import Port
from plugins.generic_dmaq.toml_reader import Table
from vfu_server.regmap import Register


class Transform(Protocol):
    """One way to restore a register."""

    def write(self, port: Port, register: Register, value: int) -> None:
        """Write the saved `value` back."""
        ...

    def mask(self, register: Register) -> int:
        """The bits that read back as they were saved."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """`plain`: written as it was read."""

    def write(self, port: Port, register: Register, value: int) -> None:
        """Write it."""
        port.write(register.name, value)

    def mask(self, register: Register) -> int:
        """All bits."""
        return register.mask


@dataclass(frozen=True, slots=True)
class Inverted:
    """`inverted`: the register keeps the inverse of what is written."""

    def write(self, port: Port, register: Register, value: int) -> None:
        """Write the inverse."""
        port.write(register.name, ~value)

    def mask(self, register: Register) -> int:
        """All bits."""
        return register.mask


@dataclass(frozen=True, slots=True)
class Masked:
    """`masked`: only the bits of `keep` are written, the others as 0."""

    keep: int

    def write(self, port: Port, register: Register, value: int) -> None:
        """Write the kept bits."""
        port.write(register.name, value & self.keep)

    def mask(self, register: Register) -> int:
        """The kept bits."""
        return register.mask & self.keep


@dataclass(frozen=True, slots=True)
class Without:
    """`without`: the bits of `drop` (a go bit) are written as 0."""

    drop: int

    def write(self, port: Port, register: Register, value: int) -> None:
        """Write the rest."""
        port.write(register.name, value & ~self.drop)

    def mask(self, register: Register) -> int:
        """The rest."""
        return register.mask & ~self.drop


@dataclass(frozen=True, slots=True)
class Halves:
    """`halves`: written in two accesses of half the width, the low half first."""

    def write(self, port: Port, register: Register, value: int) -> None:
        """Write both halves."""
        port.write_halves(register.name, value)

    def mask(self, register: Register) -> int:
        """All bits."""
        return register.mask


@dataclass(frozen=True, slots=True)
class Through:
    """`through`: a value that is not 0 is written to another register, whose effect brings this one back."""

    target: str

    def write(self, port: Port, register: Register, value: int) -> None:
        """Write to the other register; within an array that of the same element comes first."""
        element = f"{register.name.rpartition('.')[0]}.{self.target}"
        if value:
            port.write(element if element in port else self.target, value)

    def mask(self, register: Register) -> int:
        """All bits."""
        return register.mask


@dataclass(frozen=True, slots=True)
class ByHook:
    """`hook`: the profile's Python hook restores it (its `restore` is called in the register's turn)."""

    def write(self, port: Port, register: Register, value: int) -> None:
        """Nothing: the hook may have to wait and is called by the restore itself."""

    def mask(self, register: Register) -> int:
        """All bits."""
        return register.mask


@dataclass(frozen=True, slots=True)
class Untouched:
    """`none`: carried for the hook or for a reader, neither written nor compared."""

    def write(self, port: Port, register: Register, value: int) -> None:
        """Nothing."""

    def mask(self, register: Register) -> int:
        """No bit."""
        return 0


_SIMPLE: dict[str, Callable[[], Transform]] = {
    "plain": Plain,
    "inverted": Inverted,
    "halves": Halves,
    "hook": ByHook,
    "none": Untouched,
}
_WITH: dict[str, str] = {"masked": "mask", "without": "mask", "through": "register"}
NAMES = (*_SIMPLE, *_WITH)


def transform_from(table: Table, key: str, default: str, width: int) -> Transform:
    """The transform that `key` of a register's table says: `"inverted"` or `{ how = "masked", mask = 0x80 }`."""
    if not table.has(key):
        return _SIMPLE[default]()
    if isinstance(table.value(key), str):
        how = table.word(key, NAMES)
        if how in _WITH:
            raise table.error(key, f'needs {_WITH[how]}: {{ how = "{how}", {_WITH[how]} = ... }}')
        return _SIMPLE[how]()
    said = table.table(key)
    how = said.word("how", NAMES)
    if how == "through":
        found: Transform = Through(said.text("register"))
    elif how in _WITH:
        mask = said.integer("mask", 1, (1 << (8 * width)) - 1)
        found = Masked(mask) if how == "masked" else Without(mask)
    else:
        found = _SIMPLE[how]()
    said.finish()
    return found
