"""A driver for an NVMe controller through our client: queues built by hand in guest memory, interrupts by MSI-X.

Registers and commands are those of NVM Express 1.4. One command at a time; it knows nothing of the server below.
"""

import struct
import time

from vfu_server.testing import Guest

VERSION, CONFIGURATION, STATUS, QUEUE_SIZES = 0x08, 0x14, 0x1C, 0x24
SUBMISSION_BASE, COMPLETION_BASE = 0x28, 0x30
DOORBELLS = 0x1000
ENABLE, READY = 1, 1
ENTRY_SIZES = 6 << 16 | 4 << 20
"""Entries of 64 and 16 bytes, as powers of two."""
PAGE = 4096
DEPTH = 8
BLOCK = 512
CREATE_SUBMISSION, CREATE_COMPLETION, IDENTIFY = 0x01, 0x05, 0x06
WRITE, READ = 0x01, 0x02
CONTIGUOUS, INTERRUPTS = 1, 2
CONTROLLER = 1


class Queue:
    """A pair of queues of one page each at `iova`, whose completions are told by MSI-X vector `number`."""

    def __init__(self, number: int, iova: int) -> None:
        self.number = number
        self.submission, self.completion = iova, iova + PAGE
        self.tail = self.head = 0
        self.phase = 1


class NvmeDriver:
    """A controller in BAR 0 of a guest that has started. Uses six pages of guest memory from `iova` on."""

    def __init__(self, guest: Guest, iova: int, seconds: float) -> None:
        self.guest = guest
        self.seconds = seconds
        self.admin, self.blocks = Queue(0, iova), Queue(1, iova + 2 * PAGE)
        self.data = iova + 4 * PAGE
        self._command = 0

    def start(self) -> None:
        """Disabled, queues told, enabled."""
        self.stop()
        self.guest.memory.write(self.admin.submission, bytes(4 * PAGE))
        self.guest.write(0, QUEUE_SIZES, 4, (DEPTH - 1) << 16 | (DEPTH - 1))
        self._write_address(SUBMISSION_BASE, self.admin.submission)
        self._write_address(COMPLETION_BASE, self.admin.completion)
        self.guest.write(0, CONFIGURATION, 4, ENTRY_SIZES | ENABLE)
        self._wait_ready(READY)

    def stop(self) -> None:
        """Not enabled."""
        self.guest.write(0, CONFIGURATION, 4, 0)
        self._wait_ready(0)

    @property
    def ready(self) -> int:
        """The ready bit."""
        return self.guest.read(0, STATUS, 4) & READY

    def identify(self) -> bytes:
        """The page in which the controller describes itself."""
        self.guest.memory.write(self.data, bytes(PAGE))
        self.run(self.admin, IDENTIFY, self.data, 0, CONTROLLER)
        return self.guest.memory.read(self.data, PAGE)

    def create_queues(self) -> None:
        """The queues for blocks."""
        queue = self.blocks
        shape = (DEPTH - 1) << 16 | queue.number
        vector = queue.number << 16 | INTERRUPTS | CONTIGUOUS
        self.run(self.admin, CREATE_COMPLETION, queue.completion, 0, shape, vector)
        self.run(self.admin, CREATE_SUBMISSION, queue.submission, 0, shape, queue.number << 16 | CONTIGUOUS)

    def write_page(self, block: int, data: bytes) -> None:
        """A page of data to the namespace."""
        self.guest.memory.write(self.data, data)
        self.run(self.blocks, WRITE, self.data, 1, block & 0xFFFFFFFF, block >> 32, PAGE // BLOCK - 1)

    def read_page(self, block: int) -> bytes:
        """A page of data from the namespace, by way of another page of memory."""
        at = self.data + PAGE
        self.guest.memory.write(at, bytes(PAGE))
        self.run(self.blocks, READ, at, 1, block & 0xFFFFFFFF, block >> 32, PAGE // BLOCK - 1)
        return self.guest.memory.read(at, PAGE)

    def run(self, queue: Queue, opcode: int, address: int, namespace: int, *words: int) -> None:
        """One command, submitted, its interrupt waited for, its completion checked and taken."""
        self._command = self._command + 1 & 0xFFFF
        entry = struct.pack("<BBHI16xQQ", opcode, 0, self._command, namespace, address, 0)
        entry += struct.pack("<6I", *words, *(0,) * (6 - len(words)))
        self.guest.memory.write(queue.submission + 64 * queue.tail, entry)
        queue.tail = (queue.tail + 1) % DEPTH
        self.guest.write(0, DOORBELLS + 8 * queue.number, 4, queue.tail)
        if self.guest.interrupts is None:
            raise AssertionError("the driver's interrupts are not armed")
        self.guest.interrupts.wait(queue.number, self.seconds)
        done = self.guest.memory.read(queue.completion + 16 * queue.head, 16)
        _, _, _, command, status = struct.unpack("<IIIHH", done)
        if (command, status) != (self._command, queue.phase):
            raise AssertionError(f"command {self._command} ({opcode:#x}): completion {done.hex()}, phase {queue.phase}")
        queue.head = (queue.head + 1) % DEPTH
        queue.phase ^= not queue.head
        self.guest.write(0, DOORBELLS + 8 * queue.number + 4, 4, queue.head)

    def _write_address(self, register: int, value: int) -> None:
        self.guest.write(0, register, 4, value & 0xFFFFFFFF)
        self.guest.write(0, register + 4, 4, value >> 32)

    def _wait_ready(self, wanted: int) -> None:
        deadline = time.monotonic() + self.seconds
        while self.ready != wanted:
            if time.monotonic() > deadline:
                raise AssertionError(f"the controller's ready bit is not {wanted} after {self.seconds:g} s")
