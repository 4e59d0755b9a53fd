"""Firmware of a physical function and one virtual function, scripted just far enough for the driver's tests.

Written with plain slices from the description of the interface, without the driver's tables. It checks what it is
given and keeps what must not be in `strays`. State of the virtual function: `image`, which saves hand out.
"""

import mmap
import struct
from collections import deque
from dataclasses import dataclass, field

from tests.plugins.fake_host import FakeHost
from vfu_server.host_device import DmaMap, RegionInfo
from vfu_server.uapi import PCI_COMMAND_MASTER, RegionIndex

VHCA = 0x123
LOG_ENTRIES, LOG_STRIDE = 5, 6
CAP = 0x1000


def u32(data, at):
    return int.from_bytes(data[at : at + 4], "big")


def u64(data, at):
    return int.from_bytes(data[at : at + 8], "big")


def p32(data, at, value):
    data[at : at + 4] = value.to_bytes(4, "big")


def caps_general():
    block = bytearray(CAP)
    p32(block, 0x0, 1)
    p32(block, 0x4, 1 << 31 | 0x7)
    p32(block, 0x38, 20 << 24)
    p32(block, 0x40, 1 << 14)
    p32(block, 0x4C, 1 << 25)
    p32(block, 0xAC, 1 << 6)
    p32(block, 0xD0, 1 << 18)
    return block


def caps_general_2(chunks):
    block = bytearray(CAP)
    p32(block, 0x18, 1 << 23 | 1 << 22 | (1 << 15 if chunks else 0) | 1 << 6)
    p32(block, 0x3C, 1 << 6)
    return block


def caps_tracker():
    block = bytearray(CAP)
    p32(block, 0, 4 << 24 | 2 << 16 | 12 << 8 | 40)
    p32(block, 4, 12 << 24 | 13 << 16 | 12 << 8 | 20)
    return block


@dataclass
class Key:
    """An mkey: where each page of it is."""

    shift: int
    length: int
    pages: list[int] = field(default_factory=list)


