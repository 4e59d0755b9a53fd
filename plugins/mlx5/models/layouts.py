"""Big-endian messages as tables of bit fields: packing, unpacking, and finding bits that no field names.

It knows dwords and bits as the hardware's documents number them; it must not know any command.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vfu_server.errors import PluginError

Values = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Bits:
    """A field of `width` bits; its dword (or longer number) ends before byte `end`, `low` bits of it lie below."""

    name: str
    end: int
    low: int
    width: int

    @property
    def start(self) -> int:
        """First byte that the field touches."""
        return self.end - (self.low + self.width + 7) // 8

    def moved(self, offset: int) -> "Bits":
        """The same field `offset` bytes further on."""
        return Bits(self.name, self.end + offset, self.low, self.width)


def bits(name: str, at: int, high: int, low: int | None = None) -> Bits:
    """Bits `high` to `low` (31 is the first on the wire) of the dword at byte `at`; one bit without `low`."""
    low = high if low is None else low
    if not 0 <= low <= high <= 31 or at % 4:
        raise PluginError(f"field {name!r}: no bits {high}:{low} in a dword at {at:#x}")
    return Bits(name, at + 4, low, high - low + 1)


def u32(name: str, at: int) -> Bits:
    """A whole dword."""
    return bits(name, at, 31, 0)


def u64(name: str, at: int) -> Bits:
    """Eight bytes."""
    return Bits(name, at + 8, 0, 64)


def raw(name: str, at: int, size: int) -> Bits:
    """`size` bytes as one number."""
    return Bits(name, at + size, 0, 8 * size)


def moved(fields: tuple[Bits, ...], offset: int) -> tuple[Bits, ...]:
    """A structure's fields within a message that holds it at `offset`."""
    return tuple(field.moved(offset) for field in fields)


class Layout:
    """A message of `size` bytes. PluginError for fields that overlap, lie outside or share a name."""

    def __init__(self, name: str, size: int, *fields: Bits) -> None:
        self.name = name
        self.size = size
        self._fields: dict[str, tuple[int, int]] = {}
        known = 0
        for field in fields:
            shift = 8 * (size - field.end) + field.low
            mask = (1 << field.width) - 1
            if field.name in self._fields or shift < 0 or field.start < 0 or known & mask << shift:
                raise PluginError(f"{name}: field {field.name!r} is there twice, outside, or over another")
            known |= mask << shift
            self._fields[field.name] = (shift, mask)
        self._known = known

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def limit(self, name: str) -> int:
        """The largest number that field `name` holds."""
        return self._fields[name][1]

    def pack(self, values: Values | None = None, /, **named: int) -> bytes:
        """The message; fields that are not given are 0. PluginError: an unknown field, or a number that is too big."""
        number = 0
        for name, value in {**(values or {}), **named}.items():
            if name not in self._fields:
                raise PluginError(f"{self.name} has no field {name!r}")
            shift, mask = self._fields[name]
            if not 0 <= value <= mask:
                raise PluginError(f"{self.name}: {name} cannot be {value:#x}")
            number |= value << shift
        return number.to_bytes(self.size, "big")

    def unpack(self, data: bytes) -> dict[str, int]:
        """All fields of the first `size` bytes; what is missing reads 0."""
        number = int.from_bytes(self._cut(data), "big")
        return {name: number >> shift & mask for name, (shift, mask) in self._fields.items()}

    def get(self, data: bytes, name: str) -> int:
        """One field."""
        shift, mask = self._fields[name]
        return int.from_bytes(self._cut(data), "big") >> shift & mask

    def put(self, data: bytes, values: Values) -> bytes:
        """`data` with some fields set."""
        number = int.from_bytes(self._cut(data), "big")
        for name, value in values.items():
            shift, mask = self._fields[name]
            if not 0 <= value <= mask:
                raise PluginError(f"{self.name}: {name} cannot be {value:#x}")
            number = number & ~(mask << shift) | value << shift
        return number.to_bytes(self.size, "big")

    def strays(self, data: bytes) -> list[int]:
        """Offsets of the dwords that hold ones where no field is."""
        number = int.from_bytes(self._cut(data), "big") & ~self._known
        found = []
        while number:
            byte = self.size - 1 - (number.bit_length() - 1) // 8
            at = byte & ~3
            found.append(at)
            number &= (1 << 8 * max(0, self.size - at - 4)) - 1
        return found

    def changed(self, before: bytes, after: bytes) -> tuple[set[str], bool]:
        """The fields that differ between two messages, and whether bits outside of any field do as well."""
        difference = int.from_bytes(self._cut(before), "big") ^ int.from_bytes(self._cut(after), "big")
        names = {name for name, (shift, mask) in self._fields.items() if difference & mask << shift}
        return names, bool(difference & ~self._known)

    def _cut(self, data: bytes) -> bytes:
        return data[: self.size].ljust(self.size, b"\0")
