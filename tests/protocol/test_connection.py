"""Clients come, go, crash and come back: the device is free for the next one and nothing is left behind."""

import errno
import re
import socket
import threading
from pathlib import Path

import pytest

from tests.protocol.served import REG_SLOW, REGISTERS, Served, access, deaf_feature, fd_count, resident, wait_taken
from vfu_server import uapi
from vfu_server.testing import Client, ConnectionClosedError, GuestMemory
from vfu_server.uapi import Command, HeaderFlag


def threads():
    """Name of every thread of this process by its id."""
    return {task.name: (task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}


def pump_status():
    """The status of the one pump thread there is."""
    (pump,) = [tid for tid, name in threads().items() if name == "vfu-pump"]
    return Path(f"/proc/self/task/{pump}/status").read_text()


def mappings():
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_a_hundred_quick_reconnects(served):
    for n in range(100):
        with served.connect() as client:
            client.write(0, 0x40, 4, n)
    with served.connect() as client:
        assert client.read(0, 0x40, 4) == 99


def visit(served, n, memory):
    """One of the many ways in which a client behaves."""
    with served.connect(negotiate=n % 7 != 6) as client:
        if n % 7 == 6:
            client.send_raw(b"\1\0\1\0"[: n % 5])
            return
        client.read(0, REGISTERS, 4)
        client.dma_map(0x1000, 0x10000, fd=memory.fd)
        if n % 7 == 1:
            client.send_raw(b"half", [memory.fd])
        if n % 7 == 2:
            deaf_feature(client)
            client.send_message(Command.DMA_MAP, uapi.DMA_MAP.pack(32, 3, 0, 0x100000, 0x1000), [memory.fd])
        if n % 7 == 3:
            client.send_raw(b"\xff" * 64)
        if n % 7 == 4:
            client.send_message(Command.REGION_WRITE, access(2, 0, 1 << 18, bytes(1 << 18)), flags=HeaderFlag.NO_REPLY)
    served.door.dma_unmap_all()


def test_a_thousand_connections_leave_nothing_behind(served):
    with GuestMemory.of(1 << 20) as memory:
        for n in range(70):
            visit(served, n, memory)
        before = fd_count(), mappings(), len(threads())
        size = resident()
        for n in range(1000):
            visit(served, n, memory)
        assert (fd_count(), len(threads())) == (before[0], before[2])
        # the allocator makes a few of its own; one for each connection would be hundreds
        assert mappings() <= before[1] + 20
        assert resident() - size < 4 << 20
    assert served.context.statistics().connections == 1070


def test_a_second_connection_is_not_taken_over_before_the_first_is_over(served, client):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(OSError, match="busy") as caught:
            served.context.attach(theirs.fileno())
        assert caught.value.errno == errno.EBUSY
        assert not served.context.peer_gone()
        assert client.get_info().num_irqs == 5


def test_the_session_sees_that_the_client_has_gone_before_the_pump_does(served):
    """Behind a trap that takes long, the next client is already there: it must not be refused for that."""
    with served.connect() as client:
        client.send_message(Command.REGION_READ, access(0, REG_SLOW, 4))
        assert served.registers.entered.wait(5)
        assert not served.context.peer_gone()
        client.close()
        served.wait(lambda: True)
        assert served.context.peer_gone()
        assert served.ended is None
        served.registers.gate.set()
        served.wait_ended()
    assert served.context.peer_gone()


def test_the_session_ends_a_connection(served):
    with served.connect() as client:
        served.context.detach()
        with pytest.raises(ConnectionClosedError):
            client.recv_message()
        assert served.wait_ended()
    served.context.detach()


def test_a_client_that_never_reads_can_be_ended(served):
    """Its replies fill the socket until the pump blocks; the session's word must still count."""
    answered = threading.Semaphore(0)
    read = served.registers.trap_read_block

    def count(*access):
        answered.release()
        return read(*access)

    served.registers.trap_read_block = count
    with served.connect() as client:
        client.send_raw((uapi.HEADER.pack(1, Command.REGION_READ, 32, 0, 0) + access(2, 0, 1 << 16)) * 64)
        while answered.acquire(timeout=0.1):
            pass
        assert 0 < len(served.registers.log) < 64, "the pump waits for the client to read"
        served.context.detach()
        served.wait_ended()
    with served.connect() as client:
        assert client.read(0, REGISTERS, 4) == 0


def test_the_device_can_be_closed_under_its_client():
    served = Served()
    ours, theirs = socket.socketpair()
    served.context.attach(theirs.detach())
    with Client(ours) as client:
        client.negotiate()
        deaf_feature(client)
        client.send_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(20, 0x24, 0, 0, 1))
        served.close()
        with pytest.raises(ConnectionClosedError):
            client.recv_message()


def test_the_device_can_be_closed_under_a_trap():
    served = Served()
    ours, theirs = socket.socketpair()
    served.context.attach(theirs.detach())
    with Client(ours) as client:
        client.negotiate()
        client.send_message(Command.REGION_READ, access(0, REG_SLOW, 4))
        assert served.registers.entered.wait(5)
        served.close()


def test_a_new_client_starts_without_the_old_ones_messages(served):
    for _ in range(3):
        with served.connect() as client:
            deaf_feature(client)
            for n in range(50):
                client.send_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(20, 0x24, 2, n % 32, 1))
            served.settle(client)
    with served.connect() as client:
        message, _ = served.answer(client, Command.DEVICE_RESET)
        assert message.command == Command.DEVICE_RESET
        assert served.no_message()


def test_a_client_that_only_closes_its_sending_half_is_answered_first(served):
    with served.connect() as client:
        ids = [client.send_message(Command.REGION_READ, access(0, 0, 4)) for _ in range(10)]
        client.sock.shutdown(socket.SHUT_WR)
        assert [client.wait_reply(msg_id).errno for msg_id in ids] == [0] * 10
        served.wait_ended()


def test_the_pump_takes_no_signals(served, client):
    assert client.read(0, REGISTERS, 4) == 0
    blocked = int(re.search(r"SigBlk:\s*([0-9a-f]+)", pump_status()).group(1), 16)
    for number in (1, 2, 10, 12, 13, 14, 15, 17):
        assert blocked >> (number - 1) & 1, f"signal {number} is not blocked"


def test_an_idle_pump_sleeps(served, client):
    client.read(0, REGISTERS, 4)
    wait_taken(client)
    client.serve(0.05)
    before = re.findall(r"ctxt_switches:\s*(\d+)", pump_status())
    client.serve(0.3)
    assert re.findall(r"ctxt_switches:\s*(\d+)", pump_status()) == before
