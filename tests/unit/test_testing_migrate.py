"""The shipped migration: the order of steps, what is copied, and who runs after a failure."""

import errno
import socket
import sys
import threading
from contextlib import contextmanager

import pytest

from tests.unit.peer_device import REG_KEPT, REG_SIGNAL, PeerDevice
from vfu_server import uapi
from vfu_server.errors import DeadlineError
from vfu_server.testing import Client, Guest, GuestMemory, ReplyError, migrate, migrate_guest
from vfu_server.uapi import Command, IrqIndex, MigState


@contextmanager
def a_client(**how):
    ours, theirs = socket.socketpair()
    device = PeerDevice(theirs, **how)
    with Client(ours) as client:
        yield client, device
    device.close()


@pytest.fixture
def two():
    with a_client(data=bytes(range(250))) as source, a_client() as destination:
        yield *source, *destination


def states(device):
    return [detail for command, detail in device.log if command == Command.DEVICE_FEATURE and detail in set(MigState)]


def test_the_steps_are_those_of_qemu(two):
    source, source_device, destination, destination_device = two
    source_device.kept = 0x12345678
    record = migrate(source, destination, chunk=100)
    assert states(source_device) == [MigState.PRE_COPY, MigState.STOP_COPY, MigState.STOP]
    assert states(destination_device) == [MigState.RESUMING, MigState.RUNNING]
    assert destination_device.kept == 0x12345678
    assert (record.pre_copy_bytes, record.stop_copy_bytes, record.memory_bytes) == (250, 4, 0)
    assert [step.name for step in record.steps] == [
        "begin",
        "destination RESUMING",
        "source PRE_COPY",
        "pre-copy data",
        "source STOP_COPY",
        "memory",
        "stop-copy data",
        "arrange",
        "destination RUNNING",
        "source STOP",
    ]
    assert 0 < record.seconds("stop-copy data") <= record.downtime
    assert [d for c, d in destination_device.log if c == Command.MIG_DATA_WRITE] == [100, 100, 50, 4]


@pytest.mark.parametrize(("flags", "asked", "used"), [(1, None, False), (7, False, False), (5, None, True)])
def test_pre_copy_is_used_where_both_have_it(flags, asked, used):
    with a_client(migration=flags) as (source, device), a_client() as (destination, _):
        migrate(source, destination, pre_copy=asked)
        assert (MigState.PRE_COPY in states(device)) == used


@pytest.mark.parametrize(
    ("which", "what"),
    [
        ("source", (Command.DEVICE_FEATURE, MigState.STOP_COPY)),
        ("source", (Command.MIG_DATA_READ, 1 << 20)),
        ("destination", (Command.DEVICE_FEATURE, MigState.RESUMING)),
        ("destination", (Command.MIG_DATA_WRITE, 250)),
        ("destination", (Command.DEVICE_FEATURE, MigState.RUNNING)),
    ],
)
def test_after_a_failure_the_source_runs(two, which, what):
    source, source_device, destination, destination_device = two
    (source_device if which == "source" else destination_device).refuse[what] = errno.EBUSY
    with pytest.raises(ReplyError, match="EBUSY") as caught:
        migrate(source, destination)
    assert source_device.state == MigState.RUNNING
    assert any("failed in step" in note for note in caught.value.__notes__)
    assert "the source runs again" in caught.value.__notes__


@pytest.mark.parametrize(
    ("told", "rounds"),
    [
        (None, 1),
        ([(250, 0), (0, 0)], 1),
        ([(250, 0), (0, 1 << 20)], 1),
        ([(250, 0), (0, 5 << 20), (0, 3 << 20), (0, 1 << 20)], 3),
        ([(250, 0), (100, 0), (50, 9 << 20), (0, 100)], 3),
        ([(250, 0), (0, 5 << 20)], 3),
        ([(0, 9 << 20), (0, 9 << 20), (0, 8 << 20), (0, 8 << 20), (0, 8 << 20), (0, 8 << 20)], 5),
    ],
)
def test_pre_copy_goes_on_in_rounds_while_that_leaves_less(two, told, rounds):
    source, source_device, destination, _ = two
    source_device.pre_copy_left = told
    record = migrate(source, destination)
    assert record.rounds == rounds
    assert (record.pre_copy_bytes, record.stop_copy_bytes) == (250, 4)


def test_a_device_that_never_gets_smaller_enough_is_stopped_after_all(two):
    source, source_device, destination, _ = two
    source_device.pre_copy_left = [(0, (100 - n) << 20) for n in range(90)]
    assert migrate(source, destination).rounds == 30


def test_a_round_ends_where_it_was_expected_to(two):
    source, source_device, destination, _ = two
    source_device.saved = bytes(5000)
    source_device.pre_copy_left = [(1000, 0), (1000, 0), (0, 0)]
    assert migrate(source, destination, chunk=100).pre_copy_bytes == 2 * 1100


def test_progress_is_told(two):
    source, source_device, destination, _ = two
    source_device.pre_copy_left = [(250, 0), (0, 0)]
    told = []
    migrate(source, destination, chunk=100, tell=told.append)
    assert [p.state_bytes for p in told if p.step == "pre-copy data"] == [0, 100, 200, 250]
    assert [p.left for p in told if p.step == "pre-copy data"] == [None, 150, 50, 0]
    assert told[-1].step == "source STOP"
    assert told[-1].state_bytes == 254


