"""The migration door by itself: what a driver offers, data fds read, written, given up and closed, calls that go on."""

import errno
import os
import struct
import threading

import pytest
import trio
from trio.testing import trio_test

from tests.host.conftest import BDF
from tests.host.fake_function import fail
from tests.host.fake_migration import MAGIC, P2P, PRE_COPY, STOP_COPY, FakeMigration
from vfu_server.device import PrecopyInfo, SavePhase, StopKind
from vfu_server.errors import HostError, PluginError, StateError, StateLostError
from vfu_server.host.ioctl import Kernel
from vfu_server.host.kernel import open_bdf
from vfu_server.host.kernel_migration import KernelStateFile
from vfu_server.host.patient import PatientCall
from vfu_server.kernel_migration import KernelMigrationDevice, migration_of
from vfu_server.policy import Policy
from vfu_server.uapi import MigState

ALL = STOP_COPY | P2P | PRE_COPY
R, S, SC, P, RES = MigState.RUNNING, MigState.STOP, MigState.STOP_COPY, MigState.PRE_COPY, MigState.RESUMING


@pytest.fixture
def driver(by_cdev, function):
    return FakeMigration(by_cdev, function, ALL, b"state of the device")


async def opened(fake):
    return await open_bdf(BDF, kernel=fake.kernel)


# --- what is offered


@pytest.mark.parametrize("flags", [STOP_COPY, STOP_COPY | P2P, STOP_COPY | PRE_COPY, ALL])
@trio_test
async def test_flags_and_name_of_the_driver(fake, function, flags):
    FakeMigration(fake, function, flags | 1 << 40)  # a flag of tomorrow
    host = await opened(fake)
    assert (host.migration.flags, host.migration.migrator) == (flags, "vfio-pci")
    device = KernelMigrationDevice(host, Policy(()))
    can = device.capabilities
    assert (can.migratable, can.pre_copy, can.p2p) == (True, bool(flags & PRE_COPY), bool(flags & P2P))
    assert (device.identity.variant, device.identity.features) == ("vfio-pci", flags)
    assert KernelMigrationDevice(host, Policy(()), "mine").identity.variant == "mine"
    await host.aclose()


@trio_test
async def test_driver_that_does_not_migrate(fake, function, caplog):
    for answer in (errno.ENOTTY, errno.EIO, 0):

        def flags(_flags, data, answer=answer):
            if answer:
                raise fail(answer)
            struct.pack_into("=Q", data, 0, P2P)  # no STOP_COPY
            return 0

        function.features = {1: (0x10000, 16, flags)}
        host = await opened(fake)
        assert migration_of(host) is None
        with pytest.raises(PluginError, match="no driver that migrates it"):
            KernelMigrationDevice(host, Policy(()))
        await host.aclose()
    assert caplog.text.count("cannot be asked") == 1


@trio_test
async def test_pre_copy_numbers_and_their_flags(by_cdev, function, driver):
    for knows in (True, False):
        driver.knows_reinit = knows
        host = await opened(by_cdev)
        assert driver.opted_in is knows
        file = await host.migration.set_state(P)
        driver.begin_anew()
        info = await file.precopy_info()
        assert info == PrecopyInfo(len(MAGIC) + 13, 0, knows)
        assert await file.read(5) == MAGIC[:5]
        assert (await file.precopy_info()).initial_bytes == len(MAGIC) + 13 - 5
        await host.migration.set_state(S)
        with pytest.raises(HostError, match="what is left to save") as failed:
            await file.precopy_info()
        assert failed.value.errno == errno.EINVAL
        file.close()
        await host.aclose()


@trio_test
async def test_sizes_and_refusals_name_the_driver(by_cdev, driver):
    host = await opened(by_cdev)
    assert await host.migration.data_size() == len(MAGIC) + len(driver.state)
    driver.has_size, driver.refuse = False, {S: errno.EBUSY}
    with pytest.raises(HostError, match=f"{BDF}: its driver vfio-pci does not tell how much") as failed:
        await host.migration.data_size()
    assert failed.value.errno == errno.ENOTTY
    with pytest.raises(HostError, match=f"{BDF}: its driver vfio-pci refused state STOP: Device or resource busy"):
        await host.migration.set_state(S)
    assert await host.migration.state() is MigState.RUNNING_P2P  # half-way
    await host.aclose()


# --- data fds, on real pipes and sockets


def state_file(fd, **calls):
    return KernelStateFile(Kernel(**calls), fd, "device", reinit=False)


