"""Interrupts of a function under kernel VFIO: eventfds for the kernel, vectors that come in parts, ERR and REQ."""

import errno
import os
import struct

import pytest
import trio
from trio.testing import trio_test

from tests.host.conftest import BDF
from vfu_server import uapi
from vfu_server.errors import HostError
from vfu_server.host.kernel import open_bdf
from vfu_server.uapi import IrqIndex

ARM = uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_TRIGGER
OFF = uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_TRIGGER
FIRE = OFF
INTX, MSI, MSIX, ERR, REQ = IrqIndex


@pytest.fixture
def eventfds():
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(24)]
    yield fds
    for fd in fds:
        os.close(fd)


def count(fd: int) -> int:
    """How often an eventfd was signalled since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


async def refused(host, *call, **more) -> int:
    with pytest.raises(HostError) as failed:
        await host.set_irqs(*call, **more)
    return failed.value.errno


@trio_test
async def test_the_kernel_signals_the_clients_eventfd(fake, function, eventfds):
    host = await open_bdf(BDF, kernel=fake.kernel)
    await host.set_irqs(MSIX, ARM, 0, 3, fds=eventfds[:3])
    function.signal(MSIX, 1)
    function.signal(MSIX, 1)
    assert [count(fd) for fd in eventfds[:3]] == [0, 2, 0]
    await host.set_irqs(MSIX, FIRE, 0, 3)
    await host.set_irqs(MSIX, uapi.IRQ_SET_DATA_BOOL | uapi.IRQ_SET_ACTION_TRIGGER, 0, 3, b"\0\0\1")
    assert [count(fd) for fd in eventfds[:3]] == [1, 1, 2]
    await host.set_irqs(MSIX, ARM, 1, 1)
    assert (MSIX, 1) not in function.triggers
    await host.set_irqs(MSIX, OFF, 0, 0)
    assert function.mode is None
    await host.aclose()


@trio_test
async def test_intx_with_mask_unmask_and_resample(fake, function, eventfds):
    host = await open_bdf(BDF, kernel=fake.kernel)
    await host.set_irqs(INTX, ARM, 0, 1, fds=eventfds[:1])
    await host.set_irqs(INTX, uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_MASK, 0, 1)
    assert function.masked
    await host.set_irqs(INTX, uapi.IRQ_SET_DATA_BOOL | uapi.IRQ_SET_ACTION_UNMASK, 0, 1, b"\1")
    assert not function.masked
    await host.set_irqs(INTX, uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_UNMASK, 0, 1, fds=eventfds[1:2])
    os.eventfd_write(function.resample, 1)
    assert count(eventfds[1]) == 1
    await host.set_irqs(INTX, uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_UNMASK, 0, 1)
    assert function.resample == -1
    masking = uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_MASK
    assert await refused(host, INTX, masking, 0, 1, fds=eventfds[:1]) == errno.ENOTTY
    assert await refused(host, MSI, ARM, 0, 1, fds=eventfds[:1]) == errno.EINVAL  # only one of the three
    await host.set_irqs(INTX, OFF, 0, 0)
    await host.set_irqs(MSI, ARM, 0, 1, fds=eventfds[:1])
    await host.aclose()


@trio_test
async def test_the_clients_copies_are_its_own(fake, function, eventfds):
    host = await open_bdf(BDF, kernel=fake.kernel)
    passed = os.dup(eventfds[0])
    await host.set_irqs(MSIX, ARM, 0, 1, fds=[passed])
    os.close(passed)
    function.signal(MSIX, 0)
    assert count(eventfds[0]) == 1
    await host.aclose()
    assert fake.opened("device") + fake.opened("cdev") == []
    assert function.triggers == {}


@trio_test
async def test_fewer_vectors_than_asked_for(fake, function, eventfds):
    function.vectors_had = 2
    host = await open_bdf(BDF, kernel=fake.kernel)
    with pytest.raises(HostError, match="this machine has 2 vectors for MSIX, 4 were asked for") as failed:
        await host.set_irqs(MSIX, ARM, 0, 4, fds=eventfds[:4])
    assert failed.value.errno == errno.ENOSPC
    await host.set_irqs(MSIX, ARM, 0, 2, fds=eventfds[:2])
    await host.aclose()


@trio_test
async def test_vectors_that_can_be_added_later_are(fake, function, eventfds):
    host = await open_bdf(BDF, kernel=fake.kernel)
    await host.set_irqs(MSIX, ARM, 0, 2, fds=eventfds[:2])
    function.calls.clear()
    await host.set_irqs(MSIX, ARM, 2, 4, fds=eventfds[2:6])
    assert function.calls == [f"irqs 2 {ARM:#x} 2+4"]
    await host.aclose()


@trio_test
async def test_vectors_that_cannot_be_added_come_in_parts_all_the_same(fake, function, eventfds):
    """A client passes eight fds in a message at most; the kernel wants all 20 vectors of MSI at once."""
    function.irq_counts[MSI] = 32
    host = await open_bdf(BDF, kernel=fake.kernel)
    for start in (0, 8, 16):
        some = eventfds[start : min(start + 8, 20)]
        await host.set_irqs(MSI, ARM, start, len(some), fds=some)
        assert (function.mode, function.allocated) == (MSI, start + len(some))
    assert sorted(vector for index, vector in function.triggers if index == MSI) == list(range(20))
    for vector in range(20):
        function.signal(MSI, vector)
    assert [count(fd) for fd in eventfds] == [1] * 20 + [0] * 4
    await host.set_irqs(MSI, ARM, 24, 2)  # nothing was there
    assert function.allocated == 20
    await host.set_irqs(MSI, ARM, 3, 1)
    await host.set_irqs(MSI, ARM, 20, 1, fds=eventfds[20:21])
    assert (MSI, 3) not in function.triggers
    assert (MSI, 20) in function.triggers
    await host.set_irqs(MSI, OFF, 0, 0)
    await host.set_irqs(MSI, ARM, 0, 1, fds=eventfds[:1])
    assert function.allocated == 1
    await host.aclose()


@trio_test
async def test_vectors_that_are_not_there_leave_what_was_armed(fake, function, eventfds):
    function.irq_flags[MSIX] |= uapi.IRQ_INFO_NORESIZE
    function.vectors_had = 4
    host = await open_bdf(BDF, kernel=fake.kernel)
    await host.set_irqs(MSIX, ARM, 0, 4, fds=eventfds[:4])
    assert await refused(host, MSIX, ARM, 4, 4, fds=eventfds[4:8]) == errno.ENOSPC
    for vector in range(4):
        function.signal(MSIX, vector)
    assert [count(fd) for fd in eventfds[:8]] == [1] * 4 + [0] * 4
    pipe = os.pipe()
    function.vectors_had = 8
    assert await refused(host, MSIX, ARM, 4, 1, fds=pipe[:1]) == errno.EINVAL
    assert function.allocated == 4
    for fd in pipe:
        os.close(fd)
    await host.aclose()


@trio_test
async def test_what_is_no_eventfd_is_refused_by_the_kernel(fake, function, eventfds):
    host = await open_bdf(BDF, kernel=fake.kernel)
    pipe = os.pipe()
    for index in (INTX, MSI, MSIX, ERR, REQ):
        assert await refused(host, index, ARM, 0, 1, fds=pipe[1:]) == errno.EINVAL
    assert function.mode is None
    for fd in pipe:
        os.close(fd)
    await host.set_irqs(MSIX, ARM, 0, 1, fds=eventfds[:1])
    await host.aclose()


# --- ERR and REQ


@pytest.mark.parametrize(("index", "kind"), [(ERR, "error"), (REQ, "request")])
@trio_test
async def test_what_the_device_says_comes_out_and_goes_on_to_the_client(fake, function, eventfds, index, kind):
    host = await open_bdf(BDF, kernel=fake.kernel)
    events = host.events()
    with trio.fail_after(5):
        function.signal(index)
        assert (await anext(events)).kind == kind
        await host.set_irqs(index, ARM, 0, 1, fds=eventfds[:1])
        assert count(eventfds[0]) == 0
        function.signal(index)
        assert (await anext(events)).kind == kind
        assert count(eventfds[0]) == 1
        await host.set_irqs(index, ARM, 0, 1)
        function.signal(index)
        assert (await anext(events)).kind == kind
        assert count(eventfds[0]) == 0
    await host.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(events)


@pytest.mark.parametrize("index", [ERR, REQ])
@trio_test
async def test_a_single_trigger_has_the_kernels_rules(fake, function, eventfds, index):
    host = await open_bdf(BDF, kernel=fake.kernel)
    boolean = uapi.IRQ_SET_DATA_BOOL | uapi.IRQ_SET_ACTION_TRIGGER
    assert await refused(host, index, FIRE, 0, 1) == errno.EINVAL  # not armed by the client, though by us
    assert await refused(host, index, OFF, 0, 0) == errno.EINVAL
    await host.set_irqs(index, boolean, 0, 1, b"\1")
    await host.set_irqs(index, ARM, 0, 1, fds=eventfds[:1])
    await host.set_irqs(index, FIRE, 0, 1)
    await host.set_irqs(index, boolean, 0, 1, b"\1")
    await host.set_irqs(index, boolean, 0, 1, b"\0")
    assert count(eventfds[0]) == 2
    assert await refused(host, index, ARM, 0, 0) == errno.EINVAL
    assert await refused(host, index, boolean, 0, 0) == errno.EINVAL
    assert await refused(host, index, ARM, 1, 1, fds=eventfds[:1]) == errno.EINVAL
    for action in (uapi.IRQ_SET_ACTION_MASK, uapi.IRQ_SET_ACTION_UNMASK):
        assert await refused(host, index, uapi.IRQ_SET_DATA_NONE | action, 0, 1) == errno.ENOTTY
    assert await refused(host, index, 3 | uapi.IRQ_SET_ACTION_TRIGGER, 0, 1) == errno.EINVAL
    await host.set_irqs(index, OFF, 0, 0)
    assert await refused(host, index, FIRE, 0, 1) == errno.EINVAL
    assert (index, 0) in function.triggers  # ours is still there
    await host.aclose()


@trio_test
async def test_a_function_without_aer(fake, function, eventfds):
    function.irq_counts[ERR] = 0
    host = await open_bdf(BDF, kernel=fake.kernel)
    assert await refused(host, ERR, ARM, 0, 1, fds=eventfds[:1]) == errno.EINVAL
    await host.aclose()


@trio_test
async def test_a_client_that_fills_its_counter_does_not_stop_us(fake, function, eventfds):
    """The kernel signals; a write of ours to a full blocking eventfd would wait for ever."""
    full = os.eventfd(0, os.EFD_CLOEXEC)
    os.write(full, struct.pack("=Q", (1 << 64) - 2))
    host = await open_bdf(BDF, kernel=fake.kernel)
    fired = []
    real = os.eventfd_write
    function.signal(REQ)
    await host.set_irqs(REQ, ARM, 0, 1, fds=[full])
    # The fake's signal is the kernel's: it does not wait at a full counter.
    os.eventfd_write = lambda fd, n: fired.append(fd) if os.fstat(fd).st_ino else real(fd, n)
    try:
        with trio.fail_after(5):
            assert (await anext(host.events())).kind == "request"
    finally:
        os.eventfd_write = real
    assert len(fired) == 1
    os.close(full)
    await host.aclose()


@trio_test
async def test_a_function_that_answers_no_more_is_told_as_gone(fake, function):
    host = await open_bdf(BDF, kernel=fake.kernel)
    function.dead = True
    function.signal(REQ)
    with trio.fail_after(5):
        kinds = [event.kind async for event in host.events()]
    assert kinds == ["request", "gone"]
    with pytest.raises(HostError, match="is gone"):
        host.read(0, 0, 4)
    await host.dma_unmap_all()
    await host.aclose()


@trio_test
async def test_closing_ends_the_wait_for_events(fake):
    host = await open_bdf(BDF, kernel=fake.kernel)
    seen = []

    async def watch():
        async for event in host.events():
            seen.append(event)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await trio.testing.wait_all_tasks_blocked()
            await host.aclose()
    assert seen == []
