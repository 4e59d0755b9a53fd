"""A device that fails on order: at the nth call of a method, or from a section of its save on, in a chosen way.

It wraps any plugin's `Device` and passes on what it is not told to spoil; all calls are kept, so that a test finds the
places where a fault can strike by a run without one. It knows no server and no hardware.

A fault strikes before the wrapped device hears of the call: as the contract wants it, a method that raises has changed
nothing. The one exception is `save_end`, which is done in any case.
"""

import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import trio

from vfu_server.companion import Companions
from vfu_server.device import (
    Capabilities,
    Device,
    DeviceLog,
    PrecopyInfo,
    SavePhase,
    Section,
    Sink,
    StateIdentity,
    StopKind,
)
from vfu_server.policy import Policy
from vfu_server.stream_format import MAX_SECTION

COROUTINES = frozenset(
    {
        "open",
        "stop",
        "start",
        "reset",
        "estimate",
        "precopy_info",
        "save_begin",
        "save",
        "send",
        "save_end",
        "load_begin",
        "load",
        "load_done",
        "aclose",
    }
)
SYNCHRONOUS = frozenset({"identity", "trap_read", "trap_write", "shadow_write", "check_identity", "knows"})
METHODS = COROUTINES | SYNCHRONOUS
"""Where a fault can strike. `send` is the place before a section that the save gives."""


@dataclass(frozen=True, slots=True)
class Call:
    """The `nth` call (from 1) of `method`."""

    method: str
    nth: int

    def __str__(self) -> str:
        return f"{self.method} {self.nth}"


@dataclass(frozen=True, slots=True)
class Raise:
    """The call raises `error`."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Hang:
    """The call does not come back until it is cancelled. `pause` is awaited again and again meanwhile."""

    pause: Callable[[], Awaitable[None]] = field(default=trio.sleep_forever)


@dataclass(frozen=True, slots=True)
class Overrun:
    """The call takes `seconds` and cannot be cancelled, then goes on as usual: a plugin that shields a wait."""

    seconds: float
    pause: Callable[[], Awaitable[None]] | None = None


@dataclass(frozen=True, slots=True)
class Stuck:
    """The call does not come back and cannot be cancelled, as one that waits for the kernel in a thread; when
    `released` comes back it goes on as usual.
    """

    released: Callable[[], Awaitable[None]] = field(default=trio.sleep_forever)


@dataclass(frozen=True, slots=True)
class Oversize:
    """A save's section (`send` only) grows beyond what the stream allows."""


@dataclass(frozen=True, slots=True)
class Meanwhile:
    """`action` happens right before the call, as the loss of the hardware or of a client; the call itself goes on."""

    action: Callable[[], None]


Failure = Raise | Hang | Overrun | Stuck | Oversize | Meanwhile


