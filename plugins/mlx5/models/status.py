"""What the firmware answers when it refuses, and the book of what drivers did wrong.

Statuses are those of the command interface (mlx5_ifc.h and cmd.c in Linux); which mistake gets which is fixed here
where no document says it. It must not know any command.
"""

import enum
import logging
from collections import Counter

logger = logging.getLogger(__name__)


class Status(enum.IntEnum):
    """The first byte of a command's output."""

    OK = 0x00
    INTERNAL = 0x01
    BAD_OP = 0x02
    BAD_PARAM = 0x03
    BAD_SYS_STATE = 0x04
    BAD_RES = 0x05
    BUSY = 0x06
    NOT_READY = 0x07
    LIMIT = 0x08
    BAD_RES_STATE = 0x09
    BAD_INDEX = 0x0A
    NO_RES = 0x0F
    BAD_QP_STATE = 0x10
    BAD_INPUT_LENGTH = 0x50
    BAD_OUTPUT_LENGTH = 0x51


class Delivery(enum.IntEnum):
    """Bits 7:1 of an entry's last byte: whether the command could be taken from the queue at all."""

    OK = 0x0
    SIGNATURE = 0x1
    TOKEN = 0x2
    BLOCK_NUMBER = 0x3
    OUT_POINTER = 0x4
    IN_POINTER = 0x5
    INTERNAL = 0x6
    IN_LENGTH = 0x7
    OUT_LENGTH = 0x8
    RESERVED = 0x9
    TYPE = 0x10


class RefusedError(Exception):
    """A command is answered with `status`; `syndrome` tells refusals of one status apart.

    `mistake`: the driver's, so that it is counted; False where the state of the world is to blame.
    """

    def __init__(self, status: int, syndrome: int, text: str, *, mistake: bool = True) -> None:
        super().__init__(text)
        self.status = status
        self.syndrome = syndrome
        self.mistake = mistake


class Violations:
    """Counts what drivers did against the rules, by kind; the model's `state()` shows it under `name`."""

    def __init__(self, name: str = "violation") -> None:
        self.counts: Counter[str] = Counter()
        self._name = name

    def note(self, kind: str, text: str) -> None:
        """One more of `kind`."""
        self.counts[kind] += 1
        logger.warning("%s %s: %s", self._name, kind, text)

    def numbers(self) -> dict[str, int]:
        """`violations`, and `violation.KIND` for each kind."""
        total = sum(self.counts.values())
        kinds = {f"{self._name}.{kind}": count for kind, count in sorted(self.counts.items())}
        return {f"{self._name}s": total, **kinds}
