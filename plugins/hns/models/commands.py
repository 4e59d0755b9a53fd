"""What the mailbox commands of a function do.

Source of commands and buffers: Linux 7.2.8, drivers/crypto/hisilicon/qm.c. Everything runs in callbacks: a command may
read or write the guest's memory. It must not know how a command came.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from plugins.hns.models import mailbox
from plugins.hns.models.device import Shared
from plugins.hns.models.eq import BASE_HIGH, BASE_LOW, SHAPE, EventRing
from plugins.hns.models.mailbox import FAILED, Command, Mailbox
from plugins.hns.models.queues import Queues
from plugins.hns.registers import CONTEXT_WORDS
from vfu_server.model import BusError, Model

_SIZES = {mailbox.SQC: 32, mailbox.CQC: 32, mailbox.EQC: 4 * CONTEXT_WORDS, mailbox.AEQC: 4 * CONTEXT_WORDS}
_ALIGNMENT = 32


class Parts(Protocol):
    """What commands work on: one function."""

    number: int
    shared: Shared
    queues: Queues
    events: EventRing
    errors: EventRing
    mailbox: Mailbox

    def violated(self, name: str) -> None:
        """Count a violation."""
        ...


class Commands:
    """The commands of function `parts`, whose bus and faults are those of `owner`."""

    def __init__(self, owner: Model, parts: Parts) -> None:
        self._owner = owner
        self._parts = parts
        self._known: Mapping[tuple[int, bool], Callable[[Command], None]] = {
            **{(code, get): self._context for code in _SIZES for get in (False, True)},
            **{(code, get): self._table for code in (mailbox.SQC_TABLE, mailbox.CQC_TABLE) for get in (False, True)},
            (mailbox.VFT, True): self._vft,
            (mailbox.STOP_QUEUE, False): self._stop,
            (mailbox.FLUSH, False): self._flush,
            (mailbox.MESSAGE_OUT, False): self._message_out,
            (mailbox.MESSAGE_IN, True): self._message_in,
            (mailbox.PAUSE, False): self._pause,
        }

    def execute(self, command: Command) -> None:
        """Do it, and finish the mailbox now or later."""
        found = self._known.get((command.code, command.get))
        if found is None:
            self._refuse("mailbox_command")
            return
        found(command)

    def _refuse(self, violation: str) -> None:
        self._parts.violated(violation)
        self._parts.mailbox.finish(FAILED)

    def _finisher(self) -> Callable[[bool], None]:
        """Finishes this command and no other, though a reset may come first."""
        epoch, box = self._parts.mailbox.epoch, self._parts.mailbox

        def finish(worked: bool) -> None:
            if epoch == box.epoch:
                box.finish(0 if worked else FAILED)

        return finish

    # contexts by DMA

    def _context(self, command: Command) -> None:
        if command.base % _ALIGNMENT or not command.base:
            self._refuse("mailbox_buffer")
            return
        own = command.code in (mailbox.SQC, mailbox.CQC)
        if command.queue >= (len(self._parts.queues.queues) if own else 1):
            self._refuse("mailbox_queue")
            return
        finish = self._finisher()
        epoch = self._parts.mailbox.epoch
        try:
            if command.get:
                data = self._get(command)
                if data is not None:
                    self._owner.bus.dma_write(command.base, data)
                finish(data is not None)
                return
            data = self._owner.bus.dma_read(command.base, _SIZES[command.code])
        except BusError:
            self._parts.violated("mailbox_dma")
            finish(False)
            return
        if epoch != self._parts.mailbox.epoch:
            return
        worked = self._set(command, data)
        if not worked:
            self._parts.violated("mailbox_context")
        finish(worked)

    def _get(self, command: Command) -> bytes | None:
        if command.code in (mailbox.SQC, mailbox.CQC):
            return self._parts.queues.get_context(command.code, command.queue)
        return b"".join(word.to_bytes(4, "little") for word in self._ring(command).words)

    def _set(self, command: Command, data: bytes) -> bool:
        if command.code in (mailbox.SQC, mailbox.CQC):
            return self._parts.queues.set_context(command.code, command.queue, data)
        words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
        depth = (words[SHAPE] & 0xFFFF) + 1
        fits = words[0] & 0xFFFF < depth and words[0] >> 16 < depth
        if not (words[BASE_LOW] or words[BASE_HIGH]) or depth < 2 or not fits:
            return False
        self._ring(command).set_words(words)
        return True

    def _ring(self, command: Command) -> EventRing:
        return self._parts.events if command.code == mailbox.EQC else self._parts.errors

    # tables and ranges

    def _table(self, command: Command) -> None:
        which = command.code - mailbox.SQC_TABLE
        if command.get:
            self._parts.mailbox.finish(0, self._parts.queues.tables[which])
        elif command.queue or not command.base or command.base % _ALIGNMENT:
            self._refuse("mailbox_buffer")
        else:
            self._parts.queues.set_table(which, command.base)
            self._parts.mailbox.finish()

    def _vft(self, command: Command) -> None:
        self._parts.mailbox.finish(0, self._parts.shared.vft.word(0, self._parts.number))

    # stopping

    def _stop(self, command: Command) -> None:
        if command.queue >= len(self._parts.queues.queues):
            self._refuse("mailbox_queue")
        else:
            self._parts.queues.drain([command.queue], self._finisher())

    def _flush(self, command: Command) -> None:
        self._parts.queues.drain(range(len(self._parts.queues.queues)), self._finisher())

    def _pause(self, command: Command) -> None:
        if not self._parts.shared.order.can_migrate:
            self._refuse("mailbox_command")
        elif command.queue or command.base:
            self._refuse("mailbox_malformed")
        elif self._owner.faults.take("pause-ignored"):
            self._parts.mailbox.finish()
        else:
            self._parts.queues.pause(self._finisher())

    # messages

    def _message_out(self, command: Command) -> None:
        messages = self._parts.shared.messages
        if self._parts.number == 0:
            self._finisher()(messages.write_to_vf(command.queue, command.base))
        elif command.queue:
            self._refuse("mailbox_queue")
        else:
            messages.to_pf[self._parts.number] = command.base
            self._parts.mailbox.finish()

    def _message_in(self, command: Command) -> None:
        messages = self._parts.shared.messages
        if self._parts.number:
            self._parts.mailbox.finish(0, messages.to_vf[self._parts.number])
        elif command.queue < len(messages.to_pf):
            self._parts.mailbox.finish(0, messages.to_pf[command.queue])
        else:
            self._refuse("mailbox_queue")
