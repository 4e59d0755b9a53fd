"""Our own driver against scripted firmware: up and down, migration from one function to another, faults by name."""

import errno
import logging

import pytest
import trio
from trio.testing import trio_test

from plugins.mlx5.pf import serve
from plugins.mlx5.probe import probe
from plugins.mlx5.records import HEADER
from tests.plugins.mlx5.companion import OneCompanion
from tests.plugins.mlx5.driven import FULL, P2P, Kept, images, opened, started, stopped, until
from tests.plugins.mlx5.firmware import VHCA, FakeConnectx
from tests.plugins.mlx5.virtual import FakeVf
from vfu_server.device import SavePhase, Section
from vfu_server.errors import (
    HostError,
    RestoreError,
    StateError,
    StateLostError,
    StreamFormatError,
    StreamMismatchError,
    UsageError,
)

# --- up and down


@trio_test
async def test_up_and_down_leaves_nothing():
    async with opened() as (pf, vf, device):
        can = device.capabilities
        assert (can.migratable, can.pre_copy, can.p2p) == (True, True, True)
        assert device.identity.firmware == "28.41.1000"
        assert pf.enabled == {0, 1}
        assert pf.vf_migratable
        assert len(pf.pages[0]) == 703
        opcodes = [opcode for opcode, _, _ in pf.log]
        assert opcodes[:4] == [0x104, 0x10A, 0x10B, 0x107]
        assert opcodes.index(0x109) < opcodes.index(0x102) < opcodes.index(0x301)
        del vf
    assert (pf.enabled, pf.pages[0], pf.maps, pf.up) == (set(), [], {}, False)
    assert pf.resets == 0


@trio_test
async def test_what_an_earlier_driver_left_is_reset(caplog):
    pf = FakeConnectx()
    pf.refuse[0x104] = [4]
    async with trio.open_nursery() as nursery:
        device = probe(FakeVf(pf), {})
        with caplog.at_level(logging.INFO):
            await device.open(OneCompanion(pf, nursery))
        assert "ENABLE_HCA failed: status 0x4 (bad system state), syndrome 0x00000bad" in caplog.text
        assert (pf.resets, device.capabilities.migratable) == (1, True)
        await device.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["migration", "migration_multi_load", "migration_tracking_state", "migratable"])
@trio_test
async def test_each_missing_capability_is_named(name):
    pf = FakeConnectx()
    if name == "migration":
        pf.general[0xD0:0xD4] = bytes(4)
    elif name == "migratable":
        pf.general[3] = 0
    else:
        pf.general_2[0x19] &= ~{"migration_multi_load": 0x80, "migration_tracking_state": 0x40}[name]
    async with trio.open_nursery() as nursery:
        device = probe(FakeVf(pf), {})
        await device.open(OneCompanion(pf, nursery))
        can = device.capabilities
        assert not can.migratable
        assert f"lacks: {name} (" in can.reason
        assert "mlxconfig" in can.reason
        assert not device.policy.p2p
        with pytest.raises(StateError):
            await device.stop(P2P)
        await device.aclose()
        nursery.cancel_scope.cancel()
    assert pf.maps == {}


@trio_test
async def test_no_physical_function_is_one_message(caplog):
    pf = FakeConnectx()
    async with trio.open_nursery() as nursery:
        companions = OneCompanion(pf, nursery)
        companions.error = HostError("companion x: nobody is there")
        device = probe(FakeVf(pf), {"pf": "x"})
        await device.open(companions)
        assert companions.asked == ["x"]
        assert "nobody is there" in device.capabilities.reason
        assert "mlx5_vfio_pci" in device.capabilities.reason
        assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []  # the server says it, once
        await device.aclose()


@trio_test
async def test_two_functions_share_their_physical_function_and_one_index_is_one_users():
    pf = FakeConnectx()
    async with trio.open_nursery() as nursery:
        one = OneCompanion(pf, nursery)
        async with one.open("pf", serve) as owner:
            first = await owner.attach(0, "guest a")
            second = await owner.attach(1, "guest b")
            assert pf.enabled == {0, 1, 2}
            with pytest.raises(HostError, match="is used by guest a already"):
                await owner.attach(0, "guest c")
            await owner.detach(first)
            await owner.detach(first)
            assert pf.enabled == {0, 2}
            assert (await owner.attach(0, "guest c")).vhca_id == VHCA
            del second
        nursery.cancel_scope.cancel()
    assert pf.maps == {}


# --- migration


