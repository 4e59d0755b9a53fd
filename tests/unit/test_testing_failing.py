"""FailingDevice: passes everything on, fails at the call that was named, and in the way that was named."""

import inspect

import pytest
import trio
from trio.testing import MockClock

from tests.plugins.carry import ListSink
from tests.plugins.fake_host import FakeHost
from tests.plugins_synthetic.device import Shape, SyntheticDevice
from vfu_server.device import Device, SavePhase, StopKind
from vfu_server.errors import HostError, PluginError
from vfu_server.stream_format import check_section
from vfu_server.testing.failing import (
    METHODS,
    Call,
    FailingDevice,
    Hang,
    Meanwhile,
    Overrun,
    Oversize,
    Raise,
)


def device(**shape) -> FailingDevice:
    return FailingDevice(SyntheticDevice(FakeHost(), Shape(4 * 4096, 4096, **shape)))


def run(work, *arguments):
    return trio.run(work, *arguments, clock=MockClock(autojump_threshold=0))


def test_all_of_the_contract_is_passed_on():
    """A method that is added to the contract must be passed on here, else the default would answer for a plugin."""
    contract = {name for name, value in vars(Device).items() if callable(value) or isinstance(value, property)}
    own = {name for name in contract if not name.startswith("_")}
    assert own <= set(vars(FailingDevice))
    blocks = {"trap_read_block", "trap_write_block"}  # spoilt by the name of the access
    assert own - METHODS - blocks == {"policy", "region_sizes", "dirty_log", "capabilities", "statistics"}, (
        "what can be spoilt"
    )


def test_an_undisturbed_device_is_the_device():
    async def work():
        outer = device()
        await outer.stop(StopKind.FULL)
        sink, direct = ListSink(), ListSink()
        await outer.save(SavePhase.STOP_COPY, sink)
        await outer.save_end()
        await outer.inner.save(SavePhase.STOP_COPY, direct)
        assert sink.sections == direct.sections
        assert len(sink.sections) == 4
        await outer.start(StopKind.FULL)
        assert outer.inner.stopped == set()
        assert outer.identity == outer.inner.identity
        assert outer.capabilities == outer.inner.capabilities
        assert outer.lock is outer.inner.lock
        names = ["stop", "save", *["send"] * 4, "save_end", "start", "identity"]
        assert [call.method for call in outer.calls] == names
        assert [str(call) for call in outer.calls if call.method == "send"] == ["send 1", "send 2", "send 3", "send 4"]
        assert outer.struck == []

    run(work)


def test_the_nth_call_from_the_order_on_raises_once_and_changes_nothing():
    async def work():
        outer = device()
        await outer.stop(StopKind.FULL)
        await outer.start(StopKind.FULL)
        outer.order("stop", Raise(HostError("as ordered")), 2)
        await outer.stop(StopKind.FULL)
        await outer.start(StopKind.FULL)
        with pytest.raises(HostError, match="as ordered"):
            await outer.stop(StopKind.FULL)
        assert outer.inner.stopped == set(), "it was not even asked"
        assert outer.struck == [Call("stop", 3)]
        await outer.stop(StopKind.FULL)

    run(work)


def test_a_save_that_ends_badly_has_ended():
    async def work():
        outer = device()
        await outer.stop(StopKind.FULL)
        await outer.save(SavePhase.STOP_COPY, ListSink())
        outer.order("save_end", Raise(HostError("as ordered")))
        with pytest.raises(HostError):
            await outer.save_end()
        assert not outer.inner.tracker.on

    run(work)


def test_a_save_fails_before_its_third_section():
    async def work():
        outer, sink = device(), ListSink()
        await outer.stop(StopKind.FULL)
        outer.order("send", Raise(LookupError("bug")), 3)
        with pytest.raises(LookupError):
            await outer.save(SavePhase.STOP_COPY, sink)
        assert len(sink.sections) == 2

    run(work)


def test_a_section_that_is_too_large_for_any_stream():
    async def work():
        outer, sink = device(), ListSink()
        await outer.stop(StopKind.FULL)
        outer.order("send", Oversize())
        await outer.save(SavePhase.STOP_COPY, sink)
        with pytest.raises(PluginError, match="split it"):
            check_section(sink.sections[0].tag, 1, len(sink.sections[0].payload))

    run(work)


def test_what_hangs_can_be_cancelled_and_what_overruns_cannot():
    async def work():
        outer = device()
        outer.order("stop", Hang())
        with trio.move_on_after(5) as scope:
            await outer.stop(StopKind.FULL)
        assert scope.cancelled_caught
        assert outer.inner.stopped == set()
        outer.order("stop", Overrun(7.0))
        began = trio.current_time()
        with trio.move_on_after(1):
            await outer.stop(StopKind.FULL)
        assert trio.current_time() - began == pytest.approx(7.0, abs=0.1)

    run(work)


def test_something_happens_right_before_a_call():
    async def work():
        outer, seen = device(), []
        outer.order("start", Meanwhile(lambda: seen.append(set(outer.inner.stopped))))
        await outer.stop(StopKind.FULL)
        await outer.start(StopKind.FULL)
        assert seen == [{StopKind.FULL}]
        assert outer.inner.stopped == set()

    run(work)


@pytest.mark.parametrize(
    ("method", "failure"), [("halt", Hang()), ("knows", Hang()), ("identity", Overrun(1)), ("save", Oversize())]
)
def test_orders_that_cannot_be(method, failure):
    with pytest.raises(ValueError, match=r"method|coroutine|section"):
        device().order(method, failure)


def test_the_signatures_are_the_contracts():
    for name in METHODS - {"send", "identity"}:
        assert inspect.signature(getattr(FailingDevice, name)) == inspect.signature(getattr(Device, name)), name
