"""CRC32C in plain Python: for tools without the native extension, and the reference that C's is tested against.

Far too slow for the server's own streams; those use the extension's.
"""

from typing import Final

_POLYNOMIAL: Final = 0x82F63B78
"""Castagnoli's polynomial, bits reversed (RFC 3720, B.4)."""


def _table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE: Final = _table()


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """Continue `value` (0 to begin, or an earlier result) over `data`."""
    table = _TABLE
    value ^= 0xFFFFFFFF
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF
