"""The data path of a VF (model): pairs of rings over a wire that leads back, driven by doorbells, with MSI-X.

Registers, descriptors and completions are described in this folder's README; `traffic` is a guest's driver for it. It
must not know commands or migration: it can be held still, and its state taken and put.
"""

import json
import struct
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from plugins.mlx5.models.status import Violations
from vfu_server.model import Bus, BusError

IDENTIFICATION = 0x4E494331
PAIRS = 4
PAIR_BASE, PAIR_STRIDE = 0x100, 0x80
REG_ID, REG_PAIRS, REG_CONTROL, REG_INTERVAL, REG_LENGTH, REG_GENERATED_PAIR = 0x00, 0x04, 0x08, 0x10, 0x14, 0x18
REG_SENT, REG_RECEIVED, REG_DROPPED, REG_GENERATED = 0x20, 0x24, 0x28, 0x2C
DB_COMPLETION_ARM, DB_COMPLETION, DB_SEND, DB_RECEIVE = 0x40, 0x48, 0x800, 0x808
DESCRIPTOR = struct.Struct(">QIIQQ")
COMPLETION = struct.Struct(">IIIIQQI27xB")
SENT, RECEIVED = 1, 2
MOST_FRAME = 2048
WIRE_BYTES = 16 << 10
MOST_LOG_SIZE = 12
STEP_SECONDS = 20e-6
BURST = 8
ERROR_ADDRESS, ERROR_DESCRIPTOR, ERROR_RING = 1, 2, 3
_FRAME = struct.Struct(">III")


@dataclass(slots=True)
class Pair:
    """A sending ring, a receiving ring and their completions. Indexes count on, modulo 2^16 where guests tell them."""

    send_ring: int = 0
    send_log: int = 0
    receive_ring: int = 0
    receive_log: int = 0
    completion_ring: int = 0
    completion_log: int = 0
    vector: int = 0
    enabled: int = 0
    send_producer: int = 0
    send_consumer: int = 0
    receive_producer: int = 0
    receive_consumer: int = 0
    completion_producer: int = 0
    completion_consumer: int = 0
    sequence: int = 0
    send_crc: int = 0
    receive_crc: int = 0
    error: int = 0
    armed: int = 0


_WRITABLE: Mapping[int, tuple[str, int]] = {
    0x00: ("send_ring", 32),
    0x04: ("send_ring", 0),
    0x08: ("send_log", -1),
    0x10: ("receive_ring", 32),
    0x14: ("receive_ring", 0),
    0x18: ("receive_log", -1),
    0x20: ("completion_ring", 32),
    0x24: ("completion_ring", 0),
    0x28: ("completion_log", -1),
    0x2C: ("vector", -1),
}
_READABLE: Mapping[int, str] = {
    0x30: "enabled",
    0x34: "send_producer",
    0x38: "send_consumer",
    0x3C: "receive_producer",
    0x40: "receive_consumer",
    0x44: "completion_producer",
    0x48: "sequence",
    0x4C: "send_crc",
    0x50: "receive_crc",
    0x54: "completion_consumer",
    0x58: "error",
}


@dataclass(slots=True)
class Counters:
    """Settings and counters of the whole engine."""

    running: int = 0
    interval: int = 0
    length: int = 64
    pair: int = 0
    sent: int = 0
    received: int = 0
    dropped: int = 0
    generated: int = 0


@dataclass(slots=True)
class Frame:
    """A frame on the wire."""

    pair: int
    sequence: int
    payload: bytes = field(repr=False)


