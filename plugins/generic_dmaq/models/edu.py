"""QEMU's educational device as a model, access for access.

Behaviour as of QEMU 11.1 (hw/misc/edu.c), compared with the real one in tests/qemu. It must not know the plugin that
saves and restores it. Time is the bus's: a transfer takes 100 ms, a factorial a nanosecond for each multiplication.

Faults to order: `dma-stuck` (the running bit never clears), `dma-drop` (a transfer moves nothing), `bit-flip` (one bit
of a transfer is wrong), `factorial-stuck` (the computing bit never clears).
"""

import zlib
from collections.abc import Iterator, Mapping

from plugins.generic_dmaq.registers import load_blocks
from vfu_server.model import Bar, BusError, Interrupts, Model
from vfu_server.pciconfig import PciConfig
from vfu_server.regmap import READABLE

BAR_SIZE = 1 << 20
BUFFER = 0x40000
BUFFER_SIZE = 4096
DMA_MASK = (1 << 28) - 1
DMA_SECONDS = 0.1
MULTIPLICATION_SECONDS = 1e-9
PAGE = 4096

COMPUTING = 0x01
IRQ_WANTED = 0x80
IRQ_FACTORIAL = 0x001
IRQ_DMA = 0x100
RUN = 1
FROM_BUFFER = 2
DMA_IRQ = 4

_WIDE_FROM = 0x80


def factorial(number: int) -> int:
    """`number`! modulo 2^32. A product that has become 0 stays 0: at most 34 multiplications."""
    product = 1
    while number > 0 and product:
        product = product * number & 0xFFFFFFFF
        number -= 1
    return product


class EduModel(Model):
    """The device 1234:11e8. Conventional PCI without any function reset; the whole state survives a bus reset."""

    def __init__(self, dma_mask: int = DMA_MASK) -> None:
        super().__init__()
        self.bars = {0: Bar(BAR_SIZE)}
        self.interrupts = Interrupts(intx=True, msi=1)
        self.config = PciConfig(
            vendor=0x1234,
            device=0x11E8,
            class_code=0x00FF00,
            revision=0x10,
            subsystem_vendor=0x1AF4,
            subsystem=0x1100,
            interrupt_pin=1,
            scratch=True,
        )
        self.config.add_bar(0, BAR_SIZE)
        self.config.add_msi(0x40, 1)
        self._block = load_blocks("edu")[0]
        self._values = {r.name: r.reset or 0 for r in self._block if r.access in READABLE}
        self._buffer = bytearray(BUFFER_SIZE)
        self._dma_mask = dma_mask

    def read(self, region: int, offset: int, width: int) -> int:
        """Narrow or unaligned reads never reach the device and give 0; what is no register gives all ones."""
        if width < 4 or offset % width:
            return 0
        ones = (1 << 8 * width) - 1
        register = self._block.at(offset)
        if register is None or register.offset != offset or (width == 8 and offset < _WIDE_FROM):
            return ones
        return self._values.get(register.name, ones) & ones

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """A write of 4 bytes to a 64-bit register sets all of it."""
        register = self._block.at(offset)
        if width < 4 or offset % width or register is None or register.offset != offset:
            return
        if width == 8 and offset < _WIDE_FROM:
            return
        match register.name:
            case "liveness":
                self._values["liveness"] = ~value & 0xFFFFFFFF
            case "factorial":
                self._start_factorial(value)
            case "status":
                self._values["status"] = (self._values["status"] & ~IRQ_WANTED) | (value & IRQ_WANTED)
            case "irq_raise":
                self._raise(value)
            case "irq_ack":
                self._acknowledge(value)
            case "dma_source" | "dma_destination" | "dma_count":
                if not self._values["dma_command"] & RUN:
                    self._values[register.name] = value
            case "dma_command":
                self._start_dma(value)

    def state(self) -> Mapping[str, int]:
        """All registers, and the sum of the buffer."""
        return {**self._values, "buffer_crc32": zlib.crc32(self._buffer)}

    # interrupts

    def _raise(self, bits: int) -> None:
        self._values["irq_status"] |= bits
        if not self._values["irq_status"]:
            return
        if self.bus.messages_enabled:
            self.bus.message(0)
        else:
            self.bus.intx(True)

    def _acknowledge(self, bits: int) -> None:
        self._values["irq_status"] &= ~bits
        if not self._values["irq_status"] and not self.bus.messages_enabled:
            self.bus.intx(False)

    # factorial

    def _start_factorial(self, value: int) -> None:
        if self._values["status"] & COMPUTING:
            return
        self._values["factorial"] = value
        self._values["status"] |= COMPUTING
        if not self.faults.take("factorial-stuck"):
            self.bus.call_later(value * MULTIPLICATION_SECONDS, self._end_factorial)

    def _end_factorial(self) -> None:
        self._values["factorial"] = factorial(self._values["factorial"])
        self._values["status"] &= ~COMPUTING
        if self._values["status"] & IRQ_WANTED:
            self._raise(IRQ_FACTORIAL)

    # DMA

    def _start_dma(self, command: int) -> None:
        if self._values["dma_command"] & RUN or not command & RUN:
            return
        self._values["dma_command"] = command
        if not self.faults.take("dma-stuck"):
            self.bus.call_later(DMA_SECONDS, self._end_dma)

    def _end_dma(self) -> None:
        command, count = self._values["dma_command"], self._values["dma_count"]
        source, destination = self._values["dma_source"], self._values["dma_destination"]
        inside = source if command & FROM_BUFFER else destination
        if inside >= BUFFER and inside + count <= BUFFER + BUFFER_SIZE and not self.faults.take("dma-drop"):
            at = inside - BUFFER
            if command & FROM_BUFFER:
                self._store(destination & self._dma_mask, self._damaged(bytes(self._buffer[at : at + count])))
            else:
                self._buffer[at : at + count] = self._damaged(self._load(source & self._dma_mask, count))
        self._values["dma_command"] &= ~RUN
        if command & DMA_IRQ:
            self._raise(IRQ_DMA)

    def _load(self, address: int, count: int) -> bytes:
        """What no memory answers reads 0, and nobody is told."""
        found = bytearray()
        for at, length in _pages(address, count):
            try:
                found += self.bus.dma_read(at, length)
            except BusError:
                found += bytes(length)
        return bytes(found)

    def _store(self, address: int, data: bytes) -> None:
        """What no memory takes is lost, and nobody is told."""
        for at, length in _pages(address, len(data)):
            try:
                self.bus.dma_write(at, data[at - address : at - address + length])
            except BusError:
                continue

    def _damaged(self, data: bytes) -> bytes:
        if data and self.faults.take("bit-flip"):
            return data[:-1] + bytes([data[-1] ^ 1])
        return data


def _pages(address: int, count: int) -> Iterator[tuple[int, int]]:
    """`(address, length)` of the parts of a range that lie within one page each."""
    while count:
        length = min(count, PAGE - address % PAGE)
        yield address, length
        address, count = address + length, count - length