@pytest.mark.parametrize("chunks", [True, False])
@trio_test
async def test_stop_copy_from_one_to_the_other(chunks):
    async with opened(chunks=chunks) as (pf, _, device), opened(chunks=chunks) as (pf2, _, other):
        await stopped(device)
        assert pf.stopped == {"initiator", "responder"}
        assert await device.estimate() == len(pf.image)
        await device.save_begin()
        sink = Kept()
        await device.save(SavePhase.STOP_COPY, sink)
        await device.save_end()
        found, announced = images(sink.data)
        assert b"".join(found) == pf.image
        assert len(found) == (3 if chunks else 1)
        assert announced >= (8192 if chunks else len(pf.image))
        await started(device)
        assert pf.stopped == set()

        other.check_identity(device.identity)
        await stopped(other)
        await other.load_begin()
        for at in range(0, len(sink.data), 777):
            await other.load(Section("kernel", 1, sink.data[at : at + 777]))
        await other.load_done()
        assert pf2.loaded == found
        await started(other)
        await device.stop(P2P)  # waits for the end of the save
        assert (pf.keys, len(pf.pds)) == ({}, 0)
        assert (pf2.keys, len(pf2.pds)) == ({}, 0)
        assert device.statistics()["images_saved"] == len(found)
        assert other.statistics()["images_loaded"] == len(found)


@pytest.mark.parametrize("chunks", [True, False])
@trio_test
async def test_pre_copy_carries_changes_in_their_order(chunks):
    async with opened(chunks=chunks) as (pf, _, device):
        await device.save_begin()
        sink = Kept()
        info = await device.precopy_info()
        assert info.initial_bytes >= 24 + 16 + (4096 if chunks else len(pf.image))
        await device.save(SavePhase.PRE_COPY, sink)
        if chunks:  # what does not fit one buffer shows as a change
            assert pf.tracking
        assert (await device.precopy_info()).initial_bytes == 0
        first = b"".join(images(sink.data)[0])
        assert pf.image.startswith(first)
        pf.dirty = b"changed" * 10
        assert (await device.precopy_info()).dirty_bytes == 70 + 16
        await device.save(SavePhase.PRE_COPY, sink)
        assert images(sink.data)[0][-1] == b"changed" * 10
        assert (await device.precopy_info()).dirty_bytes == 0
        pf.dirty = b"last" * 2000
        await device.stop(P2P)
        assert (await device.precopy_info()).dirty_bytes == 0  # not asked any more
        await device.stop(FULL)
        await device.save(SavePhase.STOP_COPY, sink)
        await device.save_end()
        found, _ = images(sink.data)
        assert b"".join(found) == first + b"changed" * 10 + b"last" * 2000
        saves = [(d[8] >> 7, d[8] >> 6 & 1) for opcode, _, d in pf.log if opcode == 0x118]
        assert saves[:3] == [(0, 1), (1, 1), (1, 0)]
        assert not pf.tracking
        await started(device)


@trio_test
async def test_a_pre_copy_that_is_given_up_turns_tracking_off():
    async with opened() as (pf, _, device):
        await device.save_begin()
        await device.save(SavePhase.PRE_COPY, Kept())
        assert pf.tracking
        await device.save_end()
        await device.stop(P2P)
        assert not pf.tracking
        queries = [d[8] >> 7 for opcode, _, d in pf.log if opcode == 0x117]
        assert queries == [0, 1]
        assert pf.keys == {}
        await device.start(P2P)


@trio_test
async def test_a_save_that_the_firmware_will_not_do_early_is_done_when_stopped(caplog):
    async with opened() as (pf, _, device):
        pf.refuse[0x118] = [9]
        await device.save_begin()
        sink = Kept()
        await device.save(SavePhase.PRE_COPY, sink)
        assert "all will be saved again" in caplog.text
        info = await device.precopy_info()
        assert (info.initial_bytes, info.dirty_bytes) == (0, 0)
        await stopped(device)
        await device.save(SavePhase.STOP_COPY, sink)
        assert b"".join(images(sink.data)[0]) == pf.image
        assert [d[8] >> 7 for opcode, _, d in pf.log if opcode == 0x117] == [0, 0]
        await device.save_end()
        await started(device)


@trio_test
async def test_a_cancelled_pre_copy_loses_nothing():
    class Slow(Kept):
        def __init__(self):
            super().__init__()
            self.room = trio.Semaphore(0)

        async def send(self, section):
            await self.room.acquire()
            await super().send(section)

    async with opened() as (pf, _, device):
        await device.save_begin()
        sink = Slow()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(device.save, SavePhase.PRE_COPY, sink)
                await trio.testing.wait_all_tasks_blocked(0.01)
                sink.room.release()
                await trio.testing.wait_all_tasks_blocked(0.01)
                scope.cancel()
        assert len(sink.data) == 24
        await stopped(device)
        for _ in range(20):
            sink.room.release()
        await device.save(SavePhase.STOP_COPY, sink)
        await device.save_end()
        assert b"".join(images(sink.data)[0]).startswith(pf.image[:8192])
        await started(device)


