"""The edu model and QEMU's own edu, step by step: what one answers to an access the other must answer too.

Both get the same accesses and the same virtual time. Compared are every value read, the INTx line (as STATUS of config
space shows it), the messages sent, and the memory that DMA has written.
"""

import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugins.generic_dmaq.models.edu import EduModel
from tests.lanes import lane_unavailable
from tests.plugins.bus import FakeBus
from tests.qemu.qtest import Qtest, machine
from tools.debian_root import RootError
from tools.qemu_root import qemu_root
from vfu_server.model_server.function import aligned_parts

pytestmark = [pytest.mark.qemu, pytest.mark.deadline(300)]

SLOT = 4
BAR = 0xE0000000
RAM = 64 << 20
MAILBOX = 0x200000
MESSAGE = 0x4D53
PAGE = 4096
BUFFER = 0x40000

ID, LIVENESS, FACTORIAL, STATUS, IRQ_STATUS, RAISE, ACK = 0x00, 0x04, 0x08, 0x20, 0x24, 0x60, 0x64
SOURCE, DESTINATION, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
REGISTERS = (ID, LIVENESS, FACTORIAL, STATUS, IRQ_STATUS, RAISE, ACK, SOURCE, DESTINATION, COUNT, COMMAND)


class Pair:
    """Both devices; each method does the same to both and compares."""

    def __init__(self, qemu: Qtest) -> None:
        self.qemu = qemu
        self.model = EduModel()
        self.bus = FakeBus(self.model, RAM)
        self.bus.config_write(4, b"\0\0")
        self.place()

    def place(self) -> None:
        """Give the device its BAR, and its messages an address in memory where they can be seen."""
        self.config_write(0x10, 4, BAR)
        self.config_write(0x44, 4, MAILBOX)
        self.config_write(0x48, 4, 0)
        self.config_write(0x4C, 2, MESSAGE)
        self.config_write(0x04, 2, 0x6)

    def read(self, offset: int, width: int) -> int:
        theirs, ours = self.qemu.read(BAR + offset, width), 0
        for at, part in aligned_parts(offset, width):
            ours |= self.model.read(0, at, part) << 8 * (at - offset)
        assert (offset, width, hex(ours)) == (offset, width, hex(theirs))
        return ours

    def write(self, offset: int, width: int, value: int) -> None:
        value &= (1 << 8 * width) - 1
        if offset == FACTORIAL and width == 4:
            self.write(ACK, 4, 1)
        self.qemu.write(BAR + offset, width, value)
        for at, part in aligned_parts(offset, width):
            self.model.write(0, at, part, value >> 8 * (at - offset) & ((1 << 8 * part) - 1))
        if self.model.state()["status"] & 1:
            self.finish_factorial()
        self.compare_interrupts()

    def finish_factorial(self) -> None:
        """The real one computes in a thread of its own, in real time, and its interrupt comes a while behind the rest.

        The interrupt's bit must not be set before.
        """
        deadline = time.monotonic() + 60
        wanted = self.model.state()["status"] & 0x80
        while self.qemu.read(BAR + STATUS, 4) & 1 or (wanted and not self.qemu.read(BAR + IRQ_STATUS, 4) & 1):
            assert time.monotonic() < deadline
        if self.model.read(0, COMMAND, 4) & 1:
            self.bus.step(1e-5)
        else:
            self.bus.run()

    def step(self, milliseconds: int) -> None:
        destination = self.model.state()["dma_destination"]
        self.qemu.clock_step(milliseconds * 1_000_000)
        self.bus.step(milliseconds / 1000)
        self.compare_memory((destination & 0xFFFFFFF) - 16, PAGE + 32)
        self.compare_interrupts()

    def config_read(self, offset: int, width: int) -> int:
        theirs, ours = self.qemu.config_read(SLOT, offset, width), self.model.config.get(offset, width)
        assert (hex(offset), width, hex(ours)) == (hex(offset), width, hex(theirs))
        return ours

    def config_write(self, offset: int, width: int, value: int) -> None:
        value &= (1 << 8 * width) - 1
        self.qemu.config_write(SLOT, offset, width, value)
        self.bus.config_write(offset, value.to_bytes(width, "little"))

    def store(self, address: int, data: bytes) -> None:
        self.qemu.store(address, data)
        self.bus.memory[address : address + len(data)] = data

    def compare_memory(self, address: int, length: int) -> None:
        address = max(0, address)
        length = min(length, RAM - address)
        if length > 0 and not 0x90000 <= address < 0x100000:
            assert self.bus.memory[address : address + length] == self.qemu.load(address, length)

    def compare_interrupts(self) -> None:
        sent = self.qemu.read(MAILBOX, 4)
        assert [MESSAGE] * len(self.bus.take_messages()) == ([sent] if sent else [])
        self.qemu.write(MAILBOX, 4, 0)
        self.config_read(6, 2)

    def compare_all(self) -> None:
        """All registers in all widths, and the buffer."""
        for register in REGISTERS:
            for width in (1, 2, 4, 8):
                self.read(register, width)
        for offset in range(0, 64, 4):
            self.config_read(offset, 4)
        self.compare_interrupts()

    def transfer(self, source: int, destination: int, count: int, command: int) -> None:
        for offset, value in ((SOURCE, source), (DESTINATION, destination), (COUNT, count), (COMMAND, command | 1)):
            self.write(offset, 8, value)
        self.step(100)

    def settle(self) -> None:
        """The same known state, whatever was before."""
        self.place()
        self.config_write(0x42, 2, 0)
        self.step(100)
        self.transfer(0x300000, BUFFER, PAGE, 0)
        for offset in (SOURCE, DESTINATION, COUNT):
            self.write(offset, 8, 0)
        self.write(STATUS, 4, 0)
        self.write(ACK, 4, 0xFFFFFFFF)
        self.write(LIVENESS, 4, 0)
        self.write(FACTORIAL, 4, 0)
        self.compare_all()


