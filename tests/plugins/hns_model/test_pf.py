"""The PF: queue ranges, errors, resets; and the faults that a test can order of PF and VF."""

import pytest

from tests.plugins.hns_model.rig import MSI_ENABLE, Accelerator, Load, counted


def vft(device: Accelerator, kind: int, function: int, word: int | None = None) -> int:
    """One operation as the kernel does it; returns the data."""
    assert device.pf_read(0x10006C) == 1
    device.pf_write(0x100058, int(word is None))
    device.pf_write(0x10005C, kind)
    device.pf_write(0x100060, function)
    if word is not None:
        device.pf_write(0x100064, word & 0xFFFFFFFF)
        device.pf_write(0x100068, word >> 32)
    device.pf_write(0x10006C, 0)
    device.pf_write(0x100054, 1)
    assert device.pf_read(0x10006C) == 0
    device.buses["pf"].run()
    assert device.pf_read(0x10006C) == 1
    return device.pf_read(0x100064) | device.pf_read(0x100068) << 32


def test_ranges_are_read() -> None:
    device = Accelerator(queues=32, pf_queues=64, vfs=2)
    assert vft(device, 0, 1) == 0x0003F00400000000
    assert vft(device, 0, 2) == 0x0003F00600000000
    assert vft(device, 0, 0) == 63 << 45 | 1 << 44
    assert vft(device, 1, 1) == 1 << 28
    assert vft(device, 2, 1) == 0
    assert vft(device, 0, 40) == 0
    assert device.pf_read(0x100158) == 1024 | 1024 << 11
    assert counted(device.pf) == {}


def test_ranges_are_assigned() -> None:
    device = Accelerator(queues=8, pf_queues=64)
    vft(device, 0, 1, 100 << 28 | 1 << 44 | 3 << 45)
    assert vft(device, 0, 1) == 100 << 28 | 1 << 44 | 3 << 45
    device.mailbox(0x6006)
    assert device.read(0x304) | device.read(0x308) << 32 == 100 << 28 | 1 << 44 | 3 << 45
    device.write(0x1000, 4 | 1 << 32, 8)
    assert counted(device.vf) == {"doorbell_queue": 1}
    vft(device, 0, 1, 60 << 28 | 1 << 44 | 9 << 45)
    vft(device, 0, 1, 1020 << 28 | 1 << 44 | 9 << 45)
    assert counted(device.pf) == {"vft_range": 2}
    vft(device, 0, 1, 0)
    device.mailbox(0x6006)
    assert device.read(0x304) | device.read(0x308) << 32 == 0
    vft(device, 2, 1, 0x1234)
    assert vft(device, 2, 1) == 0x1234


def test_a_start_that_was_not_announced_and_a_table_that_is_not_there() -> None:
    device = Accelerator()
    device.pf_write(0x100054, 1)
    device.buses["pf"].run()
    vft(device, 3, 1)
    assert counted(device.pf) == {"vft_ready": 1, "vft_type": 1}


def test_injected_errors_are_reported_masked_and_cleared() -> None:
    device = Accelerator()
    device.buses["pf"].config_write(*MSI_ENABLE)
    device.pf_write(0x10000C, 0x21)
    assert device.buses["pf"].take_messages() == [3]
    assert (device.pf_read(0x100000), device.pf_read(0x100008)) == (0x21, 0x21)
    device.pf_write(0x100004, 0x20)
    assert device.pf_read(0x100008) == 1
    device.pf_write(0x100000, 1)
    assert (device.pf_read(0x100000), device.pf_read(0x100008)) == (0x20, 0)
    device.pf_write(0x10000C, 0x20)
    assert device.buses["pf"].take_messages() == []


@pytest.mark.parametrize(
    ("kind", "inject", "source", "mask", "off", "status"),
    [
        ("zip", 0x3010A8, 0x3010A0, 0x3010A4, 1, 0x3010AC),
        ("hpre", 0x301500, 0x301600, 0x301400, 1, 0x301800),
        ("sec", None, 0x301010, 0x301000, 0xFFFFFFFE, 0x301008),
    ],
)
def test_core_errors(kind: str, inject: int | None, source: int, mask: int, off: int, status: int) -> None:
    device = Accelerator(kind)
    if inject is None:
        device.pf.shared.core_errors.inject(1)
    else:
        device.pf_write(inject, 1)
    assert (device.pf_read(source), device.pf_read(status)) == (1, 1)
    device.pf_write(mask, off)
    assert (device.pf_read(source), device.pf_read(status)) == (1, 0)
    device.pf_write(source, 1)
    assert device.pf_read(source) == 0
    assert counted(device.pf) == {}


