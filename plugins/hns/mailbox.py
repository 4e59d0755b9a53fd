"""The mailbox of a function: commands to its queue manager, one at a time, each by one store of 16 bytes.

It must not know what the commands are for. There is one mailbox for each function, which the guest's driver uses, too:
whoever calls sees to it that the guest cannot. Source: qm.c (hisi_qm_mb), section by section the same in Linux 7.2.8.
"""

import errno
import struct
from dataclasses import dataclass
from typing import Final

import trio

from plugins.hns.polling import Looks
from plugins.hns.registers import FUNCTION
from plugins.hns.window import Window
from vfu_server.errors import DeadlineError, HostError

SQC: Final = 0
CQC: Final = 1
EQC: Final = 2
AEQC: Final = 3
SQC_TABLE: Final = 4
CQC_TABLE: Final = 5
SQC_VFT: Final = 6
STOP_QUEUE: Final = 8
FLUSH_FUNCTION: Final = 9
SRC_MESSAGE: Final = 0xC
DST_MESSAGE: Final = 0xD
PAUSE_FUNCTION: Final = 0xE

NAMES: Final = {
    SQC: "SQC",
    CQC: "CQC",
    EQC: "EQC",
    AEQC: "AEQC",
    SQC_TABLE: "SQC table",
    CQC_TABLE: "CQC table",
    SQC_VFT: "SQC VFT",
    STOP_QUEUE: "stop queue",
    FLUSH_FUNCTION: "flush function",
    SRC_MESSAGE: "source message",
    DST_MESSAGE: "destination message",
    PAUSE_FUNCTION: "pause function",
}

IDLE_SECONDS: Final = 1.0
"""For a command of the guest's that is still running; the kernel's driver gives one 1 ms."""
DONE_SECONDS: Final = 1.0
"""For a command of ours, as the kernel's driver."""

_WORDS = struct.Struct("<HHIII")
_WORD0 = FUNCTION["mailbox0"]
_BUSY = _WORD0.field("busy")
_STATUS = _WORD0.field("status")
BUSY: Final = _BUSY.mask.to_bytes(4, "little") + bytes(12)
"""How a mailbox reads while it cannot be used."""


@dataclass(frozen=True, slots=True)
class Request:
    """A command as it is stored. `base` is an IOVA or the value to set; a get answers in its place."""

    command: int
    get: bool = False
    queue: int = 0
    base: int = 0

    @property
    def text(self) -> str:
        """The operation, for messages."""
        what = NAMES.get(self.command, f"command {self.command:#x}")
        if self.command in (STOP_QUEUE, FLUSH_FUNCTION, PAUSE_FUNCTION):
            return f"mailbox: {what}" + (f" {self.queue}" if self.command == STOP_QUEUE else "")
        return f"mailbox: {'get' if self.get else 'set'} {what}" + (f" of queue {self.queue}" if self.queue else "")

    def encode(self) -> bytes:
        """The 16 bytes, with the busy bit that starts the command."""
        word = self.command | _BUSY.mask | (1 << 14 if self.get else 0)
        return _WORDS.pack(word, self.queue, self.base & 0xFFFFFFFF, self.base >> 32, 0)


class MailboxError(HostError):
    """The queue manager has finished a command with an error. `status`: what it told, 1 to 15."""

    def __init__(self, name: str, request: Request, status: int) -> None:
        super().__init__(f"{name}: {request.text} failed with status {status:#x}", errno.EIO)
        self.status = status


class MailboxBusyError(DeadlineError):
    """The mailbox was not free, so the command was not given: another one runs without end."""


class MailboxTimeoutError(DeadlineError):
    """A command was given and did not end. What became of it, nobody knows."""


class Mailbox:
    """The mailbox behind one window. One command at a time: coroutines queue up."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._lock = trio.Lock()

    async def set(self, command: int, base: int = 0, queue: int = 0) -> None:
        """Give a command and wait for its end. MailboxError, MailboxBusyError, MailboxTimeoutError, HostError."""
        await self._do(Request(command, queue=queue, base=base))

    async def get(self, command: int, queue: int = 0) -> int:
        """Ask for a 64-bit value. Raises as `set`."""
        return await self._do(Request(command, get=True, queue=queue))

    async def idle(self, request: Request | None = None) -> None:
        """Wait until no command runs. MailboxBusyError."""
        async for _ in Looks(IDLE_SECONDS):
            if not _BUSY.get(self._window.read("mailbox0")):
                return
        what = "the mailbox" if request is None else request.text
        raise MailboxBusyError(
            f"{self._window.name}: {what}: it is still busy after {IDLE_SECONDS:g} s ({self._window.show('mailbox0')})"
        )

    async def _do(self, request: Request) -> int:
        async with self._lock:
            await self.idle(request)
            self._window.write_mailbox(request.encode())
            word = await self._finished(request)
            if status := _STATUS.get(word):
                raise MailboxError(self._window.name, request, status)
            if not request.get:
                return 0
            return self._window.read("mailbox1") | self._window.read("mailbox2") << 32

    async def _finished(self, request: Request) -> int:
        # A command that was given is waited for in any case: the next one must not find it running.
        with trio.CancelScope(shield=True):
            async for _ in Looks(DONE_SECONDS):
                word = self._window.read("mailbox0")
                if not _BUSY.get(word):
                    return word
        raise MailboxTimeoutError(
            f"{self._window.name}: {request.text} has not ended after {DONE_SECONDS:g} s "
            f"({self._window.show('mailbox0')})"
        )
