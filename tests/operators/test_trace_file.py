"""A trace of what the pump answered: every access as it was, nothing waits for the file, what is lost is counted."""

import errno
import os
import threading
from pathlib import Path

import pytest
import trio

from tests.protocol.served import (
    BAR2_SIZE,
    DROPPED,
    FLR_BIT,
    FLR_BYTE,
    REG_BROKEN,
    REG_SLOW,
    UNDECLARED,
    Served,
)
from vfu_server.libvfio_user.trace import Trace
from vfu_server.policy import StateClass
from vfu_server.testing import ReplyError
from vfu_server.trace_format import RECORD, Access, Kind, Mark, TraceHeader, TraceReader
from vfu_server.uapi import Command, RegionIndex

HEADER = TraceHeader("0.1", "edu", "generic_dmaq", "edu", 0x1234, 0x11E8, 10, 20, ((0, 4096, 4096),))


class Traced:
    """A served device with a trace into `fd`."""

    def __init__(self, fd):
        self.trace = Trace(fd)
        self.served = Served(trace=self.trace)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.served.close()
        self.trace.close()


def new_file(path):
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    os.write(fd, HEADER.pack())
    return fd


def entries(path):
    with TraceReader.open(str(path)) as reader:
        found = list(reader.entries())
        assert not reader.cut_short
    return found


def short(access):
    return (access.write, access.region, access.offset, access.width, access.value, access.answer.name, access.errno)


def test_every_access_is_in_the_file_as_it_was(tmp_path):
    path = tmp_path / "trace"
    with Traced(new_file(path)) as traced:
        with traced.served.connect() as client:
            client.write(0, 8, 4, 0x12345678)
            client.write(0, 16, 8, 0x1122334455667788, posted=True)
            assert client.read(0, 8, 2) == 0x5678
            client.write(0, DROPPED, 1, 7)
            assert client.read(0, DROPPED + 4, 4) == 0xFFFFFFFF
            for offset, width, number in (
                (UNDECLARED, 4, errno.EPERM),
                (REG_BROKEN, 4, errno.EXDEV),
                (8, 3, errno.EINVAL),
            ):
                with pytest.raises(ReplyError) as refused:
                    client.region_read(0, offset, width)
                assert refused.value.errno == number
            block = bytes(range(1, 22))
            client.region_write(2, 0x100, block)
            assert client.region_read(2, 0x101, 9) == block[1:10]
            traced.served.context.set_class(StateClass.STOPPED)
            client.read(RegionIndex.CONFIG, 0, 4)
        traced.trace.mark_reset()
    client_mark, *accesses, reset = entries(path)
    assert client_mark.kind is Kind.CLIENT
    assert reset.kind is Kind.RESET
    assert [short(access) for access in accesses] == [
        (True, 0, 8, 4, 0x12345678, "TRAP", 0),
        (True, 0, 16, 8, 0x1122334455667788, "TRAP", 0),
        (False, 0, 8, 2, 0x5678, "TRAP", 0),
        (True, 0, DROPPED, 1, 7, "DISCARD", 0),
        (False, 0, DROPPED + 4, 4, 0xFFFFFFFF, "DISCARD", 0),
        (False, 0, UNDECLARED, 4, 0, "REFUSE", errno.EPERM),
        (False, 0, REG_BROKEN, 4, 0, "TRAP", errno.EXDEV),
        (False, 0, 8, 3, 0, "REFUSE", errno.EINVAL),
        (True, 2, 0x100, 21, int.from_bytes(block, "little"), "TRAP", 0),
        (False, 2, 0x101, 9, int.from_bytes(block[1:10], "little"), "TRAP", 0),
        (False, RegionIndex.CONFIG, 0, 4, 0, "TRAP", 0),
    ]
    assert [access.number for access in accesses] == list(range(11))
    assert {access.state_class for access in accesses[:-1]} == {StateClass.RUNNING}
    assert accesses[-1].state_class is StateClass.STOPPED
    times = [entry.time_ns for entry in (client_mark, *accesses, reset)]
    assert times == sorted(times)
    assert traced.trace.numbers() == traced.trace.numbers()
    numbers = traced.trace.numbers()
    assert (numbers.written, numbers.lost, numbers.error) == (11, 0, 0)
    assert numbers.bytes == path.stat().st_size - len(HEADER.pack())