@pytest.fixture(scope="module")
def devices():
    try:
        root = qemu_root()
    except RootError as error:
        lane_unavailable(str(error))
    with machine(root, ["-device", f"edu,addr={SLOT}"]) as qemu:
        yield Pair(qemu)


@pytest.fixture
def pair(devices):
    devices.settle()
    return devices


def test_every_offset_near_the_registers_in_every_width(pair: Pair) -> None:
    for offset in [*range(0xC0), 0x3FFFC, 0x40000, 0x40008, 0x40FF8, 0xFFFF8]:
        for width in (1, 2, 4, 8):
            if offset + width <= 1 << 20:
                pair.read(offset, width)


def test_writes_in_every_width_to_every_offset(pair: Pair) -> None:
    for offset in [*range(0x98), *range(0x99, 0xC0), 0x40000]:
        for width in (1, 2, 4, 8):
            pair.write(offset, width, 0x0000_0181_0000_0305)
        pair.write(ACK, 4, 0xFFFFFFFF)
    pair.compare_all()


@pytest.mark.parametrize("number", [0, 1, 2, 5, 12, 13, 20, 31, 32, 33, 34, 35, 1000, 1 << 20])
def test_factorials(pair: Pair, number: int) -> None:
    pair.write(STATUS, 4, 0x80 if number % 2 else 0)
    pair.write(FACTORIAL, 4, number)
    pair.compare_all()


def test_while_it_computes(pair: Pair) -> None:
    """A number that takes the real one long enough to look."""
    for write in (lambda o, v: pair.qemu.write(BAR + o, 4, v), lambda o, v: pair.model.write(0, o, 4, v)):
        write(FACTORIAL, 0x20000000)
        write(FACTORIAL, 7)
        write(STATUS, 0x80)
    assert pair.read(STATUS, 4) == 0x81
    assert pair.read(FACTORIAL, 4) == 0x20000000
    pair.finish_factorial()
    pair.compare_all()


