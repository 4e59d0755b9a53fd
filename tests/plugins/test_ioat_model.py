"""The I/OAT model on a bus of the test's own, driven as the kernel's driver and VFIO self-test drive the hardware."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.generic_dmaq.models.ioat import IoatModel
from tests.plugins.bus import FakeBus
from vfu_server.model import Interrupts

CHANCNT, XFERCAP, GENCTRL, INTRCTRL, ATTNSTATUS, VERSION, INTRDELAY, DEV_STATUS, CAPABILITIES = (
    (0x00, 1), (0x01, 1), (0x02, 1), (0x03, 1), (0x04, 4), (0x08, 1), (0x0C, 2), (0x0E, 2), (0x10, 4)
)  # fmt: skip
CHANCTRL, COMPATIBILITY, CHANCMD, DMACOUNT, CHANSTS, CHAINADDR, CHANCMP, CURRENT, CHANERR, CHANERR_MASK = (
    (0x00, 2), (0x02, 2), (0x04, 1), (0x06, 2), (0x08, 8), (0x10, 8), (0x18, 8), (0x20, 8), (0x28, 4), (0x2C, 4)
)  # fmt: skip
SUSPEND, ABORT, RESUME, RESET = 4, 8, 0x10, 0x20
ACTIVE, DONE, SUSPENDED, HALTED = range(4)
RUN = 0x1D
IRQ, COMPLETION, NULL = 1, 8, 0x20
RING, CMP, FROM, TO = 0x1000, 0x800, 0x20000, 0x40000


class Ioat:
    """The device as its driver has it; `channel` is the one that is driven."""

    def __init__(self, channels: int = 1, channel: int = 0) -> None:
        self.model = IoatModel(channels)
        self.bus = FakeBus(self.model)
        self.base = 0x80 * (channel + 1)

    def get(self, register: tuple[int, int]) -> int:
        return self.model.read(0, *register)

    def set(self, register: tuple[int, int], value: int) -> None:
        self.model.write(0, *register, value)

    def read(self, register: tuple[int, int]) -> int:
        return self.model.read(0, self.base + register[0], register[1])

    def write(self, register: tuple[int, int], value: int) -> None:
        self.model.write(0, self.base + register[0], register[1], value)

    def write_halves(self, register: tuple[int, int], value: int) -> None:
        self.write((register[0], 4), value & 0xFFFFFFFF)
        self.write((register[0] + 4, 4), value >> 32)

    @property
    def state(self) -> int:
        return self.read(CHANSTS) & 7

    @property
    def last(self) -> int:
        return self.read(CHANSTS) & ~0x3F

    def set_up(self, control: int = RUN) -> None:
        """What the driver does to a channel before it uses it."""
        self.write(CHANERR, self.read(CHANERR))
        self.write(CHANCMD, RESET)
        self.bus.run()
        self.write_halves(CHANCMP, CMP)
        self.write_halves(CHAINADDR, RING)
        self.write(CHANCTRL, control)

    def descriptor(self, slot: int, size=64, control=0, source=FROM, destination=TO, following=None) -> int:
        at = RING + 64 * slot
        nxt = at + 64 if following is None else following
        self.bus.memory[at : at + 64] = struct.pack("<IIQQQ32x", size, control, source, destination, nxt)
        return at

    def completion(self) -> int:
        return int.from_bytes(self.bus.memory[CMP : CMP + 8], "little")

    def enable_msix(self) -> None:
        self.model.config.write(0x82, b"\x00\x80")


@pytest.fixture
def ioat() -> Ioat:
    device = Ioat()
    device.set_up()
    return device


def test_identity() -> None:
    device = Ioat(channels=2)
    config = device.model.config
    assert (config.get(0, 4), config.get(8, 4) >> 8, config.size) == (0x2F208086, 0x088000, 4096)
    assert config.bar_sizes == {0: 0x4000}
    assert config.get(0x10, 4) & 0xF == 4
    assert device.model.interrupts == Interrupts(intx=True, msix=2)
    assert config.is_express
    assert device.model.can_reset
    assert [device.get(r) for r in (CHANCNT, XFERCAP, VERSION, DEV_STATUS, CAPABILITIES)] == [2, 20, 0x32, 0, 1]
    assert (config.msix.table_offset, config.msix.pba_offset, config.msix.vectors) == (0x2000, 0x3000, 2)


@pytest.mark.parametrize(
    ("offset", "width"),
    [
        (0x00, 4), (0x02, 2), (0x04, 1), (0x04, 2), (0x05, 1), (0x10, 8), (0x08, 4), (0x0A, 2), (0x80, 1), (0x80, 4),
        (0x84, 2), (0x84, 4), (0x86, 1), (0x88, 1), (0x88, 2), (0x8A, 4), (0x8C, 8), (0xA8, 8), (0xB0, 4), (0x100, 4),
        (0x2000, 4), (0x3FFC, 4),
    ],
)  # fmt: skip
def test_other_widths_and_places_are_no_registers(ioat: Ioat, offset: int, width: int) -> None:
    before = ioat.model.state()
    assert ioat.model.read(0, offset, width) == (1 << 8 * width) - 1
    ioat.model.write(0, offset, width, 0x24 & ((1 << 8 * width) - 1))
    ioat.bus.run()
    assert ioat.model.state() == before


def test_64_bit_registers_take_halves(ioat: Ioat) -> None:
    ioat.write_halves(CHAINADDR, 0x11223344_55667780)
    assert ioat.read(CHAINADDR) == 0x11223344_55667780
    assert (ioat.read((0x10, 4)), ioat.read((0x14, 4))) == (0x55667780, 0x11223344)
    ioat.write(CHAINADDR, 0x40)
    assert ioat.read(CHAINADDR) == 0x40
    ioat.write(CHANCMP, 0x40)
    assert ioat.read(CHANCMP) == CMP
    ioat.write_halves(CHANCMP, 0xF)
    assert ioat.read(CHANCMP) == 8


def test_read_only_registers(ioat: Ioat) -> None:
    before = ioat.model.state()
    for register in (CHANCNT, XFERCAP, ATTNSTATUS, VERSION, DEV_STATUS, CAPABILITIES):
        ioat.set(register, 0)
    for register in (COMPATIBILITY, CHANSTS, CURRENT):
        ioat.write(register, 0)
    assert ioat.model.state() == before


def test_plain_registers(ioat: Ioat) -> None:
    ioat.set(GENCTRL, 3)
    ioat.set(INTRDELAY, 0xFFFF)
    ioat.write(CHANERR_MASK, 0x1234)
    assert (ioat.get(GENCTRL), ioat.get(INTRDELAY), ioat.read(CHANERR_MASK)) == (3, 0x3FFF, 0x1234)
    assert ioat.read(COMPATIBILITY) == 2


def test_reset_reads_back_until_done() -> None:
    device = Ioat()
    assert device.state == HALTED
    device.write(CHANCTRL, 0x1C)
    device.write(DMACOUNT, 0)
    device.write(CHANERR_MASK, 7)
    device.write(CHANCMD, RESET)
    assert device.read(CHANCMD) == RESET
    device.write(CHANERR_MASK, 9)
    device.bus.run()
    assert device.read(CHANCMD) == 0
    assert [device.read(r) for r in (CHANERR_MASK, CHANCMP, CHAINADDR, DMACOUNT, CHANSTS)] == [0, 0, 0, 0, HALTED]
    assert device.read(CHANCTRL) == 0


def test_in_use_is_claimed_by_the_first_read(ioat: Ioat) -> None:
    assert ioat.read(CHANCTRL) == 0x1C
    assert ioat.read(CHANCTRL) == 0x11C
    ioat.write(CHANCTRL, RUN)
    assert ioat.read(CHANCTRL) == 0x1C


@pytest.mark.parametrize("halves", [True, False])
def test_a_chain_of_copies(ioat: Ioat, halves: bool) -> None:
    pattern = bytes(at * 5 & 0xFF for at in range(192))
    ioat.bus.memory[FROM : FROM + 192] = pattern
    for slot in range(3):
        ioat.descriptor(slot, source=FROM + 64 * slot, destination=TO + 64 * slot, control=COMPLETION)
    if not halves:
        ioat.write(CHAINADDR, RING)
    ioat.write(DMACOUNT, 2)
    assert (ioat.state, ioat.read(DMACOUNT)) == (ACTIVE, 2)
    assert ioat.bus.run() == pytest.approx(2 * (5e-6 + 64 / 4e9))
    assert (ioat.state, ioat.last, ioat.read(CURRENT)) == (DONE, RING + 64, RING + 128)
    assert ioat.completion() == RING + 64 | DONE
    assert ioat.bus.memory[TO : TO + 192] == pattern[:128] + bytes(64)
    ioat.write(DMACOUNT, 3)
    ioat.bus.run()
    assert (ioat.state, ioat.last) == (DONE, RING + 128)
    assert ioat.bus.memory[TO : TO + 192] == pattern
    assert ioat.bus.messages == []
    assert not ioat.bus.level


def test_status_while_it_runs(ioat: Ioat) -> None:
    ioat.descriptor(0, control=COMPLETION | NULL, size=8)
    ioat.descriptor(1, size=1 << 16)
    ioat.write(DMACOUNT, 2)
    ioat.bus.step(6e-6)
    assert (ioat.state, ioat.last, ioat.completion()) == (ACTIVE, RING, RING | ACTIVE)
    assert ioat.model.state()["channel[0].finished"] == 1
    ioat.bus.run()
    assert (ioat.state, ioat.last, ioat.completion()) == (DONE, RING + 64, RING | ACTIVE)


def test_a_kick_while_it_runs_adds(ioat: Ioat) -> None:
    for slot in range(3):
        ioat.descriptor(slot, control=NULL)
    ioat.write(DMACOUNT, 1)
    ioat.bus.step(1e-6)
    ioat.write(DMACOUNT, 3)
    ioat.bus.run()
    assert (ioat.state, ioat.last) == (DONE, RING + 128)


def test_a_new_chain_counts_from_0(ioat: Ioat) -> None:
    for slot in range(4):
        ioat.descriptor(slot, control=NULL)
    ioat.write(DMACOUNT, 2)
    ioat.bus.run()
    ioat.write(CHAINADDR, RING + 64)
    assert (ioat.state, ioat.last) == (DONE, RING + 64)
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    assert ioat.last == RING + 64
    ioat.write(DMACOUNT, 3)
    ioat.bus.run()
    assert ioat.last == RING + 192


def test_the_count_wraps(ioat: Ioat) -> None:
    ioat.descriptor(0, control=NULL, following=RING)
    ioat.write(DMACOUNT, 0xFFFF)
    ioat.bus.run()
    assert ioat.state == DONE
    ioat.descriptor(0, control=NULL)
    ioat.descriptor(1, control=NULL)
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    assert (ioat.state, ioat.last, ioat.model.state()["channel[0].finished"]) == (DONE, RING + 64, 1)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"size": 0}, 1 << 11),
        ({"size": 0, "control": NULL}, 1 << 11),
        ({"size": (1 << 20) + 1}, 1 << 11),
        ({"control": 0x87 << 24}, 1 << 10),
        ({"control": 1 << 11}, 1 << 10),
        ({"source": (1 << 64) - 1}, 1 << 0),
        ({"destination": (1 << 64) - 63}, 1 << 1),
        ({"source": 1 << 40}, 1 << 8),
        ({"destination": 1 << 40}, 1 << 9),
    ],
)
def test_bad_descriptors_halt(ioat: Ioat, fields: dict, error: int) -> None:
    ioat.descriptor(0, control=NULL)
    ioat.descriptor(1, **fields)
    ioat.write(DMACOUNT, 2)
    ioat.bus.run()
    assert (ioat.state, ioat.last, ioat.read(CHANERR)) == (HALTED, RING, error)
    assert ioat.completion() == RING | HALTED
    assert ioat.model.config.get(0x180, 4) == error
    ioat.write(DMACOUNT, 3)
    ioat.write(CHANERR, error)
    ioat.write(DMACOUNT, 4)
    assert (ioat.bus.run(), ioat.state, ioat.read(CHANERR)) == (0, HALTED, 0)
    ioat.model.config.write(0x180, b"\xff\xff\xff\xff")
    assert ioat.model.config.get(0x180, 4) == 0
    ioat.set_up()
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    assert ioat.state == DONE


@pytest.mark.parametrize(
    ("chain", "first", "error"),
    [(RING + 32, None, 1 << 3), (1 << 40, None, 1 << 4), (RING, RING + 96, 1 << 3), (RING, 1 << 40, 1 << 2)],
)
def test_bad_addresses_of_descriptors(ioat: Ioat, chain: int, first: int | None, error: int) -> None:
    ioat.descriptor(0, control=NULL, following=first)
    ioat.write(CHAINADDR, chain)
    ioat.write(DMACOUNT, 2)
    ioat.bus.run()
    assert (ioat.state, ioat.read(CHANERR)) == (HALTED, error)


def test_no_chain_no_run() -> None:
    device = Ioat()
    device.write(DMACOUNT, 1)
    assert (device.state, device.read(CHANERR), device.bus.run()) == (HALTED, 1 << 4, 0)


def test_completion_address_that_is_no_memory(ioat: Ioat) -> None:
    ioat.write_halves(CHANCMP, 1 << 40)
    ioat.descriptor(0, control=COMPLETION | NULL)
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    assert (ioat.state, ioat.read(CHANERR)) == (HALTED, 1 << 12)


def test_without_bus_mastering(ioat: Ioat) -> None:
    ioat.model.config.write(4, b"\x02")
    ioat.descriptor(0)
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    assert (ioat.state, ioat.read(CHANERR)) == (HALTED, 1 << 4 | 1 << 12)


def test_chainaddr_while_active_is_an_error(ioat: Ioat) -> None:
    ioat.descriptor(0, control=NULL)
    ioat.write(DMACOUNT, 1)
    ioat.write(CHAINADDR, RING)
    assert (ioat.state, ioat.read(CHANERR), ioat.bus.run()) == (HALTED, 1 << 4, 0)


# suspend, resume, abort


def test_suspend_takes_effect_behind_a_descriptor(ioat: Ioat) -> None:
    for slot in range(3):
        ioat.descriptor(slot, size=4096)
    ioat.write(DMACOUNT, 2)
    ioat.write(CHANCMD, SUSPEND)
    assert ioat.state == ACTIVE
    ioat.bus.run()
    assert (ioat.state, ioat.last) == (SUSPENDED, RING)
    ioat.write(DMACOUNT, 3)
    assert (ioat.bus.run(), ioat.state) == (0, SUSPENDED)
    ioat.write(CHANCMD, RESUME)
    assert ioat.state == ACTIVE
    ioat.bus.run()
    assert (ioat.state, ioat.last) == (DONE, RING + 128)


def test_suspend_of_an_idle_channel(ioat: Ioat) -> None:
    ioat.descriptor(0, control=NULL)
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    ioat.write(CHANCMD, SUSPEND)
    assert ioat.state == SUSPENDED
    ioat.write(CHANCMD, RESUME)
    assert ioat.state == DONE


def test_suspend_of_a_halted_channel_is_a_wrong_command(ioat: Ioat) -> None:
    ioat.write(CHANCMD, SUSPEND)
    assert (ioat.state, ioat.read(CHANERR)) == (HALTED, 1 << 5)


@pytest.mark.parametrize("command", [1, 2, 3, 0x0C, 0x24, 0x40, 0xFF])
def test_other_commands_are_wrong(ioat: Ioat, command: int) -> None:
    ioat.write(CHANCMD, command)
    assert ioat.read(CHANERR) == 1 << 5


def test_abort_and_reset_stop_at_once(ioat: Ioat) -> None:
    for command in (ABORT, RESET):
        ioat.set_up()
        ioat.bus.memory[FROM : FROM + 64] = b"\x55" * 64
        ioat.descriptor(0)
        ioat.write(DMACOUNT, 1)
        ioat.bus.step(1e-6)
        ioat.write(CHANCMD, command)
        ioat.bus.run()
        assert (ioat.state, ioat.read(CHANERR)) == (HALTED, 0)
        assert ioat.bus.memory[TO] == 0


def test_a_reset_in_the_middle_of_a_transfer_wins(ioat: Ioat) -> None:
    """DMA by messages lets the client in while it waits: here it resets the channel."""
    ioat.descriptor(0, control=IRQ | COMPLETION)
    real = ioat.bus.dma_read

    def interfere(iova: int, length: int) -> bytes:
        data = real(iova, length)
        if iova == FROM:
            ioat.write(CHANCMD, RESET)
        return data

    ioat.bus.dma_read = interfere
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    assert (ioat.state, ioat.read(CHANCMD), ioat.completion()) == (HALTED, 0, 0)
    assert [access for access in ioat.bus.accesses if access[0] == "write"] == []


# interrupts


def test_msix_vector_of_each_channel() -> None:
    device = Ioat(channels=2, channel=1)
    device.enable_msix()
    device.set(INTRCTRL, 8)
    device.set_up()
    for slot in range(3):
        device.descriptor(slot, control=IRQ | NULL)
    device.write(DMACOUNT, 1)
    device.bus.run()
    assert (device.bus.take_messages(), device.get(ATTNSTATUS)) == ([1], 0)
    assert device.read(CHANCTRL) & 1
    device.write(DMACOUNT, 2)
    device.bus.run()
    assert device.bus.take_messages() == []
    device.write(CHANCTRL, RUN)
    assert not device.read(CHANCTRL) & 1
    device.write(DMACOUNT, 3)
    device.bus.run()
    assert device.bus.take_messages() == [1]


def test_one_line_for_all_channels(ioat: Ioat) -> None:
    ioat.set(INTRCTRL, 1)
    ioat.descriptor(0, control=IRQ | NULL)
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    assert ioat.bus.level
    assert ioat.get(INTRCTRL) == 7
    assert not ioat.bus.level
    assert ioat.get(INTRCTRL) == 2
    assert (ioat.get(ATTNSTATUS), ioat.get(ATTNSTATUS)) == (1, 0)
    ioat.set(INTRCTRL, 7)
    assert (ioat.get(INTRCTRL), ioat.bus.level) == (1, False)


def test_attention_without_enable_waits(ioat: Ioat) -> None:
    ioat.descriptor(0, control=IRQ | NULL)
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    assert not ioat.bus.level
    ioat.set(INTRCTRL, 1)
    assert ioat.bus.level
    ioat.get(ATTNSTATUS)
    assert not ioat.bus.level


def test_one_message_for_all_channels(ioat: Ioat) -> None:
    ioat.enable_msix()
    ioat.set(INTRCTRL, 1)
    for slot in range(2):
        ioat.descriptor(slot, control=IRQ | NULL)
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    assert ioat.bus.take_messages() == [0]
    assert (ioat.get(INTRCTRL), ioat.get(ATTNSTATUS)) == (7, 1)
    ioat.set(INTRCTRL, 1)
    ioat.write(CHANCTRL, RUN)
    ioat.write(DMACOUNT, 2)
    ioat.bus.run()
    assert ioat.bus.take_messages() == [0]
    assert not ioat.bus.level


@pytest.mark.parametrize(("control", "mask", "signals"), [(RUN, 0, True), (0x0D, 0, False), (RUN, 1 << 11, False)])
def test_error_interrupt(control: int, mask: int, signals: bool) -> None:
    device = Ioat()
    device.enable_msix()
    device.set(INTRCTRL, 8)
    device.set_up(control)
    device.write(CHANERR_MASK, mask)
    device.descriptor(0, size=0)
    device.write(DMACOUNT, 1)
    device.bus.run()
    assert device.state == HALTED
    assert device.bus.take_messages() == ([0] if signals else [])


def test_function_reset(ioat: Ioat) -> None:
    fresh = Ioat().model.state()
    ioat.set(INTRCTRL, 9)
    ioat.set(INTRDELAY, 5)
    ioat.write(CHANCMD, 1)
    ioat.set_up()
    ioat.descriptor(0)
    ioat.write(DMACOUNT, 1)
    ioat.model.reset()
    assert ioat.model.state() == fresh
    assert ioat.bus.run() == 0
    ioat.write(CHANCTRL, RUN)
    ioat.model.bus_reset()
    assert ioat.model.state() == fresh


def test_faults(ioat: Ioat) -> None:
    for slot in range(4):
        ioat.descriptor(slot, control=NULL | COMPLETION | IRQ)
    ioat.set(INTRCTRL, 1)
    ioat.model.faults.armed |= {"lost-completion": 1, "suspend-stuck": 1}
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    assert (ioat.state, ioat.last, ioat.completion(), ioat.bus.level) == (DONE, RING, 0, False)
    ioat.write(CHANCMD, SUSPEND)
    assert ioat.state == DONE
    ioat.write(DMACOUNT, 2)
    ioat.bus.run()
    assert (ioat.completion(), ioat.bus.level) == (RING + 64 | DONE, True)
    ioat.model.faults.armed["halt"] = 1
    ioat.write(DMACOUNT, 3)
    ioat.bus.run()
    assert (ioat.state, ioat.read(CHANERR)) == (HALTED, 1 << 6)


def test_state_has_no_effect(ioat: Ioat) -> None:
    ioat.set(INTRCTRL, 1)
    ioat.descriptor(0, control=IRQ | NULL)
    ioat.write(DMACOUNT, 1)
    ioat.bus.run()
    assert ioat.model.state() == ioat.model.state()
    assert ioat.model.state()["intrctrl"] == 7


@settings(max_examples=100, deadline=None)
@given(
    accesses=st.lists(
        st.tuples(
            st.booleans(),
            st.one_of(st.integers(0, 0x180), st.integers(0, 0x3FFF)),
            st.sampled_from([1, 2, 4, 8]),
            st.one_of(st.sampled_from([1, 4, 8, 0x10, 0x20, RING]), st.integers(0, (1 << 64) - 1)),
        ),
        max_size=40,
    )
)
def test_no_access_breaks_it(accesses) -> None:
    device = Ioat(channels=2)
    for write, offset, width, value in accesses:
        if write:
            device.model.write(0, offset, width, value & ((1 << 8 * width) - 1))
        assert 0 <= device.model.read(0, offset, width) < 1 << 8 * width
        device.bus.step(3e-6)
    device.model.reset()
    assert device.bus.run() == 0
