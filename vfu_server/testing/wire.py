"""Whole vfio-user messages over a UNIX stream socket, from the client's end: framing, fds, ids, deadlines.

It knows headers but no payload other than that of DMA_READ and DMA_WRITE, and nothing of PCI, guests or migration.
Nothing in it is shared with the server's C code: the two check each other.
"""

import errno
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from vfu_server.errors import DeadlineError, VfuServerError
from vfu_server.uapi import DMA_ACCESS, HEADER, MAX_DATA_XFER_SIZE, Command, HeaderFlag

MAX_MESSAGE = (64 << 20) + 4096
"""No reply may be longer: QEMU accepts a max_data_xfer_size of at most 64 MiB."""
MAX_FDS = 16
"""As many fds as QEMU accepts in one message."""
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * 4)


class ReplyError(VfuServerError):
    """The server answered a command with an error. `command` is the message, `errno` the server's."""

    def __init__(self, command: int, error: int) -> None:
        name = errno.errorcode.get(error, str(error))
        super().__init__(f"{command_name(command)} was answered {name} ({os.strerror(error)})", error)
        self.command = command


class ProtocolError(VfuServerError):
    """The server broke the protocol in a way that a VMM does not forgive; the connection is of no use any more."""

    default_errno = errno.EPROTO


class ConnectionClosedError(VfuServerError):
    """The server closed the connection."""

    default_errno = errno.ECONNRESET


class Memory(Protocol):
    """Guest memory as the server reaches it by messages. Both methods raise OSError; its errno is the reply."""

    def dma_read(self, iova: int, length: int) -> bytes:
        """`length` bytes at `iova`."""
        ...

    def dma_write(self, iova: int, data: bytes) -> None:
        """Store `data` at `iova`."""
        ...


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it came. Whoever takes it owns the fds. `errno` is meaningful with HeaderFlag.ERROR."""

    msg_id: int
    command: int
    flags: int
    errno: int
    payload: bytes
    fds: tuple[int, ...] = ()

    @property
    def is_reply(self) -> bool:
        """Whether this answers a command of ours."""
        return self.flags & HeaderFlag.TYPE_MASK == HeaderFlag.REPLY

    @property
    def is_error(self) -> bool:
        """Whether this is a refusal."""
        return bool(self.flags & HeaderFlag.ERROR)

    def close_fds(self) -> None:
        """Close the fds that came along."""
        for fd in self.fds:
            os.close(fd)


def _timeval(seconds: float) -> tuple[int, int]:
    return int(seconds), int(seconds % 1 * 1_000_000)


def command_name(command: int) -> str:
    """`Command` by name, or by number if there is no such command."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


def pack_message(
    command: int, payload: bytes = b"", *, msg_id: int = 0, flags: int = 0, error: int = 0, size: int | None = None
) -> bytes:
    """The bytes of a message. `size` overrides the length in the header, for tests that lie about it."""
    total = HEADER.size + len(payload) if size is None else size
    return HEADER.pack(msg_id, command, total, flags, error) + payload


