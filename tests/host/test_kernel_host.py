"""A function under kernel VFIO as the session and plugins see it: regions, features, resets, memory, the end."""

import errno
import os
import struct

import pytest
import trio
from trio.testing import trio_test

from tests.host.conftest import BDF
from tests.host.fake_function import CONFIG, OFFSETS, load, store
from vfu_server import uapi
from vfu_server.errors import HostError
from vfu_server.host.kernel import open_bdf
from vfu_server.host_device import DmaMap, Identity, IrqInfo, MmapArea, RegionInfo
from vfu_server.uapi import Feature

MIB = 1 << 20
OTHER = "0000:00:04.1"


def sparse(*areas: tuple[int, int]) -> tuple[int, bytes]:
    return 1, struct.pack("=II", len(areas), 0) + b"".join(struct.pack("=QQ", *area) for area in areas)


# --- what it is


@trio_test
async def test_regions(fake, function):
    function.capabilities = {1: [(3, b""), sparse((0, 0x1000), (0x1800, 0x800))], 3: [(2, bytes(8))]}
    host = await open_bdf(BDF, kernel=fake.kernel)
    device = host.regions[0].fd
    assert host.regions == (
        RegionInfo(0, 0x4000, 7, (MmapArea(0, 0x4000),), device, OFFSETS[0]),
        RegionInfo(1, 0x2000, 7, (MmapArea(0, 0x1000), MmapArea(0x1800, 0x800)), device, OFFSETS[1]),
        RegionInfo(2, 0),
        RegionInfo(3, 0x1000, 3),
        RegionInfo(4, 0),
        RegionInfo(5, 0),
        RegionInfo(6, 0x800, 1),
        RegionInfo(7, 0x1000, 3),
        RegionInfo(8, 0),
    )
    assert fake._files[device].what is function
    await host.aclose()


@trio_test
async def test_a_region_with_an_empty_list_of_areas_is_not_mapped(fake, function):
    function.capabilities = {0: [sparse()], 1: [sparse((0x1000, 0x2000))]}
    host = await open_bdf(BDF, kernel=fake.kernel)
    assert host.regions[0] == RegionInfo(0, 0x4000, 3)
    assert host.regions[1] == RegionInfo(1, 0x2000, 3)  # its only area runs out of it
    await host.aclose()


@trio_test
async def test_interrupts_are_told_as_the_kernel_tells_them(fake, function):
    function.irq_counts[3] = 0  # no PCIe, no AER
    host = await open_bdf(BDF, kernel=fake.kernel)
    assert host.irqs == (IrqInfo(0, 1, 7), IrqInfo(1, 16, 9), IrqInfo(2, 8, 1), IrqInfo(3, 0, 0), IrqInfo(4, 1, 9))
    await host.aclose()


@trio_test
async def test_identity(fake):
    host = await open_bdf(BDF, kernel=fake.kernel)
    assert host.identity() == Identity(0x1234, 0x11E8, 0x1AF4, 0x1100, 0x10, 0xFF0000)
    assert host.name == BDF
    assert host.cannot_revoke == ""
    await host.aclose()


@trio_test
async def test_registers(fake, function):
    host = await open_bdf(BDF, kernel=fake.kernel)
    function.accesses.clear()
    host.write(0, 0x80, 8, 0x1122334455667788)
    assert host.read(0, 0x84, 4) == 0x11223344
    host.write_block(7, 0x3C, b"\x0b\x01")
    assert host.read_block(7, 0x3C, 2) == b"\x0b\x01"
    assert function.accesses == [
        ("write", 0, 0x80, 8),
        ("read", 0, 0x84, 4),
        ("write", 7, 0x3C, 2),
        ("read", 7, 0x3C, 2),
    ]
    function.memory[CONFIG][4] &= ~2
    with pytest.raises(HostError, match=f"{BDF}: the kernel answered: Input/output error") as failed:
        host.read(0, 0, 4)
    assert failed.value.errno == errno.EIO
    assert host.read(7, 4, 1) == 0
    assert host.statistics().errors == 1
    await host.aclose()


