"""Golden streams: states that were saved once and must be loaded by every later version. What there is, and where.

A plugin's entries stand in a module `of_NAME.py` beside this one, in its tuple GOLDEN; nothing else is to be told. It
must not know any plugin.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from tests.end_to_end.streams import Parts, parts_of
from vfu_server.device import Device
from vfu_server.host_device import HostDevice
from vfu_server.stream import Origin

FOLDER = Path(__file__).resolve().parents[1] / "data" / "streams"


class Place(Protocol):
    """A device to load into, in this process: the plugin's own code before a stand-in for the hardware."""

    host: HostDevice

    async def fresh(self) -> Device:
        """A device as new, stopped."""

    def written(self) -> bool:
        """Whether the hardware was given anything of a state since `fresh`."""

    async def differences(self, parts: Parts) -> list[str]:
        """What of a stream that was taken is not what the hardware now has, told by the hardware itself."""


@dataclass(frozen=True, slots=True)
class Golden:
    """A stream. `place` is made from the stream's parts: a device of the same identity. `make` saves one today.

    `version` is the plugin's state version. `jumps`: the place's time may jump ahead when everything sleeps.
    """

    plugin: str
    variant: str
    version: int
    place: Callable[[Parts], AbstractAsyncContextManager[Place]]
    make: Callable[[Path], bytes]
    jumps: bool = True

    @property
    def name(self) -> str:
        return f"{self.plugin}-{self.variant}-{self.version}"

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.stream"

    def data(self) -> bytes:
        return self.path.read_bytes()

    def parts(self) -> Parts:
        return parts_of(self.data())

    def __str__(self) -> str:
        return self.name


def told(parts: Parts, tag: str) -> list[bytes]:
    """The payloads of a plugin's section, of version 1: others it does not know, and has refused, or skipped."""
    return [
        part.section.payload
        for part in parts.sections
        if (part.origin, part.section.tag, part.section.version) == (Origin.PLUGIN, tag, 1)
    ]


@cache
def golden() -> tuple[Golden, ...]:
    """All of them, in order of their names."""
    found: list[Golden] = []
    for path in sorted(Path(__file__).parent.glob("of_*.py")):
        found += importlib.import_module(f"tests.golden.{path.stem}").GOLDEN
    return tuple(sorted(found, key=lambda one: one.name))
