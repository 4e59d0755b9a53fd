"""The sections of this plugin's state: what is in them, byte by byte, and what makes them wrong.

Little-endian throughout. It must not touch a device; what the destination's own registers read is handed in.

`device` comes first: magic, layout, flags, number of saved registers, bytes of memory, number of identity records; then
the identity records. `registers`: a record for each saved register, in restore order. `memory`: the bytes, if carried.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from plugins.generic_dmaq.layout import Layout
from plugins.generic_dmaq.restore import State
from vfu_server.device import Section
from vfu_server.errors import StreamFormatError, StreamMismatchError
from vfu_server.regmap import Register

LAYOUT = 1
HEADER = struct.Struct("<4sHHIII")
MAGIC = b"DMAQ"
FLAG_MEMORY = 1
"""The memory is carried. Without it the source had no way to read it, and the destination must say so."""
RECORD = struct.Struct("<BBHIQ")
"""BAR, width, 0, offset, value: a register by its place, so that a changed table is noticed."""

TAG_DEVICE, TAG_REGISTERS, TAG_MEMORY = "device", "registers", "memory"


def encode(layout: Layout, identity: Mapping[str, int], state: State) -> list[Section]:
    """The sections of `state`, in order."""
    memory = state.memory or b""
    flags = FLAG_MEMORY if state.memory is not None else 0
    header = HEADER.pack(MAGIC, LAYOUT, flags, len(layout.saved), len(memory), len(identity))
    sections = [
        Section(TAG_DEVICE, 1, header + _records(layout, _registers(layout, identity), identity)),
        Section(TAG_REGISTERS, 1, _records(layout, layout.saved, state.values)),
    ]
    if flags & FLAG_MEMORY:
        sections.append(Section(TAG_MEMORY, 1, memory))
    return sections


def size(layout: Layout, memory: int) -> int:
    """Bytes of all payloads."""
    return HEADER.size + RECORD.size * (len(layout.profile.identity) + len(layout.saved)) + memory


@dataclass(slots=True)
class Loader:
    """Takes the sections of one load, each once and in order, and holds what they said."""

    layout: Layout
    memory_size: int
    carries_memory: bool = False
    values: dict[str, int] = field(default_factory=dict)
    memory: bytes | None = None
    _seen: list[str] = field(default_factory=list)

    def take(self, section: Section, mine: Mapping[str, int]) -> None:
        """Check and keep one section; `mine` are this device's identity registers.

        StreamFormatError: it is not what was agreed. StreamMismatchError: it is for another device.
        """
        take = {TAG_DEVICE: self._device, TAG_REGISTERS: self._saved, TAG_MEMORY: self._memory}.get(section.tag)
        if take is None or section.version != 1:
            if section.optional:
                return
            raise StreamFormatError(f"unknown section {section.tag!r} version {section.version}")
        if section.tag in self._seen:
            raise StreamFormatError(f"section {section.tag!r} came twice")
        if section.tag != TAG_DEVICE and TAG_DEVICE not in self._seen:
            raise StreamFormatError(f"section {section.tag!r} came before {TAG_DEVICE!r}")
        take(section.payload, mine)
        self._seen.append(section.tag)

    def state(self) -> State:
        """All of it. StreamFormatError if something is missing."""
        wanted = [TAG_DEVICE, TAG_REGISTERS, *([TAG_MEMORY] if self.carries_memory else [])]
        missing = [tag for tag in wanted if tag not in self._seen]
        if missing:
            raise StreamFormatError(f"the state ends without {', '.join(missing)}")
        return State(self.values, self.memory)

    def _device(self, payload: bytes, mine: Mapping[str, int]) -> None:
        if len(payload) < HEADER.size:
            raise StreamFormatError(f"the header has {len(payload)} bytes, less than {HEADER.size}")
        magic, layout, flags, registers, memory, identity = HEADER.unpack_from(payload)
        if magic != MAGIC:
            raise StreamFormatError(f"the header begins with {magic!r}, not {MAGIC!r}")
        if layout != LAYOUT or flags & ~FLAG_MEMORY:
            raise StreamFormatError(
                f"the state has layout {layout} and flags {flags:#x}; known are {LAYOUT} and 0 or 1"
            )
        if registers != len(self.layout.saved):
            raise StreamMismatchError(f"{registers} registers were saved, this device has {len(self.layout.saved)}")
        self.carries_memory = bool(flags & FLAG_MEMORY)
        if memory != (self.memory_size if self.carries_memory else 0):
            raise StreamMismatchError(f"{memory} bytes of memory were saved, this device has {self.memory_size}")
        if identity != len(self.layout.profile.identity):
            raise StreamMismatchError(
                f"{identity} identity registers were saved, not {len(self.layout.profile.identity)}"
            )
        wanted = _registers(self.layout, self.layout.profile.identity)
        for name, value in self._parse(payload[HEADER.size :], wanted).items():
            if value != mine[name]:
                raise StreamMismatchError(
                    f"{name} is {mine[name]:#x} here and was {value:#x} where the state was saved"
                )

    def _saved(self, payload: bytes, mine: Mapping[str, int]) -> None:
        self.values = self._parse(payload, self.layout.saved)

    def _memory(self, payload: bytes, mine: Mapping[str, int]) -> None:
        if not self.carries_memory:
            raise StreamFormatError("there is a memory section, but the header says that there is none")
        if len(payload) != self.memory_size:
            raise StreamFormatError(f"the memory section has {len(payload)} bytes, not {self.memory_size}")
        self.memory = payload

    def _parse(self, payload: bytes, wanted: Sequence[Register]) -> dict[str, int]:
        if len(payload) != RECORD.size * len(wanted):
            raise StreamFormatError(f"{len(payload)} bytes of registers, not {RECORD.size} for each of {len(wanted)}")
        found = {}
        for register, record in zip(wanted, RECORD.iter_unpack(payload), strict=True):
            bar, width, zero, offset, value = record
            place = (self.layout.bar_of[register.name], register.width, 0, register.offset)
            if (bar, width, zero, offset) != place:
                raise StreamFormatError(f"a register of BAR{bar} at {offset:#x} stands where {register.name} should")
            if value & ~register.mask:
                raise StreamFormatError(f"{register.name}: {value:#x} does not fit {register.width} bytes")
            found[register.name] = value
        return found


def _registers(layout: Layout, names: Mapping[str, int] | Sequence[str]) -> list[Register]:
    return [layout.blocks[layout.bar_of[name]][name] for name in names]


def _records(layout: Layout, registers: Sequence[Register], values: Mapping[str, int]) -> bytes:
    return b"".join(RECORD.pack(layout.bar_of[r.name], r.width, 0, r.offset, values[r.name]) for r in registers)
