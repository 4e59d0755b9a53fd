"""What a client may ask for in which migration state: interrupts, memory and reset in all of them, data in its own.

States, refusals and sizes in general are tests/protocol's (test_device_feature.py, test_refusals.py); here is the whole
device and what its save and its load do meanwhile.
"""

import errno
import os

import pytest

from tests.end_to_end.conftest import running
from tests.end_to_end.served import until
from vfu_server import uapi
from vfu_server.testing import EduDriver, GuestMemory, ReplyError, load, pci, save
from vfu_server.testing.edu import REG_LIVENESS
from vfu_server.uapi import Command, Feature, IrqIndex, MigState

STATES = (MigState.RUNNING, MigState.STOP, MigState.STOP_COPY, MigState.RESUMING)


@pytest.fixture(scope="module")
def slow_server():
    """A transfer takes 0.2 s: a save lends its scratch memory for so long."""
    with running("edu", scale=2.0) as server:
        yield server


def maps_of(server):
    return server.model.control("state")["dma_maps"]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
def test_a_reset_from_any_state_gives_a_device_that_works(edu_source, edu, state):
    driver = EduDriver(edu)
    driver.use_msi()
    driver.write32(REG_LIVENESS, 0x1111)
    edu.memory.write(0x1000, b"of before")
    driver.copy_to_device(0x1000, 9)
    edu.client.set_mig_state(state)
    if state == MigState.STOP_COPY:
        edu.client.mig_data_read(100)
    if state == MigState.RESUMING:
        edu.client.mig_data_write(b"VFUSTATE")
    edu.client.reset()
    assert edu.client.mig_state() == MigState.RUNNING
    for act in (lambda: edu.client.mig_data_read(10), lambda: edu.client.mig_data_write(b"x")):
        with pytest.raises(ReplyError) as caught:
            act()
        assert caught.value.errno == errno.EINVAL, "the session is over"
    pci.place_bars(edu.config, edu.bars)
    driver = EduDriver(edu)
    assert driver.read32(REG_LIVENESS) == 0
    driver.use_intx()
    driver.copy_from_device(0x2000, 9)
    assert edu.memory.read(0x2000, 9) == bytes(9), "nothing of the buffer is left"
    assert driver.factorial(8) == 40320
    assert maps_of(edu_source) == 1, "a reset leaves the client's memory mapped"


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
def test_memory_that_comes_and_goes_in_any_state_is_the_devices_afterwards(edu_source, edu, state):
    driver = EduDriver(edu)
    client = edu.client
    data = save_of(client)
    client.set_mig_state(state)
    with GuestMemory.of(0x4000, 0x0800_0000) as plugged:
        client.dma_map(0x0800_0000, 0x4000, fd=plugged.fd)
        client.dma_unmap(0, 16 << 20)
        assert maps_of(edu_source) == 1
        with pytest.raises(ReplyError) as caught:
            client.dma_map(0x0800_1000, 0x1000, fd=plugged.fd)
        assert caught.value.errno == errno.EEXIST
        if state == MigState.RESUMING:
            load(client, [data])
        client.set_mig_state(MigState.RUNNING)
        plugged.write(0x0800_0000, b"plugged in")
        driver.copy_to_device(0x0800_0000, 10)
        driver.copy_from_device(0x0800_2000, 10)
        assert plugged.read(0x0800_2000, 10) == b"plugged in"
        driver.copy_from_device(0x3000, 10)
        assert edu.memory.read(0x3000, 10) == bytes(10), "what was unmapped is out of the device's reach"
        client.dma_unmap(0x0800_0000, 0x4000)


def save_of(client):
    client.set_mig_state(MigState.STOP_COPY)
    data = b"".join(save(client))
    client.set_mig_state(MigState.RUNNING)
    return data


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
def test_interrupts_set_up_in_any_state_come_afterwards(edu, state):
    driver = EduDriver(edu)
    client = edu.client
    data = save_of(client)
    client.set_mig_state(state)
    edu.enable_msi(1)
    client.trigger_irqs(IrqIndex.MSI, 0, [True])
    assert edu.interrupts.wait(0) == 1
    edu.interrupts.disarm_vector(0)
    edu.interrupts.arm_vector(0)
    if state == MigState.RESUMING:
        load(client, [data])
    client.set_mig_state(MigState.RUNNING)
    driver.raise_interrupt(4)
    assert edu.interrupts.wait(0) >= 1
    driver.acknowledge(4)


