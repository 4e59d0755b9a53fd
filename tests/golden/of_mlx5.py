"""The golden stream of the plugin mlx5, migrated by its own driver of the physical function, and where it is loaded.

Made by a real server before the plugin's model, with frames that the guest had not seen yet. Loaded before a card in
this process, whose firmware looks at every byte of an image; then it is asked for another image, and that is compared
with the stream's.
"""

import struct
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from plugins.mlx5.models.functions import functions
from plugins.mlx5.models.image import HEADER_SIZE, Geometry, Reader, WrongImageError
from plugins.mlx5.models.options import LEAST_IMAGE, Options
from plugins.mlx5.models.traffic import Traffic
from plugins.mlx5.probe import probe
from tests.end_to_end.streams import Parts
from tests.golden.in_process import ModelHost
from tests.golden.registry import Golden, told
from tests.plugins.carry import ListSink
from tests.plugins.mlx5.companion import OneCompanion
from tests.plugins.mlx5.test_served import GuestPort, Served
from vfu_server.device import Device, SavePhase, StopKind
from vfu_server.errors import VfuServerError
from vfu_server.testing import save
from vfu_server.uapi import MigState

RECORD = struct.Struct("<QII")
SIZES = {"boot_pages": 8, "init_pages": 40, "vf_pages": 8, "save_pages": 4}


def held(stream: bytes) -> tuple[object, dict[int, int], bool]:
    """What the images of a stream of records say: the function's state, its blocks' versions, and that it is whole."""
    reader, at = Reader(Geometry(LEAST_IMAGE)), 0
    while at < len(stream):
        size, _, tag = RECORD.unpack_from(stream, at)
        data = stream[at + RECORD.size : at + RECORD.size + size]
        at += RECORD.size + size
        if tag == 0:
            if reader.final and reader.is_whole:
                reader = Reader(Geometry(LEAST_IMAGE))  # another whole state, which takes the place of the first
            reader.begin(data[:HEADER_SIZE], size)
            reader.feed(data[HEADER_SIZE:])
    return reader.meta, reader.versions, reader.final and reader.is_whole


class Mlx5Place:
    """A virtual function with its physical function beside it."""

    def __init__(self, host: ModelHost, pf: ModelHost, device: Device) -> None:
        self.host = host
        self._pf = pf
        self.device = device
        self._bits = host.header_bits()

    async def fresh(self) -> Device:
        await self.device.reset()
        for kind in (StopKind.P2P, StopKind.FULL):
            await self.device.stop(kind)
        self._resumes = self.device.statistics()["resumes"]
        self._violations = self._pf.model.state()["violations"]
        return self.device

    def written(self) -> bool:
        """Images go to the firmware as they come in, which keeps them beside until the function is resumed: it must
        not be, and nothing but images may have gone.
        """
        return self.device.statistics()["resumes"] != self._resumes or bool(self.host.writes)

    async def differences(self, parts: Parts) -> list[str]:
        wrong = self.host.header_differences(parts, self._bits)
        sink = ListSink()
        try:
            given = held(b"".join(told(parts, "kernel")))
            await self.device.save_begin()
            await self.device.save(SavePhase.STOP_COPY, sink)
            await self.device.save_end()
            found = held(b"".join(section.payload for section in sink.sections))
            for kind in (StopKind.FULL, StopKind.P2P):
                await self.device.start(kind)
        except (WrongImageError, VfuServerError) as error:
            return [*wrong, f"the firmware says: {error}"]
        for what, theirs, ours in zip(("state", "blocks", "whole"), given, found, strict=True):
            if theirs != ours:
                wrong.append(f"{what}: {ours}, not {theirs}")
        if self._pf.model.state()["violations"] != self._violations:
            wrong.append("the driver has broken a rule of the card's")
        return wrong


@asynccontextmanager
async def place(parts: Parts):
    models = functions(Options(image_size=LEAST_IMAGE, **SIZES), "golden")
    vf, pf = ModelHost(models["vf0"], "/run/model"), ModelHost(models["pf"], "/run/model.pf")
    async with trio.open_nursery() as nursery:
        for host in (vf, pf):
            nursery.start_soon(host.bus.serve)
        device = probe(vf, {})
        await device.open(OneCompanion(pf, nursery))
        yield Mlx5Place(vf, pf, device)
        await device.aclose()
        nursery.cancel_scope.cancel()
    assert not pf.bus.maps


def make(folder: Path) -> bytes:
    with Served(folder / "m", "--image-size", str(LEAST_IMAGE)) as served, served.guest() as guest:
        guest.start()
        guest.enable_msix(8)
        traffic = Traffic(GuestPort(guest), pairs=(0, 2))
        traffic.start()
        traffic.run(40)
        traffic.post(10)
        guest.config.write(0x3C, 1, 9)
        guest.client.set_mig_state(MigState.STOP_COPY)
        return b"".join(save(guest.client))


GOLDEN = (Golden("mlx5", "connectx", 1, place, make),)