class _Inbox:
    """Assembles one message at a time and never reads past its end, so that fds stay with their message."""

    def __init__(self) -> None:
        self._header = bytearray(HEADER.size)
        self._body: bytearray | None = None
        self._got = 0
        self._fds: list[int] = []

    @property
    def begun(self) -> bool:
        """Whether a message is here in part."""
        return self._got > 0 or self._body is not None

    def receive(self, sock: socket.socket) -> Message | None:
        """One recvmsg; the message if this completed it.

        Raises BlockingIOError, ConnectionClosedError, ProtocolError.
        """
        buffer = self._header if self._body is None else self._body
        try:
            count, ancillary, flags, _ = sock.recvmsg_into(
                [memoryview(buffer)[self._got :]], _ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
        except (ConnectionResetError, BrokenPipeError) as error:
            raise ConnectionClosedError("the server reset the connection") from error
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds += struct.unpack(f"<{len(data) // 4}i", data[: len(data) // 4 * 4])
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(f"the server sent more than {MAX_FDS} fds with one message")
        if count == 0:
            where = "within a message" if self.begun else "between messages"
            raise ConnectionClosedError(f"the server closed the connection {where}")
        self._got += count
        if self._got < len(buffer):
            return None
        return self._advance()

    def _advance(self) -> Message | None:
        msg_id, command, size, flags, error = HEADER.unpack(self._header)
        if self._body is None:
            if not HEADER.size <= size <= MAX_MESSAGE:
                raise ProtocolError(f"the server sent a {command_name(command)} header with size {size}")
            self._got = 0
            self._body = bytearray(size - HEADER.size)
            if self._body:
                return None
        message = Message(msg_id, command, flags, error, bytes(self._body), tuple(self._fds))
        self._body, self._got, self._fds = None, 0, []
        return message

    def close(self) -> None:
        """Close the fds of a message that will never be whole."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class Connection:
    """A blocking vfio-user connection. Not for more than one thread at a time.

    Every wait ends after `timeout` seconds with DeadlineError. While it waits for a reply, commands of the server
    (DMA_READ, DMA_WRITE) are served from `memory`; all others are answered ENOSYS as QEMU does. Replies may come in any
    order. A reply that answers nothing is a ProtocolError, since QEMU is out of step after it.
    """

    def __init__(self, sock: socket.socket, *, timeout: float = 5.0, memory: Memory | None = None) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.timeout = timeout
        self.memory = memory
        self.max_data_xfer_size = MAX_DATA_XFER_SIZE
        self.dma_reads = 0
        self.dma_writes = 0
        self._inbox = _Inbox()
        self._arrived: deque[Message] = deque()
        self._replies: dict[int, Message] = {}
        self._pending: dict[int, int] = {}
        self._next_id = 0
        self._poll = select.poll()

    @classmethod
    def connect(cls, path: str | os.PathLike[str], *, timeout: float = 5.0, memory: Memory | None = None) -> Self:
        """A connection to the server that listens at `path`. Raises OSError as the system call does."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # the kernel's own time limit: a non-blocking connect would give up at once where the server's queue is full
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", *_timeval(timeout)))
            sock.connect(os.fspath(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout=timeout, memory=memory)

    @classmethod
    def from_fd(cls, fd: int, *, timeout: float = 5.0, memory: Memory | None = None) -> Self:
        """Take over `fd`, a connected stream socket."""
        return cls(socket.socket(fileno=fd), timeout=timeout, memory=memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket and every fd that nobody took. Idempotent."""
        self._inbox.close()
        for message in (*self._arrived, *self._replies.values()):
            message.close_fds()
        self._arrived.clear()
        self._replies.clear()
        self.sock.close()

    # raw layer

    def send_message(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0, msg_id: int | None = None
    ) -> int:
        """Send a message and return its id (the next free one unless given). The fds stay the caller's."""
        if msg_id is None:
            msg_id = self._free_id()
        if not flags & (HeaderFlag.NO_REPLY | HeaderFlag.TYPE_MASK):
            self._pending[msg_id] = command
        self.send_raw(pack_message(command, payload, msg_id=msg_id, flags=flags), fds)
        return msg_id

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are, fds with the first of them. Messages that arrive meanwhile are kept."""
        deadline = time.monotonic() + self.timeout
        view = memoryview(data)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"<{len(fds)}i", *fds))] if fds else []
        while True:
            try:
                sent = self.sock.sendmsg([view], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if self._wait(deadline, "the server to take a message", select.POLLIN | select.POLLOUT) & select.POLLIN:
                    self._receive_some()
                continue
            except (BrokenPipeError, ConnectionResetError) as error:
                raise ConnectionClosedError("the server closed the connection before it took a message") from error
            view, rights = view[sent:], []
            if not view:
                return

    def recv_message(self, timeout: float | None = None) -> Message:
        """The next message as it came: any reply, or a command of the server, which is then not served here."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        if self._replies:
            return self._replies.pop(next(iter(self._replies)))
        while not self._arrived:
            self._wait(deadline, "a message", select.POLLIN)
            self._receive_some()
        message = self._arrived.popleft()
        if message.is_reply:
            self._pending.pop(message.msg_id, None)
        return message

    def wait_reply(self, msg_id: int, timeout: float | None = None) -> Message:
        """The reply to message `msg_id`, error or not. Other replies are kept, commands of the server are served."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        command = command_name(self._pending.get(msg_id, 0))
        while True:
            while self._arrived:
                self._dispatch(self._arrived.popleft())
            reply = self._replies.pop(msg_id, None)
            if reply is not None:
                return reply
            self._wait(deadline, f"the reply to {command} (id {msg_id})", select.POLLIN)
            self._receive_some()

    def has_reply(self, msg_id: int) -> bool:
        """Whether the reply to `msg_id` is here. Takes what has arrived and never waits."""
        self.serve(0)
        return msg_id in self._replies

    def call(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        room: int | None = None,
        reply_fds: int = 0,
    ) -> Message:
        """Send a command and wait for its reply. Raises ReplyError.

        `room` is the payload size that a VMM has room for (the request's unless said): a longer reply is a
        ProtocolError, and so are more than `reply_fds` fds.
        """
        msg_id = self.send_message(command, payload, fds)
        reply = self.wait_reply(msg_id)
        if reply.command != command:
            reply.close_fds()
            raise ProtocolError(f"the reply to {command_name(command)} calls itself {command_name(reply.command)}")
        if reply.is_error:
            reply.close_fds()
            raise ReplyError(command, reply.errno)
        limit = len(payload) if room is None else max(room, len(payload))
        if len(reply.fds) > reply_fds or len(reply.payload) > limit:
            reply.close_fds()
            raise ProtocolError(
                f"the reply to {command_name(command)} has {len(reply.payload)} bytes and {len(reply.fds)} fds, "
                f"a VMM has room for {limit} and {reply_fds}"
            )
        return reply

    # waiting

    def serve(self, seconds: float) -> None:
        """Serve commands of the server for `seconds`, keep replies. 0: only what is here already."""
        self._serve_until(time.monotonic() + seconds, lambda: False, ())

    def wait_readable(self, fd: int, timeout: float | None = None) -> bool:
        """Serve commands of the server until `fd` is readable; False if `timeout` passes first."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        probe = select.poll()
        probe.register(fd, select.POLLIN)
        return self._serve_until(deadline, lambda: bool(probe.poll(0)), (fd,))

    def wait_closed(self, timeout: float | None = None) -> None:
        """Serve until the server closes the connection; DeadlineError if it does not."""
        try:
            self._serve_until(time.monotonic() + (self.timeout if timeout is None else timeout), lambda: False, ())
        except ConnectionClosedError:
            return
        raise DeadlineError("the server did not close the connection in time")

    def _serve_until(self, deadline: float, done: Callable[[], bool], fds: Sequence[int]) -> bool:
        probe = select.poll()
        for fd in (self.sock.fileno(), *fds):
            probe.register(fd, select.POLLIN)
        while True:
            while self._arrived:
                self._dispatch(self._arrived.popleft())
            if done():
                return True
            left = deadline - time.monotonic()
            ready = probe.poll(max(0.0, left) * 1000)
            if not ready:
                return False
            if any(fd == self.sock.fileno() for fd, _ in ready):
                self._receive_some()

    def _wait(self, deadline: float, what: str, events: int) -> int:
        self._poll.register(self.sock.fileno(), events)
        ready = self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready:
            raise DeadlineError(f"waited too long for {what}; {len(self._pending)} commands are without a reply")
        found = ready[0][1]
        # an end of file must be seen by whoever reads
        return found | select.POLLIN if found & (select.POLLHUP | select.POLLERR) else found

    def _receive_some(self) -> None:
        try:
            message = self._inbox.receive(self.sock)
        except BlockingIOError:
            return
        if message is not None:
            self._arrived.append(message)

    def _dispatch(self, message: Message) -> None:
        if not message.is_reply:
            self._serve_command(message)
            return
        if self._pending.pop(message.msg_id, None) is None:
            message.close_fds()
            name = command_name(message.command)
            raise ProtocolError(f"a reply to {name} with id {message.msg_id} that nobody waits for")
        self._replies[message.msg_id] = message

    def _serve_command(self, message: Message) -> None:
        message.close_fds()
        try:
            payload = self._perform(message)
            flags, error = int(HeaderFlag.REPLY), 0
        except OSError as failure:
            payload, flags, error = b"", HeaderFlag.REPLY | HeaderFlag.ERROR, failure.errno or errno.EIO
        if not message.flags & HeaderFlag.NO_REPLY:
            self.send_raw(pack_message(message.command, payload, msg_id=message.msg_id, flags=flags, error=error))

    def _perform(self, message: Message) -> bytes:
        if message.command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise OSError(errno.ENOSYS, "no such command")
        if len(message.payload) < DMA_ACCESS.size:
            raise OSError(errno.EINVAL, "short message")
        iova, count = DMA_ACCESS.unpack_from(message.payload)
        head, data = message.payload[: DMA_ACCESS.size], message.payload[DMA_ACCESS.size :]
        if count > self.max_data_xfer_size:
            raise OSError(errno.E2BIG, "more than max_data_xfer_size")
        if self.memory is None:
            raise OSError(errno.EFAULT, "no memory")
        if message.command == Command.DMA_READ:
            self.dma_reads += 1
            return head + self.memory.dma_read(iova, count)
        if len(data) != count:
            raise OSError(errno.EINVAL, "count and data differ")
        self.dma_writes += 1
        self.memory.dma_write(iova, data)
        return head

    def _free_id(self) -> int:
        for _ in range(1 << 16):
            candidate = self._next_id
            self._next_id = (candidate + 1) & 0xFFFF
            if candidate not in self._pending and candidate not in self._replies:
                return candidate
        raise ProtocolError("65536 commands are without a reply")
