"""Real sessions over two cards in processes of their own, whose physical functions' doors see each command go.

At a chosen command or access something is ordered: of the door, of the model's firmware, or of its process. Knows no
test and no judgement.
"""

import errno
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import trio

from plugins.mlx5.own_way import OwnWay
from plugins.mlx5.probe import probe
from plugins.mlx5.registers import CMD_DOORBELL
from tests.model_process import ModelProcess
from tests.plugins.mlx5.served import SMALL
from tests.trio_thread import TrioThread
from vfu_server.config import DeviceConfig, Source, SourceKind
from vfu_server.errors import DeviceGoneError, HostError
from vfu_server.host.vfio_user import VfioUserHost
from vfu_server.server_companions import CompanionDoors
from vfu_server.session import Session, SessionOptions
from vfu_server.testing import Client

ORDERED = errno.EREMOTEIO
METHODS = frozenset({"read", "write", "read_block", "write_block", "reset", "dma_map", "dma_unmap"})
SECONDS = 60.0
COMMAND_SECONDS = "3"


class Orders:
    """Counts the accesses of one side's doors, or only the commands among them; `strike` is called before the nth."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls: list[str] = []
        self._at = 0
        self._commands = False
        self._strike: Callable[[], None] = lambda: None

    def arm(self, nth: int, strike: Callable[[], None], *, commands: bool) -> None:
        """Begin anew; nth 0: nothing is struck. `commands`: only doorbells of the physical function count."""
        with self._lock:
            self.calls, self._at, self._strike, self._commands = [], nth, strike, commands

    @property
    def struck(self) -> bool:
        """The place was come by."""
        return 0 < self._at <= len(self.calls)

    def called(self, what: str, *, command: bool) -> None:
        """An access is about to be made."""
        with self._lock:
            if self._commands and not command:
                return
            self.calls.append(what)
            if len(self.calls) != self._at:
                return
        self._strike()


def refuse() -> None:
    """The access fails, and does not reach the device."""
    raise HostError("it was ordered to fail", ORDERED)


class FailingDoor:
    """A real door whose accesses `orders` sees."""

    def __init__(self, inner: VfioUserHost, orders: Orders, *, is_pf: bool) -> None:
        self.__dict__.update(_inner=inner, _orders=orders, _is_pf=is_pf)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in METHODS:
            return found

        def call(*arguments: object) -> Any:
            shown = ", ".join(f"{a:#x}" if isinstance(a, int) else "..." for a in arguments)
            command = self._is_pf and name == "write" and arguments[:2] == (0, CMD_DOORBELL)
            self._orders.called(f"{name}({shown})", command=command)
            return found(*arguments)

        return call

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._inner, name, value)


class Side(TrioThread):
    """One card with one VF, served to one client after another."""

    def __init__(self) -> None:
        super().__init__("side")
        self._stack = stack = ExitStack()
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vfu-"))
        arguments = ("connectx", *SMALL, "--image-size", "64K", "--command-timeout", COMMAND_SECONDS)
        self.model = ModelProcess(Path(folder), *arguments, module="plugins.mlx5.models", time_scale=0.1)
        stack.callback(self.model.close)
        self.path = str(self.model.path)
        self.orders = Orders()
        self._talking = threading.Lock()
        self.device: OwnWay
        self.start()

    def close(self) -> None:
        """End both; that the card was gone is no failure."""
        with self._stack:
            try:
                super().close()
            except* DeviceGoneError:
                pass

    def kill(self) -> None:
        """The card goes, as one that is pulled out."""
        self.model.process.kill()
        self.model.process.wait()

    def count(self, name: str) -> int:
        """One of its physical function's counts: `recoveries`, `timeouts`."""
        return self.device.statistics().get(f"pf_{name}", 0)

    @property
    def is_up(self) -> bool:
        """Its physical function takes commands, and all that belongs to it is there again."""
        owner = self.device._pf
        return owner is not None and owner.queue.failure is None and not owner._lock.locked()

    def order(self, name: str, times: int = 1) -> None:
        """A fault of the card. From the test's thread, or from the loop's when a place is come by."""
        with self._talking:
            assert self.model.control("fault", name=name, times=times) == {}

    async def _open(self, source: Source, device: DeviceConfig) -> Any:
        is_pf = source.value.endswith(".pf")
        return FailingDoor(await VfioUserHost.open(source.value, device.name), self.orders, is_pf=is_pf)

    async def _serve(self) -> None:
        source = Source(SourceKind.DEVICE_SOCKET, self.path)
        config = DeviceConfig("side", source)
        doors = CompanionDoors(self._open)
        async with trio.open_nursery() as nursery:
            await nursery.start(doors.run)
            host = await self._open(source, config)
            device = probe(host, {})
            assert isinstance(device, OwnWay)
            self.device = device
            try:
                await device.open(doors.of(config, source))
                await self._present(host, device)
            finally:
                with trio.CancelScope(shield=True):
                    await device.aclose()
                    await host.aclose()
            nursery.cancel_scope.cancel()

    async def _present(self, host: Any, device: OwnWay) -> None:
        session = Session(
            name="side", host=host, device=device, plugin_name="mlx5", plugin_version="1", options=SessionOptions()
        )
        self._send, receive = trio.open_memory_channel[int](4)
        self._serving()
        try:
            with self._scope:
                await session.run(receive.receive)
        finally:
            with trio.CancelScope(shield=True):
                await session.shutdown()

    def client(self) -> Client:
        """A client that has not negotiated yet."""
        ours, theirs = socket.socketpair()
        self.on_trio(self._send.send_nowait, theirs.detach())
        return Client(ours, timeout=SECONDS)
