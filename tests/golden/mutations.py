"""Damage: what can become of a stream on its way, and what a forger who can compute sums can make of it.

Deterministic for a seed. It must not know any plugin.
"""

import dataclasses
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.end_to_end.streams import Parts, parts_of, records_of
from vfu_server.errors import PluginError
from vfu_server.libvfio_user.native import crc32c
from vfu_server.stream import Origin

WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)


@dataclass(frozen=True, slots=True)
class Damaged:
    """A stream that is not the golden one. `sound`: every sum in it fits."""

    what: str
    data: bytes
    sound: bool


def damaged(seed: int, count: int, stream: bytes, others: Sequence[bytes]) -> Iterator[Damaged]:
    """`count` different ones; `others` are streams to take pieces from."""
    chance = random.Random(seed)
    seen = {stream, *others}
    parts, strange = parts_of(stream), [parts_of(other) for other in others]
    while len(seen) - len(others) <= count:
        how = chance.choice(ON_THE_WAY + FORGED)
        try:
            data = how(chance, stream, chance.choice(others)) if how in ON_THE_WAY else how(chance, parts, strange)
        except PluginError:
            continue  # not even a forger can write that with our writer
        if data not in seen:
            seen.add(data)
            yield Damaged(how.__name__, data, how in FORGED)


# --- on the way: sums do not fit


def bits(chance: random.Random, stream: bytes, other: bytes) -> bytes:
    found = bytearray(stream)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
    return bytes(found)


def some_bytes(chance: random.Random, stream: bytes, other: bytes) -> bytes:
    at, size = chance.randrange(len(stream)), chance.choice((1, 1, 2, 4, 8, 60))
    return stream[:at] + chance.randbytes(size) + stream[at + size :]


def cut_short(chance: random.Random, stream: bytes, other: bytes) -> bytes:
    ends = [end for _, end in records_of(stream)][:-1]
    return stream[: chance.choice((chance.randrange(len(stream)), chance.choice(ends)))]


def piece_lost(chance: random.Random, stream: bytes, other: bytes) -> bytes:
    start, end = span(chance, stream)
    return stream[:start] + stream[end:]


def piece_doubled(chance: random.Random, stream: bytes, other: bytes) -> bytes:
    start, end = span(chance, stream)
    return stream[:end] + stream[start:end] + stream[end:]


def pieces_swapped(chance: random.Random, stream: bytes, other: bytes) -> bytes:
    a, b, c = sorted(chance.sample(range(len(stream) + 1), 3))
    return stream[:a] + stream[b:c] + stream[a:b] + stream[c:]


def spliced(chance: random.Random, stream: bytes, other: bytes) -> bytes:
    """A piece of another stream, in place of one of ours or in between."""
    start, end = span(chance, stream)
    first, last = span(chance, other)
    return stream[:start] + other[first:last] + stream[chance.choice((start, end)) :]


def continued_by_another(chance: random.Random, stream: bytes, other: bytes) -> bytes:
    return stream[: span(chance, stream)[0]] + other[span(chance, other)[0] :]


def longer(chance: random.Random, stream: bytes, other: bytes) -> bytes:
    return stream + chance.choice((b"\0", other, stream, chance.randbytes(chance.randrange(1, 100))))


def span(chance: random.Random, stream: bytes) -> tuple[int, int]:
    """From byte to byte: any, or a whole record."""
    if chance.random() < 0.4:
        return chance.choice(records_of(stream))
    start = chance.randrange(len(stream))
    return start, min(len(stream), start + chance.choice((1, 4, 48, 52, 1000)))


# --- forged: all sums fit


def summed_again(chance: random.Random, parts: Parts, strange: Sequence[Parts]) -> bytes:
    """Any bytes but sums, the fields of records among them, with the sums that then belong there."""
    data = bytearray(parts.data())
    places, sums = records_of(bytes(data)), sums_of(bytes(data))
    for _ in range(chance.choice((1, 1, 2, 4))):
        start, end = chance.choice(places)
        at = chance.randrange(start, min(end, start + chance.choice((48, 1 << 20))))
        if not any(place <= at < place + 4 for place in sums):
            data[at] = chance.choice((data[at] ^ 1 << chance.randrange(8), chance.randrange(256), 0, 0xFF))
    return sum_up(data, sums)


def sums_of(data: bytes) -> list[int]:
    """Where the sums stand, by the documented lengths."""
    places = []
    for start, end in records_of(data):
        places += [start + 44, end - 4] if data[start : start + 4] == b"SECT" else [end - 4]
    return places


def sum_up(data: bytearray, sums: Sequence[int]) -> bytes:
    """Write the sums anew."""
    crc, at = 0, 0
    for place in sums:
        crc = crc32c(data[at:place], crc)
        struct.pack_into("<I", data, place, crc)
        at = place + 4
    return bytes(data)


