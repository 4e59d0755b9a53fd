"""Streams that nobody should take: cut, spliced, forged with right sums. Afterwards a reset brings the device back."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace

from vfu_server.device import Section, StateIdentity
from vfu_server.stream import Origin, StreamSection
from vfu_server.testing.client import Client
from vfu_server.testing.conformance.bench import Bench
from vfu_server.testing.conformance.records import Failed, check
from vfu_server.testing.conformance.streams import Parts, try_load
from vfu_server.uapi import MigState

FILLS = (0x00, 0xFF, 0x7F, 0x80)
RANDOM_CHANGES = 20


def damaged(stream: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Streams whose sums are wrong, or whose end is missing."""
    yield "nothing at all", b""
    for cut in sorted({1, 7, len(stream) // 2, len(stream) - 1, *(chance.randrange(len(stream)) for _ in range(8))}):
        yield f"cut behind byte {cut}", stream[:cut]
    for _ in range(16):
        at = chance.randrange(len(stream))
        yield f"byte {at} changed", stream[:at] + bytes([stream[at] ^ 1 << chance.randrange(8)]) + stream[at + 1 :]
    yield "something behind the end", stream + b"\0"


def refused(parts: Parts) -> Iterator[tuple[str, Parts]]:
    """Streams with right sums that must be refused all the same."""
    header = parts.header
    state = header.state
    yield "of another plugin", replace(parts, header=replace(header, plugin=header.plugin + "x"))
    yield (
        "of another variant",
        replace(parts, header=replace(header, state=replace(state, variant=state.variant + "x"))),
    )
    later = replace(state, state_version=state.state_version + 1)
    yield "of a later state version", _of(parts, later)
    other = replace(header.device, device=header.device.device ^ 1)
    yield "of another device", replace(parts, header=replace(header, device=other))
    unknown = StreamSection(Origin.PLUGIN, Section("no-such-tag", 1, b"?"))
    yield "with an unknown section", replace(parts, sections=(*parts.sections, unknown))
    tags = [parts.sections[at].section.tag for at in parts.own]
    for at in parts.own:
        section = parts.sections[at].section
        name = f"section {section.tag!r}"
        if tags.count(section.tag) > 1:
            continue  # one of many: a piece of something, for which the plugin alone knows what is missing
        yield f"{name} of a later version", parts.put(at, replace(section, version=section.version + 1, optional=False))
        if not section.optional:
            yield f"without {name}", parts.put(at)
            yield f"{name} twice", parts.put(at, section, section)
            if section.payload:
                yield f"{name} empty", parts.put(at, replace(section, payload=b""))
                yield f"{name} one byte short", parts.put(at, replace(section, payload=section.payload[:-1]))
            yield f"{name} one byte long", parts.put(at, replace(section, payload=section.payload + b"\0"))


def _of(parts: Parts, state: StateIdentity) -> Parts:
    return replace(parts, header=replace(parts.header, state=state))


def forged(parts: Parts, chance: random.Random) -> Iterator[tuple[str, Parts]]:
    """Streams with right sums whose payloads are somebody's; a plugin may find them sound."""
    for at in parts.own:
        section = parts.sections[at].section
        if not section.payload:
            continue
        length = len(section.payload)
        for fill in FILLS:
            yield (
                f"{section.tag!r} full of {fill:#04x}",
                parts.put(at, replace(section, payload=bytes([fill]) * length)),
            )
        yield f"{section.tag!r} of random bytes", parts.put(at, replace(section, payload=chance.randbytes(length)))
        for _ in range(RANDOM_CHANGES // len(parts.own) + 1):
            changed = bytearray(section.payload)
            place = chance.randrange(length)
            changed[place] = chance.choice([0, 0xFF, changed[place] ^ 1 << chance.randrange(8)])
            yield f"{section.tag!r} with byte {place} changed", parts.put(at, replace(section, payload=bytes(changed)))


@check("hostile", "streams that are cut, changed, forged or somebody else's are refused, and a reset helps")
def hostile(bench: Bench) -> str:
    """Streams that are cut, changed, forged or somebody else's are refused, and a reset helps."""
    chance = bench.chance()
    stream = bench.undisturbed()
    with contextlib.suppress(Exception):
        stream = bench.used()
    parts = Parts.of(stream)
    bad = list(damaged(stream, chance)) + [(what, each.stream()) for what, each in refused(parts)]
    odd = [(what, each.stream()) for what, each in forged(parts, chance)]
    taken = 0
    with bench.guest("destination") as guest:
        for what, data in (*bad, *odd):
            if _taken(bench, guest.client, what, data):
                taken += 1
                if (what, data) in bad:
                    raise Failed(f"a stream {what} was taken")
        if not try_load(guest.client, stream):
            raise Failed(f"after all that it does not take a sound stream any more; {bench.why()}")
    return f"{len(bad)} refused; of {len(odd)} with changed contents {taken} were found sound"


def _taken(bench: Bench, client: Client, what: str, data: bytes) -> bool:
    """Whether it takes the stream; reset afterwards."""
    taken = try_load(client, data)
    if not taken and (state := client.mig_state()) is not MigState.RESUMING:
        raise Failed(f"after a stream {what} it is in {state.name}, not in RESUMING")
    client.reset()
    if client.mig_state() is not MigState.RUNNING:
        raise Failed(f"after a stream {what} a reset does not bring it back")
    if found := bench.loop.tracebacks():
        raise Failed(f"a stream {what} made it raise {found[0]}")
    return taken
