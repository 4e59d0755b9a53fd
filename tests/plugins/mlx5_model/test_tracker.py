"""The page tracker, driven as the kernel does: queue pairs in loopback, receive buffers, completions, reports."""

import struct

import pytest

from plugins.mlx5.models.traffic import Traffic
from tests.plugins.mlx5_model.bench import Card
from tests.plugins.mlx5_model.raw import PAGE, Buffer, EventQueue, Raw, StatusError, put, words

BAD_PARAM, BAD_RES, BUSY, LIMIT, BAD_STATE, BAD_QP = 3, 5, 6, 8, 9, 0x10
LOG_SLOTS, LOG_MESSAGE = 3, 12
SLOTS, MESSAGE = 1 << LOG_SLOTS, 1 << LOG_MESSAGE
EVENTS = 0xC00 | 1 << 0x27 | 1 << 4 | 1 << 5 | 1 << 0x10 | 1 << 0x11
VF_SPACE = 4 << 20


def status(call, *args, **kwargs) -> int:
    with pytest.raises(StatusError) as caught:
        call(*args, **kwargs)
    return caught.value.status


class Track:
    """Everything that a tracker needs, and the tracker over the whole memory of VF 0."""

    def __init__(self, slots_posted: int = SLOTS, ranges=((0, VF_SPACE),)) -> None:
        self.card = Card()
        self.raw = raw = Raw(self.card.pf).boot(eq=False)
        raw.eq = EventQueue(raw, EVENTS)
        self.vhca = raw.enable_vf()
        self.uar = raw.eq.uar
        self.records = raw.memory.take(PAGE)
        raw.port.store(self.records, bytes(PAGE))
        self.completion_queue = raw.memory.take(PAGE)
        raw.port.store(self.completion_queue, (bytes(63) + b"\xf1") * SLOTS)
        self.cqn = words(raw.command(self.create_cq()))[2]
        self.buffer = Buffer(raw, MESSAGE * SLOTS)
        self.requests = raw.memory.take(PAGE)
        self.host, self.hardware = (
            words(raw.command(self.create_qp(host=True)))[2],
            words(raw.command(self.create_qp(host=False)))[2],
        )
        self.ci = 0
        self.posted = 0
        self.post(slots_posted)
        self.connect()
        self.number = words(raw.command(self.create(ranges)))[2]

    def create_cq(self) -> bytes:
        head = put(
            0x110,
            (0, 16, 0x400),
            (0x1C, 24, LOG_SLOTS),
            (0x1C, 0, self.uar),
            (0x24, 0, self.raw.eq.number),
            (0x4C, 0, self.records),
        )
        return head + struct.pack(">Q", self.completion_queue)

    def create_qp(self, *, host: bool) -> bytes:
        common = [
            (0, 16, 0x500),
            (0x18, 11, 3),
            (0x1C, 0, self.buffer.pd),
            (0x20, 15, 1),
            (0x20, 6, 1),
            (0x24, 0, self.uar),
            (0x28, 0, 0xFFFFFF),
        ]
        if not host:
            return put(0x110, *common, (0xC4, 24, 3))
        own = [(0x20, 19, LOG_SLOTS), (0xB4, 0, self.cqn), (0xBC, 0, self.records + 64)]
        return put(0x110, *common, *own) + struct.pack(">Q", self.requests)

    def post(self, count: int) -> None:
        for _ in range(count):
            slot = self.posted % SLOTS
            entry = struct.pack(">IIQ", MESSAGE, self.buffer.mkey, slot * MESSAGE)
            self.raw.port.store(self.requests + 16 * slot, entry)
            self.posted += 1
        self.raw.port.store(self.records + 64, struct.pack(">I", self.posted & 0xFFFF))

    def connect(self) -> None:
        raw = self.raw
        for qpn in (self.host, self.hardware):
            rights = [(0xA8, 15, 1), (0xA8, 14, 1)]
            raw.command(put(0x110, (0, 16, 0x502), (8, 0, qpn), (0x18, 11, 3), (0x54, 16, 1), *rights))
        for qpn, other in ((self.host, self.hardware), (self.hardware, self.host)):
            path = [(0x20, 29, 5), (0x20, 24, 30), (0x2C, 0, other), (0x30, 31, 1), (0x54, 16, 1), (0xAC, 24, 1)]
            raw.command(put(0x110, (0, 16, 0x503), (8, 0, qpn), *path))
        timers = [(0x88, 16, 7), (0x88, 13, 7), (0x38, 27, 8)]
        raw.command(put(0x110, (0, 16, 0x504), (8, 0, self.hardware), *timers))

    def create(self, ranges, *, log_space: int = 22, page: int = 12, vhca: int | None = None) -> bytes:
        head = put(
            0x40,
            (0, 16, 0xA00),
            (4, 0, 0x46),
            (0x18, 0, self.vhca if vhca is None else vhca),
            (0x20, 24, 1),
            (0x20, 16, log_space),
            (0x20, 8, page),
            (0x20, 0, LOG_MESSAGE),
            (0x24, 0, self.hardware),
            (0x28, 0, len(ranges)),
        )
        return head + b"".join(struct.pack(">QQ", *found) for found in ranges)

    def order_report(self, start: int = 0, length: int = VF_SPACE) -> None:
        self.raw.command(
            put(
                0x40,
                (0, 16, 0xA01),
                (4, 0, 0x46),
                (8, 0, self.number),
                (0x14, 0, 3),
                (0x20, 28, 1),
                (0x34, 0, start),
                (0x3C, 0, length),
            )
        )

    def completion(self) -> tuple[int, int, int] | None:
        """(state, bytes, slot) of the next completion."""
        port = self.raw.port
        entry = port.load(self.completion_queue + 64 * (self.ci % SLOTS), 64)
        if entry[63] >> 4 == 0xF or entry[63] & 1 != self.ci >> LOG_SLOTS & 1:
            return None
        assert entry[63] >> 4 == 3
        self.ci += 1
        immediate, count = struct.unpack_from(">I4xI", entry, 0x24)
        port.store(self.records, struct.pack(">I", self.ci & 0xFFFFFF))
        return immediate >> 28, count, int.from_bytes(entry[0x3C:0x3E], "big") % SLOTS

    def collect(self) -> list[int]:
        """The pages of a report; stops when the tracker says that it is done."""
        pages: list[int] = []
        while True:
            state, count, slot = self.next_completion()
            data = self.raw.port.load(self.buffer.iova + slot * MESSAGE, count)
            pages += struct.unpack(f">{count // 8}Q", data)
            self.post(1)
            if state != 1:
                assert state == 0, "the tracker has failed"
                return pages
            assert count

    def next_completion(self) -> tuple[int, int, int]:
        found: list[tuple[int, int, int]] = []

        def came() -> bool:
            entry = self.completion()
            if entry is not None:
                found.append(entry)
            return bool(found)

        self.raw.port.wait(came, "a completion")
        return found[0]

    def query(self) -> int:
        return words(self.raw.simple(0xA02, 0x46, self.number, room=0x40))[8] >> 28

    def close(self) -> None:
        raw = self.raw
        raw.simple(0xA03, 0x46, self.number)
        raw.simple(0x501, 0, self.hardware)
        raw.simple(0x501, 0, self.host)
        raw.simple(0x401, 0, self.cqn)
        self.buffer.close()


