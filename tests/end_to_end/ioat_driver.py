"""A guest's driver for Intel I/OAT: a ring of linked descriptors, a running count, interrupts by MSI-X.

Registers as in the kernel's drivers/dma/ioat. It drives through a `Guest` and knows nothing of the server below.
"""

import struct

from vfu_server.testing import Guest

INTRCTRL, ATTNSTATUS = 0x03, 0x04
MASTER_ENABLE, VECTOR_PER_CHANNEL = 0x01, 0x08
CHANCTRL, CHANCMD, DMACOUNT, CHANSTS, CHAINADDR, CHANCMP, CHANERR = 0x00, 0x04, 0x06, 0x08, 0x10, 0x18, 0x28
REARM = 0x01
SUSPEND, RESUME, RESET = 0x04, 0x10, 0x20
ACTIVE, DONE, SUSPENDED, HALTED = range(4)
INTERRUPT, COMPLETION = 0x01, 0x08
DESCRIPTOR = struct.Struct("<IIQQQ32x")
ENTRIES = 32


class IoatDriver:
    """One channel. `issued` is the running total that the guest's driver keeps in its memory."""

    def __init__(self, guest: Guest, channel: int = 0) -> None:
        self.guest = guest
        self.channel = channel
        self.base = 0x80 * (channel + 1)
        self.ring = 0x10000 + 0x1000 * channel
        self.completion = 0x8000 + 0x40 * channel
        self.issued = 0

    def use(self, guest: Guest) -> None:
        """The guest has moved; its driver knows nothing of it."""
        self.guest = guest

    def set_up(self) -> None:
        """Reset, ring, completion address, interrupt."""
        self.write(CHANCMD, 1, RESET)
        while self.read(CHANCMD, 1) & RESET:
            pass
        for n in range(ENTRIES):
            following = self.ring + 64 * ((n + 1) % ENTRIES)
            self.guest.memory.write(self.ring + 64 * n, DESCRIPTOR.pack(0, 0, 0, 0, following))
        self.guest.memory.write(self.completion, bytes(8))
        for register, value in ((CHANCMP, self.completion), (CHAINADDR, self.ring)):
            self.write(register, 4, value & 0xFFFFFFFF)
            self.write(register + 4, 4, value >> 32)
        self.issued = 0
        self.guest.write(0, INTRCTRL, 1, MASTER_ENABLE | VECTOR_PER_CHANNEL)
        self.write(CHANCTRL, 2, REARM)

    def read(self, register: int, width: int) -> int:
        return self.guest.read(0, self.base + register, width)

    def write(self, register: int, width: int, value: int) -> None:
        self.guest.write(0, self.base + register, width, value)

    @property
    def state(self) -> int:
        return self.read(CHANSTS, 8) & 7

    @property
    def finished(self) -> tuple[int, int]:
        """(address of the last finished descriptor, state) as the channel wrote them into guest memory."""
        (word,) = struct.unpack("<Q", self.guest.memory.read(self.completion, 8))
        return word & ~0x3F, word & 7

    def begin(self, copies: list[tuple[int, int, int]]) -> int:
        """Issue copies (source, destination, bytes), an interrupt after the last; the last descriptor's address."""
        address = 0
        for n, (source, destination, size) in enumerate(copies):
            address = self.ring + 64 * (self.issued % ENTRIES)
            following = self.ring + 64 * ((self.issued + 1) % ENTRIES)
            control = COMPLETION | (INTERRUPT if n == len(copies) - 1 else 0)
            self.guest.memory.write(address, DESCRIPTOR.pack(size, control, source, destination, following))
            self.issued += 1
        self.write(DMACOUNT, 2, self.issued & 0xFFFF)
        return address

    def end(self) -> None:
        """Wait for the interrupt, and ask for the next one."""
        self.guest.interrupts.wait(self.channel)
        self.write(CHANCTRL, 2, REARM)

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        """Copy and make sure: the interrupt came, the status names the last descriptor, no error, data is there."""
        wanted = [self.guest.memory.read(source, size) for source, _, size in copies]
        last = self.begin(copies)
        self.end()
        assert self.read(CHANERR, 4) == 0
        assert self.finished == (last, DONE)
        assert self.read(CHANSTS, 8) == last | DONE
        assert [self.guest.memory.read(to, size) for _, to, size in copies] == wanted
