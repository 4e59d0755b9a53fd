"""PciConfig against a plain oracle: the whole space as one number with two masks, its tables written out by hand."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfu_server.errors import ClientError, PluginError
from vfu_server.pciconfig import PciConfig

MSI, MSIX, PM, EXP, VENDOR = 0x40, 0x60, 0x70, 0x80, 0xC0

# offset, width, value after reset, writable bits, bits that a written 1 clears
TABLE = [
    (0x00, 4, 0x2F208086, 0, 0),
    (0x04, 2, 0, 0x0507, 0),
    (0x06, 2, 0x0010, 0, 0xF900),
    (0x08, 4, 0x08800042, 0, 0),
    (0x0C, 1, 0, 0xFF, 0),
    (0x0D, 3, 0, 0, 0),
    (0x10, 4, 0x00000000, 0xFFF00000, 0),
    (0x14, 4, 0x0000000C, 0xFFFFC000, 0),
    (0x18, 4, 0x00000000, 0xFFFFFFFF, 0),
    (0x1C, 4, 0x00000001, 0xFFFFFFE0, 0),
    (0x20, 8, 0, 0, 0),
    (0x28, 4, 0, 0, 0),
    (0x2C, 4, 0x11001AF4, 0, 0),
    (0x30, 4, 0, 0, 0),
    (0x34, 1, MSI, 0, 0),
    (0x3C, 1, 0, 0xFF, 0),
    (0x3D, 1, 1, 0, 0),
    (0x3E, 2, 0, 0, 0),
    # MSI, 64 bit with masks, 4 vectors
    (0x40, 2, 0x05 | MSIX << 8, 0, 0),
    (0x42, 2, 0x0184, 0x0071, 0),
    (0x44, 4, 0, 0xFFFFFFFC, 0),
    (0x48, 4, 0, 0xFFFFFFFF, 0),
    (0x4C, 2, 0, 0xFFFF, 0),
    (0x50, 4, 0, 0xF, 0),
    (0x54, 4, 0, 0, 0),
    # MSI-X, 2 vectors, table in BAR1 at 0x2000, pending bits at 0x3000
    (0x60, 2, 0x11 | PM << 8, 0, 0),
    (0x62, 2, 1, 0xC000, 0),
    (0x64, 4, 0x2001, 0, 0),
    (0x68, 4, 0x3001, 0, 0),
    # power management
    (0x70, 2, 0x01 | EXP << 8, 0, 0),
    (0x72, 2, 3, 0, 0),
    (0x74, 2, 8, 3, 0),
    (0x76, 2, 0, 0, 0),
    # PCI Express
    (0x80, 2, 0x10 | VENDOR << 8, 0, 0),
    (0x82, 2, 2, 0, 0),
    (0x84, 4, 0x10008000, 0, 0),
    (0x88, 2, 0x2810, 0x7FFF, 0),
    (0x8A, 2, 0, 0, 0xF),
    (0x8C, 4, 0x11, 0, 0),
    (0x92, 2, 0x11, 0, 0),
    # vendor specific: length, then four bytes of which one is writable
    (0xC0, 3, 0x070009, 0, 0),
    (0xC3, 4, 0x44332211, 0x0000FF00, 0),
    # registers of the device's own
    (0x148, 4, 0, 0, 0xFFFFFFFF),
    (0x180, 4, 0x5, 0xF0, 0x0F),
]


def build(*, scratch: bool = False) -> PciConfig:
    config = PciConfig(
        vendor=0x8086,
        device=0x2F20,
        class_code=0x088000,
        revision=0x42,
        subsystem_vendor=0x1AF4,
        subsystem=0x1100,
        interrupt_pin=1,
        size=4096,
        scratch=scratch,
    )
    config.add_bar(0, 1 << 20)
    config.add_bar(1, 1 << 14, wide=True, prefetchable=True)
    config.add_bar(3, 32, io=True)
    config.add_msi(MSI, 4, maskable=True)
    config.add_msix(MSIX, 2, table=(1, 0x2000), pba=(1, 0x3000))
    config.add_power_management(PM)
    config.add_express(EXP)
    config.add_vendor(VENDOR, b"\x11\x22\x33\x44", b"\x00\xff")
    config.add_register(0x148, 4, write_clears=0xFFFFFFFF)
    config.add_register(0x180, 4, 0x5, writable=0xF0, write_clears=0x0F)
    return config


class Oracle:
    """One number for the space, one for each mask, one for the value after reset."""

    def __init__(self, *, scratch: bool) -> None:
        self.start = self.writable = self.clears = owned = 0
        for offset, width, value, writable, clears in TABLE:
            self.start |= value << 8 * offset
            self.writable |= writable << 8 * offset
            self.clears |= clears << 8 * offset
            owned |= ((1 << 8 * width) - 1) << 8 * offset
        holes = [(0x94, 0x28), (0x90, 2)]  # the rest of the PCI Express capability is read-only
        for offset, width in [*holes, (0x4E, 2), (0, 0x40)]:
            owned |= ((1 << 8 * width) - 1) << 8 * offset
        conventional = (1 << 8 * 256) - 1
        self.scratch = conventional & ~owned if scratch else 0
        self.writable |= self.scratch
        self.now = self.start

    def write(self, offset: int, data: bytes) -> None:
        value = int.from_bytes(data, "little") << 8 * offset
        reach = ((1 << 8 * len(data)) - 1) << 8 * offset
        self.now = (self.now & ~(self.writable & reach)) | (value & self.writable & reach)
        self.now &= ~(value & self.clears)
        control = self.now >> 8 * 0x42 & 0xFFFF
        hit = offset < 0x44 and offset + len(data) > 0x42
        if hit and control & 1 and control >> 4 & 7 > 2:
            self.now = self.now & ~(0x70 << 8 * 0x42) | 0x20 << 8 * 0x42

    def reset(self) -> None:
        self.now = self.start & ~self.scratch | self.now & self.scratch

    def read(self, offset: int, length: int) -> bytes:
        return (self.now >> 8 * offset & (1 << 8 * length) - 1).to_bytes(length, "little")


offsets = st.one_of(st.sampled_from(sorted({row[0] for row in TABLE})), st.integers(0, 0x1FF), st.integers(0, 4095))
writes = st.tuples(offsets, st.binary(min_size=1, max_size=24))


@settings(max_examples=150, deadline=None)
@given(scratch=st.booleans(), steps=st.lists(st.one_of(writes, st.just("reset")), max_size=12))
def test_writes_and_resets_do_what_masks_say(scratch: bool, steps: list) -> None:
    config, oracle = build(scratch=scratch), Oracle(scratch=scratch)
    for step in steps:
        if step == "reset":
            config.reset()
            oracle.reset()
            continue
        offset, data = step
        data = data[: 4096 - offset]
        config.write(offset, data)
        oracle.write(offset, data)
        assert config.read(0, 4096).hex() == oracle.read(0, 4096).hex()
    for offset in range(0, 256, 7):
        assert config.read(offset, 5) == oracle.read(offset, 5)


def test_fresh_space_is_the_table() -> None:
    assert build().read(0, 4096) == Oracle(scratch=False).read(0, 4096)


@pytest.mark.parametrize(
    ("offset", "width", "size", "flags"),
    [(0x10, 4, 1 << 20, 0), (0x14, 8, 1 << 14, 0xC), (0x1C, 4, 32, 1)],
    ids=["32-bit", "64-bit", "io"],
)
def test_bar_sizing(offset: int, width: int, size: int, flags: int) -> None:
    config = build()
    config.write(offset, b"\xff" * width)
    answer = int.from_bytes(config.read(offset, width), "little")
    mask = 0x3 if flags & 1 else 0xF
    assert answer & mask == flags
    assert (1 << 8 * width) - (answer & ~mask) == size


def test_properties_follow_the_bits() -> None:
    config = build()
    assert (config.bus_master, config.memory_enabled, config.intx_disabled) == (False, False, False)
    config.write(0x04, struct.pack("<H", 0x406))
    assert (config.bus_master, config.memory_enabled, config.intx_disabled) == (True, True, True)
    assert config.command == 0x406
    config.write(PM + 4, b"\x03")
    assert config.power_state == 3
    assert not config.memory_enabled
    assert not config.msi_enabled
    config.write(MSI + 2, b"\x01")
    assert config.msi_enabled
    assert not config.msix_enabled
    config.write(MSIX + 3, b"\x80")
    assert config.msix_enabled
    assert config.is_express
    assert config.interrupt_pin == 1
    config.set_interrupt_status(True)
    assert config.get(0x06, 2) == 0x18
    config.set_interrupt_status(False)
    assert config.get(0x06, 2) == 0x10


@pytest.mark.parametrize(
    ("offset", "data", "resets"),
    [
        (EXP + 8, b"\x00\x80", 1),
        (EXP + 9, b"\x80", 1),
        (EXP + 4, struct.pack("<IHH", 0, 0xFFFF, 0), 1),
        (EXP + 9, b"\x7f", 0),
        (EXP + 8, b"\xff", 0),
        (EXP + 10, b"\x00\x80", 0),
        (EXP + 6, b"\x80\x80\x80\x00", 0),
    ],
)
def test_flr_bit_calls_and_reads_zero(offset: int, data: bytes, resets: int) -> None:
    config = build()
    calls = []

    def reset() -> None:
        calls.append(config.get(EXP + 8, 2))
        config.reset()

    config.on_function_reset = reset
    config.write(offset, data)
    assert len(calls) == resets
    assert all(not control & 0x8000 for control in calls)
    if resets:
        assert config.get(EXP + 8, 2) == 0x2810


def test_no_flr_without_the_capability() -> None:
    config = PciConfig(vendor=1, device=2, class_code=3)
    config.add_express(0x40, flr=False)
    config.on_function_reset = lambda: pytest.fail("reset")
    config.write(0x48, b"\x00\x80")
    assert not config.get(0x44, 4) & 1 << 28


@pytest.mark.parametrize(("offset", "length"), [(4096, 1), (4095, 2), (-1, 1), (0, 4097)])
def test_outside_is_refused(offset: int, length: int) -> None:
    config = build()
    with pytest.raises(ClientError):
        config.read(offset, length)
    with pytest.raises(ClientError):
        config.write(offset, bytes(length))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda c: c.add_bar(0, 16),
        lambda c: c.add_bar(2, 16),
        lambda c: c.add_bar(4, 24),
        lambda c: c.add_bar(4, 8),
        lambda c: c.add_bar(5, 1 << 20, wide=True),
        lambda c: c.add_bar(4, 1 << 32),
        lambda c: c.add_bar(4, 32, io=True, wide=True),
        lambda c: c.add_msi(0xA0, 1),
        lambda c: c.add_msix(0xD0, 1, table=(0, 0), pba=(0, 0x800)),
        lambda c: c.add_express(0xB0, version=3),
        lambda c: c.add_capability(0x9C, 9, bytes(30)),
        lambda c: c.add_capability(0xCA, 9, bytes(2)),
        lambda c: c.add_capability(0x30, 9, bytes(2)),
        lambda c: c.add_capability(0xFC, 9, bytes(4)),
        lambda c: c.add_register(0x182, 4),
        lambda c: c.add_register(0x200, 2, 0x10000),
        lambda c: c.add_register(0x200, 2, writable=3, write_clears=1),
    ],
)
def test_impossible_declarations_are_named(wrong) -> None:
    with pytest.raises(PluginError):
        wrong(build())


def test_impossible_spaces_are_named() -> None:
    with pytest.raises(PluginError):
        PciConfig(vendor=1, device=2, class_code=3, size=512)
    with pytest.raises(PluginError):
        PciConfig(vendor=0x10000, device=2, class_code=3)
