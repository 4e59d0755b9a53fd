"""A section of a saved state in lines for people.

There is no device, and the bytes are a stranger's.
"""

from collections.abc import Iterator

from plugins.mlx5.identity import BARE_VARIANT
from plugins.mlx5.records import HEADER, NAMES, TAG_STOP_COPY_SIZE
from vfu_server.device import Section


def decode(variant: str, section: Section) -> Iterator[str]:
    """What is known of it: sections are cut anywhere, so a record shows where one begins with the section."""
    data = section.payload
    if variant == BARE_VARIANT:
        yield f"{len(data)} bytes of the firmware's image"
        return
    if len(data) >= HEADER.size:
        size, flags, tag = HEADER.unpack_from(data)
        if tag in NAMES and flags <= 1 and size < 1 << 32:
            yield f"record: {NAMES[tag]}, {size} bytes, {len(data) - HEADER.size} of them here"
            if tag == TAG_STOP_COPY_SIZE and len(data) >= HEADER.size + 8:
                yield f"kept for stop-copy: {int.from_bytes(data[HEADER.size : HEADER.size + 8], 'little')} bytes"
            return
    yield f"{len(data)} bytes of a record"
