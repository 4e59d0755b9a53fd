"""Which frames the model takes: exact addresses, the multicast table, broadcast and promiscuous modes (7.1.1)."""

from typing import Protocol

UPE, MPE, BAM, VALID = 1 << 3, 1 << 4, 1 << 15, 1 << 31
BROADCAST = b"\xff" * 6
SHIFTS = (4, 3, 2, 0)
"""RCTL.MO: which bits of an address choose the bit of the table."""


class Registers(Protocol):
    """What a filter reads."""

    def __getitem__(self, name: str) -> int: ...


def accepts(registers: Registers, frame: bytes) -> bool:
    """Whether a frame is for us."""
    control, destination = registers["RCTL"], frame[:6]
    if destination == BROADCAST:
        return bool(control & (BAM | MPE))
    multicast = bool(destination[0] & 1)
    if control & (MPE if multicast else UPE):
        return True
    for n in range(16):
        high = registers[f"RA[{n}].RAH"]
        own = registers[f"RA[{n}].RAL"].to_bytes(4, "little") + (high & 0xFFFF).to_bytes(2, "little")
        if high & VALID and own == destination:
            return True
    place = (destination[4] | destination[5] << 8) >> SHIFTS[control >> 12 & 3] & 0xFFF
    return multicast and bool(registers[f"MTA[{place >> 5}].word"] >> (place & 31) & 1)
