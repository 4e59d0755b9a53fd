"""The register table as traces are read: their values are what the bus had, the table's what the device means.

It knows no access but of dwords: only those mean something here.
"""

from dataclasses import dataclass
from typing import Final

from plugins.mlx5.registers import INIT_SEGMENT, swap32
from vfu_server.regmap import Block

DWORD: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class BigEndianBlock(Block):
    """A block whose dwords are turned over before they are shown."""

    def decode(self, offset: int, value: int) -> str:
        """As `Block`, for the value of an access of four bytes."""
        return super().decode(offset, swap32(value) if value <= DWORD else value)


TRACED: Final = BigEndianBlock("mlx5.init", INIT_SEGMENT.size, INIT_SEGMENT.registers, INIT_SEGMENT.arrays)