def other_payload(chance: random.Random, parts: Parts, strange: Sequence[Parts]) -> bytes:
    """What a section says: a bit, a byte, a number of 16, 32 or 64 bits, or its length."""
    which = chance.randrange(len(parts.sections))
    payload = bytearray(parts.sections[which].section.payload)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at = chance.randrange(len(payload) + 1)
        match chance.randrange(6):
            case 0:
                del payload[at : at + chance.choice((1, 8, 16, 4096))]
            case 1:
                payload[at:at] = chance.randbytes(chance.choice((1, 8, 16, 4096)))
            case 2 if at < len(payload):
                payload[at] ^= 1 << chance.randrange(8)
            case 3 if at < len(payload):
                payload[at] = chance.randrange(256)
            case _:
                size = chance.choice((2, 4, 8))
                at = at // size * size
                payload[at : at + size] = (chance.choice(WORDS) & (1 << 8 * size) - 1).to_bytes(size, "little")
    return replaced(parts, which, payload=bytes(payload))


def other_section(chance: random.Random, parts: Parts, strange: Sequence[Parts]) -> bytes:
    """A section's tag, version, origin, or whether it may be skipped."""
    which = chance.randrange(len(parts.sections))
    section = parts.sections[which].section
    match chance.randrange(4):
        case 0:
            tag = chance.choice((section.tag[:-1], section.tag + "2", "config", "padding", "memory", "kernel"))
            return replaced(parts, which, tag=tag)
        case 1:
            return replaced(parts, which, version=chance.choice((0, section.version + 1, 0xFFFFFFFF)))
        case 2:
            return replaced(parts, which, optional=not section.optional)
        case _:
            changed = list(parts.sections)
            origin = Origin.SERVER if changed[which].origin is Origin.PLUGIN else Origin.PLUGIN
            changed[which] = dataclasses.replace(changed[which], origin=origin)
            return dataclasses.replace(parts, sections=tuple(changed)).data()


def replaced(parts: Parts, which: int, **fields: object) -> bytes:
    changed = list(parts.sections)
    changed[which] = dataclasses.replace(changed[which], section=dataclasses.replace(changed[which].section, **fields))
    return dataclasses.replace(parts, sections=tuple(changed)).data()


def other_order(chance: random.Random, parts: Parts, strange: Sequence[Parts]) -> bytes:
    """Sections lost, doubled, moved."""
    order = list(range(len(parts.sections)))
    match chance.randrange(3):
        case 0:
            del order[chance.randrange(len(order))]
        case 1:
            order.insert(chance.randrange(len(order) + 1), chance.choice(order))
        case _:
            chance.shuffle(order)
    return parts.with_sections(order).data()


def foreign_sections(chance: random.Random, parts: Parts, strange: Sequence[Parts]) -> bytes:
    """Sections of another stream, beside ours or in their place."""
    mixed = list(parts.sections)
    for section in chance.sample(other := chance.choice(strange).sections, chance.randrange(1, len(other) + 1)):
        at = chance.randrange(len(mixed) + 1)
        mixed[at : at + chance.randrange(2)] = [section]
    return dataclasses.replace(parts, sections=tuple(mixed)).data()


def other_header(chance: random.Random, parts: Parts, strange: Sequence[Parts]) -> bytes:
    """Who wrote it, for which device."""
    number = chance.choice((0, 1, 2, 0xFF, chance.getrandbits(8)))
    change = chance.choice(
        (
            {"plugin": "other"},
            {"plugin": chance.choice(strange).header.plugin},
            {"plugin_version": chance.choice(("", "9.9", "x" * 255))},
            {"variant": chance.choice(("", "other", chance.choice(strange).header.state.variant))},
            {"state_version": chance.choice((0, parts.header.state.state_version + 1, 0xFFFFFFFF))},
            {"features": chance.choice((0, 1 << 63, chance.getrandbits(6)))},
            {"vendor": number},
            {"device": number},
            {"subsystem": number},
            {"subsystem_vendor": number},
            {"revision": number},
            {"class_code": number},
        )
    )
    if "features" in change or "state_version" in change or "variant" in change:
        state = dataclasses.replace(parts.header.state, **change)
        return dataclasses.replace(parts, header=dataclasses.replace(parts.header, state=state)).data()
    return parts.with_header(**change).data()


ON_THE_WAY: tuple[Callable[..., bytes], ...] = (
    bits,
    some_bytes,
    cut_short,
    piece_lost,
    piece_doubled,
    pieces_swapped,
    spliced,
    continued_by_another,
    longer,
)
FORGED: tuple[Callable[..., bytes], ...] = (
    summed_again,
    summed_again,
    other_payload,
    other_payload,
    other_payload,
    other_payload,
    other_section,
    other_order,
    foreign_sections,
    other_header,
)
