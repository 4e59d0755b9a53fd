"""An access that fails, a command that is not answered: the rest goes on, and nothing is asked of what is gone."""

import errno

import pytest
import trio
from trio.testing import trio_test

from plugins.mlx5.events import VAIN
from plugins.mlx5.records import HEADER
from plugins.mlx5.status import PfDeadError
from tests.plugins.mlx5.driven import P2P, Kept, images, opened, started, stopped, until
from vfu_server.device import SavePhase, Section
from vfu_server.errors import HostError, StateLostError

DOORBELL, HEALTH, EQ_DOORBELL = 0x18, 0x23C, 0x40
SUSPEND, QUERY_STATE, MANAGE_PAGES, DESTROY_MKEY = 0x115, 0x117, 0x108, 0x202
CREATE_OBJECT, QUERY_OBJECT, DESTROY_OBJECT = 0xA00, 0xA02, 0xA03


class Failing:
    """Lets the next `times` reads or writes of registers fail, of those that `which` says yes to."""

    def __init__(self, pf):
        self.times, self.which, self.failed = 0, lambda offset: True, 0
        self._inner = {name: getattr(pf, name) for name in ("bar_read", "bar_write")}
        pf.bar_read, pf.bar_write = self._read, self._write

    def order(self, times, which):
        self.times, self.which, self.failed = times, which, 0

    def _come_by(self, offset):
        if self.times and self.which(offset):
            self.times -= 1
            self.failed += 1
            raise HostError(f"no access at {offset:#x}", errno.EREMOTEIO)

    def _read(self, offset, width):
        self._come_by(offset)
        return self._inner["bar_read"](offset, width)

    def _write(self, offset, width, value):
        self._come_by(offset)
        self._inner["bar_write"](offset, width, value)


def opcodes(pf):
    return [opcode for opcode, _, _ in pf.log]


@trio_test
async def test_a_doorbell_that_is_not_rung_costs_that_command_alone():
    async with opened() as (pf, _, device):
        failing = Failing(pf)
        for _ in range(40):  # more than there are entries
            failing.order(1, lambda offset: offset == DOORBELL)
            with pytest.raises(HostError, match="no access at 0x18"):
                await device.stop(P2P)
        await stopped(device)
        await started(device)
        assert opcodes(pf).count(SUSPEND) == 2


@trio_test
async def test_a_command_without_answer_is_a_lost_state_even_if_health_cannot_be_read(autojump_clock):
    async with opened() as (pf, _, device):
        failing = Failing(pf)
        pf.mute.add(SUSPEND)
        failing.order(-1, lambda offset: offset == HEALTH)
        with pytest.raises(StateLostError, match=r"did not complete within 3 s .its health cannot be read: no access"):
            await device.stop(P2P)
        pf.mute.clear()
        failing.order(0, None)
        await device.reset()
        await stopped(device)
        pf.complete_stuck()


@pytest.mark.parametrize(("times", "dies"), [(1, False), (2, False), (-1, True)])
@trio_test
async def test_one_look_that_fails_is_no_death(times, dies, autojump_clock):
    async with opened() as (pf, _, device):
        failing = Failing(pf)
        failing.order(times, lambda offset: offset == 0x230)
        await trio.sleep(3.5)
        if dies:
            await until(lambda: pf.resets)
            failing.order(0, None)
            await until(lambda: device._pf.queue.failure is None)
        else:
            assert failing.failed == times
            await trio.sleep(10)
            assert pf.resets == 0
        await device.reset()
        await stopped(device)
        await started(device)


@pytest.mark.parametrize(("times", "dies"), [(3, False), (VAIN + 1, True)])
@trio_test
async def test_a_doorbell_of_the_events_is_rung_until_it_is_heard(times, dies, caplog, autojump_clock):
    async with opened() as (pf, _, device):
        failing = Failing(pf)
        failing.order(times, lambda offset: offset & 0xFFF == EQ_DOORBELL and offset >= 0x1000)
        pf.event(0x0B, b"\0\0\0\1\0\0\0\x04")
        await until(lambda: len(pf.pages.get(1, ())) == 4)
        await trio.sleep(5)
        assert failing.failed == times
        assert pf.resets == int(dies)
        assert ("its events cannot be read" in caplog.text) == dies
        await until(lambda: device._pf.queue.failure is None)
        await device.reset()
        await stopped(device)
        await started(device)


