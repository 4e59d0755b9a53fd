"""Interrupts and event rings: one event for news, none lost, masks, overflow, phases; messages between PF and VF."""

import pytest

from plugins.hns.models.guest_driver import DeviceError
from tests.plugins.hns_model.rig import MSI_ENABLE, Accelerator, Load, counted


def test_one_event_and_one_interrupt_for_many_completions() -> None:
    device = Accelerator()
    load = Load(device, queues=1)
    load.submit(0, 5)
    device.bus.run()
    assert device.bus.messages == [0]
    state = device.vf.state()
    assert (state["eqc.written"], state["eqc0"], state["eq_int_source"]) == (1, 1 << 16, 1)
    load.handle()
    assert load.completed == 5
    assert device.vf.state()["eq_int_source"] == 0


def test_no_second_interrupt_before_an_answer_and_one_after() -> None:
    device = Accelerator()
    load = Load(device, queues=3)
    for queue in range(3):
        load.submit(queue)
        device.bus.run()
    assert device.bus.take_messages() == [0]
    assert device.vf.state()["eqc.written"] == 3
    device.write(0x2000, 0x0000000100002000, 8)  # the first of three was read
    assert device.bus.take_messages() == [0]
    device.write(0x2000, 0x0000000300002000, 8)
    assert device.bus.take_messages() == []


def test_a_completion_that_slips_in_before_the_event_is_asked_for_is_told() -> None:
    device = Accelerator(entry_seconds=1.0)
    load = Load(device, queues=1)
    load.submit(0, 2)
    device.bus.step(1.0)
    completions = load.driver.completions(0)
    next(completions)
    device.bus.step(1.0)  # the second is written while no event is wanted
    assert device.vf.state()["eqc.written"] == 1
    device.write(0x1000, 0x0001000100001000, 8)  # queue 0, next to read 1, event wanted
    device.bus.run()
    assert device.vf.state()["eqc.written"] == 2
    assert device.vf.state()["completed"] == 2


def test_masked_interrupts_come_when_the_mask_opens() -> None:
    device = Accelerator()
    load = Load(device, queues=1)
    device.write(0x0C, 1)
    load.submit(0)
    device.bus.run()
    assert device.bus.messages == []
    device.write(0x0C, 0)
    assert device.bus.messages == [0]
    device.write(0x0C, 0)
    assert device.bus.messages == [0]


def test_no_bus_master_no_work() -> None:
    device = Accelerator()
    load = Load(device, queues=1)
    device.bus.config_write(4, b"\x02\x00")
    load.submit(0)
    device.bus.run()
    assert device.vf.state()["dma_errors"] == 1
    assert device.bus.messages == []


def test_the_event_ring_over_its_end() -> None:
    device = Accelerator()
    load = Load(device, queues=1)
    for _ in range(20):
        load.submit(0)
        load.finish()
    assert (load.interrupts, device.vf.state()["eqc.written"]) == (20, 20)
    assert device.vf.state()["eqc6"] == 7 | 1 << 16  # two wraps: phase 1 again
    load.submit(0, 4)
    load.finish()


def test_an_event_ring_that_is_never_read_overflows_and_nothing_is_forgotten() -> None:
    device = Accelerator()
    load = Load(device, queues=8)
    for queue in range(8):
        load.submit(queue)
    device.bus.run()
    state = device.vf.state()
    assert (state["completed"], state["eqc.written"]) == (8, 7)
    assert load.driver.errors() == [(7, 1)]
    load.finish()
    assert load.completed == 8


def test_an_event_ring_without_memory_loses_and_counts() -> None:
    device = Accelerator()
    load = Load(device, queues=1)
    device.bus.read_only.append((load.layout.eq, load.layout.eq + 64))
    load.submit(0)
    device.bus.run()
    assert device.vf.state()["eqc.lost"] == 1
    assert device.bus.messages == []


def test_message_from_the_vf_is_acknowledged_where_nobody_is_at_the_pf() -> None:
    device = Accelerator()
    device.mailbox(0x200C, 0, 0xB)
    device.write(0x2C, 1)
    assert device.read(0x2C) == 1
    device.bus.run()
    assert device.read(0x2C) == 0
    assert device.pf_read(0x100138) == 0


def test_messages_between_vf_and_pf() -> None:
    device = Accelerator(vfs=2)
    device.buses["pf"].config_write(*MSI_ENABLE)
    device.mailbox(0x200C, 0, 0x12_0000000B)
    device.write(0x2C, 1)
    device.bus.run()
    assert device.buses["pf"].messages == [2]
    assert (device.read(0x2C), device.pf_read(0x100138, 8)) == (1, 1 << 1)
    pf_mailbox(device, 0x600D, 1)
    assert (device.pf_read(0x304), device.pf_read(0x308)) == (0xB, 0x12)
    device.pf_write(0x100138, 1 << 1, 8)
    assert device.read(0x2C) == 0

    device.write(0x24, 0)
    pf_mailbox(device, 0x200C, 1, 0x3)
    device.pf_write(0x100134, 1)
    device.pf_write(0x100130, 1)
    assert device.bus.messages == [2]
    assert (device.read(0x28), device.read(0x20), device.pf_read(0x100128, 8)) == (1, 1, 2)
    device.mailbox(0x600D)
    assert device.read(0x304) == 3
    device.write(0x20, 1)
    assert (device.read(0x28), device.read(0x20), device.pf_read(0x100128, 8)) == (0, 0, 0)

    pf_mailbox(device, 0x200C, 0xFFFF, 0x2)
    device.pf_write(0x100134, 0x7F)
    device.pf_write(0x100130, 1)
    assert device.pf_read(0x100128, 8) == 6
    assert device.functions["vf1"].read(2, 0x28, 4) == 1
    device.functions["vf1"].reset()
    assert device.pf_read(0x100128, 8) == 2
    assert counted(device.vf) == counted(device.pf) == {}


def test_messages_by_registers_of_later_generations() -> None:
    device = Accelerator(revision=0x50)
    device.buses["pf"].config_write(*MSI_ENABLE)
    device.write(0x320, 0xB, 8)
    device.write(0x2C, 1)
    assert device.pf_read(0x104800 + 4) == 0xB
    device.pf_write(0x104700, 0x77, 8)
    device.pf_write(0x100134, 1)
    device.pf_write(0x100130, 1)
    assert (device.read(0x28), device.read(0x380, 8)) == (1, 0x77)
    assert counted(device.vf) == counted(device.pf) == {}
    third = Accelerator()
    third.write(0x320, 1, 8)
    third.pf_write(0x104700, 1, 8)
    assert counted(third.vf) == counted(third.pf) == {"no_register": 1}


def pf_mailbox(device: Accelerator, word0: int, queue: int, base: int = 0) -> None:
    device.pf_write(0x300, word0 | queue << 16 | (base & 0xFFFFFFFF) << 32, 8)
    device.pf_write(0x308, base >> 32, 8)
    device.buses["pf"].run()
    assert not device.pf_read(0x300) >> 9 & 0x1F


@pytest.mark.parametrize("fault", ["lost-interrupt", "lost-completion", "bit-flip", "cqe-error"])
def test_faults_show_to_a_guest_that_looks(fault: str) -> None:
    device = Accelerator()
    load = Load(device, queues=1)
    load.submit(0, 3)
    load.finish()
    device.vf.faults.armed[fault] = 1
    load.submit(0, 1)
    with pytest.raises((DeviceError, AssertionError)):
        load.finish()
    assert device.vf.faults.armed[fault] == 0
