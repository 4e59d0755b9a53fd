"""Messages as declared tables: named fields of big-endian bits, packed and unpacked by one piece of code.

It knows no command and no device. A place is told as the facts about this device are: bits `high` to `low` of the
big-endian dword at byte `byte`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vfu_server.errors import PluginError


@dataclass(frozen=True, slots=True)
class Bits:
    """`width` bits from bit `first` of a message, counted from the most significant bit of its byte 0."""

    name: str
    first: int
    width: int

    @property
    def end(self) -> int:
        """First bit behind the field."""
        return self.first + self.width

    def get(self, data: bytes | bytearray | memoryview) -> int:
        """The field's number in `data`, which must be long enough."""
        start, stop = self.first // 8, -(-self.end // 8)
        value = int.from_bytes(data[start:stop], "big") >> (stop * 8 - self.end)
        return value & ((1 << self.width) - 1)

    def put(self, data: bytearray | memoryview, value: int) -> None:
        """Write `value`, leaving all other bits. PluginError if it does not fit."""
        if not 0 <= value < 1 << self.width:
            raise PluginError(f"{self.name}: {value:#x} does not fit {self.width} bits")
        start, stop = self.first // 8, -(-self.end // 8)
        shift = stop * 8 - self.end
        mask = ((1 << self.width) - 1) << shift
        before = int.from_bytes(data[start:stop], "big")
        data[start:stop] = (before & ~mask | value << shift).to_bytes(stop - start, "big")


def bits(name: str, byte: int, high: int = 31, low: int = 0) -> Bits:
    """Bits `high` to `low`, both included, of the big-endian dword at `byte`."""
    return Bits(name, byte * 8 + 31 - high, high - low + 1)


def flag(name: str, byte: int, bit: int) -> Bits:
    """One bit of the big-endian dword at `byte`."""
    return bits(name, byte, bit, bit)


def whole(name: str, byte: int, length: int = 8) -> Bits:
    """A big-endian number (or plain bytes) of `length` bytes from `byte` on."""
    return Bits(name, byte * 8, length * 8)


@dataclass(frozen=True, slots=True)
class Layout:
    """A message or context of `size` bytes. PluginError for a table that cannot be meant."""

    name: str
    size: int
    fields: tuple[Bits, ...]
    _names: Mapping[str, Bits] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        end = 0
        for one in sorted(self.fields, key=lambda f: f.first):
            if one.first < end or one.width < 1:
                raise PluginError(f"layout {self.name}: field {one.name} overlaps the one before it")
            end = one.end
        if end > self.size * 8:
            raise PluginError(f"layout {self.name}: fields reach behind its {self.size:#x} bytes")
        names = {one.name: one for one in self.fields}
        if len(names) != len(self.fields):
            raise PluginError(f"layout {self.name}: two fields have one name")
        object.__setattr__(self, "_names", names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Bits:
        """The field `name`. PluginError if there is none."""
        try:
            return self._names[name]
        except KeyError:
            raise PluginError(f"layout {self.name} has no field {name!r}") from None

    def encode(self, values: Mapping[str, int]) -> bytearray:
        """`size` bytes with `values` in their fields and zero elsewhere."""
        data = bytearray(self.size)
        for name, value in values.items():
            self[name].put(data, value)
        return data

    def get(self, data: bytes | bytearray | memoryview, name: str) -> int:
        """Field `name` of `data`. PluginError if `data` ends before it."""
        one = self[name]
        if len(data) * 8 < one.end:
            raise PluginError(f"layout {self.name}: {len(data)} bytes end before field {name}")
        return one.get(data)

    def decode(self, data: bytes | bytearray | memoryview) -> dict[str, int]:
        """All fields of `data`."""
        return {one.name: self.get(data, one.name) for one in self.fields}

    def at(self, byte: int) -> Iterable[Bits]:
        """The fields, for a message that has this context at `byte`."""
        return (Bits(one.name, one.first + byte * 8, one.width) for one in self.fields)


_ROW = re.compile(r"(\w+) @(0x[0-9a-f]+)(?:\[(\d+)(?::(\d+))?\]|\+(\d+))?")


def table(name: str, size: int, rows: str) -> Layout:
    """A layout from its rows, one a line, written as the facts are: `NAME @BYTE[HIGH:LOW]` or `NAME @BYTE[BIT]` of the
    big-endian dword at BYTE, `NAME @BYTE` for all of it, `NAME @BYTE+LENGTH` for that many bytes. PluginError.
    """
    return Layout(name, size, tuple(_row(name, row.strip()) for row in rows.strip().splitlines()))


def _row(table_name: str, row: str) -> Bits:
    found = _ROW.fullmatch(row)
    if found is None:
        raise PluginError(f"layout {table_name}: {row!r} is no row of a table")
    name, byte, high, low, length = found.groups()
    if length is not None:
        return whole(name, int(byte, 16), int(length))
    return bits(name, int(byte, 16)) if high is None else bits(name, int(byte, 16), int(high), int(low or high))