@trio_test
async def test_a_closed_door_answers_so(fake):
    host = await open_bdf(BDF, kernel=fake.kernel)
    await host.aclose()
    for call in (lambda: host.read(0, 0, 4), lambda: host.write(0, 0, 4, 0)):
        with pytest.raises(HostError, match="is closed"):
            call()
    for task in (lambda: host.reset(), lambda: host.dma_unmap_all(), lambda: host.device_feature(0x10001, b"", 8)):
        with pytest.raises(HostError, match="is closed"):
            await task()


@trio_test
async def test_closing_takes_bus_mastering_away_first(fake, function):
    host = await open_bdf(BDF, kernel=fake.kernel)
    host.write(7, 4, 2, 0x406)
    function.accesses.clear()
    await host.aclose()
    assert function.accesses == [("read", 7, 4, 2), ("write", 7, 4, 2)]
    assert function.memory[CONFIG][4:6] == b"\x02\x04"


# --- memory


@pytest.fixture
def guest():
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, 16 * MIB)
    yield fd
    os.close(fd)


@trio_test
async def test_dma_maps(fake, function, guest):
    host = await open_bdf(BDF, kernel=fake.kernel)
    await host.dma_map(DmaMap(0x10_0000, MIB, 3, guest, MIB))
    await host.dma_map(DmaMap(0xFEBF_9000, 0x1000, 3))  # a peer's BAR
    space = fake.space_of(function)
    assert [(m.iova, m.size) for m in space.maps] == [(0x10_0000, MIB)]
    os.pwrite(guest, b"for the device", MIB + 16)
    assert space.maps[0].read(16, 14) == b"for the device"
    assert (host.statistics().dma_maps, host.statistics().dma_bytes) == (2, MIB + 0x1000)
    with pytest.raises(HostError) as failed:
        await host.dma_map(DmaMap(0x18_0000, 0x1000, 3, guest))
    assert failed.value.errno == errno.EEXIST
    await host.dma_unmap(0xFEBF_9000, 0x1000)
    await host.dma_unmap_all()
    assert space.maps == []
    await host.aclose()


@trio_test
async def test_memory_that_cannot_be_locked_says_what_to_raise(fake, guest):
    fake.pages_to_lock = 1
    host = await open_bdf(BDF, kernel=fake.kernel)
    with pytest.raises(HostError) as failed:
        await host.dma_map(DmaMap(0, MIB, 3, guest))
    assert failed.value.errno == errno.ENOMEM
    assert "RLIMIT_MEMLOCK" in failed.value.__notes__[0]
    await host.aclose()


@trio_test
async def test_scratch_memory_on_a_device_node_is_a_space_of_its_own(by_cdev, function, guest):
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    await host.dma_map(DmaMap(0, 16 * MIB, 3, guest))
    clients = by_cdev.space_of(function)
    maps, requests = list(clients.maps), len(by_cdev.requests)
    by_cdev.attach_busy = 2  # a reset goes on
    async with host.scratch(5000, 1 << 28) as scratch:
        assert (scratch.iova, len(scratch.memory)) == (0x1000, 8192)
        scratch.memory[:5] = b"hello"
        seen = by_cdev.space_of(function)
        assert seen is not clients
        assert seen.find(scratch.iova).read(0, 5) == b"hello"
        seen.find(scratch.iova).write(4096, b"device")
        assert bytes(scratch.memory[4096:4102]) == b"device"
    assert by_cdev.space_of(function) is clients
    assert clients.maps == maps
    assert 0x3B8F not in by_cdev.requests[requests:]  # no client memory was mapped again
    await host.aclose()


@trio_test
async def test_scratch_memory_is_given_back_when_its_user_fails(by_cdev, function):
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    clients = by_cdev.space_of(function)
    with pytest.raises(ZeroDivisionError):
        async with host.scratch(4096):
            raise ZeroDivisionError
    assert by_cdev.space_of(function) is clients
    with pytest.raises(OSError, match="mine"):  # the user's own is not taken for ours
        async with host.scratch(4096):
            raise OSError(errno.EIO, "mine")
    with trio.move_on_after(5) as scope:
        async with host.scratch(4096):
            scope.cancel()
            await trio.sleep_forever()
    assert by_cdev.space_of(function) is clients
    assert [kind for kind, _ in by_cdev._objects.values()] == ["device", "ioas", "hwpt"]
    await host.aclose()