class Engine:
    """`touch(number)` changes a part of the function's inner state and gives its new (block, version): it goes into the
    completion, so that a lost change shows. `wrote(iova, length)` hears of each write to memory. Nothing is started
    unless `masters()`; the next doorbell after that goes on.
    """

    def __init__(
        self,
        bus: Callable[[], Bus],
        violations: Violations,
        touch: Callable[[int], tuple[int, int]],
        wrote: Callable[[int, int], None],
        masters: Callable[[], bool],
    ) -> None:
        self._bus = bus
        self._violations = violations
        self._touch = touch
        self._wrote = wrote
        self._masters = masters
        self._generation = 0
        self.held = False
        self.busy = False
        """A step is at work: it may be waiting for the client's memory."""
        self.changes = 0
        """Grows with every change of state."""
        self.reset()

    def reset(self) -> None:
        """Everything as after a reset of the function."""
        self._generation += 1
        self._settings = Counters()
        self._pairs = [Pair() for _ in range(PAIRS)]
        self._wire: deque[Frame] = deque()
        self._scheduled = False
        self._generating = False
        self.held = False
        self.busy = False
        self.changes += 1

    # the guest's side; offsets within the engine's page, and within a pair's doorbell page

    def read(self, offset: int) -> int:
        """A register of 32 bits; what is none reads 0."""
        if offset >= PAIR_BASE and (offset - PAIR_BASE) // PAIR_STRIDE < PAIRS:
            number, inside = divmod(offset - PAIR_BASE, PAIR_STRIDE)
            pair = self._pairs[number]
            if inside in _WRITABLE:
                name, shift = _WRITABLE[inside]
                return int(getattr(pair, name)) >> max(shift, 0) & 0xFFFFFFFF
            return int(getattr(pair, _READABLE[inside])) & 0xFFFFFFFF if inside in _READABLE else 0
        settings = self._settings
        found = {
            REG_ID: IDENTIFICATION,
            REG_PAIRS: PAIRS,
            REG_CONTROL: settings.running,
            REG_INTERVAL: settings.interval,
            REG_LENGTH: settings.length,
            REG_GENERATED_PAIR: settings.pair,
            REG_SENT: settings.sent,
            REG_RECEIVED: settings.received,
            REG_DROPPED: settings.dropped,
            REG_GENERATED: settings.generated,
        }
        return found.get(offset, 0) & 0xFFFFFFFF

    def write(self, offset: int, value: int) -> None:
        """A register of 32 bits."""
        self.changes += 1
        if offset >= PAIR_BASE and (offset - PAIR_BASE) // PAIR_STRIDE < PAIRS:
            self._write_pair(*divmod(offset - PAIR_BASE, PAIR_STRIDE), value)
            return
        settings = self._settings
        match offset:
            case 0x08 if value & 2:
                held = self.held
                self.reset()
                self.held = held
            case 0x08:
                settings.running = value & 1
                self.go_on()
            case 0x10:
                settings.interval = value
                self.go_on()
            case 0x14:
                settings.length = min(max(value, 16), MOST_FRAME)
            case 0x18:
                settings.pair = value % PAIRS
            case _:
                self._violations.note("engine", f"a write of {value:#x} to the engine's {offset:#x}")

    def doorbell(self, number: int, offset: int, value: int) -> None:
        """A doorbell of a pair."""
        if number >= PAIRS or offset not in (DB_COMPLETION_ARM, DB_COMPLETION, DB_SEND, DB_RECEIVE):
            self._violations.note("engine", f"doorbell {offset:#x} of pair {number}")
            return
        pair = self._pairs[number]
        self.changes += 1
        if offset == DB_SEND:
            pair.send_producer += (value - pair.send_producer) & 0xFFFF
        elif offset == DB_RECEIVE:
            pair.receive_producer += (value - pair.receive_producer) & 0xFFFF
        else:
            pair.completion_consumer += (value - pair.completion_consumer) & 0xFFFF
            if offset == DB_COMPLETION_ARM:
                pair.armed = 1
                self._interrupt(pair)
        over = (
            pair.send_producer - pair.send_consumer > 1 << pair.send_log
            or pair.receive_producer - pair.receive_consumer > 1 << pair.receive_log
            or pair.completion_consumer > pair.completion_producer
        )
        if over:
            self._break(number, ERROR_RING, "more was posted than the ring holds")
        self.go_on()

    # the function's side

    def go_on(self) -> None:
        """Take up what there is to do, unless held."""
        if self.held or not self._settings.running or not self._masters():
            return
        generation = self._generation
        if not self._scheduled and self._has_work():
            self._scheduled = True
            self._bus().call_later(STEP_SECONDS, lambda: self._step(generation))
        if not self._generating and self._settings.interval and self._wire_left(self._settings.pair) >= MOST_FRAME:
            self._generating = True
            self._bus().call_later(self._settings.interval * 1e-6, lambda: self._generate(generation))

    def hold(self) -> None:
        """Start nothing any more; a step that is at work ends (see `busy`)."""
        self.held = True

    def release(self) -> None:
        """Go on. Interrupts that are due are sent, as nobody knows whether an earlier one arrived."""
        self.held = False
        for pair in self._pairs:
            self._interrupt(pair)
        self.go_on()

    def take(self) -> tuple[dict[str, Any], bytes]:
        """The state: numbers, and the frames on the wire."""
        wire = b"".join(_FRAME.pack(f.pair, f.sequence, len(f.payload)) + f.payload for f in self._wire)
        return {"engine": asdict(self._settings), "pairs": [asdict(pair) for pair in self._pairs]}, wire

    def put(self, state: Mapping[str, Any], wire: bytes) -> None:
        """Counterpart of `take`, into an engine that is held."""
        self._generation += 1
        self._scheduled = self._generating = False
        self._settings = Counters(**state["engine"])
        self._pairs = [Pair(**pair) for pair in state["pairs"]]
        self._wire.clear()
        at = 0
        while at < len(wire):
            number, sequence, length = _FRAME.unpack_from(wire, at)
            at += _FRAME.size
            self._wire.append(Frame(number, sequence, wire[at : at + length]))
            at += length
        self.changes += 1

    def numbers(self) -> dict[str, int]:
        """Counters, for tests and people."""
        found = {f"engine.{name}": value for name, value in asdict(self._settings).items()}
        for index, pair in enumerate(self._pairs):
            if pair.enabled or pair.error:
                found.update({f"pair[{index}].{name}": value for name, value in asdict(pair).items()})
        found["engine.crc32"] = zlib.crc32(json.dumps(self.take()[0], sort_keys=True).encode())
        return found

    # inside

    def _write_pair(self, number: int, inside: int, value: int) -> None:
        pair = self._pairs[number]
        if inside == 0x30:
            if value & 1 and not pair.enabled:
                names = ("send_ring", "send_log", "receive_ring", "receive_log")
                kept = {name: getattr(pair, name) for name in (*names, "completion_ring", "completion_log", "vector")}
                pair = self._pairs[number] = Pair(**kept)
            pair.enabled = value & 1
            self.go_on()
        elif inside in _WRITABLE and not pair.enabled:
            name, shift = _WRITABLE[inside]
            if shift < 0:
                setattr(pair, name, min(value, MOST_LOG_SIZE))
            else:
                kept_half = getattr(pair, name) & ~(0xFFFFFFFF << shift)
                setattr(pair, name, kept_half | value << shift)
        else:
            self._violations.note("engine", f"a write of {value:#x} to register {inside:#x} of pair {number}")

    def _has_work(self) -> bool:
        return any(self._can_send(n) or self._can_receive(n) for n in range(PAIRS))

    def _room(self, pair: Pair) -> bool:
        return bool(pair.enabled) and pair.completion_producer - pair.completion_consumer < 1 << pair.completion_log

    def _can_send(self, number: int) -> bool:
        pair = self._pairs[number]
        return self._room(pair) and pair.send_producer > pair.send_consumer and self._wire_left(number) >= MOST_FRAME

    def _can_receive(self, number: int) -> bool:
        pair = self._pairs[number]
        waiting = pair.receive_producer > pair.receive_consumer
        return waiting and self._room(pair) and any(f.pair == number for f in self._wire)

    def _wire_left(self, number: int) -> int:
        """Bytes of the wire that pair `number` has left: one that nobody listens to does not stop the others."""
        return WIRE_BYTES // PAIRS - sum(len(f.payload) for f in self._wire if f.pair == number)

    def _step(self, generation: int) -> None:
        """A burst of descriptors of each pair. Memory may make us wait, and then anything can happen in between."""
        if generation != self._generation:
            return
        self._scheduled = False
        if self.held:
            return
        self.busy = True
        try:
            for number in range(PAIRS):
                for _ in range(BURST):
                    if not self._one(number, generation):
                        break
        finally:
            if generation == self._generation:
                self.busy = False
        self.go_on()

    def _one(self, number: int, generation: int) -> bool:
        """One descriptor of a pair, received ones first; False: there is none, or it may not be."""
        if self.held or generation != self._generation or not self._masters():
            return False
        if self._can_receive(number):
            return self._receive(number, generation)
        return self._can_send(number) and self._send(number, generation)

    def _descriptor(self, number: int, ring: int, index: int) -> tuple[int, int, int, int]:
        address, length, flags, cookie, reserved = DESCRIPTOR.unpack(
            self._bus().dma_read(ring + index * DESCRIPTOR.size, DESCRIPTOR.size)
        )
        if flags or reserved or not 0 < length <= MOST_FRAME:
            raise ValueError(f"pair {number}: descriptor {index} has length {length}, flags {flags:#x}")
        return address, length, flags, cookie

    def _send(self, number: int, generation: int) -> bool:
        pair = self._pairs[number]
        try:
            index = pair.send_consumer % (1 << pair.send_log)
            address, length, _, cookie = self._descriptor(number, pair.send_ring, index)
            payload = self._bus().dma_read(address, length)
        except (BusError, ValueError) as error:
            return self._failed(number, generation, error)
        if generation != self._generation:
            return False
        pair.send_consumer += 1
        pair.sequence += 1
        pair.send_crc = zlib.crc32(payload, pair.send_crc)
        self._settings.sent += 1
        self.changes += 1
        self._wire.append(Frame(number, pair.sequence, payload))
        return self._complete(number, generation, SENT, pair.sequence, payload, cookie, (0, 0))

    def _receive(self, number: int, generation: int) -> bool:
        pair = self._pairs[number]
        frame = next(f for f in self._wire if f.pair == number)
        try:
            index = pair.receive_consumer % (1 << pair.receive_log)
            address, room, _, cookie = self._descriptor(number, pair.receive_ring, index)
            if room < len(frame.payload):
                raise ValueError(f"pair {number}: a buffer of {room} bytes for a frame of {len(frame.payload)}")
            self._store(address, frame.payload)
        except (BusError, ValueError) as error:
            return self._failed(number, generation, error)
        if generation != self._generation:
            return False
        self._wire.remove(frame)
        pair.receive_consumer += 1
        pair.receive_crc = zlib.crc32(frame.payload, pair.receive_crc)
        self._settings.received += 1
        self.changes += 1
        context = self._touch(frame.sequence + number)
        return self._complete(number, generation, RECEIVED, frame.sequence, frame.payload, cookie, context)

    def _complete(
        self,
        number: int,
        generation: int,
        kind: int,
        sequence: int,
        payload: bytes,
        cookie: int,
        context: tuple[int, int],
    ) -> bool:
        pair = self._pairs[number]
        index = pair.completion_producer % (1 << pair.completion_log)
        phase = pair.completion_producer >> pair.completion_log & 1 ^ 1
        entry = COMPLETION.pack(
            kind << 24 | number,
            len(payload),
            sequence & 0xFFFFFFFF,
            zlib.crc32(payload),
            cookie,
            context[0] << 32 | context[1],
            pair.completion_producer & 0xFFFFFFFF,
            phase,
        )
        pair.completion_producer += 1
        at = pair.completion_ring + index * COMPLETION.size
        try:
            self._store(at, entry[:-1])
            self._store(at + COMPLETION.size - 1, entry[-1:])
        except BusError as error:
            return self._failed(number, generation, error)
        if generation == self._generation:
            self._interrupt(pair)
        return generation == self._generation

    def _store(self, address: int, data: bytes) -> None:
        self._bus().dma_write(address, data)
        self._wrote(address, len(data))

    def _failed(self, number: int, generation: int, error: Exception) -> bool:
        if generation == self._generation:
            self._break(number, ERROR_ADDRESS if isinstance(error, BusError) else ERROR_DESCRIPTOR, str(error))
        return False

    def _break(self, number: int, error: int, text: str) -> None:
        """A pair stops with an error; its guest enables it anew."""
        self._violations.note("engine", f"pair {number}: {text}")
        self._pairs[number].error = error
        self._pairs[number].enabled = 0
        self.changes += 1

    def _interrupt(self, pair: Pair) -> None:
        if pair.armed and pair.completion_producer > pair.completion_consumer:
            pair.armed = 0
            self._bus().message(pair.vector)

    def _generate(self, generation: int) -> None:
        """A frame comes from elsewhere, unless the wire is full; then the next comes when there is room again."""
        if generation != self._generation:
            return
        self._generating = False
        settings = self._settings
        if self.held or not settings.running or not settings.interval:
            return
        pair = self._pairs[settings.pair]
        self.changes += 1
        if self._wire_left(settings.pair) >= MOST_FRAME:
            settings.generated += 1
            pair.sequence += 1
            self._wire.append(Frame(settings.pair, pair.sequence, generated_payload(pair.sequence, settings.length)))
        if self._wire_left(settings.pair) < MOST_FRAME:
            settings.dropped += 1  # the next one; no clock runs for a guest that offers no buffers
        self.go_on()


def generated_payload(sequence: int, length: int) -> bytes:
    """The bytes of frame `sequence` where the engine itself is the sender."""
    words = -(-length // 8)
    return b"".join((sequence << 32 | word).to_bytes(8, "big") for word in range(words))[:length]