def test_a_first_pass_that_stalls_is_given_up(two, monkeypatch):
    source, source_device, destination, _ = two
    monkeypatch.setattr(sys.modules[migrate.__module__], "FIRST_PASS_DEADLINE", 0.0)
    source_device.saved, source_device.pre_copy_left = b"", [(250, 0)]
    with pytest.raises(DeadlineError, match="250 bytes of its first pass"):
        migrate(source, destination)
    assert source_device.state == MigState.RUNNING


def test_a_destination_that_does_not_answer_is_dropped_before_the_source_runs(two):
    source, source_device, destination, destination_device = two
    order, released = [], threading.Event()
    enter, leave = source_device._enter, destination.close

    def hang(state):
        if state == MigState.RUNNING:
            released.wait(5)

    destination_device._enter = hang
    source_device._enter = lambda state: (order.append(state), enter(state))
    destination.close = lambda: (order.append("closed"), leave())
    destination.timeout = 0.2
    with pytest.raises(DeadlineError) as caught:
        migrate(source, destination)
    released.set()
    assert order == [MigState.PRE_COPY, MigState.STOP_COPY, "closed", MigState.RUNNING]
    assert "the destination did not say whether it runs: its connection was closed" in caught.value.__notes__


def test_a_source_that_cannot_run_again_is_told_with_the_first_failure(two):
    source, source_device, destination, destination_device = two
    source_device.refuse[Command.DEVICE_FEATURE, MigState.RUNNING] = errno.EIO
    destination_device.refuse[Command.DEVICE_FEATURE, MigState.RUNNING] = errno.EPROTO
    with pytest.raises(ReplyError, match="EPROTO") as caught:
        migrate(source, destination)
    assert any("could not be put back" in note and "EIO" in note for note in caught.value.__notes__)


def test_a_source_that_does_not_stop_leaves_the_destination_in_charge(two):
    source, source_device, destination, destination_device = two
    source_device.refuse[Command.DEVICE_FEATURE, MigState.STOP] = errno.EIO
    with pytest.raises(ReplyError) as caught:
        migrate(source, destination)
    assert destination_device.state == MigState.RUNNING
    assert MigState.RUNNING not in states(source_device)
    assert "the destination runs; the source was not stopped" in caught.value.__notes__


@contextmanager
def two_guests(*, shared=False):
    with (
        GuestMemory.of(1 << 20) as old,
        GuestMemory.of(1 << 20) as new,
        a_client() as (first, device),
        a_client() as (second, other),
        Guest(first, old) as source,
        Guest(second, old if shared else new) as destination,
    ):
        source.start()
        destination.plug_in()
        destination.machine_reset()
        yield source, device, destination, other


def test_a_guest_moves_with_memory_and_interrupts():
    with two_guests() as (source, device, destination, other):
        source.enable_msix(3)
        source.write(0, REG_KEPT, 4, 99)
        source.memory.write(0x5000, b"before")
        device.dirty = {0x7000}
        record = migrate_guest(source, destination)
        assert destination.memory.read(0x5000, 6) == b"before"
        assert record.memory_bytes == (1 << 20) + 4096
        assert other.config[uapi.PCI_COMMAND] == 7
        armed = (Command.DEVICE_SET_IRQS, (IrqIndex.MSIX, 0x24, 0, 3, 3))
        running = (Command.DEVICE_FEATURE, MigState.RUNNING)
        assert other.log.index(armed) < other.log.index(running)
        assert destination.read(0, REG_KEPT, 4) == 99
        destination.write(0, REG_SIGNAL, 4, 1)
        assert destination.interrupts.wait(1) == 1
        assert destination.addresses == source.addresses
        assert (Command.DEVICE_FEATURE, "DMA_LOGGING_STOP") in device.log


def test_dirty_pages_are_copied_after_the_stop():
    with two_guests() as (source, device, destination, _):
        enter = device._enter

        def write_behind(state):
            if state == MigState.STOP_COPY:
                source.memory.write(0x7000, b"late")
                device.dirty = {0x7000}
            enter(state)

        device._enter = write_behind
        migrate_guest(source, destination)
        assert destination.memory.read(0x7000, 4) == b"late"


def test_without_a_log_memory_is_copied_after_the_stop():
    with two_guests() as (source, device, destination, _):
        device.refuse[Command.DEVICE_FEATURE, "DMA_LOGGING_START"] = errno.ENOTTY
        source.memory.write(0x7000, b"late")
        record = migrate_guest(source, destination)
        assert destination.memory.read(0x7000, 4) == b"late"
        assert record.memory_bytes == 1 << 20
        assert (Command.DEVICE_FEATURE, "DMA_LOGGING_STOP") not in device.log


def test_shared_memory_is_not_copied():
    with two_guests(shared=True) as (source, _, destination, _other):
        assert migrate_guest(source, destination).memory_bytes == 0


def test_logging_ends_when_a_migration_fails():
    with two_guests() as (source, device, destination, other):
        other.refuse[Command.DEVICE_FEATURE, MigState.RUNNING] = errno.EIO
        device.refuse[Command.DEVICE_FEATURE, "DMA_LOGGING_REPORT"] = errno.EIO
        with pytest.raises(ReplyError):
            migrate_guest(source, destination)
        assert device.log[-1] == (Command.DEVICE_FEATURE, "DMA_LOGGING_STOP")
