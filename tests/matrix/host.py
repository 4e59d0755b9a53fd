"""A device door of memory: its calls are counted, can be made to fail one by one, and its device can be pulled out."""

from collections import Counter
from dataclasses import dataclass

import trio

from tests.plugins.fake_host import FakeHost
from tests.plugins_synthetic.device import SyntheticDevice
from vfu_server import uapi
from vfu_server.device import Section, Sink
from vfu_server.errors import DeviceGoneError, HostError
from vfu_server.host_device import HostEvent, RegionInfo
from vfu_server.libvfio_user.door import LocalMemory
from vfu_server.testing.failing import Call
from vfu_server.uapi import RegionIndex

READ_WRITE = uapi.REGION_INFO_FLAG_READ | uapi.REGION_INFO_FLAG_WRITE
CONFIG_SIZE = 256


class MatrixHost(FakeHost):
    """`calls` are those of the session and the plugin; `order` lets one of them raise. Maps are kept in C."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        sizes = {0: self.bar_size, RegionIndex.CONFIG: CONFIG_SIZE}
        self.regions = [RegionInfo(index, sizes.get(index, 0), READ_WRITE * (index in sizes)) for index in range(9)]
        self.config = bytearray(CONFIG_SIZE)
        self.command = uapi.PCI_COMMAND_MEMORY | uapi.PCI_COMMAND_MASTER
        self.door = LocalMemory()
        self.dma_by_messages = False
        self.relay = None
        self.gone = False
        self.calls: list[Call] = []
        self.orders: dict[Call, Exception | None] = {}
        self._counts: Counter[str] = Counter()
        self._loss = trio.Event()

    def cut(self) -> None:
        """Pull the device out. In the loop's thread."""
        self.gone = True
        self._loss.set()

    def order(self, method: str, error: Exception, nth: int) -> None:
        """Let the `nth` call of `method` from now on raise."""
        self.orders[Call(method, self._counts[method] + nth)] = error

    def order_cut(self, method: str, nth: int) -> None:
        """Let the device go with the `nth` call of `method` from now on."""
        self.orders[Call(method, self._counts[method] + nth)] = None

    def _called(self, method: str) -> None:
        self._counts[method] += 1
        call = Call(method, self._counts[method])
        self.calls.append(call)
        if call in self.orders:
            error = self.orders.pop(call)
            if error is not None:
                raise error
            self.cut()
        self.touch()

    def touch(self) -> None:
        """What every access of the plugin to its hardware begins with."""
        if self.gone:
            raise DeviceGoneError(f"{self.name} was pulled out")

    def read(self, region, offset, width):
        self._called("read")
        return int.from_bytes(self.config[offset : offset + width], "little")

    def write(self, region, offset, width, value):
        self._called("write")
        self.config[offset : offset + width] = value.to_bytes(width, "little")

    def read_block(self, region, offset, length):
        self._called("read_block")
        return bytes(self.config[offset : offset + length])

    def identity(self):
        self._called("identity")
        return super().identity()

    async def set_irqs(self, index, flags, start, count, data=b"", fds=()) -> None:
        return None

    async def dma_unmap_all(self) -> None:
        self.door.dma_unmap_all()

    async def device_feature(self, flags, data=b"", reply_size=0) -> bytes:
        raise HostError("no such feature", 25)

    async def events(self):
        await self._loss.wait()
        yield HostEvent("gone", "it was pulled out")

    @property
    def native(self) -> LocalMemory:
        return self.door


@dataclass(frozen=True, slots=True)
class Fetched:
    """A sink whose sections are read from the hardware."""

    host: MatrixHost
    sink: Sink

    async def send(self, section: Section) -> None:
        self.host.touch()
        await self.sink.send(section)


class Hardware(SyntheticDevice):
    """The synthetic device as far as it needs its hardware."""

    host: MatrixHost

    async def stop(self, kind) -> None:
        self.host.touch()
        await super().stop(kind)

    async def start(self, kind) -> None:
        self.host.touch()
        await super().start(kind)

    async def reset(self) -> None:
        self.host.touch()
        await super().reset()

    async def load_done(self) -> None:
        self.host.touch()
        await super().load_done()

    async def save(self, phase, sink) -> None:
        await super().save(phase, Fetched(self.host, sink))

    def trap_read(self, region: int, offset: int, width: int) -> int:
        self.host.touch()
        return super().trap_read(region, offset, width)

    def trap_write(self, region: int, offset: int, width: int, value: int) -> None:
        self.host.touch()
        super().trap_write(region, offset, width, value)

    def shadow_write(self, region: int, offset: int, width: int, value: int) -> None:
        self.host.touch()
        super().shadow_write(region, offset, width, value)
