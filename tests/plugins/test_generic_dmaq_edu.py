"""generic_dmaq on edu, at the device's door: stop, save, restore, reset, and what goes wrong with each."""

import logging
import struct

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, trio_test

from plugins.generic_dmaq.edu_hooks import RESULTS
from tests.plugins.carry import ListSink, loaded, saved, take
from tests.plugins.fake_host import FakeEdu
from vfu_server.device import SavePhase, Section, StopKind
from vfu_server.errors import (
    DeadlineError,
    DeviceGoneError,
    HostError,
    MigrationError,
    RestoreError,
    StateError,
    StreamFormatError,
    StreamMismatchError,
)
from vfu_server.policy import WIDTHS_REGISTER, Answer, StateClass
from vfu_server.uapi import PCI_COMMAND_INTX_DISABLE, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY

BUSY = {0x04: 0x12345678, 0x08: 120, 0x20: 0x80, 0x24: 0x101, 0x80: 0x1000, 0x88: 0x40010, 0x90: 0xFF0, 0x98: 6}


def used(**changes: int) -> FakeEdu:
    """An edu as a guest may have left it."""
    host = FakeEdu()
    host.regs.update(BUSY)
    host.intx = True
    host.buffer[:] = bytes(n * 7 & 0xFF for n in range(0x1000))
    return host


def picture(host: FakeEdu) -> tuple[dict[int, int], bytes, int, bool]:
    """All that a guest can tell of the device."""
    return dict(host.regs), bytes(host.buffer), host.command, host.line()


def test_the_policy_closes_every_byte_while_it_does_not_run() -> None:
    device = take(FakeEdu())
    policy, sizes = device.policy, device.layout.sizes
    policy.check(sizes)
    assert not list(policy.gaps(sizes))
    for rule in policy.rules:
        assert (rule.read[StateClass.RUNNING], rule.write[StateClass.RUNNING]) == (Answer.PASS, Answer.PASS)
        assert rule.widths == WIDTHS_REGISTER
        assert rule.reason
        for state in (StateClass.P2P, StateClass.STOPPED, StateClass.RESUMING, StateClass.ERROR):
            assert rule.write[state] is Answer.DISCARD
            assert rule.read[state] in (Answer.SHADOW, Answer.DISCARD)
    assert not policy.p2p
    assert "peer" in policy.p2p_reason


def test_it_migrates_without_pre_copy_and_p2p() -> None:
    capabilities = take(FakeEdu()).capabilities
    assert (capabilities.migratable, capabilities.pre_copy, capabilities.p2p) == (True, False, False)


@trio_test
async def test_p2p_is_refused_with_the_reason(autojump_clock: MockClock) -> None:
    with pytest.raises(StateError, match="peer"):
        await take(FakeEdu()).stop(StopKind.P2P)


@trio_test
async def test_stop_waits_for_the_transfer(autojump_clock: MockClock) -> None:
    host = FakeEdu()
    device = take(host)
    for offset, value in ((0x80, 0x2000), (0x88, 0x40000), (0x90, 4), (0x98, 5)):
        host.write(0, offset, 8, value)
    host.ram.update({0x2000 + n: n + 1 for n in range(4)})
    began = trio.current_time()
    await device.stop(StopKind.FULL)
    assert 0.1 <= trio.current_time() - began < 0.2
    assert host.buffer[:4] == bytes((1, 2, 3, 4))
    assert host.intx
    assert device.statistics()["drain_microseconds"] >= 100_000


