"""File descriptors belong to the message they came with and are closed with it, whatever becomes of it."""

import errno
import os

import pytest

from tests.protocol.served import access, deaf_feature, fd_count, wait_taken
from vfu_server import uapi
from vfu_server.testing import pack_message
from vfu_server.uapi import HEADER, Command, HeaderFlag


@pytest.fixture
def pipe():
    """(read end, write end) of a pipe; the read end is at its end once nobody holds the write end any more."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    yield read_end, write_end
    os.close(read_end)


def nobody_holds(read_end):
    try:
        return os.read(read_end, 1) == b""
    except BlockingIOError:
        return False


# every message that has no business with fds, whole and broken
WRONG = [
    (Command.REGION_READ, access(0, 0, 4)),
    (Command.REGION_WRITE, access(0, 0, 4, b"abcd")),
    (Command.REGION_WRITE, access(9, 0, 4, b"abcd")),
    (Command.DEVICE_GET_INFO, uapi.DEVICE_INFO.pack(16, 0, 0, 0)),
    (Command.DEVICE_GET_INFO, b""),
    (Command.DEVICE_GET_REGION_INFO, uapi.REGION_INFO.pack(32, 0, 0, 0, 0, 0)),
    (Command.DEVICE_GET_IRQ_INFO, uapi.IRQ_INFO.pack(16, 0, 0, 0)),
    (Command.DEVICE_GET_REGION_IO_FDS, bytes(16)),
    (Command.DMA_UNMAP, uapi.DMA_UNMAP.pack(24, 0, 0, 4096)),
    (Command.MIG_DATA_READ, uapi.MIG_DATA.pack(16, 8)),
    (Command.MIG_DATA_WRITE, uapi.MIG_DATA.pack(16, 8) + bytes(8)),
    (Command.VERSION, bytes(4)),
    (Command.DMA_MAP, b""),
    (Command.DMA_MAP, uapi.DMA_MAP.pack(32, 3, 0, 1, 1)),
    (0, b""),
    (99, bytes(32)),
]


@pytest.mark.parametrize(("command", "payload"), WRONG)
@pytest.mark.parametrize("flags", [0, HeaderFlag.NO_REPLY])
def test_fds_on_a_message_that_has_none_are_closed(served, client, pipe, command, payload, flags):
    read_end, write_end = pipe
    client.send_message(command, payload, [write_end] * 2, flags=flags)
    os.close(write_end)
    served.settle(client)
    assert nobody_holds(read_end)
    assert client.get_info().num_irqs == 5


@pytest.mark.parametrize("flags", [HeaderFlag.REPLY, 0x7])
def test_fds_on_replies_and_nonsense_are_closed(served, client, pipe, flags):
    read_end, write_end = pipe
    client.send_raw(pack_message(Command.DMA_READ, bytes(32), flags=flags), [write_end])
    os.close(write_end)
    client.send_message(Command.DEVICE_GET_INFO, uapi.DEVICE_INFO.pack(16, 0, 0, 0), msg_id=9)
    client.wait_reply(9) if flags == HeaderFlag.REPLY else client.recv_message()
    assert nobody_holds(read_end)


@pytest.mark.parametrize("count", [9, 16, 64, 253])
@pytest.mark.parametrize("command", [Command.DEVICE_SET_IRQS, Command.DMA_MAP, Command.REGION_READ])
def test_more_fds_than_negotiated_are_refused_and_closed(served, client, pipe, count, command):
    read_end, write_end = pipe
    payload = {
        Command.DEVICE_SET_IRQS: uapi.IRQ_SET.pack(20, 0x24, 2, 0, count),
        Command.DMA_MAP: uapi.DMA_MAP.pack(32, 3, 0, 0, 4096),
        Command.REGION_READ: access(0, 0, 4),
    }[command]
    msg_id = client.send_message(command, payload, [write_end] * count)
    os.close(write_end)
    assert client.wait_reply(msg_id).errno == errno.EINVAL
    served.settle(client)
    assert nobody_holds(read_end)
    assert served.no_message()


def test_as_many_fds_as_negotiated_come_up_in_order(served, client):
    fds = [os.eventfd(n) for n in range(8)]
    client.send_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(28, 0x24, 2, 0, 8), fds)
    message = served.message(Command.DEVICE_SET_IRQS)
    assert [os.eventfd_read(fd) for fd in message.fds[1:]] == list(range(1, 8))
    served.context.reply()
    for fd in (*fds, *message.fds):
        os.close(fd)


def test_fds_come_with_cloexec(served, client):
    fd = os.eventfd(0)
    os.set_inheritable(fd, True)
    client.send_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(24, 0x24, 0, 0, 1), [fd])
    message = served.message()
    assert not os.get_inheritable(message.fds[0])
    for each in (fd, *message.fds):
        os.close(each)


def test_fds_stay_with_their_message_among_others(served, client):
    """Messages with and without fds in one heap: the receiver may see several of them with one system call."""
    marks = [os.eventfd(n) for n in range(1, 6)]
    for n, fd in enumerate(marks):
        for filler in range(n):
            client.send_message(Command.REGION_WRITE, access(0, 8 * filler, 4, b"fill"), flags=HeaderFlag.NO_REPLY)
        client.send_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(24, 0x24, 2, n, 1), [fd])
        client.send_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(20, 0x24, 2, n, 1))
    for n in range(5):
        first, second = served.message(), None
        served.context.reply()
        second = served.message()
        served.context.reply()
        assert [os.eventfd_read(fd) for fd in first.fds] == [n + 1]
        assert second.fds == []
        os.close(first.fds[0])
    for fd in marks:
        os.close(fd)


def test_fds_with_a_message_in_pieces(served, client):
    fd = os.eventfd(7)
    whole = pack_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(24, 0x24, 0, 0, 1), msg_id=3)
    client.send_raw(whole[:1], [fd])
    for byte in whole[1:]:
        client.send_raw(bytes([byte]))
    message = served.message()
    assert [os.eventfd_read(each) for each in message.fds] == [7]
    served.context.reply()
    for each in (fd, *message.fds):
        os.close(each)


def test_fds_with_a_message_of_a_megabyte(served, client, pipe):
    read_end, write_end = pipe
    data = bytes(1 << 20)
    client.send_raw(pack_message(Command.REGION_WRITE, access(2, 0, len(data), data), msg_id=3), [write_end])
    os.close(write_end)
    assert client.recv_message().msg_id == 3
    served.settle(client)
    assert nobody_holds(read_end)


def test_fds_in_the_middle_of_a_message_are_closed(served, client, pipe):
    read_end, write_end = pipe
    whole = pack_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(24, 0x24, 0, 0, 1), msg_id=3)
    client.send_raw(whole[:8])
    wait_taken(client)
    client.send_raw(whole[8:], [write_end])
    os.close(write_end)
    assert served.message().fds == []
    served.context.reply()
    assert client.recv_message().msg_id == 3
    assert nobody_holds(read_end)
    assert any("without a message of their own" in text for text in served.notices)


def test_fds_with_a_message_of_impossible_size_are_closed(served, pipe):
    read_end, write_end = pipe
    with served.connect() as client:
        client.send_raw(HEADER.pack(1, Command.REGION_WRITE, 0xFFFFFFFF, 0, 0), [write_end] * 8)
        os.close(write_end)
        served.wait_ended()
    assert nobody_holds(read_end)


def test_fds_of_half_a_message_are_closed_with_the_client(served, pipe):
    read_end, write_end = pipe
    with served.connect() as client:
        client.send_raw(pack_message(Command.DMA_MAP, bytes(32))[:30], [write_end])
        os.close(write_end)
    assert nobody_holds(read_end)


def test_fds_of_held_messages_are_closed_with_the_client(served, pipe):
    read_end, write_end = pipe
    with served.connect() as client:
        deaf_feature(client)
        served.message(Command.DEVICE_FEATURE)
        for _ in range(20):
            client.send_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(24, 0x24, 0, 0, 1), [write_end])
            client.send_message(Command.DMA_MAP, uapi.DMA_MAP.pack(32, 3, 0, 0, 4096), [write_end])
        os.close(write_end)
        served.settle(client)
        assert not nobody_holds(read_end)
    assert nobody_holds(read_end)


def test_fds_of_messages_that_nobody_took_are_closed_with_the_device(served, pipe):
    read_end, write_end = pipe
    with served.connect() as client:
        client.send_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(24, 0x24, 0, 0, 1), [write_end])
        os.close(write_end)
        served.settle(client)
        assert len(served.messages) == 1
    assert nobody_holds(read_end)


def test_the_number_of_fds_is_flat_over_thousands_of_bad_messages(served, client):
    fd = os.memfd_create("attached")
    served.settle(client)
    before = fd_count()
    for n in range(250):
        for command, payload in WRONG:
            client.send_message(command, payload, [fd] * (1 + n % 9), flags=HeaderFlag.NO_REPLY)
        served.settle(client)
        assert served.fds_after(client) == before
    os.close(fd)
    assert served.context.statistics().fds_closed >= 4000
