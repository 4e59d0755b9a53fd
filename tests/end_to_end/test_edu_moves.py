"""edu between two real servers: busy, with interrupts pending, there and back, and with hardware that fails."""

import errno
import random

import pytest

from tests.end_to_end.served import Served, negotiated
from vfu_server.testing import EduDriver, ReplyError, load, migrate_guest, pci, save
from vfu_server.testing.edu import (
    BUFFER,
    DMA_FROM_DEVICE,
    IRQ_DMA,
    REG_DMA_COMMAND,
    REG_DMA_COUNT,
    REG_DMA_DESTINATION,
    REG_DMA_SOURCE,
    REG_FACTORIAL,
    REG_IRQ_STATUS,
    REG_LIVENESS,
    REG_STATUS,
)
from vfu_server.uapi import PCI_COMMAND, IrqIndex, MigState, RegionIndex

RESULTS = (1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800)


def config_of(guest):
    """Config space as the guest sees it."""
    return guest.client.read_block(RegionIndex.CONFIG, 0, guest.regions[RegionIndex.CONFIG].size)


@pytest.mark.parametrize(("use", "times"), [("use_intx", 20), ("use_msi", 6)])
def test_there_and_back_with_every_byte_compared(edu_source, edu_target, edu, edu_arrival, use, times):
    chance = random.Random(use)
    here, there = edu, edu_arrival
    model, other_model = edu_source.model, edu_target.model
    getattr(EduDriver(here), use)()
    for n in range(times):
        driver = EduDriver(here, by_interrupt=True)
        contents = chance.randbytes(4096)
        here.memory.write(0x1000, chance.randbytes(4 << 20))
        here.memory.write(0x7000, contents)
        driver.copy_to_device(0x7000, 4096)
        driver.write32(REG_LIVENESS, chance.getrandbits(32))
        assert driver.factorial(n % 10 + 1) == RESULTS[n % 10]
        here.write(0, REG_DMA_SOURCE, 8, chance.getrandbits(60))
        here.write(0, REG_DMA_COUNT, 8, chance.getrandbits(64))
        driver.write32(REG_STATUS, 0x80 * chance.randrange(2))
        here.config.write(0x0C, 1, chance.randrange(256))
        here.config.write(0x3C, 1, chance.randrange(256))
        registers, config, memory = model.registers(), config_of(here), here.memory.read(0, 16 << 20)
        migrate_guest(here, there)
        assert other_model.registers() == registers
        assert here.memory.read(0, 16 << 20) == memory, "a save writes nothing into guest memory"
        assert there.memory.read(0, 16 << 20) == memory, "nor does a restore"
        assert without_messages(config_of(there)) == without_messages(config)
        assert there.interrupts.index == (IrqIndex.MSI if use == "use_msi" else IrqIndex.INTX)
        here.client.set_mig_state(MigState.RUNNING)
        assert model.registers() == registers, "a save leaves the source as it was"
        here, there, model, other_model = there, here, other_model, model
        moved = EduDriver(here, by_interrupt=True)
        moved.copy_from_device(0x9000, 4096)
        assert here.memory.read(0x9000, 4096) == contents


def without_messages(config):
    """The MSI capability is the VMM's to set up again."""
    return config[:0x40] + config[0x50:]


def test_a_pending_pin_interrupt_arrives(edu, edu_arrival):
    driver = EduDriver(edu)
    driver.use_intx()
    driver.raise_interrupt(0x30)
    edu.interrupts.wait(0)
    migrate_guest(edu, edu_arrival)
    assert edu_arrival.interrupts.wait(0) >= 1
    moved = EduDriver(edu_arrival, by_interrupt=True)
    assert moved.read32(REG_IRQ_STATUS) == 0x30
    moved.acknowledge(0x10)
    assert edu_arrival.interrupts.wait(0) == 1, "the line is still up for the other cause"
    moved.acknowledge(0x20)
    assert moved.read32(REG_IRQ_STATUS) == 0
    assert edu_arrival.interrupts.count(0) == 0
    assert moved.factorial(6) == 720