@trio_test
async def test_stop_waits_for_the_interrupt_behind_the_busy_bit(autojump_clock: MockClock) -> None:
    host = FakeEdu()
    host.msi = True
    device = take(host)
    host.write(0, 0x20, 4, 0x80)
    host.write(0, 0x08, 4, 5)
    await device.stop(StopKind.FULL)
    assert (host.messages, host.regs[0x24], host.regs[0x08]) == (1, 1, 120)


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (0x98, 1, r"'DMA' \(dma_command 0x0000000000000001 \[running\]"),
        (0x08, 1000, r"'factorial' \(status 0x00000001 \[computing\]"),
    ],
)
def test_a_stop_that_times_out_names_the_queue_and_changes_nothing(offset: int, value: int, said: str) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        host = FakeEdu()
        host.stuck, host.factorial_seconds = True, 1e6
        device = take(host, drain_timeout="0.7")
        host.write(0, offset, 4, value)
        before, writes = picture(host), list(host.writes)
        began = trio.current_time()
        with pytest.raises(DeadlineError, match=said):
            await device.stop(StopKind.FULL)
        assert 0.7 <= trio.current_time() - began < 0.8
        assert (picture(host), host.writes) == (before, writes)
        assert device.statistics()["drain_timeouts"] == 1

    run(clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("command", [PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, 0])
def test_a_save_leaves_the_source_as_it_was(command: int) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        host = used()
        host.command = command
        before = picture(host)
        device = take(host)
        first = await saved(device)
        await device.start(StopKind.FULL)
        assert picture(host) == before
        assert await saved(device) == first
        assert [s.tag for s in first] == ["device", "registers", "memory"]
        assert sum(len(s.payload) for s in first) == await device.estimate()
        assert (host.messages, host.strays) == (0, [])

    run(clock=MockClock(autojump_threshold=0))


@trio_test
async def test_pre_copy_gives_nothing(autojump_clock: MockClock) -> None:
    sink = ListSink()
    await take(used()).save(SavePhase.PRE_COPY, sink)
    assert sink.sections == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    liveness=st.integers(0, 2**32 - 1),
    result=st.sampled_from(sorted(RESULTS)),
    wanted=st.sampled_from((0, 0x80)),
    pending=st.sampled_from((0, 1, 0x100, 0x101, 0xFFFFFFFF)),
    addresses=st.tuples(*[st.integers(0, 2**64 - 1)] * 3),
    command=st.one_of(st.sampled_from((0, 2, 4, 6)), st.integers(0, 2**63 - 1).map(lambda n: n * 2)),
    command_register=st.sampled_from((0, 2, 6)),
    msi=st.booleans(),
    fill=st.integers(0, 255),
)
def test_whatever_a_guest_left_arrives(
    liveness: int,
    result: int,
    wanted: int,
    pending: int,
    addresses: tuple[int, int, int],
    command: int,
    command_register: int,
    msi: bool,
    fill: int,
) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        source, target = FakeEdu("source"), used()
        source.regs.update({0x04: liveness, 0x08: result, 0x20: wanted, 0x24: pending, 0x98: command})
        source.regs.update(zip((0x80, 0x88, 0x90), addresses, strict=True))
        source.buffer[:] = bytes((fill, 255 - fill)) * 0x800
        source.intx = source.was_high = bool(pending) and not msi
        source.msi = target.msi = msi
        target.intx = False
        source.command = target.command = command_register
        before = picture(source)
        sections = await saved(take(source))
        assert picture(source) == before
        await loaded(take(target), sections)
        assert picture(target) == before
        # one interrupt more under MSI if one was pending and may be sent, none of our own
        assert target.messages == (1 if msi and pending and command_register & PCI_COMMAND_MASTER else 0)
        assert target.edges == (1 if pending and not msi else 0)
        # a line that was high before may be lowered and raised again, but none is raised that was low
        assert source.edges == 0 or source.intx
        assert (source.messages, source.strays, target.strays) == (0, [], [])

    run(clock=MockClock(autojump_threshold=0))


@trio_test
async def test_a_running_target_is_brought_to_rest_first(autojump_clock: MockClock) -> None:
    sections = await saved(take(used()))
    target = FakeEdu()
    device = take(target)
    for offset, value in ((0x80, 0x2000), (0x88, 0x40000), (0x90, 16), (0x98, 5), (0x08, 30)):
        target.write(0, offset, 4, value)
    await loaded(device, sections)
    assert (target.regs, target.buffer) == (BUSY, used().buffer)