def written(card: Card) -> Traffic:
    traffic = Traffic(card.vfs[0])
    traffic.start()
    return traffic


def test_reports_have_exactly_what_was_written():
    track = Track()
    traffic = written(track.card)
    before = bytes(track.card.vfs[0].bus.memory)
    traffic.run(3)
    after = bytes(track.card.vfs[0].bus.memory)
    track.order_report()
    pages = track.collect()
    changed = {at for at in range(0, VF_SPACE, PAGE) if before[at : at + PAGE] != after[at : at + PAGE]}
    guests = {at for at in changed if 0x100000 <= at < 0x102000 or 0x110000 <= at < 0x130000}
    assert changed - guests <= set(pages)
    assert len(pages) == len(set(pages))
    assert not set(pages) & guests, "what the guest itself wrote is not the device's"
    assert track.query() == 0
    track.order_report()
    assert track.collect() == []
    track.close()
    assert track.card.violations == 0


def test_only_the_range_that_was_asked_for_is_forgotten():
    track = Track()
    written(track.card).run(40)
    track.order_report(0x102000, 0x1000)
    assert track.collect() == [0x102000]
    track.order_report(0, 0x100000)
    assert track.collect() == []
    track.order_report()
    pages = track.collect()
    assert pages
    assert 0x102000 not in pages
    assert pages == sorted(pages)


def test_writes_outside_of_the_ranges_are_not_tracked():
    track = Track(ranges=((0x102000, 0x1000), (0x200000, 0x1000)))
    written(track.card).run(10)
    track.order_report()
    assert track.collect() == [0x102000]


def test_long_reports_wait_for_buffers():
    """More messages than slots: the hardware waits until slots are posted again."""
    track = Track(slots_posted=1)
    engine = track.card.models["vf0"]
    tracker = engine._card.tracker
    for page in range(0, VF_SPACE, PAGE):
        tracker.wrote(track.vhca, page, 1)
    track.order_report()
    track.card.clock.advance(1.0)
    assert track.query() == 1
    assert sorted(track.collect()) == list(range(0, VF_SPACE, PAGE))
    assert track.query() == 0
    assert track.card.violations == 0


