"""`python -m tests.plugins_synthetic.peer_model --socket-path PATH`: sends numbers to another function by DMA.

It writes 1, 2, 3 ... to the address TARGET, one after the other, as long as it is enabled and not held back; its own
INBOX takes such numbers, and notices what is missing. Held back it starts no DMA and still takes what comes; frozen it
takes nothing: what is written to INBOX then is lost, as on hardware.
"""

import sys

from vfu_server.model import Bar, BusError, Interrupts, Model
from vfu_server.model_server import main
from vfu_server.pciconfig import PciConfig

BAR_SIZE = 1 << 12
PERIOD = 0.001
IDENTIFICATION = 0x50454552
REG_ID = 0x00
REG_CONTROL = 0x04
"""Bit 0: send; bit 1: held back; bit 2: frozen."""
REG_BUSY = 0x08
"""1 while a number is on its way."""
REG_TARGET = 0x10
REG_SENT = 0x18
REG_LAST = 0x20
"""The last number that came in."""
REG_MISSING = 0x28
"""How many did not come in between."""
REG_LOST = 0x30
"""Writes to INBOX while frozen. It is not part of the state: the other side's hardware has its own."""
INBOX = 0x80
SEND, HOLD, FREEZE = 1, 2, 4
STATE = (REG_TARGET, REG_SENT, REG_LAST, REG_MISSING)


class PeerModel(Model):
    """The registers are as many 64-bit values."""

    def __init__(self) -> None:
        super().__init__()
        self.bars = {0: Bar(BAR_SIZE)}
        self.interrupts = Interrupts(intx=True)
        self.config = PciConfig(vendor=0x1234, device=0x0BEE, class_code=0x00FF00, revision=1, interrupt_pin=1)
        self.config.add_bar(0, BAR_SIZE)
        self.regs = dict.fromkeys((REG_CONTROL, REG_BUSY, *STATE, REG_LOST), 0)
        self.armed = False

    def read(self, region: int, offset: int, width: int) -> int:
        value = IDENTIFICATION if offset == REG_ID else self.regs.get(offset, 0)
        return value & (1 << 8 * width) - 1

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        if offset == INBOX:
            self._take(value)
        elif offset in self.regs and offset != REG_BUSY:
            self.regs[offset] = value
            self._arm()

    def _take(self, number: int) -> None:
        if self.regs[REG_CONTROL] & FREEZE:
            self.regs[REG_LOST] += 1
        elif number > self.regs[REG_LAST]:  # the same once more: its sender had no answer
            self.regs[REG_MISSING] += number - self.regs[REG_LAST] - 1
            self.regs[REG_LAST] = number

    def _arm(self) -> None:
        if not self.armed and self.regs[REG_CONTROL] & SEND:
            self.armed = True
            self.bus.call_later(PERIOD, self._tick)

    def _tick(self) -> None:
        self.armed = False
        if self.regs[REG_CONTROL] & (SEND | HOLD | FREEZE) == SEND and not self.regs[REG_BUSY]:
            number = self.regs[REG_SENT] + 1
            self.regs[REG_BUSY] = 1
            try:
                self.bus.dma_write(self.regs[REG_TARGET], number.to_bytes(8, "little"))
                self.regs[REG_SENT] = number
            except BusError:
                pass  # nobody answered: it is sent again
            finally:
                self.regs[REG_BUSY] = 0
        self._arm()

    def bus_reset(self) -> None:
        self.regs.update(dict.fromkeys(self.regs, 0))


if __name__ == "__main__":
    sys.exit(main(PeerModel))
