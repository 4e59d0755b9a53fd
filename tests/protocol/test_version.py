"""VERSION: the first message, what it may say, and what is answered to a wrong one."""

import errno
import json
import os
import struct

import pytest

from tests.protocol.served import fd_count
from vfu_server import uapi
from vfu_server.testing import ConnectionClosedError
from vfu_server.uapi import Command, HeaderFlag


def version(major=0, minor=0, text=b'{"capabilities":{}}\0'):
    return struct.pack("<HH", major, minor) + text


def is_refused(served, client, error=errno.EINVAL):
    """An error reply, then the end of the connection."""
    reply = client.recv_message()
    assert reply.flags == HeaderFlag.REPLY | HeaderFlag.ERROR
    assert (reply.errno, reply.payload) == (error, b"")
    with pytest.raises(ConnectionClosedError):
        client.recv_message()
    served.wait_ended()


@pytest.mark.parametrize("minor", [0, 1, 2])
def test_the_minor_version_is_not_raised(served, minor):
    with served.connect(minor=minor) as client:
        assert (client.version.major, client.version.minor) == (0, min(minor, 2))


def test_the_answer_is_one_that_qemu_takes(served):
    with served.connect() as client:
        assert client.version.max_msg_fds == uapi.MAX_MSG_FDS
        assert client.version.max_data_xfer_size == uapi.MAX_DATA_XFER_SIZE
        assert not client.version.write_multiple
        assert not client.version.capabilities.get("twin_socket")
        served.wait(lambda: served.connected)
        assert served.connected.max_data_xfer_size == 1 << 20


@pytest.mark.parametrize(
    "text", [b"", b"{}\0", b'{"capabilities":{}}\0', b'{"capabilities":{"unknown":[1,{}]},"x":2}\0']
)
def test_all_of_the_json_is_optional(served, text):
    with served.connect(negotiate=False) as client:
        reply = client.call(Command.VERSION, version(text=text), room=4096)
        assert json.loads(reply.payload[4:-1])["capabilities"]["max_msg_fds"] == 8


@pytest.mark.parametrize("offered", [-1, 0, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62])
def test_a_transfer_size_that_a_client_declares_is_capped(served, offered):
    with served.connect(caps={"max_data_xfer_size": offered}) as client:
        served.wait(lambda: served.connected)
        assert 0 < served.connected.max_data_xfer_size <= 1 << 20
        msg_id = client.send_message(Command.REGION_READ, uapi.REGION_ACCESS.pack(0, 2, (1 << 20) + 1))
        assert client.wait_reply(msg_id).errno == errno.EINVAL


def test_a_small_transfer_size_is_kept(served):
    with served.connect(caps={"max_data_xfer_size": 65536}):
        served.wait(lambda: served.connected)
        assert served.connected.max_data_xfer_size == 65536


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0\0",
        version(major=1),
        version(major=0xFFFF, minor=0xFFFF),
        version(text=b'{"capabilities":{}}'),
        version(text=b'{"capabilities":\0'),
        version(text=b"\xff\xfe\0"),
        version(text=b"not json\0"),
        version(text=b'{"capabilities":7}\0'),
        version(text=b'{"capabilities":{"max_msg_fds":"8"}}\0'),
        version(text=b'{"capabilities":{"max_msg_fds":-1}}\0'),
        version(text=b'{"capabilities":{"max_data_xfer_size":[]}}\0'),
        version(text=b'{"capabilities":{"migration":7}}\0'),
        version(text=b"[" * 5000 + b"\0"),
    ],
    ids=lambda payload: repr(payload[:48]),
)
def test_a_wrong_version_is_refused_and_the_connection_ended(served, payload):
    with served.connect(negotiate=False) as client:
        client.send_message(Command.VERSION, payload)
        is_refused(served, client)
    assert "did not negotiate" in served.ended.reason


@pytest.mark.parametrize("command", [0, *(c for c in Command if c != Command.VERSION), 19, 0xFFFF])
def test_another_first_message_is_refused(served, command):
    with served.connect(negotiate=False) as client:
        client.send_message(command, bytes(32))
        is_refused(served, client)


def test_a_reply_as_the_first_message_ends_the_connection(served):
    with served.connect(negotiate=False) as client:
        client.send_message(Command.VERSION, version(), flags=HeaderFlag.REPLY)
        served.wait_ended()


def test_file_descriptors_with_the_version_are_refused_and_closed(served):
    with served.connect(negotiate=False) as client:
        before = fd_count()
        read_end, write_end = os.pipe()
        client.send_message(Command.VERSION, version(), [write_end] * 3)
        os.close(write_end)
        is_refused(served, client)
        assert os.read(read_end, 1) == b"", "the server still holds the pipe"
        os.close(read_end)
        # the server's end of the connection is closed too
        assert fd_count() == before - 1


def test_a_second_version_is_refused_and_changes_nothing(served, client):
    msg_id = client.send_message(Command.VERSION, version())
    assert client.wait_reply(msg_id).errno == errno.EINVAL
    assert client.get_info().num_regions == 9


def test_negotiation_byte_by_byte(served):
    from vfu_server.testing import pack_message

    with served.connect(negotiate=False) as client:
        for byte in pack_message(Command.VERSION, version(), msg_id=7):
            client.send_raw(bytes([byte]))
        assert client.recv_message().msg_id == 7
        assert client.get_info().num_irqs == 5


def test_a_client_that_leaves_before_it_negotiates_is_forgotten(served):
    for part in (b"", b"\1\0\1"):
        with served.connect(negotiate=False) as client:
            client.send_raw(part) if part else None
    with served.connect() as client:
        assert client.get_info().num_irqs == 5
