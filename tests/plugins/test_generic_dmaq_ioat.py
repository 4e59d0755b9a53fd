"""generic_dmaq on I/OAT, at the device's door: how a guest's driver goes on after a move, and when it must restart."""

import logging
import re
import struct

import pytest
import trio
from trio.testing import MockClock, trio_test

from tests.plugins.carry import ListSink, loaded, saved, take
from tests.plugins.fake_host import FakeIoat
from vfu_server.device import SavePhase, Section, StopKind
from vfu_server.errors import (
    DeadlineError,
    DeviceGoneError,
    HostError,
    RestoreError,
    StreamFormatError,
    StreamMismatchError,
)
from vfu_server.policy import Answer, StateClass
from vfu_server.uapi import PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY

RING, DATA, COMPLETION = 0x10000, 0x40000, 0x8000
ENTRIES = 16


class Driver:
    """A guest's driver as far as a channel can tell: a linked ring of copies and a running count."""

    def __init__(self, host: FakeIoat, index: int = 0) -> None:
        self.host = host
        self.base = 0x80 * (index + 1)
        self.ring = RING + 0x1000 * index
        self.completion = COMPLETION + 0x40 * index
        self.issued = 0

    def attach(self, host: FakeIoat) -> None:
        """The same guest behind another device: its memory came along."""
        host.ram = dict(self.host.ram)
        self.host = host

    def set_up(self) -> None:
        for n in range(ENTRIES):
            following = self.ring + 64 * ((n + 1) % ENTRIES)
            descriptor = struct.pack("<IIQQQ32x", 4, 8, DATA + 8 * n, DATA + 0x1000 + 8 * n, following)
            self.host.dma_write(self.ring + 64 * n, descriptor)
        for offset, value in ((0x1C, 0), (0x18, self.completion), (0x14, 0), (0x10, self.ring)):
            self.host.write(0, self.base + offset, 4, value)
        self.host.write(0, self.base + 0x2C, 4, 0x40)
        self.host.write(0, self.base, 2, 0x1D)

    def kick(self, count: int = 1) -> list[int]:
        """Issue `count` more; the addresses that a right channel then runs."""
        wanted = [self.ring + 64 * (n % ENTRIES) for n in range(self.issued, self.issued + count)]
        self.issued += count
        self.host.write(0, self.base + 6, 2, self.issued & 0xFFFF)
        return wanted


async def ran(host: FakeIoat, count: int, index: int = 0) -> list[int]:
    """The last `count` descriptors that the channel has run, once it is done."""
    await trio.sleep(0.01)
    host.read(0, 0, 1)
    return host.chans[index].executed[-count:]


async def used(count: int) -> tuple[FakeIoat, Driver]:
    """A device whose first channel has run `count` descriptors."""
    host = FakeIoat("source")
    host.write(0, 0x03, 1, 0x09)
    host.write(0, 0x0C, 2, 0x123)
    driver = Driver(host)
    driver.set_up()
    while driver.issued < count:
        driver.kick(min(1000, count - driver.issued))
        await ran(host, 1)
    return host, driver


async def moved(count: int) -> tuple[FakeIoat, Driver]:
    """The guest of `used` behind another device."""
    source, driver = await used(count)
    sections = await saved(take(source))
    target = FakeIoat("target")
    target.chans[0].regs[0x18] = 0x9000  # of an earlier guest
    driver.attach(target)
    await loaded(take(target), sections)
    assert target.strays == []
    return target, driver


@pytest.mark.parametrize("count", [1, 5, ENTRIES, 1000, 65537, 65536 + 300])
def test_a_channel_goes_on_where_the_guest_thinks_it_is(count: int) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        target, driver = await moved(count)
        channel = target.chans[0]
        assert (channel.state, channel.regs[0x06]) == (1, count & 0xFFFF)
        assert (channel.regs[0x00], channel.regs[0x18], channel.regs[0x2C]) == (0x1C, COMPLETION, 0x40)
        assert (target.global_regs[0x03], target.global_regs[0x0C]) == (0x09, 0x8123)
        assert channel.interrupts == 0
        assert channel.completions[0] >= 0x8000_0000, "the server's own memory"
        assert set(channel.completions[1:]) <= {COMPLETION}
        for kick in (1, 3):
            wanted = driver.kick(kick)
            assert await ran(target, kick) == wanted
        assert len(channel.executed) == 1 + (count & 0xFFFF) + 4
        done = int.from_bytes(target.dma_read(COMPLETION, 8), "little")
        assert done == channel.last | 1

    run(clock=MockClock(autojump_threshold=0))


