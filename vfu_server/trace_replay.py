"""Accesses of a trace once more, to a device or model behind a socket: which reads are answered otherwise?

What the device had answered is sent again (PASS, MMAP, TRAP) in order; what the server had answered by itself is not.
It must not print anything. Guest memory, interrupts and migration are not in a trace, and not here.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from vfu_server import uapi
from vfu_server.errors import HostError, UsageError
from vfu_server.policy import Answer
from vfu_server.testing.client import Client
from vfu_server.testing.wire import ReplyError
from vfu_server.trace_format import Access, Kind, Mark, TraceHeader
from vfu_server.uapi import RegionIndex

OF_THE_DEVICE = frozenset({Answer.PASS, Answer.MMAP, Answer.TRAP})
LONGEST_PAUSE_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Ignored:
    """A range whose reads may differ."""

    region: int
    start: int
    length: int

    def covers(self, access: Access) -> bool:
        """The access touches the range."""
        end = self.start + self.length
        return access.region == self.region and access.offset < end and access.offset + access.width > self.start


def parse_ignored(text: str) -> Ignored:
    """`BAR0+0x24` or `BAR0+0x24:8`. Raises UsageError."""
    name, _, rest = text.partition("+")
    start, _, length = rest.partition(":")
    try:
        found = Ignored(RegionIndex[name.upper()], int(start, 0), int(length or "1", 0))
    except (KeyError, ValueError):
        found = Ignored(0, -1, 0)
    if found.start < 0 or found.length < 1:
        raise UsageError(f"--ignore {text}: give it as REGION+OFFSET or REGION+OFFSET:LENGTH, for instance BAR0+0x24:4")
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """An access that was answered otherwise: `data` and `errno` as they are now."""

    access: Access
    data: bytes
    errno: int


@dataclass(slots=True)
class Outcome:
    """What was done. `skipped`: accesses that are not the device's, by answer; `ignored`: differences that may be."""

    sent: int = 0
    compared: int = 0
    different: int = 0
    ignored: int = 0
    skipped: Counter[Answer] = field(default_factory=Counter)


class Replay:
    """Sends a trace to one device. `outcome` grows while `run` is gone through."""

    def __init__(
        self,
        client: Client,
        *,
        ignored: Sequence[Ignored] = (),
        fast: bool = False,
    ) -> None:
        """`fast`: without the pauses that the trace has."""
        self.outcome = Outcome()
        self._client = client
        self._ignored = ignored
        self._fast = fast
        self._can_reset = False
        self._began = 0.0
        self._clock_ns = 0
        self._last_ns = 0

    def begin(self, header: TraceHeader) -> None:
        """Make sure of the device, and reset it where it can be. Raises HostError if it is another one."""
        self._can_reset = self._client.get_info().can_reset
        vendor = self._client.read(RegionIndex.CONFIG, uapi.PCI_VENDOR_ID, 2)
        device = self._client.read(RegionIndex.CONFIG, uapi.PCI_DEVICE_ID, 2)
        if (vendor, device) != (header.vendor, header.device_id):
            theirs = f"{header.vendor:04x}:{header.device_id:04x}"
            raise HostError(f"the trace is of {theirs}, the device here is {vendor:04x}:{device:04x}")
        self._reset()

    def run(self, entries: Iterable[Access | Mark]) -> Iterator[Difference]:
        """Go through a trace. Gives each difference as it is found."""
        for entry in entries:
            if isinstance(entry, Mark):
                if entry.kind is Kind.RESET:
                    self._reset()
                continue
            if entry.answer not in OF_THE_DEVICE:
                self.outcome.skipped[entry.answer] += 1
                continue
            self._keep_pace(entry)
            found = self._again(entry)
            self.outcome.sent += 1
            if not entry.write:
                self.outcome.compared += 1
            if (found.data, found.errno) == (b"" if entry.write else entry.data, entry.errno):
                continue
            if any(one.covers(entry) for one in self._ignored):
                self.outcome.ignored += 1
                continue
            self.outcome.different += 1
            yield found

    def _again(self, access: Access) -> Difference:
        data, errno = b"", 0
        try:
            if access.write:
                self._client.region_write(access.region, access.offset, access.data)
            else:
                data = self._client.region_read(access.region, access.offset, access.width)
        except ReplyError as error:
            errno = error.errno
        return Difference(access, data, errno)

    def _reset(self) -> None:
        if self._can_reset:
            self._client.reset()

    def _keep_pace(self, access: Access) -> None:
        """Wait until as much time has gone by as in the trace; long pauses are cut."""
        if self._fast:
            return
        if not self._last_ns:
            self._began = time.monotonic()
        else:
            self._clock_ns += max(0, min(access.time_ns - self._last_ns, LONGEST_PAUSE_NS))
        self._last_ns = access.time_ns
        ahead = self._began + self._clock_ns / 1e9 - time.monotonic()
        if ahead > 0:
            self._client.serve(ahead)