def test_what_is_offered_is_true(edu):
    """STOP_COPY and no more; PROBE says of each feature what GET and SET then do."""
    client = edu.client
    assert client.migration_flags() == uapi.MIGRATION_STOP_COPY
    offered = {
        Feature.MIGRATION: uapi.FEATURE_GET,
        Feature.MIG_DEVICE_STATE: uapi.FEATURE_GET | uapi.FEATURE_SET,
        Feature.MIG_DATA_SIZE: uapi.FEATURE_GET,
    }
    for feature in Feature:
        for way in (uapi.FEATURE_GET, uapi.FEATURE_SET):
            assert client.feature_probe(feature, way) == bool(offered.get(feature, 0) & way), (feature, way)
    for state in MigState:
        if state in STATES:
            continue
        for present in (MigState.RUNNING, MigState.STOP):
            client.set_mig_state(present)
            with pytest.raises(ReplyError) as caught:
                client.set_mig_state(state)
            assert caught.value.errno == errno.EINVAL
            assert client.mig_state() == present
    client.set_mig_state(MigState.RUNNING)


def test_the_size_that_is_told_is_enough_in_every_state(edu):
    client = edu.client
    size = len(save_of(client))
    for state in STATES:
        client.set_mig_state(state)
        told = client.mig_data_size()
        assert size <= told < size + (64 << 10)


# while the server's own memory is lent to the device


def begin_save(server, guest):
    """STOP_COPY, and the save well under way: the buffer's transfer runs into memory of the server's."""
    guest.client.set_mig_state(MigState.STOP_COPY)
    until(lambda: server.model.registers()["dma_command"] & 1, "no transfer is begun")


@pytest.fixture
def used(slow_server):
    """A guest at `slow_server` with something in the device's buffer; how much memory it has, the test says."""
    guests = []

    def start(memory):
        guest = slow_server.connect(memory).start()
        guests.append(guest)
        memory.write(0x1000, b"in the buffer")
        EduDriver(guest).copy_to_device(0x1000, 13)
        return guest

    yield start
    for guest in guests:
        guest.close()


@pytest.mark.parametrize("size", [1 << 20, 1 << 28], ids=["a hole is there", "all of the device's reach is mapped"])
def test_memory_that_goes_during_a_save_is_gone_and_the_save_is_right(slow_server, used, size):
    with GuestMemory.of(size) as memory:
        guest = used(memory)
        begin_save(slow_server, guest)
        guest.client.dma_unmap_all()
        data = b"".join(save(guest.client))
        assert b"in the buffer" in data
        assert maps_of(slow_server) == 0, "nothing that was unmapped has come back"
        memory.map_into(guest.client)
        guest.client.set_mig_state(MigState.RUNNING)
        EduDriver(guest).copy_from_device(0x2000, 13)
        assert memory.read(0x2000, 13) == b"in the buffer"


def test_memory_that_comes_during_a_save_finds_its_place_free(slow_server, used):
    with GuestMemory.of(0x10000) as memory, GuestMemory.of(0xFFF_0000, 0x10000) as plugged:
        guest = used(memory)
        begin_save(slow_server, guest)
        plugged.map_into(guest.client)
        data = b"".join(save(guest.client))
        assert b"in the buffer" in data
        assert maps_of(slow_server) == 2
        guest.client.set_mig_state(MigState.RUNNING)
        EduDriver(guest).copy_from_device(0x10000, 13)
        assert plugged.read(0x10000, 13) == b"in the buffer"


def test_a_save_that_is_given_up_while_memory_waits(slow_server, used):
    """The client goes while its DMA_UNMAP waits for the save: all is given back, the next one is served."""
    with GuestMemory.of(1 << 28) as memory:
        guest = used(memory)
        begin_save(slow_server, guest)
        guest.client.send_message(Command.DMA_UNMAP, uapi.DMA_UNMAP.pack(24, 0, 0, 1 << 28))
        guest.client.get_info()
        guest.client.close()
    with GuestMemory.of(1 << 20) as memory:
        used(memory)
        assert maps_of(slow_server) == 1
        assert len(os.listdir(f"/proc/{slow_server.process.pid}/fd")) < 40
