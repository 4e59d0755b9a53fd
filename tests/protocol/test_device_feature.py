"""DEVICE_FEATURE, migration data and reset against the whole server: states, data, order, what works when."""

import errno
import itertools
import os

import pytest

from vfu_server import uapi
from vfu_server.testing import EduDriver, ReplyError, load, pci, save
from vfu_server.testing.edu import BUFFER, REG_LIVENESS
from vfu_server.uapi import Command, Feature, IrqIndex, MigState, RegionIndex

SET = uapi.FEATURE_SET
STATE = Feature.MIG_DEVICE_STATE


def test_every_state_is_reached_from_every_other(edu):
    client = edu.client
    client.set_mig_state(MigState.STOP_COPY)
    data = list(save(client))
    states = [MigState.RUNNING, MigState.STOP, MigState.STOP_COPY, MigState.RESUMING]
    for first, second in itertools.product(states, states):
        for state in (MigState.RUNNING, first, second):
            if client.mig_state() == MigState.RESUMING and state != MigState.RESUMING:
                load(client, data)  # only whole data opens the way out
            client.set_mig_state(state)
            assert client.mig_state() == state


def test_what_works_in_every_state(edu):
    client = edu.client
    for state in (MigState.STOP, MigState.STOP_COPY, MigState.RESUMING):
        client.set_mig_state(state)
        assert client.read(RegionIndex.CONFIG, 0, 4) == 0x11E81234
        client.write(RegionIndex.CONFIG, uapi.PCI_INTERRUPT_LINE, 1, 0x20 | state)
        assert client.read(RegionIndex.CONFIG, uapi.PCI_INTERRUPT_LINE, 1) == 0x20 | state
        edu.interrupts.arm()
        client.disable_irqs(IrqIndex.INTX)
        edu.interrupts.arm()
        client.dma_map(0x40000000, 0x1000, fd=edu.memory.fd)
        client.dma_unmap(0x40000000, 0x1000)
        assert client.get_info().num_regions == 9
        assert client.get_region_info(0).size == 1 << 20
        assert client.get_irq_info(1).count == 1
        assert client.mig_data_size() > 0
        assert client.mig_state() == state


@pytest.mark.parametrize("state", [None, MigState.STOP, MigState.RESUMING])
def test_data_is_read_in_stop_copy_only(edu, state):
    if state is not None:
        edu.client.set_mig_state(state)
    with pytest.raises(ReplyError) as caught:
        edu.client.mig_data_read(4096)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("state", [None, MigState.STOP, MigState.STOP_COPY])
def test_data_is_written_in_resuming_only(edu, state):
    if state is not None:
        edu.client.set_mig_state(state)
    with pytest.raises(ReplyError) as caught:
        edu.client.mig_data_write(bytes(64))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("chunk", [1 << 20, 1000, 17])
def test_a_device_is_saved_and_loaded_in_chunks_of_any_size(edu, chunk):
    driver, client = EduDriver(edu), edu.client
    driver.write32(REG_LIVENESS, 0x12345678)
    edu.memory.write(0x1000, b"state of the device")
    driver.copy_to_device(0x1000, 19)
    client.set_mig_state(MigState.STOP_COPY)
    data = list(save(client, chunk))
    assert all(len(part) <= chunk for part in data)
    assert client.mig_data_read(chunk) == b"", "the end stays the end"
    client.set_mig_state(MigState.RUNNING)
    driver.write32(REG_LIVENESS, 0)
    client.set_mig_state(MigState.RESUMING)
    load(client, data)
    client.set_mig_state(MigState.RUNNING)
    assert driver.read32(REG_LIVENESS) == 0x12345678 ^ 0xFFFFFFFF
    driver.copy_from_device(0x2000, 19)
    assert edu.memory.read(0x2000, 19) == b"state of the device"


def resume(client, data):
    for at in range(0, len(data), 1000):
        client.mig_data_write(data[at : at + 1000])
    client.set_mig_state(MigState.RUNNING)


@pytest.mark.parametrize("how", ["nothing", "noise", "cut", "twice", "changed"])
def test_data_that_is_not_whole_never_starts_a_device(edu, how):
    driver, client = EduDriver(edu), edu.client
    client.set_mig_state(MigState.STOP_COPY)
    data = b"".join(save(client))
    client.set_mig_state(MigState.RESUMING)
    wrong = {
        "nothing": b"",
        "noise": os.urandom(5000),
        "cut": data[:-1],
        "twice": data * 2,
        "changed": data[:200] + bytes([data[200] ^ 1]) + data[201:],
    }[how]
    with pytest.raises(ReplyError) as caught:
        resume(client, wrong)
    assert caught.value.errno not in (errno.EIO, errno.ENOTTY)
    assert client.mig_state() in (MigState.RESUMING, MigState.STOP, MigState.ERROR)
    assert driver.guest.client.get_info().num_irqs == 5


def test_accesses_go_on_and_orders_wait_while_the_device_is_brought_to_rest(slow_edu):
    """A transfer is under way: stopping waits for it."""
    driver, client = EduDriver(slow_edu), slow_edu.client
    driver.begin_dma(0x1000, BUFFER, 64, 0)
    stop = client.send_message(
        Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(16, STATE | SET) + uapi.FEATURE_STATE.pack(MigState.STOP, -1)
    )
    arm = client.send_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(20, 0x24, 0, 0, 1), slow_edu.interrupts.fds)
    unmap = client.send_message(Command.DMA_UNMAP, uapi.DMA_UNMAP.pack(24, 0, 0x80000000, 0x1000))
    assert client.read(RegionIndex.CONFIG, 0, 4) == 0x11E81234
    assert client.get_info().num_irqs == 5
    assert not any(client.has_reply(msg_id) for msg_id in (stop, arm, unmap))
    assert [client.wait_reply(msg_id).errno for msg_id in (stop, arm, unmap)] == [0, 0, 0]
    client.set_mig_state(MigState.RUNNING)
    driver.finish_dma()


def test_a_reset_ends_every_state(edu):
    driver, client = EduDriver(edu), edu.client
    for state in (MigState.RUNNING, MigState.STOP_COPY, MigState.RESUMING):
        driver.write32(REG_LIVENESS, 0x1234)
        client.set_mig_state(state)
        client.reset()
        assert client.mig_state() == MigState.RUNNING
        assert driver.read32(REG_LIVENESS) == 0
        assert client.read(RegionIndex.CONFIG, 0, 4) == 0x11E81234
        pci.place_bars(edu.config, edu.bars)
        edu.interrupts.arm()


@pytest.mark.parametrize("payload", [bytes(1), bytes(16), bytes(4096)])
def test_a_reset_with_a_payload_is_a_reset(edu, payload):
    reply = edu.client.wait_reply(edu.client.send_message(Command.DEVICE_RESET, payload))
    assert (reply.errno, reply.payload) == (0, b"")
