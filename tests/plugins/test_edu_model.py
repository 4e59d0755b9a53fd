"""The edu model on a bus of the test's own: every fact of the device's description."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.generic_dmaq.models.edu import EduModel, factorial
from tests.plugins.bus import FakeBus
from vfu_server.model import Interrupts

ID, LIVENESS, FACTORIAL, STATUS, IRQ_STATUS, RAISE, ACK = 0x00, 0x04, 0x08, 0x20, 0x24, 0x60, 0x64
SOURCE, DESTINATION, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
BUFFER = 0x40000
ONES4, ONES8 = (1 << 32) - 1, (1 << 64) - 1


class Edu:
    """The device as its driver has it."""

    def __init__(self, **options) -> None:
        self.model = EduModel(**options)
        self.bus = FakeBus(self.model)

    def read(self, offset: int, width: int = 4) -> int:
        return self.model.read(0, offset, width)

    def write(self, offset: int, value: int, width: int = 4) -> None:
        self.model.write(0, offset, width, value)

    def transfer(self, source: int, destination: int, count: int, command: int = 1) -> None:
        for offset, value in ((SOURCE, source), (DESTINATION, destination), (COUNT, count), (COMMAND, command)):
            self.write(offset, value, 8)

    def move(self, *args) -> None:
        self.transfer(*args)
        self.bus.step(0.1)
        assert not self.read(COMMAND, 8) & 1

    def buffer(self) -> bytes:
        """The 4 KiB buffer, by way of the device."""
        self.bus.memory[0xF0000:0xF1000] = bytes(4096)
        self.move(BUFFER, 0xF0000, 0x1000, 3)
        return bytes(self.bus.memory[0xF0000:0xF1000])

    def use_msi(self, on: bool = True) -> None:
        self.model.config.write(0x42, bytes([int(on)]))


@pytest.fixture
def edu() -> Edu:
    return Edu()


def test_identity(edu: Edu) -> None:
    config = edu.model.config
    assert [config.get(0, 4), config.get(8, 4), config.get(0x2C, 4)] == [0x11E81234, 0x00FF0010, 0x11001AF4]
    assert (config.interrupt_pin, config.is_express, config.size) == (1, False, 256)
    assert edu.model.interrupts == Interrupts(intx=True, msi=1, msix=0)
    assert config.bar_sizes == {0: 1 << 20}
    assert (config.get(0x34, 1), config.get(0x40, 4)) == (0x40, 0x00800005)
    assert not edu.model.can_reset


REGISTERS = (ID, LIVENESS, FACTORIAL, STATUS, IRQ_STATUS, SOURCE, DESTINATION, COUNT, COMMAND)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 0x40, 0x80, 0x98, 0x40000, 0xFFFFE])
def test_narrow_accesses_never_reach_the_device(edu: Edu, offset: int, width: int) -> None:
    assert edu.read(offset, width) == 0
    before = edu.model.state()
    edu.write(offset, 0x81, width)
    assert edu.model.state() == before


@pytest.mark.parametrize(("offset", "width"), [(1, 4), (2, 4), (6, 4), (0x82, 4), (0x84, 8), (0x9C, 8), (4, 8)])
def test_unaligned_accesses_never_reach_the_device(edu: Edu, offset: int, width: int) -> None:
    assert edu.read(offset, width) == 0
    before = edu.model.state()
    edu.write(offset, ONES8 >> (64 - 8 * width), width)
    assert edu.model.state() == before


@pytest.mark.parametrize("offset", [0x00, 0x08, 0x20, 0x28, 0x60, 0x78])
def test_eight_bytes_below_0x80(edu: Edu, offset: int) -> None:
    assert edu.read(offset, 8) == ONES8
    before = edu.model.state()
    edu.write(offset, 0x80, 8)
    assert edu.model.state() == before
    assert not edu.bus.level


@pytest.mark.parametrize("offset", [0x0C, 0x10, 0x28, 0x60, 0x64, 0x7C, 0x84, 0x8C, 0x9C, 0xA0, 0x40000, 0xFFFFC])
def test_unlisted_offsets_read_all_ones(edu: Edu, offset: int) -> None:
    assert edu.read(offset) == ONES4
    if offset >= 0x80 and offset % 8 == 0:
        assert edu.read(offset, 8) == ONES8
    if offset not in (RAISE, ACK):
        before = edu.model.state()
        edu.write(offset, 0x12345678)
        assert edu.model.state() == before


def test_64_bit_registers(edu: Edu) -> None:
    edu.write(SOURCE, 0x1122334455667788, 8)
    assert (edu.read(SOURCE, 8), edu.read(SOURCE)) == (0x1122334455667788, 0x55667788)
    edu.write(SOURCE, 0x99AABBCC)
    assert edu.read(SOURCE, 8) == 0x99AABBCC


def test_liveness(edu: Edu) -> None:
    assert edu.read(LIVENESS) == 0
    edu.write(LIVENESS, 0x12345678)
    assert edu.read(LIVENESS) == 0xEDCBA987
    edu.write(LIVENESS, ONES4)
    assert edu.read(LIVENESS) == 0


@pytest.mark.parametrize("number", [0, 1, 2, 5, 12, 13, 32, 33, 34, 35, 1000, ONES4])
def test_factorial(edu: Edu, number: int) -> None:
    edu.write(FACTORIAL, number)
    assert (edu.read(FACTORIAL), edu.read(STATUS)) == (number, 1)
    edu.write(FACTORIAL, 7)
    assert edu.read(FACTORIAL) == number
    took = edu.bus.run()
    assert took == pytest.approx(number * 1e-9)
    assert edu.read(STATUS) == 0
    assert edu.read(FACTORIAL) == (math.factorial(number) % (1 << 32) if number < 50 else 0)
    assert edu.read(IRQ_STATUS) == 0


@settings(max_examples=50, deadline=None)
@given(number=st.integers(0, 200))
def test_factorial_function(number: int) -> None:
    assert factorial(number) == math.factorial(number) % (1 << 32)


def test_every_restorable_result_has_its_number() -> None:
    assert factorial(34) == 0
    assert factorial(32) == factorial(33) == 0x80000000


def test_status_takes_bit_7_only(edu: Edu) -> None:
    edu.write(STATUS, ONES4)
    assert edu.read(STATUS) == 0x80
    edu.write(STATUS, 0x7F)
    assert edu.read(STATUS) == 0
    edu.write(FACTORIAL, 100)
    edu.write(STATUS, 0x80)
    assert edu.read(STATUS) == 0x81
    edu.bus.run()
    assert (edu.read(STATUS), edu.read(IRQ_STATUS), edu.bus.level) == (0x80, 1, True)


def test_intx_follows_the_status(edu: Edu) -> None:
    edu.write(RAISE, 0)
    assert not edu.bus.level
    edu.write(RAISE, 0x5)
    assert (edu.read(IRQ_STATUS), edu.bus.level) == (5, True)
    edu.write(ACK, 1)
    assert (edu.read(IRQ_STATUS), edu.bus.level) == (4, True)
    edu.write(ACK, 0xFFFFFFFF)
    assert (edu.read(IRQ_STATUS), edu.bus.level) == (0, False)
    edu.write(ACK, 0)
    assert edu.bus.edges == 2


def test_every_signal_is_a_message_under_msi(edu: Edu) -> None:
    edu.use_msi()
    edu.write(RAISE, 1)
    edu.write(RAISE, 1)
    edu.write(RAISE, 0)
    assert edu.bus.take_messages() == [0, 0, 0]
    edu.write(ACK, 1)
    edu.write(RAISE, 0)
    assert edu.bus.take_messages() == []
    assert edu.bus.edges == 0
    edu.model.config.write(4, b"\x02")
    edu.write(RAISE, 1)
    assert (edu.bus.take_messages(), edu.read(IRQ_STATUS)) == ([], 1)


def test_the_device_itself_never_lowers_intx_under_msi(edu: Edu) -> None:
    edu.write(RAISE, 1)
    edu.use_msi()
    edu.write(ACK, 1)
    assert edu.read(IRQ_STATUS) == 0
    assert edu.bus.level
    edu.use_msi(False)
    edu.write(ACK, 0)
    assert not edu.bus.level


def test_dma_both_ways(edu: Edu) -> None:
    pattern = bytes(at * 7 & 0xFF for at in range(0x1000))
    edu.bus.memory[0x2000:0x3000] = pattern
    edu.transfer(0x2000, BUFFER, 0x1000, 1)
    assert edu.read(COMMAND, 8) == 1
    edu.bus.step(0.099)
    assert edu.read(COMMAND, 8) == 1
    edu.bus.step(0.001)
    assert edu.read(COMMAND, 8) == 0
    edu.move(BUFFER + 0x10, 0x5008, 0x20, 3)
    assert edu.bus.memory[0x5000:0x5030] == bytes(8) + pattern[0x10:0x30] + bytes(8)
    assert edu.read(COMMAND, 8) == 2
    assert (edu.read(IRQ_STATUS), edu.bus.level) == (0, False)
    assert edu.buffer() == pattern


def test_nothing_moves_before_the_time(edu: Edu) -> None:
    edu.transfer(0x2000, BUFFER, 16, 1)
    edu.bus.step(0.05)
    edu.bus.memory[0x2000:0x2010] = b"late changes too"
    edu.bus.step(0.05)
    assert edu.buffer()[:16] == b"late changes too"


def test_registers_are_locked_while_running(edu: Edu) -> None:
    edu.transfer(0x2000, BUFFER, 16, 1)
    before = edu.model.state()
    for offset in (SOURCE, DESTINATION, COUNT, COMMAND):
        edu.write(offset, 0x77, 8)
    assert edu.model.state() == before


@pytest.mark.parametrize("command", [0, 2, 4, 6, 0xFE])
def test_a_command_without_the_run_bit_is_dropped(edu: Edu, command: int) -> None:
    edu.write(COMMAND, 0xF1, 8)
    edu.bus.step(0.1)
    edu.write(COMMAND, command, 8)
    assert edu.read(COMMAND, 8) == 0xF0


def test_the_whole_command_is_kept(edu: Edu) -> None:
    edu.transfer(BUFFER, BUFFER, 0, 0xAABBCCDD00000005)
    edu.bus.step(0.1)
    assert edu.read(COMMAND, 8) == 0xAABBCCDD00000004
    assert (edu.read(IRQ_STATUS), edu.bus.level) == (0x100, True)


@pytest.mark.parametrize(
    ("inside", "count", "moves"),
    [
        (BUFFER, 0x1000, True),
        (BUFFER + 0xFFF, 1, True),
        (BUFFER + 0x1000, 0, True),
        (BUFFER - 1, 2, False),
        (BUFFER, 0x1001, False),
        (BUFFER + 0xFFF, 2, False),
        (BUFFER + 0x1001, 0, False),
        (0x2000, 16, False),
        (BUFFER, ONES8, False),
        (ONES8, 1, False),
        (ONES8 - 0xFFF, BUFFER + 0x1000, False),
    ],
)
@pytest.mark.parametrize("command", [1, 3])
def test_the_buffer_side_must_lie_in_the_buffer(edu: Edu, inside: int, count: int, moves: bool, command: int) -> None:
    edu.bus.memory[0x8000:0xA000] = b"\xaa" * 0x2000
    edu.move(*((0x8000, inside) if command == 1 else (inside, 0x8000)), count, command | 4)
    assert edu.read(IRQ_STATUS) == 0x100
    moved = [access for access in edu.bus.accesses if access[1] >= 0x8000]
    assert bool(moved) == (moves and count > 0)
    assert sum(length for _, _, length in moved) == (count if moves else 0)


@pytest.mark.parametrize("options", [{}, {"dma_mask": (1 << 40) - 1}])
def test_the_start_is_cut_to_the_mask(options: dict) -> None:
    edu = Edu(**options)
    edu.bus.memory[0x2000:0x2004] = b"low!"
    edu.move(0x7_1000_2000, BUFFER, 4, 1)
    assert edu.buffer()[:4] == (bytes(4) if options else b"low!")
    assert edu.read(SOURCE, 8) == BUFFER


def test_bus_errors_are_not_reported(edu: Edu) -> None:
    edu.bus.memory[0x2000:0x4000] = b"\x77" * 0x2000
    edu.move(0x2000, BUFFER, 0x1000, 1)
    edu.bus.holes = [(0x3000, 0x4000)]
    edu.move(0x2800, BUFFER, 0x1000, 1)
    assert edu.buffer() == b"\x77" * 0x800 + bytes(0x800)
    edu.bus.memory[0x2000:0x4000] = bytes(0x2000)
    edu.move(BUFFER, 0x2800, 0x1000, 3)
    assert edu.bus.memory[0x2000:0x4000] == bytes(0x800) + b"\x77" * 0x800 + bytes(0x1000)


def test_without_bus_mastering_reads_give_zeros(edu: Edu) -> None:
    edu.bus.memory[0x2000:0x2010] = b"\x77" * 16
    edu.move(0x2000, BUFFER, 16, 1)
    edu.model.config.write(4, b"\x02")
    edu.move(0x2000, BUFFER, 8, 1)
    edu.move(BUFFER, 0x2000, 16, 3)
    edu.model.config.write(4, b"\x06")
    assert edu.bus.memory[0x2000:0x2010] == b"\x77" * 16
    assert edu.buffer()[:16] == bytes(8) + b"\x77" * 8


def test_a_bus_reset_leaves_everything(edu: Edu) -> None:
    edu.write(LIVENESS, 1)
    edu.write(FACTORIAL, 1000)
    edu.transfer(0x2000, BUFFER, 16, 5)
    before = edu.model.state()
    edu.model.config.reset()
    edu.model.bus_reset()
    assert edu.model.state() == before
    edu.bus.run()
    assert (edu.read(STATUS), edu.read(COMMAND, 8), edu.read(IRQ_STATUS)) == (0, 4, 0x100)


def test_faults(edu: Edu) -> None:
    edu.bus.memory[0x2000:0x2004] = b"\x10" * 4
    edu.model.faults.armed |= {"dma-drop": 1, "bit-flip": 1}
    edu.move(0x2000, BUFFER, 4, 1)
    assert edu.read(COMMAND, 8) == 0
    edu.move(0x2000, BUFFER, 4, 1)
    assert edu.buffer()[:4] == b"\x10\x10\x10\x11"
    edu.move(0x2000, BUFFER, 4, 1)
    assert edu.buffer()[:4] == b"\x10" * 4
    edu.model.faults.armed |= {"dma-stuck": 1, "factorial-stuck": 1}
    edu.write(FACTORIAL, 3)
    edu.transfer(0x2000, BUFFER, 4, 1)
    assert edu.bus.run() == 0
    assert (edu.read(STATUS), edu.read(COMMAND, 8)) == (1, 1)


def test_state_does_not_disturb(edu: Edu) -> None:
    assert set(edu.model.state()) >= {"liveness", "dma_command", "buffer_crc32"}
    assert edu.model.state() == edu.model.state()


@settings(max_examples=100, deadline=None)
@given(
    accesses=st.lists(
        st.tuples(
            st.booleans(),
            st.one_of(st.sampled_from(REGISTERS), st.integers(0, (1 << 20) - 1)),
            st.sampled_from([1, 2, 4, 8]),
            st.integers(0, ONES8),
        ),
        max_size=30,
    )
)
def test_no_access_breaks_it(accesses) -> None:
    edu = Edu()
    for write, offset, width, value in accesses:
        if write:
            edu.write(offset, value & ((1 << 8 * width) - 1), width)
        assert 0 <= edu.read(offset, width) < 1 << 8 * width
    edu.bus.run()
    assert edu.read(STATUS) & 1 == 0