@trio_test
async def test_interrupts_of_an_earlier_guest_reach_nobody(autojump_clock: MockClock) -> None:
    source, target = FakeEdu(), FakeEdu()
    source.regs.update({0x08: 1, 0x24: 0x100})
    sections = await saved(take(source))
    target.msi, target.factorial_seconds = True, 0.0
    target.regs.update({0x20: 0x80, 0x24: 0x106})
    device = take(target)
    target.write(0, 0x08, 4, 5)
    target.tick()
    await loaded(device, sections)
    await trio.sleep(1)
    # the factorial had ended before its interrupt could be masked: one message of the earlier guest, one of this one
    assert (target.read(0, 0x24, 4), target.messages) == (0x100, 2)
    assert target.regs == source.regs


@pytest.mark.parametrize("seconds", [0.02, 0.11, 0.15, 0.25])
def test_a_save_that_is_broken_off_leaves_the_device_startable(seconds: float) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        host = used()
        before = picture(host)
        device = take(host)
        await device.stop(StopKind.FULL)
        with trio.move_on_after(seconds):
            await device.save(SavePhase.STOP_COPY, ListSink())
        await device.start(StopKind.FULL)
        assert (picture(host), host.strays, host.lent) == (before, [], None)

    run(clock=MockClock(autojump_threshold=0))


@trio_test
async def test_what_a_hanging_transfer_has_left_is_put_back_by_the_next_start(autojump_clock: MockClock) -> None:
    host = used()
    device = take(host)
    await device.stop(StopKind.FULL)
    host.stuck = True
    with pytest.raises(DeadlineError, match="running"):
        await device.save(SavePhase.STOP_COPY, ListSink())
    with pytest.raises(DeadlineError, match="running"):
        await device.start(StopKind.FULL)
    host.stuck = False
    host.transfer_done()
    await device.start(StopKind.FULL)
    assert host.regs == BUSY


@trio_test
async def test_a_save_after_a_broken_off_one_saves_the_guests_values(autojump_clock: MockClock) -> None:
    host, target = used(), FakeEdu()
    device = take(host)
    await device.stop(StopKind.FULL)
    with trio.move_on_after(0.05):
        await device.save(SavePhase.STOP_COPY, ListSink())
    await loaded(take(target), await saved(device))
    assert (target.regs, target.buffer) == (BUSY, host.buffer)


