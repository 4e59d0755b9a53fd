"""A whole Session in a thread of this process: the synthetic device over a door of memory, clients over socketpairs.

The device and the session can be looked at from the test; what the session logs is not hidden.
"""

import contextlib
import socket
from collections.abc import Iterator

import trio

from tests.plugins.fake_host import FakeHost
from tests.plugins_synthetic.device import Shape, SyntheticDevice
from tests.trio_thread import TrioThread
from vfu_server import uapi
from vfu_server.errors import HostError
from vfu_server.host_device import RegionInfo
from vfu_server.libvfio_user.door import LocalMemory
from vfu_server.session import Session, SessionOptions
from vfu_server.testing import Client
from vfu_server.uapi import RegionIndex

READ_WRITE = uapi.REGION_INFO_FLAG_READ | uapi.REGION_INFO_FLAG_WRITE


class MemoryHost(FakeHost):
    """A door without a device behind it: config space, and memory maps that are kept in C."""

    def __init__(self) -> None:
        super().__init__("synthetic")
        sizes = {0: self.bar_size, RegionIndex.CONFIG: 0x1000}
        self.regions = [RegionInfo(index, sizes.get(index, 0), READ_WRITE * (index in sizes)) for index in range(9)]
        self.door = LocalMemory()
        self.dma_by_messages = False
        self.relay = None

    @property
    def native(self) -> LocalMemory:
        return self.door

    async def set_irqs(self, index, flags, start, count, data=b"", fds=()) -> None:
        return None

    async def device_feature(self, flags, data=b"", reply_size=0) -> bytes:
        raise HostError("no such feature", 25)

    async def events(self):
        await trio.sleep_forever()
        yield None


class InProcess(TrioThread):
    """A served device; `connect` gives clients, one after another."""

    def __init__(self, shape: Shape, **kinds) -> None:
        super().__init__("session")
        self.shape = shape
        self.device_type = kinds.get("device_type", SyntheticDevice)
        self.host: MemoryHost
        self.device: SyntheticDevice
        self.session: Session
        self.start()

    async def _serve(self) -> None:
        self.host = MemoryHost()
        self.device = self.device_type(self.host, self.shape)
        self.session = Session(
            name="synthetic",
            host=self.host,
            device=self.device,
            plugin_name="synthetic",
            plugin_version="1",
            options=SessionOptions(dirty_tracking="all"),
        )
        self._send, receive = trio.open_memory_channel[int](4)
        self._serving()
        try:
            with self._scope:
                await self.session.run(receive.receive)
        finally:
            with trio.CancelScope(shield=True):
                await self.session.shutdown()
            self.host.door.close()

    def connect(self, *, timeout: float = 5.0) -> Client:
        """A client that has negotiated; an earlier one must have been closed, and is waited for."""
        ours, theirs = socket.socketpair()
        self.on_trio(self._send.send_nowait, theirs.detach())
        client = Client(ours, timeout=timeout)
        client.negotiate()
        return client


@contextlib.contextmanager
def in_process(**shape: float) -> Iterator[InProcess]:
    """A served device of such a shape, whose contract must have been kept at the end."""
    served = InProcess(Shape(**shape))
    try:
        yield served
    finally:
        served.close()
    assert served.device.broken == []
