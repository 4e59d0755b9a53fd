"""One channel of the I/OAT model: a chain of descriptors in the client's memory, worked off one by one.

It must not know the device's other registers or how an interrupt leaves the device. Where the hardware's documents are
silent the rule is marked (model); it is chosen to show a driver's mistake.
"""

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass

from vfu_server.model import Bus, BusError, Faults, Timer

XFERCAP = 20
"""log2 of the longest transfer."""
DESCRIPTOR_SECONDS = 5e-6
BYTES_PER_SECOND = 4e9
RESET_SECONDS = 20e-6

ACTIVE, DONE, SUSPENDED, HALTED = 0, 1, 2, 3

CTRL_INT_OFF = 0x001
CTRL_COMPLETION_ON_ERROR = 0x004
CTRL_ERROR_IRQ = 0x010
CTRL_IN_USE = 0x100
_CTRL_KEPT = 0x33C

ERR_SOURCE, ERR_DESTINATION, ERR_NEXT, ERR_ALIGNMENT, ERR_CHAIN = (1 << bit for bit in range(5))
ERR_COMMAND, ERR_INTEGRITY, ERR_READ, ERR_WRITE = 1 << 5, 1 << 6, 1 << 8, 1 << 9
ERR_CONTROL, ERR_LENGTH, ERR_COMPLETION = 1 << 10, 1 << 11, 1 << 12

DESC_IRQ, DESC_COMPLETION, DESC_NULL = 0x01, 0x08, 0x20
_DESC_RESERVED = 0x00FFF800
_DESC_SIZE = 64
_LAYOUT = struct.Struct("<IIQQQ")
_ADDRESS_END = 1 << 64


