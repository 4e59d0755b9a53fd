"""A trace for people and programs: a line for each access, register names where a plugin's tables have them.

It must not know where a trace comes from. Texts of the file are shown without control characters.
"""

import errno as errnos
import time
from collections.abc import Iterator, Mapping

from vfu_server.logs import plain
from vfu_server.region import region_name
from vfu_server.regmap import Block
from vfu_server.trace_format import Access, Kind, Mark, TraceHeader

SHOWN_BYTES = 32
"""Of an access that is no register's: so many bytes are shown."""

MARKS = {Kind.CLIENT: "a client has negotiated", Kind.RESET: "the device was reset"}


class Printer:
    """Shows entries of one trace. `blocks`: the register tables by region index; none is fine."""

    def __init__(self, header: TraceHeader, blocks: Mapping[int, Block]) -> None:
        self._header = header
        self._blocks = blocks

    def title(self) -> str:
        """What was traced."""
        h = self._header
        who = plain(f"{h.device} ({h.vendor:04x}:{h.device_id:04x}), plugin {h.plugin} ({h.variant})")
        return f"{who}, vfu-server {plain(h.server)}, from {self._clock(h.monotonic_ns)}"

    def line(self, entry: Access | Mark) -> str:
        """One line."""
        if isinstance(entry, Mark):
            return f"{self._clock(entry.time_ns)} -- {mark_text(entry)}"
        way = "w" if entry.write else "r"
        answer = f"{entry.answer.name.lower()}/{entry.state_class.name.lower()}"
        fault = f" {errno_name(entry.errno)}" if entry.errno else ""
        names = self.decode(entry)
        shown = f"{self._clock(entry.time_ns)} {way} {place(entry):<14} {entry.width} {number(entry):<18} {answer}"
        return f"{shown} {entry.took_ns / 1e3:.1f}us{fault}{'  ' if names else ''}{names}"

    def record(self, entry: Access | Mark) -> dict[str, object]:
        """The same as an object for programs."""
        if isinstance(entry, Mark):
            told: dict[str, object] = {"time": self._clock(entry.time_ns), "mark": entry.kind.name.lower()}
            return told | ({"count": entry.count} if entry.kind is Kind.LOST else {})
        return {
            "number": entry.number,
            "time": self._clock(entry.time_ns),
            "took_ns": entry.took_ns,
            "direction": "write" if entry.write else "read",
            "region": entry.region,
            "offset": entry.offset,
            "width": entry.width,
            "data": entry.data.hex(),
            "answer": entry.answer.name.lower(),
            "class": entry.state_class.name.lower(),
            "errno": errno_name(entry.errno) if entry.errno else "",
            "registers": self.decode(entry),
        }

    def decode(self, access: Access) -> str:
        """The registers that the access touches, with their fields; empty where no table has them."""
        block = self._blocks.get(access.region)
        if block is None or not access.data:
            return ""
        return "; ".join(plain(text) for text in _decoded(block, access))

    def _clock(self, monotonic_ns: int) -> str:
        """UTC, to the microsecond."""
        wall = self._header.wall_ns + monotonic_ns - self._header.monotonic_ns
        seconds, rest = divmod(wall, 1_000_000_000)
        try:
            return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1000:06}Z"
        except (OverflowError, ValueError, OSError):  # of a file that tells nonsense
            return f"{wall}ns"


def _decoded(block: Block, access: Access) -> Iterator[str]:
    at = 0
    while at < len(access.data):
        register = block.at(access.offset + at)
        width = 1
        if register is not None:
            left = register.end - (access.offset + at)
            width = min(left, len(access.data) - at)
            value = int.from_bytes(access.data[at : at + width], "little")
            if width == register.width:
                yield register.decode(value)
            else:
                yield f"{register.name}+{register.width - left} {value:#x}"
        at += width


def place(access: Access) -> str:
    """`BAR0+0x10`."""
    return f"{region_name(access.region)}+{access.offset:#x}"


def number(access: Access) -> str:
    """The value of a register's access, else the first bytes; `-` for a read that failed."""
    if not access.data:
        return "-"
    if access.width in (1, 2, 4, 8):
        return f"{access.value:#0{2 + 2 * access.width}x}"
    cut = "…" if len(access.data) > SHOWN_BYTES else ""
    return f"{access.data[:SHOWN_BYTES].hex()}{cut}"


def errno_name(number: int) -> str:
    """`EINVAL`, or the number where there is no name."""
    return errnos.errorcode.get(number, str(number))


def mark_text(mark: Mark) -> str:
    """What happened between two accesses."""
    return MARKS.get(mark.kind) or f"{mark.count} accesses were lost here"
