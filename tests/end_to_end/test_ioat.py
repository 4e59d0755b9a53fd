"""I/OAT through the real server: chains in guest memory, interrupts, and channels that go on where they were."""

import errno
import random
import struct

import pytest

from tests.end_to_end.ioat_driver import (
    ATTNSTATUS,
    CHANCMD,
    CHANCMP,
    CHANCTRL,
    CHANERR,
    CHANSTS,
    COMPLETION,
    DESCRIPTOR,
    DMACOUNT,
    DONE,
    ENTRIES,
    HALTED,
    INTRCTRL,
    MASTER_ENABLE,
    REARM,
    RESUME,
    SUSPEND,
    SUSPENDED,
    IoatDriver,
)
from tests.end_to_end.served import Served, until
from vfu_server.testing import ReplyError, migrate_guest
from vfu_server.uapi import IrqIndex, MigState

SOURCE, TARGET = 0x100000, 0x400000


def copies(count, seed=0):
    """`count` copies of odd places and lengths, some over page borders, none over another."""
    chance = random.Random(seed)
    return [
        (
            SOURCE + 0x4000 * n + chance.randrange(4096),
            TARGET + 0x4000 * n + chance.randrange(4096),
            chance.randrange(1, 8192),
        )
        for n in range(count)
    ]


def fill(guest, seed):
    guest.memory.write(SOURCE, random.Random(seed).randbytes(1 << 20))


def set_up(guest, channels=2):
    guest.enable_msix(channels)
    fill(guest, 1)
    drivers = [IoatDriver(guest, n) for n in range(channels)]
    for driver in drivers:
        driver.set_up()
    return drivers


def test_a_guest_copies_by_chains_and_msix(ioat):
    first, second = set_up(ioat)
    for seed, count in enumerate((1, 5, ENTRIES)):
        fill(ioat, seed)
        first.copy(copies(count, seed))
    second.copy(copies(7, 9))
    assert ioat.interrupts.counts() == (0, 0), "one interrupt for each chain, at its own vector"
    assert (first.issued, second.issued) == (38, 7)


def test_an_error_of_a_chain_is_the_guests_to_see(ioat):
    (driver, _) = set_up(ioat)
    driver.begin([(SOURCE, 1 << 40, 64)])
    until(lambda: driver.state == HALTED, "the channel does not halt")
    assert driver.read(CHANERR, 4) == 1 << 9
    driver.set_up()
    driver.write(CHANERR, 4, 1 << 9)
    driver.copy(copies(3))


@pytest.mark.parametrize("count", [0, 1, 3, ENTRIES + 9])
def test_a_channel_goes_on_with_its_running_total_after_a_move(ioat, ioat_arrival, count):
    drivers = set_up(ioat)
    for driver in drivers[: 1 if count < 3 else 2]:
        for n in range(count):
            driver.copy(copies(1, n))
    assert drivers[0].read(DMACOUNT, 2) == count
    record = migrate_guest(ioat, ioat_arrival)
    assert record.downtime < 3
    assert ioat_arrival.interrupts.index == IrqIndex.MSIX
    assert ioat_arrival.interrupts.counts() == (0, 0)
    for driver in drivers:
        driver.use(ioat_arrival)
        fill(ioat_arrival, 77)
        driver.copy(copies(4, 50))
        driver.copy(copies(ENTRIES, 51))
        assert driver.read(DMACOUNT, 2) == driver.issued
    assert ioat.client.mig_state() == MigState.STOP


def test_there_and_back_with_chains_on_each_side(ioat_source, ioat_target, ioat, ioat_arrival):
    """DMACOUNT is one running total over all of it."""
    drivers = set_up(ioat)
    here, there = ioat, ioat_arrival
    source_model, target_model = ioat_source.model, ioat_target.model
    for n in range(6):
        for driver in drivers:
            fill(here, n)
            driver.copy(copies(n + 1, n))
        before = source_model.registers()
        migrate_guest(here, there)
        after = target_model.registers()
        for register in ("dmacount", "chancmp", "chanctrl", "chanerr", "chanerr_mask"):
            for channel in ("channel[0].", "channel[1]."):
                assert after[channel + register] == before[channel + register], register
        here.client.set_mig_state(MigState.RUNNING)
        here, there, source_model, target_model = there, here, target_model, source_model
        for driver in drivers:
            driver.use(here)
    assert [driver.issued for driver in drivers] == [21, 21]
    assert "left halted" not in ioat_source.said() + ioat_target.said()


def test_a_stop_waits_for_the_chains_end(ioat, ioat_arrival):
    (driver, _) = set_up(ioat)
    megabytes = [(SOURCE, TARGET + (n << 20), 1 << 20) for n in range(8)]
    last = driver.begin(megabytes)
    migrate_guest(ioat, ioat_arrival)
    data = ioat.memory.read(SOURCE, 1 << 20)
    assert all(ioat_arrival.memory.read(to, size) == data for _, to, size in megabytes)
    driver.use(ioat_arrival)
    assert driver.finished == (last, DONE)
    assert ioat.interrupts.count(0) == 1, (
        "the chain's interrupt reached the source's client before the stop was answered"
    )
    # as a VMM hands a pending message over: the guest's handler runs on the destination
    driver.write(0, 2, 1)
    driver.copy(copies(2))


def test_doorbells_of_a_stopped_device_ring_nothing(ioat_source, ioat):
    (driver, _) = set_up(ioat)
    driver.copy(copies(2))
    ioat.client.set_mig_state(MigState.STOP)
    assert ioat_source.model.control("clear") == {}
    driver.write(DMACOUNT, 2, 40)
    assert driver.read(DMACOUNT, 2) == 2, "the value at the stop"
    assert ioat_source.model.accesses(region=0) == 0
    ioat.client.set_mig_state(MigState.RUNNING)
    driver.copy(copies(3))


