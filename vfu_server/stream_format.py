"""The device state stream's bytes: header, section and end record, packed and unpacked (docs/design/stream-format.md).

Layouts only: order, sums and what is done with them are stream.py's. All integers are little-endian.
"""

import enum
import re
import struct
from dataclasses import dataclass
from typing import Final

from vfu_server.device import StateIdentity
from vfu_server.errors import PluginError, StreamMismatchError
from vfu_server.host_device import Identity

MAGIC: Final = b"VFUSTATE"
FORMAT_VERSION: Final = 1
MAX_CHUNK: Final = 1 << 20
"""Payload bytes of one record."""
MAX_SECTION: Final = 16 << 20
"""Payload bytes of one section, all of its records together. A plugin with more gives several sections."""
PADDING_TAG: Final = "padding"
FLAG_OPTIONAL: Final = 1
FLAG_PADDING: Final = 2

CRC: Final = struct.Struct("<I")
# magic, format version, bytes of the whole header, its CRC included
PREFIX: Final = struct.Struct("<8sHH")
# behind it: state version, features, vendor, device, subsystem vendor, subsystem, class code, revision, zero; strings
_IDENTITY: Final = struct.Struct("<IQHHHHIB3s")
_STRINGS: Final = ("plugin", "plugin version", "variant", "firmware of the state", "firmware of the device")
MIN_HEADER: Final = PREFIX.size + _IDENTITY.size + len(_STRINGS) + CRC.size
MAX_HEADER: Final = MIN_HEADER + len(_STRINGS) * 255

SECTION_MARK: Final = b"SECT"
END_MARK: Final = b"DONE"
# every record: mark, sequence number
RECORD: Final = struct.Struct("<4sI")
# a section record behind it: tag, version, flags, origin, zero, section length, chunk offset, chunk length
SECTION: Final = struct.Struct("<16sIBBHIII")
# the end record behind it: sections, zero, bytes of the stream before this record
END: Final = struct.Struct("<IIQ")


_TAG: Final = re.compile(rb"[\x21-\x7e]{1,16}")


class UnfitError(ValueError):
    """Bytes that no writer gives: what was expected, what was found."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected = expected
        self.found = found


class Origin(enum.IntEnum):
    """Whose section it is."""

    SERVER = 0
    """What the plugin cannot know: config space as the guest left it, pending interrupts."""
    PLUGIN = 1
    """The plugin's own."""


_ORIGINS: Final = frozenset(Origin)


@dataclass(frozen=True, slots=True)
class StreamHeader:
    """Who wrote the stream, for which device. `plugin` is the plugin's name, `plugin_version` is for people only."""

    plugin: str
    plugin_version: str
    state: StateIdentity
    device: Identity

    def check(self, plugin: str, device: Identity) -> None:
        """Raise StreamMismatchError if the stream is of another plugin or device; firmware is the plugin's to judge."""
        pairs = [("plugin", self.plugin, plugin)]
        pairs += [
            (name.replace("_", " "), f"{getattr(self.device, name):#x}", f"{getattr(device, name):#x}")
            for name in ("vendor", "device", "subsystem_vendor", "subsystem", "revision", "class_code")
        ]
        different = [f"{name} {theirs} (here: {mine})" for name, theirs, mine in pairs if theirs != mine]
        if different:
            raise StreamMismatchError(f"the state is of another device: {', '.join(different)}")


def pack_header(header: StreamHeader) -> bytes:
    """The header without its CRC. Raises PluginError for strings or numbers that do not fit."""
    state, device = header.state, header.device
    texts = (header.plugin, header.plugin_version, state.variant, state.firmware, device.firmware)
    strings = b"".join(_pack_string(name, text) for name, text in zip(_STRINGS, texts, strict=True))
    length = PREFIX.size + _IDENTITY.size + len(strings) + CRC.size
    try:
        identity = _IDENTITY.pack(
            state.state_version,
            state.features,
            device.vendor,
            device.device,
            device.subsystem_vendor,
            device.subsystem,
            device.class_code,
            device.revision,
            b"",
        )
    except struct.error as fault:
        raise PluginError(f"identity {state}, {device} does not fit into a state stream: {fault}") from None
    return PREFIX.pack(MAGIC, FORMAT_VERSION, length) + identity + strings


def header_length(data: bytes) -> int:
    """Bytes of the whole header, told by its first `PREFIX.size`. Raises UnfitError for what is no stream of ours."""
    magic, version, length = PREFIX.unpack(data)
    if magic != MAGIC:
        raise UnfitError(f"the magic {MAGIC!r}", repr(magic))
    if version != FORMAT_VERSION:
        raise UnfitError(f"format version {FORMAT_VERSION}", str(version))
    if not MIN_HEADER <= length <= MAX_HEADER:
        raise UnfitError(f"a header of {MIN_HEADER} to {MAX_HEADER} bytes", str(length))
    return int(length)


