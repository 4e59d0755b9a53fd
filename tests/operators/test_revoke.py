"""`--revoke`: memory decoding is off exactly while a device is at rest and nobody of ours needs its registers."""

import functools
import logging

import pytest
import trio

from tests.operators.bench_device import MEMORY_ON, FileHost, running
from vfu_server.errors import HostError, UsageError
from vfu_server.session_revoke import Revocation
from vfu_server.testing import ReplyError
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, MigState, RegionIndex

OFF = MEMORY_ON & ~PCI_COMMAND_MEMORY


def trio_test(function):
    @functools.wraps(function)
    def run(*arguments, **named):
        async def limited():
            with trio.fail_after(20):
                await function(*arguments, **named)

        trio.run(limited)

    return run


@pytest.fixture
def host():
    host = FileHost()
    yield host
    trio.run(host.aclose)


# --- the bit


def test_bit_goes_when_at_rest_and_comes_for_whoever_needs_registers(host):
    revocation = Revocation(host, wanted=True, mapped=True)
    revocation.at_rest(True)
    assert host.command == OFF
    with revocation.lifted():
        assert host.command == MEMORY_ON
        with revocation.lifted():
            pass
        assert host.command == MEMORY_ON
    assert host.command == OFF
    with revocation.lifted():
        revocation.at_rest(False)
    assert host.command == MEMORY_ON
    assert host.writes == [OFF, MEMORY_ON, OFF, MEMORY_ON]


def test_bit_that_was_off_stays_off(host):
    host.write(RegionIndex.CONFIG, PCI_COMMAND, 2, OFF)
    host.writes.clear()
    revocation = Revocation(host, wanted=True, mapped=True)
    revocation.at_rest(True)
    with revocation.lifted():
        revocation.at_rest(False)
    assert host.writes == []


def test_what_a_client_writes_meanwhile_is_its_own_wish(host):
    revocation = Revocation(host, wanted=True, mapped=True)
    revocation.at_rest(True)
    host.write(RegionIndex.CONFIG, PCI_COMMAND, 2, OFF & ~PCI_COMMAND_MASTER)
    with revocation.lifted():
        assert host.command == OFF & ~PCI_COMMAND_MASTER


@pytest.mark.parametrize(("wanted", "mapped"), [(False, True), (True, False), (False, False)])
def test_nothing_is_done_unless_wanted_and_mapped(host, caplog, wanted, mapped):
    revocation = Revocation(host, wanted=wanted, mapped=mapped)
    revocation.at_rest(True)
    with revocation.lifted():
        pass
    assert host.writes == []
    assert ("nothing is mapped" in caplog.text) == wanted


def test_failure_is_told_and_does_not_lose_the_bit(host, caplog):
    revocation = Revocation(host, wanted=True, mapped=True)
    host.fail_config = True
    revocation.at_rest(True)
    assert "could not be taken away" in caplog.text
    host.fail_config = False
    revocation.at_rest(True)
    assert host.command == OFF
    host.fail_config = True
    with pytest.raises(HostError), revocation.lifted():
        raise AssertionError
    host.fail_config = False
    with revocation.lifted():
        assert host.command == MEMORY_ON


# --- in a session


@trio_test
async def test_registers_are_there_for_the_plugin_and_gone_between():
    async with running(mmap="all", revoke=True) as bench:
        await bench.set_state(MigState.STOP)
        assert bench.host.command == OFF
        assert await bench.ask(bench.client.mig_data_size) > 100
        assert bench.host.command == OFF
        bench.device.save_gate = trio.Event()
        await bench.set_state(MigState.STOP_COPY)
        assert await bench.ask(bench.client.mig_data_size) > 100
        assert bench.host.memory_on
        bench.device.save_gate.set()
        stream = await bench.read_all()
        assert bench.host.command == OFF
        await bench.set_state(MigState.STOP)
        assert bench.host.command == OFF
        await bench.set_state(MigState.RUNNING)
        assert bench.host.command == MEMORY_ON
    calls = ["stop", "estimate", "save stop-copy", "estimate", "save goes on", "start", "reset"]
    assert bench.device.calls == calls
    config = bytearray(256)
    config[PCI_COMMAND] = MEMORY_ON
    assert bytes(config) in stream


@trio_test
async def test_state_that_is_loaded_meets_registers():
    async with running(mmap="all", revoke=True) as source:
        await source.set_state(MigState.STOP_COPY)
        stream = await source.read_all()
    async with running(mmap="all", revoke=True) as bench:
        await bench.set_state(MigState.STOP)
        assert bench.host.command == OFF
        await bench.set_state(MigState.RESUMING)
        assert bench.host.memory_on
        await bench.ask(bench.client.mig_data_write, stream)
        await bench.set_state(MigState.STOP)
        assert bench.host.command == OFF
        await bench.set_state(MigState.RUNNING)
        assert bench.host.command == MEMORY_ON
    assert bench.device.calls == ["stop", "load", "load_done", "start", "reset"]


@trio_test
async def test_stop_that_fails_leaves_the_mappings():
    async with running(mmap="all", revoke=True) as bench:
        bench.device.fail = "stop"
        with pytest.raises(ReplyError):
            await bench.set_state(MigState.STOP)
        assert bench.host.writes == []


@trio_test
async def test_start_that_fails_takes_them_away_again():
    async with running(mmap="all", revoke=True) as bench:
        await bench.set_state(MigState.STOP)
        bench.device.fail = "start"
        with pytest.raises(ReplyError):
            await bench.set_state(MigState.RUNNING)
        assert bench.host.command == OFF
        await bench.set_state(MigState.RUNNING)
        assert bench.host.command == MEMORY_ON


@trio_test
async def test_reset_and_a_client_that_leaves_find_registers():
    async with running(mmap="all", revoke=True) as bench:
        await bench.set_state(MigState.STOP)
        await bench.ask(bench.client.reset)
        assert bench.host.command == MEMORY_ON
        await bench.set_state(MigState.STOP)
        assert bench.host.command == OFF
    assert bench.device.calls == ["stop", "reset", "stop", "reset"]
    assert bench.host.writes[-2:] == [MEMORY_ON, MEMORY_ON & ~PCI_COMMAND_MASTER]


@trio_test
async def test_without_it_nothing_touches_the_bit():
    async with running(mmap="all") as bench:
        await bench.set_state(MigState.STOP_COPY)
        await bench.set_state(MigState.RUNNING)
        assert bench.host.writes == []


@trio_test
async def test_door_that_cannot_refuses_with_the_reason():
    with pytest.raises(UsageError, match=r"^--revoke: 0000:00:04.0: a virtual function has no such bit$"):
        async with running(mmap="all", revoke=True, cannot_revoke="a virtual function has no such bit"):
            raise AssertionError


@trio_test
async def test_nothing_mapped_is_told_once(caplog):
    with caplog.at_level(logging.WARNING):
        async with running(mmap="never", revoke=True) as bench:
            await bench.set_state(MigState.STOP)
            assert bench.host.writes == []
    assert caplog.text.count("nothing is mapped by clients") == 1