@trio_test
async def test_scratch_memory_whose_user_keeps_a_view_of_it(by_cdev, function):
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    clients = by_cdev.space_of(function)
    async with host.scratch(8192) as scratch:
        kept = scratch.memory[4096:]
        kept[:4] = b"kept"
    assert by_cdev.space_of(function) is clients
    assert bytes(kept[:4]) == b"kept"
    await host.aclose()


@trio_test
async def test_scratch_memory_without_room_or_locked_memory(by_cdev, function):
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    clients = by_cdev.space_of(function)
    for setting in ({"size": 1 << 20, "limit": 1 << 16}, {"size": 1 << 20, "limit": 1 << 32}):
        by_cdev.pages_to_lock = 1
        with pytest.raises(HostError, match="scratch memory"):
            async with host.scratch(**setting):
                pytest.fail("there is none")
        assert by_cdev.space_of(function) is clients
    await host.aclose()


@trio_test
async def test_scratch_memory_on_type1_takes_a_hole_or_the_place_of_guest_memory(by_group, function, guest):
    host = await open_bdf(BDF, kernel=by_group.kernel)
    await host.dma_map(DmaMap(0, 8 * MIB, 3, guest))
    await host.dma_map(DmaMap(8 * MIB, 8 * MIB, 3, guest, 8 * MIB))
    space = by_group.space_of(function)
    async with host.scratch(8192) as scratch:
        assert scratch.iova == 16 * MIB
        scratch.memory[:3] = b"abc"
        assert space.find(scratch.iova).read(0, 3) == b"abc"
        assert len(space.maps) == 3
    async with host.scratch(8192, 16 * MIB) as scratch:
        assert scratch.iova == 16 * MIB - 8192
        assert [m.iova for m in space.maps] == [0, scratch.iova]
    assert [(m.iova, m.size) for m in space.maps] == [(0, 8 * MIB), (8 * MIB, 8 * MIB)]
    await host.aclose()


@trio_test
async def test_scratch_memory_on_type1_keeps_out_of_the_window_of_interrupt_messages(by_group, function, guest):
    host = await open_bdf(BDF, kernel=by_group.kernel)
    os.ftruncate(guest, 0xFEDFF000)
    space = by_group.space_of(function)
    by_group._enter = lambda space, mapping: space.maps.append(mapping)  # so much is not read page by page
    await host.dma_map(DmaMap(0, 0xFEDFF000, 3, guest))
    async with host.scratch(0x2000, 1 << 36) as scratch:
        assert scratch.iova == 0xFEF00000
    async with host.scratch(0x2000, 0xFEE80000) as scratch:
        assert scratch.iova == 0xFEDFE000
    assert [m.iova for m in space.maps] == [0]
    await host.aclose()


# --- resets


@trio_test
async def test_the_functions_own_reset(fake, function):
    host = await open_bdf(BDF, kernel=fake.kernel)
    assert host.can_reset
    function.busy_resets = 2
    assert await host.reset() == "DEVICE_RESET"
    assert function.calls.count("reset") == 1
    await host.aclose()


@trio_test
async def test_no_reset_at_all(fake, function):
    function.resets = False
    host = await open_bdf(BDF, kernel=fake.kernel)
    assert not host.can_reset
    with pytest.raises(HostError, match="no function reset; hot reset: No such device") as failed:
        await host.reset()
    assert failed.value.errno == errno.ENODEV
    await host.aclose()


@trio_test
async def test_a_hot_reset_that_hits_nobody_else(fake, function, by_what):
    function.resets = False
    function.hot_reset, function.hot_reset_flags = by_what([BDF])
    host = await open_bdf(BDF, kernel=fake.kernel)
    assert host.can_reset
    assert await host.reset() == "PCI_HOT_RESET"
    assert "hot reset" in function.calls
    await host.aclose()


@pytest.fixture
def by_what(request):
    """How the kernel lists the functions of a hot reset: by group, or by id in the iommufd (0: ours, -1: not)."""
    if "cdev" in request.node.name:
        return lambda bdfs, owned=True: ([(0 if owned else -1, bdf) for bdf in bdfs], 1 | (2 if owned else 0))
    return lambda bdfs, owned=True: ([(7 if owned else 9, bdf) for bdf in bdfs], 0)


