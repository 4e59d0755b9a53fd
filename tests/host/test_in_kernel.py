"""A call of the kernel that does not come back: it is told by name while it lasts, counted, and told at its end."""

import threading

import trio
import trio.testing
from trio.testing import trio_test

from tests.host.conftest import BDF
from vfu_server.host import in_kernel
from vfu_server.host.kernel import open_bdf

SECONDS = 60.0


@trio_test
async def test_a_call_that_hangs_is_told_of(fake, function, caplog, monkeypatch):
    monkeypatch.setattr(in_kernel, "TELL_AFTER", 0.05)
    host = await open_bdf(BDF, kernel=fake.kernel)
    hangs, reset, told = threading.Event(), function.reset, trio.Event()
    monkeypatch.setattr(in_kernel.log, "error", lambda *text, log=in_kernel.log.error: (log(*text), told.set()))
    function.reset = lambda: hangs.wait(SECONDS) and reset()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.reset)
        with trio.fail_after(SECONDS):
            await told.wait()
        assert host.statistics().slow_calls == 1
        assert f"{BDF}: DEVICE_RESET: the kernel has not come back for 0.05 s; it cannot be interrupted" in caplog.text
        assert "has come back" not in caplog.text
        hangs.set()
    assert f"{BDF}: DEVICE_RESET: the kernel has come back after" in caplog.text
    assert host.statistics().slow_calls == 1
    await host.aclose()


@trio_test
async def test_a_call_that_comes_back_leaves_nobody_waiting(fake, caplog):
    host = await open_bdf(BDF, kernel=fake.kernel)
    before = trio.lowlevel.current_statistics().tasks_living
    for _ in range(20):
        await host.reset()
    await trio.testing.wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living == before
    assert host.statistics().slow_calls == 0
    await host.aclose()
