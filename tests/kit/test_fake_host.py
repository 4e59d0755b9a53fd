"""FakeHost: a door made of register tables behaves as doors do."""

import inspect

import pytest
import trio

from vfu_server import uapi
from vfu_server.errors import DeviceGoneError, HostError
from vfu_server.host_device import DmaMap, HostDevice
from vfu_server.regmap import Access, Block, Register
from vfu_server.testing.fake_host import FakeHost
from vfu_server.uapi import RegionIndex

BLOCK = Block("toy", 0x20, [Register("id", 0, 4, Access.RO, reset=7), Register("data", 8, 8, Access.RW)])


@pytest.fixture
def host():
    return FakeHost({0: BLOCK})


def test_it_has_all_that_a_door_has(host):
    for name, member in vars(HostDevice).items():
        if name.startswith("_") or name == "native":
            continue
        assert hasattr(host, name), name
        if inspect.isfunction(member):
            own = inspect.signature(getattr(FakeHost, name))
            assert inspect.signature(member).parameters == own.parameters, name
    for name in HostDevice.__annotations__:
        assert hasattr(host, name), name


def test_registers(host):
    host.write(0, 8, 8, 0x1122)
    host.write(0, 0, 4, 1)
    assert (host.read(0, 0, 4), host.read(0, 8, 8), host["data"]) == (7, 0x1122, 0x1122)
    assert host.read_block(0, 8, 3) == b"\x22\x11\x00"
    host.write_block(0, 9, b"\xff\xff")
    assert host["data"] == 0xFFFF22
    assert host.writes == [(8, 0x1122), (0, 1), (9, 0xFF), (10, 0xFF)]
    assert host.identity().vendor == host.read(RegionIndex.CONFIG, 0, 2)


def test_a_test_makes_more_of_registers(host):
    host.on_read["id"] = lambda value: value + 1
    host.on_write["data"] = lambda value: value ^ 1 if value else None
    host.write(0, 8, 8, 4)
    host.write(0, 8, 8, 0)
    assert (host.read(0, 0, 4), host["data"]) == (8, 5)


def test_memory_decoding_and_loss(host):
    host.write(RegionIndex.CONFIG, uapi.PCI_COMMAND, 2, 0)
    with pytest.raises(HostError, match="memory decoding is off"):
        host.read(0, 0, 4)
    host.gone = True
    for call in (lambda: host.read(0, 0, 4), lambda: host.read_block(RegionIndex.CONFIG, 0, 4), host.identity):
        with pytest.raises(DeviceGoneError):
            call()


def test_the_rest(host):
    async def main():
        await host.dma_map(DmaMap(0x1000, 4096, 3))
        assert host.statistics().dma_bytes == 4096
        with pytest.raises(HostError):
            await host.dma_unmap(0x1000, 1)
        await host.dma_unmap(0x1000, 4096)
        async with host.scratch(100) as scratch:
            assert len(scratch.memory) == 100
        host["data"] = 1
        assert await host.reset() == "fake"
        assert (host["data"], host.resets) == (0, 1)
        with pytest.raises(HostError):
            await host.device_feature(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.checkpoint)
            host.gone = True
            assert [event.kind async for event in host.events()] == ["gone"]
        await host.aclose()

    trio.run(main)
    with pytest.raises(HostError, match="start a model"):
        _ = host.native
    host.can_reset = False
    host.gone = False
    with pytest.raises(HostError, match="no reset"):
        trio.run(host.reset)
