"""The register tables of a profile: the `[[bar]]` part of a TOML file as register blocks.

Shared with the software models, so it knows nothing of save, restore, queues or policy, and touches no device.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vfu_server.errors import ConfigError, PluginError
from vfu_server.regmap import Access, Array, Block, Field, Register, Save

PROFILES = Path(__file__).with_name("profiles")
"""Where the profiles that come with the plugin are."""


def load_blocks(name: str, counts: Mapping[str, int] | None = None) -> dict[int, Block]:
    """The register blocks of the shipped profile `name`, by BAR index.

    `counts` gives the number of elements of an array by the array's name; without it the table's `count` (the largest)
    holds.
    """
    path = PROFILES / f"{name}.toml"
    with path.open("rb") as file:
        document = tomllib.load(file)
    return {bar["index"]: block_from(f"{name}.bar{bar['index']}", bar, counts or {}) for bar in document["bar"]}


def block_from(name: str, bar: Mapping[str, Any], counts: Mapping[str, int]) -> Block:
    """The block of one `[[bar]]` table. ConfigError naming the register and key for a wrong value."""
    registers = [register_from(table) for table in bar.get("register", ())]
    arrays = [array_from(table, counts) for table in bar.get("array", ())]
    try:
        return Block(name, bar["size"], registers, arrays)
    except PluginError as error:
        raise ConfigError(str(error)) from None


def array_from(table: Mapping[str, Any], counts: Mapping[str, int]) -> Array:
    """An array of register groups from its `[[bar.array]]` table."""
    name = table["name"]
    count = counts.get(name, table["count"])
    return Array(name, table["first"], table["stride"], count, [register_from(r) for r in table["register"]])


def register_from(table: Mapping[str, Any]) -> Register:
    """One register from its table."""
    name = table["name"]
    try:
        access, save = Access(table["access"]), Save(table.get("save", "NONE"))
    except ValueError as error:
        raise ConfigError(f"register {name!r}: {error}") from None
    return Register(
        name=name,
        offset=table["offset"],
        width=table["width"],
        access=access,
        save=save,
        reset=table.get("reset"),
        fields=fields_from(name, table.get("fields", {})),
        order=table.get("order", 0),
        doc=table.get("doc", ""),
    )


def fields_from(register: str, table: Mapping[str, Any]) -> Sequence[Field]:
    """Fields from `{ name = "7:4", other = { bits = "3", values = { 0 = "off" } } }`."""
    found = []
    for name, said in table.items():
        bits = said if isinstance(said, str) else said["bits"]
        values = {} if isinstance(said, str) else {int(number): text for number, text in said.get("values", {}).items()}
        high, _, low = bits.partition(":")
        try:
            found.append(Field(name, int(high), int(low or high), values))
        except ValueError:
            raise ConfigError(
                f"register {register!r}: field {name!r}: bits {bits!r} are not like '7' or '7:4'"
            ) from None
    return found
