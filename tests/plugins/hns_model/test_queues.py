"""Queues that work: each entry once, in order, over the rings' ends, with right results; and doorbells of all sorts."""

import struct
import zlib

import pytest

from plugins.hns.models.guest_driver import DeviceError
from plugins.hns.models.traffic_work import COPY, DEFLATE, INFLATE
from tests.plugins.hns_model.rig import Accelerator, Load, counted


def bell(queue: int, command: int, index: int, priority: int = 0, random: int = 0) -> int:
    return queue | command << 12 | random << 16 | index << 32 | priority << 48


def test_doorbells_as_computed() -> None:
    assert bell(3, 0, 17) == 0x0000001100000003
    assert bell(3, 1, 18, 1) == 0x0001001200001003
    assert bell(3, 0, 0, 1) == 0x0001000000000003


@pytest.mark.parametrize(
    ("kind", "operation"),
    [("zip", COPY), ("zip", DEFLATE), ("zip", INFLATE), ("sec", COPY), ("hpre", COPY)],
)
def test_work_over_the_rings_ends(kind: str, operation: str) -> None:
    device = Accelerator(kind)
    load = Load(device, queues=3, depth=8, operation=operation)
    for count in (7, 5, 7, 1, 6):
        for queue in range(3):
            load.submit(queue, count)
        load.finish()
    assert load.completed == 3 * 26
    assert device.vf.state()["completed"] == 3 * 26
    assert counted(device.vf) == {}
    for queue in range(3):
        sqc, cqc = device.vf.queues.queues[queue].sqc, device.vf.queues.queues[queue].cqc
        assert sqc is not None
        assert cqc is not None
        assert sqc.head == sqc.tail == cqc.tail == cqc.head == 26 % 8
        assert sqc.flags == cqc.flags == 1 << 6  # three times round: an odd number of wraps
        assert cqc.phase == 0


def test_isolated_doorbells() -> None:
    device = Accelerator(queues=3)
    load = Load(device, queues=3, isolation=True)
    load.fill()
    load.finish()
    assert load.completed == 21
    assert counted(device.vf) == {}
    device.vf.write(4, 0x1000, 8, bell(1, 0, 7))
    device.vf.write(4, 0x1000, 4, 0)
    device.vf.write(4, 0x2000, 8, bell(0, 0, 7))
    assert device.vf.read(4, 0x1000, 8) == 0
    device.write(0x30, 0)
    device.vf.write(4, 0x1000, 8, bell(0, 0, 7))
    assert counted(device.vf) == {"doorbell_page": 1, "width": 1, "no_register": 2}
    device.bus.run()
    assert device.vf.state()["completed"] == 21


def test_entries_are_done_one_after_another() -> None:
    device = Accelerator(entry_seconds=1.0)
    load = Load(device, queues=2)
    load.submit(0, 3)
    load.submit(1, 1)
    done = []
    for _ in range(4):
        device.bus.step(0.999)
        done.append(device.vf.state()["completed"])
        device.bus.step(0.001)
    assert done == [0, 2, 3, 4]
    load.finish()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (bell(16, 0, 1), "doorbell_queue"), (bell(0, 2, 0), "doorbell_command"), (bell(0, 0, 8), "doorbell_index"),
        (bell(0, 0, 0, 2), "doorbell_priority"), (bell(0, 0, 5, 0, 9), "doorbell_random"),
        (bell(0, 0, 2), "doorbell_index"), (bell(0, 1, 5), "doorbell_index"), (bell(0, 1, 9), "doorbell_index"),
        (bell(0, 1, 0, 0, 9), "doorbell_random"),
    ],
)  # fmt: skip
def test_bad_doorbells_are_dropped_and_counted(value: int, name: str) -> None:
    device = Accelerator(entry_seconds=1.0)
    load = Load(device, queues=1)
    load.submit(0, 3)
    device.write(0x1000, value, 8)
    assert counted(device.vf) == {name: 1}
    load.finish()
    assert load.completed == 3


