"""Guests that do anything: no access breaks the model, nor does what they do while it waits for their memory."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.bus import FakeBus
from tests.plugins.hns_model.rig import Accelerator, Load, counted
from vfu_server.model import BusError

OFFSETS = [
    *(0x00, 0x04, 0x08, 0x0C, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x34, 0x38, 0x60, 0x204, 0x208, 0x300, 0x304, 0x308),
    *(0x320, 0x380, 0x1000, 0x2000, 0x3100, 0x8000, 0x8004, 0x8008, 0x8018, 0x8020, 0x8024, 0x8038, 0xFFFF),
]
PF_OFFSETS = [
    *(0x100000, 0x100004, 0x10000C, 0x100040, 0x100054, 0x100058, 0x10005C, 0x100060, 0x100064, 0x100068, 0x10006C),
    *(0x100128, 0x100130, 0x100134, 0x100138, 0x100198, 0x100250, 0x104700, 0x104804, 0x180000, 0x182000, 0x182300),
    *(0x183000, 0x183C00, 0x184000, 0x300000, 0x3010A0, 0x3010A8),
]
small = st.one_of(st.integers(0, 40), st.integers(0, 0xFFFF))
numbers = st.one_of(st.integers(0, 64), st.integers(0, (1 << 64) - 1), st.sampled_from([1 << 44, 0xFFFFFFFF, 0x8000]))
ring = st.builds(
    lambda queue, command, random, index, priority: (
        queue & 0xFFF | command << 12 | random << 16 | index << 32 | priority << 48
    ),
    small,
    st.integers(0, 15),
    st.sampled_from([0, 0, 0, 9]),
    small,
    st.sampled_from([0, 0, 1, 2]),
)
operations = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(OFFSETS), st.sampled_from([1, 2, 4, 8]), numbers),
    st.tuples(st.just("read"), st.sampled_from(OFFSETS), st.sampled_from([1, 2, 4, 8]), st.just(0)),
    st.tuples(st.just("pf write"), st.sampled_from(PF_OFFSETS), st.sampled_from([4, 8]), numbers),
    st.tuples(st.just("pf read"), st.sampled_from(PF_OFFSETS), st.sampled_from([4, 8]), st.just(0)),
    st.tuples(st.just("ring"), st.sampled_from([0x1000, 0x2000]), st.just(8), ring),
    st.tuples(st.just("page"), small, st.just(8), ring),
    st.tuples(st.just("mailbox"), st.integers(0, 16), small, st.sampled_from([0, 0x400, 0x1000, 0x20000, 1 << 40])),
    st.tuples(st.just("get"), st.integers(0, 16), small, st.sampled_from([0, 0x400, 0x1000, 0x20000, 1 << 40])),
    st.tuples(st.just("time"), st.integers(0, 50), st.just(0), st.just(0)),
    st.tuples(st.just("memory"), st.integers(0, 0x1000), st.just(0), numbers),
    st.tuples(st.just("reset"), st.integers(0, 9), st.just(0), st.just(0)),
)


def do(device: Accelerator, operation: tuple[str, int, int, int]) -> None:
    name, first, second, third = operation
    match name:
        case "write" | "ring":
            device.vf.write(2, first, second, third & ((1 << 8 * second) - 1))
        case "read":
            device.vf.read(2, first, second)
        case "pf write":
            device.pf.write(2, first, second, third & ((1 << 8 * second) - 1))
        case "pf read":
            device.pf.read(2, first, second)
        case "page":
            device.vf.write(4, first << 12, 8, third)
        case "mailbox" | "get":
            word0 = first | 0x2000 | (0x4000 if name == "get" else 0)
            device.port.store(2, 0x300, struct.pack("<HHQI", word0, second & 0xFFFF, third, 0))
        case "time":
            for bus in device.buses.values():
                bus.step(first * 1e-5)
        case "memory":
            device.bus.memory[0x400 + first : 0x408 + first] = third.to_bytes(8, "little")
        case "reset" if first == 0:
            device.pf.reset()
        case "reset" if first < 3:
            device.vf.reset()


@settings(max_examples=150, deadline=None)
@given(st.lists(operations, max_size=60), st.sampled_from([{}, {"revision": 0x51, "pf_ctrl": True}]))
def test_anything_may_be_done_to_it(doings: list[tuple[str, int, int, int]], order: dict[str, object]) -> None:
    device = Accelerator(**order)  # type: ignore[arg-type]
    work = Load(device, queues=2)
    work.fill()
    for operation in doings:
        do(device, operation)
    for bus in device.buses.values():
        bus.run()
    assert device.vf.state()["at_hand"] == 0
    device.pf.reset()
    for bus in device.buses.values():
        bus.run()
    device.bus.take_messages()
    before = sum(counted(device.vf).values())
    again = Load(device, queues=2)
    again.fill()
    again.finish()
    assert again.completed == 14
    assert sum(counted(device.vf).values()) == before


class Interfering(FakeBus):
    """Does something in the middle of the n-th DMA, as a client may whose memory is reached by messages."""

    def __init__(self, bus: FakeBus, nth: int, what) -> None:
        self.__dict__.update(bus.__dict__)
        self._left = nth
        self._what = what
        self._model.plug(self)

    def dma_read(self, iova: int, length: int) -> bytes:
        found = super().dma_read(iova, length)
        self._interfere()
        return found

    def dma_write(self, iova: int, data: bytes) -> None:
        super().dma_write(iova, data)
        self._interfere()

    def _interfere(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._what()


@pytest.mark.parametrize("nth", range(1, 12))
def test_a_reset_in_the_middle_of_any_dma(nth: int) -> None:
    device = Accelerator()
    work = Load(device, queues=1)
    device.write(0x204, 1)  # so that the next doorbell loads contexts
    device.bus.run()
    device.buses["vf0"] = Interfering(device.bus, nth, device.vf.reset)
    work.driver.port = device.port
    work.submit(0, 3)
    device.write(0x204, 1)
    device.bus.run()
    state = device.vf.state()
    assert (state["vf_state"], state["at_hand"], state["resets"]) == (1, 0, 1)
    assert state["eqc0"] == 0
    again = Load(device, queues=1)
    again.submit(0, 3)
    device.bus.take_messages()
    again.finish()


@pytest.mark.parametrize("nth", range(1, 12))
def test_doorbells_in_the_middle_of_any_dma_are_taken(nth: int) -> None:
    device = Accelerator()
    work = Load(device, queues=2)
    device.write(0x204, 1)
    device.bus.run()
    device.buses["vf0"] = Interfering(device.bus, nth, lambda: [work.submit(queue, 2) for queue in (0, 1)])
    work.driver.port = device.port
    work.submit(0, 2)
    work.finish()
    device.bus.run()
    assert sum(work.numbers) in (2, 6)
    assert counted(device.vf) == {}


@pytest.mark.parametrize("nth", range(1, 8))
def test_memory_that_goes_away_in_the_middle(nth: int) -> None:
    def gone() -> None:
        raise BusError("the client has gone")

    device = Accelerator()
    work = Load(device, queues=1)
    device.buses["vf0"] = Interfering(device.bus, nth, gone)
    work.driver.port = device.port
    work.submit(0, 2)
    device.write(0x204, 1)
    device.bus.run()
    assert device.vf.state()["at_hand"] == 0