def test_a_suspended_channel_holds_the_stop_until_its_deadline(folder):
    with (
        Served(folder, "ioat", time_scale=1.0, options=("--option", "drain-timeout=0.2")) as server,
        server.connect() as guest,
    ):
        (driver,) = set_up(guest.start(), 1)
        driver.copy(copies(2))
        driver.write(CHANCMD, 1, SUSPEND)
        assert driver.state == SUSPENDED
        for target in (MigState.STOP, MigState.STOP_COPY, MigState.RESUMING):
            server.forget()
            with pytest.raises(ReplyError) as caught:
                guest.client.set_mig_state(target)
            assert caught.value.errno == errno.ETIMEDOUT
            assert guest.client.mig_state() == MigState.RUNNING
            said = server.said()
            assert "not empty after 0.2 s: queue 'descriptors of channel[0]' (channel[0].chansts 0x" in said
            assert "[state=0x2 (suspended) last=" in said
        driver.begin(copies(3))
        driver.write(CHANCMD, 1, RESUME)
        driver.end()
        assert driver.state == DONE
        guest.client.set_mig_state(MigState.STOP)
        guest.client.set_mig_state(MigState.RUNNING)
        driver.copy(copies(4))
        assert server.end()[0] == 0


def test_a_channel_whose_place_cannot_be_kept_is_left_halted_and_its_driver_restarts_it(
    ioat_target, ioat, ioat_arrival
):
    (driver, _) = set_up(ioat)
    driver.copy(copies(3))
    ioat_target.fault("halt")
    ioat_target.forget()
    migrate_guest(ioat, ioat_arrival)
    assert "channel[0]: left halted, its driver must restart it" in ioat_target.said()
    driver.use(ioat_arrival)
    assert driver.state == HALTED
    assert driver.read(CHANCMP, 4) == driver.completion
    driver.set_up()
    driver.copy(copies(5))


def test_what_a_channel_had_not_finished_at_a_halt_is_the_drivers_to_repeat(ioat, ioat_arrival):
    (driver, _) = set_up(ioat)
    driver.copy(copies(1))
    driver.begin([(SOURCE, 1 << 40, 8)])
    until(lambda: driver.state == HALTED, "the channel does not halt")
    migrate_guest(ioat, ioat_arrival)
    driver.use(ioat_arrival)
    assert driver.state == HALTED
    driver.set_up()
    driver.copy(copies(2))


def test_a_descriptor_is_what_the_hardware_reads(ioat):
    """The driver here and the model do not share a line: the bytes in guest memory are looked at."""
    (driver, _) = set_up(ioat)
    driver.copy([(SOURCE, TARGET, 100)])
    raw = ioat.memory.read(driver.ring, 64)
    assert DESCRIPTOR.unpack(raw) == (100, COMPLETION | 1, SOURCE, TARGET, driver.ring + 64)
    assert struct.unpack("<Q", ioat.memory.read(driver.completion, 8))[0] == driver.ring | DONE
    assert driver.read(CHANSTS, 4) == (driver.ring | DONE) & 0xFFFFFFFF


@pytest.mark.parametrize("use", ["enable_intx", "enable_msix"])
def test_one_interrupt_for_all_channels_goes_on_after_a_stop_and_after_a_move(ioat, ioat_arrival, use):
    """INTRCTRL's master enable goes with a read, ATTNSTATUS's bits too: nothing of the server's may read them."""
    (driver, _) = set_up(ioat)
    ioat.disable_interrupts()
    getattr(ioat, use)(*([1] if use == "enable_msix" else []))
    ioat.write(0, INTRCTRL, 1, MASTER_ENABLE)
    handled(driver, copies(3))
    for state in (MigState.STOP, MigState.STOP_COPY):
        ioat.client.set_mig_state(state)
        assert ioat.read(0, ATTNSTATUS, 4) == 0xFFFFFFFF
        ioat.client.set_mig_state(MigState.RUNNING)
        handled(driver, copies(2))
    pending = driver.begin(copies(1))
    ioat.interrupts.wait(0)
    ioat.client.set_mig_state(MigState.STOP)
    ioat.client.set_mig_state(MigState.RUNNING)
    assert ioat.read(0, ATTNSTATUS, 4) == 1, "it is still the guest's to handle"
    ioat.write(0, INTRCTRL, 1, MASTER_ENABLE)
    driver.write(CHANCTRL, 2, REARM)
    if use == "enable_intx":
        ioat.interrupts.unmask()
    assert driver.finished == (pending, DONE)
    migrate_guest(ioat, ioat_arrival)
    driver.use(ioat_arrival)
    handled(driver, copies(4))


def handled(driver, wanted):
    """As Linux's handler of a single vector does it: INTRCTRL read, ATTNSTATUS read, INTRCTRL written back."""
    guest = driver.guest
    last = driver.begin(wanted)
    guest.interrupts.wait(0)
    control = guest.read(0, INTRCTRL, 1)
    assert control & MASTER_ENABLE
    assert guest.read(0, ATTNSTATUS, 4) == 1
    guest.write(0, INTRCTRL, 1, control)
    if guest.interrupts.index == IrqIndex.INTX:
        guest.interrupts.unmask()
    driver.write(CHANCTRL, 2, REARM)
    assert driver.finished == (last, DONE)
    assert [guest.memory.read(to, size) for _, to, size in wanted] == [
        guest.memory.read(at, size) for at, _, size in wanted
    ]
