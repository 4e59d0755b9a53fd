"""The state of an 82574L (`State`): what is read of it, its sections, what no device can be in. No hardware."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from e1000e.phy import SAVED as PHY_SAVED
from e1000e.registers import MAC, QUEUES
from e1000e.statistics import MOST
from vfu_server.device import Section
from vfu_server.errors import StreamFormatError

EN = 1 << 1
"""RCTL.EN and TCTL.EN."""
TAILS = tuple(f"{ring}.{tail}" for n in range(QUEUES) for ring, tail in ((f"RX[{n}]", "RDT"), (f"TX[{n}]", "TDT")))
HELD = (
    *("RCTL", "TCTL", "IMS", "ICR", "MDIC", "EERD", "EXTCNF_CTRL", "SWSM", "SYSTIML", "SYSTIMH", "STATUS"),
    *TAILS,
)
"""Read once when it is stopped, since stopping changes them, or reading does."""
PLAIN = tuple(register.name for register in MAC.saved if register.name not in HELD)
"""Read at the save, written back as they are."""

_CTRL = MAC["CTRL"]
IGNORED = {"CTRL": _CTRL.field("RST").mask | _CTRL.field("PHY_RST").mask, "CTRL_EXT": 1 << 13}
"""Bits that act and do not stay."""
LINK = MAC["STATUS"].field("FD").mask | MAC["STATUS"].field("LU").mask | MAC["STATUS"].field("SPEED").mask
OWNED = MAC["EXTCNF_CTRL"].field("MDIO_SW_OWNERSHIP").mask
CAUSES = 0x01F782D7
"""Of ICR: all that ICS can raise (10.2.4.1). The rest is reserved or says that an interrupt is asserted."""
SEMAPHORE = 0x0F

_REGISTERS = struct.Struct(f"<{len(PLAIN) + len(HELD)}I")
_PHY = struct.Struct(f"<{len(PHY_SAVED) + 1}H")
_COUNTED = struct.Struct(f"<{len(MOST) + 1}Q")
SIZES = {"registers": _REGISTERS.size, "phy": _PHY.size, "plugin": _COUNTED.size}
"""Sections of version 1, by tag. `plugin`: what was counted, and IOADDR."""


@dataclass(slots=True)
class State:
    """All that travels. `registers`: PLAIN and HELD by name; `phy`: values of SAVED and the page."""

    registers: dict[str, int]
    phy: tuple[int, ...]
    counted: dict[str, int] = field(default_factory=dict)
    io_address: int = 0

    def sections(self) -> list[Section]:
        """As they are sent."""
        payloads = {
            "registers": _REGISTERS.pack(*(self.registers[name] for name in (*PLAIN, *HELD))),
            "phy": _PHY.pack(*self.phy),
            "plugin": _COUNTED.pack(*(self.counted[name] for name in MOST), self.io_address),
        }
        return [Section(tag, 1, payload) for tag, payload in payloads.items()]


def state_of(payloads: Mapping[str, bytes]) -> State:
    """What sections say, checked. StreamFormatError."""
    for tag, size in SIZES.items():
        if tag not in payloads:
            raise StreamFormatError(f"the stream has no section {tag}")
        if len(payloads[tag]) != size:
            raise StreamFormatError(f"section {tag}: {len(payloads[tag])} bytes, not {size}")
    values = dict(zip((*PLAIN, *HELD), _REGISTERS.unpack(payloads["registers"]), strict=True))
    *counts, address = _COUNTED.unpack(payloads["plugin"])
    counted = dict(zip(MOST, counts, strict=True))
    _check(values, counted, address)
    return State(values, _PHY.unpack(payloads["phy"]), counted, address)


def _check(values: Mapping[str, int], counted: Mapping[str, int], address: int) -> None:
    """Only what a device can be in: whoever wrote the stream may be a stranger."""
    for name, bits in {**IGNORED, "ICR": ~CAUSES, "SWSM": ~SEMAPHORE, "EXTCNF_CTRL": ~OWNED, "STATUS": ~LINK}.items():
        if values[name] & bits:
            raise StreamFormatError(f"{MAC[name].decode(values[name])}: bits that are never saved")
    for n in range(QUEUES):
        for ring, length, places in ((f"RX[{n}]", "RDLEN", ("RDH", "RDT")), (f"TX[{n}]", "TDLEN", ("TDH", "TDT"))):
            for place in places:
                if values[f"{ring}.{place}"] > 0xFFFF:
                    raise StreamFormatError(f"{ring}.{place} {values[f'{ring}.{place}']:#x} is outside of any ring")
            if values[f"{ring}.{length}"] & ~0xFFF80:
                raise StreamFormatError(f"{ring}.{length} {values[f'{ring}.{length}']:#x} is no ring's length")
    for name, count in counted.items():
        if count > MOST[name]:
            raise StreamFormatError(f"{name} has counted {count:#x}, and ends at {MOST[name]:#x}")
    if address > 0xFFFFFFFF:
        raise StreamFormatError(f"IOADDR {address:#x} has more than 32 bits")