def test_how_long_an_answer_took(tmp_path):
    path = tmp_path / "trace"
    with Traced(new_file(path)) as traced, traced.served.connect() as client:
        registers = traced.served.registers
        opener = threading.Timer(0.05, registers.gate.set)
        opener.start()
        client.read(0, REG_SLOW, 4)
        client.read(0, 8, 4)
        opener.join()
    _, slow, quick = entries(path)
    assert slow.took_ns > 30_000_000
    assert quick.took_ns < slow.took_ns
    assert quick.time_ns >= slow.time_ns + slow.took_ns


def test_a_reset_by_config_space_is_no_access(tmp_path):
    path = tmp_path / "trace"
    with Traced(new_file(path)) as traced, traced.served.connect() as client:
        payload = FLR_BYTE.to_bytes(8, "little") + (7).to_bytes(4, "little") + (1).to_bytes(4, "little")
        traced.served.answer(client, Command.REGION_WRITE, payload + bytes([FLR_BIT]), reply=payload)
        client.read(0, 0, 4)
    _, only = entries(path)
    assert not only.write


def test_file_that_takes_nothing_holds_nobody_up_and_loses_counted(tmp_path):
    """A pipe that nobody reads: the ring fills up, the guest is served on, what is lost is told at its place."""
    reader, writer = os.pipe()
    step = 64 << 10
    sent = 20
    with Traced(writer) as traced:
        with traced.served.connect() as client:
            for number in range(sent):
                client.region_write(2, number * step % BAR2_SIZE, bytes([number]) * step)
            assert len(traced.served.registers.log) == sent
            lost = traced.trace.numbers().lost
            assert 0 < lost < sent
            drained = threading.Thread(target=drain, args=(reader, tmp_path / "copy"))
            drained.start()
            deadline = trio.run(wait_for_room, client, traced.trace, lost)
            assert deadline
        traced.trace.mark_reset()
    drained.join(10)
    found = entries(tmp_path / "copy")
    marks = [entry for entry in found if isinstance(entry, Mark)]
    numbers = traced.trace.numbers()
    assert sum(mark.count for mark in marks) == numbers.lost
    accesses = [entry for entry in found if isinstance(entry, Access)]
    assert len(accesses) == numbers.written
    wide = [access for access in accesses if access.width == step]
    assert [access.data[:1] * step for access in wide] == [access.data for access in wide]
    assert [mark.kind for mark in marks] == [Kind.CLIENT, Kind.LOST, Kind.RESET]
    place = found.index(marks[1])
    assert found[place - 1].data[0] == len(wide) - 1
    assert found[place + 1].width == 4


async def wait_for_room(client, trace, lost):
    """Read until one of the reads is not lost: the pipe is drained by and by."""
    with trio.move_on_after(10):
        while True:
            before = trace.numbers().lost
            client.read(0, 8, 4)
            if trace.numbers().lost == before:
                return True
            await trio.sleep(0.005)
    return False


def drain(fd, path):
    with open(path, "wb") as copy, os.fdopen(fd, "rb") as pipe:
        copy.write(HEADER.pack())
        while chunk := pipe.read(1 << 20):
            copy.write(chunk)


def test_full_disk_ends_the_trace_and_nothing_else():
    with Traced(os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC)) as traced, traced.served.connect() as client:
        for _ in range(10):
            client.read(0, 8, 4)

        async def wait():
            with trio.fail_after(5):
                return await traced.trace.failed()

        assert trio.run(wait) == errno.ENOSPC
        for _ in range(5):
            client.read(0, 8, 4)
    numbers = traced.trace.numbers()
    assert (numbers.written, numbers.bytes, numbers.error) == (0, 0, errno.ENOSPC)
    assert numbers.lost >= 15


def test_torn_record_of_a_disk_that_fills_is_cut_off(tmp_path):
    import resource

    path = tmp_path / "trace"
    limit = len(HEADER.pack()) + 100 * RECORD.size + 17
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Traced(new_file(path)) as traced, traced.served.connect() as client:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            for _ in range(200):
                client.read(0, 8, 4)

            async def wait():
                with trio.fail_after(5):
                    return await traced.trace.failed()

            assert trio.run(wait) == errno.EFBIG
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = entries(path)
    assert len(found) == 100
    numbers = traced.trace.numbers()
    assert numbers.written == 99
    assert numbers.written + numbers.lost == 200


def test_device_without_a_trace_has_no_thread_for_it():
    served = Served()
    with served.connect() as client:
        client.read(0, 8, 4)
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    served.close()
    assert "vfu-pump" in names
    assert "vfu-trace" not in names