@trio_test
async def test_pages_are_given_though_the_firmware_did_not_hear_of_them_at_first(caplog):
    async with opened() as (pf, _, device):
        failing = Failing(pf)
        for times in (1, 2):
            failing.order(times, lambda offset: offset == DOORBELL)
            pf.event(0x0B, b"\0\0\0\1\0\0\0\x04")
            await until(lambda times=times: len(pf.pages.get(1, ())) == 4 * times)
        failing.order(3, lambda offset: offset == DOORBELL)
        pf.event(0x0B, b"\0\0\0\1\0\0\0\x04")
        await until(lambda: "pages for function 1 (+4)" in caplog.text)
        assert device.statistics()["pf_pages"] == 703 + 8


@trio_test
async def test_a_load_that_ended_well_is_one_whatever_cannot_be_given_back():
    async with opened() as (pf, _, device):
        await stopped(device)
        await device.load_begin()
        pf.refuse[DESTROY_MKEY] = [4]
        await device.load(Section("kernel", 1, HEADER.pack(5, 0, 0) + b"image"))
        await device.load_done()
        assert pf.loaded == [b"image"]
        await started(device)


@trio_test
async def test_a_larger_buffer_that_there_is_no_memory_for_costs_the_save_and_nothing_else():
    async with opened(chunks=False) as (pf, _, device):
        await device.save_begin()
        await device.save(SavePhase.PRE_COPY, Kept())
        pf.dirty = bytes(1 << 20)
        real = pf.dma_map

        async def refuse(dma_map):
            pf.dma_map = real
            raise HostError("no memory", errno.ENOMEM)

        for _ in range(3):
            pf.dma_map = refuse
            with pytest.raises(HostError, match="no memory"):
                await device.save(SavePhase.PRE_COPY, Kept())
        sink = Kept()
        await device.save(SavePhase.PRE_COPY, sink)
        assert images(HEADER.pack(8, 1, 1) + bytes(8) + sink.data)[0] == [bytes(1 << 20)]
        await device.save_end()
        await device.stop(P2P)
        assert not pf.tracking
        await device.start(P2P)


# --- the log of pages


@trio_test
async def test_a_tracker_is_not_asked_any_more_once_it_is_being_destroyed(autojump_clock):
    """The event that its state has changed comes while the log is ended, before and after."""
    async with opened() as (pf, _, device):
        log = device.dirty_log
        for early in (True, False):
            await log.start([(0, 0x40000000)], 4096)
            number = max(pf.objects)
            pf.log.clear()
            pf.mute.add(QUERY_OBJECT if early else DESTROY_OBJECT)
            async with trio.open_nursery() as nursery:
                if not early:
                    nursery.start_soon(log.stop)
                    await until(lambda: DESTROY_OBJECT in opcodes(pf))
                seen = device._pf.events.seen
                pf.event(0x27, b"\0\0\0\x46" + number.to_bytes(4, "big"))
                if early:
                    await until(lambda: QUERY_OBJECT in opcodes(pf))
                    nursery.start_soon(log.stop)
                await trio.sleep(1)
                assert not {QUERY_OBJECT, DESTROY_OBJECT} <= set(opcodes(pf))
                pf.mute.clear()
                if not early:
                    del pf.objects[number]
                pf.complete_stuck()
                await until(lambda seen=seen: device._pf.events.seen > seen)
            asked = [opcode for opcode in opcodes(pf) if opcode in (QUERY_OBJECT, DESTROY_OBJECT)]
            assert asked == ([QUERY_OBJECT, DESTROY_OBJECT] if early else [DESTROY_OBJECT])
            assert pf.objects == {}


