"""Which queues of the device belong to which function: the table behind the PF's VFT registers and mailbox get 6.

Source of the word's layout: Linux 7.2.8, drivers/crypto/hisilicon/qm.c (QM_SQC_VFT_*). It must not know registers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

SQC, CQC, SHAPER = range(3)


@dataclass(frozen=True, slots=True)
class Range:
    """Queues `base` .. `base + count - 1` of the device; `count` 0: none."""

    base: int = 0
    count: int = 0

    @property
    def sqc_word(self) -> int:
        """The 64-bit entry of type SQC."""
        return self.base << 28 | 1 << 44 | (self.count - 1) << 45 if self.count else 0

    @property
    def cqc_word(self) -> int:
        """The entry of type CQC: valid or not."""
        return 1 << 28 if self.count else 0


def parse_sqc_word(word: int) -> Range:
    """The range of an entry of type SQC."""
    return Range(word >> 28 & 0xFFFF, (word >> 45 & 0x3FF) + 1) if word >> 44 & 1 else Range()


class Vft:
    """The ranges of all functions, 0 being the PF."""

    def __init__(self, start: Sequence[Range], total: int) -> None:
        self._start = list(start)
        self._total = total
        self.ranges = list(start)
        self.shapers = [0] * len(self._start)

    def reset(self) -> None:
        """The ranges that the device was ordered with."""
        self.ranges = list(self._start)
        self.shapers = [0] * len(self._start)

    def word(self, kind: int, function: int) -> int:
        """The entry of table `kind` of a function; 0 where there is none."""
        if function >= len(self.ranges):
            return 0
        match kind:
            case 0:
                return self.ranges[function].sqc_word
            case 1:
                return self.ranges[function].cqc_word
            case _:
                return self.shapers[function]

    def assign(self, function: int, word: int) -> bool:
        """Write an entry of type SQC. False for a range outside of the device or over another function's."""
        new = parse_sqc_word(word)
        if function >= len(self.ranges) or new.base + new.count > self._total:
            return False
        for number, other in enumerate(self.ranges):
            if number != function and new.base < other.base + other.count and other.base < new.base + new.count:
                return False
        self.ranges[function] = new
        return True