@trio_test
async def test_reads_are_the_drivers_own():
    ours, theirs = os.pipe()
    file = state_file(ours)
    os.write(theirs, b"one")
    assert await file.read(1 << 20) == b"one"
    os.write(theirs, b"two, three")
    assert await file.read(3) == b"two"
    assert await file.read(1 << 20) == b", three"
    os.close(theirs)
    assert await file.read(1 << 20) == b""
    file.close()
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ours)
    with pytest.raises(HostError, match="over") as failed:
        await file.read(1)
    assert failed.value.errno == errno.ENODEV


@trio_test
async def test_read_that_was_given_up_loses_nothing():
    ours, theirs = os.pipe()
    file = state_file(ours)
    for _ in range(2):
        with trio.move_on_after(0.02) as scope:
            await file.read(100)
        assert scope.cancelled_caught
    os.write(theirs, b"late")
    assert await file.read(100) == b"late"
    os.close(theirs)
    file.close()


@pytest.mark.parametrize("answer", [b"", errno.ENOMSG], ids=["no bytes", "ENOMSG"])
@trio_test
async def test_end_that_belongs_to_a_pre_copy_that_was_given_up_is_not_the_end(answer):
    gate, answers = threading.Event(), [answer, b"the rest"]

    def read(_fd, _size):
        assert gate.wait(10)
        this = answers.pop(0)
        if isinstance(this, int):
            raise fail(this)
        return this

    ours, theirs = os.pipe()
    file = state_file(ours, read=read)
    with trio.move_on_after(0.02):
        await file.read(100)
    gate.set()
    assert await file.read(100) == b"the rest"
    file.close()
    os.close(theirs)


@trio_test
async def test_file_that_is_being_read_is_closed_afterwards():
    ours, theirs = os.pipe()
    file = state_file(ours)
    with trio.move_on_after(0.02):
        await file.read(100)
    file.close()
    os.fstat(ours)  # a thread is in there
    os.write(theirs, b"x")
    with trio.fail_after(5):
        while True:
            try:
                os.fstat(ours)
            except OSError:
                break
            await trio.sleep(0.001)
    os.close(theirs)


@trio_test
async def test_writes_go_on_until_all_is_taken():
    taken, pieces = [], iter([1, 3, 2, 100])

    def write(_fd, data):
        taken.append(bytes(data[: next(pieces)]))
        return len(taken[-1])

    ours, theirs = os.pipe()
    file = state_file(theirs, write=write)
    await file.write(b"abcdefghij")
    assert taken == [b"a", b"bcd", b"ef", b"ghij"]
    file.close()
    os.close(ours)


@pytest.mark.parametrize(("answer", "number"), [(0, errno.EIO), (99, errno.EIO), (fail(errno.ENOSPC), errno.ENOSPC)])
@trio_test
async def test_writes_that_are_not_taken(answer, number):
    def write(_fd, _data):
        if isinstance(answer, OSError):
            raise answer
        return answer

    ours, theirs = os.pipe()
    file = state_file(theirs, write=write)
    with pytest.raises(HostError, match="did not take the state") as failed:
        await file.write(b"abc")
    assert failed.value.errno == number
    file.close()
    os.close(ours)


@trio_test
async def test_several_may_ask_for_the_numbers_at_once(by_cdev, driver):
    host = await opened(by_cdev)
    file = await host.migration.set_state(P)
    got = []

    async def ask():
        got.append(await file.precopy_info())

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
    assert [info.initial_bytes for info in got] == [len(MAGIC)] * 5
    gate = driver.slow["info"] = threading.Event()
    with trio.move_on_after(0.02):
        await file.precopy_info()
    await file.read(100)
    gate.set()
    assert (await file.precopy_info()).initial_bytes == 0  # not the old answer
    file.close()
    await host.aclose()


# --- changes that are given up


@trio_test
async def test_change_that_was_given_up_is_waited_for_and_its_fd_closed(by_cdev, driver):
    host = await opened(by_cdev)
    gate = driver.slow["state"] = threading.Event()
    with trio.move_on_after(0.02):
        await host.migration.set_state(P)
    assert driver.mig_state is R
    gate.set()
    assert await host.migration.state() is P
    assert by_cdev.opened("state") == []
    await host.aclose()


@trio_test
async def test_closing_waits_for_a_change(by_cdev, driver):
    host = await opened(by_cdev)
    gate = driver.slow["state"] = threading.Event()
    with trio.move_on_after(0.02):
        await host.migration.set_state(S)
    threading.Timer(0.1, gate.set).start()
    await host.aclose()
    assert gate.is_set()
    assert by_cdev.opened("cdev") == []


