"""DMA_READ and DMA_WRITE, the commands of the server: to whom their replies go, and what ends the wait for them."""

import errno
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.protocol.served import REGISTERS, access
from vfu_server import uapi
from vfu_server.host_device import DmaMap
from vfu_server.testing import GuestMemory, pack_message
from vfu_server.uapi import Command, HeaderFlag


@pytest.fixture
def memory():
    with GuestMemory() as memory:
        memory.add(0x10000, 0x10000, shared=False)
        memory.add(0x40000, 0x1000, prot=uapi.DMA_FLAG_READ, shared=False)
        yield memory


@pytest.fixture
def dma(served, client, memory):
    """Ask the client: `dma(command, iova, count, data)` gives a future of the reply's body."""
    client.memory = memory
    for block in memory.blocks:
        served.door.dma_map(DmaMap(block.iova, block.size, block.prot))
    # what the session answers to a DMA_MAP without fd; it also tells the pump to look for Python's commands
    served.answer(client, Command.DMA_MAP, uapi.DMA_MAP.pack(32, 3, 0, 0x100000, 0x1000))
    with ThreadPoolExecutor(8) as pool:

        def ask(command, iova, count, data=b"", timeout=5.0):
            return pool.submit(served.context.request, command, uapi.DMA_ACCESS.pack(iova, count) + data, timeout)

        yield ask
        client.close()


def served_by(client, *futures):
    deadline = time.monotonic() + 5
    while not all(future.done() for future in futures):
        assert time.monotonic() < deadline
        client.serve(0.002)


def test_memory_is_read_and_written(client, dma, memory):
    memory.write(0x10010, b"from the guest")
    read = dma(Command.DMA_READ, 0x10010, 14)
    write = dma(Command.DMA_WRITE, 0x11000, 9, b"to it all")
    served_by(client, read, write)
    assert read.result() == uapi.DMA_ACCESS.pack(0x10010, 14) + b"from the guest"
    assert write.result() == uapi.DMA_ACCESS.pack(0x11000, 9)
    assert memory.read(0x11000, 9) == b"to it all"


@pytest.mark.parametrize(
    ("command", "iova", "error"),
    [(Command.DMA_READ, 0x90000, errno.EFAULT), (Command.DMA_WRITE, 0x40000, errno.EPERM)],
)
def test_the_clients_errno_comes_back(client, dma, command, iova, error):
    future = dma(command, iova, 4, b"data" if command == Command.DMA_WRITE else b"")
    served_by(client, future)
    assert isinstance(future.exception(), OSError)
    assert future.exception().errno == error


def test_a_megabyte_each_way(client, dma, memory):
    memory.add(0x200000, 0x100000, shared=False)
    data = bytes(range(256)) * 4096
    write = dma(Command.DMA_WRITE, 0x200000, len(data), data)
    served_by(client, write)
    read = dma(Command.DMA_READ, 0x200000, len(data))
    served_by(client, read)
    assert read.result()[16:] == data


def test_requests_and_accesses_cross(client, dma, memory):
    for n in range(20):
        memory.write(0x10000 + 8 * n, n.to_bytes(8, "little"))
    futures = [dma(Command.DMA_READ, 0x10000 + 8 * n, 8) for n in range(20)]
    for _ in range(50):
        client.read(0, REGISTERS, 4)
    served_by(client, *futures)
    assert [int.from_bytes(future.result()[16:], "little") for future in futures] == list(range(20))


def test_replies_out_of_order_find_their_request(client, dma):
    futures = {n: dma(Command.DMA_READ, n << 12, 8) for n in range(1, 6)}
    commands = [client.recv_message() for _ in futures]
    for command in reversed(commands):
        n = uapi.DMA_ACCESS.unpack(command.payload)[0] >> 12
        body = command.payload + n.to_bytes(8, "little")
        client.send_raw(pack_message(Command.DMA_READ, body, msg_id=command.msg_id, flags=HeaderFlag.REPLY))
    assert [int.from_bytes(futures[n].result(5)[16:], "little") for n in futures] == list(futures)


