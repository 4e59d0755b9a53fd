"""A real session over a model in a process of its own, with doors that fail at one access on order. Knows no test."""

import errno
import socket
import threading
from typing import Any

import trio

from plugins.hns.device import HnsDevice
from plugins.hns.probe import probe
from tests.trio_thread import TrioThread
from vfu_server.config import DeviceConfig, Source, SourceKind
from vfu_server.errors import HostError
from vfu_server.host.vfio_user import VfioUserHost
from vfu_server.server_companions import CompanionDoors
from vfu_server.session import Session, SessionOptions
from vfu_server.testing import Client

ORDERED = errno.EREMOTEIO
METHODS = frozenset({"read", "write", "write_wide", "read_block", "write_block", "reset"})


class Orders:
    """Counts the accesses of one side's doors, and lets one of them fail before it reaches the device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls: list[str] = []
        self._at = 0

    def arm(self, nth: int) -> None:
        """Let the `nth` access from now on fail; 0: none, they are counted."""
        with self._lock:
            self.calls, self._at = [], nth

    @property
    def struck(self) -> bool:
        """The access was come by."""
        return 0 < self._at <= len(self.calls)

    def called(self, what: str) -> None:
        """An access is about to be made."""
        with self._lock:
            self.calls.append(what)
            if len(self.calls) != self._at:
                return
        raise HostError(f"{what} was ordered to fail", ORDERED)


class FailingDoor:
    """A real door whose accesses `orders` sees."""

    def __init__(self, inner: VfioUserHost, orders: Orders) -> None:
        self.__dict__.update(_inner=inner, _orders=orders)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in METHODS:
            return found

        def call(*arguments: object) -> Any:
            shown = ", ".join(a.hex() if isinstance(a, bytes) else f"{a:#x}" for a in arguments)
            self._orders.called(f"{name}({shown})")
            return found(*arguments)

        return call

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._inner, name, value)


class Side(TrioThread):
    """One VF with its PF, served to one client after another, with the plugin's `options`."""

    def __init__(self, path: str, **options: str) -> None:
        super().__init__("side")
        self.path = path
        self._options = {name.replace("_", "-"): value for name, value in options.items()}
        self.orders = Orders()
        self.device: HnsDevice
        self.start()

    async def _open(self, source: Source, device: DeviceConfig) -> Any:
        return FailingDoor(await VfioUserHost.open(source.value, device.name), self.orders)

    async def _serve(self) -> None:
        source = Source(SourceKind.DEVICE_SOCKET, self.path)
        config = DeviceConfig("side", source)
        doors = CompanionDoors(self._open)
        async with trio.open_nursery() as nursery:
            await nursery.start(doors.run)
            host = await self._open(source, config)
            device = probe(host, self._options)
            assert isinstance(device, HnsDevice)
            self.device = device
            try:
                await device.open(doors.of(config, source))
                await self._present(host, device)
            finally:
                with trio.CancelScope(shield=True):
                    await device.aclose()
                    await host.aclose()
            nursery.cancel_scope.cancel()

    async def _present(self, host: Any, device: HnsDevice) -> None:
        session = Session(
            name="side",
            host=host,
            device=device,
            plugin_name="hns",
            plugin_version="1",
            options=SessionOptions(),
        )
        self._send, receive = trio.open_memory_channel[int](4)
        self._serving()
        try:
            with self._scope:
                await session.run(receive.receive)
        finally:
            with trio.CancelScope(shield=True):
                await session.shutdown()

    def client(self, timeout: float) -> Client:
        """A client that has not negotiated yet."""
        ours, theirs = socket.socketpair()
        self.on_trio(self._send.send_nowait, theirs.detach())
        return Client(ours, timeout=timeout)
