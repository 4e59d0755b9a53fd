"""RegisterModel: what the table says by itself, what methods do, and what cannot be meant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plugins.bus import FakeBus
from vfu_server.errors import PluginError
from vfu_server.model_registers import RegisterModel
from vfu_server.pciconfig import PciConfig
from vfu_server.regmap import Access, Array, Block, Register

CHANNEL = [Register("go", 0, 4, Access.WO), Register("count", 4, 4, Access.RW, reset=5)]
BLOCK = Block(
    "toy",
    0x80,
    [
        Register("id", 0x00, 4, Access.RO, reset=0xCAFE),
        Register("plain", 0x04, 4, Access.RW),
        Register("wide", 0x08, 8, Access.RW, reset=1 << 40),
        Register("events", 0x10, 2, Access.W1C, reset=0xFF),
        Register("once", 0x14, 4, Access.RC, reset=7),
        Register("kick", 0x18, 4, Access.WO),
        Register("hole", 0x1C, 4, Access.RSVD),
        Register("clock", 0x20, 4, Access.RO),
        Register("acting", 0x24, 4, Access.RW),
    ],
    [Array("channel", 0x40, 0x10, 2, CHANNEL)],
)


class Toy(RegisterModel):
    def __init__(self, **more) -> None:
        self.kicks: list[object] = []
        super().__init__({0: BLOCK}, vendor=1, device=2, **more)

    def read_clock(self) -> int:
        return 0x12345678

    def write_kick(self, value: int) -> None:
        self.kicks.append(value)
        self.interrupt()

    def write_acting(self, value: int) -> None:
        self["acting"] = value + 1

    def write_channel_go(self, index: int, value: int) -> None:
        self[f"channel[{index}].count"] += value


@pytest.fixture
def toy():
    return Toy(msi=1)


def test_what_the_table_says(toy):
    assert toy.read(0, 0, 4) == 0xCAFE
    toy.write(0, 0, 4, 1)
    assert toy.read(0, 0, 4) == 0xCAFE
    toy.write(0, 4, 4, 0x11223344)
    assert (toy.read(0, 4, 4), toy.read(0, 5, 1), toy.read(0, 6, 2)) == (0x11223344, 0x33, 0x1122)
    toy.write(0, 6, 1, 0xAA)
    assert toy["plain"] == 0x11AA3344
    toy.write(0, 0x10, 2, 0x0F)
    assert toy.read(0, 0x10, 2) == 0xF0
    toy.write(0, 0x11, 1, 0xFF)
    assert toy.read(0, 0x10, 2) == 0xF0
    assert (toy.read(0, 0x14, 4), toy.read(0, 0x14, 4)) == (7, 0)
    for place in (0x18, 0x1C, 0x28, 0x7C):  # write-only, reserved, no register
        toy.write(0, place + 2 if place == 0x28 else place, 2 if place == 0x28 else 4, 0) if place != 0x18 else None
        assert toy.read(0, place, 4) == 0xFFFFFFFF
    assert toy.read(0, 2, 4) == 0xFFFFFFFF  # across two registers
    assert (toy.bars[0].size, toy.config.bar_sizes) == (4096, {0: 4096})


def test_what_methods_do(toy):
    bus = FakeBus(toy)
    bus.messages_on = True
    toy.write(0, 0x18, 4, 9)
    assert (toy.kicks, bus.messages) == ([9], [0])
    assert toy.read(0, 0x20, 4) == 0x12345678
    assert toy.read(0, 0x22, 2) == 0x1234
    toy.write(0, 0x24, 4, 4)
    assert toy["acting"] == 5
    toy.write(0, 0x25, 1, 1)  # the rest of the register is as it was
    assert toy["acting"] == 0x106
    toy.write(0, 0x50, 4, 3)
    assert (toy["channel[0].count"], toy["channel[1].count"]) == (5, 8)


def test_intx_where_messages_are_off():
    toy = Toy(intx=True)
    bus = FakeBus(toy)
    toy.write(0, 0x18, 4, 1)
    assert bus.level


def test_a_config_space_of_the_models_own_says_what_there_is():
    config = PciConfig(vendor=1, device=2, class_code=0x020000, interrupt_pin=1)
    config.add_bar(0, 0x2000)
    config.add_bar(2, 0x20, io=True)
    config.add_msi(0x40, 2)
    config.add_express(0x60, version=1)
    config.add_msix(0x80, 3, table=(0, 0), pba=(0, 0x800))
    blocks = {0: Block("a", 0x1000, []), 2: Block("b", 0x20, [])}
    model = RegisterModel(blocks, vendor=1, device=2, config=config)
    assert {index: (bar.size, bar.io) for index, bar in model.bars.items()} == {0: (0x2000, False), 2: (0x20, True)}
    assert (model.interrupts.intx, model.interrupts.msi, model.interrupts.msix) == (True, 2, 3)
    with pytest.raises(PluginError, match="does not fit"):
        RegisterModel({2: Block("b", 0x40, [])}, vendor=1, device=2, config=config)
    with pytest.raises(PluginError, match="does not fit"):
        RegisterModel({1: Block("b", 0x20, [])}, vendor=1, device=2, config=config)


def test_reset_and_state(toy):
    toy.write(0, 4, 4, 1)
    toy["channel[1].count"] = 1 << 40
    assert (toy.state()["plain"], toy.state()["channel[1].count"]) == (1, 0)
    toy.reset()
    assert toy.state() == {r.name: r.reset or 0 for r in BLOCK}


def test_a_method_for_no_register():
    class Misspelt(Toy):
        def write_kcik(self, value: int) -> None:
            raise AssertionError("it is never called")

    with pytest.raises(PluginError, match="write_kcik: no register of its blocks has that name"):
        Misspelt()


def test_a_register_that_is_not_there(toy):
    with pytest.raises(PluginError, match="no register 'nothing'"):
        toy["nothing"] = 1


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 0x7F), st.sampled_from([1, 2, 4, 8]), st.integers(0))))
def test_any_accesses(accesses):
    """Values always fit their width and their register."""
    toy = Toy()
    FakeBus(toy)
    for write, offset, width, value in accesses:
        if write:
            toy.write(0, offset, width, value & (1 << 8 * width) - 1)
        assert 0 <= toy.read(0, offset, width) < 1 << 8 * width
    assert all(0 <= value <= BLOCK[name].mask for name, value in toy.state().items())
