"""Every byte of a state changed, every place of it cut: the loading half of a session, with its real ring and pump.

In one process, so that thousands of loads are quick; what a server's log and its client are told is in
test_refused_streams.py.
"""

import contextlib
import dataclasses
import random

import pytest
import trio

from tests.end_to_end.streams import Parts, records_of
from tests.plugins.carry import saved, take
from tests.plugins.fake_host import FakeEdu
from tests.protocol.served import Served
from vfu_server.device import Section
from vfu_server.errors import StreamFormatError
from vfu_server.session_config import save_config
from vfu_server.session_load import Load
from vfu_server.stream import Origin, StreamHeader, StreamSection
from vfu_server.testing import ReplyError
from vfu_server.uapi import RegionIndex


class Edu(FakeEdu):
    """An edu with the 256 bytes of config space that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.regions = [
            dataclasses.replace(region, size=256) if region.index == RegionIndex.CONFIG else region
            for region in self.regions
        ]


async def stream() -> bytes:
    """What a used edu gives."""
    host = Edu()
    host.buffer[:] = random.Random(3).randbytes(4096)
    host.regs.update({0x04: 0x12345678, 0x08: 120, 0x20: 0x80, 0x80: 0x1000, 0x88: 0x40000, 0x90: 64, 0x98: 6})
    device = take(host)
    sections = [StreamSection(Origin.PLUGIN, section) for section in await saved(device)]
    config = StreamSection(Origin.SERVER, Section("config", 1, save_config(host)))
    return Parts(StreamHeader("generic_dmaq", "1.0", device.identity, host.identity()), (config, *sections)).data()


class Loader:
    """The loading half of a session, and the client that feeds it."""

    def __init__(self, client, ring) -> None:
        self.client = client
        self.host = Edu()
        self.load = Load(self.host, take(self.host), ring, "generic_dmaq")

    async def give(self, data: bytes) -> Exception | None:
        """Load `data` from beginning to end; what it was refused with."""
        await self.load.open()
        try:
            with contextlib.suppress(ReplyError):  # in a thread: this one has to look at a small write first
                await trio.to_thread.run_sync(self.client.mig_data_write, data)
            await self.load.finish()
        except Exception as error:  # noqa: BLE001 - the test says which it may be
            await self.load.close()
            return error
        return None


@pytest.fixture
def feed():
    """Calls a coroutine function with a loader and a sound stream."""
    served = Served()

    def run(test):
        async def main():
            data = await stream()
            with served.connect() as client:
                async with trio.open_nursery() as nursery:
                    loader = Loader(client, served.context.ring)
                    loader.load.attach(nursery)
                    await test(loader, data)
                    assert loader.host.writes == [], "nothing was written while nothing was right"
                    assert await loader.give(data) is None
                    assert loader.host.regs[0x04] == 0x12345678
                    assert bytes(loader.host.buffer) == random.Random(3).randbytes(4096)

        trio.run(main)

    yield run
    served.close()


def test_every_byte_changed(feed, caplog):
    caplog.set_level("CRITICAL")

    async def each(loader, data):
        chance = random.Random(1)
        for at in range(len(data)):
            changed = bytearray(data)
            changed[at] ^= chance.randrange(1, 256)
            error = await loader.give(bytes(changed))
            assert type(error) is StreamFormatError, f"byte {at}: {error!r}"

    feed(each)


def test_every_bit_of_header_and_records_flipped(feed, caplog):
    caplog.set_level("CRITICAL")

    async def each(loader, data):
        places = {at for start, end in records_of(data) for at in range(start, min(end, start + 48))}
        for at in places:
            for bit in range(8):
                changed = bytearray(data)
                changed[at] ^= 1 << bit
                error = await loader.give(bytes(changed))
                assert type(error) is StreamFormatError, f"byte {at}, bit {bit}: {error!r}"

    feed(each)


def test_cut_at_every_byte(feed, caplog):
    caplog.set_level("CRITICAL")

    async def each(loader, data):
        for length in range(len(data)):
            error = await loader.give(data[:length])
            assert type(error) is StreamFormatError, f"{length} bytes: {error!r}"

    feed(each)


def test_a_byte_doubled_dropped_or_put_in_anywhere(feed, caplog):
    caplog.set_level("CRITICAL")

    async def each(loader, data):
        chance = random.Random(2)
        for at in chance.sample(range(len(data)), 400):
            for changed in (data[:at] + data[at : at + 1] + data[at:], data[:at] + data[at + 1 :]):
                error = await loader.give(changed)
                assert type(error) is StreamFormatError, f"byte {at}: {error!r}"

    feed(each)