def test_the_ids_of_both_directions_are_their_own(client, dma):
    future = dma(Command.DMA_READ, 0x10000, 4)
    command = client.recv_message()
    client.send_message(Command.REGION_READ, access(0, 0, 4), msg_id=command.msg_id)
    assert client.wait_reply(command.msg_id).payload[16:] == bytes(4)
    assert not future.done()
    client.send_raw(pack_message(Command.DMA_READ, command.payload + b"mine", msg_id=command.msg_id, flags=1))
    assert future.result(5)[16:] == b"mine"


def test_a_reply_of_another_command_is_no_reply(served, client, dma):
    future = dma(Command.DMA_READ, 0x10000, 4, timeout=0.2)
    command = client.recv_message()
    for wrong in (Command.DMA_WRITE, Command.REGION_READ):
        client.send_raw(pack_message(wrong, command.payload + b"data", msg_id=command.msg_id, flags=1))
    assert future.exception(5).errno == errno.ETIMEDOUT
    served.settle(client)
    assert sum("reply to nothing" in text for text in served.notices) == 2


def test_a_silent_client_is_not_waited_for_longer_than_asked(served, client, dma):
    begun = time.monotonic()
    future = dma(Command.DMA_READ, 0x10000, 4, timeout=0.1)
    assert future.exception(5).errno == errno.ETIMEDOUT
    assert 0.09 < time.monotonic() - begun < 4.5
    # the late reply does no harm
    command = client.recv_message()
    client.send_raw(pack_message(Command.DMA_READ, command.payload + b"late", msg_id=command.msg_id, flags=1))
    assert client.read(0, REGISTERS, 4) == 0
    served.settle(client)
    assert any("reply to nothing" in text for text in served.notices)


def test_a_reply_that_is_too_long_is_an_error(client, dma):
    future = dma(Command.DMA_READ, 0x10000, 4)
    command = client.recv_message()
    client.send_raw(pack_message(Command.DMA_READ, bytes((1 << 20) + 32), msg_id=command.msg_id, flags=1))
    assert future.exception(5).errno == errno.EMSGSIZE


@pytest.mark.parametrize("error", [0, 4096, 0xFFFFFFFF])
def test_an_error_reply_without_a_sensible_errno_is_eio(client, dma, error):
    future = dma(Command.DMA_READ, 0x10000, 4)
    command = client.recv_message()
    client.send_raw(pack_message(Command.DMA_READ, b"", msg_id=command.msg_id, flags=0x21, error=error))
    assert future.exception(5).errno == errno.EIO


def test_a_client_that_goes_ends_the_wait(client, dma):
    futures = [dma(Command.DMA_READ, 0x10000, 4) for _ in range(4)]
    client.recv_message()
    client.close()
    assert {future.exception(5).errno for future in futures} == {errno.ENOTCONN}


def test_without_a_client_there_is_nobody_to_ask(served):
    with pytest.raises(OSError, match="not connected") as caught:
        served.context.request(Command.DMA_READ, uapi.DMA_ACCESS.pack(0, 4), 1.0)
    assert caught.value.errno == errno.ENOTCONN


def test_a_trap_must_not_ask_the_client(served, client, dma):
    """The client waits for the answer to its access and may not serve us: that would be waiting for oneself."""

    def ask(region, offset, width):
        served.context.request(Command.DMA_READ, uapi.DMA_ACCESS.pack(0x10000, 4), 1.0)
        return 0

    served.registers.trap_read = ask
    msg_id = client.send_message(Command.REGION_READ, access(0, 0, 4))
    assert client.wait_reply(msg_id).errno == errno.EIO
    served.wait(lambda: served.faults)
    assert served.faults.pop().error.errno == errno.EDEADLK
