"""A guest's driver for the VF's data path: frames that go out, come back, and are compared with what they have to be.

Written from this folder's README as a guest would, sharing no code with the engine. It keeps its own books, so that it
goes on after its device has moved (`moved`) and finds what was lost, repeated or changed on the way. It must not know
how its registers and memory are reached (`Port`).
"""

import hashlib
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

ENGINE, DOORBELLS, PAGE = 0x10000, 0x20000, 0x1000
IDENTIFICATION = b"NIC1"
LOG_RING, LOG_COMPLETIONS = 6, 7
RING, COMPLETIONS = 1 << LOG_RING, 1 << LOG_COMPLETIONS
BUFFER = 2048
AREA = 0x50000
"""Bytes of memory that each pair needs."""
_SEND_RING, _RECEIVE_RING, _COMPLETION_RING, _SEND_BUFFERS, _RECEIVE_BUFFERS = 0, 0x1000, 0x2000, 0x10000, 0x30000
_SENT, _RECEIVED = 1, 2


class TrafficError(Exception):
    """The device did something else than it should have."""


class Port(Protocol):
    """The guest's way to its device: registers (little-endian, as the bus has them) and memory."""

    def read(self, region: int, offset: int, width: int) -> int:
        """A register."""
        ...

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """Write a register."""
        ...

    def load(self, iova: int, length: int) -> bytes:
        """Read memory."""
        ...

    def store(self, iova: int, data: bytes) -> None:
        """Write memory."""
        ...

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Wait, with a deadline."""
        ...


@dataclass(slots=True)
class Lane:
    """The books of one pair. Counts since the beginning; a frame's sequence number is its count, from 1."""

    number: int
    base: int
    sent: int = 0
    """Posted for sending."""
    acknowledged: int = 0
    received: int = 0
    posted: int = 0
    """Buffers posted for receiving."""
    completions: int = 0
    send_crc: int = 0
    receive_crc: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    """Bytes of each frame that has not come back yet."""
    generated: int = 0
    """Bytes of the frames that the device makes by itself; 0: it makes none."""


