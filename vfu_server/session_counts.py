"""What a session counts for operators: mistakes by kind, migrations by arc with their times, and the snapshot of all.

It must not know how the numbers are shown. Counters begin with the session and only grow.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import trio

from vfu_server.host_device import HostStatistics
from vfu_server.libvfio_user.context import ContextStatistics
from vfu_server.libvfio_user.trace import TraceNumbers
from vfu_server.migration import Arc, DataSession
from vfu_server.uapi import MigState

MAX_MISTAKES = 256


@dataclass(slots=True)
class ArcTimes:
    """How often an arc was gone and how often it failed; seconds for those that were gone, in all and at most."""

    done: int = 0
    failed: int = 0
    seconds: float = 0.0
    longest: float = 0.0


@dataclass(frozen=True, slots=True)
class SessionStatistics:
    """Everything that is counted of a device, since it is served.

    `mistakes`: the client's, by kind. `bytes_saved` and `bytes_loaded` are of data sessions that are over. `overruns`
    are coroutines of the plugin that did not end when they were cancelled. `relays` are DMA messages of the device's
    server to the client. `plugin` is of the plugin's choice. `trace`: None without one.
    """

    context: ContextStatistics
    mistakes: Mapping[str, int]
    clients: int
    state: MigState
    arcs: Mapping[Arc, ArcTimes]
    bytes_saved: int
    bytes_loaded: int
    resets: int
    overruns: int
    relays: int
    host: HostStatistics
    plugin: Mapping[str, int]
    trace: TraceNumbers | None = None


class Mistakes:
    """How often each kind of client mistake was made. Numbers within a text make no new kind."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def note(self, text: str) -> bool:
        """Count one; whether it is the first of its kind. A client cannot make us keep more than MAX_MISTAKES kinds."""
        kind = re.sub(r"0x[0-9a-f]+|\d+", "#", text)
        if kind not in self._counts and len(self._counts) >= MAX_MISTAKES:
            kind = "others"
        count = self._counts.get(kind, 0)
        self._counts[kind] = count + 1
        return not count

    def counts(self) -> dict[str, int]:
        """By kind, in order of their first times."""
        return dict(self._counts)


class MigrationCounts:
    """Arcs, data and resets of one device."""

    def __init__(self) -> None:
        self._arcs: dict[Arc, ArcTimes] = {}
        self.bytes_saved = 0
        self.bytes_loaded = 0
        self.resets = 0

    @contextlib.contextmanager
    def timed(self, arc: Arc) -> Iterator[None]:
        """Count what is done in the `with` as going along `arc`: gone if nothing is raised."""
        times = self._arcs.setdefault(arc, ArcTimes())
        began = trio.current_time()
        try:
            yield
        except BaseException:
            times.failed += 1
            raise
        took = trio.current_time() - began
        times.done += 1
        times.seconds += took
        times.longest = max(times.longest, took)

    def data_over(self, session: DataSession, total: int) -> None:
        """A data session ends in which `total` bytes went through."""
        if session is DataSession.SAVE:
            self.bytes_saved += total
        elif session is DataSession.LOAD:
            self.bytes_loaded += total

    def arcs(self) -> dict[Arc, ArcTimes]:
        """A copy, by arc."""
        return {arc: replace(times) for arc, times in self._arcs.items()}
