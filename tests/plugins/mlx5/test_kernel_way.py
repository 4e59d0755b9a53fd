"""A function that its kernel driver migrates: which way is taken, records checked as they pass, the same stream."""

import errno

import pytest
import trio
from trio.testing import trio_test

from plugins.mlx5.kernel_way import KernelWay
from plugins.mlx5.own_way import OwnWay
from plugins.mlx5.probe import probe
from plugins.mlx5.records import image_header, stop_copy_size
from tests.plugins.fake_host import FakeEdu
from tests.plugins.mlx5.companion import OneCompanion
from tests.plugins.mlx5.firmware import FakeConnectx
from tests.plugins.mlx5.virtual import FakeVf
from vfu_server.device import PrecopyInfo, SavePhase, Section, StateIdentity, StopKind
from vfu_server.errors import HostError, StreamFormatError, StreamMismatchError
from vfu_server.uapi import MIGRATION_P2P, MIGRATION_PRE_COPY, MIGRATION_STOP_COPY, MigState

ALL = MIGRATION_STOP_COPY | MIGRATION_P2P | MIGRATION_PRE_COPY
STREAM = stop_copy_size(4096) + image_header(5) + b"first" + image_header(4) + b"last"


class DriverFile:
    """A data fd: what is read from it, and what was written."""

    def __init__(self, data, piece=7):
        self.data = data
        self.piece = piece
        self.written = b""

    async def read(self, size):
        taken, self.data = self.data[: self.piece], self.data[self.piece :]
        return taken

    async def write(self, data):
        self.written += data

    async def precopy_info(self):
        return PrecopyInfo(0, len(self.data))

    def close(self):
        return None


class Driver:
    """The kernel's driver behind a door, which gives `stream`."""

    migrator = "mlx5_vfio_pci"

    def __init__(self, stream=STREAM, flags=ALL):
        self.flags = flags
        self.stream = stream
        self.at = MigState.RUNNING
        self.file = None

    async def set_state(self, state):
        self.at = state
        if state in (MigState.STOP_COPY, MigState.RESUMING, MigState.PRE_COPY):
            self.file = DriverFile(self.stream)
            return self.file
        return None

    async def state(self):
        return self.at

    async def data_size(self):
        return len(self.stream)


class Kept:
    def __init__(self):
        self.data = b""

    async def send(self, section):
        self.data += section.payload


def device_with(driver, options=None):
    vf = FakeVf(FakeConnectx(), "0000:3b:00.2")
    vf.migration = driver
    return probe(vf, options or {})


def test_who_is_taken_and_which_way():
    assert probe(FakeEdu(), {}) is None
    assert isinstance(device_with(Driver()), KernelWay)
    assert isinstance(device_with(None), OwnWay)
    assert isinstance(device_with(Driver(), {"pf": "0000:3b:00.0"}), OwnWay)
    old = FakeVf(FakeConnectx(), "0000:3b:00.2")
    old.ids = (0x15B3, 0x1018, 0)
    assert isinstance(probe(old, {}), OwnWay)
    pf = FakeConnectx("0000:3b:00.0")
    assert probe(pf, {}) is None


@trio_test
async def test_a_kernel_function_without_a_way_says_both():
    device = device_with(None)
    await device.open(None)  # it asks for no companion
    can = device.capabilities
    assert not can.migratable
    for word in ("--option pf=BDF", "mlx5_vfio_pci", "VF_MIGRATION_MODE=2", "migratable", "docs/operators/mlx5.md"):
        assert word in can.reason
    await device.aclose()


def test_identity_is_that_of_our_own_way_as_far_as_it_is_known():
    device = device_with(Driver())
    assert device.identity == StateIdentity("connectx-vf", 1, "28.41.1000", 0)
    assert device_with(Driver(flags=MIGRATION_STOP_COPY)).identity.variant == "connectx-vf-bare"
    device.check_identity(StateIdentity("connectx-vf", 1, "28.41.1000", 7 | 5 << 32))
    device.check_identity(StateIdentity("connectx-vf", 1, "", 0))
    for theirs in (StateIdentity("connectx-vf-bare", 1, "28.41.1000"), StateIdentity("connectx-vf", 1, "28.40.1000")):
        with pytest.raises(StreamMismatchError):
            device.check_identity(theirs)


async def saved(device):
    await device.stop(StopKind.P2P)
    await device.stop(StopKind.FULL)
    await device.save_begin()
    sink = Kept()
    await device.save(SavePhase.STOP_COPY, sink)
    await device.save_end()
    return sink.data


@trio_test
async def test_the_drivers_bytes_travel_unchanged():
    assert await saved(device_with(Driver())) == STREAM
    driver = Driver()
    device = device_with(driver)
    await device.stop(StopKind.P2P)
    await device.stop(StopKind.FULL)
    await device.load_begin()
    for at in range(0, len(STREAM), 11):
        await device.load(Section("kernel", 1, STREAM[at : at + 11]))
    await device.load_done()
    assert driver.file.written == STREAM


@trio_test
async def test_what_our_own_way_saves_the_kernels_driver_is_given_and_the_other_way_round():
    pf = FakeConnectx()
    async with trio.open_nursery() as nursery:
        own = probe(FakeVf(pf), {})
        await own.open(OneCompanion(pf, nursery))
        stream = await saved(own)
        driver = Driver(stream)
        kernel = device_with(driver)
        kernel.check_identity(own.identity)
        own.check_identity(kernel.identity)
        await kernel.stop(StopKind.P2P)
        await kernel.stop(StopKind.FULL)
        await kernel.load_begin()
        await kernel.load(Section("kernel", 1, stream))
        await kernel.load_done()
        assert driver.file.written == stream
        await own.load_begin()
        await own.load(Section("kernel", 1, STREAM))
        await own.load_done()
        assert pf.loaded == [b"first", b"last"]
        await own.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("stream", [STREAM[:-1], image_header(1 << 33), b"\0" * 16, stop_copy_size(4096)])
@trio_test
async def test_records_that_cannot_be_end_the_save(stream):
    with pytest.raises(HostError, match="its driver's state") as caught:
        await saved(device_with(Driver(stream)))
    assert caught.value.errno == errno.EIO


@trio_test
async def test_records_that_cannot_be_never_reach_the_driver():
    driver = Driver()
    device = device_with(driver)
    await device.stop(StopKind.P2P)
    await device.stop(StopKind.FULL)
    await device.load_begin()
    with pytest.raises(StreamFormatError, match="unknown tag"):
        await device.load(Section("kernel", 1, bytes(12) + b"\5\0\0\0"))
    assert driver.file.written == b""
    await device.load_begin()
    await device.load(Section("kernel", 1, STREAM[:-2]))
    with pytest.raises(StreamFormatError, match="within a record"):
        await device.load_done()


@trio_test
async def test_an_old_kernels_image_is_not_looked_into():
    assert await saved(device_with(Driver(b"bare image", MIGRATION_STOP_COPY | MIGRATION_P2P))) == b"bare image"