@trio_test
async def test_a_restore_writes_nothing_to_the_guests_memory(autojump_clock: MockClock) -> None:
    source, driver = await used(7)
    sections = await saved(take(source))
    target = FakeIoat()
    driver.attach(target)
    before = dict(target.ram)
    await loaded(take(target), sections)
    assert target.ram == before


@trio_test
async def test_after_exactly_65536_descriptors_the_count_is_right_too(autojump_clock: MockClock) -> None:
    target, driver = await moved(65536)
    wanted = driver.kick(2)
    assert await ran(target, 2) == wanted
    assert target.chans[0].finished == 2


@trio_test
async def test_a_channel_that_was_only_set_up_starts_its_chain(autojump_clock: MockClock) -> None:
    target, driver = await moved(0)
    assert (target.chans[0].state, target.chans[0].regs[0x10]) == (3, RING)
    wanted = driver.kick(2)
    assert await ran(target, 2) == wanted


@trio_test
async def test_a_channel_that_was_done_with_nothing_is_halted_and_it_is_told(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = FakeIoat(), FakeIoat()
    source.chans[0].state = 1
    source.chans[0].regs[0x10] = 0x7F
    device = take(target)
    with caplog.at_level(logging.WARNING):
        await loaded(device, await saved(take(source)))
    assert "left halted, its driver must restart it: it was done, but with no descriptor" in caplog.text
    assert [channel.state for channel in target.chans] == [3, 3]
    assert device.statistics()["channels_halted"] == 1


@trio_test
async def test_each_channel_keeps_its_own_place(autojump_clock: MockClock) -> None:
    source, first = await used(3)
    second = Driver(source, 1)
    second.set_up()
    second.kick(9)
    await ran(source, 1, 1)
    sections = await saved(take(source))
    target = FakeIoat()
    first.attach(target)
    second.attach(target)
    device = take(target)
    await loaded(device, sections)
    assert await ran(target, 0, 1) is not None
    for index, driver in enumerate((first, second)):
        wanted = driver.kick(2)
        assert await ran(target, 2, index) == wanted
    assert device.statistics()["channels_kept"] == 2
    assert device.statistics()["channels_halted"] == 0


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("scratch", "no scratch memory"),
        ("refused", "left halted, .*no room for it"),
        ("bad_nulls", r"did not run 5 descriptors .*chanerr 0x00000400 \[control\]"),
        ("slow", "did not run 1 descriptors"),
        ("profile", "null_chain is off"),
        ("lost", r"did not run 1 descriptors .*chanerr 0x00000100 \[read\]"),
    ],
)
def test_where_the_place_cannot_be_kept_the_channel_is_halted_and_it_is_told(
    fault: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        source, driver = await used(5)
        if fault == "lost":
            source.chans[0].last = 1 << 33
        sections = await saved(take(source))
        target = FakeIoat()
        driver.attach(target)
        device = take(target)
        if fault == "scratch":
            target.scratch_base = None
        elif fault == "refused":
            target.scratch_error = HostError("no room for it")
        elif fault == "profile":
            device.layout.profile.hook_options["null_chain"] = False
        elif fault != "lost":
            setattr(target, fault, True)
        # an earlier guest has left its own settings
        target.chans[0].regs.update({0x00: 0x1D, 0x18: 0x9000})
        before = dict(target.ram)
        with caplog.at_level(logging.WARNING):
            await loaded(device, sections)
        assert "left halted, its driver must restart it" in caplog.text
        assert re.search(said, caplog.text)
        channel = target.chans[0]
        assert (channel.state, channel.regs[0x28], channel.regs[0x06]) == (3, 0, 0)
        assert (channel.regs[0x00], channel.regs[0x18], channel.regs[0x2C]) == (0x1C, COMPLETION, 0x40)
        assert device.statistics()["channels_halted"] == 1
        assert (target.strays, target.lent, channel.interrupts, target.ram) == ([], None, 0, before)

    run(clock=MockClock(autojump_threshold=0))


@trio_test
async def test_a_device_that_is_gone_is_not_left_halted_but_told(autojump_clock: MockClock) -> None:
    sections = await saved(take((await used(5))[0]))
    target = FakeIoat()
    target.scratch_error = DeviceGoneError("unplugged")
    with pytest.raises(DeviceGoneError):
        await loaded(take(target), sections)


@trio_test
async def test_a_restart_by_the_driver_works_on_a_halted_channel(autojump_clock: MockClock) -> None:
    source, driver = await used(5)
    sections = await saved(take(source))
    target = FakeIoat()
    target.scratch_base = None
    driver.attach(target)
    await loaded(take(target), sections)
    target.write(0, 0x84, 1, 0x20)
    driver.issued = 0
    driver.set_up()
    wanted = driver.kick(3)
    assert await ran(target, 3) == wanted


@trio_test
async def test_a_channel_that_cannot_be_reset_fails_the_restore(autojump_clock: MockClock) -> None:
    source, driver = await used(2)
    sections = await saved(take(source))
    target = FakeIoat()
    driver.attach(target)
    target_driver = Driver(target)
    target_driver.set_up()
    target_driver.kick(1)
    await ran(target, 1)
    target.deaf_reset = True
    with pytest.raises(DeadlineError, match=r"channel\[0\] is not reset after 0.2 s"):
        await loaded(take(target), sections)


@trio_test
async def test_a_register_that_does_not_take_its_value_is_named(autojump_clock: MockClock) -> None:
    sections = await saved(take((await used(2))[0]))
    target = FakeIoat()
    target.deaf = {0x2C}
    with pytest.raises(RestoreError, match=r"channel\[0\].chanerr_mask 0x00000000 instead of .* 0x00000040"):
        await loaded(take(target), sections)


@trio_test
async def test_a_save_leaves_the_source_as_it_was(autojump_clock: MockClock) -> None:
    """Reads of INTRCTRL and CHANCTRL act: what they did is undone, and nothing else is written."""
    source, driver = await used(5)
    device = take(source)
    before = dict(source.global_regs), dict(source.chans[0].regs)
    writes = list(source.writes)
    first = await saved(device)
    assert source.writes[len(writes) :] == [(0x80, 0x1C), (0x100, 0), (0x03, 0x09)]
    assert (source.global_regs, source.chans[0].regs) == before
    await device.start(StopKind.FULL)
    assert await saved(device) == first
    assert (source.global_regs, source.chans[0].regs) == before
    assert sum(len(s.payload) for s in first) == await device.estimate()
    wanted = driver.kick(2)
    assert await ran(source, 2) == wanted


@trio_test
async def test_nobody_reads_what_acts_while_it_is_stopped(autojump_clock: MockClock) -> None:
    policy = take(FakeIoat()).policy
    acting = [rule for rule in policy.rules if rule.name.split(".")[-1] in ("intrctrl", "attnstatus", "chanctrl")]
    assert len(acting) == 4
    assert {rule.read[state] for rule in acting for state in (StateClass.STOPPED, StateClass.P2P)} == {Answer.DISCARD}
    assert {rule.read[StateClass.RUNNING] for rule in acting} == {Answer.PASS}


@trio_test
async def test_stop_waits_for_a_kick_that_the_hardware_has_not_seen_yet(autojump_clock: MockClock) -> None:
    source, driver = await used(1)
    source.blind = 0.0003
    wanted = driver.kick(4)
    await take(source).stop(StopKind.FULL)
    assert source.chans[0].executed[-4:] == wanted


@pytest.mark.parametrize(("state", "name"), [(0, "active"), (2, "suspended")])
def test_a_channel_that_is_not_at_rest_holds_the_stop(state: int, name: str) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        source, _ = await used(1)
        source.chans[0].state = state
        with pytest.raises(DeadlineError, match=rf"'descriptors of channel\[0\]' .*state={state:#x} \({name}\)"):
            await take(source, drain_timeout="0.3").stop(StopKind.FULL)

    run(clock=MockClock(autojump_threshold=0))


@trio_test
async def test_errors_of_a_halted_channel_are_told_as_lost(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = await used(1)
    source.chans[0].state, source.chans[0].regs[0x28] = 3, 0x200
    target = FakeIoat()
    sections = await saved(take(source))
    with caplog.at_level(logging.WARNING):
        await loaded(take(target), sections)
    assert "the errors 0x200 that it had are not carried" in caplog.text
    assert (target.chans[0].state, target.chans[0].regs[0x28]) == (3, 0)


@trio_test
async def test_the_guests_bus_mastering_is_lent_and_put_back(autojump_clock: MockClock) -> None:
    sections = await saved(take((await used(3))[0]))
    target = FakeIoat()
    target.command = 0
    device = take(target)
    await loaded(device, sections)
    assert (target.command, target.strays, device.statistics()["channels_kept"]) == (0, [], 1)
    assert PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER == 6


@trio_test
async def test_old_errors_in_config_space_are_cleared_before_3_3(autojump_clock: MockClock) -> None:
    for version, left in ((0x32, 0), (0x33, 0x10)):
        target = FakeIoat()
        target.global_regs[0x08] = version
        target.config[0x180] = 0x10
        target.chans[0].regs[0x28] = 0x10
        await take(target).reset()
        assert (target.chans[0].regs[0x28], target.config[0x180]) == (0, left)


@trio_test
async def test_a_reset_halts_all_channels_and_clears_what_the_guest_wrote(autojump_clock: MockClock) -> None:
    host, driver = await used(5)
    driver.kick(1)
    await take(host).reset()
    for channel in host.chans:
        assert channel.state == 3
        assert [channel.regs[offset] for offset in (0x00, 0x06, 0x18, 0x2C)] == [0, 0, 0, 0]
    assert (host.global_regs[0x03], host.global_regs[0x0C]) == (0, 0x8000)


@pytest.mark.parametrize(("register", "value"), [(0x00, 1), (0x01, 19), (0x08, 0x33), (0x10, 0x142)])
def test_another_kind_of_device_is_refused_at_the_first_section(register: int, value: int) -> None:
    @trio_test
    async def run(clock: MockClock) -> None:
        sections = await saved(take((await used(2))[0]))
        target = FakeIoat()
        target.global_regs[register] = value
        device = take(target)
        await device.load_begin()
        with pytest.raises(StreamMismatchError):
            await device.load(sections[0])
        assert target.writes == []

    run(clock=MockClock(autojump_threshold=0))


@trio_test
async def test_the_number_of_channels_is_part_of_the_identity(autojump_clock: MockClock) -> None:
    source, target = FakeIoat(), FakeIoat()
    target.global_regs[0] = 1
    with pytest.raises(StreamMismatchError, match="saved with 2 queues, this device has 1"):
        take(target).check_identity(take(source).identity)
    take(FakeIoat()).check_identity(take(source).identity)


@trio_test
async def test_a_state_of_a_running_channel_is_refused(autojump_clock: MockClock) -> None:
    sections = await saved(take((await used(2))[0]))
    device = take(FakeIoat())
    payload = bytearray(sections[1].payload)
    at = [r.name for r in device.layout.saved].index("channel[0].chansts") * 16 + 8
    payload[at] = payload[at] & ~7
    await device.load_begin()
    await device.load(sections[0])
    with pytest.raises(StreamFormatError, match=r"channel\[0\] was not at rest \(state 0\)"):
        await device.load(Section("registers", 1, bytes(payload)))


def test_the_doorbells_are_closed_while_it_does_not_run() -> None:
    device = take(FakeIoat())
    doorbells = {name for queue in device.layout.queues for name in queue.doorbells}
    assert len(doorbells) == 4
    for rule in device.policy.rules:
        assert rule.write[StateClass.STOPPED] is rule.write[StateClass.RESUMING] is Answer.DISCARD
        assert rule.write[StateClass.RUNNING] is Answer.PASS
    assert doorbells <= {rule.name for rule in device.policy.rules}


@trio_test
async def test_a_restore_that_is_broken_off_ends_with_the_scratch_memory_unused(autojump_clock: MockClock) -> None:
    source, driver = await used(50)
    sections = await saved(take(source))
    for seconds in (0.0001, 0.0005, 0.002):
        target = FakeIoat()
        target.delay = 0.001
        driver.attach(target)
        device = take(target)
        await device.load_begin()
        for section in sections:
            await device.load(section)
        with trio.move_on_after(seconds):
            await device.load_done()
        await trio.sleep(0.1)
        target.read(0, 0, 1)
        assert (target.strays, target.lent) == ([], None)


@trio_test
async def test_pre_copy_gives_nothing(autojump_clock: MockClock) -> None:
    sink = ListSink()
    await take(FakeIoat()).save(SavePhase.PRE_COPY, sink)
    assert sink.sections == []
