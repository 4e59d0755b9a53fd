"""How a client is told that it cannot be served: its VERSION is answered with an errno, and the connection closed.

It knows nothing of devices.
"""

import contextlib
import socket

import trio

from vfu_server import uapi
from vfu_server.libvfio_user.context import close_socket
from vfu_server.uapi import Command, HeaderFlag

PATIENCE = 0.5
"""Seconds that a refused client has to send its VERSION; it is refused without one, too."""


async def refuse_client(sock_fd: int, error: int) -> None:
    """Answer the first message on `sock_fd` with `error` and close it."""
    sock = trio.socket.from_stdlib_socket(socket.socket(fileno=sock_fd))
    try:
        with contextlib.suppress(OSError), trio.move_on_after(PATIENCE):
            # recv drops file descriptors that may ride with it
            header = await sock.recv(uapi.HEADER.size)
            msg_id = int.from_bytes(header[:2], "little")
            flags = HeaderFlag.REPLY | HeaderFlag.ERROR
            await sock.send(uapi.HEADER.pack(msg_id, Command.VERSION, uapi.HEADER.size, flags, error))
    finally:
        close_socket(sock.detach())
