"""A device over files and a plugin that notes what is done to it, behind a real Session with a real client.

The files stand for registers behind the kernel's door. Where COMMAND's memory bit is off, BAR0 answers EIO to us, as
vfio-pci does. It must not know what is tested.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Callable

import trio

from vfu_server.device import Capabilities, Device, SavePhase, Section, StateIdentity
from vfu_server.errors import HostError
from vfu_server.host_device import HostStatistics, Identity, IrqInfo, MmapArea, RegionInfo
from vfu_server.libvfio_user.kernel_door import KernelDoor
from vfu_server.policy import Answer, Answers, Policy, Rule
from vfu_server.session import Session, SessionOptions
from vfu_server.testing import Client
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_MEMORY, REGION_INFO_FLAG_MMAP, RegionIndex

BAR = 0x2000
CONFIG_AT = 0x10000
MEMORY_ON = 7


class FileHost:
    """Registers in a memfd; `writes` are those to COMMAND."""

    def __init__(self, cannot_revoke=""):
        self.name = "0000:00:04.0"
        self.fd = os.memfd_create("registers", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, CONFIG_AT + 0x1000)
        rw = 3
        sizes = {0: BAR, int(RegionIndex.CONFIG): 256}
        self.regions = [RegionInfo(index, sizes.get(index, 0), rw if index in sizes else 0) for index in range(9)]
        areas = (MmapArea(0, 0x1000),)
        self.regions[0] = RegionInfo(0, BAR, rw | REGION_INFO_FLAG_MMAP, areas, self.fd)
        self.irqs = [IrqInfo(index, 0) for index in range(5)]
        self.can_reset = True
        self.dma_by_messages = False
        self.cannot_revoke = cannot_revoke
        self.relay = None
        self.dirty_source = ""
        self.native = KernelDoor(self.fd, self.fd)
        self.native.set_region(0, 0, BAR)
        self.native.set_region(RegionIndex.CONFIG, CONFIG_AT, 256)
        self.writes = []
        self.fail_config = False
        self.native.write(RegionIndex.CONFIG, PCI_COMMAND, MEMORY_ON.to_bytes(2, "little"))

    @property
    def command(self):
        return int.from_bytes(self.native.read(RegionIndex.CONFIG, PCI_COMMAND, 2), "little")

    @property
    def memory_on(self):
        return bool(self.command & PCI_COMMAND_MEMORY)

    def _check(self, region):
        if region == 0 and not self.memory_on:
            raise HostError("memory decoding is off", errno.EIO)
        if region == RegionIndex.CONFIG and self.fail_config:
            raise HostError("no config space", errno.EIO)

    def read(self, region, offset, width):
        self._check(region)
        return int.from_bytes(self.native.read(region, offset, width), "little")

    def write(self, region, offset, width, value):
        self._check(region)
        if (region, offset) == (RegionIndex.CONFIG, PCI_COMMAND):
            self.writes.append(value)
        self.native.write(region, offset, value.to_bytes(width, "little"))

    def read_block(self, region, offset, length):
        self._check(region)
        return self.native.read(region, offset, length)

    def write_block(self, region, offset, data):
        self._check(region)
        self.native.write(region, offset, data)

    def identity(self):
        return Identity(0x1234, 0x11E8, 0, 0, 0x10, 0xFF0000)

    async def set_irqs(self, index, flags, start, count, data=b"", fds=()):
        return None

    async def dma_map(self, dma_map):
        raise HostError("no IOMMU", errno.ENODEV)

    async def dma_unmap(self, iova, size):
        return None

    async def dma_unmap_all(self):
        return None

    async def reset(self):
        return "function"

    async def device_feature(self, flags, data=b"", reply_size=0):
        raise HostError("not supported", errno.ENOTTY)

    @contextlib.asynccontextmanager
    async def scratch(self, size, limit=1 << 64):
        yield None

    async def events(self):
        await trio.sleep_forever()
        yield

    def statistics(self):
        numbers = self.native.numbers()
        return HostStatistics(numbers.dma_maps, numbers.dma_bytes, numbers.requests, numbers.errors)

    async def aclose(self):
        self.native.close()
        os.close(self.fd)


class NotedDevice(Device):
    """Notes every call with whether it could reach its registers. `fail` names a call that raises, once."""

    def __init__(self, host):
        super().__init__(host)
        self.calls = []
        self.fail = ""
        self.numbers = {"doorbells": 3}
        self.save_gate = trio.Event()
        self.save_gate.set()

    def note(self, call):
        try:
            self.host.read(0, 0x10, 4)
            self.calls.append(call)
        except HostError:
            self.calls.append(f"{call}: no registers")
        if self.fail == call:
            self.fail = ""
            raise HostError(f"{call} fails", errno.EREMOTEIO)

    @property
    def identity(self):
        return StateIdentity("noted", 1)

    @property
    def policy(self):
        stopped = Answers(Answer.MMAP, Answer.SHADOW, Answer.SHADOW, Answer.DISCARD, Answer.DISCARD)
        dropped = Answers(Answer.MMAP, Answer.DISCARD, Answer.DISCARD, Answer.DISCARD, Answer.DISCARD)
        passed = Answers.always(Answer.PASS)
        return Policy(
            [Rule(0, 0, 0x1000, stopped, dropped, "doorbells"), Rule(0, 0x1000, 0x1000, passed, passed, "status")]
        )

    @property
    def capabilities(self):
        return Capabilities(pre_copy=True)

    async def stop(self, kind):
        self.note("stop")

    async def start(self, kind):
        self.note("start")

    async def reset(self):
        self.note("reset")

    async def estimate(self):
        self.note("estimate")
        return 100

    async def save(self, phase, sink):
        self.note(f"save {phase.value}")
        if phase is SavePhase.STOP_COPY:
            await self.save_gate.wait()
            self.note("save goes on")
        await sink.send(Section("noted", 1, b"state"))

    async def load(self, section):
        self.note("load")

    async def load_done(self):
        self.note("load_done")

    def statistics(self):
        if isinstance(self.numbers, Exception):
            raise self.numbers
        return self.numbers


class Bench:
    """The session with its parts. `ask` runs something of the client's beside it, in a thread."""

    def __init__(self, host, device, session):
        self.host, self.device, self.session = host, device, session
        self.client = None

    async def ask(self, function: Callable, *arguments, **named):
        return await trio.to_thread.run_sync(lambda: function(*arguments, **named))

    async def set_state(self, state):
        await self.ask(self.client.set_mig_state, state)

    async def read_all(self):
        """The whole data session, to its end."""
        data = b""
        while chunk := await self.ask(self.client.mig_data_read):
            data += chunk
        return data


@contextlib.asynccontextmanager
async def running(*, cannot_revoke="", trace=None, **options):
    """A Bench whose client has negotiated; at the end the client leaves and the device is reclaimed."""
    host = FileHost(cannot_revoke)
    device = NotedDevice(host)
    send, receive = trio.open_memory_channel(4)
    try:
        session = Session(
            name="noted",
            host=host,
            device=device,
            plugin_name="noted",
            plugin_version="1",
            options=SessionOptions(**options),
            trace=trace,
        )
        try:
            bench = Bench(host, device, session)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.run, receive.receive)
                ours, theirs = socket.socketpair()
                await send.send(theirs.detach())
                bench.client = Client(ours)
                try:
                    await bench.ask(bench.client.negotiate)
                    yield bench
                finally:
                    bench.client.close()
                    send.close()
        finally:
            await session.shutdown()
    finally:
        await host.aclose()
