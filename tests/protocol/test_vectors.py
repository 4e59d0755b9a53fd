"""The protocol's published examples, byte by byte, in both directions."""

import errno

from tests.protocol.served import REGISTERS
from vfu_server.uapi import Command

VERSION = bytes.fromhex(
    "0100 0100 54000000 00000000 00000000  0000 0100"
    "7b226361706162696c6974696573223a7b226d61785f6d73675f666473223a382c"
    "226d61785f646174615f786665725f73697a65223a313034383537367d7d00"
)
READ = bytes.fromhex("0200 0900 20000000 00000000 00000000  1000000000000000 00000000 04000000")
READ_REPLY = bytes.fromhex("0200 0900 24000000 01000000 00000000  1000000000000000 00000000 04000000 efbeadde")
STOP_COPY = bytes.fromhex("0300 1000 20000000 00000000 00000000  10000000 02000200 03000000 ffffffff")
STOP_COPY_REPLY = bytes.fromhex("0300 1000 20000000 01000000 00000000  10000000 02000200 03000000 ffffffff")
STOP_COPY_REFUSED = bytes.fromhex("0300 1000 10000000 21000000 16000000")


def take(client, length):
    client.sock.settimeout(5)
    data = client.sock.recv(length, 0x100)  # MSG_WAITALL
    client.sock.setblocking(False)
    return data


def test_the_vectors_are_answered_literally(served):
    served.registers.memory[0][REGISTERS + 0x10 : REGISTERS + 0x14] = bytes.fromhex("efbeadde")
    with served.connect(negotiate=False) as client:
        assert len(VERSION) == 84
        client.send_raw(VERSION)
        reply = client.recv_message()
        assert (reply.msg_id, reply.command, reply.flags, reply.errno) == (1, Command.VERSION, 1, 0)
        assert reply.payload[:4] == bytes.fromhex("00000100")
        assert reply.payload.endswith(b"\0")

        client.send_raw(READ)
        assert take(client, 36) == READ_REPLY

        client.send_raw(STOP_COPY)
        message = served.message(Command.DEVICE_FEATURE)
        assert message.payload == STOP_COPY[16:]
        served.context.reply(message.payload)
        assert take(client, 32) == STOP_COPY_REPLY

        client.send_raw(STOP_COPY)
        served.message(Command.DEVICE_FEATURE)
        served.context.reply(error=errno.EINVAL)
        assert take(client, 16) == STOP_COPY_REFUSED
