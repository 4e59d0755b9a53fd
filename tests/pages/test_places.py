"""Every place where the size of the host's pages matters, whatever it is: run as it is, and again with 64 KiB.

Devices do not know it. What a client may map, where our own DMA memory lies and in what the IOMMU tells of written
pages goes by it.
"""

import errno
import mmap
import os

import pytest
from trio.testing import trio_test

from plugins.hns.kernel import HnsKernelDevice
from plugins.hns.policy import policy_of
from plugins.hns.probe import probe
from plugins.hns.registers import HALF, QM_REGION, VENDOR, VF_SIZE, ZIP
from tests.host.fake_function import FakeFunction
from tests.host.fake_kernel import PAGE, FakeKernel
from tests.host.fake_migration import FakeMigration
from tests.host.tree import Machine
from vfu_server.dma_memory import DmaMemory
from vfu_server.errors import HostError
from vfu_server.host.kernel import KernelHost, open_bdf
from vfu_server.host_device import DmaMap, MmapArea, RegionInfo
from vfu_server.policy import Answer, Answers, Policy, Rule
from vfu_server.region import MmapMode, mmap_areas
from vfu_server.testing import GuestMemory
from vfu_server.uapi import MIGRATION_STOP_COPY, REGION_INFO_FLAG_MMAP, RegionIndex

BDF, PF = "0000:75:00.1", "0000:75:00.0"
RW = 3


def kernel_of(root, way: str, *, driver: str = "vfio-pci") -> tuple[FakeKernel, FakeFunction]:
    """A ZIP VF that is opened `way`; its driver is `driver`."""
    machine = Machine(root)
    machine.function(PF, driver="hisi_zip", group=6, ids=(VENDOR, ZIP.pf_id))
    machine.function(BDF, driver=driver, cdev="vfio0" if way == "cdev" else "", ids=(VENDOR, ZIP.vf_id), parent=PF)
    machine.group_nodes()
    function = FakeFunction(BDF)
    function.memory[RegionIndex.CONFIG][0:4] = VENDOR.to_bytes(2, "little") + ZIP.vf_id.to_bytes(2, "little")
    function.memory[RegionIndex.CONFIG][8] = 0x30
    function.memory[RegionIndex.CONFIG][4] = 2
    size = HALF if driver == "hisi_acc_vfio_pci" else VF_SIZE
    function.sizes[QM_REGION], function.flags[QM_REGION] = size, 7
    function.sizes[0] = function.sizes[1] = 0
    function.memory[QM_REGION] = bytearray(size)
    kernel = FakeKernel(root, function)
    if way == "cdev":
        machine.cdev_nodes("vfio0")
        kernel.cdevs["vfio0"] = function
    return kernel, function


@pytest.fixture(params=["group", "cdev"])
def fake(request, tmp_path):
    """The kernel and its function; nothing is left open."""
    kernel, function = kernel_of(tmp_path / "root", request.param)
    yield kernel, function
    kernel.close()


def test_the_page_size_is_this_machines():
    assert mmap.PAGESIZE == os.sysconf("SC_PAGESIZE") == PAGE
    assert PAGE in (4096, 16384, 65536)
    assert os.environ.get("VFU_TEST_PAGE", str(PAGE)) == str(PAGE), "the lane has another page size than it says"


def test_what_may_be_mapped_has_nothing_beside_it_in_its_pages():
    """A page that is also somebody else's, as the one behind a trapped register, is not handed out."""
    pass_, mapped = Answers.always(Answer.PASS), Answers.always(Answer.MMAP)
    rules = [
        Rule(0, 0, 0x1000, pass_, pass_, "registers"),
        Rule(0, 0x1000, 0x2F000, mapped, mapped, "doorbells"),
        Rule(0, 0x30000, 0x1000, pass_, pass_, "more registers"),
        Rule(0, 0x31000, 0xF000, mapped, mapped, "too little of a large page"),
    ]
    region = RegionInfo(0, 0x40000, REGION_INFO_FLAG_MMAP, (), fd=0)
    (areas,) = mmap_areas(Policy(tuple(rules)), [region], MmapMode.PLUGIN).values()
    expected = {
        4096: (MmapArea(0x1000, 0x2F000), MmapArea(0x31000, 0xF000)),
        65536: (MmapArea(0x10000, 0x20000),),
    }
    assert areas == expected[PAGE]
    small = RegionInfo(0, 0x4000, REGION_INFO_FLAG_MMAP, (), fd=0)
    found = mmap_areas(Policy((Rule(0, 0, 0x4000, mapped, mapped, "all"),)), [small], MmapMode.ALL)
    assert bool(found) == (PAGE <= 0x4000)