class Command(enum.IntEnum):
    """What CHANCMD takes. Start and append are of older versions."""

    NONE = 0
    SUSPEND = 0x04
    ABORT = 0x08
    RESUME = 0x10
    RESET = 0x20


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A descriptor of 64 bytes at `address`, as far as a copy uses it."""

    address: int
    size: int
    control: int
    source: int
    destination: int
    following: int

    @property
    def error(self) -> int:
        """The CHANERR bit that it deserves, or 0."""
        if self.control >> 24 or self.control & _DESC_RESERVED:
            return ERR_CONTROL
        if not 0 < self.size <= 1 << XFERCAP:
            return ERR_LENGTH
        if self.control & DESC_NULL:
            return 0
        if self.source + self.size > _ADDRESS_END:
            return ERR_SOURCE
        return ERR_DESTINATION if self.destination + self.size > _ADDRESS_END else 0


class Channel:
    """The registers of one channel and what they do.

    `interrupt` is called when one leaves the channel, `report` with the bits of each new error. A DMA by messages lets
    other accesses in between: after each one the channel looks whether it was stopped meanwhile.
    """

    def __init__(
        self, bus: Callable[[], Bus], faults: Faults, interrupt: Callable[[], None], report: Callable[[int], None]
    ) -> None:
        self._bus = bus
        self._faults = faults
        self._interrupt = interrupt
        self._report = report
        self._timer: Timer | None = None
        self._epoch = 0
        self.chanerr = 0
        self.reset()

    def reset(self) -> None:
        """All registers but CHANERR, which only a written 1 or a reset of the function clears."""
        self._stop()
        self.status = HALTED
        self.control = 0
        self.resetting = False
        self.dmacount = 0
        self.finished = 0
        self.last = 0
        self.chainaddr = 0
        self.chancmp = 0
        self.current = 0
        self.chanerr_mask = 0
        self._has_chain = False
        self._broken = False
        self._suspend = False

    def reset_function(self) -> None:
        """A reset of the whole function."""
        self.reset()
        self.chanerr = 0

    @property
    def chansts(self) -> int:
        """Address of the last finished descriptor, and the state."""
        return self.last | self.status

    def peek(self, name: str) -> int:
        """A register's value without what a read does."""
        match name:
            case "chanctrl":
                return self.control
            case "compatibility":
                return 2
            case "chancmd":
                return Command.RESET if self.resetting else 0
            case "chansts":
                return self.chansts
            case _:
                return int(getattr(self, name))

    def read(self, name: str) -> int:
        """A read of a register. CHANCTRL's in-use bit is set by the read that finds it clear: it claims the channel."""
        value = self.peek(name)
        if name == "chanctrl":
            self.control |= CTRL_IN_USE
        return value

    def write(self, name: str, value: int) -> None:
        """A write of a whole register. While a reset is under way (model) nothing is taken."""
        if self.resetting:
            return
        match name:
            case "chanctrl":
                off = self.control & CTRL_INT_OFF & ~value
                self.control = off | value & _CTRL_KEPT
            case "chancmd":
                self._command(value)
            case "dmacount":
                self.dmacount = value
                self._kick()
            case "chainaddr":
                self._begin_chain(value)
            case "chancmp":
                self.chancmp = value & ~7
            case "chanerr":
                self.chanerr &= ~value
            case "chanerr_mask":
                self.chanerr_mask = value

    # commands

    def _command(self, value: int) -> None:
        match value:
            case Command.NONE:
                pass
            case Command.SUSPEND:
                self._command_suspend()
            case Command.ABORT:
                if self.status != HALTED:
                    self._halt()
            case Command.RESUME:
                self._command_resume()
            case Command.RESET:
                self._stop()
                self.resetting = True
                self._timer = self._bus().call_later(RESET_SECONDS, self.reset)
            case _:
                self._fail(ERR_COMMAND)

    def _command_suspend(self) -> None:
        if self.status == HALTED:
            self._fail(ERR_COMMAND)
        elif self._faults.take("suspend-stuck"):
            return
        elif self.status == ACTIVE:
            self._suspend = True
        else:
            self.status = SUSPENDED

    def _command_resume(self) -> None:
        self._suspend = False
        if self.status == SUSPENDED:
            self.status = DONE
            self._kick()

    def _begin_chain(self, address: int) -> None:
        """A new chain, nothing of it finished. While the old one runs (model) that is a wrong chain address."""
        if self.status == ACTIVE:
            self._fail(ERR_CHAIN)
            return
        self.chainaddr = self.current = address
        self.finished = 0
        self._has_chain = True

    def _kick(self) -> None:
        """Go on if there is something left. A channel that an error or abort has halted waits for a reset."""
        idle = self.status in (DONE, HALTED) and not self._broken and not self.chanerr
        if not idle or self.finished == self.dmacount:
            return
        if not self._has_chain:
            self._fail(ERR_CHAIN)
            return
        self.status = ACTIVE
        self._later(DESCRIPTOR_SECONDS, self._fetch)

    # the chain

    def _fetch(self) -> None:
        if self._faults.take("halt"):
            self._fail(ERR_INTEGRITY)
            return
        if self.current % _DESC_SIZE:
            self._fail(ERR_ALIGNMENT)
            return
        epoch = self._epoch
        try:
            raw = self._bus().dma_read(self.current, _DESC_SIZE)
        except BusError:
            if epoch == self._epoch:
                self._fail(ERR_NEXT if self.finished else ERR_CHAIN)
            return
        if epoch != self._epoch:
            return
        descriptor = Descriptor(self.current, *_LAYOUT.unpack_from(raw))
        if descriptor.error:
            self._fail(descriptor.error)
        elif descriptor.control & DESC_NULL:
            self._finish(descriptor)
        else:
            self._later(descriptor.size / BYTES_PER_SECOND, lambda: self._copy(descriptor))

    def _copy(self, descriptor: Descriptor) -> None:
        epoch = self._epoch
        error = ERR_READ
        try:
            data = self._bus().dma_read(descriptor.source, descriptor.size)
            if epoch == self._epoch:
                error = ERR_WRITE
                self._bus().dma_write(descriptor.destination, data)
        except BusError:
            if epoch == self._epoch:
                self._fail(error)
            return
        if epoch == self._epoch:
            self._finish(descriptor)

    def _finish(self, descriptor: Descriptor) -> None:
        self.finished = (self.finished + 1) & 0xFFFF
        self.last = descriptor.address
        self.current = descriptor.following
        if self._suspend:
            self._suspend = False
            self.status = SUSPENDED
        else:
            self.status = ACTIVE if self.finished != self.dmacount else DONE
        if self.status == ACTIVE:
            self._later(DESCRIPTOR_SECONDS, self._fetch)
        if self._faults.take("lost-completion"):
            return
        epoch = self._epoch
        written = not descriptor.control & DESC_COMPLETION or self._write_completion()
        if epoch != self._epoch:
            return
        if not written:
            self._fail(ERR_COMPLETION)
        if descriptor.control & DESC_IRQ:
            self._signal()

    def _write_completion(self) -> bool:
        try:
            self._bus().dma_write(self.chancmp, self.chansts.to_bytes(8, "little"))
        except BusError:
            return False
        return True

    def _signal(self) -> None:
        """One interrupt, then none until CHANCTRL bit 0 is written."""
        if not self.control & CTRL_INT_OFF:
            self.control |= CTRL_INT_OFF
            self._interrupt()

    # ends

    def _fail(self, bits: int) -> None:
        """An error halts the channel. A masked one (model) does too, but raises no interrupt."""
        self.chanerr |= bits
        self._report(bits)
        self._halt()
        if self.control & CTRL_COMPLETION_ON_ERROR and not self._write_completion():
            self.chanerr |= ERR_COMPLETION
            self._report(ERR_COMPLETION)
        if self.control & CTRL_ERROR_IRQ and bits & ~self.chanerr_mask:
            self._signal()

    def _halt(self) -> None:
        self._stop()
        self.status = HALTED
        self._broken = True
        self._suspend = False

    def _stop(self) -> None:
        self._epoch += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _later(self, seconds: float, callback: Callable[[], None]) -> None:
        self._timer = self._bus().call_later(seconds, callback)
