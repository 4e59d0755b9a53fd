"""The other end of the link (`Station`): numbered frames that come to it go back turned over.

Shared by the model and by tests that have a real wire. Must not know who carries the frames.
"""

PROTOCOL = 0x88B5
"""For experiments in one place (IEEE 802)."""
ADDRESSES, HEADER = 12, 14
SHORTEST = 60
TURNED = bytes(0xFF - byte for byte in range(256))


def frame_of(destination: bytes, source: bytes, body: bytes) -> bytes:
    """A frame of PROTOCOL, as long as one must be."""
    return (destination + source + PROTOCOL.to_bytes(2, "big") + body).ljust(SHORTEST, b"\0")


class Station:
    """Answers frames of PROTOCOL, from the address `own`."""

    def __init__(self, own: bytes = bytes.fromhex("020000000001")) -> None:
        self.own = own
        self.seen: dict[int, int] = {}
        """Number of a frame, its first 8 bytes -> how often it came."""

    def hears(self, frame: bytes) -> list[bytes]:
        """What it sends when it gets `frame`."""
        if frame[ADDRESSES:HEADER] != PROTOCOL.to_bytes(2, "big") or len(frame) < HEADER + 8:
            return []
        number = int.from_bytes(frame[HEADER : HEADER + 8], "big")
        self.seen[number] = self.seen.get(number, 0) + 1
        return [frame[6:ADDRESSES] + self.own + frame[ADDRESSES:HEADER] + frame[HEADER:].translate(TURNED)]
