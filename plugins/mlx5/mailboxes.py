"""Command entries and mailbox chains as bytes in memory: lengths, tokens and signatures.

Layouts are `contexts`'; it rings no doorbell and knows no command.
"""

from collections.abc import Iterator
from typing import Final

from plugins.mlx5.contexts import COMMAND_ENTRY, MAILBOX
from vfu_server.errors import HostError

INLINE: Final = 16
"""Bytes of a message, either way, that lie in the entry itself."""
BLOCK: Final = 512
STRIDE: Final = 1024
"""Mailboxes lie that far apart, as in Linux; they need no other alignment."""
PCI_COMMAND_TYPE: Final = 7
OWNER: Final = 0x3F
"""The entry's byte whose bit 0 is the device's, the rest delivery status."""


def blocks_for(length: int) -> int:
    """Mailboxes that a message of `length` bytes needs."""
    return -(-max(0, length - INLINE) // BLOCK)


def xor8(data: bytes | bytearray | memoryview) -> int:
    """The xor of all bytes."""
    found = 0
    for byte in bytes(data):
        found ^= byte
    return found


def entry(message: bytes, output_length: int, token: int, input_box: int, output_box: int) -> bytes:
    """A signed entry that is the device's: `input_box` and `output_box` are IOVAs, 0 where none is needed."""
    data = COMMAND_ENTRY.encode(
        {
            "type": PCI_COMMAND_TYPE,
            "input_length": len(message),
            "input_mailbox": input_box,
            "output_mailbox": output_box,
            "output_length": output_length,
            "token": token,
            "owner": 1,
        }
    )
    inline = message[:INLINE]
    data[0x10 : 0x10 + len(inline)] = inline
    COMMAND_ENTRY["signature"].put(data, ~xor8(data) & 0xFF)
    return bytes(data)


class Chain:
    """`count` mailboxes in `memory`, which the device sees from `iova` on."""

    def __init__(self, memory: memoryview, iova: int) -> None:
        self._memory = memory
        self.iova = iova
        self.count = len(memory) // STRIDE

    def fill(self, message: bytes, token: int, *, signed: bool = False) -> None:
        """Put the part of `message` that is not inline; the block behind the last one used is not linked."""
        self._put(message[INLINE:], blocks_for(len(message)), token, signed=signed)

    def clear(self, length: int, token: int, *, signed: bool = False) -> None:
        """Make room for an answer of `length` bytes."""
        self._put(b"", blocks_for(length), token, signed=signed)

    def take(self, inline: bytes, length: int) -> bytes:
        """The answer of `length` bytes, of which `inline` is the beginning."""
        parts = [inline[: min(length, INLINE)]]
        for number in range(blocks_for(length)):
            parts.append(bytes(self._memory[number * STRIDE : number * STRIDE + BLOCK]))
        return b"".join(parts)[:length]

    def _put(self, data: bytes, used: int, token: int, *, signed: bool) -> None:
        if used > self.count:
            raise HostError(f"{used} mailboxes are needed, {self.count} are there")
        for number, box in enumerate(self._boxes(used)):
            piece = data[number * BLOCK : (number + 1) * BLOCK]
            following = self.iova + (number + 1) * STRIDE if number + 1 < used else 0
            built = MAILBOX.encode({"next": following, "block_number": number, "token": token})
            built[: len(piece)] = piece
            if signed:
                MAILBOX["control_signature"].put(built, ~xor8(built[0x200:0x23E]) & 0xFF)
                MAILBOX["signature"].put(built, ~xor8(built[:0x23F]) & 0xFF)
            box[: len(built)] = built

    def _boxes(self, used: int) -> Iterator[memoryview]:
        return (self._memory[number * STRIDE : (number + 1) * STRIDE] for number in range(used))