@trio_test
async def test_a_tracker_that_cannot_be_destroyed_is_destroyed_before_the_next(caplog):
    async with opened() as (pf, _, device):
        log = device.dirty_log
        await log.start([(0, 0x40000000)], 4096)
        left = max(pf.objects)
        pf.refuse[DESTROY_OBJECT] = [4]
        await log.stop()
        assert "the log of pages cannot be ended" in caplog.text
        assert left in pf.objects
        pf.log.clear()
        await log.start([(0, 0x40000000)], 4096)
        assert left not in pf.objects
        assert opcodes(pf).index(DESTROY_OBJECT) < opcodes(pf).index(CREATE_OBJECT)
        pf.dirty_pages = {0x3000}
        assert await log.report(0, 0x40000, 4096) == b"\x08" + bytes(7)
        await log.stop()
        assert pf.objects == {}


# --- what the failure matrix has found


@trio_test
async def test_pages_that_came_back_with_another_token_are_the_firmwares(caplog):
    """They may be in use: given twice, or back to us, they would be two functions' at once."""
    async with opened() as (pf, _, device):
        pf.wrong_token = {MANAGE_PAGES}
        pf.event(0x0B, b"\0\0\0\1\0\0\0\x04")
        await until(lambda: "came back with another token" in caplog.text)
        assert device.statistics()["pf_pages"] == 703 + 4
        assert len(pf.pages[1]) == 4


@trio_test
async def test_a_suspension_that_came_back_with_another_token_is_a_lost_state():
    async with opened() as (pf, _, device):
        pf.wrong_token = {SUSPEND}
        with pytest.raises(StateLostError, match="another token"):
            await device.stop(P2P)
        await device.reset()
        await stopped(device)
        await started(device)


@trio_test
async def test_the_firmware_is_told_that_pages_it_has_refused_are_all_there_is():
    async with opened() as (pf, _, _):
        pf.refuse[MANAGE_PAGES] = [4]
        pf.log.clear()
        pf.event(0x0B, b"\0\0\0\1\0\0\0\x04")
        await until(lambda: len(pf.log) == 2)
        assert [(opcode, mod) for opcode, mod, _ in pf.log] == [(MANAGE_PAGES, 1), (MANAGE_PAGES, 0)]


@trio_test
async def test_an_entry_for_pages_that_is_never_given_back_is_replaced(autojump_clock):
    async with opened() as (pf, _, device):
        pf.mute.add(MANAGE_PAGES)
        pf.event(0x0B, b"\0\0\0\1\0\0\0\x04")
        await trio.sleep(70)
        pf.mute.clear()
        pf.event(0x0B, b"\0\0\0\1\0\0\0\x02")
        await until(lambda: len(pf.pages.get(1, ())) == 2)
        free = len(device._pf.queue._free)
        pf.complete_stuck()
        await stopped(device)
        assert len(device._pf.queue._free) == free + 1
        await started(device)


@trio_test
async def test_a_queue_without_entries_left_is_a_dead_function(autojump_clock, caplog):
    async with opened() as (pf, _, device):
        pf.mute.add(QUERY_STATE)
        for _ in range(31):
            with pytest.raises(HostError, match="did not complete within 3 s"):
                await device.estimate()
        pf.mute.clear()
        await until(lambda: pf.resets)
        assert "commands that never completed" in caplog.text
        await until(lambda: device._pf.queue.failure is None and not device._pf._lock.locked())
        await device.reset()
        assert await device.estimate() == len(pf.image)


@trio_test
async def test_a_function_whose_physical_ones_driver_has_ended_lets_go_without_a_word():
    async with opened() as (_, _, device):
        owner = device._pf
        await device.save_begin()
        await device.save(SavePhase.PRE_COPY, Kept())
        owner.queue.fail(PfDeadError("it is gone"))
        owner.ended = True
        with pytest.raises(PfDeadError):
            await device.load_begin()
        await device.aclose()