def test_a_doorbell_of_a_queue_that_was_never_set() -> None:
    device = Accelerator()
    load = Load(device, queues=1)
    device.bus.memory[load.layout.sqc_table + 32 : load.layout.sqc_table + 64] = bytes(32)
    device.write(0x1000, bell(5, 0, 1), 8)
    device.bus.run()
    assert counted(device.vf) == {"doorbell_unset": 1}
    device.write(0x1000, bell(5, 0, 0, 1), 8)
    device.bus.run()
    assert counted(device.vf) == {"doorbell_unset": 1}


def test_event_doorbells_are_checked() -> None:
    device = Accelerator()
    device.write(0x2000, bell(0, 2, 0), 8)
    Load(device, queues=1)
    for value in (bell(0, 0, 0), bell(1, 2, 0), bell(0, 2, 8), bell(0, 3, 4)):
        device.write(0x2000, value, 8)
    assert counted(device.vf) == {"doorbell_index": 3, "doorbell_command": 1, "doorbell_queue": 1}


def test_v5_drops_doorbells() -> None:
    device = Accelerator(revision=0x51)
    load = Load(device, queues=1)
    device.write(0x38, 1)
    load.submit(0, 2)
    device.bus.run()
    assert device.vf.state()["dropped"] == 2
    device.write(0x38, 0)
    device.pf_write(0x100250, 1 << 1, 8)
    load.driver.ring_eq()
    assert device.vf.state()["dropped"] == 3
    device.pf_write(0x100250, 0, 8)
    load.submit(0, 1)  # its tail covers all
    load.finish()
    assert load.completed == 3


def test_a_completion_queue_that_is_never_read_overflows() -> None:
    device = Accelerator()
    load = Load(device, queues=1)
    load.submit(0, 7)
    device.bus.run()
    load.driver.rings[0].in_flight = 0
    load.submit(0, 1)
    device.bus.run()
    assert device.vf.state()["completed"] == 7
    assert load.driver.errors() == [(0, 0)]
    load.submit(0, 1)
    assert counted(device.vf) == {"doorbell_stopped": 1}
    assert set(device.bus.take_messages()) == {0, 1}


def test_memory_that_is_not_there_stops_the_queue() -> None:
    device = Accelerator()
    load = Load(device, queues=2)
    device.bus.holes.append((load.layout.cq(0), load.layout.cq(0) + 128))
    load.submit(0)
    load.submit(1)
    device.bus.run()
    assert load.driver.errors() == [(0, 2)]
    assert device.vf.state()["dma_errors"] == 1
    load.handle()
    assert load.completed == 1


def test_data_that_is_not_there_is_told_in_the_entry() -> None:
    device = Accelerator()
    load = Load(device, queues=1)
    device.bus.holes.append((load.buffer(0, 0), load.buffer(0, 0) + 1))
    load.submit(0)
    device.bus.run()
    with pytest.raises(DeviceError, match="status 0xf"):
        load.handle()


def scatter(device: Accelerator, at: int, parts: list[tuple[int, int]]) -> None:
    header = struct.pack("<QHHH", 0, 8, len(parts), 8).ljust(64, b"\xaa")
    entries = b"".join(struct.pack("<QQIIQ", iova, 0xDEAD, length, 0, 0) for iova, length in parts)
    device.bus.memory[at : at + 64 + len(entries)] = header + entries


def zip_entry(request: int, length: int, room: int, source: int, destination: int, **words: int) -> bytes:
    found = [0] * 32
    found[4], found[9], found[14] = length, request | 2 << 12, room
    found[7] = 3 << 28
    found[18], found[20] = source, destination
    for name, value in words.items():
        found[int(name[2:])] = value
    return struct.pack("<32I", *found)


def outcome(device: Accelerator, load: Load, entry: bytes) -> tuple[int, int, int, int]:
    index = load.driver.submit(0, entry)
    device.bus.run()
    load.driver.events()
    assert [c.sq_index for c in load.driver.completions(0)] == [index]
    done = struct.unpack("<32I", load.driver.entry(0, index))
    return done[0], done[1], done[2], done[3] & 0xFF