def test_completion_events_when_armed():
    track = Track()
    raw = track.raw
    written(track.card).run(2)
    raw.poll()
    raw.eq.kept.clear()
    word = 0 << 28 | track.ci
    raw.port.store(track.records + 4, struct.pack(">I", word))
    data = struct.pack(">II", word, track.cqn)
    raw.port.write(0, track.uar * PAGE + 0x20, 8, int.from_bytes(data, "little"))
    track.order_report()
    track.collect()
    raw.poll()
    events = [event for event in raw.eq.kept if event[1] == 0]
    assert [int.from_bytes(event[0x38:0x3C], "big") for event in events] == [track.cqn]
    changes = [event for event in raw.eq.kept if event[1] == 0x27]
    assert [struct.unpack(">HHI", event[0x20:0x28]) for event in changes] == [(0, 0x46, track.number)]
    raw.write32(track.uar * PAGE + 0x20, word)
    raw.write32(track.uar * PAGE + 0x24, track.cqn)
    assert track.card.state()["violation.cq-doorbell"] == 1, "the number of the arm has moved on"


def test_a_tracker_that_fails():
    track = Track()
    track.card.order("tracker-error")
    track.order_report()
    with pytest.raises(AssertionError, match="has failed"):
        track.collect()
    assert track.query() == 2
    assert status(track.order_report) == BAD_STATE
    track.close()


def test_a_buffer_that_is_too_small_breaks_the_pair():
    track = Track(slots_posted=0)
    raw = track.raw
    raw.port.store(track.requests, struct.pack(">IIQ", 8, track.buffer.mkey, 0))
    raw.port.store(track.records + 64, struct.pack(">I", 1))
    written(track.card).run(2)
    raw.poll()
    raw.eq.kept.clear()
    track.order_report()
    track.card.clock.advance(1.0)
    assert track.query() == 2
    raw.poll()
    errors = [event for event in raw.eq.kept if event[1] == 0x11]
    assert {int.from_bytes(event[0x38:0x3C], "big") for event in errors} == {track.host, track.hardware}
    assert track.card.state()["violation.qp-error"] == 2


def test_completions_that_are_not_read_in_time():
    track = Track()
    for page in range(0, VF_SPACE, PAGE):
        track.card.models["vf0"]._card.tracker.wrote(track.vhca, page, 1)
    raw = track.raw
    for number in range(5):  # two messages each: the last report finds the completion queue full
        track.order_report(0x10000 * number, 0x10000)
        track.card.clock.advance(1.0)
        track.post(2)
    assert track.query() == 2
    raw.poll()
    errors = [event for event in raw.eq.kept if event[1] == 4]
    assert [int.from_bytes(event[0x20:0x24], "big") for event in errors] == [track.cqn]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"ranges": ((0, 0x1000),) * 9}, BAD_PARAM),
        ({"ranges": ()}, BAD_PARAM),
        ({"ranges": ((0, 0),)}, BAD_PARAM),
        ({"ranges": ((0, VF_SPACE + 1),)}, BAD_PARAM),
        ({"ranges": ((0, VF_SPACE),), "log_space": 49}, BAD_PARAM),
        ({"ranges": ((0, VF_SPACE),), "page": 11}, BAD_PARAM),
        ({"ranges": ((0, VF_SPACE),), "page": 22}, BAD_PARAM),
        ({"ranges": ((0, VF_SPACE),), "vhca": 0x99}, BAD_RES),
        ({"ranges": ((0, VF_SPACE),)}, LIMIT),
    ],
)
def test_trackers_that_cannot_be(how, expected):
    track = Track()
    assert status(track.raw.command, track.create(**how)) == expected


def test_objects_go_in_the_right_order():
    track = Track()
    raw = track.raw
    assert status(raw.simple, 0x501, 0, track.hardware) == BUSY
    assert status(raw.simple, 0x401, 0, track.cqn) == BUSY
    assert status(raw.simple, 0x302, 0, raw.eq.number) == BUSY
    assert status(raw.simple, 0xA03, 0x45, track.number) == BAD_PARAM
    assert status(raw.simple, 0xA03, 0x46, 99) == BAD_RES
    assert status(raw.command, put(0x110, (0, 16, 0x502), (8, 0, track.host), (0x18, 11, 3), (0x54, 16, 1))) == BAD_QP
    assert status(track.order_report, 0x800) == BAD_PARAM
    track.close()


def test_a_card_without_trackers():
    track = Track()
    card = Card(caps={"adv_virtualization": 0})
    raw = Raw(card.pf).boot()
    raw.enable_vf()
    assert status(raw.command, track.create(((0, 0x1000),))) == 2