class FailingDevice(Device):
    """`inner`, failing as ordered. Each order strikes once; `calls` are all calls, `struck` those that were spoilt."""

    def __init__(self, inner: Device) -> None:
        super().__init__(inner.host)
        self.inner = inner
        self.lock = inner.lock
        self.calls: list[Call] = []
        self.struck: list[Call] = []
        self._counts: Counter[str] = Counter()
        self._orders: dict[Call, Failure] = {}
        self._books = threading.Lock()

    def order(self, method: str, failure: Failure, nth: int = 1) -> None:
        """Let the `nth` call of `method` from now on fail. ValueError for what cannot be."""
        if method not in METHODS:
            raise ValueError(f"a device has no method {method!r} to spoil")
        if isinstance(failure, Hang | Overrun | Stuck) and method not in COROUTINES:
            raise ValueError(f"{method} is no coroutine: it cannot wait")
        if isinstance(failure, Oversize) and method != "send":
            raise ValueError("only a section (send) can be too large")
        with self._books:
            self._orders[Call(method, self._counts[method] + nth)] = failure

    def forget_orders(self) -> None:
        """What has not struck by now never will."""
        with self._books:
            self._orders.clear()

    # what it does to a call

    def _called(self, method: str) -> Failure | None:
        with self._books:
            self._counts[method] += 1
            call = Call(method, self._counts[method])
            self.calls.append(call)
            failure = self._orders.pop(call, None)
            if failure is not None:
                self.struck.append(call)
        return failure

    def _sync(self, method: str) -> None:
        match self._called(method):
            case Raise(error):
                raise error
            case Meanwhile(action):
                action()

    async def _async(self, method: str) -> bool:
        """Whether what is passed on shall grow."""
        failure = self._called(method)
        match failure:
            case Raise(error):
                raise error
            case Hang(pause):
                while True:
                    await pause()
            case Overrun(seconds, pause):
                await _overrun(seconds, pause)
            case Stuck(released):
                with trio.CancelScope(shield=True):
                    await released()
            case Meanwhile(action):
                action()
        return isinstance(failure, Oversize)

    # declarations and accesses

    async def open(self, companions: Companions) -> None:
        await self._async("open")
        await self.inner.open(companions)

    @property
    def identity(self) -> StateIdentity:
        self._sync("identity")
        return self.inner.identity

    @property
    def policy(self) -> Policy:
        return self.inner.policy

    @property
    def dirty_log(self) -> DeviceLog | None:
        return self.inner.dirty_log

    @property
    def region_sizes(self) -> Mapping[int, int]:
        return self.inner.region_sizes

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    def trap_read(self, region: int, offset: int, width: int) -> int:
        self._sync("trap_read")
        return self.inner.trap_read(region, offset, width)

    def trap_write(self, region: int, offset: int, width: int, value: int) -> None:
        self._sync("trap_write")
        self.inner.trap_write(region, offset, width, value)

    def trap_read_block(self, region: int, offset: int, length: int) -> bytes:
        self._sync("trap_read")
        return self.inner.trap_read_block(region, offset, length)

    def trap_write_block(self, region: int, offset: int, data: bytes) -> None:
        self._sync("trap_write")
        self.inner.trap_write_block(region, offset, data)

    def shadow_write(self, region: int, offset: int, width: int, value: int) -> None:
        self._sync("shadow_write")
        self.inner.shadow_write(region, offset, width, value)

    # states

    async def stop(self, kind: StopKind) -> None:
        await self._async("stop")
        await self.inner.stop(kind)

    async def start(self, kind: StopKind) -> None:
        await self._async("start")
        await self.inner.start(kind)

    async def reset(self) -> None:
        await self._async("reset")
        await self.inner.reset()

    async def estimate(self) -> int:
        await self._async("estimate")
        return await self.inner.estimate()

    async def precopy_info(self) -> PrecopyInfo:
        await self._async("precopy_info")
        return await self.inner.precopy_info()

    # state

    async def save_begin(self) -> None:
        await self._async("save_begin")
        await self.inner.save_begin()

    async def save(self, phase: SavePhase, sink: Sink) -> None:
        await self._async("save")
        await self.inner.save(phase, _FailingSink(self._async, sink))

    async def save_end(self) -> None:
        await self.inner.save_end()
        await self._async("save_end")

    def check_identity(self, identity: StateIdentity) -> None:
        self._sync("check_identity")
        self.inner.check_identity(identity)

    async def load_begin(self) -> None:
        await self._async("load_begin")
        await self.inner.load_begin()

    def knows(self, tag: str, version: int) -> bool:
        self._sync("knows")
        return self.inner.knows(tag, version)

    async def load(self, section: Section) -> None:
        await self._async("load")
        await self.inner.load(section)

    async def load_done(self) -> None:
        await self._async("load_done")
        await self.inner.load_done()

    def statistics(self) -> Mapping[str, int]:
        return self.inner.statistics()

    async def aclose(self) -> None:
        await self._async("aclose")
        await self.inner.aclose()


@dataclass(frozen=True, slots=True)
class _FailingSink:
    """Counts the sections of a save on their way."""

    called: Callable[[str], Awaitable[bool]]
    sink: Sink

    async def send(self, section: Section) -> None:
        if await self.called("send"):
            section = Section(section.tag, section.version, bytes(MAX_SECTION + 1), section.optional)
        await self.sink.send(section)


async def _overrun(seconds: float, pause: Callable[[], Awaitable[None]] | None) -> None:
    until = trio.current_time() + seconds
    with trio.CancelScope(shield=True):
        while trio.current_time() < until:
            if pause is not None:
                await pause()
            else:
                await trio.sleep_until(until)
