"""Sessions in one trio loop in a thread of this process, under a clock that can jump; clients live in real time.

Time goes at its usual pace but where a fault makes a plugin wait: there it is as fast as the loop, so that a deadline
of seconds passes in milliseconds while nothing that really works is hurried.

An engine of its own beside the conformance suite's (`vfu_server.testing`): here the inside of a synthetic device is
judged, in a time that jumps, while the suite has any plugin before it, of which messages alone tell; what both can
share, the failing device, is the kit's.
"""

import contextlib
import logging
import os
import select
import socket
import threading
import time
from pathlib import Path

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.matrix.host import Hardware, MatrixHost
from tests.plugins_synthetic.device import Shape
from vfu_server import logs
from vfu_server.server_stage import one_cause
from vfu_server.session import Session, SessionOptions
from vfu_server.testing import Client, ConnectionClosedError
from vfu_server.testing.failing import FailingDevice

LEAP = 0.25
"""Virtual seconds between two looks of who waits for something that never comes."""
SECONDS = 8.0


class World:
    """The loop."""

    def __init__(self) -> None:
        self.clock = MockClock(rate=1.0)
        self.sides: list[Side] = []
        self.records: list[logging.LogRecord] = []
        self._ready = threading.Event()
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=lambda: trio.run(self._main, clock=self.clock), name="world")
        self._thread.start()
        assert self._ready.wait(SECONDS)
        self._handler = logging.Handler()
        self._handler.emit = self._take
        self._logger = logging.getLogger("vfu_server")
        self._logger.addHandler(self._handler)
        self._level, self._passed_on = self._logger.level, self._logger.propagate
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False

    def _take(self, record: logging.LogRecord) -> None:
        record.device = logs.DEVICE.get()
        self.records.append(record)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self.nursery:
            self._ready.set()
            with self._scope:
                await trio.sleep_forever()

    def call(self, function, *arguments):
        """Run a function in the loop's thread."""
        return trio.from_thread.run_sync(function, *arguments, trio_token=self._token)

    def wait(self, function, *arguments):
        """Run a coroutine in the loop."""
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    def close(self) -> None:
        self.call(self._scope.cancel)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(self._level)
        self._logger.propagate = self._passed_on

    async def pause(self) -> None:
        """Wait for nothing, and let time pass once all others have nothing to do, worker threads included.

        Nor may a client have its answer and not have come to read it, on a busy machine: its patience goes
        by this clock.
        """
        await wait_all_tasks_blocked()
        threads = trio.to_thread.current_default_thread_limiter().borrowed_tokens
        if not threads and not any(side.client and side.client.answered for side in self.sides):
            self.clock.jump(LEAP)
        await trio.sleep(0.0003)

    # what is left over

    def tasks(self) -> int:
        """Living tasks, but for those that ask."""
        return self.call(lambda: trio.lowlevel.current_statistics().tasks_living)


class MortalClient(Client):
    """A client that can die with the next message it sends; `death` says how far it comes."""

    death = ""
    _waiting = False

    @property
    def answered(self) -> bool:
        """It waits for an answer that is there."""
        try:
            return self._waiting and bool(self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def wait_reply(self, msg_id, timeout=None):
        self._waiting = True
        try:
            return super().wait_reply(msg_id, timeout)
        finally:
            self._waiting = False

    def send_raw(self, data, fds=()):
        if self.sock.fileno() < 0:
            raise ConnectionClosedError("the client is dead")
        death, self.death = self.death, ""
        super().send_raw(data[: len(data) // 2] if death == "in its message" else data, fds)
        if not death:
            return
        if death == "its answer unread":
            assert select.select([self.sock], [], [], SECONDS)[0]
            self.close()  # the server sees a reset, as after kill -9
        else:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        raise ConnectionClosedError(f"the client has died {death}")


DEATHS = ("in its message", "before its answer", "its answer unread")


class Side:
    """A device, its session, and its clients one after another."""

    def __init__(self, world: World, name: str, shape: Shape) -> None:
        self.world = world
        self.name = name
        self.failure: Exception | None = None
        self.served = True
        self.client: MortalClient | None = None
        self.clients: list[MortalClient] = []
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        self._send, self._receive = trio.open_memory_channel[int](4)
        world.sides.append(self)
        world.wait(world.nursery.start, self._serve, shape)

    async def _serve(self, shape: Shape, *, task_status) -> None:
        logs.DEVICE.set(self.name)
        self.host = MatrixHost(self.name)
        self.inner = Hardware(self.host, shape)
        self.device = FailingDevice(self.inner)
        self.session = Session(
            name=self.name,
            host=self.host,
            device=self.device,
            plugin_name="synthetic",
            plugin_version="1",
            options=SessionOptions(dirty_tracking="all"),
        )
        task_status.started()
        try:
            with self._scope:
                await self.session.run(self._receive.receive)
        except Exception as error:  # noqa: BLE001 - the judge looks at it
            self.failure = one_cause(error)
        finally:
            self.served = False
            with trio.CancelScope(shield=True):
                await self.session.shutdown()
            self.host.door.close()
            self._over.set()

    def connect(self, *, negotiate: bool = True) -> MortalClient:
        """A client; an earlier one that is gone is waited for by the session."""
        ours, theirs = socket.socketpair()
        self.world.call(self._send.send_nowait, theirs.detach())
        self.client = MortalClient(ours, timeout=SECONDS)
        self.clients.append(self.client)
        if negotiate:
            self.client.negotiate()
        return self.client

    def hang_up(self) -> None:
        """The present client's end, as seen by the server; whoever uses the client sees an end of file."""
        with contextlib.suppress(OSError):
            self.client.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the session, and wait for it."""
        for client in self.clients:
            client.close()
        self.world.call(self._scope.cancel)
        self.world.wait(self._over.wait)
        self.world.sides.remove(self)


def open_files() -> set[str]:
    """What the open fds of this process are."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return found


def pumps() -> int:
    """Native threads that serve a client."""
    found = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += task.joinpath("comm").read_text() == "vfu-pump\n"
    return found


def until(holds, what, seconds: float = 5.0) -> None:
    """Wait for what gives no sign."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        select.select([], [], [], 0.001)
