"""Devices served in this process for tests: the server's own parts around a plugin's device, with no program around.

`Loop` is a trio loop in a thread; `Served` is a device in it, behind a door to a model's or another socket, with all
calls kept and failures to order (`device` is a FailingDevice). It must not know what is tested.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import trio

from vfu_server import logs
from vfu_server.config import DeviceConfig, Source, SourceKind
from vfu_server.device import Device
from vfu_server.errors import VfuServerError
from vfu_server.host_device import HostDevice
from vfu_server.plugins import Plugin, Plugins, Taken, exactly_one
from vfu_server.server_companions import CompanionDoors, OpenHost
from vfu_server.server_doors import open_host
from vfu_server.server_stage import one_cause
from vfu_server.session import Session, SessionOptions
from vfu_server.testing.client import Client
from vfu_server.testing.failing import FailingDevice

T = TypeVar("T")

SECONDS = 60.0
"""For what happens at once on a machine with nothing else to do."""


class Loop:
    """A trio loop in a thread of its own, and what was logged meanwhile, by the server and by plugins.

    `opener` opens the doors of companions, in place of the server's own.
    """

    def __init__(self, instruments: Sequence[trio.abc.Instrument] = (), opener: OpenHost = open_host) -> None:
        self.companions = CompanionDoors(opener)
        self.records: list[logging.LogRecord] = []
        self._instruments = instruments
        self._ready = threading.Event()
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=self._run, name="vfu-testing", daemon=True)
        self._handler = _Keep(self.records)
        logging.getLogger().addHandler(self._handler)
        self._thread.start()
        if not self._ready.wait(SECONDS):
            raise TimeoutError("the loop does not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        trio.run(self._main, instruments=self._instruments)

    async def _main(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self.nursery:
            await self.nursery.start(self.companions.run)
            self._ready.set()
            with self._scope:
                await trio.sleep_forever()
            self.nursery.cancel_scope.cancel()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in the loop's thread."""
        return trio.from_thread.run_sync(function, *arguments, trio_token=self.token)

    def wait(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Run a coroutine in the loop."""
        return trio.from_thread.run(function, *arguments, trio_token=self.token)

    def tracebacks(self) -> list[str]:
        """What was logged with a traceback: exceptions that nobody expected."""
        return [
            f"{record.getMessage()}: {record.exc_info[1]!r}"
            for record in list(self.records)
            if record.exc_info and record.exc_info[1] is not None
        ]

    def close(self) -> None:
        """End all that runs in it."""
        logging.getLogger().removeHandler(self._handler)
        if self._thread.is_alive():
            with contextlib.suppress(trio.RunFinishedError):
                self.call(self._scope.cancel)
        self._thread.join(SECONDS)


class Served:
    """A device that a plugin takes, served to one client at a time; `device` keeps its calls and fails on order.

    `plugin`: the name of an installed one, or a probe function. `hosting` may put something before the door that the
    probe is given.
    """

    def __init__(
        self,
        loop: Loop,
        plugin: str | Callable[[HostDevice, Mapping[str, str]], Device | None],
        device_socket: str,
        *,
        name: str = "device",
        options: Mapping[str, str] | None = None,
        plugins: Plugins | None = None,
        hosting: Callable[[HostDevice], HostDevice] = lambda host: host,
        mmap: str = "never",
    ) -> None:
        self.loop = loop
        self.name = name
        self.failure: Exception | None = None
        """Why it is not served any more."""
        self.taken: Taken | None = None
        self.host: HostDevice
        self.device: FailingDevice
        self.session: Session
        self._plugin = plugin
        self._plugins = plugins
        self._options = dict(options or {})
        self._config = DeviceConfig(name, Source(SourceKind.DEVICE_SOCKET, device_socket))
        self._session_options = SessionOptions(mmap=mmap, dirty_tracking="all")
        self._hosting = hosting
        self._scope = trio.CancelScope()
        self._over = threading.Event()
        self._clients: list[Client] = []
        try:
            loop.wait(loop.nursery.start, self._serve)
        except BaseException as error:
            cause = one_cause(error) if isinstance(error, Exception) else error
            if cause is error:
                raise
            raise cause from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def inner(self) -> Device:
        """The plugin's own device."""
        return self.device.inner

    @property
    def is_served(self) -> bool:
        """Clients may come."""
        return not self._over.is_set() and not self.session.refused

    def connect(self, *, timeout: float = SECONDS) -> Client:
        """A client that has negotiated. An earlier one that has gone is waited for."""
        client = Client(self._socket(), timeout=timeout)
        self._clients.append(client)
        client.negotiate()
        return client

    def connect_raw(self, *, timeout: float = SECONDS) -> Client:
        """A client that has not said a word: for a Guest, or for one that misbehaves."""
        client = Client(self._socket(), timeout=timeout)
        self._clients.append(client)
        return client

    def _socket(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.loop.call(self._send.send_nowait, theirs.detach())
        return ours

    def close(self) -> None:
        """Its clients leave, the device is brought back, the door is closed."""
        for client in self._clients:
            client.close()
        if not self._over.is_set():
            with contextlib.suppress(trio.RunFinishedError):
                self.loop.call(self._scope.cancel)
        self._over.wait(SECONDS)

    async def _serve(self, task_status: "trio.TaskStatus[None]") -> None:
        logs.DEVICE.set(self.name)
        self._send, receive = trio.open_memory_channel[int](16)
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._open(stack)
                task_status.started()
                try:
                    with self._scope:
                        await self.session.run(receive.receive)
                except Exception as error:  # noqa: BLE001 - kept for the test
                    self.failure = one_cause(error)
        finally:
            self._over.set()

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        self.host = await open_host(self._config.source, self._config)
        stack.push_async_callback(_shielded, self.host.aclose)
        taken = self._take(self._hosting(self.host))
        self.taken = taken
        self.device = FailingDevice(taken.device)
        stack.push_async_callback(_shielded, self.device.aclose)
        await self.device.open(self.loop.companions.of(self._config, self._config.source))
        self.session = Session(
            name=self.name,
            host=self.host,
            device=self.device,
            plugin_name=taken.plugin.name,
            plugin_version=taken.plugin.version,
            options=self._session_options,
        )
        stack.push_async_callback(_shielded, self.session.shutdown)

    def _take(self, host: HostDevice) -> Taken:
        if isinstance(self._plugin, str):
            plugins = self._plugins or Plugins()
            return exactly_one(plugins.probe(self._plugin, host, self._options), self._plugin, host)
        device = self._plugin(host, self._options)
        plugin = Plugin("under test", "0", "", self._plugin)
        return exactly_one([] if device is None else [Taken(plugin, device)], plugin.name, host)


class _Keep(logging.Handler):
    """Keeps records."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.INFO)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


async def _shielded(step: Callable[[], Awaitable[None]]) -> None:
    with trio.CancelScope(shield=True):
        try:
            await step()
        except VfuServerError as error:
            logging.getLogger(__name__).warning("closing: %s", error)
