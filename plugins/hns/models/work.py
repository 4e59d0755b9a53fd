"""The work itself: what one submission entry of ZIP, SEC2 or HPRE asks for, done on the guest's memory.

ZIP entries are Linux 7.2.8's struct hisi_zip_sqe and hisi_acc_sgl_hw (drivers/crypto/hisilicon): deflate and inflate of
raw streams, flat or scattered. (model) Request type 0xff copies, for every kind; SEC2 and HPRE know nothing else. It
must not know queues, or who is told of the end.
"""

import struct
import zlib
from dataclasses import dataclass

from vfu_server.model import Bus, BusError, Faults

GOOD, UNKNOWN, BAD_DATA, NO_ROOM, DMA_FAILED = 0x00, 0x01, 0x0C, 0x0E, 0x0F
"""Statuses (model), but for good: hardware has more."""
LONGER = 0x0D
"""The result is longer than the input; the driver counts it as good."""

DEFLATE, COPY = 1, 0xFF
MOST_BYTES = 8 << 20
"""Bytes of an entry's input and of its room, at most; more is cut to that (model)."""
_SGL_HEADER, _SGL_ENTRY, _MOST_SGL = 64, 32, 255
ENTRY_SIZE = {"zip": 128, "sec": 128, "hpre": 64}
"""Bytes of a submission entry, by kind."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is written back into the entry: dwords 0, 1, 2 and the status byte of dword 3."""

    status: int
    consumed: int = 0
    produced: int = 0
    third: int = 0


class _RoomError(Exception):
    """The result does not fit."""


def run(kind: str, entry: bytes, algorithm: int, bus: Bus, faults: Faults) -> bytes:
    """Do what `entry` asks; returns it with its outputs filled in."""
    words = list(struct.unpack(f"<{len(entry) // 4}I", entry))
    try:
        outcome = _zip(words, algorithm, bus, faults) if kind == "zip" else _plain(words, bus, faults)
    except BusError:
        outcome = Outcome(DMA_FAILED)
    except _RoomError:
        outcome = Outcome(NO_ROOM)
    except zlib.error:
        outcome = Outcome(BAD_DATA)
    words[0], words[1], words[2] = outcome.consumed, outcome.produced, outcome.third
    words[3] = words[3] & ~0xFF | outcome.status
    return struct.pack(f"<{len(words)}I", *words)


def _zip(words: list[int], algorithm: int, bus: Bus, faults: Faults) -> Outcome:
    request, scattered = words[9] & 0xFF, words[9] >> 8 & 0xF
    length, room = min(words[4], MOST_BYTES), min(words[14], MOST_BYTES)
    source, destination = words[18] | words[19] << 32, words[20] | words[21] << 32
    if request == COPY:
        bus.dma_write(destination, _damaged(bus.dma_read(source, length), faults))
        return Outcome(GOOD, length, length)
    if request != DEFLATE or words[7] >> 28 != 3 or scattered > 1 or algorithm > 1:
        return Outcome(UNKNOWN)
    data = _gather(bus, source, words[7] & 0xFFFFFF, length) if scattered else bus.dma_read(source, length)
    if algorithm == 0:
        packer = zlib.compressobj(wbits=-15)
        result, consumed = packer.compress(data) + packer.flush(), length
    else:
        unpacker = zlib.decompressobj(wbits=-15)
        result = unpacker.decompress(data, room + 1)
        consumed = length - len(unpacker.unused_data)
    if len(result) > room:
        raise _RoomError
    result = _damaged(result, faults)
    if scattered:
        _scatter(bus, destination, words[8] & 0xFFFFFF, result)
    else:
        bus.dma_write(destination, result)
    status = LONGER if algorithm == 0 and len(result) > length else GOOD
    return Outcome(status, consumed, len(result), len(result) if algorithm == 0 else consumed)


def _plain(words: list[int], bus: Bus, faults: Faults) -> Outcome:
    """SEC2 and HPRE (model): dword 4 bytes from 10, 11 to 12, 13; dword 2 gets their CRC-32."""
    if words[9] & 0xFF != COPY:
        return Outcome(UNKNOWN)
    length = min(words[4], MOST_BYTES)
    data = _damaged(bus.dma_read(words[10] | words[11] << 32, length), faults)
    bus.dma_write(words[12] | words[13] << 32, data)
    return Outcome(GOOD, length, length, zlib.crc32(data))


def _damaged(data: bytes, faults: Faults) -> bytes:
    if data and faults.take("bit-flip"):
        return data[:-1] + bytes([data[-1] ^ 1])
    return data


def _pieces(bus: Bus, at: int, offset: int) -> list[tuple[int, int]]:
    """`(iova, length)` of a scatter list's parts behind its first `offset` bytes."""
    used = int.from_bytes(bus.dma_read(at, _SGL_HEADER)[10:12], "little")
    if not 1 <= used <= _MOST_SGL:
        raise BusError(f"a scatter list of {used} entries")
    table = bus.dma_read(at + _SGL_HEADER, used * _SGL_ENTRY)
    found = []
    for start in range(0, len(table), _SGL_ENTRY):
        iova, _, length = struct.unpack_from("<QQI", table, start)
        skipped = min(offset, length)
        offset -= skipped
        if length > skipped:
            found.append((iova + skipped, length - skipped))
    return found


def _gather(bus: Bus, at: int, offset: int, length: int) -> bytes:
    data = bytearray()
    for iova, size in _pieces(bus, at, offset):
        data += bus.dma_read(iova, min(size, length - len(data)))
        if len(data) == length:
            return bytes(data)
    raise BusError(f"a scatter list shorter than {length} bytes")


def _scatter(bus: Bus, at: int, offset: int, data: bytes) -> None:
    done = 0
    for iova, size in _pieces(bus, at, offset):
        part = data[done : done + size]
        if part:
            bus.dma_write(iova, part)
        done += len(part)
    if done < len(data):
        raise _RoomError
