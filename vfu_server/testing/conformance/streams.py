"""Saved states taken apart and put together again, so that every sum is right: what a hostile source can do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vfu_server.device import Section
from vfu_server.errors import VfuServerError
from vfu_server.libvfio_user.native import crc32c
from vfu_server.stream import Origin, StreamHeader, StreamReader, StreamSection, StreamWriter
from vfu_server.testing.client import Client
from vfu_server.testing.conformance.records import Failed
from vfu_server.testing.migrate import CHUNK, load
from vfu_server.testing.wire import ReplyError
from vfu_server.uapi import MigState


@dataclass(frozen=True, slots=True)
class Parts:
    """A stream's header and sections, padding left out."""

    header: StreamHeader
    sections: tuple[StreamSection, ...]

    @classmethod
    def of(cls, stream: bytes) -> "Parts":
        """Raises Failed if the server's own reader does not take it."""
        reader = StreamReader(crc32c)
        try:
            items = reader.push(stream)
            reader.finish()
        except VfuServerError as error:
            raise Failed(f"what was saved is no sound stream: {error}") from error
        headers = [item for item in items if isinstance(item, StreamHeader)]
        return cls(headers[0], tuple(item for item in items if isinstance(item, StreamSection)))

    def without(self, tags: frozenset[str]) -> "Parts":
        """Without the plugin's sections of these tags."""
        kept = [item for item in self.sections if item.origin is Origin.SERVER or item.section.tag not in tags]
        return replace(self, sections=tuple(kept))

    @property
    def own(self) -> list[int]:
        """Where the plugin's sections are in `sections`."""
        return [at for at, item in enumerate(self.sections) if item.origin is Origin.PLUGIN]

    def stream(self) -> bytes:
        """The bytes, all sums right."""
        writer = StreamWriter(self.header, crc32c)
        pieces = [writer.begin()]
        for item in self.sections:
            pieces += [bytes(piece) for piece in writer.section(item.section, item.origin)]
        return b"".join([*pieces, writer.end()])

    def put(self, at: int, *sections: Section) -> "Parts":
        """With the section at `at` replaced by these."""
        made = [StreamSection(Origin.PLUGIN, section) for section in sections]
        return replace(self, sections=(*self.sections[:at], *made, *self.sections[at + 1 :]))


def difference(before: Parts, after: Parts) -> str:
    """The first that two states differ in, for people."""
    if before.header != after.header:
        return "the headers differ"
    for one, other in zip(before.sections, after.sections, strict=False):
        if one != other:
            a, b = one.section, other.section
            if (a.tag, a.version, len(a.payload)) != (b.tag, b.version, len(b.payload)):
                return f"section {a.tag!r} of {len(a.payload)} bytes came as {b.tag!r} of {len(b.payload)}"
            at = next(n for n, (x, y) in enumerate(zip(a.payload, b.payload, strict=True)) if x != y)
            return f"section {a.tag!r} differs from byte {at} on: {a.payload[at]:#04x} and {b.payload[at]:#04x}"
    if len(before.sections) != len(after.sections):
        return f"{len(before.sections)} sections and {len(after.sections)}"
    return ""


def try_load(client: Client, stream: bytes) -> bool:
    """Whether a device takes `stream`, from RESUMING to STOP; it is in RESUMING if not."""
    client.set_mig_state(MigState.RESUMING)
    try:
        load(client, pieces(stream))
        client.set_mig_state(MigState.STOP)
    except ReplyError:
        return False
    return True


def pieces(stream: bytes) -> Sequence[bytes]:
    """As a client gives it."""
    return [stream[at : at + CHUNK] for at in range(0, len(stream), CHUNK)]
