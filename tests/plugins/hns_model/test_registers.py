"""Registers of VF and PF as software meets them first: ids, start values, widths, capability words, generations."""

import pytest

from plugins.hns.models.generation import Order
from plugins.hns.registers import ZIP
from tests.plugins.hns_model.rig import Accelerator, counted
from vfu_server.errors import UsageError
from vfu_server.model import Bar

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("kind", "pf", "vf", "core"),
    [("zip", 0xA250, 0xA251, 0x3010AC), ("sec", 0xA255, 0xA256, 0x301008), ("hpre", 0xA258, 0xA259, 0x301800)],
)
def test_ids_bars_and_vectors(kind: str, pf: int, vf: int, core: int) -> None:
    device = Accelerator(kind, queues=5)
    assert (device.vf.config.get(0, 2), device.vf.config.get(2, 2)) == (0x19E5, vf)
    assert device.pf.config.get(2, 2) == pf
    assert device.vf.config.get(8, 1) == 0x30
    assert device.vf.bars == {2: Bar(0x10000, wide=True), 4: Bar(8 * 0x10000, wide=True)}
    assert device.pf.bars[2].size == 4 << 20
    assert device.vf.config.msi is not None
    assert device.vf.config.msi.vectors == 4
    assert device.vf.config.is_express
    assert device.pf_read(core) == 0
    assert device.pf_read(0x100008) == 0
    assert counted(device.pf) == {}


def test_start_values_of_a_vf() -> None:
    device = Accelerator()
    found = {offset: device.read(offset) for offset in (0, 4, 8, 0xC, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x34, 0x60, 0x208)}
    assert found == {0: 0, 4: 1, 8: 0, 0xC: 1, 0x20: 0, 0x24: 1, 0x28: 0, 0x2C: 0, 0x30: 1, 0x34: 0, 0x60: 1, 0x208: 0}
    assert [device.read(0x8000 + 4 * i) for i in range(7)] == [0] * 7
    assert [device.read(at) for at in (0x3100, 0x3104, 0x3108, 0x3114, 0x311C)] == [
        0x6F01, 0x04000800, 0x04000400, 0x10003, 0x40003,
    ]  # fmt: skip
    assert device.read(0x210) == 0
    assert counted(device.vf) == {}
    assert Accelerator(isolation=False).read(0x30) == 0


def test_migration_registers_keep_what_is_written() -> None:
    device = Accelerator()
    for start in (0x8000, 0x8020):
        for index in range(7):
            device.write(start + 4 * index, 0x11111111 * (index + 1))
    assert [device.read(0x8000 + 4 * i) for i in range(7)] == [device.read(0x8020 + 4 * i) for i in range(7)]
    assert device.read(0x8010) == 0x55555555
    assert device.vf.state()["aeqc6"] == 0x77777777
    assert counted(device.vf) == {}


@pytest.mark.parametrize(
    ("offset", "width", "answer", "name"),
    [
        (0x04, 8, (1 << 64) - 1, "width"), (0x05, 1, 0xFF, "width"), (0x04, 2, 0xFFFF, "width"),
        (0x40, 4, 0, "no_register"), (0x8000, 8, 0, "width"), (0x801C, 4, 0, "no_register"),
        (0x303, 1, 0xFF, "width"), (0x7FFC, 4, 0, "no_register"), (0xFFFC, 4, 0, "no_register"),
    ],
)  # fmt: skip
def test_reads_that_hardware_does_not_take_are_counted(offset: int, width: int, answer: int, name: str) -> None:
    device = Accelerator()
    assert device.read(offset, width) == answer
    assert counted(device.vf) == {name: 1}


@pytest.mark.parametrize(
    ("offset", "width", "name"),
    [
        (0x0C, 8, "width"), (0x0C, 1, "width"), (0x28, 4, "read_only"), (0x208, 4, "read_only"),
        (0x1000, 4, "width"), (0x2004, 4, "width"), (0x40, 4, "no_register"), (0x3100, 4, "read_only"),
        (0x8001, 1, "width"),
    ],
)  # fmt: skip
def test_writes_that_hardware_does_not_take_do_nothing(offset: int, width: int, name: str) -> None:
    device = Accelerator()
    before = {key: value for key, value in device.vf.state().items() if not key.startswith("violation")}
    device.write(offset, 0, width)
    after = device.vf.state()
    assert {key: after[key] for key in before} == before
    assert (after["violations"], after[f"violation.{name}"]) == (1, 1)


def test_bits_that_registers_have() -> None:
    device = Accelerator()
    for offset, kept in ((0x24, 1), (0x30, 1), (0x34, 3), (0x60, 1), (0x04, 1), (0x0C, 1)):
        device.write(offset, ONES)
        assert device.read(offset) == kept
        device.write(offset, 0)
        assert device.read(offset) == 0
    device.write(0x38, 1)
    assert device.read(0x38) == 0


def test_a_reset_brings_start_values_and_keeps_the_queues() -> None:
    device = Accelerator(queues=7)
    before = device.vf.state()
    for offset, value in ((0x04, 0), (0x34, 2), (0x60, 0), (0x8000, 5), (0x8024, 6)):
        device.write(offset, value)
    device.mailbox(0x200E)
    assert device.vf.state()["paused"] == 7
    device.vf.reset()
    after = dict(device.vf.state())
    assert after.pop("resets") == 1
    ignored = {"resets", "commands"}
    assert {k: v for k, v in after.items() if k not in ignored} == {k: v for k, v in before.items() if k not in ignored}


def test_flr_by_config_space_is_offered() -> None:
    device = Accelerator()
    calls: list[bool] = []
    device.vf.config.on_function_reset = lambda: calls.append(True)
    device.vf.config.write(0x48, b"\x00\x80")
    assert calls == [True]
    assert device.vf.can_reset


def test_generations() -> None:
    old = Accelerator(revision=0x21)
    assert old.vf.config.get(8, 1) == 0x21
    assert old.read(0x3100) == 0
    assert old.mailbox(0x200E) >> 9 & 0xF == 1
    assert old.read(0x8000) == 0
    assert counted(old.vf) == {"mailbox_command": 1, "no_register": 1}
    hidden = Accelerator(sub_version=0x51)
    assert (hidden.vf.config.get(8, 1), hidden.read(0x210)) == (0x30, 0x51)
    hidden.write(0x38, 1)
    assert hidden.read(0x38) == 1
    late = Accelerator(revision=0x50, pf_ctrl=True)
    assert late.pf_read(0x100198) == 1
    assert late.read(0x8000) == 0
    assert counted(late.vf) == {"no_register": 1}
    third = Accelerator()
    third.pf_write(0x100198, 1)
    assert third.pf_read(0x100198) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"revision": 0x20}, {"revision": 0x31}, {"pf_ctrl": True}, {"vfs": 0}, {"vfs": 64}, {"queues": 0},
        {"queues": 1000}, {"pf_queues": 0}, {"entry_seconds": -1}, {"vfs": 63, "queues": 16},
    ],
)  # fmt: skip
def test_orders_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Order(ZIP, **wrong)
