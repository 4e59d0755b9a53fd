"""The mailbox, with the computed examples of the kernel's commands, and everything that it does not take."""

import struct

import pytest

from tests.plugins.hns_model.rig import Accelerator, counted

BOX = 0x300


def halves(device: Accelerator, text: str) -> None:
    data = bytes.fromhex(text)
    for at in (0, 8):
        device.write(BOX + at, int.from_bytes(data[at : at + 8], "little"), 8)


def words(device: Accelerator) -> str:
    return b"".join(device.read(BOX + at).to_bytes(4, "little") for at in range(0, 16, 4)).hex(" ", 4)


def test_pause_as_stored_and_as_it_ends() -> None:
    device = Accelerator()
    halves(device, "0e200000 00000000 00000000 00000000")
    assert device.read(BOX) == 0x200E
    assert device.vf.state()["paused"] == 0
    device.bus.run()
    assert words(device) == "0e000000 00000000 00000000 00000000"
    assert device.vf.state()["paused"] == 16
    device.vf.faults.armed["mailbox-error"] = 1
    assert device.mailbox(0x200E) == 0x020E
    assert counted(device.vf) == {}


def test_tables_are_set_and_got() -> None:
    device = Accelerator()
    halves(device, "04200000 00604523 01000000 00000000")
    device.bus.run()
    assert words(device) == "04000000 00604523 01000000 00000000"
    assert device.mailbox(0x2005, 0, 0xABCDE000) == 0x0005
    assert device.mailbox(0x6004) == 0x4004
    assert (device.read(BOX + 4), device.read(BOX + 8, 8)) == (0x23456000, 1)
    assert device.read(BOX, 8) == 0x2345600000004004
    assert device.mailbox(0x6005) == 0x4005
    assert (device.read(BOX + 4), device.read(BOX + 8)) == (0xABCDE000, 0)


def test_vft_of_32_queues_from_64() -> None:
    device = Accelerator(queues=32, pf_queues=64)
    halves(device, "06600000 00000000 00000000 00000000")
    device.bus.run()
    assert device.read(BOX + 4) | device.read(BOX + 8) << 32 == 0x0003F00400000000


def test_contexts_go_by_dma_both_ways() -> None:
    device = Accelerator()
    device.mailbox(0x2004, base=0x1000)
    device.mailbox(0x2005, base=0x2000)
    sqc = struct.pack("<HHQIHHHHHHI", 3, 3, 0x8000, 1023 | 7 << 12, 0, 0, 0, 0, 5, 0x10, 0)
    cqc = struct.pack("<HHQIHHHHII", 2, 3, 0x9000, 1023 | 4 << 12, 0, 0, 0, 0, 3, 0)
    device.bus.memory[0x400:0x420], device.bus.memory[0x420:0x440] = sqc, cqc
    assert device.mailbox(0x2000, 5, 0x400) == 0x50000
    assert device.mailbox(0x2001, 5, 0x420) == 0x50001
    assert device.mailbox(0x6000, 5, 0x500) == 0x54000
    assert device.mailbox(0x6001, 5, 0x520) == 0x54001
    assert bytes(device.bus.memory[0x500:0x540]) == sqc + cqc
    assert bytes(device.bus.memory[0x1000 + 5 * 32 : 0x1000 + 6 * 32]) == bytes(32)
    device.write(0x204, 1)
    device.bus.run()
    assert device.read(0x208) == 1
    assert bytes(device.bus.memory[0x1000 + 5 * 32 : 0x1000 + 6 * 32]) == sqc
    assert bytes(device.bus.memory[0x2000 + 5 * 32 : 0x2000 + 6 * 32]) == cqc
    for code in (2, 3):
        words28 = struct.pack("<IQIIII", 7 | 9 << 16, 0x7000, 1, 2, 3, 2047)
        device.bus.memory[0x400 : 0x400 + 28] = words28
        assert device.mailbox(0x2000 | code, 0, 0x400) == code
        assert device.mailbox(0x6000 | code, 0, 0x600) == 0x4000 | code
        assert bytes(device.bus.memory[0x600:0x620]) == words28 + bytes(4)
    assert [device.read(0x8000 + 4 * i) for i in range(7)] == [7 | 9 << 16, 0x7000, 0, 1, 2, 3, 2047]
    assert counted(device.vf) == {}


