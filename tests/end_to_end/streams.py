"""Streams taken apart, and put together again with right sums: what a forger could send. Knows no server."""

import dataclasses
from collections.abc import Callable, Sequence

from vfu_server.libvfio_user.native import crc32c
from vfu_server.stream import StreamHeader, StreamReader, StreamSection, StreamWriter


@dataclasses.dataclass(frozen=True)
class Parts:
    """A sound stream's header and sections, in order."""

    header: StreamHeader
    sections: tuple[StreamSection, ...]

    @property
    def tags(self) -> list[str]:
        return [part.section.tag for part in self.sections]

    def data(self) -> bytes:
        """The stream, all sums right."""
        writer = StreamWriter(self.header, crc32c)
        buffers = [writer.begin()]
        for part in self.sections:
            buffers += [bytes(buffer) for buffer in writer.section(part.section, part.origin)]
        return b"".join([*buffers, writer.end()])

    def with_header(self, **changes: object) -> "Parts":
        """`state` and `device` take their own fields, as `state_version` and `vendor`."""
        inner = {"state": {}, "device": {}}
        plain = {}
        for name, value in changes.items():
            fields = [key for key in inner if name in {f.name for f in dataclasses.fields(getattr(self.header, key))}]
            (inner[fields[0]] if fields else plain)[name] = value
        records = {key: dataclasses.replace(getattr(self.header, key), **some) for key, some in inner.items()}
        return dataclasses.replace(self, header=dataclasses.replace(self.header, **plain, **records))

    def with_sections(self, order: Sequence[int]) -> "Parts":
        return dataclasses.replace(self, sections=tuple(self.sections[n] for n in order))

    def with_section(self, which: str, change: Callable[[bytes], bytes], **fields: object) -> "Parts":
        """One section's payload changed, and its other fields if told."""
        changed = [
            dataclasses.replace(
                part,
                section=dataclasses.replace(part.section, payload=change(part.section.payload), **fields),
            )
            if part.section.tag == which
            else part
            for part in self.sections
        ]
        return dataclasses.replace(self, sections=tuple(changed))


def parts_of(data: bytes) -> Parts:
    reader = StreamReader(crc32c, known=lambda *_: True)
    items = list(reader.push(data))
    reader.finish()
    return Parts(items[0], tuple(item for item in items if isinstance(item, StreamSection)))


def records_of(data: bytes) -> list[tuple[int, int]]:
    """(first byte, first byte behind) of the header and of each record, the end record too."""
    places = [(0, int.from_bytes(data[10:12], "little"))]
    while places[-1][1] < len(data):
        at = places[-1][1]
        if data[at : at + 4] == b"DONE":
            places.append((at, at + 28))
        else:
            chunk = int.from_bytes(data[at + 40 : at + 44], "little")
            places.append((at, at + 48 + chunk + 4))
    assert places[-1][1] == len(data)
    return places