def test_the_rest_of_the_pf() -> None:
    device = Accelerator("hpre")
    device.pf_write(0x100040, 1)
    assert device.pf_read(0x100044) == 1
    assert device.pf_read(0x300150) == 0
    device.pf_write(0x300000, 1)
    assert device.pf_read(0x300150) == 3
    for offset in (0x1000EC, 0x1000F0, 0x1000F4, 0x1000F8, 0x1040F8):
        device.pf_write(offset, 0x55)
        assert device.pf_read(offset) == 0x55
    assert device.pf_read(0x3124) == 0
    assert device.pf.read(4, 0x1000, 8) == 0
    assert counted(device.pf) == {}


def test_the_pf_has_queues_of_its_own() -> None:
    device = Accelerator(vfs=1)
    device.functions["vf0"], device.buses["vf0"] = device.functions["pf"], device.buses["pf"]  # type: ignore[assignment]
    device.buses["pf"].config_write(*MSI_ENABLE)

    class PfAsVf(Accelerator):
        @property
        def vf(self):  # type: ignore[override]
            return self.functions["vf0"]

    device.__class__ = PfAsVf
    work = Load(device, queues=2)
    work.fill()
    work.finish()
    assert work.completed == 14


def test_a_reset_of_the_pf_reaches_every_vf() -> None:
    device = Accelerator(vfs=2)
    device.write(0x34, 2)
    device.functions["vf1"].write(2, 0x34, 4, 1)
    device.pf_write(0x10000C, 1)
    vft(device, 0, 1, 0)
    device.pf.bus_reset()
    assert (device.read(0x34), device.pf_read(0x100008), vft(device, 0, 1)) == (2, 1, 0)
    device.pf.reset()
    assert (device.read(0x34), device.functions["vf1"].read(2, 0x34, 4), device.pf_read(0x100008)) == (0, 0, 0)
    assert vft(device, 0, 1) != 0


@pytest.mark.parametrize(
    ("fault", "offset", "shown"),
    [("ras-error", 0x100008, 0x20), ("core-error", 0x3010AC, 2)],
)
def test_errors_to_order_of_the_pf(fault: str, offset: int, shown: int) -> None:
    device = Accelerator()
    device.pf.faults.armed[fault] = 2
    assert [device.pf_read(offset) for _ in range(3)] == [shown, shown, 0]
    device.pf.faults.armed[fault] = -1
    assert {device.pf_read(offset) for _ in range(200)} == {shown}


def test_a_vft_that_never_gets_ready() -> None:
    device = Accelerator()
    device.pf.faults.armed["vft-stuck"] = 1
    device.pf_write(0x10006C, 0)
    device.pf_write(0x100054, 1)
    device.buses["pf"].step(10)
    assert device.pf_read(0x10006C) == 0
    device.pf.reset()
    assert vft(device, 0, 1)


@pytest.mark.parametrize(("fault", "offset"), [("message-waiting", 0x28), ("message-unanswered", 0x2C)])
def test_messages_to_order_of_the_vf(fault: str, offset: int) -> None:
    device = Accelerator()
    device.vf.faults.armed[fault] = 1
    assert [device.read(offset) for _ in range(2)] == [1, 0]


def test_a_state_that_says_not_ready() -> None:
    device = Accelerator()
    device.write(0x60, 0)
    device.vf.faults.armed["not-ready"] = 1
    assert [device.read(0x60) for _ in range(2)] == [1, 0]
    assert device.vf.state()["vf_state"] == 0


def test_a_write_back_that_never_ends_and_one_that_cannot() -> None:
    device = Accelerator()
    work = Load(device, queues=1)
    device.vf.faults.armed["write-back-stuck"] = 1
    device.write(0x204, 1)
    device.bus.step(10)
    assert (device.read(0x204), device.read(0x208)) == (1, 0)
    device.write(0x204, 1)
    assert counted(device.vf) == {"write_back_busy": 1}
    device.vf.reset()
    work = Load(device, queues=1)
    device.bus.read_only.append((work.layout.sqc_table, work.layout.sqc_table + 64))
    device.write(0x204, 1)
    device.bus.run()
    assert device.read(0x208) == 0
    device.bus.read_only.clear()
    device.write(0x204, 1)
    device.bus.run()
    assert device.read(0x208) == 1
    work.submit(0)
    work.finish()
