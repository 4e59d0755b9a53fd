"""Doorbells of V2 and later as 64-bit words.

It must not know where they are written.
"""

from dataclasses import dataclass
from typing import Final

from plugins.hns.registers import FUNCTION

SQ: Final = 0
CQ: Final = 1
EQ: Final = 2
AEQ: Final = 3

RESTART: Final = 1
"""Priority of an SQ doorbell that restarts a paused queue; its index is no tail then."""

_REGISTER = FUNCTION["doorbell_sq_cq"]


@dataclass(frozen=True, slots=True)
class Doorbell:
    """`command` SQ, CQ, EQ or AEQ, `queue` the function's own number, `index` a place in the ring."""

    command: int
    queue: int = 0
    index: int = 0
    priority: int = 0

    @property
    def is_queue(self) -> bool:
        """One of an SQ or CQ, not of EQ or AEQ."""
        return self.command in (SQ, CQ)

    def word(self) -> int:
        """The word that is written in one access. Source: qm.c, qm_db_v2."""
        value = 0
        for name, number in (
            ("queue", self.queue),
            ("cmd", self.command),
            ("index", self.index),
            ("priority", self.priority),
        ):
            value = _REGISTER.field(name).put(value, number)
        return value


def restart(queue: int) -> Doorbell:
    """The doorbell by which a paused queue goes on. Source: hisi_acc_vfio_pci.c, the step STOP to RUNNING."""
    return Doorbell(SQ, queue, 0, RESTART)