@pytest.mark.parametrize("milliseconds", [1, 50, 99, 100, 101])
def test_time_of_a_transfer(pair: Pair, milliseconds: int) -> None:
    pair.store(0x100000, b"\x5a" * 64)
    pair.transfer(0x100000, BUFFER, 64, 0)
    for offset, value in ((SOURCE, BUFFER), (DESTINATION, 0x110000), (COUNT, 64), (COMMAND, 7)):
        pair.write(offset, 8, value)
    pair.step(milliseconds)
    pair.write(SOURCE, 8, 0x1234)
    pair.write(COMMAND, 8, 5)
    pair.compare_all()
    pair.step(200)
    pair.compare_all()


@pytest.mark.parametrize(
    ("inside", "count"),
    [
        (BUFFER, 0), (BUFFER, 1), (BUFFER, 0x1000), (BUFFER, 0x1001), (BUFFER - 1, 1), (BUFFER + 0xFFF, 1),
        (BUFFER + 0xFFF, 2), (BUFFER + 0x1000, 0), (BUFFER + 0x1000, 1), (BUFFER + 0x1001, 0), (0, 16),
        ((1 << 64) - 1, 1), (BUFFER, (1 << 64) - 1), ((1 << 64) - 0x1000, BUFFER + 0x1000),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [4, 6])
def test_what_the_buffer_side_may_be(pair: Pair, inside: int, count: int, command: int) -> None:
    pair.store(0x100000, bytes(range(256)) * 33)
    outside = 0x100000 if command == 4 else 0x120000
    pair.transfer(*((outside, inside) if command == 4 else (inside, outside)), count, command)
    pair.transfer(BUFFER, 0x130000, PAGE, 2)
    pair.compare_all()


@pytest.mark.parametrize("address", [0x1000, 0x7_0010_0000, RAM - 0x800, RAM, 0x5000000, 0xFFFFFFFFF0100000])
@pytest.mark.parametrize("master", [True, False])
def test_the_memory_side(pair: Pair, address: int, master: bool) -> None:
    pair.store(0x100000, b"\x66" * PAGE)
    pair.store(0x1000, b"\x77" * PAGE)
    pair.store(RAM - PAGE, b"\x88" * PAGE)
    pair.transfer(0x100000, BUFFER, PAGE, 0)
    pair.config_write(4, 2, 6 if master else 2)
    pair.transfer(address, BUFFER, PAGE, 4)
    pair.config_write(4, 2, 6)
    pair.transfer(BUFFER, 0x140000, PAGE, 2)
    pair.config_write(4, 2, 6 if master else 2)
    pair.transfer(BUFFER, address, PAGE, 6)
    pair.config_write(4, 2, 6)
    pair.compare_all()


def test_intx_and_messages(pair: Pair) -> None:
    for value in (1, 0, 4, 0):
        pair.write(RAISE, 4, value)
    pair.write(ACK, 4, 1)
    pair.config_write(0x42, 2, 1)
    assert not pair.config_read(6, 2) & 8, "switching MSI on lowers the line"
    for value in (0, 1, 1):
        pair.write(RAISE, 4, value)
    pair.write(ACK, 4, 0xFFFFFFFF)
    pair.write(RAISE, 4, 0)
    pair.config_write(4, 2, 2)
    pair.write(RAISE, 4, 2)
    pair.config_write(4, 2, 6)
    pair.config_write(0x42, 2, 0)
    pair.compare_all()
    pair.write(RAISE, 4, 0)
    pair.compare_all()
    pair.write(ACK, 4, 2)
    pair.compare_all()


def test_a_machine_reset(pair: Pair) -> None:
    pair.write(LIVENESS, 4, 0x12345678)
    pair.write(FACTORIAL, 4, 10)
    pair.write(RAISE, 4, 0x30)
    pair.store(0x100000, b"\x99" * 64)
    for offset, value in ((SOURCE, 0x100000), (DESTINATION, BUFFER), (COUNT, 64), (COMMAND, 5)):
        pair.write(offset, 8, value)
    pair.config_write(0x42, 2, 1)
    pair.config_write(0x3C, 1, 0x0A)
    pair.config_write(0x50, 4, 0x13579BDF)
    pair.step(50)
    pair.qemu.reset()
    pair.bus.reset()
    for offset in range(0, 256, 4):
        pair.config_read(offset, 4)
    pair.place()
    pair.compare_all()
    pair.step(50)
    pair.compare_all()


config_writes = st.tuples(st.integers(0, 0xFF), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writes=st.lists(config_writes, max_size=20))
def test_config_space(pair: Pair, writes) -> None:
    for offset, width, value in writes:
        offset -= offset % width
        pair.config_write(offset, width, value)
        pair.config_read(offset & ~3, 4)
    for offset in range(0, 256, 4):
        pair.config_read(offset, 4)


addresses = st.one_of(
    st.integers(BUFFER - 2, BUFFER + 0x1002),
    st.sampled_from([0x100000, 0x100FFC, 0x150123, RAM - 0x900, RAM + 64, 0x5000000, 0x9_0010_0040]),
)
counts = st.one_of(st.integers(0, 0x40), st.integers(0xFF0, 0x1008), st.sampled_from([1 << 32, (1 << 64) - 1]))
accesses: list[st.SearchStrategy[Callable[[Pair], object]]] = [
    st.builds(
        lambda offset, width: lambda pair: pair.read(offset, width),
        st.one_of(st.sampled_from(REGISTERS), st.integers(0, 0xC0), st.integers(0, (1 << 20) - 8)),
        st.sampled_from([1, 2, 4, 8]),
    ),
    st.builds(
        lambda offset, width, value: lambda pair: pair.write(offset, width, value),
        st.sampled_from([LIVENESS, STATUS, RAISE, ACK, 0x24, 0x0C, 0x62, 0x84]),
        st.sampled_from([1, 2, 4, 4, 4, 8]),
        st.one_of(st.sampled_from([0, 1, 0x80, 0x100, 0x101]), st.integers(0, (1 << 64) - 1)),
    ),
    st.builds(lambda value: lambda pair: pair.write(FACTORIAL, 4, value), st.integers(0, 5000)),
    st.builds(
        lambda offset, width, value: lambda pair: pair.write(offset, width, value),
        st.sampled_from([SOURCE, DESTINATION]),
        st.sampled_from([4, 8, 8]),
        addresses,
    ),
    st.builds(
        lambda width, value: lambda pair: pair.write(COUNT, width, value), st.sampled_from([4, 8]), counts
    ),
    st.builds(
        lambda width, value: lambda pair: pair.write(COMMAND, width, value),
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(st.sampled_from([1, 3, 5, 7]), st.integers(0, 0xFFF)),
    ),
    st.builds(lambda milliseconds: lambda pair: pair.step(milliseconds), st.integers(1, 130)),
    st.builds(lambda on: lambda pair: pair.config_write(0x42, 2, on), st.integers(0, 1)),
    st.builds(lambda on: lambda pair: pair.config_write(4, 2, 2 | on << 2), st.integers(0, 1)),
    st.builds(
        lambda source, destination, count, command: lambda pair: pair.transfer(source, destination, count, command),
        addresses, addresses, counts, st.sampled_from([0, 2, 4, 6]),
    ),
]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.one_of(accesses), max_size=25), seed=st.binary(min_size=16, max_size=16))
def test_any_sequence(devices: Pair, steps, seed: bytes) -> None:
    devices.settle()
    devices.store(0x100000, seed * 512)
    for step in steps:
        step(devices)
    devices.compare_all()