@pytest.mark.parametrize("width", [1, 2, 4])
def test_only_16_bytes_are_a_command(width: int) -> None:
    device = Accelerator()
    for at in range(0, 16, width):
        device.write(BOX + at, 0x0E if at == 0 else 0x20 if at == 1 else 0, width)
    device.write(BOX, 0x200E, 4)
    device.bus.run()
    assert device.vf.state()["commands"] == 0
    assert device.vf.state()["paused"] == 0
    assert counted(device.vf) == {"mailbox_width": 16 // width + 1}


def test_halves_that_do_not_belong_together_are_no_command() -> None:
    device = Accelerator()
    device.write(BOX + 8, 0, 8)
    device.write(BOX, 0x200E, 8)
    device.write(BOX, 0x200E, 8)
    device.write(0x34, 0)
    device.write(BOX + 8, 0, 8)
    device.bus.run()
    assert device.vf.state()["commands"] == 0
    assert counted(device.vf) == {"mailbox_half": 4}


def test_a_command_on_a_busy_mailbox_is_dropped() -> None:
    device = Accelerator()
    halves(device, "04200000 00604523 01000000 00000000")
    halves(device, "0e200000 00000000 00000000 00000000")
    device.bus.run()
    assert device.vf.state()["paused"] == 0
    assert device.mailbox(0x6004) == 0x4004
    assert counted(device.vf) == {"mailbox_busy": 1}


def test_without_the_busy_bit_it_is_no_command() -> None:
    device = Accelerator()
    halves(device, "0e000000 00000000 00000000 00000000")
    halves(device, "0e200000 00000000 00000000 01000000")
    device.bus.run()
    assert device.vf.state()["commands"] == 0
    assert counted(device.vf) == {"mailbox_malformed": 2}


@pytest.mark.parametrize(
    ("word0", "queue", "base", "name"),
    [
        (0x2007, 0, 0, "mailbox_command"), (0x20FF, 0, 0, "mailbox_command"), (0x2006, 0, 0, "mailbox_command"),
        (0x600E, 0, 0, "mailbox_command"), (0x200E, 1, 0, "mailbox_malformed"), (0x200E, 0, 64, "mailbox_malformed"),
        (0x2000, 16, 0x400, "mailbox_queue"), (0x2002, 1, 0x400, "mailbox_queue"), (0x2008, 16, 0, "mailbox_queue"),
        (0x2000, 0, 0x410, "mailbox_buffer"), (0x2000, 0, 0, "mailbox_buffer"), (0x2004, 0, 0, "mailbox_buffer"),
        (0x2000, 0, 0x400, "mailbox_context"), (0x2002, 0, 0x400, "mailbox_context"),
        (0x2003, 0, 1 << 40, "mailbox_dma"), (0x6002, 0, 1 << 40, "mailbox_dma"), (0x200C, 1, 0, "mailbox_queue"),
    ],
)  # fmt: skip
def test_commands_that_fail(word0: int, queue: int, base: int, name: str) -> None:
    device = Accelerator()
    assert device.mailbox(word0, queue, base) >> 9 & 0xF == 1
    assert counted(device.vf) == {name: 1}
    assert device.mailbox(0x200E) == 0x0E


@pytest.mark.parametrize(
    ("which", "change"),
    [
        (0, {"base": 0}), (0, {"size": 6}), (0, {"cq": 4}), (0, {"head": 16}), (0, {"depth": 0}),
        (1, {"size": 7}), (1, {"tail": 99}),
    ],
)  # fmt: skip
def test_contexts_that_cannot_be(which: int, change: dict[str, int]) -> None:
    device = Accelerator()
    device.mailbox(0x2004, base=0x1000)
    device.mailbox(0x2005, base=0x2000)
    good = {"head": 0, "tail": 0, "base": 0x8000, "depth": 15, "size": 4 if which else 7, "cq": 3}
    for fields, status in ((good | change, 1), (good, 0)):
        shape = fields["depth"] | fields["size"] << 12
        data = struct.pack("<HHQIHHHH", fields["head"], fields["tail"], fields["base"], shape, 0, 0, 0, 0)
        data += struct.pack("<II", 3, 0) if which else struct.pack("<HHI", fields["cq"], 0x10, 0)
        device.bus.memory[0x400:0x420] = data
        assert device.mailbox(0x2000 | which, 3, 0x400) >> 9 & 0xF == status
    assert counted(device.vf) == {"mailbox_context": 1}


def test_a_context_without_a_table_fails() -> None:
    device = Accelerator()
    device.bus.memory[0x400:0x420] = struct.pack("<HHQIHHHHHHI", 0, 0, 0x8000, 15 | 7 << 12, 0, 0, 0, 0, 0, 0x10, 0)
    assert device.mailbox(0x2000, 0, 0x400) >> 9 & 0xF == 1
    assert device.mailbox(0x6000, 0, 0x400) >> 9 & 0xF == 1


def test_stuck_until_a_reset_and_slow() -> None:
    device = Accelerator()
    device.vf.faults.armed["mailbox-stuck"] = 1
    halves(device, "0e200000 00000000 00000000 00000000")
    device.bus.step(10)
    assert device.read(BOX) & 0x2000
    device.vf.reset()
    assert device.read(BOX) == 0
    device.vf.faults.armed["mailbox-slow"] = 1
    halves(device, "0e200000 00000000 00000000 00000000")
    device.bus.step(1)
    assert device.read(BOX) & 0x2000
    device.bus.step(1.5)
    assert device.read(BOX) == 0x0E


def test_a_reset_ends_a_command_on_its_way() -> None:
    device = Accelerator()
    halves(device, "0e200000 00000000 00000000 00000000")
    device.vf.reset()
    device.bus.run()
    assert device.read(BOX) == 0
    assert device.vf.state()["paused"] == 0


def test_busy_though_nothing_runs() -> None:
    device = Accelerator()
    device.vf.faults.armed["mailbox-busy"] = 2
    assert [device.read(BOX) & 0x2000 for _ in range(3)] == [0x2000, 0x2000, 0]
