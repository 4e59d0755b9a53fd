"""What an 82574L has counted (`Counted`): read from registers that a read clears, and given to the guest with what it
counts from then on. Must not know how a state is written.

Counters cannot be written, so those of a guest that came here are kept by us and added when it reads.
"""

from collections.abc import Callable, Mapping

from e1000e.registers import COUNTERS, WIDE_COUNTERS

NARROW = tuple(name for name in COUNTERS if name[:-1] not in WIDE_COUNTERS)
MOST = {**dict.fromkeys(NARROW, 0xFFFFFFFF), **dict.fromkeys(WIDE_COUNTERS, (1 << 64) - 1)}
"""Where each stays (10.2.10)."""
NAMES = {offset: name for name, offset in COUNTERS.items()}


class Counted:
    """Counts not yet given to the guest, by name; those of 64 bits without the L or H."""

    def __init__(self, read: Callable[[str], int]) -> None:
        self._read = read
        self._values = dict.fromkeys(MOST, 0)
        self._given: dict[str, int] = {}
        """Of a counter of 64 bits: what was there when its low half was read, until its high half is."""

    def value(self, name: str) -> int:
        """One of MOST, with what the hardware has counted until now."""
        self._collect(name)
        return self._values[name]

    def replace(self, values: Mapping[str, int]) -> None:
        """Others than ours, those of another device. The hardware was reset, and begins at 0."""
        self._values = {**dict.fromkeys(MOST, 0), **values}
        self._given = {}

    def forget(self) -> None:
        """The device was reset, and its counters with it."""
        self.replace({})

    def take(self, offset: int) -> int:
        """The guest reads the register at `offset`, which clears it."""
        name = NAMES[offset]
        if name in NARROW:
            self._collect(name)
            value, self._values[name] = self._values[name], 0
            return value
        wide, high = name[:-1], name.endswith("H")
        if not high:
            self._collect(wide)
            self._given[wide] = self._values[wide]
            return self._values[wide] & 0xFFFFFFFF
        if wide not in self._given:
            self._collect(wide)
        value = self._given.pop(wide, self._values[wide])
        self._values[wide] -= value
        return value >> 32

    def _collect(self, name: str) -> None:
        if name in NARROW:
            more = self._read(name)
        else:
            more = self._read(f"{name}L")
            more |= self._read(f"{name}H") << 32
        self._values[name] = min(self._values[name] + more, MOST[name])
