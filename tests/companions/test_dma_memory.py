"""DmaMemory: where buffers go, what is left when a door refuses, and on a real model that memory is shared."""

import errno

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.companions.functions import ADDRESS, DOORBELL, SAVE, STATUS
from tests.model_process import ModelProcess
from vfu_server.dma_memory import DmaBuffer, DmaMemory
from vfu_server.errors import DeviceGoneError, HostError, PluginError
from vfu_server.host.vfio_user import VfioUserHost
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, RegionIndex

MSI = ((0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1))


class Books:
    """A door that keeps maps, and refuses what overlaps or lies outside of its ranges."""

    name = "books"

    def __init__(self, ranges=()) -> None:
        self.iova_ranges = ranges
        self.maps: dict[int, int] = {}
        self.refuse: HostError | None = None

    async def dma_map(self, dma_map) -> None:
        await trio.lowlevel.checkpoint()
        if self.refuse is not None:
            raise self.refuse
        first, last = dma_map.iova, dma_map.iova + dma_map.size - 1
        assert all(last < iova or first >= iova + size for iova, size in self.maps.items())
        assert any(low <= first and last <= high for low, high in self.iova_ranges or ((0, (1 << 64) - 1),))
        self.maps[dma_map.iova] = dma_map.size

    async def dma_unmap(self, iova, size) -> None:
        await trio.lowlevel.checkpoint()
        if self.refuse is not None:
            raise self.refuse
        assert self.maps.pop(iova) == size


def test_places():
    async def main():
        memory = DmaMemory(Books(MSI))
        assert (await memory.allocate(1)).iova == 0x1000
        big = await memory.allocate(0xF0000000 - 0x100000, 1 << 20)
        assert big.iova == 0x100000
        # What does not fit below the window of interrupt messages goes behind it.
        assert (await memory.allocate(0x10000000)).iova == 0xFEF00000
        assert (await memory.allocate(4096, 1 << 16)).iova == 0x10000
        with pytest.raises(HostError) as caught:
            await memory.allocate(0x10000000, limit=1 << 32)
        assert caught.value.errno == errno.ENOSPC
        await memory.free(big)
        assert (await memory.allocate(0x10000000, limit=1 << 32)).iova == 0x11000

    trio.run(main)


def test_a_buffer_is_zeroed_whole_pages_and_goes_back():
    async def main():
        door = Books()
        memory = DmaMemory(door)
        buffer = await memory.allocate(5000)
        assert (buffer.size, bytes(buffer.memory)) == (8192, bytes(8192))
        buffer.memory[:3] = b"abc"
        await memory.free(buffer)
        assert door.maps == {}
        assert bytes(buffer.memory[:3]) == b"abc"  # ours still, the device's no more
        assert bytes((await memory.allocate(5000)).memory[:3]) == bytes(3)
        with pytest.raises(PluginError):
            await memory.free(DmaBuffer(0x5000, 4096, memoryview(b"")))

    trio.run(main)


def test_a_place_is_not_given_away_before_it_is_unmapped():
    class Slow(Books):
        async def dma_unmap(self, iova, size) -> None:
            unmapping.set()
            await go_on.wait()
            await super().dma_unmap(iova, size)

    unmapping, go_on = trio.Event(), trio.Event()

    async def main():
        memory = DmaMemory(Slow())
        buffer = await memory.allocate(4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(memory.free, buffer)
            await unmapping.wait()
            assert (await memory.allocate(4096)).iova == 0x2000
            with pytest.raises(PluginError):
                await memory.free(buffer)
            go_on.set()
        assert (await memory.allocate(4096)).iova == 0x1000

    trio.run(main)


@pytest.mark.parametrize(("size", "alignment"), [(0, 4096), (-1, 4096), (1, 0), (1, 3), (1, -4096)])
def test_what_cannot_be_meant(size, alignment):
    async def main():
        with pytest.raises(PluginError):
            await DmaMemory(Books()).allocate(size, alignment)

    trio.run(main)


def test_refusals_leave_things_as_they_were():
    async def main():
        door = Books()
        memory = DmaMemory(door)
        door.refuse = HostError("locked memory", errno.ENOMEM)
        with pytest.raises(HostError, match="locked memory"):
            await memory.allocate(4096)
        door.refuse = None
        buffer = await memory.allocate(4096)
        assert buffer.iova == 0x1000
        door.refuse = HostError("busy", errno.EBUSY)
        with pytest.raises(HostError, match="busy"):
            await memory.free(buffer)
        door.refuse = None
        assert (await memory.allocate(4096)).iova == 0x2000
        door.refuse = DeviceGoneError("gone")
        await memory.free(buffer)
        with trio.CancelScope() as scope:
            scope.cancel()
            await memory.allocate(4096)
        assert scope.cancelled_caught
        door.refuse, door.maps = None, {}
        assert (await memory.allocate(4096)).iova == 0x1000

    trio.run(main)


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.sampled_from([1, 4096, 1 << 14, 1 << 21]), st.booleans())))
def test_no_two_overlap(wishes):
    """The door of this test asserts it."""

    async def main():
        door = Books(MSI)
        memory = DmaMemory(door)
        buffers: list[DmaBuffer] = []

        async def one(size, alignment):
            buffer = await memory.allocate(size, alignment)
            assert buffer.iova % alignment == 0
            assert buffer.iova >= 0x1000
            buffers.append(buffer)

        async with trio.open_nursery() as nursery:
            for size, alignment, give_back in wishes:
                nursery.start_soon(one, size, alignment)
                if give_back and buffers:
                    await memory.free(buffers.pop(0))
        assert sorted(door.maps) == sorted(buffer.iova for buffer in buffers)

    trio.run(main)


def test_a_device_reads_and_writes_it(tmp_path):
    async def main(path):
        host = await VfioUserHost.open(str(path))
        try:
            host.write(RegionIndex.CONFIG, PCI_COMMAND, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)
            memory = DmaMemory(host)
            buffer = await memory.allocate(4096, 1 << 16)
            assert buffer.iova == 0x10000
            host.write(0, ADDRESS, 8, buffer.iova + 256)
            host.write(0, DOORBELL, 4, SAVE)
            with trio.fail_after(30):
                while host.read(0, STATUS, 4):  # noqa: ASYNC110 - a register has no event
                    await trio.sleep(0.001)
            assert bytes(buffer.memory[:512]) == bytes(256) + (1).to_bytes(4, "little") * 64
            await memory.free(buffer)
        finally:
            await host.aclose()

    with ModelProcess(tmp_path, "pf", module="tests.companions.functions") as model:
        trio.run(main, model.path)
