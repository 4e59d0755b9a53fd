"""The companions of all devices: doors that plugins need beside their own, each with a task that drives it.

A door is open while somebody holds it, its task runs while somebody uses it. It must not know devices' sessions or what
a companion is for. Whatever becomes of a companion stays in its own tasks; those who use it are told by HostError.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from vfu_server import logs
from vfu_server.config import DeviceConfig, Source
from vfu_server.errors import DeviceGoneError, HostError, VfuServerError
from vfu_server.host_device import HostDevice
from vfu_server.server_doors import companion_source, companion_token, open_host
from vfu_server.server_stage import CLOSE_DEADLINE, one_cause

logger = logging.getLogger(__name__)

Serve = Callable[[HostDevice, Any], Awaitable[None]]
OpenHost = Callable[[Source, DeviceConfig], Awaitable[HostDevice]]


@dataclass(eq=False, slots=True)
class _Service:
    """The task that drives a companion."""

    serve: Serve
    users: int = 0
    value: Any = None
    has_value: bool = False
    failure: Exception | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    started: trio.Event = field(default_factory=trio.Event)
    """It has given its value, or never will."""
    ended: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False, slots=True)
class _Door:
    """An open companion, or one that is being opened."""

    source: Source
    token: str
    holders: int = 0
    host: HostDevice | None = None
    failure: Exception | None = None
    service: _Service | None = None
    opened: trio.Event = field(default_factory=trio.Event)
    """It is open, or never will be."""
    unheld: trio.Event = field(default_factory=trio.Event)
    closed: trio.Event = field(default_factory=trio.Event)


class CompanionDoors:
    """One for the process. `run` is its life; `of` gives each device its view."""

    def __init__(self, opener: OpenHost = open_host) -> None:
        self._opener = opener
        self._doors: dict[Source, _Door] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Keep companions until cancelled; what is open then is closed first."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def of(self, device: DeviceConfig, own: Source) -> "DeviceCompanions":
        """The companions of `device`, whose own door is at `own`."""
        return DeviceCompanions(self, device, own)

    @asynccontextmanager
    async def hold(self, source: Source, token: str) -> AsyncIterator[_Door]:
        """Have the door open for the time of the `async with`. Raises HostError."""
        door = await self._join(source, token)
        try:
            await door.opened.wait()
            _check(door.source, door.failure)
            yield door
        finally:
            door.holders -= 1
            if not door.holders:
                door.unheld.set()
                await door.closed.wait()

    @asynccontextmanager
    async def use(self, door: _Door, serve: Serve) -> AsyncIterator[Any]:
        """What the task of an open door has started with. The first user brings the task. Raises HostError."""
        while door.service is not None and not door.service.users:
            await door.service.ended.wait()  # of those before us, who have left
        service = door.service
        if service is None:
            service = door.service = _Service(serve)
            self._start(self._serve, door, service)
        service.users += 1
        try:
            await service.started.wait()
            _check(door.source, service.failure)
            yield service.value
        finally:
            service.users -= 1
            if not service.users:
                service.scope.cancel()
                if service.ended.is_set():
                    door.service = None
                await service.ended.wait()

    async def _join(self, source: Source, token: str) -> _Door:
        while (door := self._doors.get(source)) is not None and door.unheld.is_set():
            await door.closed.wait()
        if door is None:
            door = self._doors[source] = _Door(source, token)
            self._start(self._keep, door)
        elif door.token != token:
            raise HostError(f"companion {source.value}: it is open with another vf token: VFs of one PF need the same")
        door.holders += 1
        return door

    def _start(self, task: Callable[..., Awaitable[None]], *arguments: object) -> None:
        if self._nursery is None:
            raise HostError("no companion can be opened: the server does not run")
        self._nursery.start_soon(task, *arguments)

    async def _keep(self, door: _Door) -> None:
        """The life of a door."""
        logs.DEVICE.set(door.source.value)
        try:
            config = DeviceConfig(door.source.value, door.source, vf_token=door.token)
            door.host = await self._opener(door.source, config)
            door.opened.set()
            logger.info("opened as a companion")
            await door.unheld.wait()
        except Exception as error:  # noqa: BLE001 - for those who wait for it
            door.failure = error
            door.opened.set()
            await door.unheld.wait()
        finally:
            with trio.CancelScope(deadline=trio.current_time() + CLOSE_DEADLINE, shield=True) as scope:
                await self._close(door)
            if scope.cancelled_caught:
                logger.error("closing the companion was cut short")
            del self._doors[door.source]
            door.failure = door.failure or HostError("the server ends")
            door.opened.set()
            door.closed.set()

    async def _close(self, door: _Door) -> None:
        if door.service is not None:
            door.service.scope.cancel()
            await door.service.ended.wait()
        if door.host is None:
            return
        try:
            await door.host.aclose()
            logger.info("closed: nobody uses it any more")
        except Exception as error:
            logger.warning("closing the door: %s", error, exc_info=None if isinstance(error, VfuServerError) else error)

    async def _serve(self, door: _Door, service: _Service) -> None:
        """The life of the task that drives a companion; a fault is kept for its users, and told once."""
        logs.DEVICE.set(door.source.value)
        try:
            with service.scope:
                await self._drive(door, service)
                service.failure = HostError("its task has ended by itself")
        except Exception as error:  # noqa: BLE001 - one companion's fault must reach nobody but its users
            service.failure = one_cause(error)
        finally:
            if service.failure is None and not service.started.is_set():
                service.failure = HostError("it was given up before it had started")
            if service.users and service.failure is not None:
                known = isinstance(service.failure, VfuServerError)
                cause = None if known else service.failure
                logger.error("the companion has failed: %s", service.failure, exc_info=cause)
            if not service.users:
                door.service = None
            service.started.set()
            service.ended.set()

    async def _drive(self, door: _Door, service: _Service) -> None:
        host = door.host
        if host is None:
            raise HostError("it is not open")

        async def body(task_status: "trio.TaskStatus[Any]") -> None:
            await service.serve(host, _Status(service, task_status))
            if not service.has_value:
                raise HostError("its task ended before it had started")
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, host)
            await nursery.start(body)
            service.started.set()


class _Status:
    """The `task_status` that a plugin's task is given; its value is kept."""

    def __init__(self, service: _Service, status: "trio.TaskStatus[Any]") -> None:
        self._service = service
        self._status = status

    def started(self, value: object = None) -> None:
        self._service.value, self._service.has_value = value, True
        self._status.started(value)


