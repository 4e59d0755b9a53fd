"""What a session counts: accesses, mistakes, arcs with their times, data, resets, the plugin's own numbers."""

import os

import pytest
import trio
import trio.testing

from tests.operators.bench_device import running
from tests.operators.test_revoke import trio_test
from vfu_server.libvfio_user.trace import Trace
from vfu_server.migration import Arc
from vfu_server.policy import Answer, StateClass
from vfu_server.session_counts import MAX_MISTAKES, MigrationCounts, Mistakes
from vfu_server.testing import ReplyError
from vfu_server.trace_format import Kind, Mark, TraceHeader, TraceReader
from vfu_server.uapi import MigState

S, R, SC, RES, P = MigState.STOP, MigState.RUNNING, MigState.STOP_COPY, MigState.RESUMING, MigState.PRE_COPY


def test_mistakes_are_kinds_and_bounded():
    mistakes = Mistakes()
    assert mistakes.note("region 5 at 0x1f")
    assert not mistakes.note("region 6 at 0xabcdef")
    assert mistakes.counts() == {"region # at #": 2}
    for number in range(2 * MAX_MISTAKES):
        mistakes.note(f"kind {'a' * number}")
    counts = mistakes.counts()
    assert len(counts) == MAX_MISTAKES + 1
    assert counts["others"] == MAX_MISTAKES + 1
    assert sum(counts.values()) == 2 + 2 * MAX_MISTAKES


def test_times_of_arcs():
    counts = MigrationCounts()

    async def go():
        for seconds in (0.2, 0.5):
            with counts.timed(Arc(R, S)):
                await trio.sleep(seconds)
        with pytest.raises(trio.TooSlowError), counts.timed(Arc(R, S)), trio.fail_after(3):
            await trio.sleep(4)

    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(go, clock=clock)
    times = counts.arcs()[Arc(R, S)]
    assert (times.done, times.failed) == (2, 1)
    assert times.seconds == pytest.approx(0.7)
    assert times.longest == pytest.approx(0.5)


def gone(statistics):
    return {str(arc): (times.done, times.failed) for arc, times in statistics.arcs.items()}


@trio_test
async def test_a_migration_is_counted_on_both_sides():
    async with running() as bench:
        await bench.set_state(SC)
        stream = await bench.read_all()
        await bench.set_state(S)
        bench.device.fail = "start"
        with pytest.raises(ReplyError):
            await bench.set_state(R)
        await bench.set_state(R)
        found = bench.session.statistics()
        assert gone(found) == {
            "RUNNING -> STOP": (1, 0),
            "STOP -> STOP_COPY": (1, 0),
            "STOP_COPY -> STOP": (1, 0),
            "STOP -> RUNNING": (1, 1),
        }
        assert all(0 < times.longest <= times.seconds < 5 for times in found.arcs.values())
        assert (found.bytes_saved, found.bytes_loaded) == (len(stream), 0)
        assert found.state is R
        assert found.mistakes == {"DEVICE_FEATURE: start fails": 1}
    async with running() as bench:
        await bench.set_state(RES)
        await bench.ask(bench.client.mig_data_write, stream)
        await bench.set_state(R)
        found = bench.session.statistics()
        assert (found.bytes_saved, found.bytes_loaded) == (0, len(stream))
        assert gone(found)["RESUMING -> STOP"] == (1, 0)


@trio_test
async def test_data_of_a_session_that_a_reset_ends_is_counted():
    async with running() as bench:
        await bench.set_state(SC)
        stream = await bench.read_all()
        await bench.ask(bench.client.reset)
        found = bench.session.statistics()
        assert (found.bytes_saved, found.resets, found.state) == (len(stream), 1, R)


@trio_test
async def test_accesses_clients_and_the_plugins_numbers():
    async with running(mmap="never") as bench:
        await bench.ask(bench.client.read, 0, 0x10, 4)
        await bench.set_state(S)
        await bench.ask(bench.client.write, 0, 0x10, 4, 1)
        found = bench.session.statistics()
        assert found.context.accesses == {
            (Answer.PASS, StateClass.RUNNING, "read"): 1,
            (Answer.DISCARD, StateClass.STOPPED, "write"): 1,
        }
        assert found.clients == 1
        assert found.plugin == {"doorbells": 3}
        assert found.trace is None
        assert found.host.dma_maps == 0


@trio_test
async def test_plugin_whose_numbers_fail_is_told_once(caplog):
    async with running() as bench:
        bench.device.numbers = ZeroDivisionError("a bug")
        caplog.set_level("INFO")
        for _ in range(3):
            assert bench.session.statistics().plugin == {}
    assert caplog.text.count("the plugin's statistics") == 1


@trio_test
async def test_resets_and_clients_are_in_the_trace(tmp_path):
    header = TraceHeader("0", "noted", "noted", "noted", 0, 0, 0, 0)
    fd = os.open(tmp_path / "trace", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.write(fd, header.pack())
    trace = Trace(fd)
    async with running(trace=trace, mmap="never") as bench:
        await bench.ask(bench.client.read, 0, 0x10, 4)
        await bench.ask(bench.client.reset)
        await bench.ask(bench.client.read, 0, 0x14, 4)
        assert bench.session.statistics().trace is not None
    trace.close()
    assert trace.numbers().written == 2
    with TraceReader.open(str(tmp_path / "trace")) as reader:
        found = [entry.kind if isinstance(entry, Mark) else hex(entry.offset) for entry in reader.entries()]
    assert found == [Kind.CLIENT, "0x10", Kind.RESET, "0x14", Kind.RESET]
