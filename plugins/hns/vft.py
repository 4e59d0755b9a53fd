"""The queues of a function: a word of the virtual function table (VFT), as mailbox and PF tell it.

It must not know who asks.
"""

from dataclasses import dataclass
from typing import Final

MOST: Final = 1024
"""Queues of one function, at most: the count has ten bits."""


@dataclass(frozen=True, slots=True)
class Queues:
    """`count` queues of a function, the first of which is number `first` of the device's."""

    count: int
    first: int


def queues_of(word: int) -> Queues:
    """From a word of type SQC, V2 and later: bits 54:45 count - 1, bit 44 valid, bits 43:28 the first.

    A function without queues has the valid bit clear and a count field of 0. Source: qm.c (qm_get_vft_v2).
    """
    if not word >> 44 & 1:
        return Queues(0, 0)
    return Queues((word >> 45 & 0x3FF) + 1, word >> 28 & 0xFFFF)