@trio_test
async def test_a_hot_reset_takes_an_idle_sibling_along(fake, function, by_what):
    function.resets = False
    function.hot_reset, function.hot_reset_flags = by_what([BDF, OTHER])
    host = await open_bdf(BDF, kernel=fake.kernel)
    assert await host.reset() == "PCI_HOT_RESET"
    await host.aclose()


@trio_test
async def test_a_hot_reset_never_hits_what_is_not_ours(fake, function, by_what):
    function.resets = False
    function.hot_reset, function.hot_reset_flags = by_what([BDF, OTHER], owned=False)
    host = await open_bdf(BDF, kernel=fake.kernel)
    assert not host.can_reset
    with pytest.raises(HostError, match=f"it would reset {OTHER} is not ours|it would reset {OTHER}") as failed:
        await host.reset()
    assert failed.value.errno == errno.EBUSY
    assert "hot reset" not in function.calls
    await host.aclose()


@trio_test
async def test_a_hot_reset_never_hits_what_is_in_use_here(by_cdev, function, machine):
    from tests.host.fake_function import FakeFunction

    other = FakeFunction(OTHER, group=8)
    machine.function(OTHER, group=8, cdev="vfio1")
    machine.cdev_nodes("vfio1")
    by_cdev.functions[OTHER] = by_cdev.cdevs["vfio1"] = other
    function.resets, function.hot_reset, function.hot_reset_flags = False, [(0, BDF), (0, OTHER)], 3
    second = await open_bdf(OTHER, kernel=by_cdev.kernel)
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    assert not host.can_reset
    with pytest.raises(HostError, match=f"{OTHER}, in use here"):
        await host.reset()
    await second.aclose()
    assert await host.reset() == "PCI_HOT_RESET"
    await host.aclose()


@trio_test
async def test_the_hot_reset_stands_in_for_a_function_reset_that_fails(fake, function, by_what, caplog):
    function.hot_reset, function.hot_reset_flags = by_what([BDF])
    function.reset = lambda: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    host = await open_bdf(BDF, kernel=fake.kernel)
    assert await host.reset() == "PCI_HOT_RESET"
    assert f"{BDF}: DEVICE_RESET: Input/output error" in caplog.text
    await host.aclose()


# --- features


@trio_test
async def test_a_feature_the_driver_has_not(fake):
    host = await open_bdf(BDF, kernel=fake.kernel)
    with pytest.raises(HostError) as failed:
        await host.device_feature(uapi.FEATURE_GET | Feature.MIGRATION, b"", 8)
    assert failed.value.errno == errno.ENOTTY
    with pytest.raises(HostError) as failed:
        await host.device_feature(uapi.FEATURE_PROBE | uapi.FEATURE_SET | Feature.DMA_LOGGING_START)
    assert failed.value.errno == errno.ENOTTY
    await host.aclose()


@trio_test
async def test_features_pass_through(fake, function):
    opened = []

    def state(flags, data):
        value, _ = struct.unpack_from("=Ii", data)
        if flags & uapi.FEATURE_SET:
            opened.append((value, os.memfd_create("state", os.MFD_CLOEXEC)))
        struct.pack_into("=Ii", data, 0, opened[-1][0], opened[-1][1] if flags & uapi.FEATURE_SET else -1)
        return 0

    function.features = {
        1: (0x10000, 16, lambda _flags, data: struct.pack_into("=Q", data, 0, 7) or 0),
        2: (0x30000, 16, state),
    }
    host = await open_bdf(BDF, kernel=fake.kernel)
    assert await host.device_feature(uapi.FEATURE_PROBE | uapi.FEATURE_GET | Feature.MIGRATION) == b""
    assert await host.device_feature(uapi.FEATURE_GET | Feature.MIGRATION, b"", 8) == struct.pack("<Q", 7)
    with pytest.raises(HostError) as failed:
        await host.device_feature(uapi.FEATURE_SET | Feature.MIGRATION, bytes(8))
    assert failed.value.errno == errno.EINVAL
    wish = uapi.FEATURE_STATE.pack(uapi.MigState.STOP_COPY, -1)
    reply = await host.device_feature(uapi.FEATURE_SET | Feature.MIG_DEVICE_STATE, wish, 8)
    assert uapi.FEATURE_STATE.unpack(reply) == opened[0]
    os.close(opened[0][1])
    now = await host.device_feature(uapi.FEATURE_GET | Feature.MIG_DEVICE_STATE, b"", 8)
    assert uapi.FEATURE_STATE.unpack(now) == (uapi.MigState.STOP_COPY, -1)
    with pytest.raises(HostError, match="file descriptor") as failed:
        await host.device_feature(uapi.FEATURE_GET | Feature.DMA_BUF, bytes(32), 32)
    assert failed.value.errno == errno.ENOTTY
    await host.aclose()


