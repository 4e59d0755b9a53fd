"""Owns a small, strict driver of the PF for tests: commands as bytes, built here by hand from the documents.

It shares neither code nor tables with the model: messages are made with `put`, field by field.
"""

import struct
from collections.abc import Callable
from typing import Protocol

PAGE = 4096


class Port(Protocol):
    def read(self, region: int, offset: int, width: int) -> int: ...
    def write(self, region: int, offset: int, width: int, value: int) -> None: ...
    def load(self, iova: int, length: int) -> bytes: ...
    def store(self, iova: int, data: bytes) -> None: ...
    def wait(self, until: Callable[[], bool], what: str = ..., seconds: float = ...) -> None: ...


class StatusError(Exception):
    def __init__(self, opcode: int, status: int, syndrome: int) -> None:
        super().__init__(f"command {opcode:#x}: status {status:#x}, syndrome {syndrome:#x}")
        self.status, self.syndrome = status, syndrome


class DeliveryError(Exception):
    def __init__(self, opcode: int, delivery: int) -> None:
        super().__init__(f"command {opcode:#x}: delivery status {delivery:#x}")
        self.delivery = delivery


def swap(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "little"), "big")


def put(size: int, *fields: tuple[int, int, int]) -> bytes:
    """`size` bytes with (offset of the dword, lowest bit, number) put into them."""
    data = bytearray(size)
    for at, low, value in fields:
        word = struct.unpack_from(">I", data, at)[0]
        assert not word >> low & value, "fields overlap"
        struct.pack_into(">I", data, at, word | value << low)
    return bytes(data)


def words(data: bytes) -> list[int]:
    return list(struct.unpack(f">{len(data) // 4}I", data[: len(data) & ~3]))


