"""A client of another vfio-user server, in C: the door to a device that is served over a socket.

It frames requests and replies; what they mean is `host.vfio_user`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vfu_server.libvfio_user.door import MAX_DMA_MAPS, NativeDoor
from vfu_server.libvfio_user.native import check, ffi, lib
from vfu_server.uapi import MAX_DATA_XFER_SIZE, Command

MAX_REPLY_FDS = 8


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """A command that the server sent by itself (DMA_READ, DMA_WRITE); it waits for `ClientDoor.reply`."""

    command: Command
    msg_id: int
    payload: bytes


class ClientDoor(NativeDoor):
    """Requests to one server, from any thread; a native thread reads its replies."""

    def __init__(self, sock_fd: int) -> None:
        self._client = lib.vs_client_open(sock_fd, MAX_DMA_MAPS)
        if self._client == ffi.NULL:
            raise MemoryError
        super().__init__(lib.vs_client_door(self._client))

    def request(
        self, command: Command, payload: bytes, *, fds: Sequence[int] = (), room: int = 4096, timeout: float = 3.0
    ) -> tuple[bytes, list[int]]:
        """Body and fds of the reply, at most `room` bytes of it; the fds are the caller's. Blocks without the GIL.

        OSError: the server's errno, ETIMEDOUT, or ENODEV once it is gone.
        """
        reply = ffi.new("uint8_t[]", max(room, 1))
        reply_fds = ffi.new("int[]", MAX_REPLY_FDS)
        nr_fds = ffi.new("size_t *", MAX_REPLY_FDS)
        n = lib.vs_client_request(
            self._client,
            command,
            payload,
            len(payload),
            list(fds),
            len(fds),
            reply,
            room,
            reply_fds,
            nr_fds,
            int(timeout * 1000),
        )
        check(n)
        return bytes(ffi.buffer(reply, n)), [reply_fds[i] for i in range(nr_fds[0])]

    def fileno(self) -> int:
        """An eventfd: readable when `next_command` would give something, and for ever once the server is gone."""
        return int(lib.vs_client_fileno(self._client))

    def next_command(self) -> ServerCommand | None:
        """What the server sent by itself, oldest first; None when there is nothing."""
        command = lib.vs_client_next_command(self._client)
        if command == ffi.NULL:
            return None
        found = ServerCommand(Command(command.command), command.id, bytes(ffi.buffer(command.data, command.len)))
        lib.vs_command_free(command)
        return found

    def reply(self, command: ServerCommand, payload: bytes = b"", error: int = 0) -> None:
        """Answer a command of the server."""
        check(lib.vs_client_reply(self._client, command.command, command.msg_id, payload, len(payload), error))

    def set_max_transfer(self, size: int) -> None:
        """The largest transfer that the server takes in one message, from its VERSION reply."""
        lib.vs_client_set_max_xfer(self._client, min(size, MAX_DATA_XFER_SIZE))

    def mark_gone(self) -> None:
        """Give the server up: everything that waits fails with ENODEV."""
        lib.vs_client_mark_gone(self._client)