@trio_test
async def test_without_scratch_memory_the_buffer_stays_and_everybody_is_told(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = used(), used()
    source.scratch_base = None
    device = take(source)
    with caplog.at_level(logging.WARNING):
        sections = await saved(device)
    assert "buffer is not carried" in caplog.text
    assert device.statistics()["memory_not_carried"] == 1
    assert [s.tag for s in sections] == ["device", "registers"]
    await loaded(take(target), sections)
    assert target.regs == BUSY
    assert "saved without the device's memory" in caplog.text
    assert not any(target.buffer), "what another guest left must not stay"


@trio_test
async def test_a_target_without_scratch_memory_refuses_at_the_first_section(autojump_clock: MockClock) -> None:
    sections = await saved(take(used()))
    target = FakeEdu()
    target.scratch_base = 1 << 28
    device = take(target)
    await device.load_begin()
    with pytest.raises(StreamMismatchError, match="no scratch memory"):
        await device.load(sections[0])
    assert target.writes == []


@pytest.mark.parametrize(
    ("offset", "name"),
    [(0x04, "liveness"), (0x08, "factorial"), (0x20, "status"), (0x60, "irq_status"), (0x88, "dma_d")],
)
def test_a_register_that_does_not_take_its_value_is_named(offset: int, name: str) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        sections = await saved(take(used()))
        target = FakeEdu()
        target.deaf = {offset}
        target.drop = offset == 0x88
        with pytest.raises(RestoreError, match=f"{name}.* instead of|buffer does not hold"):
            await loaded(take(target), sections)

    run(clock=MockClock(autojump_threshold=0))


@trio_test
async def test_a_transfer_that_moves_nothing_is_noticed(autojump_clock: MockClock) -> None:
    sections = await saved(take(FakeEdu()))
    target = FakeEdu()
    target.drop = True
    with pytest.raises(RestoreError, match="buffer does not hold what was written"):
        await loaded(take(target), sections)


@trio_test
async def test_a_save_whose_transfer_moves_nothing_is_noticed(autojump_clock: MockClock) -> None:
    source = used()
    before = dict(source.regs)
    source.drop = True
    device = take(source)
    with pytest.raises(HostError, match="the buffer was not fetched"):
        await saved(device)
    await device.start(StopKind.FULL)
    assert source.regs == before


@trio_test
async def test_a_target_that_hangs_is_given_up_in_time(autojump_clock: MockClock) -> None:
    sections = await saved(take(used()))
    target = FakeEdu()
    target.stuck = True
    began = trio.current_time()
    with pytest.raises(DeadlineError, match="running"):
        await loaded(take(target), sections)
    assert trio.current_time() - began < 4.5


def changed(sections: list[Section], index: int, at: int, data: bytes) -> list[Section]:
    """A copy with bytes of one payload overwritten."""
    payload = bytearray(sections[index].payload)
    payload[at : at + len(data)] = data
    old = sections[index]
    return [*sections[:index], Section(old.tag, old.version, bytes(payload), old.optional), *sections[index + 1 :]]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda s: changed(s, 0, 0, b"NOPE"), StreamFormatError, "begins with b'NOPE'"),
        (lambda s: changed(s, 0, 4, b"\x02"), StreamFormatError, "layout 2"),
        (lambda s: changed(s, 0, 6, b"\x81"), StreamFormatError, "flags 0x81"),
        (lambda s: changed(s, 0, 8, b"\x09"), StreamMismatchError, "9 registers were saved, this device has 8"),
        (lambda s: changed(s, 0, 12, b"\xff\xff\xff\xff"), StreamMismatchError, "4294967295 bytes of memory"),
        (lambda s: changed(s, 0, 16, b"\x00"), StreamMismatchError, "0 identity registers"),
        (
            lambda s: changed(s, 0, 31, b"\x02"),
            StreamMismatchError,
            "identification is 0x10000ed here and was 0x20000ed",
        ),
        (lambda s: changed(s, 1, 4, b"\xa0"), StreamFormatError, "stands where dma_command should"),
        (lambda s: changed(s, 1, 8, b"\x01"), StreamFormatError, "it was not at rest"),
        (lambda s: changed(s, 1, 5 * 16 + 8, b"\x79"), StreamFormatError, "result of no input"),
        (lambda s: changed(s, 1, 6 * 16 + 8, b"\x02"), StreamFormatError, "bits that the device does not have"),
        (lambda s: changed(s, 1, 4 * 16 + 12, b"\x01"), StreamFormatError, "does not fit 4 bytes"),
        (lambda s: [s[0], Section("registers", 1, s[1].payload[:-1]), s[2]], StreamFormatError, "bytes of registers"),
        (lambda s: [s[0], s[1], Section("memory", 1, bytes(5))], StreamFormatError, "5 bytes, not 4096"),
        (lambda s: [Section("device", 1, b"DMAQ"), *s[1:]], StreamFormatError, "header has 4 bytes"),
        (lambda s: [s[1], s[0], s[2]], StreamFormatError, "came before 'device'"),
        (lambda s: [s[0], s[1], s[1], s[2]], StreamFormatError, "came twice"),
        (lambda s: s[:2], StreamFormatError, "ends without memory"),
        (lambda s: s[:1], StreamFormatError, "ends without registers, memory"),
        (lambda s: [], StreamFormatError, "ends without device, registers$"),
        (lambda s: [*s, Section("more", 1, b"")], StreamFormatError, "unknown section 'more'"),
        (lambda s: [s[0], Section("registers", 2, s[1].payload), s[2]], StreamFormatError, "version 2"),
        (
            lambda s: [*changed(s[:2], 0, 6, bytes(10) + s[0].payload[16:]), s[2]],
            MigrationError,
            "registers were saved",
        ),
    ],
)
def test_a_wrong_state_is_named_and_never_reaches_the_device(change, error: type[Exception], said: str) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        sections = await saved(take(used()))
        target = FakeEdu()
        with pytest.raises(error, match=said):
            await loaded(take(target), change(sections))
        assert target.writes == []

    run(clock=MockClock(autojump_threshold=0))