class Traffic:
    """Drives `pairs` of the device behind `port`, with memory from `base` (AREA bytes for each pair).

    `start` sets the device up; `post`, `poll` and `finish` can be called at any time after. TrafficError: what came is
    not what had to come.
    """

    def __init__(self, port: Port, *, base: int = 0x100000, pairs: Sequence[int] = (0,), seed: str = "traffic") -> None:
        self.port = port
        self.lanes = [Lane(number, base + AREA * index) for index, number in enumerate(pairs)]
        self.contexts: dict[int, set[int]] = {}
        """The versions of each part of the device's inner state that were told, in the order of some pair."""
        self._seed = seed

    def start(self) -> None:
        """Set rings up and switch the engine on."""
        if self.register(0).to_bytes(4, "big") != IDENTIFICATION:
            raise TrafficError(f"there is no engine: {self.register(0):#x}")
        for lane in self.lanes:
            self.port.store(lane.base, bytes(_SEND_BUFFERS))
            at = 0x100 + 0x80 * lane.number
            for offset, ring, log in (
                (0x00, _SEND_RING, LOG_RING),
                (0x10, _RECEIVE_RING, LOG_RING),
                (0x20, _COMPLETION_RING, LOG_COMPLETIONS),
            ):
                self.set_register(at + offset, lane.base + ring >> 32)
                self.set_register(at + offset + 4, lane.base + ring & 0xFFFFFFFF)
                self.set_register(at + offset + 8, log)
            self.set_register(at + 0x2C, lane.number + 1)
            self.set_register(at + 0x30, 1)
        self.set_register(0x08, 1)
        for lane in self.lanes:
            self._offer(lane)
            self._ring(lane, 0x40, 0)

    def moved(self, port: Port) -> None:
        """The device is another one now, with the same state and memory."""
        self.port = port

    def generate(self, number: int, microseconds: int, length: int) -> None:
        """Have the device make frames for pair `number` by itself, one each so many microseconds; 0: no more."""
        lane = next(lane for lane in self.lanes if lane.number == number)
        if lane.sent:
            raise TrafficError(f"pair {number} sends frames of its own")
        if microseconds:
            lane.generated = length
            self.set_register(0x14, length)
            self.set_register(0x18, number)
        self.set_register(0x10, microseconds)

    # sending and looking

    def post(self, count: int = 1) -> int:
        """Send up to `count` more frames on each pair, as many as there is room for; how many these were."""
        total = 0
        for lane in self.lanes:
            room = RING - (lane.sent - min(lane.acknowledged, lane.received))
            number = 0 if lane.generated else min(count, room)
            for _ in range(number):
                self._send(lane)
            if number:
                self._ring(lane, 0x800, lane.sent)
            total += number
        return total

    def poll(self) -> int:
        """Check what has come; how many completions these were."""
        total = 0
        for lane in self.lanes:
            found = 0
            while self._one(lane):
                found += 1
            if found:
                self._offer(lane)
                self._ring(lane, 0x40, lane.completions)
            total += found
        return total

    @property
    def outstanding(self) -> int:
        """Frames that were sent and have not come back, or whose sending was not acknowledged."""
        return sum(max(lane.sent - lane.acknowledged, lane.sent - lane.received, 0) for lane in self.lanes)

    def finish(self) -> None:
        """Wait until everything has come back, and compare the device's sums with ours."""

        def done() -> bool:
            self.poll()
            return not self.outstanding

        self.port.wait(done, "frames")
        if not any(lane.generated for lane in self.lanes):
            self._check_contexts()
        for lane in self.lanes:
            if lane.generated:
                continue
            at = 0x100 + 0x80 * lane.number
            ours = (lane.sent, lane.send_crc, lane.receive_crc, 0)
            theirs = tuple(self.register(at + offset) for offset in (0x48, 0x4C, 0x50, 0x58))
            if ours != theirs:
                raise TrafficError(f"pair {lane.number}: the device counts {theirs}, we {ours}")

    def _check_contexts(self) -> None:
        """Every change of the inner state was told: it began at version 1, and no version is missing."""
        for part, versions in self.contexts.items():
            if max(versions) != len(versions):
                raise TrafficError(f"part {part} of the state has version {max(versions)}, {len(versions)} were told")

    def run(self, frames: int) -> None:
        """Send so many frames on each pair, and wait for them."""
        left = frames
        while left > 0:
            self.post(min(left, RING // 2))
            left -= min(left, RING // 2)
            self.finish()

    # registers

    def register(self, offset: int) -> int:
        """A register of the engine."""
        return int.from_bytes(self.port.read(0, ENGINE + offset, 4).to_bytes(4, "little"), "big")

    def set_register(self, offset: int, value: int) -> None:
        """Write a register of the engine."""
        self.port.write(0, ENGINE + offset, 4, int.from_bytes((value & 0xFFFFFFFF).to_bytes(4, "little"), "big"))

    def _ring(self, lane: Lane, offset: int, count: int) -> None:
        word = int.from_bytes((count & 0xFFFF).to_bytes(4, "little"), "big")
        self.port.write(0, DOORBELLS + PAGE * lane.number + offset, 4, word)

    # frames

    def _payload(self, lane: Lane, sequence: int) -> bytes:
        if lane.generated:
            count = -(-lane.generated // 8)
            return b"".join(struct.pack(">II", sequence, word) for word in range(count))[: lane.generated]
        length = 64 + sequence * 131 % (BUFFER - 64)
        text = f"{self._seed}:{lane.number}:{sequence}".encode()
        return struct.pack(">QQ", lane.number, sequence) + hashlib.shake_128(text).digest(length - 16)

    def _send(self, lane: Lane) -> None:
        slot = lane.sent % RING
        lane.sent += 1
        payload = self._payload(lane, lane.sent)
        lane.send_crc = zlib.crc32(payload, lane.send_crc)
        buffer = lane.base + _SEND_BUFFERS + BUFFER * slot
        self.port.store(buffer, payload)
        descriptor = struct.pack(">QIIQQ", buffer, len(payload), 0, lane.sent, 0)
        self.port.store(lane.base + _SEND_RING + 32 * slot, descriptor)

    def _offer(self, lane: Lane) -> None:
        """Post all buffers that are free."""
        while lane.posted - lane.received < RING:
            slot = lane.posted % RING
            buffer = lane.base + _RECEIVE_BUFFERS + BUFFER * slot
            descriptor = struct.pack(">QIIQQ", buffer, BUFFER, 0, lane.posted, 0)
            self.port.store(lane.base + _RECEIVE_RING + 32 * slot, descriptor)
            lane.posted += 1
        self._ring(lane, 0x808, lane.posted)

    def _one(self, lane: Lane) -> bool:
        """Check the next completion, if it is there."""
        slot = lane.completions % COMPLETIONS
        entry = self.port.load(lane.base + _COMPLETION_RING + 64 * slot, 64)
        if entry[63] != 1 - (lane.completions // COMPLETIONS & 1):
            return False
        kind, length, sequence, crc, cookie, context, count = struct.unpack_from(">IIIIQQI", entry)
        if count != lane.completions or kind & 0xFFFFFF != lane.number:
            raise TrafficError(f"pair {lane.number}: completion {count} of kind {kind:#x}, {lane.completions} is due")
        lane.completions += 1
        if kind >> 24 == _SENT:
            lane.acknowledged += 1
            due = (lane.acknowledged, lane.acknowledged)
            if (sequence, cookie) != due:
                raise TrafficError(f"pair {lane.number}: sending of {sequence}, {cookie} is done, {due} is due")
            return True
        if kind >> 24 != _RECEIVED:
            raise TrafficError(f"pair {lane.number}: a completion of kind {kind:#x}")
        self._check_received(lane, length, sequence, crc, cookie, context)
        return True

    def _check_received(self, lane: Lane, length: int, sequence: int, crc: int, cookie: int, context: int) -> None:
        lane.received += 1
        payload = self._payload(lane, lane.received)
        due = (len(payload), lane.received, zlib.crc32(payload), lane.received - 1)
        if (length, sequence, crc, cookie) != due:
            raise TrafficError(f"pair {lane.number}: received {(length, sequence, crc, cookie)}, {due} is due")
        buffer = lane.base + _RECEIVE_BUFFERS + BUFFER * (cookie % RING)
        if self.port.load(buffer, length) != payload:
            raise TrafficError(f"pair {lane.number}: the bytes of frame {sequence} are wrong")
        lane.receive_crc = zlib.crc32(payload, lane.receive_crc)
        part, version = context >> 32, context & 0xFFFFFFFF
        versions = self.contexts.setdefault(part, set())
        if version in versions:
            raise TrafficError(f"part {part} of the state has version {version} for the second time")
        versions.add(version)
