"""A server that has run out of file descriptors: the kernel then cuts off those that come with a message."""

import errno
import os
import resource
import socket
import struct

from tests.protocol.served import REGISTERS, access
from vfu_server import uapi
from vfu_server.testing import pack_message
from vfu_server.uapi import Command


def test_fds_that_do_not_fit_in_the_servers_table_are_a_refusal(served, client):
    """The kernel cuts them off: a SET_IRQS that lost its eventfds must not be taken for one that disarms."""
    marks = [os.eventfd(0) for _ in range(8)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    spare = sorted(set(range(highest + 1)) - {int(name) for name in os.listdir("/proc/self/fd")})
    plugs = [os.dup(marks[0]) for _ in spare]
    limit = 1 + max(int(name) for name in os.listdir("/proc/self/fd"))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("8i", *marks))]
    payload = uapi.IRQ_SET.pack(28, 0x24, 2, 0, 8)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        client.sock.sendmsg([pack_message(Command.DEVICE_SET_IRQS, payload, msg_id=4)], rights)
        client.sock.sendmsg([pack_message(Command.REGION_READ, access(0, REGISTERS, 4), msg_id=5)])
        replies = {}
        while 5 not in replies:
            reply = client.recv_message()
            replies[reply.msg_id] = reply
        served.take_events()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in (*marks, *plugs):
            os.close(fd)
    assert served.no_message()
    assert replies[4].errno in (errno.EINVAL, errno.EMFILE)
