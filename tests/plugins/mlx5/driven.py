"""A virtual function of scripted firmware, driven from here without a server, and what its tests do with it."""

from contextlib import asynccontextmanager

import trio

from plugins.mlx5.own_way import OwnWay
from plugins.mlx5.probe import probe
from plugins.mlx5.records import HEADER, RecordReader
from tests.plugins.mlx5.companion import OneCompanion
from tests.plugins.mlx5.firmware import FakeConnectx
from tests.plugins.mlx5.virtual import FakeVf
from vfu_server.device import StopKind

P2P, FULL = StopKind.P2P, StopKind.FULL


class Kept:
    """A sink that keeps everything; `limit` bytes at a time are taken."""

    def __init__(self):
        self.data = b""

    async def send(self, section):
        assert (section.tag, section.version, section.optional) == ("kernel", 1, False)
        assert 0 < len(section.payload) <= 1 << 20
        await trio.lowlevel.checkpoint()
        self.data += section.payload


def images(stream):
    """The images of a stream of records, and the announced size."""
    reader, found = RecordReader(), []
    at = 0
    for part in reader.push(stream):
        del part
    reader.finish()
    while at < len(stream):
        size, flags, tag = HEADER.unpack_from(stream, at)
        at += 16
        if tag == 0:
            assert flags == 0
            found.append(stream[at : at + size])
        else:
            assert (tag, flags, size) == (1, 1, 8)
            assert not found
        at += size
    return found, reader.announced


@asynccontextmanager
async def opened(options=None, **kind):
    """A device with its physical function up; ended in order."""
    pf = FakeConnectx(**kind)
    vf = FakeVf(pf)
    async with trio.open_nursery() as nursery:
        companions = OneCompanion(pf, nursery)
        device = probe(vf, options or {})
        assert isinstance(device, OwnWay)
        await device.open(companions)
        try:
            yield pf, vf, device
        finally:
            with trio.CancelScope(shield=True):
                await device.aclose()
        nursery.cancel_scope.cancel()
    assert pf.strays == []


async def until(condition):
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - the firmware tells nobody
            await trio.sleep(0.005)


async def stopped(device):
    await device.stop(P2P)
    await device.stop(FULL)


async def started(device):
    await device.start(FULL)
    await device.start(P2P)
