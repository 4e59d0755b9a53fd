"""Config space as firmware and a VMM walk it: capabilities, sizing and placing of BARs.

Functions over anything that reads and writes config space; they know no client and keep no state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vfu_server import uapi
from vfu_server.errors import VfuServerError

BAR_IO = 0x1
BAR_TYPE_MASK = 0x6
BAR_TYPE_64 = 0x4
BAR_PREFETCHABLE = 0x8
MSI_FLAGS = 2
MSI_ENABLE = 0x1
MSI_QUEUE_SIZE_SHIFT = 4
MSI_64BIT = 0x80
MSIX_FLAGS = 2
MSIX_ENABLE = 0x8000
MSIX_TABLE_SIZE = 0x7FF


class BrokenConfigError(VfuServerError):
    """Config space that firmware could not walk."""


class ConfigSpace(Protocol):
    """Access to config space; `width` is 1, 2 or 4."""

    def read(self, offset: int, width: int) -> int:
        """Little-endian value."""
        ...

    def write(self, offset: int, width: int, value: int) -> None:
        """Store a little-endian value."""
        ...


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability: its id and where it stands in config space."""

    id: int
    offset: int


@dataclass(frozen=True, slots=True)
class BarInfo:
    """A BAR as sizing found it; `index` is its region."""

    index: int
    size: int
    io: bool = False
    wide: bool = False
    prefetchable: bool = False


def capabilities(config: ConfigSpace) -> list[Capability]:
    """The list of conventional capabilities. BrokenConfigError for a list that never ends or points into the header."""
    if not config.read(uapi.PCI_STATUS, 2) & uapi.PCI_STATUS_CAP_LIST:
        return []
    found: list[Capability] = []
    at = config.read(uapi.PCI_CAPABILITY_LIST, 1) & ~3
    while at:
        if at < 0x40 or any(at == capability.offset for capability in found):
            raise BrokenConfigError(f"the capability list leads to {at:#x} after {found}")
        found.append(Capability(config.read(at, 1), at))
        at = config.read(at + 1, 1) & ~3
    return found


def extended_capabilities(config: ConfigSpace) -> list[Capability]:
    """The list of PCI Express extended capabilities, for a config space of 4096 bytes."""
    found: list[Capability] = []
    at = 0x100
    while at:
        if at < 0x100 or any(at == capability.offset for capability in found):
            raise BrokenConfigError(f"the extended capability list leads to {at:#x} after {found}")
        header = config.read(at, 4)
        if header in (0, 0xFFFFFFFF):
            break
        found.append(Capability(header & 0xFFFF, at))
        at = (header >> 20) & ~3
    return found


def find_capability(config: ConfigSpace, capability_id: int) -> int:
    """Offset of the first capability of that id, 0 if there is none."""
    return next((c.offset for c in capabilities(config) if c.id == capability_id), 0)


def size_bars(config: ConfigSpace) -> list[BarInfo]:
    """Size the six BARs by writing ones, with decoding off meanwhile, as firmware does. Leaves them as they were."""
    command = config.read(uapi.PCI_COMMAND, 2)
    config.write(uapi.PCI_COMMAND, 2, command & ~(uapi.PCI_COMMAND_IO | uapi.PCI_COMMAND_MEMORY))
    bars: list[BarInfo] = []
    index = 0
    while index < 6:
        bar = _size_bar(config, index)
        if bar.size:
            bars.append(bar)
        index += 2 if bar.wide else 1
    config.write(uapi.PCI_COMMAND, 2, command)
    return bars


def _size_bar(config: ConfigSpace, index: int) -> BarInfo:
    offset = uapi.PCI_BASE_ADDRESS_0 + 4 * index
    before = config.read(offset, 4)
    mask = _probe(config, offset, before)
    if before & BAR_IO:
        ones = mask & ~0x3
        return BarInfo(index, (-ones) & 0xFFFF if ones else 0, io=True)
    wide = before & BAR_TYPE_MASK == BAR_TYPE_64
    ones, limit = mask & ~0xF, 1 << 32
    if wide and index < 5:
        above = config.read(offset + 4, 4)
        ones |= _probe(config, offset + 4, above) << 32
        limit = 1 << 64
    return BarInfo(index, limit - ones if ones else 0, False, wide, bool(before & BAR_PREFETCHABLE))


def _probe(config: ConfigSpace, offset: int, before: int) -> int:
    config.write(offset, 4, 0xFFFFFFFF)
    mask = config.read(offset, 4)
    config.write(offset, 4, before)
    return mask


def place_bars(
    config: ConfigSpace, bars: Sequence[BarInfo], *, memory: int = 0xE0000000, io: int = 0xC000
) -> dict[int, int]:
    """Give each BAR an address, biggest first, and switch decoding and bus mastering on. Returns region -> address."""
    placed: dict[int, int] = {}
    command = uapi.PCI_COMMAND_MASTER
    for bar in sorted(bars, key=lambda bar: -bar.size):
        base = io if bar.io else memory
        address = (base + bar.size - 1) & -bar.size
        write_bar(config, bar, address)
        placed[bar.index] = address
        if bar.io:
            io, command = address + bar.size, command | uapi.PCI_COMMAND_IO
        else:
            memory, command = address + bar.size, command | uapi.PCI_COMMAND_MEMORY
    config.write(uapi.PCI_COMMAND, 2, command)
    return placed


def write_bar(config: ConfigSpace, bar: BarInfo, address: int) -> None:
    """Write the address of one BAR."""
    offset = uapi.PCI_BASE_ADDRESS_0 + 4 * bar.index
    config.write(offset, 4, address & 0xFFFFFFFF)
    if bar.wide:
        config.write(offset + 4, 4, address >> 32)


def read_bar(config: ConfigSpace, bar: BarInfo) -> int:
    """The address in one BAR, without its type bits."""
    offset = uapi.PCI_BASE_ADDRESS_0 + 4 * bar.index
    low = config.read(offset, 4)
    if bar.io:
        return low & ~0x3
    high = config.read(offset + 4, 4) if bar.wide else 0
    return high << 32 | low & ~0xF