@trio_test
async def test_a_stop_that_fails_half_way_is_undone_and_named():
    async with opened() as (pf, _, device):
        pf.refuse[0x115] = [4]
        with pytest.raises(HostError, match=r"SUSPEND_VHCA failed: status 0x4 \(bad system state\), syndrome"):
            await device.stop(P2P)
        assert pf.stopped == set()
        real = pf.do_115

        def refuse_responder(mod, data):
            return pf.state(True) if mod == 1 else real(0, data)

        pf.do_115 = refuse_responder
        with pytest.raises(HostError, match="bad resource state"):
            await device.stop(FULL)
        assert pf.stopped == set()
        await device.stop(P2P)
        with pytest.raises(HostError):
            await device.stop(FULL)
        assert pf.stopped == {"initiator"}
        await device.start(P2P)
        assert pf.stopped == set()


@trio_test
async def test_a_full_stop_at_once_is_undone_at_once():
    async with opened() as (pf, _, device):
        await device.stop(FULL)
        assert pf.stopped == {"initiator", "responder"}
        await device.start(FULL)
        assert pf.stopped == set()


@trio_test
async def test_an_image_that_the_firmware_refuses_is_a_failed_restore():
    async with opened() as (pf, _, device):
        await stopped(device)
        await device.load_begin()
        pf.refuse[0x119] = [5]
        stream = HEADER.pack(5, 0, 0) + b"image"
        await device.load(Section("kernel", 1, stream))
        with pytest.raises(RestoreError, match=r"LOAD_VHCA_STATE failed: status 0x5 \(bad resource\)"):
            await device.load_done()
        await device.reset()
        assert pf.stopped == set()
        await stopped(device)
        await device.load_begin()
        await device.load(Section("kernel", 1, stream))
        await device.load_done()
        assert pf.loaded == [b"image"]


@trio_test
async def test_a_cut_or_strange_stream_is_refused_and_abandoned_by_a_reset():
    for stream, number in (
        (HEADER.pack(1 << 32, 0, 0), errno.ENOMEM),
        (HEADER.pack(4, 0, 9), errno.EOPNOTSUPP),
        (HEADER.pack(9, 1, 1), errno.EINVAL),
    ):
        async with opened() as (_, _, device):
            await stopped(device)
            await device.load_begin()
            with pytest.raises(StreamFormatError) as caught:
                await device.load(Section("kernel", 1, stream))
            assert caught.value.errno == number
            await device.reset()
            await stopped(device)
            await device.load_begin()
            await device.load(Section("kernel", 1, HEADER.pack(100, 0, 0) + b"few"))
            with pytest.raises(StreamFormatError, match="within a record"):
                await device.load_done()
            await device.reset()


@trio_test
async def test_memory_grows_with_what_has_come_in_not_with_what_is_announced():
    async with opened() as (pf, _, device):
        await stopped(device)
        before = sum(map(len, pf.maps.values()))
        await device.load_begin()
        await device.load(Section("kernel", 1, HEADER.pack(0xFFFFF000, 0, 0) + b"few"))
        assert sum(map(len, pf.maps.values())) - before <= 4 << 20
        for _ in range(5):
            await device.load(Section("kernel", 1, bytes(1 << 20)))
        assert sum(map(len, pf.maps.values())) - before <= 20 << 20
        await device.reset()
        await until(lambda: sum(map(len, pf.maps.values())) == before)


@trio_test
async def test_firmware_board_and_capabilities_must_match():
    from dataclasses import replace

    async with opened() as (_, _, device):
        mine = device.identity
        device.check_identity(mine)
        device.check_identity(replace(mine, features=0))
        for theirs, text in (
            (replace(mine, firmware="28.42.1000"), "28.42.1000"),
            (replace(mine, features=mine.features ^ 1 << 40), "PSID"),
            (replace(mine, variant="edu"), "edu"),
        ):
            with pytest.raises(StreamMismatchError, match=text):
                device.check_identity(theirs)


# --- pages


@trio_test
async def test_pages_that_the_firmware_asks_for_later_are_given_and_taken_back(autojump_clock):
    async with opened() as (pf, _, device):
        pf.event(0x0B, b"\0\0\0\1\0\0\2\x0a")  # 522 pages for function 1
        await until(lambda: len(pf.pages.get(1, ())) == 522)
        pf.event(0x0B, b"\0\0\0\1" + (-522 & 0xFFFFFFFF).to_bytes(4, "big"))
        await until(lambda: not pf.pages[1])
        assert device.statistics()["pf_pages"] == 703
        for _ in range(300):  # more than the queue has entries: the owner bit turns
            pf.event(0x0B, b"\0\0\0\0\0\0\0\1")
            await until(lambda: device._pf.events.seen == pf.eq["pi"])
        assert len(pf.pages[0]) == 1003


