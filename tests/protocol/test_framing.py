"""Messages in pieces, in heaps, of wrong size, type or command: served whole, refused, or the connection's end."""

import errno
import socket
import time

import pytest

from tests.protocol.served import BAR2_SIZE, REGISTERS, Served, access
from vfu_server import uapi
from vfu_server.testing import ConnectionClosedError, pack_message
from vfu_server.uapi import HEADER, Command, HeaderFlag

ERROR = HeaderFlag.REPLY | HeaderFlag.ERROR


def read_message(msg_id, offset=0, count=4, region=0):
    return pack_message(Command.REGION_READ, access(region, offset, count), msg_id=msg_id)


def write_message(msg_id, offset, data, region=0):
    return pack_message(Command.REGION_WRITE, access(region, offset, len(data), data), msg_id=msg_id)


def test_a_message_byte_by_byte(served, client):
    for byte in write_message(1, 0x10, b"abcd"):
        client.send_raw(bytes([byte]))
    assert client.recv_message().payload == access(0, 0x10, 4)
    assert client.region_read(0, 0x10, 4) == b"abcd"


@pytest.mark.parametrize("step", [7, 16, 17, 4096, 65537])
def test_a_large_message_in_pieces(served, client, step):
    data = bytes(range(256)) * 1024
    message = write_message(1, 0, data, region=2)
    for at in range(0, len(message), max(step, len(message) // 64)):
        client.send_raw(message[at : at + max(step, len(message) // 64)])
    assert client.recv_message().payload == access(2, 0, len(data))
    assert served.registers.memory[2][: len(data)] == data


def test_many_messages_in_one_piece(client):
    count = 500
    client.send_raw(b"".join(read_message(n) for n in range(count)))
    assert [client.recv_message().msg_id for _ in range(count)] == list(range(count))


def test_a_message_and_a_half_then_the_rest(client):
    whole, half = read_message(1), read_message(2)
    client.send_raw(whole + half[:20])
    assert client.recv_message().msg_id == 1
    client.send_raw(half[20:] + whole)
    assert [client.recv_message().msg_id for _ in range(2)] == [2, 1]


def test_large_and_small_messages_mixed(served, client):
    """The receive buffer is wrapped many times, with messages lying across its end."""
    expected = []
    for n in range(12):
        size = (1 << 20) - 4096 * n - n
        client.send_raw(write_message(2 * n, 0, bytes([n]) * size, region=2) + read_message(2 * n + 1, 0, 8, region=2))
        expected.append(bytes([n]) * 8)
    got = [client.recv_message() for _ in range(24)]
    assert [message.msg_id for message in got] == list(range(24))
    assert [message.payload[16:] for message in got[1::2]] == expected


@pytest.mark.parametrize("size", [0, 1, 15])
def test_a_header_that_is_shorter_than_a_header_ends_the_connection(served, size):
    with served.connect() as client:
        client.send_raw(HEADER.pack(9, Command.REGION_READ, size, 0, 0))
        reply = client.recv_message()
        assert (reply.msg_id, reply.flags, reply.errno) == (9, ERROR, errno.EINVAL)
        with pytest.raises(ConnectionClosedError):
            client.recv_message()


@pytest.mark.parametrize("size", [(1 << 20) + 49, 64 << 20, 1 << 31, 0xFFFFFFFF])
def test_a_message_that_claims_too_much_ends_the_connection(served, size):
    with served.connect() as client:
        client.send_raw(HEADER.pack(9, Command.REGION_WRITE, size, 0, 0) + bytes(100))
        reply = client.recv_message()
        assert (reply.msg_id, reply.flags) == (9, ERROR)
        assert reply.errno in (errno.EINVAL, errno.EMSGSIZE)
        with pytest.raises(ConnectionClosedError):
            client.recv_message()
    with served.connect() as client:
        assert client.get_info().num_irqs == 5


def test_an_impossible_size_is_not_answered_where_no_reply_is_wanted(served):
    with served.connect() as client:
        client.send_raw(HEADER.pack(9, Command.REGION_WRITE, 0xFFFFFFFF, HeaderFlag.NO_REPLY, 0))
        with pytest.raises(ConnectionClosedError):
            client.recv_message()


@pytest.mark.parametrize("command", [0, 10_000, 0xFFFF, 19, Command.DMA_READ, Command.DMA_WRITE, Command.DIRTY_PAGES])
@pytest.mark.parametrize("size", [0, 16, 4096])
def test_a_command_that_does_not_exist_is_refused(served, client, command, size):
    msg_id = client.send_message(command, bytes(size))
    reply = client.wait_reply(msg_id)
    assert (reply.command, reply.flags, reply.payload) == (command, ERROR, b"")
    assert reply.errno in (errno.EINVAL, errno.ENOSYS)
    assert client.get_info().num_irqs == 5


@pytest.mark.parametrize("command", [c for c in Command if c not in (Command.VERSION, Command.DEVICE_RESET)])
@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_message_without_its_payload_is_refused(served, client, command, size):
    msg_id = client.send_message(command, bytes(size))
    if command in (Command.DEVICE_SET_IRQS, Command.DEVICE_FEATURE):
        # whether these make sense is not for the transport to say
        assert served.message(command).payload == bytes(size)
        served.context.reply(error=errno.EINVAL)
    reply = client.wait_reply(msg_id)
    assert (reply.flags, reply.errno, reply.payload) == (ERROR, errno.EINVAL, b"")


@pytest.mark.parametrize("kind", range(2, 16))
def test_a_message_that_is_neither_command_nor_reply_is_refused(client, kind):
    client.send_raw(pack_message(Command.REGION_READ, access(0, 0, 4), msg_id=5, flags=kind))
    reply = client.recv_message()
    assert (reply.msg_id, reply.flags, reply.errno) == (5, ERROR, errno.EINVAL)


@pytest.mark.parametrize("flags", [HeaderFlag.REPLY, ERROR])
def test_a_reply_to_nothing_is_dropped_and_noticed(served, client, flags):
    for command in (Command.DMA_READ, Command.REGION_READ, 0):
        client.send_raw(pack_message(command, bytes(64), msg_id=1, flags=flags, error=5))
    served.settle(client)
    assert sum("reply to nothing" in text for text in served.notices) == 3
    assert not client.has_reply(1)


def test_unknown_flag_bits_of_a_command_do_no_harm(client):
    client.send_raw(pack_message(Command.REGION_READ, access(0, 0, 4), msg_id=5, flags=0xFFFFFF00))
    reply = client.recv_message()
    assert (reply.msg_id, reply.flags & ~ERROR) == (5, 0)


def test_an_error_number_in_a_command_is_ignored(client):
    client.send_raw(pack_message(Command.REGION_READ, access(0, 0, 4), msg_id=5, error=0xFFFFFFFF))
    reply = client.recv_message()
    assert (reply.msg_id, reply.flags, reply.errno) == (5, HeaderFlag.REPLY, 0)


def test_ids_are_the_clients_own_business(client):
    client.send_raw(read_message(0xFFFF) + read_message(0) + read_message(0))
    assert [client.recv_message().msg_id for _ in range(3)] == [0xFFFF, 0, 0]


@pytest.mark.parametrize("when", ["before VERSION", "in a header", "in a body", "silent"])
def test_the_end_of_a_client_in_the_middle_frees_the_device(served, when):
    with served.connect(negotiate=when != "before VERSION") as client:
        message = read_message(1)
        client.send_raw(
            {"before VERSION": b"\1", "in a header": message[:9], "in a body": message[:20]}.get(when, message)
        )
        client.sock.shutdown(socket.SHUT_WR)
        reason = served.wait_ended()
        assert ("middle" in reason) == (when != "silent")
    with served.connect() as client:
        assert client.read(0, REGISTERS, 4) == 0


def test_half_a_message_is_not_waited_for_longer_than_five_seconds():
    """All kinds of halves at once, each with a device of its own: QEMU itself gives up after 5 s."""
    whole = read_message(1)
    halves = {"nothing at all": b"", "one byte": b"\1", "a header": whole[:16], "half a body": whole[:30]}
    devices = [Served() for _ in range(len(halves) + 1)]
    connections = [
        device.connect(negotiate=bool(half)) for device, half in zip(devices, ["", *halves.values()], strict=True)
    ]
    clients = [connection.__enter__() for connection in connections]
    begun = time.monotonic()
    # one keeps dripping: that must not win time
    for client, half in zip(clients[1:], halves.values(), strict=True):
        client.send_raw(half)
    drip = clients[2]
    drip.serve(2.5)
    drip.send_raw(b"\0")
    reasons = [device.wait_ended() for device in devices]
    waited = time.monotonic() - begun
    for connection in connections:
        connection.__exit__(None, None, None)
    for device in devices:
        device.close()
    assert 4.5 < waited < 15
    assert ["no VERSION" in reason for reason in reasons] == [True, True, False, False, False]
    assert ["half a message" in reason for reason in reasons] == [False, False, True, True, True]


def test_a_quiet_client_is_not_a_half_message(served, client):
    client.sock.settimeout(None)
    client.sock.setblocking(False)
    before = served.context.statistics().messages
    client.serve(0.2)
    assert client.region_read(2, BAR2_SIZE - 4, 4) == bytes(4)
    assert served.context.statistics().messages == before + 1


def test_bytes_that_are_no_protocol_end_the_connection(served):
    with served.connect() as client:
        client.send_raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while True:
            try:
                client.recv_message()
            except ConnectionClosedError:
                break
    assert served.ended.reason == "the client sent a message of impossible size"
    assert uapi.MAX_DATA_XFER_SIZE == 1 << 20
