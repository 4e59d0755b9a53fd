"""Golden streams of the plugin generic_dmaq, and the devices of this process that they are loaded into.

Made by real servers before the plugin's models, with a guest's driver at work before the save; loaded here before the
scripted devices of tests/plugins, which are written apart from the models.
"""

import random
import struct
from contextlib import asynccontextmanager
from pathlib import Path

from plugins.generic_dmaq.device import DmaQueueDevice
from plugins.generic_dmaq.edu_hooks import EduHooks
from plugins.generic_dmaq.ioat_hooks import IoatHooks
from tests.end_to_end.ioat_driver import IoatDriver
from tests.end_to_end.served import Served
from tests.end_to_end.streams import Parts
from tests.golden.registry import Golden
from tests.plugins.carry import ListSink, take
from tests.plugins.fake_host import FakeEdu, FakeIoat
from vfu_server.device import SavePhase
from vfu_server.host_device import RegionInfo
from vfu_server.stream import Origin
from vfu_server.testing import EduDriver, save
from vfu_server.testing.edu import BUFFER, REG_DMA_DESTINATION, REG_DMA_SOURCE, REG_LIVENESS
from vfu_server.uapi import PCI_COMMAND, MigState, RegionIndex

HEAD = struct.Struct("<4sHHIII")
RECORD = struct.Struct("<BBHIQ")
DONE, HALTED = 1, 3
ALL = (1 << 64) - 1
WRITTEN_BY_GUESTS = (0x0C, 0x0D, *range(0x10, 0x28), *range(0x30, 0x34), 0x3C)


def payload_of(parts: Parts, tag: str, origin: Origin = Origin.PLUGIN) -> bytes | None:
    found = [part.section.payload for part in parts.sections if (part.origin, part.section.tag) == (origin, tag)]
    return found[0] if found else None


def records(payload: bytes) -> dict[int, int]:
    """Offset to value, as docs and not the plugin say."""
    return {record[3]: record[4] for record in RECORD.iter_unpack(payload)}


class DmaqPlace:
    """`host_type` with the golden device's identity, identity registers and config space."""

    def __init__(self, parts: Parts, host_type, hooks) -> None:
        self._parts, self._type, self._hooks = parts, host_type, hooks
        self._config = bytearray(payload_of(parts, "config", Origin.SERVER))
        for offset in WRITTEN_BY_GUESTS:
            self._config[offset] = 0
        self._identity = records(payload_of(parts, "device")[HEAD.size :])
        pattern = take(self._host())
        self._layout, self._seconds = pattern.layout, pattern.drain_seconds

    def _host(self):
        host = self._type()
        host.identity = lambda: self._parts.header.device
        host.config = bytearray(self._config)
        host.regions = [
            RegionInfo(r.index, len(self._config) if r.index == RegionIndex.CONFIG else r.size) for r in host.regions
        ]
        if hasattr(host, "global_regs"):
            host.global_regs.update(self._identity)
        return host

    async def fresh(self) -> DmaQueueDevice:
        self.host = self._host()
        self.device = DmaQueueDevice(self.host, self._layout, self._hooks, self._seconds)
        return self.device

    def written(self) -> bool:
        return bool(self.host.writes)

    async def differences(self, parts: Parts) -> list[str]:
        wrong = list(self.host.strays)
        sink = ListSink()
        await self.device.save(SavePhase.STOP_COPY, sink)
        again = {section.tag: section.payload for section in sink.sections}
        given, found = records(payload_of(parts, "registers")), records(again["registers"])
        lossy = self._lossy(given, found)
        wrong += [
            f"register {at:#x}: {found[at]:#x}, not {value:#x}"
            for at, value in given.items()
            if (found[at] ^ value) & ~lossy.get(at, 0)
        ]
        memory = payload_of(parts, "memory")
        if "memory" in again and again["memory"] != (bytes(4096) if memory is None else memory):
            wrong.append("memory")
        config = payload_of(parts, "config", Origin.SERVER)
        wrong += [f"config {at:#x}" for at in WRITTEN_BY_GUESTS if self.host.config[at] != config[at]]
        command = slice(PCI_COMMAND, PCI_COMMAND + 2)
        return wrong + ["command"] * (bytes(self.host.config[command]) != config[command])

    def _lossy(self, given: dict[int, int], found: dict[int, int]) -> dict[int, int]:
        """By offset, the bits that may be lost: read-only and reserved ones and those whose reads or writes act, errors
        of channels, where a channel is in a chain that it has run, and all of the place of one that was left halted,
        which must be told.
        """
        if self._type is FakeEdu:
            return {}
        lossy, halted, at_zero = {0x03: 0xF6, 0x0C: 0xC000}, 0, 0
        for base in range(0x80, 0x80 * (self._type.channels + 1), 0x80):
            lossy |= {base + 0x28: ALL, base + 0x08: ALL & ~7, base: 0x101}
            if given[base + 0x08] & 7 == HALTED:
                lossy[base + 0x06] = ALL  # its driver must reset it in any case, and the count with it
            else:
                lossy[base + 0x10] = ALL
                if found[base + 0x08] & 7 == HALTED:
                    halted += 1
                    at_zero += not given[base + 0x06]  # a fresh chain, not begun, counts from there
                    lossy |= {base + offset: ALL for offset in (0x06, 0x08, 0x18)}
        told = self.device.statistics()["channels_halted"]
        assert halted - at_zero <= told <= halted, f"{halted} channels were left halted, {told} were told"
        return lossy


def place(host_type, hooks):
    @asynccontextmanager
    async def made(parts: Parts):
        yield DmaqPlace(parts, host_type, hooks)

    return made


def make_edu(folder: Path) -> bytes:
    with Served(folder, "edu", time_scale=0.01) as server, server.connect() as guest:
        driver = EduDriver(guest.start())
        guest.memory.write(0x1000, random.Random(1).randbytes(4096))
        driver.copy_to_device(0x1000, 4096)
        driver.write32(REG_LIVENESS, 0xC0FFEE00)
        assert driver.factorial(9) == 362880
        guest.write(0, REG_DMA_SOURCE, 8, 0x123456789A)
        guest.write(0, REG_DMA_DESTINATION, 8, BUFFER + 0x10)
        guest.config.write(0x3C, 1, 11)
        guest.client.set_mig_state(MigState.STOP_COPY)
        return b"".join(save(guest.client))


def make_ioat(folder: Path) -> bytes:
    with Served(folder, "ioat", "--channels", "2", time_scale=1.0) as server, server.connect() as guest:
        guest.start().enable_msix(2)
        driver = IoatDriver(guest)
        driver.set_up()
        driver.copy([(0x100000, 0x200000, 4096)] * 3)
        guest.config.write(0x3C, 1, 10)
        guest.client.set_mig_state(MigState.STOP_COPY)
        return b"".join(save(guest.client))


GOLDEN = (
    Golden("generic_dmaq", "edu", 1, place(FakeEdu, EduHooks), make_edu),
    Golden("generic_dmaq", "ioat", 1, place(FakeIoat, IoatHooks), make_ioat),
)