class FakeConnectx(FakeHost):
    """The physical function. `refuse[opcode]`: status to answer with, as often as the list is long; `mute`: opcodes
    that never complete.
    """

    bar_size = 0x100000
    ids = (0x15B3, 0x1021, 0x00)

    def __init__(self, name="/run/model.pf", *, chunks=True):
        super().__init__(name)
        self.iova_ranges = ()
        self.regions = [
            RegionInfo(i, self.bar_size if i == 0 else 0x1000 if i == RegionIndex.CONFIG else 0) for i in range(9)
        ]
        self.maps = {}
        self.command = 0
        self.general, self.general_2, self.tracker = caps_general(), caps_general_2(chunks), caps_tracker()
        self.vf_migratable = False
        self.chunks = chunks
        self.refuse = {}
        self.mute = set()
        self.wrong_token = set()
        """Opcodes whose next entry comes back with another token."""
        self.log = []
        """(opcode, op_mod, input) of every command."""
        self.boot_pages, self.init_pages = 3, 700
        self.image = bytes(range(256)) * 40
        self.chunk = 4096
        self.loaded = []
        self.written = {}
        self.can_reset = True
        self.resets = 0
        self.health_stands = False
        self.fatal = 0
        self.clear()

    def clear(self):
        self.queue = 0
        self.enabled = set()
        self.pages = {}
        self.keys = {}
        self.pds = set()
        self.next = 0x10
        self.eq = None
        self.completion_eqs = set()
        self.stopped = set()
        self.tracking = False
        self.dirty = b""
        self.rest = None
        self.objects = {}
        self.qps = {}
        self.cqs = {}
        self.up = False
        self.beats = 0
        self.stuck = []

    async def reset(self):
        self.resets += 1
        self.fatal = 0
        self.clear()
        return "function"

    # memory

    async def dma_map(self, dma_map: DmaMap):
        assert dma_map.iova
        assert not any(dma_map.iova < at + len(m) and at < dma_map.iova + dma_map.size for at, m in self.maps.items())
        self.maps[dma_map.iova] = mmap.mmap(dma_map.fd, dma_map.size)

    async def dma_unmap(self, iova, size):
        assert len(self.maps.pop(iova)) == size

    def at(self, iova, length):
        for base, memory in self.maps.items():
            if base <= iova and iova + length <= base + len(memory):
                return memory, iova - base
        raise AssertionError(f"DMA to {iova:#x}+{length:#x}")

    def peek(self, iova, length):
        assert self.command & PCI_COMMAND_MASTER
        memory, at = self.at(iova, length)
        return memory[at : at + length]

    def poke(self, iova, data):
        memory, at = self.at(iova, len(data))
        memory[at : at + len(data)] = data

    # registers

    def bar_read(self, offset, width):
        value = 0
        if offset == 0x0:
            value = 41 << 16 | 28
        elif offset == 0x4:
            value = 5 << 16 | 1000
        elif offset == 0x14:
            value = LOG_ENTRIES << 4 | LOG_STRIDE
        elif offset == 0x230:
            value = 0x28
        elif offset == 0x238:
            value = 1 << 31 if self.fatal else 0
        elif offset == 0x23C:
            value = self.fatal << 16
        elif offset == 0x1010:
            self.beats += 0 if self.health_stands else 1
            value = self.beats
        return int.from_bytes(value.to_bytes(4, "big"), "little")

    def bar_write(self, offset, width, value):
        value = int.from_bytes(value.to_bytes(4, "little"), "big")
        if offset == 0x10:
            self.queue = value << 32 | self.queue & 0xFFFFFFFF
        elif offset == 0x14:
            self.queue = self.queue & ~0xFFFFFFFF | value
        elif offset == 0x18:
            for index in range(32):
                if value >> index & 1:
                    self.execute(index)

    # commands

    def execute(self, index):
        place = self.queue + (index << LOG_STRIDE)
        entry = self.peek(place, 64)
        xor = 0
        for byte in entry:
            xor ^= byte
        assert xor == 0xFF, "entry is not signed"
        assert entry[0] == 7
        assert entry[0x3F] == 1
        length, room, token = u32(entry, 4), u32(entry, 0x38), entry[0x3C]
        assert token
        data = bytearray(entry[0x10:0x20]) + self.chain(u64(entry, 8), length - 16, token)
        data = bytes(data[:length])
        opcode = u32(data, 0) >> 16
        self.log.append((opcode, u32(data, 4) & 0xFFFF, data))
        if opcode in self.mute:
            self.stuck.append(place)
            return
        if self.refuse.get(opcode):
            status = self.refuse[opcode].pop(0)
            out = bytearray(room)
            out[0] = status
            p32(out, 4, 0xBAD)
        else:
            out = self.answer(opcode, u32(data, 4) & 0xFFFF, data)
            assert len(out) == room, f"{opcode:#x}: room for {room}, {len(out)} due"
        self.put_chain(u64(entry, 0x30), out[16:], token)
        self.poke(place + 0x20, bytes(out[:16]))
        if opcode in self.wrong_token:
            self.wrong_token.discard(opcode)
            self.poke(place + 0x3C, bytes([token ^ 0xFF]))
        self.poke(place + 0x3F, b"\0")

    def complete_stuck(self):
        for place in self.stuck:
            self.poke(place + 0x3F, b"\0")
        self.stuck.clear()

    def boxes(self, at, length, token):
        for number in range(-(-max(0, length) // 512)):
            box = self.peek(at, 576)
            assert u32(box, 0x238) == number
            assert box[0x23D] == token
            yield at, box
            at = u64(box, 0x230)

    def chain(self, at, length, token):
        return b"".join(box[:512] for _, box in self.boxes(at, length, token))

    def put_chain(self, at, data, token):
        for number, (place, _) in enumerate(self.boxes(at, len(data), token)):
            self.poke(place, bytes(data[512 * number : 512 * number + 512]))

    def answer(self, opcode, mod, data):
        name = f"do_{opcode:x}"
        if hasattr(self, name):
            return bytearray(getattr(self, name)(mod, data))
        self.strays.append(f"unknown opcode {opcode:#x}")
        out = bytearray(16)
        out[0] = 2
        return out

    def fresh(self, size=16):
        self.next += 1
        out = bytearray(size)
        p32(out, 8, self.next)
        return out

    def do_104(self, mod, data):
        self.enabled.add(u32(data, 8) & 0xFFFF)
        return bytes(16)

    def do_105(self, mod, data):
        self.enabled.discard(u32(data, 8) & 0xFFFF)
        return bytes(16)

    def do_10a(self, mod, data):
        out = bytearray(0x70)
        p32(out, 0x6C, 3)
        return out

    def do_10b(self, mod, data):
        return bytes(16)

    def do_107(self, mod, data):
        out = bytearray(16)
        p32(out, 0xC, {1: self.boot_pages, 2: self.init_pages}[mod])
        return out

    def do_108(self, mod, data):
        function, count = u32(data, 8) & 0xFFFF, u32(data, 12)
        mine = self.pages.setdefault(function, [])
        if mod == 1:
            assert len(data) == 16 + 8 * count
            for n in range(count):
                page = u64(data, 16 + 8 * n)
                self.peek(page, 4096)
                mine.append(page)
            return bytes(16)
        if mod == 0:
            assert not count
            return bytes(16)
        assert mod == 2
        given, self.pages[function] = mine[:count], mine[count:]
        out = bytearray(16)
        p32(out, 8, len(given))
        return out + b"".join(page.to_bytes(8, "big") for page in given) + bytes(8 * (count - len(given)))

    def do_805(self, mod, data):
        return bytes(32)

    def do_100(self, mod, data):
        kind, function = mod >> 1, u32(data, 8) & 0xFFFF
        if kind == 0:
            block = bytearray(self.general)
            if function:
                p32(block, 4, VHCA)
        elif kind == 0x20:
            block = bytearray(self.general_2)
            if function:
                p32(block, 0x10, 1 << 31 if self.vf_migratable else 0)
        else:
            block = {0x26: self.tracker}.get(kind, bytearray(CAP))
        return bytes(16) + block

    def do_109(self, mod, data):
        assert len(data) == 0x1010
        if mod >> 1 == 0x20 and u32(data, 8) >> 31:
            self.vf_migratable = bool(u32(data, 0x20) >> 31)
        elif mod == 0:
            assert u32(data, 0x10 + 0x40) >> 14 & 3 == 0, "checksums stay on"
            assert data[0x10 + 0x50 :] == self.general[0x50:], "not the queried block"
        return bytes(16)

    def do_102(self, mod, data):
        self.up = True
        return bytes(16)

    def do_103(self, mod, data):
        self.up = False
        return bytes(16)

    def do_101(self, mod, data):
        out = bytearray(0x110)
        out[0x100:0x110] = b"MT_0000000359".ljust(16, b"\0")
        return out

    def do_802(self, mod, data):
        out = bytearray(16)
        p32(out, 8, 5)
        return out

    def do_803(self, mod, data):
        assert u32(data, 8) == 5
        return bytes(16)

    def do_301(self, mod, data):
        size = 1 << (u32(data, 0x1C) >> 24 & 0x1F)
        assert self.eq is None or not u64(data, 0x58)
        pages = [u64(data, 0x110 + 8 * n) for n in range(size * 64 // 4096)]
        completions = self.eq is not None
        if not completions:
            assert (u64(data, 0x58) >> 0xB) & 1
            self.eq = {"pages": pages, "size": size, "pi": 0}
        for n in range(size):
            assert self.peek(pages[n * 64 // 4096] + n * 64 % 4096 + 63, 1) == b"\1"
        out = self.fresh()
        if completions:
            self.completion_eqs.add(self.next)
        return out

    def do_302(self, mod, data):
        if u32(data, 8) in self.completion_eqs:
            self.completion_eqs.remove(u32(data, 8))
        else:
            self.eq = None
        return bytes(16)

    def event(self, kind, body):
        n = self.eq["pi"] % self.eq["size"]
        owner = self.eq["pi"] // self.eq["size"] & 1
        entry = bytearray(64)
        entry[1] = kind
        entry[0x20 : 0x20 + len(body)] = body
        place = self.eq["pages"][n * 64 // 4096] + n * 64 % 4096
        entry[63] = 1 - owner
        self.poke(place, bytes(entry[:63]))
        self.poke(place + 63, bytes((owner,)))
        self.eq["pi"] += 1

    def do_800(self, mod, data):
        out = self.fresh()
        self.pds.add(self.next)
        return out

    def do_801(self, mod, data):
        self.pds.remove(u32(data, 8))
        return bytes(16)

    def do_200(self, mod, data):
        assert u32(data, 0x10) >> 8 & 3 == 1
        assert u32(data, 0x1C) & 0xFFFFFF in self.pds
        entries, length, shift = u32(data, 0x60), u64(data, 0x28), u32(data, 0x48) & 0x3F
        assert u32(data, 0x44) == entries
        assert len(data) == 0x110 + 16 * entries
        count = -(-length >> shift)
        key = Key(shift, length, [u64(data, 0x110 + 8 * n) for n in range(count)])
        out = self.fresh()
        self.keys[self.next] = key
        return out

    def do_202(self, mod, data):
        del self.keys[u32(data, 8)]
        return bytes(16)

    def through(self, mkey, offset, length):
        key = self.keys[mkey >> 8]
        assert offset + length <= key.length
        while length:
            page, inside = offset >> key.shift, offset & ((1 << key.shift) - 1)
            step = min(length, (1 << key.shift) - inside)
            yield key.pages[page] + inside, step
            offset, length = offset + step, length - step

    # migration

    def state(self, bad):
        out = bytearray(16)
        out[0] = 9 if bad else 0
        return out

    def do_115(self, mod, data):
        assert u32(data, 8) == VHCA
        part = ("initiator", "responder")[mod]
        bad = part in self.stopped or (part == "responder" and "initiator" not in self.stopped)
        if not bad:
            self.stopped.add(part)
        return self.state(bad)

    def do_116(self, mod, data):
        part = ("responder", "initiator")[mod]
        bad = part not in self.stopped or (part == "initiator" and "responder" in self.stopped)
        if not bad:
            self.stopped.discard(part)
        return self.state(bad)

    def do_117(self, mod, data):
        incremental = u32(data, 8) >> 31
        assert u32(data, 8) >> 30 & 1 == self.chunks
        out = bytearray(0x40)
        if incremental and not self.tracking:
            out[0] = 9
            return out
        left = len(self.dirty) if incremental else len(self.image)
        p32(out, 0x10, min(left, self.chunk) if self.chunks else left)
        if self.chunks:
            out[0x18:0x20] = left.to_bytes(8, "big")
        return out

    def do_118(self, mod, data):
        incremental, track = u32(data, 8) >> 31, u32(data, 8) >> 30 & 1
        mkey, size = u32(data, 0x18), u32(data, 0x1C)
        if (incremental and not self.tracking and self.rest is None) or (track and self.stopped):
            return self.state(True)
        if self.rest is None:
            self.rest = self.dirty if incremental else self.image
        if track:
            self.tracking = True
            given, self.dirty = self.rest[:size], self.rest[size:]
            self.rest = None
        else:
            step = min(size, self.chunk) if self.chunks else size
            given, self.rest = self.rest[:step], self.rest[step:]
            assert self.chunks or not self.rest
        at = 0
        for place, step in self.through(mkey, 0, len(given)):
            self.poke(place, given[at : at + step])
            at += step
        out = bytearray(16)
        p32(out, 8, len(given))
        if not track:
            if self.rest and "responder" in self.stopped:
                p32(out, 12, min(len(self.rest), self.chunk))
            else:
                self.rest, self.tracking, self.dirty = None, False, b""
        return out

    def do_119(self, mod, data):
        if self.stopped != {"initiator", "responder"}:
            return self.state(True)
        parts = [self.peek(place, step) for place, step in self.through(u32(data, 0x18), 0, u32(data, 0x1C))]
        self.loaded.append(b"".join(parts))
        return bytes(16)

    # tracker

    def do_400(self, mod, data):
        out = self.fresh()
        assert u32(data, 0x24) in self.completion_eqs
        log_size, dbr = u32(data, 0x1C) >> 24 & 0x1F, u64(data, 0x48)
        self.cqs[self.next] = {"size": 1 << log_size, "page": u64(data, 0x110), "dbr": dbr, "pi": 0}
        assert self.peek(u64(data, 0x110) + 63, 1) == b"\xf0"
        return out

    def do_401(self, mod, data):
        del self.cqs[u32(data, 8)]
        return bytes(16)

    def do_500(self, mod, data):
        qpc = data[0x18:]
        kind = u32(qpc, 0xAC) >> 24 & 7
        out = self.fresh()
        self.qps[self.next] = {"kind": kind, "state": "reset", "remote": 0}
        if kind == 0:
            size = 1 << (u32(qpc, 8) >> 19 & 15)
            self.qps[self.next] |= {"size": size, "page": u64(data, 0x110), "dbr": u64(qpc, 0xA0), "ci": 0}
            self.qps[self.next]["cq"] = u32(qpc, 0x9C)
        return out

    def do_501(self, mod, data):
        del self.qps[u32(data, 8)]
        return bytes(16)

    def do_502(self, mod, data):
        self.qps[u32(data, 8)]["state"] = "init"
        return bytes(16)

    def do_503(self, mod, data):
        pair = self.qps[u32(data, 8)]
        assert pair["state"] == "init"
        pair["state"], pair["remote"] = "rtr", u32(data[0x18:], 0x14) & 0xFFFFFF
        return bytes(16)

    def do_504(self, mod, data):
        pair = self.qps[u32(data, 8)]
        assert pair["state"] == "rtr"
        pair["state"] = "rts"
        return bytes(16)

    def do_a00(self, mod, data):
        assert mod == 0x46
        sender = u32(data, 0x24) & 0xFFFFFF
        assert self.qps[sender]["state"] == "rts"
        ranges = [(u64(data, 0x40 + 16 * n), u64(data, 0x48 + 16 * n)) for n in range(u32(data, 0x28) & 0xFF)]
        assert len(data) == 0x40 + 16 * len(ranges)
        total = sum(length for _, length in ranges)
        assert 1 << (u32(data, 0x20) >> 16 & 0xFF) >= total > 1 << (u32(data, 0x20) >> 16 & 0xFF) - 1
        out = self.fresh()
        self.objects[self.next] = {"sender": sender, "ranges": ranges, "state": 0}
        return out

    def do_a01(self, mod, data):
        one = self.objects[u32(data, 8)]
        assert u64(data, 0x10) == 3
        assert u32(data, 0x20) >> 28 == 1
        start, length = u64(data, 0x30), u64(data, 0x38)
        found = [a for a in sorted(self.dirty_pages) if start <= a < start + length]
        self.dirty_pages = {a for a in self.dirty_pages if a not in found}
        receiver = self.qps[self.qps[one["sender"]]["remote"]]
        most = 1 << 13 >> 3
        groups = [found[n : n + most] for n in range(0, len(found), most)] or [[]]
        self.reports = deque((group, n + 1 == len(groups)) for n, group in enumerate(groups))
        while self.reports and self.posted(receiver):
            self.send(receiver, *self.reports.popleft())
        assert not self.reports, "more messages than slots"
        return bytes(16)

    dirty_pages = frozenset()

    def posted(self, receiver):
        return (u32(self.peek(receiver["dbr"], 4), 0) - receiver["ci"]) & 0xFFFF

    def send(self, receiver, addresses, last):
        index = receiver["ci"] % receiver["size"]
        wqe = self.peek(receiver["page"] + 16 * index, 16)
        data = b"".join(a.to_bytes(8, "big") for a in addresses)
        assert len(data) <= u32(wqe, 0)
        at = 0
        for place, step in self.through(u32(wqe, 4), u64(wqe, 8), len(data)):
            self.poke(place, data[at : at + step])
            at += step
        cq = self.cqs[receiver["cq"]]
        cqe = bytearray(64)
        p32(cqe, 0x24, (0 if last else 1) << 28)
        p32(cqe, 0x2C, len(data))
        struct.pack_into(">H", cqe, 0x3C, receiver["ci"] & 0xFFFF)
        cqe[0x3F] = 3 << 4 | (cq["pi"] // cq["size"] & 1)
        self.poke(cq["page"] + 64 * (cq["pi"] % cq["size"]), bytes(cqe))
        cq["pi"] += 1
        receiver["ci"] += 1

    def do_a02(self, mod, data):
        out = bytearray(0x40)
        p32(out, 0x20, self.objects[u32(data, 8)]["state"] << 28)
        return out

    def do_a03(self, mod, data):
        del self.objects[u32(data, 8)]
        return bytes(16)
