"""A function under kernel VFIO that has no guest: memory of a plugin's own goes where its IOMMU takes addresses."""

import errno

import pytest
from trio.testing import trio_test

from tests.host.conftest import BDF
from vfu_server.dma_memory import DmaMemory
from vfu_server.errors import HostError
from vfu_server.host.kernel import open_bdf


@trio_test
async def test_buffers_lie_where_the_iommu_takes_them(fake):
    host = await open_bdf(BDF, kernel=fake.kernel)
    ranges = tuple(host.iova_ranges)
    assert ranges
    assert all(first < last for first, last in ranges)
    memory = DmaMemory(host)
    buffer = await memory.allocate(12 << 10, 1 << 16)
    assert (buffer.iova, buffer.size) == (1 << 16, 12 << 10)
    assert host.statistics().dma_bytes == 12 << 10
    await memory.free(buffer)
    del buffer  # and with it this process's own mapping
    assert host.statistics().dma_bytes == 0
    await host.aclose()
    with pytest.raises(HostError) as caught:
        await memory.allocate(1)
    assert caught.value.errno == errno.EBADF