@trio_test
async def test_dma_logging_by_the_device_is_translated(fake, function):
    """Ranges and bitmaps lie inline in vfio-user's messages and behind pointers in the kernel's structs."""
    told = {}

    def start(_flags, data):
        page_size, count, reserved, pointer = struct.unpack_from("=QIIQ", data)
        told["ranges"] = [struct.unpack("=QQ", load(pointer + 16 * i, 16)) for i in range(count)]
        assert reserved == 0
        struct.pack_into("=Q", data, 0, page_size * 2)
        return 0

    def report(_flags, data):
        told["report"] = struct.unpack_from("=QQQ", data)
        pointer = struct.unpack_from("=Q", data, 24)[0]
        store(pointer, struct.pack("=QQ", 1 << 63 | 1, 2))
        return 0

    function.features = {6: (0x20000, 32, start), 7: (0x20000, 8, lambda *_: 0), 8: (0x10000, 40, report)}
    host = await open_bdf(BDF, kernel=fake.kernel)
    await host.device_feature(uapi.FEATURE_PROBE | uapi.FEATURE_SET | Feature.DMA_LOGGING_START)
    ranges = uapi.LOGGING_RANGE.pack(0, MIB) + uapi.LOGGING_RANGE.pack(1 << 32, 2 * MIB)
    wish = uapi.FEATURE_LOGGING_START.pack(4096, 2, 0) + ranges
    reply = await host.device_feature(uapi.FEATURE_SET | Feature.DMA_LOGGING_START, wish, len(wish))
    assert reply == uapi.FEATURE_LOGGING_START.pack(8192, 2, 0) + ranges
    assert told["ranges"] == [(0, MIB), (1 << 32, 2 * MIB)]
    ask = uapi.FEATURE_LOGGING_REPORT.pack(0x10000, 66 * 4096, 4096)
    reply = await host.device_feature(uapi.FEATURE_GET | Feature.DMA_LOGGING_REPORT, ask, 24 + 16)
    assert told["report"] == (0x10000, 66 * 4096, 4096)
    assert reply == ask + struct.pack("<QQ", 1 << 63 | 1, 2)
    reply = await host.device_feature(uapi.FEATURE_GET | Feature.DMA_LOGGING_REPORT, ask, 24 + 9)
    assert reply == ask + struct.pack("<QB", 1 << 63 | 1, 2)
    await host.device_feature(uapi.FEATURE_SET | Feature.DMA_LOGGING_STOP)
    await host.aclose()


@pytest.mark.parametrize(
    ("feature", "data", "room"),
    [
        (uapi.FEATURE_SET | Feature.DMA_LOGGING_START, bytes(8), 8),
        (uapi.FEATURE_SET | Feature.DMA_LOGGING_START, uapi.FEATURE_LOGGING_START.pack(4096, 2, 0) + bytes(16), 32),
        (uapi.FEATURE_GET | Feature.DMA_LOGGING_REPORT, bytes(16), 64),
        (uapi.FEATURE_GET | Feature.DMA_LOGGING_REPORT, uapi.FEATURE_LOGGING_REPORT.pack(0, MIB, 0), 64),
        (uapi.FEATURE_GET | Feature.DMA_LOGGING_REPORT, uapi.FEATURE_LOGGING_REPORT.pack(0, MIB, 4096), 24 + 31),
    ],
)
def test_dma_logging_with_the_wrong_lengths_never_reaches_the_kernel(by_cdev, function, feature, data, room):
    function.features = {6: (0x20000, 32, lambda *_: pytest.fail("reached")), 8: (0x10000, 40, lambda *_: 1 / 0)}

    @trio_test
    async def ask():
        host = await open_bdf(BDF, kernel=by_cdev.kernel)
        with pytest.raises(HostError) as failed:
            await host.device_feature(feature, data, room)
        assert failed.value.errno == errno.EINVAL
        await host.aclose()

    ask()