@trio_test
async def test_call_that_outlives_its_waiter():
    gate = threading.Event()
    call = PatientCall[int]("test")
    done = []
    call.begin(lambda: gate.wait(10) and 42)
    with trio.move_on_after(0.01):
        await call.result()
    call.afterwards(lambda: done.append(1))
    assert (call.pending, done) == (True, [])
    gate.set()
    await call.settled()
    assert (call.pending, done) == (True, [1])
    assert await call.result() == 42
    assert not call.pending
    call.afterwards(lambda: done.append(2))
    assert done == [1, 2]
    call.begin(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        await call.result()


# --- the device, step by step


class Sink:
    def __init__(self, fails=0):
        self.sections, self.fails = [], fails

    async def send(self, section):
        await trio.lowlevel.checkpoint()
        if self.fails:
            self.fails -= 1
            raise HostError("not now")
        self.sections.append(section)

    @property
    def bytes(self):
        return b"".join(section.payload for section in self.sections)


@trio_test
async def test_stop_that_is_cancelled_is_taken_back_when_the_driver_is_done(by_cdev, driver):
    host = await opened(by_cdev)
    device = KernelMigrationDevice(host, Policy(()))
    gate = driver.slow["state"] = threading.Event()
    threading.Timer(0.1, gate.set).start()
    with trio.move_on_after(0.02) as scope:
        await device.stop(StopKind.P2P)
    assert scope.cancelled_caught
    assert driver.walked == [MigState.RUNNING_P2P, R]
    await device.stop(StopKind.P2P)
    await host.aclose()


@trio_test
async def test_stop_of_a_driver_that_comes_back_behind_the_reset(by_cdev, function, driver):
    host = await opened(by_cdev)
    device = KernelMigrationDevice(host, Policy(()))
    gate = driver.slow["state"] = threading.Event()
    with pytest.raises(StateLostError, match=r"did not come back within 0\.5 s") as failed:
        with trio.move_on_after(0.02):
            await device.stop(StopKind.P2P)
    assert failed.value.errno == errno.ETIMEDOUT
    reset = function.reset
    function.reset = lambda: (reset(), gate.set())[0]
    await device.reset()
    assert driver.mig_state is R
    assert (driver.walked, function.calls.count("reset")) == ([MigState.RUNNING_P2P], 2)
    await host.aclose()


@trio_test
async def test_section_that_was_not_sent_is_the_first_of_the_next_save(by_cdev, driver):
    host = await opened(by_cdev)
    device = KernelMigrationDevice(host, Policy(()))
    await device.save_begin()
    sink = Sink(fails=1)
    with pytest.raises(HostError):
        await device.save(SavePhase.PRE_COPY, sink)
    assert (await device.precopy_info()).dirty_bytes == len(MAGIC)
    await device.save(SavePhase.PRE_COPY, sink)
    await device.stop(StopKind.P2P)
    await device.stop(StopKind.FULL)
    await device.save(SavePhase.STOP_COPY, sink)
    assert sink.bytes == MAGIC + driver._whole()
    with pytest.raises(StateLostError, match="no way leads back"):
        await device.start(StopKind.FULL)
    await device.save_end()
    await device.start(StopKind.FULL)
    await device.start(StopKind.P2P)
    assert driver.mig_state is R
    with pytest.raises(StateError, match="no migration data session"):
        await device.save(SavePhase.STOP_COPY, sink)
    await device.aclose()
    await host.aclose()


@trio_test
async def test_reset_that_leaves_the_driver_elsewhere(by_cdev, function, driver):
    host = await opened(by_cdev)
    device = KernelMigrationDevice(host, Policy(()))
    await host.migration.set_state(S)
    function.reset = lambda: 0  # the function, but not its driver
    with pytest.raises(HostError, match="after a reset its driver is in state STOP"):
        await device.reset()
    driver.mig_state = MigState.ERROR
    with pytest.raises(StateLostError, match="in state ERROR"):
        await device.reset()
    await host.aclose()


@trio_test
async def test_without_a_reset_the_driver_is_led_to_running(by_cdev, function, driver):
    host = await opened(by_cdev)
    device = KernelMigrationDevice(host, Policy(()))
    await device.stop(StopKind.P2P)
    await device.stop(StopKind.FULL)
    await device.save_begin()
    await device.run_again()
    assert driver.mig_state is R
    assert by_cdev.opened("state") == []
    await device.stop(StopKind.FULL)
    await device.load_begin()
    with pytest.raises(HostError, match="refused state RUNNING"):
        await device.run_again()  # only a reset leaves RESUMING
    await host.aclose()