def test_a_pending_message_arrives(edu, edu_arrival):
    driver = EduDriver(edu)
    driver.use_msi()
    driver.raise_interrupt(0x30)
    migrate_guest(edu, edu_arrival)
    assert edu_arrival.interrupts.index == IrqIndex.MSI
    assert edu_arrival.interrupts.wait(0) == 1
    moved = EduDriver(edu_arrival, by_interrupt=True)
    assert moved.read32(REG_IRQ_STATUS) == 0x30
    moved.acknowledge(0x30)
    assert moved.factorial(6) == 720


@pytest.mark.parametrize("use", ["use_intx", "use_msi"])
def test_no_interrupt_pending_none_arrives(edu, edu_arrival, use):
    driver = EduDriver(edu)
    getattr(driver, use)()
    edu.memory.write(0x1000, b"with the interrupt bit in the command")
    driver.copy_to_device(0x1000, 37)
    migrate_guest(edu, edu_arrival)
    moved = EduDriver(edu_arrival, by_interrupt=True)
    assert moved.read32(REG_DMA_COMMAND) == 4, "restored by running a command that signals"
    assert moved.read32(REG_IRQ_STATUS) == 0
    assert edu_arrival.interrupts.count(0) == 0
    assert edu_arrival.config.read(PCI_COMMAND, 2) == edu.config.read(PCI_COMMAND, 2)


@pytest.mark.parametrize("use", ["use_intx", "use_msi"])
def test_a_transfer_under_way_ends_before_the_move_and_its_interrupt_is_not_lost(edu, edu_arrival, use):
    driver = EduDriver(edu)
    getattr(driver, use)()
    edu.memory.write(0x1000, b"on the way while the device stops")
    driver.copy_to_device(0x1000, 33)
    driver.begin_dma(BUFFER, 0x5000, 33, DMA_FROM_DEVICE)
    migrate_guest(edu, edu_arrival)
    assert edu_arrival.memory.read(0x5000, 33) == b"on the way while the device stops"
    moved = EduDriver(edu_arrival, by_interrupt=True)
    assert moved.read32(REG_IRQ_STATUS) == IRQ_DMA
    moved.finish_dma()


@pytest.mark.parametrize(
    ("fault", "begin", "queue"),
    [
        (
            "dma-stuck",
            lambda driver: driver.begin_dma(0x1000, BUFFER, 64, 0),
            (
                "queue 'DMA' (dma_command 0x0000000000000001 [running], dma_source 0x0000000000001000, "
                "dma_destination 0x0000000000040000, dma_count 0x0000000000000040)"
            ),
        ),
        (
            "factorial-stuck",
            lambda driver: driver.begin_factorial(9),
            "queue 'factorial' (status 0x00000001 [computing], factorial 0x00000009)",
        ),
    ],
)
def test_a_stop_that_times_out_names_the_queue_and_the_device_goes_on(folder, fault, begin, queue):
    with Served(folder, "edu", time_scale=0.01, options=("--option", "drain-timeout=0.15")) as server:
        with server.connect() as guest:
            driver = EduDriver(guest.start())
            server.fault(fault)
            begin(driver)
            for target in (MigState.STOP, MigState.STOP_COPY, MigState.RESUMING):
                server.forget()
                with pytest.raises(ReplyError) as caught:
                    guest.client.set_mig_state(target)
                assert caught.value.errno == errno.ETIMEDOUT
                assert f"not empty after 0.15 s: {queue}" in server.said()
                assert guest.client.mig_state() == MigState.RUNNING
                assert driver.liveness(0x1234 + target) == 0x1234 + target ^ 0xFFFFFFFF, "its doorbells are open again"
            if fault == "dma-stuck":
                assert driver.factorial(10) == 3628800
            else:
                guest.memory.write(0x1000, b"goes on")
                driver.copy_to_device(0x1000, 7)
                driver.copy_from_device(0x2000, 7)
                assert guest.memory.read(0x2000, 7) == b"goes on"
            server.forget()
        server.wait_log("could not be brought back after its last client")
        assert queue.partition(" (")[0] in server.log
        with pytest.raises(ReplyError) as refused:
            negotiated(server.path)
        assert refused.value.errno == errno.ENODEV, "a device that cannot be reset is given to nobody"
        assert server.end()[0] == 1