def test_scatter_lists_there_and_back() -> None:
    device = Accelerator()
    data = bytes(range(256)) * 8
    load = Load(device, queues=1, operation=DEFLATE)
    for at, size in ((0x200000, 100), (0x201000, 1000), (0x202000, 948 + 5)):
        device.bus.memory[at : at + size] = bytes(size)
    flat = b"skipp" + data
    places = [(0x200000, 100), (0x201000, 1000), (0x202000, 953)]
    done = 0
    for at, size in places:
        device.bus.memory[at : at + size] = flat[done : done + size]
        done += size
    scatter(device, 0x210000, places)
    scatter(device, 0x211000, [(0x220000, 7), (0x221000, 4096)])
    entry = zip_entry(1 | 1 << 8, len(data), 4096, 0x210000, 0x211000, dw7=3 << 28 | 5, dw8=3)
    consumed, produced, packed, status = outcome(device, load, entry)
    assert (consumed, status, packed) == (len(data), 0, produced)
    result = bytes(device.bus.memory[0x220003:0x220007]) + bytes(device.bus.memory[0x221000:0x222000])
    assert zlib.decompress(result[:produced], -15) == data


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ({"dw9": 4}, 0x01), ({"dw7": 0}, 0x01), ({"dw9": 1 | 2 << 8}, 0x01), ({"dw14": 3}, 0x0E),
        ({"dw18": 0xFFFF0000}, 0x0F), ({"dw9": 1 | 1 << 8}, 0x0F), ({"dw4": 0}, 0x0D),
    ],
)  # fmt: skip
def test_entries_that_cannot_be_done(words: dict[str, int], status: int) -> None:
    device = Accelerator()
    load = Load(device, queues=1, operation=DEFLATE)
    found = outcome(device, load, zip_entry(1, 64, 256, 0x200000, 0x201000, **words))
    assert found[3] == status
    load.submit(0, 1)
    load.finish()


def test_what_is_no_deflate_stream() -> None:
    device = Accelerator()
    load = Load(device, queues=1, operation=INFLATE)
    device.bus.memory[0x200000:0x200040] = b"\xff" * 64
    assert outcome(device, load, zip_entry(1, 64, 256, 0x200000, 0x201000))[3] == 0x0C


def test_stop_and_flush_let_queues_run_empty() -> None:
    device = Accelerator(entry_seconds=0.01)
    load = Load(device, queues=2)
    load.submit(0, 5)
    load.submit(1, 5)
    load.driver.command(8, queue=0)
    assert device.vf.queues.queues[0].sqc is not None
    assert device.vf.queues.queues[0].sqc.waiting == 0
    load.driver.command(9)
    assert device.vf.state()["completed"] == 10
    load.finish()
    load.submit(1)
    assert counted(device.vf) == {"doorbell_stopped": 1}
    load.driver.start_queue(1)
    load.jobs[1].clear()
    load.submit(1, 2)
    load.finish()
    assert load.completed == 12
    load.driver.stop()
    assert device.read(0x60) == 1


def test_a_paused_queue_cannot_be_drained() -> None:
    device = Accelerator()
    load = Load(device, queues=1)
    load.driver.command(0xE)
    load.submit(0)
    with pytest.raises(DeviceError, match="0x9"):
        load.driver.command(9)


def test_a_queue_that_is_closed_in_the_table_takes_no_doorbells() -> None:
    device = Accelerator()
    load = Load(device, queues=1)
    load.submit(0)
    load.finish()
    device.write(0x204, 1)
    device.bus.run()
    at = load.layout.sqc_table + 16
    device.bus.memory[at : at + 2] = b"\xaa\xaa"
    load.submit(0)
    device.bus.run()
    assert counted(device.vf) == {"doorbell_stopped": 1}
    assert device.vf.state()["completed"] == 1


def test_a_write_back_under_load_loses_nothing() -> None:
    device = Accelerator(entry_seconds=1e-5)
    load = Load(device, queues=2)
    for _ in range(10):
        load.fill()
        device.write(0x204, 1)
        load.finish()
    assert device.read(0x208) == 1
    assert load.completed == 140
    assert counted(device.vf) == {}


def test_a_reset_in_the_middle_of_work_ends_it() -> None:
    device = Accelerator(entry_seconds=1.0)
    load = Load(device, queues=1)
    load.submit(0, 5)
    device.bus.step(1.5)
    device.vf.reset()
    device.bus.run()
    state = device.vf.state()
    assert (state["completed"], state["at_hand"]) == (1, 0)
    again = Load(device, queues=1)
    again.submit(0, 3)
    again.finish()
    assert again.completed == 3
