"""A section of this plugin's in words, without a device: for people who look into a stream.

Names come from the shipped profile that the state names; a register that it does not have is shown by its place.
"""

from collections.abc import Iterator, Mapping

from plugins.generic_dmaq.layout import layout_of
from plugins.generic_dmaq.probe import profiles
from plugins.generic_dmaq.sections import (
    FLAG_MEMORY,
    HEADER,
    LAYOUT,
    MAGIC,
    RECORD,
    TAG_DEVICE,
    TAG_MEMORY,
    TAG_REGISTERS,
)
from vfu_server.device import Section
from vfu_server.errors import StreamFormatError
from vfu_server.regmap import Block


def decode(variant: str, section: Section) -> Iterator[str]:
    """Lines for one section. Raises StreamFormatError for what no version of this plugin has written."""
    if section.version != 1 or section.tag not in (TAG_DEVICE, TAG_REGISTERS, TAG_MEMORY):
        raise StreamFormatError(f"unknown section {section.tag!r} version {section.version}")
    if section.tag == TAG_DEVICE:
        return _device(variant, section.payload)
    if section.tag == TAG_REGISTERS:
        return _registers(variant, section.payload)
    return iter((f"{len(section.payload)} bytes of the device's memory",))


def _device(variant: str, payload: bytes) -> Iterator[str]:
    if len(payload) < HEADER.size:
        raise StreamFormatError(f"the header has {len(payload)} bytes, less than {HEADER.size}")
    magic, layout, flags, registers, memory, identity = HEADER.unpack_from(payload)
    if (magic, layout) != (MAGIC, LAYOUT):
        raise StreamFormatError(f"the header begins with {magic!r}, layout {layout}; known are {MAGIC!r}, {LAYOUT}")
    carried = f"{memory} bytes of memory" if flags & FLAG_MEMORY else "no memory"
    yield f"profile {variant}: {registers} registers, {carried}, {identity} identity registers"
    yield from _registers(variant, payload[HEADER.size :])


def _registers(variant: str, payload: bytes) -> Iterator[str]:
    if len(payload) % RECORD.size:
        raise StreamFormatError(f"{len(payload)} bytes of registers are not records of {RECORD.size}")
    blocks = _blocks(variant)
    for bar, width, _zero, offset, value in RECORD.iter_unpack(payload):
        register = blocks[bar].at(offset) if bar in blocks else None
        if register is not None and (register.offset, register.width) == (offset, width):
            yield f"BAR{bar} {offset:#x} {register.decode(value)}"
        else:
            yield f"BAR{bar} {offset:#x} ({width} bytes) {value:#x}"


def _blocks(variant: str) -> Mapping[int, Block]:
    """The registers of the shipped profile of that name, by BAR."""
    for profile in profiles({}):
        if profile.name == variant:
            return layout_of(profile, {}).blocks
    return {}
