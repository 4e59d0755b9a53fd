"""A guest moves between two servers as QEMU would move it, at work, there and back, and past failures."""

import errno

import pytest

from tests.protocol.conftest import running_edu_server
from vfu_server.testing import EduDriver, GuestMemory, ReplyError, VmmPart, migrate, migrate_guest
from vfu_server.testing.edu import REG_LIVENESS
from vfu_server.uapi import IrqIndex, MigState


@pytest.fixture(scope="module")
def other_server():
    with running_edu_server(0.05) as server:
        yield server


@pytest.fixture
def arrival(other_server):
    """A guest at the other server, plugged in and reset, with its own memory."""
    with GuestMemory.of(16 << 20) as memory, other_server.connect(memory) as guest:
        guest.plug_in()
        guest.machine_reset()
        yield guest


@pytest.mark.parametrize("use", ["use_intx", "use_msi"])
def test_a_guest_moves_with_its_work(edu, arrival, use):
    driver = EduDriver(edu)
    getattr(driver, use)()
    assert driver.factorial(10) == 3628800
    driver.write32(REG_LIVENESS, 0x600D600D)
    edu.memory.write(0x1000, b"carried in the device")
    driver.copy_to_device(0x1000, 21)
    command = edu.config.read(4, 2)
    record = migrate_guest(edu, arrival)
    assert record.stop_copy_bytes > 4096
    assert record.downtime < 5
    moved = EduDriver(arrival, by_interrupt=True)
    assert arrival.interrupts.index == (IrqIndex.MSI if use == "use_msi" else IrqIndex.INTX)
    assert moved.read32(REG_LIVENESS) == 0x600D600D ^ 0xFFFFFFFF
    assert arrival.config.read(4, 2) == command
    assert moved.factorial(11) == 39916800
    moved.copy_from_device(0x8000, 21)
    assert arrival.memory.read(0x8000, 21) == b"carried in the device"
    assert edu.client.mig_state() == MigState.STOP
    assert arrival.client.mig_state() == MigState.RUNNING


def test_there_and_back(edu, arrival):
    here, there = edu, arrival
    EduDriver(here).write32(REG_LIVENESS, 0)
    for n in range(4):
        migrate_guest(here, there)
        driver = EduDriver(there)
        assert driver.liveness(n) == n ^ 0xFFFFFFFF
        assert driver.factorial(n) == (1, 1, 2, 6)[n]
        # the one that was left starts anew, as a VMM that awaits a guest
        here.client.set_mig_state(MigState.RUNNING)
        here, there = there, here


@pytest.mark.parametrize("step", ["begun", "stopped", "arrange"])
def test_a_failure_of_the_vmm_leaves_the_guest_at_work(edu, arrival, step):
    driver = EduDriver(edu)
    driver.write32(REG_LIVENESS, 42)

    def fail():
        raise OSError(errno.ENOSPC, "as ordered")

    with pytest.raises(OSError, match="as ordered") as caught:
        migrate(edu.client, arrival.client, vmm=VmmPart(**{step: fail}))
    assert "the source runs again" in caught.value.__notes__
    assert driver.read32(REG_LIVENESS) == 42 ^ 0xFFFFFFFF
    assert driver.factorial(6) == 720


def test_a_destination_that_refuses_leaves_the_guest_at_work(edu, arrival):
    """Its state was spoiled before: what is sent afterwards is not taken."""
    driver = EduDriver(edu)
    driver.write32(REG_LIVENESS, 43)

    def spoil():
        arrival.client.mig_data_write(b"something that does not belong there")

    with pytest.raises(ReplyError):
        migrate(edu.client, arrival.client, vmm=VmmPart(stopped=lambda: spoil() or 0))
    assert arrival.client.mig_state() != MigState.RUNNING
    assert driver.read32(REG_LIVENESS) == 43 ^ 0xFFFFFFFF
    assert driver.factorial(7) == 5040


def test_a_client_that_leaves_in_the_middle_frees_both_sides(edu_server, other_server):
    for server in (edu_server, other_server):
        for state in (MigState.STOP_COPY, MigState.RESUMING):
            with server.connect() as guest:
                guest.start()
                guest.client.set_mig_state(state)
                if state == MigState.STOP_COPY:
                    guest.client.mig_data_read(100)
                else:
                    guest.client.mig_data_write(b"half of")
            with server.connect() as guest:
                driver = EduDriver(guest.start())
                assert guest.client.mig_state() == MigState.RUNNING
                assert driver.factorial(4) == 24
