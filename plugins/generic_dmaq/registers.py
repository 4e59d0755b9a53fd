"""The register tables of a profile: the `[[bar]]` part of a TOML file as register blocks.

Shared with the software models, so it knows nothing of save, restore, queues or policy, and touches no device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from plugins.generic_dmaq.toml_reader import Table, read_toml
from vfu_server.errors import PluginError
from vfu_server.regmap import Access, Array, Block, Field, Register, Save

PROFILES = Path(__file__).with_name("profiles")
"""Where the profiles that come with the plugin are."""

MAX_BAR = 1 << 40
MAX_ELEMENTS = 1024
"""Elements of the longest array of register groups."""


def load_blocks(name: str, counts: Mapping[str, int] | None = None) -> dict[int, Block]:
    """The register blocks of the shipped profile `name`, by BAR index.

    `counts` gives the number of elements of an array by the array's name; without it the table's `count` (the largest)
    holds.
    """
    bars = [bar_from(table) for table in read_toml(PROFILES / f"{name}.toml").tables("bar")]
    return {bar.index: bar.block(name, counts or {}) for bar in bars}


@dataclass(frozen=True, slots=True)
class BarTable:
    """One `[[bar]]` table as declared, before it is known how many elements its arrays have."""

    index: int
    size: int
    registers: tuple[Register, ...]
    arrays: tuple[Array, ...]

    def block(self, name: str, counts: Mapping[str, int]) -> Block:
        """The block with `counts[array]` elements of each array, or as many as declared. PluginError: it cannot be."""
        arrays = [Array(a.name, a.first, a.stride, counts.get(a.name, a.count), a.registers) for a in self.arrays]
        return Block(f"{name}.bar{self.index}", self.size, self.registers, arrays)


def bar_from(table: Table) -> BarTable:
    """A `[[bar]]` table. ConfigError for a wrong value or a block that cannot be built with its largest counts."""
    index = table.integer("index", 0, 5)
    size = table.integer("size", 16, MAX_BAR)
    if size & (size - 1):
        raise table.error("size", f"{size:#x} is no power of two")
    registers = tuple(register_from(one) for one in table.tables("register"))
    arrays = tuple(array_from(one) for one in table.tables("array"))
    bar = BarTable(index, size, registers, arrays)
    try:
        bar.block("profile", {})
    except PluginError as error:
        raise table.error("", str(error)) from None
    return bar


def array_from(table: Table) -> Array:
    """A `[[bar.array]]` table."""
    return Array(
        name=table.text("name"),
        first=table.integer("first", 0, MAX_BAR),
        stride=table.integer("stride", 1, MAX_BAR),
        count=table.integer("count", 1, MAX_ELEMENTS),
        registers=tuple(register_from(one) for one in table.tables("register")),
    )


def register_from(table: Table) -> Register:
    """A `[[bar.register]]` or `[[bar.array.register]]` table."""
    width = table.integer("width", 1, 8)
    return Register(
        name=table.text("name"),
        offset=table.integer("offset", 0, MAX_BAR),
        width=width,
        access=Access(table.word("access", tuple(one.value for one in Access))),
        save=Save(table.word("save", tuple(one.value for one in Save), Save.NONE.value)),
        reset=table.integer("reset", 0, (1 << (8 * width)) - 1) if table.has("reset") else None,
        fields=fields_from(table.table("fields")),
        order=table.integer("order", -1000, 1000, 0),
        doc=table.text("doc", ""),
    )


def fields_from(table: Table) -> tuple[Field, ...]:
    """Fields from `{ name = "7:4", other = { bits = "3", values = { 0 = "off" } } }`."""
    found = []
    for name in table:
        if isinstance(table.value(name), str):
            found.append(Field(name, *bits_from(table, name)))
            continue
        long = table.table(name)
        values = long.table("values")
        texts = {number_from(values, key): values.text(key) for key in values}
        found.append(Field(name, *bits_from(long, "bits"), texts))
        long.finish()
    return tuple(found)


def bits_from(table: Table, key: str) -> tuple[int, int]:
    """`"7:4"` or `"7"` as (high, low)."""
    high, _, low = table.text(key).partition(":")
    try:
        return int(high), int(low or high)
    except ValueError:
        raise table.error(key, f"must be bits like '7' or '7:4', not {table.value(key)!r}") from None


def number_from(table: Table, key: str) -> int:
    """The number that a key is: `0`, `0x10`."""
    try:
        return int(key, 0)
    except ValueError:
        raise table.error(key, "must be a number") from None