def hexes(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


def xor(data: bytes) -> int:
    found = 0
    for byte in data:
        found ^= byte
    return found


class Allocator:
    """IOVAs of the driver's memory, upwards from `start`."""

    def __init__(self, start: int, end: int) -> None:
        self.at, self.end = start, end

    def take(self, size: int, alignment: int = PAGE) -> int:
        at = -(-self.at // alignment) * alignment
        self.at = at + size
        assert self.at <= self.end, "out of memory"
        return at


class Raw:
    """Commands one at a time through entry 0; page requests are served through entry 31."""

    def __init__(self, port: Port, *, start: int = 1 << 20, end: int = 30 << 20, sign: bool = True) -> None:
        self.port = port
        self.memory = Allocator(start, end)
        self.token = 0
        self.sign = sign
        self.sign_boxes = False
        self.queue = self.memory.take(PAGE)
        self.inbox = [self.memory.take(1024, 1024) for _ in range(20)]
        self.outbox = [self.memory.take(1024, 1024) for _ in range(20)]
        self.given: dict[int, list[int]] = {}
        self.free_pages: list[int] = []
        self.eq: EventQueue | None = None
        self.serve_pages = True

    # registers

    def read32(self, offset: int) -> int:
        return swap(self.port.read(0, offset, 4))

    def write32(self, offset: int, value: int) -> None:
        self.port.write(0, offset, 4, swap(value))

    # commands

    def post(self, data: bytes, room: int = 16, entry: int = 0, **spoil: int) -> None:
        """Fill an entry and ring. `spoil`: bytes of the entry or of the first mailbox to get wrong."""
        self.token = self.token % 255 + 1
        inbox, outbox = (self.inbox, self.outbox) if entry == 0 else (self.inbox[10:], self.outbox[10:])
        self.chain(inbox, data[16:], spoil.get("mailbox_token", self.token), spoil.get("number", 0))
        self.chain(outbox, bytes(max(0, room - 16)), self.token, 0)
        head = bytearray(64)
        head[0] = spoil.get("type", 7)
        head[1] = spoil.get("reserved", 0)
        struct.pack_into(">I", head, 4, spoil.get("in_length", len(data)))
        struct.pack_into(">Q", head, 8, spoil.get("pointer", inbox[0]) if len(data) > 16 else 0)
        head[16:32] = data[:16]
        struct.pack_into(">Q", head, 0x30, spoil.get("out_pointer", outbox[0]) if room > 16 else 0)
        struct.pack_into(">I", head, 0x38, spoil.get("out_length", room))
        head[0x3C] = self.token
        head[0x3F] = 1
        head[0x3D] = (~xor(head) & 0xFF if self.sign else 0) ^ spoil.get("signature", 0)
        self.port.store(self.queue + 64 * entry, bytes(head))
        self.write32(0x18, 1 << entry)

    def chain(self, boxes: list[int], data: bytes, token: int, number: int) -> None:
        count = -(-len(data) // 512)
        assert count <= len(boxes)
        for index in range(count):
            block = bytearray(576)
            part = data[512 * index : 512 * index + 512]
            block[: len(part)] = part
            if index + 1 < count:
                struct.pack_into(">Q", block, 0x230, boxes[index + 1])
            struct.pack_into(">I", block, 0x238, index + number)
            block[0x23D] = token
            if self.sign_boxes:
                block[0x23E] = ~xor(block[0x200:0x23E]) & 0xFF
                block[0x23F] = ~xor(block[:0x23F]) & 0xFF
            self.port.store(boxes[index], bytes(block))

    def owned(self, entry: int = 0) -> bool:
        return bool(self.port.load(self.queue + 64 * entry + 63, 1)[0] & 1)

    def output(self, room: int = 16, entry: int = 0) -> bytes:
        """The output of an entry that came back; StatusError, DeliveryError."""
        head = self.port.load(self.queue + 64 * entry, 64)
        opcode = int.from_bytes(head[16:18], "big")
        if head[63] >> 1:
            raise DeliveryError(opcode, head[63] >> 1)
        assert head[0x3C] == self.token, "the token is another"
        found = head[0x20:0x30]
        outbox = self.outbox if entry == 0 else self.outbox[10:]
        for index in range(-(-(room - 16) // 512)):
            block = self.port.load(outbox[index], 576)
            assert block[0x23D] == self.token
            found += block[:512]
        if found[0]:
            raise StatusError(opcode, found[0], int.from_bytes(found[4:8], "big"))
        return found[:room]

    def command(self, data: bytes, room: int = 16, **spoil: int) -> bytes:
        """A command from post to output; page requests are served meanwhile."""
        self.post(data, room, **spoil)
        self.finish()
        return self.output(room)

    def finish(self) -> None:
        def back() -> bool:
            self.poll()
            return not self.owned()

        self.port.wait(back, "a command")

    def side(self, data: bytes, room: int = 16) -> bytes:
        """A command through the last entry, while another is on its way."""
        before = self.token
        self.post(data, room, entry=31)
        self.port.wait(lambda: not self.owned(31), "a command of the last entry")
        found = self.output(room, entry=31)
        self.token = before
        return found

    def simple(self, opcode: int, op_mod: int = 0, *rest: int, room: int = 16) -> bytes:
        return self.command(
            struct.pack(f">{4 + max(0, len(rest) - 2)}I", opcode << 16, op_mod, *[*rest, 0, 0][: max(2, len(rest))]),
            room,
        )

    # boot

    def power_on(self) -> None:
        self.port.wait(lambda: not self.read32(0x1FC) >> 31, "the firmware")
        assert self.read32(4) >> 16 == 5
        low = self.read32(0x14)
        assert (low >> 4 & 0xF, low & 0xF) == (5, 6)
        self.write32(0x10, self.queue >> 32)
        self.write32(0x14, self.queue & 0xFFFFFFFF)
        self.port.wait(lambda: not self.read32(0x1FC) >> 31, "the queue")

    def boot(self, *, changes: Callable[[bytearray], None] | None = None, eq: bool = True) -> "Raw":
        self.power_on()
        self.simple(0x104)
        issi = self.simple(0x10A, room=0x70)
        assert issi[0x6F] & 2
        self.simple(0x10B, 0, 1)
        self.feed(1)
        self.command(put(0x20, (0, 16, 0x805), (8, 0, 0x7004)), 0x20)
        block = bytearray(self.cap(0, 1))
        struct.pack_into(">I", block, 0x40, words(bytes(block[0x40:0x44]))[0] & ~0xC000)
        if changes is not None:
            changes(block)
        self.command(put(16, (0, 16, 0x109)) + bytes(block))
        self.feed(2)
        self.command(put(0x20, (0, 16, 0x102)))
        if eq:
            self.eq = EventQueue(self, 0xC00)
        return self

    def cap(self, kind: int, mode: int, other: int | None = None) -> bytes:
        word = 0 if other is None else 1 << 31 | other
        return self.simple(0x100, kind << 1 | mode, word, room=0x1010)[16:]

    def feed(self, op_mod: int) -> None:
        answer = words(self.simple(0x107, op_mod))
        if answer[3]:
            self.give(answer[2] & 0xFFFF, answer[3])

    def pages(self, count: int) -> list[int]:
        while len(self.free_pages) < count:
            self.free_pages.append(self.memory.take(PAGE))
        found, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        return found

    def give(self, function: int, count: int, run: Callable[..., bytes] | None = None) -> None:
        pages = self.pages(count)
        head = put(16, (0, 16, 0x108), (4, 0, 1), (8, 0, function), (12, 0, count))
        (run or self.command)(head + struct.pack(f">{count}Q", *pages))
        self.given.setdefault(function, []).extend(pages)

    def take(self, function: int, count: int, run: Callable[..., bytes] | None = None) -> int:
        head = put(16, (0, 16, 0x108), (4, 0, 2), (8, 0, function), (12, 0, count))
        found = (run or self.command)(head, 16 + 8 * count)
        number = words(found)[2]
        pages = list(struct.unpack(f">{number}Q", found[16 : 16 + 8 * number]))
        for page in pages:
            self.given[function].remove(page)
        self.free_pages += pages
        return number

    # events

    def poll(self) -> None:
        """Read events; page requests are served at once."""
        if self.eq is None:
            return
        for event in self.eq.read():
            if event[1] == 0x0B and self.serve_pages:
                flags, function, count = struct.unpack(">HHi", event[0x20:0x28])
                if flags & 1 << 14:
                    self.free_pages += self.given.pop(function)
                elif count > 0:
                    self.give(function, count, self.side)
                else:
                    while count:
                        taken = self.take(function, min(-count, 100), self.side)
                        assert taken
                        count += taken
            else:
                self.eq.kept.append(event)

    # VFs

    def enable_vf(self, index: int = 0, *, migratable: bool = True) -> int:
        """ENABLE_HCA with its pages; the VHCA id."""
        if migratable:
            block = bytearray(self.cap(0x20, 0, index + 1))
            block[0x10] |= 0x80
            self.command(put(16, (0, 16, 0x109), (4, 0, 0x40), (8, 31, 1), (8, 0, index + 1)) + bytes(block))
        self.simple(0x104, 0, index + 1)
        self.settle()
        return words(self.cap(0, 1, index + 1))[1] & 0xFFFF

    def settle(self) -> None:
        """Serve what is asked for until nothing more comes of a few commands."""
        for _ in range(4):
            self.poll()
            self.simple(0x10A, room=0x70)
        self.poll()

    # migration

    def suspend(self, vhca: int, op_mod: int) -> None:
        self.simple(0x115, op_mod, vhca)

    def resume(self, vhca: int, op_mod: int) -> None:
        self.simple(0x116, op_mod, vhca)

    def stop(self, vhca: int) -> None:
        self.suspend(vhca, 0)
        self.suspend(vhca, 1)

    def go(self, vhca: int) -> None:
        self.resume(vhca, 0)
        self.resume(vhca, 1)

    def query(self, vhca: int, *, inc: bool = False, chunk: bool = True) -> tuple[int, int, int]:
        """(state, required, remaining)."""
        found = words(self.simple(0x117, 0, inc << 31 | chunk << 30 | vhca, room=0x40))
        return found[3] >> 28, found[4], found[6] << 32 | found[7]

    def save(
        self, vhca: int, buffer: "Buffer", *, inc: bool = False, track: bool = False, size: int = 0
    ) -> tuple[bytes, int]:
        """(image, least size of the next)."""
        word = inc << 31 | track << 30 | vhca
        found = words(self.simple(0x118, 0, word, 0, 0, 0, buffer.mkey, size or buffer.size))
        return buffer.get(found[2]), found[3]

    def load(self, vhca: int, buffer: "Buffer", image: bytes) -> None:
        buffer.put(image)
        self.simple(0x119, 0, vhca, 0, 0, 0, buffer.mkey, len(image))

    def save_all(self, vhca: int, buffer: "Buffer", *, inc: bool = False, chunk: bool = True) -> list[bytes]:
        """A stopped VF's whole state, or what is left of it."""
        _, required, _ = self.query(vhca, inc=inc, chunk=chunk)
        images = []
        while required:
            assert required <= buffer.size
            image, required = self.save(vhca, buffer, inc=inc or bool(images))
            images.append(image)
        return images


class Buffer:
    """Memory with a PD and a key: one big entry (`big`), or an entry for each page."""

    def __init__(self, raw: Raw, size: int, *, big: bool = True) -> None:
        self.raw, self.size = raw, size
        self.log = max(12, (size - 1).bit_length()) if big else 12
        self.iova = raw.memory.take(size, 1 << self.log)
        self.pd = words(raw.simple(0x800))[2]
        pages = [self.iova] if big else [self.iova + at for at in range(0, size, PAGE)]
        self.mkey = words(raw.command(create_mkey(self.pd, size, pages, self.log)))[2] << 8

    def get(self, length: int) -> bytes:
        return self.raw.port.load(self.iova, length)

    def put(self, data: bytes) -> None:
        self.raw.port.store(self.iova, data)

    def close(self) -> None:
        self.raw.simple(0x202, 0, self.mkey >> 8)
        self.raw.simple(0x801, 0, self.pd)


def create_mkey(pd: int, length: int, pages: list[int], log: int = 12) -> bytes:
    entries = pages + [0] * (len(pages) % 2)
    head = put(
        0x110,
        (0, 16, 0x200),
        (0x10, 8, 0x3D),
        (0x14, 8, 0xFFFFFF),
        (0x1C, 0, pd),
        (0x28, 0, length >> 32),
        (0x2C, 0, length & 0xFFFFFFFF),
        (0x44, 0, len(entries) // 2),
        (0x48, 0, log),
        (0x60, 0, len(entries) // 2),
    )
    return head + struct.pack(f">{len(entries)}Q", *entries)


class EventQueue:
    """An event queue of 2^log entries on vector 0, read without interrupts."""

    def __init__(self, raw: Raw, mask: int, *, log: int = 6, vector: int = 0) -> None:
        self.raw, self.log = raw, log
        self.ci = 0
        self.kept: list[bytes] = []
        self.iova = raw.memory.take(max(PAGE, 64 << log))
        raw.port.store(self.iova, (bytes(63) + b"\1") * (1 << log))
        self.uar = words(raw.simple(0x802))[2]
        pages = [self.iova + at for at in range(0, max(PAGE, 64 << log), PAGE)]
        head = put(
            0x110,
            (0, 16, 0x301),
            (0x1C, 24, log),
            (0x1C, 0, self.uar),
            (0x24, 0, vector),
            (0x58, 0, mask >> 32 & 0xFFFFFFFF),
            (0x5C, 0, mask & 0xFFFFFFFF),
        )
        self.number = words(raw.command(head + struct.pack(f">{len(pages)}Q", *pages)))[2] & 0xFF
        self.arm()

    def arm(self) -> None:
        self.raw.write32(self.uar * PAGE + 0x40, self.number << 24 | self.ci & 0xFFFFFF)

    def read(self) -> list[bytes]:
        """New entries; the queue is armed again after them."""
        found = []
        while True:
            entry = self.raw.port.load(self.iova + 64 * (self.ci % (1 << self.log)), 64)
            if entry[63] & 1 != self.ci >> self.log & 1:
                break
            self.ci += 1
            found.append(entry)
        if found:
            self.arm()
        return found

    def close(self) -> None:
        self.raw.simple(0x302, 0, self.number)
        self.raw.simple(0x803, 0, self.uar)