@trio_test
async def test_pages_are_fed_while_another_command_waits():
    async with opened() as (pf, _, device):
        pf.mute.add(0x118)
        await device.save_begin()
        pf.event(0x0B, b"\0\0\0\1\0\0\0\x04")
        await until(lambda: len(pf.pages.get(1, ())) == 4)
        pf.mute.clear()
        pf.complete_stuck()
        await device.save(SavePhase.PRE_COPY, Kept())
        await device.save_end()
        await device.stop(P2P)


# --- death


@pytest.mark.parametrize("how", ["syndrome", "counter"])
@trio_test
async def test_a_physical_function_that_dies_is_brought_up_again(how, caplog, autojump_clock):
    async with opened() as (pf, vf, device):
        await device.dirty_log.start([(0, 0x40000000)], 4096)
        await device.save_begin()
        await device.save(SavePhase.PRE_COPY, Kept())
        await device.stop(P2P)
        if how == "syndrome":
            pf.fatal = 1
        else:
            pf.health_stands = True
        await until(lambda: pf.resets)
        pf.health_stands = False
        await until(lambda: device._pf.queue.failure is None)
        assert "is dead" in caplog.text
        with pytest.raises(StateLostError, match="was reset"):
            await device.stop(FULL)
        # the numbers of what was made before are others' now
        pf.log.clear()
        with pytest.raises(HostError, match="it was reset"):
            await device.dirty_log.report(0, 0x1000, 4096)
        await device.dirty_log.stop()
        await device.save_end()
        await device._ending.wait()
        assert not {0x202, 0x302, 0x801, 0x501, 0x401, 0xA03, 0x118} & {opcode for opcode, _, _ in pf.log}
        await device.reset()
        await stopped(device)
        assert pf.stopped == {"initiator", "responder"}
        await started(device)
        del vf


@trio_test
async def test_a_command_without_answer_is_a_lost_state_and_its_entry_is_kept(autojump_clock):
    async with opened() as (pf, _, device):
        pf.mute.add(0x115)
        with pytest.raises(StateLostError, match="SUSPEND_VHCA did not complete within 3 s"):
            await device.stop(P2P)
        pf.mute.clear()
        await device.reset()
        free = len(device._pf.queue._free)
        await stopped(device)
        pf.complete_stuck()
        await started(device)
        assert len(device._pf.queue._free) == free + 1


# --- the log of pages


@trio_test
async def test_written_pages_are_reported_once():
    async with opened() as (pf, _, device):
        log = device.dirty_log
        assert await log.start([(0, 0x40000000), (0x100000000, 0x40000000)], 4096) == 4096
        pf.dirty_pages = {0x1000 * n for n in range(0, 3000, 3)} | {0x100000000}
        bits = await log.report(0, 0x800000, 4096)
        assert len(bits) == 2048 // 8
        assert [n for n in range(2048) if bits[n >> 3] >> (n & 7) & 1] == list(range(0, 2048, 3))
        assert not any(await log.report(0, 0x800000, 4096))
        assert await log.report(0x100000000, 0x200000, 1 << 20) == b"\1" + bytes(7)
        pf.event(0x27, b"\0\0\0\x46" + max(pf.objects).to_bytes(4, "big"))
        pf.objects[max(pf.objects)]["state"] = 2
        await until(lambda: log._broken)
        with pytest.raises(HostError, match="log is lost") as caught:
            await log.report(0, 0x1000, 4096)
        assert caught.value.errno == errno.EIO
        await log.stop()
        await log.stop()
        assert (pf.objects, pf.qps, pf.cqs, pf.keys, len(pf.pds), pf.completion_eqs) == ({}, {}, {}, {}, 0, set())


@trio_test
async def test_ranges_that_the_firmware_cannot_follow_are_refused():
    async with opened() as (pf, _, device):
        for ranges in ([(0, 1 << 42)], [(0, 0x800)]):
            with pytest.raises(HostError, match="cannot be followed") as caught:
                await device.dirty_log.start(ranges, 4096)
            assert caught.value.errno == errno.EOPNOTSUPP
        assert pf.qps == {}


# --- options


@pytest.mark.parametrize(
    "options", [{"pf": ""}, {"vf": "-1"}, {"vf": "one"}, {"self-test": "yes"}, {"speed": "high"}, {"vf": "70000"}]
)
def test_options_are_checked(options):
    with pytest.raises(UsageError, match="mlx5"):
        probe(FakeVf(FakeConnectx()), options)


@trio_test
async def test_self_test_says_what_is_there(caplog):
    with caplog.at_level(logging.INFO):
        async with opened({"self-test": "1"}):
            pass
    for text in ("firmware 28.41.1000, board MT_0000000359", "vhca_id 0x123", "every capability", "10240 in all"):
        assert text in caplog.text
