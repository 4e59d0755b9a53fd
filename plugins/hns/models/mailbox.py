"""A function's mailbox: 16 bytes that take one command at a time, and show that it is busy and how it ended.

Source: Linux 7.2.8, drivers/crypto/hisilicon/qm.c (struct qm_mailbox). A command comes by one store of 16 bytes. A bus
carries it as two 64-bit halves in order, and so does an emulator: the low half is kept back, the high one right behind
it completes the command. It must not know what commands do.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from plugins.hns.registers import MAILBOX
from vfu_server.model import Model

SECONDS = 2e-5
"""How long a command takes (model); the driver polls every 10 us, for at most 1 ms in the oldest one."""

BUSY = 1 << 13
GET = 1 << 14
_STATUS = 9
_KEPT = 0xFF | 1 << 8 | GET | 0xFFFF0000
"""Of the first word: what stays when a command has ended. Command, event, op and queue."""

SQC, CQC, EQC, AEQC, SQC_TABLE, CQC_TABLE, VFT = range(7)
STOP_QUEUE, FLUSH, MESSAGE_OUT, MESSAGE_IN, PAUSE = 8, 9, 0xC, 0xD, 0xE

FAILED = 1
"""The status of a command that did not work (model): one value for all."""


@dataclass(frozen=True, slots=True)
class Command:
    """What was stored. `queue` is the function's own number; `base` an IOVA, or a message."""

    code: int
    get: bool
    queue: int
    base: int


class Mailbox:
    """`execute(command)` is called later, from a callback, and answers through `finish`."""

    def __init__(self, owner: Model, execute: Callable[[Command], None], violated: Callable[[str], None]) -> None:
        self._owner = owner
        self._execute = execute
        self._violated = violated
        self.words = bytearray(16)
        self.commands = 0
        self._low: bytes | None = None
        self._epoch = 0

    @property
    def busy(self) -> bool:
        """A command runs."""
        return bool(int.from_bytes(self.words[:2], "little") & BUSY)

    def reset(self) -> None:
        """Start values; a command that runs is forgotten."""
        self._epoch += 1
        self.words = bytearray(16)
        self._low = None

    def load(self, offset: int, width: int) -> int:
        """A read of 4 or 8 bytes at `offset` of BAR2."""
        at = offset - MAILBOX
        value = int.from_bytes(self.words[at : at + width], "little")
        if at == 0 and self._owner.faults.take("mailbox-busy"):
            value |= BUSY
        return value

    def store(self, offset: int, width: int, value: int) -> None:
        """A store of any width: only the two halves of a command make one."""
        low, self._low = self._low, None
        if width != 8:
            self._violated("mailbox_width")
        elif offset == MAILBOX:
            if low is not None:
                self._violated("mailbox_half")
            self._low = value.to_bytes(8, "little")
        elif low is None:
            self._violated("mailbox_half")
        else:
            self._take(low + value.to_bytes(8, "little"))

    def other_access(self) -> None:
        """Another register was accessed: a half that waits for the other is no command any more."""
        if self._low is not None:
            self._violated("mailbox_half")
            self._low = None

    def finish(self, status: int = 0, answer: int | None = None) -> None:
        """The command that runs has ended; `answer` goes to the base."""
        word = int.from_bytes(self.words[:4], "little") & _KEPT | status << _STATUS
        if self._owner.faults.take("mailbox-error"):
            word |= FAILED << _STATUS
        self.words[:4] = word.to_bytes(4, "little")
        if answer is not None:
            self.words[4:12] = answer.to_bytes(8, "little")

    @property
    def epoch(self) -> int:
        """Changes with every reset: what was begun before must not be finished after."""
        return self._epoch

    def _take(self, data: bytes) -> None:
        if self.busy:
            self._violated("mailbox_busy")
            return
        word0, queue, base, reserved = struct.unpack("<HHQI", data)
        if not word0 & BUSY or reserved:
            self._violated("mailbox_malformed")
            return
        self.words = bytearray(data)
        self.commands += 1
        if self._owner.faults.take("mailbox-stuck"):
            return
        seconds = 2.0 if self._owner.faults.take("mailbox-slow") else SECONDS
        command = Command(word0 & 0xFF, bool(word0 & GET), queue, base)
        epoch = self._epoch
        self._owner.bus.call_later(seconds, lambda: self._run(command, epoch))

    def _run(self, command: Command, epoch: int) -> None:
        if epoch == self._epoch:
            self._execute(command)