@pytest.mark.parametrize("mode", MmapMode)
def test_nothing_of_an_accelerator_is_mapped(mode):
    region = RegionInfo(QM_REGION, VF_SIZE, REGION_INFO_FLAG_MMAP, (), fd=0)
    for size in (HALF, VF_SIZE):
        assert mmap_areas(policy_of({QM_REGION: size}), [region], mode) == {}


@trio_test
async def test_scratch_memory_is_whole_pages_where_the_iommu_takes_them(fake):
    kernel, function = fake
    host = await open_bdf(BDF, kernel=kernel.kernel)
    with GuestMemory.of(64 * PAGE) as memory:
        await host.dma_map(DmaMap(0, 64 * PAGE, RW, memory.fd))
        for limit in (1 << 36, 64 * PAGE):  # beside the client's, and in its place
            async with host.scratch(100, limit) as scratch:
                assert scratch is not None
                assert scratch.iova % PAGE == len(scratch.memory) % PAGE == 0
                assert scratch.iova + len(scratch.memory) <= limit
                scratch.memory[:5] = b"hello"
                assert kernel.space_of(function).find(scratch.iova).read(0, 5) == b"hello"
        await host.dma_unmap(0, 64 * PAGE)
    await host.aclose()


@trio_test
async def test_a_companions_buffers_are_whole_pages(fake):
    kernel, _ = fake
    host = await open_bdf(BDF, kernel=kernel.kernel)
    memory = DmaMemory(host)
    buffers = [await memory.allocate(size) for size in (1, 4096, PAGE + 1)]
    assert [buffer.size for buffer in buffers] == [PAGE, PAGE, 2 * PAGE]
    assert all(buffer.iova % PAGE == 0 for buffer in buffers)
    for buffer in buffers:
        await memory.free(buffer)
    await host.aclose()


@trio_test
async def test_a_client_with_smaller_pages_is_told(fake):
    """The kernel pins whole pages of its own: a map of another size is its refusal, and nothing is left of it."""
    kernel, function = fake
    host = await open_bdf(BDF, kernel=kernel.kernel)
    with GuestMemory.of(2 * PAGE) as memory:
        for dma_map in (DmaMap(PAGE // 2, PAGE, RW, memory.fd), DmaMap(0, PAGE // 2, RW, memory.fd)):
            with pytest.raises(HostError, match="Invalid argument") as refused:
                await host.dma_map(dma_map)
            assert refused.value.errno == errno.EINVAL
        assert kernel.space_of(function).maps == []
    await host.aclose()


async def opened(kernel: FakeKernel) -> tuple[KernelHost, object]:
    host = await open_bdf(BDF, kernel=kernel.kernel)
    return host, probe(host, {"pf": "none"})


@trio_test
async def test_a_mailbox_that_shares_its_page_with_the_hidden_half_is_told_of(tmp_path, caplog):
    """hisi_acc_vfio_pci lets nobody map beyond half of BAR2, and its page is then larger than that."""
    kernel, function = kernel_of(tmp_path / "root", "cdev", driver="hisi_acc_vfio_pci")
    FakeMigration(kernel, function, MIGRATION_STOP_COPY, b"state")
    host, device = await opened(kernel)
    assert isinstance(device, HnsKernelDevice)
    assert (f"pages of {PAGE:#x} bytes" in caplog.text) == (PAGE > HALF)
    await device.aclose()
    await host.aclose()
    kernel.close()
