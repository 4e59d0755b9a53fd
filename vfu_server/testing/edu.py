"""A guest's driver for QEMU's teaching device `edu` (1234:11e8): factorials, DMA and interrupts.

Registers and behaviour are those of hw/misc/edu.c. It drives through a `Guest` and knows nothing of the server below.
"""

import time

from vfu_server.errors import DeadlineError, VfuServerError
from vfu_server.testing.guest import Guest
from vfu_server.uapi import IrqIndex

VENDOR_ID, DEVICE_ID = 0x1234, 0x11E8
IDENTIFICATION = 0x010000ED
BUFFER = 0x40000
"""Where the device sees its own buffer of BUFFER_SIZE bytes."""
BUFFER_SIZE = 4096
DMA_MASK = (1 << 28) - 1
"""The device cuts addresses of guest memory to 28 bits."""

REG_ID = 0x00
REG_LIVENESS = 0x04
REG_FACTORIAL = 0x08
REG_STATUS = 0x20
REG_IRQ_STATUS = 0x24
REG_IRQ_RAISE = 0x60
REG_IRQ_ACK = 0x64
REG_DMA_SOURCE = 0x80
REG_DMA_DESTINATION = 0x88
REG_DMA_COUNT = 0x90
REG_DMA_COMMAND = 0x98

STATUS_COMPUTING = 0x01
STATUS_IRQ_WANTED = 0x80
DMA_RUN = 0x1
DMA_FROM_DEVICE = 0x2
DMA_IRQ = 0x4
IRQ_FACTORIAL = 0x1
IRQ_DMA = 0x100

_POLL_SECONDS = 0.002


class EduDriver:
    """Drives an edu device in BAR 0 of `guest`, which was started. Waits end after `timeout` seconds: DeadlineError.

    With interrupts in use (`use_msi`, `use_intx`, or `by_interrupt` if the guest has armed them already, as after a
    migration) waits are for interrupts; without, registers are polled.
    """

    def __init__(self, guest: Guest, *, timeout: float = 5.0, by_interrupt: bool = False) -> None:
        self.guest = guest
        self.timeout = timeout
        self._by_interrupt = by_interrupt
        identification = self.read32(REG_ID)
        if identification != IDENTIFICATION:
            raise VfuServerError(f"this is no edu device: it identifies itself as {identification:#010x}")

    def read32(self, offset: int) -> int:
        """A 32-bit register."""
        return self.guest.read(0, offset, 4)

    def write32(self, offset: int, value: int) -> None:
        """Write a 32-bit register."""
        self.guest.write(0, offset, 4, value)

    # interrupts

    def use_msi(self) -> None:
        """Take interrupts as MSI."""
        self.guest.enable_msi(1)
        self._by_interrupt = True

    def use_intx(self) -> None:
        """Take interrupts from the pin."""
        if self.guest.interrupts is None or self.guest.interrupts.index != IrqIndex.INTX:
            self.guest.disable_interrupts()
            if self.guest.enable_intx() is None:
                raise VfuServerError("the device has no interrupt pin")
        self._by_interrupt = True

    def wait_interrupt(self, bit: int) -> None:
        """Wait until interrupt status has `bit`, and acknowledge it; other bits stay. DeadlineError."""
        interrupts = self.guest.interrupts
        if interrupts is None:
            raise VfuServerError("the guest has armed no interrupt")
        deadline = time.monotonic() + self.timeout
        while not self.read32(REG_IRQ_STATUS) & bit:
            interrupts.wait(0, max(0.0, deadline - time.monotonic()))
            if interrupts.index == IrqIndex.INTX and not self.read32(REG_IRQ_STATUS) & bit:
                interrupts.unmask()
        self.acknowledge(bit)
        interrupts.count(0)

    def acknowledge(self, bits: int) -> None:
        """Clear interrupt status bits, then unmask the pin."""
        self.write32(REG_IRQ_ACK, bits)
        interrupts = self.guest.interrupts
        if interrupts is not None and interrupts.index == IrqIndex.INTX:
            interrupts.unmask()

    def raise_interrupt(self, bits: int) -> None:
        """Have the device set interrupt status bits and signal."""
        self.write32(REG_IRQ_RAISE, bits)

    # what the device does

    def liveness(self, value: int) -> int:
        """Write the liveness register and read it: the device answers the complement."""
        self.write32(REG_LIVENESS, value)
        return self.read32(REG_LIVENESS)

    def factorial(self, n: int) -> int:
        """The factorial of `n` modulo 2**32, as the device computes it."""
        self.begin_factorial(n)
        return self.finish_factorial()

    def begin_factorial(self, n: int) -> None:
        """Start a computation; the device must be idle."""
        self.write32(REG_STATUS, STATUS_IRQ_WANTED if self._by_interrupt else 0)
        self.write32(REG_FACTORIAL, n)

    def finish_factorial(self) -> int:
        """Wait for the computation that was begun, and its result."""
        if self._by_interrupt:
            self.wait_interrupt(IRQ_FACTORIAL)
        self._poll(REG_STATUS, STATUS_COMPUTING, "the factorial")
        return self.read32(REG_FACTORIAL)

    def copy_to_device(self, iova: int, count: int, at: int = 0) -> None:
        """DMA from guest memory into the device's buffer. Takes the device 100 ms."""
        self.begin_dma(iova, BUFFER + at, count, 0)
        self.finish_dma()

    def copy_from_device(self, iova: int, count: int, at: int = 0) -> None:
        """DMA from the device's buffer into guest memory. Takes the device 100 ms."""
        self.begin_dma(BUFFER + at, iova, count, DMA_FROM_DEVICE)
        self.finish_dma()

    def begin_dma(self, source: int, destination: int, count: int, direction: int) -> None:
        """Start a transfer; the device must be idle."""
        self.guest.write(0, REG_DMA_SOURCE, 8, source)
        self.guest.write(0, REG_DMA_DESTINATION, 8, destination)
        self.guest.write(0, REG_DMA_COUNT, 8, count)
        irq = DMA_IRQ if self._by_interrupt else 0
        self.guest.write(0, REG_DMA_COMMAND, 8, DMA_RUN | direction | irq)

    def finish_dma(self) -> None:
        """Wait for the transfer that was begun."""
        if self._by_interrupt:
            self.wait_interrupt(IRQ_DMA)
        self._poll(REG_DMA_COMMAND, DMA_RUN, "the DMA transfer")

    def _poll(self, offset: int, bit: int, what: str) -> None:
        deadline = time.monotonic() + self.timeout
        while self.read32(offset) & bit:
            if time.monotonic() > deadline:
                raise DeadlineError(f"{what} did not end within {self.timeout:g} s")
            # the device may need guest memory by messages meanwhile
            self.guest.client.serve(_POLL_SECONDS)
