"""`vfu-plugin trace`: the server as usual, with every call of a hook and of a device written down.

A device stays what it is: its class is given a subclass whose methods tell of each call. Calls that a device makes of
itself are its own affair and not told.
"""

import inspect
import json
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from vfu_server.device import Device, Section
from vfu_server.host_device import HostDevice
from vfu_server.logs import plain
from vfu_server.plugins import Plugin, Plugins, Taken

MOST = 120
"""Characters of an argument or result that are shown."""
_inside: ContextVar[bool] = ContextVar("inside", default=False)


@dataclass(frozen=True, slots=True)
class Event:
    """One call that is over: seconds since the trace began, seconds it took, who was called, and what came back."""

    begun: float
    took: float
    device: str
    call: str
    outcome: str

    def __str__(self) -> str:
        return f"{self.begun:12.6f} {self.took * 1e3:10.3f} ms  {self.device:<16} {self.call} {self.outcome}"


class Recorder:
    """Writes events as lines of text or JSON, from any thread."""

    def __init__(self, out: TextIO, form: str = "text") -> None:
        self._out = out
        self._json = form == "json"
        self._lock = threading.Lock()
        self._start = time.monotonic()

    def told(self, begun: float, device: str, name: str, arguments: Mapping[str, object], outcome: str) -> None:
        """A call of `name` that began at `begun` (CLOCK_MONOTONIC) is over."""
        shown = ", ".join(f"{key}={_short(value)}" for key, value in arguments.items())
        event = Event(begun - self._start, time.monotonic() - begun, device, f"{name}({shown})", outcome)
        line = json.dumps(asdict(event)) if self._json else plain(str(event))
        with self._lock:
            self._out.write(line + "\n")
            self._out.flush()


class TracedPlugins(Plugins):
    """The installed plugins, watched."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def _ask(self, plugin: Plugin, hook: str, **arguments: object) -> list[Any]:
        begun = time.monotonic()
        try:
            answers = super()._ask(plugin, hook, **arguments)
        except Exception as error:
            self._recorder.told(begun, plugin.name, hook, arguments, _raised(error))
            raise
        self._recorder.told(begun, plugin.name, hook, arguments, f"-> {_short(answers)}")
        return answers

    def probe(self, name: str, host: HostDevice, options: Mapping[str, str]) -> list[Taken]:
        """As ever; the devices that are given are watched."""
        taken = super().probe(name, host, options)
        for one in taken:
            watch(one.device, host.name, self._recorder)
        return taken


def watch(device: Device, name: str, recorder: Recorder) -> None:
    """Have every call of `device`'s contract told."""
    members: dict[str, object] = {"__slots__": ()}
    for member, value in vars(Device).items():
        if isinstance(value, property):
            members[member] = property(_sync(getattr(type(device), member).fget, member, name, recorder))
        elif inspect.iscoroutinefunction(value):
            members[member] = _coroutine(getattr(type(device), member), member, name, recorder)
        elif inspect.isfunction(value) and not member.startswith("_"):
            members[member] = _sync(getattr(type(device), member), member, name, recorder)
    device.__class__ = type(type(device).__name__, (type(device),), members)


def _sync(function: Callable[..., Any], member: str, name: str, recorder: Recorder) -> Callable[..., Any]:
    names = list(inspect.signature(function).parameters)[1:]

    def told(self: Device, *arguments: Any, **named: Any) -> Any:
        if _inside.get():
            return function(self, *arguments, **named)
        token, begun = _inside.set(True), time.monotonic()
        shown = {**dict(zip(names, arguments, strict=False)), **named}
        try:
            result = function(self, *arguments, **named)
        except Exception as error:
            recorder.told(begun, name, member, shown, _raised(error))
            raise
        finally:
            _inside.reset(token)
        recorder.told(begun, name, member, shown, f"-> {_short(result)}")
        return result

    return told


def _coroutine(function: Callable[..., Any], member: str, name: str, recorder: Recorder) -> Callable[..., Any]:
    names = list(inspect.signature(function).parameters)[1:]

    async def told(self: Device, *arguments: Any, **named: Any) -> Any:
        if _inside.get():
            return await function(self, *arguments, **named)
        token, begun = _inside.set(True), time.monotonic()
        shown = {**dict(zip(names, arguments, strict=False)), **named}
        try:
            result = await function(self, *arguments, **named)
        except BaseException as error:
            recorder.told(begun, name, member, shown, _raised(error))
            raise
        finally:
            _inside.reset(token)
        recorder.told(begun, name, member, shown, f"-> {_short(result)}")
        return result

    return told


def _raised(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}"


def _short(value: object) -> str:
    if isinstance(value, Section):
        return f"Section({value.tag!r}, {value.version}, {len(value.payload)} bytes)"
    if hasattr(value, "regions") and hasattr(value, "name"):
        return str(value.name)
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if type(value).__repr__ is object.__repr__:
        return f"<{type(value).__name__}>"
    text = hex(value) if type(value) is int and value > 9 else repr(value)
    return text if len(text) <= MOST else f"{text[:MOST]}..."