def unpack_header(data: bytes) -> StreamHeader:
    """The header from its bytes without the CRC. Raises UnfitError."""
    numbers = _IDENTITY.unpack_from(data, PREFIX.size)
    state_version, features, vendor, device, subsystem_vendor, subsystem, class_code, revision, zero = numbers
    if zero != bytes(3):
        raise UnfitError("zeros behind the revision", zero.hex())
    at = PREFIX.size + _IDENTITY.size
    texts = []
    for name in _STRINGS:
        if at >= len(data) or at + 1 + data[at] > len(data):
            raise UnfitError(f"the {name} inside the header", f"its end at {len(data)}")
        texts.append(_unpack_string(name, data[at + 1 : at + 1 + data[at]]))
        at += 1 + data[at]
    if at != len(data):
        raise UnfitError(f"the header's end at {at}", f"{len(data) - at} bytes more")
    plugin, plugin_version, variant, state_firmware, device_firmware = texts
    return StreamHeader(
        plugin,
        plugin_version,
        StateIdentity(variant, state_version, state_firmware, features),
        Identity(vendor, device, subsystem_vendor, subsystem, revision, class_code, device_firmware),
    )


def _pack_string(name: str, text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    if len(data) > 255 or not text.isprintable():
        raise PluginError(f"{name} {text!r} does not fit into a state stream: at most 255 bytes of printable text")
    return bytes([len(data)]) + data


def _unpack_string(name: str, data: bytes) -> str:
    text = data.decode("utf-8", "backslashreplace")
    if not text.isprintable() or text.encode() != data:
        raise UnfitError(f"printable UTF-8 as {name}", repr(data))
    return text


@dataclass(frozen=True, slots=True)
class SectionRecord:
    """The fields of one section record: `chunk` bytes of payload, from `offset` on, of a section of `length` bytes."""

    tag: str
    version: int
    flags: int
    origin: Origin
    length: int
    offset: int
    chunk: int

    @property
    def section(self) -> tuple[str, int, int, Origin, int]:
        """What is the same in all records of one section."""
        return self.tag, self.version, self.flags, self.origin, self.length

    @property
    def optional(self) -> bool:
        """A reader that does not know the section may skip it."""
        return bool(self.flags & FLAG_OPTIONAL)

    @property
    def padding(self) -> bool:
        """The section says nothing."""
        return bool(self.flags & FLAG_PADDING)

    def __str__(self) -> str:
        return f"{self.tag!r} (version {self.version}, {self.origin.name.lower()}'s)"


def pack_section(record: SectionRecord, sequence: int) -> bytes:
    """The record's fields without the CRC."""
    return RECORD.pack(SECTION_MARK, sequence) + SECTION.pack(
        record.tag.encode("ascii"),
        record.version,
        record.flags,
        record.origin,
        0,
        record.length,
        record.offset,
        record.chunk,
    )


def check_section(tag: str, version: int, length: int) -> None:
    """Raise PluginError for a section that cannot be written."""
    if not _is_tag(tag.encode("utf-8", "surrogatepass")):
        raise PluginError(f"section tag {tag!r} is not 1 to 16 printable ASCII characters without blanks")
    if not 0 <= version < 1 << 32:
        raise PluginError(f"section {tag!r}: version {version} does not fit into 32 bits")
    if length > MAX_SECTION:
        raise PluginError(f"section {tag!r} has {length} bytes, at most {MAX_SECTION} go into one: split it")


def unpack_section(data: bytes) -> SectionRecord:
    """The fields from `SECTION.size` bytes. Raises UnfitError."""
    padded, version, flags, origin, zero, length, offset, chunk = SECTION.unpack(data)
    tag = padded.rstrip(b"\0")
    if not _is_tag(tag):
        raise UnfitError("a tag of 1 to 16 printable ASCII characters", repr(padded))
    name = tag.decode("ascii")
    if flags & ~(FLAG_OPTIONAL | FLAG_PADDING) or zero or origin not in _ORIGINS:
        raise UnfitError(f"known flags and origin of section {name!r}", f"{flags:#x}, {origin}, {zero:#x}")
    if length > MAX_SECTION:
        raise UnfitError(f"at most {MAX_SECTION} bytes in section {name!r}", str(length))
    if chunk > min(MAX_CHUNK, length - offset) or (chunk == 0 and length):
        expected = f"1 to {MAX_CHUNK} bytes inside section {name!r} of {length}"
        raise UnfitError(expected, f"{chunk} from {offset} on")
    return SectionRecord(name, version, flags, Origin(origin), length, offset, chunk)


def _is_tag(tag: bytes) -> bool:
    return _TAG.fullmatch(tag) is not None


def pack_end(sequence: int, sections: int, length: int) -> bytes:
    """The end record without the CRC: `sections` are in the stream, in `length` bytes before this record."""
    return RECORD.pack(END_MARK, sequence) + END.pack(sections, 0, length)