@pytest.fixture
def state(edu):
    """An edu's state."""
    driver = EduDriver(edu)
    driver.write32(REG_LIVENESS, 0xABCD)
    edu.memory.write(0x1000, b"what the buffer holds" * 100)
    driver.copy_to_device(0x1000, 2100)
    edu.client.set_mig_state(MigState.STOP_COPY)
    return b"".join(save(edu.client))


@pytest.mark.parametrize("fault", ["bit-flip", "dma-drop"])
def test_a_restore_that_the_hardware_did_not_take_is_found_and_not_tried_again(edu_target, edu_arrival, state, fault):
    client = edu_arrival.client
    client.set_mig_state(MigState.RESUMING)
    load(client, [state])
    edu_target.forget()
    edu_target.fault(fault)
    for _ in range(3):
        with pytest.raises(ReplyError) as caught:
            client.set_mig_state(MigState.RUNNING)
        assert caught.value.errno == errno.EIO
        assert client.mig_state() == MigState.RESUMING
    said = edu_target.said()
    assert said.count("RestoreError: model: the device's buffer does not hold what was written") == 1
    assert edu_target.model.control("fault", name=fault, times=0) == {}
    client.reset()
    pci.place_bars(edu_arrival.config, edu_arrival.bars)
    driver = EduDriver(edu_arrival)
    assert driver.read32(REG_LIVENESS) == 0
    client.set_mig_state(MigState.RESUMING)
    load(client, [state])
    client.set_mig_state(MigState.RUNNING)
    assert driver.read32(REG_LIVENESS) == 0xABCD ^ 0xFFFFFFFF
    driver.copy_from_device(0x3000, 2100)
    assert edu_arrival.memory.read(0x3000, 2100) == b"what the buffer holds" * 100


def test_a_restore_that_hangs_ends_in_time(folder, state):
    with Served(folder, "edu", time_scale=0.01) as server, server.connect() as guest:
        client = guest.start().client
        client.set_mig_state(MigState.RESUMING)
        load(client, [state])
        server.fault("dma-stuck")
        with pytest.raises(ReplyError) as caught:
            client.set_mig_state(MigState.RUNNING)
        assert caught.value.errno == errno.ETIMEDOUT
        assert client.mig_state() == MigState.RESUMING
        assert "DeadlineError" in server.said()


def test_a_save_whose_transfer_moves_nothing_is_refused_and_the_source_goes_on(edu_source, edu):
    """The device tells of no failed transfer: unnoticed, a buffer of zeros would travel."""
    driver = EduDriver(edu)
    edu.memory.write(0x1000, b"must not become zeros")
    driver.copy_to_device(0x1000, 21)
    edu_source.fault("dma-drop")
    edu_source.forget()
    edu.client.set_mig_state(MigState.STOP_COPY)
    with pytest.raises(ReplyError) as caught:
        list(save(edu.client))
    assert caught.value.errno == errno.EIO
    assert "the buffer was not fetched: the device's DMA did not arrive" in edu_source.said()
    edu.client.set_mig_state(MigState.RUNNING)
    driver.copy_from_device(0x2000, 21)
    assert edu.memory.read(0x2000, 21) == b"must not become zeros"
    edu.client.set_mig_state(MigState.STOP_COPY)
    assert b"must not become zeros" in b"".join(save(edu.client))


def test_registers_of_a_stopped_device_show_their_last_values_and_take_nothing(edu_source, edu):
    driver = EduDriver(edu)
    driver.write32(REG_LIVENESS, 0x55)
    assert driver.factorial(4) == 24
    for state in (MigState.STOP, MigState.STOP_COPY):
        edu.client.set_mig_state(state)
        if state == MigState.STOP_COPY:
            list(save(edu.client))
        assert edu_source.model.control("clear") == {}
        for offset in (REG_LIVENESS, REG_FACTORIAL, REG_STATUS, REG_DMA_DESTINATION):
            driver.write32(offset, 0x77)
        assert driver.read32(REG_LIVENESS) == 0x55 ^ 0xFFFFFFFF
        assert driver.read32(REG_FACTORIAL) == 24
        assert edu_source.model.accesses(region=0) == 0, "nothing of it has reached the hardware"
    edu.client.set_mig_state(MigState.RUNNING)
    assert driver.read32(REG_LIVENESS) == 0x55 ^ 0xFFFFFFFF
    assert driver.factorial(5) == 120