@trio_test
async def test_an_optional_section_of_later_is_skipped(autojump_clock: MockClock) -> None:
    sections = await saved(take(used()))
    target = FakeEdu()
    await loaded(take(target), [*sections, Section("later", 7, b"?", optional=True)])
    assert target.regs == BUSY


@trio_test
async def test_an_abandoned_load_is_forgotten(autojump_clock: MockClock) -> None:
    sections = await saved(take(used()))
    device = take(FakeEdu())
    await device.load_begin()
    await device.load(sections[0])
    await loaded(device, sections)
    with pytest.raises(StreamFormatError, match="ends without device"):
        await device.load_done()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_stream_brings_it_down(data: st.DataObject) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        sections = await saved(take(used()))
        for _ in range(data.draw(st.integers(1, 3))):
            index = data.draw(st.integers(0, 2))
            at = data.draw(st.integers(0, len(sections[index].payload) - 1))
            sections = changed(sections, index, at, data.draw(st.binary(min_size=1, max_size=9)))
        target = FakeEdu()
        try:
            await loaded(take(target), sections)
        except MigrationError:
            return
        registers = struct.unpack("<" + "8xQ" * 8, sections[1].payload)
        assert target.regs[0x98] == registers[0]
        assert target.regs[0x04] == registers[4]

    run(clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("can_reset", [False, True])
def test_a_reset_leaves_nothing_of_the_guest(can_reset: bool) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        host = used()
        host.can_reset = can_reset
        device = take(host)
        host.write(0, 0x98, 4, 5)
        await device.reset()
        assert not any(host.regs.values())
        assert not any(host.buffer)
        assert (host.line(), host.resets, host.strays) == (False, int(can_reset), [])

    run(clock=MockClock(autojump_threshold=0))


@trio_test
async def test_a_failed_function_reset_is_told_and_made_up_for(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    host = used()
    host.can_reset, host.reset_error = True, HostError("no bus reset")
    with caplog.at_level(logging.WARNING):
        await take(host).reset()
    assert "function reset failed (no bus reset)" in caplog.text
    assert not any(host.regs.values())
    host.reset_error = DeviceGoneError("unplugged")
    with pytest.raises(DeviceGoneError):
        await take(host).reset()


@trio_test
async def test_a_reset_without_scratch_memory_says_that_the_buffer_stays(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    host = used()
    host.scratch_base = None
    with caplog.at_level(logging.WARNING):
        await take(host).reset()
    assert "could not be cleared" in caplog.text
    assert not any(host.regs.values())
    assert any(host.buffer)


@trio_test
async def test_a_reset_of_a_hanging_device_fails_in_time(autojump_clock: MockClock) -> None:
    host = FakeEdu()
    host.stuck = True
    device = take(host)
    host.write(0, 0x98, 4, 1)
    began = trio.current_time()
    with pytest.raises(DeadlineError, match="'DMA'"):
        await device.reset()
    assert trio.current_time() - began < 4.5


@trio_test
async def test_a_state_that_no_guest_can_bring_about_is_not_saved(autojump_clock: MockClock) -> None:
    host = FakeEdu()
    host.regs[0x08] = 7
    with pytest.raises(HostError, match="result of no input"):
        await saved(take(host))


def test_every_result_has_its_input() -> None:
    for n in range(35):
        product = 1
        for k in range(1, n + 1):
            product = product * k & 0xFFFFFFFF
        again = 1
        for k in range(1, RESULTS[product] + 1):
            again = again * k & 0xFFFFFFFF
        assert again == product
    assert (RESULTS[0], RESULTS[0x80000000]) == (34, 32)


@trio_test
async def test_intx_stays_enabled_for_the_guest(autojump_clock: MockClock) -> None:
    target = FakeEdu()
    await loaded(take(target), await saved(take(used())))
    assert target.command & PCI_COMMAND_INTX_DISABLE == 0
    assert target.line()


@trio_test
async def test_a_client_may_write_command_while_its_data_is_looked_at(autojump_clock: MockClock) -> None:
    sections = await saved(take(used()))
    target = FakeEdu()
    device = take(target)
    await device.load_begin()
    reads = []
    target.read = lambda region, offset, width: reads.append((region, offset)) or 0
    for section in sections:
        await device.load(section)
    assert reads == []