class DeviceCompanions:
    """The `Companions` of one device."""

    def __init__(self, doors: CompanionDoors, device: DeviceConfig, own: Source) -> None:
        self._doors = doors
        self._device = device
        self._own = own

    def open(self, where: str, serve: Serve) -> AbstractAsyncContextManager[Any]:
        """See `Companions`."""
        return self._open(where, serve)

    @asynccontextmanager
    async def _open(self, where: str, serve: Serve) -> AsyncIterator[Any]:
        async with self._hold(where) as door, self._doors.use(door, serve) as value:
            yield value

    @asynccontextmanager
    async def hold(self, where: str) -> AsyncIterator[None]:
        """Have the companion's door open, before this device's own is opened and until it is closed."""
        async with self._hold(where):
            yield

    def _hold(self, where: str) -> AbstractAsyncContextManager[_Door]:
        source = companion_source(where, self._own)
        return self._doors.hold(source, companion_token(source, self._own, self._device.vf_token))


async def _watch(host: HostDevice) -> None:
    """Whoever uses a companion may wait for its answer for ever: that it is gone ends its task."""
    gone = ""
    async for event in host.events():
        if event.kind == "gone":
            gone = event.message
        else:
            logger.warning("the function says: %s %s", event.kind, event.message)
    if gone:
        raise DeviceGoneError(f"the function is gone: {gone}")


def _check(source: Source, failure: Exception | None) -> None:
    if failure is None:
        return
    number = failure.errno if isinstance(failure, VfuServerError) else None
    text = str(failure) if isinstance(failure, VfuServerError) else f"{type(failure).__name__}: {failure}"
    found = HostError(f"companion {source.value}: {text}", number)
    for note in getattr(failure, "__notes__", ()):
        found.add_note(note)
    raise found from failure
