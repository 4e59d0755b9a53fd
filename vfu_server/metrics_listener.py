"""`--metrics`: a listener on this machine that answers GET /metrics, as little HTTP/1.1 as a scrape needs.

It must not know what is told: a function gives content type and body. Whoever connects can read, and do nothing else;
what it sends is bounded in size and time, and so is how many come at once.
"""

import contextlib
import logging
import socket
from collections.abc import Callable

import trio

from vfu_server import sockets
from vfu_server.config import MetricsAddress
from vfu_server.errors import UsageError
from vfu_server.exit_codes import SocketError
from vfu_server.sockets import Listener

logger = logging.getLogger(__name__)

MAX_REQUEST = 8192
DEADLINE = 5.0
LINGER = 0.5
AT_ONCE = 8
NOT_INSTALLED = (
    "--metrics needs the Python package prometheus_client, which is not installed: "
    "install vfu-server with its extra 'metrics' (pip install 'vfu-server[metrics]'; Debian: python3-prometheus-client)"
)

Render = Callable[[], tuple[str, bytes]]


def check_installed() -> None:
    """Raise UsageError where the optional package is missing."""
    try:
        import prometheus_client  # noqa: F401 - asked for, not used
    except ImportError:
        raise UsageError(NOT_INSTALLED) from None


def open_listener(address: MetricsAddress, group: str = "") -> Listener:
    """Listen at `address`. Raises SocketError."""
    if address.path:
        try:
            return sockets.listen(address.path, group)
        except SocketError as error:
            error.add_note(f"for --metrics {address}")
            raise
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address.host, address.port))
        sock.listen(sockets.BACKLOG)
    except OSError as error:
        sock.close()
        raise SocketError(f"--metrics {address}: {error.strerror}", error.errno) from None
    return Listener(sock, f"{MetricsAddress('', address.host, sock.getsockname()[1])}")


async def serve(listener: Listener, render: Render, deadline: float = DEADLINE) -> None:
    """Answer until cancelled; `deadline`: seconds for one client."""
    logger.info("metrics at %s", listener.description)
    room = trio.Semaphore(AT_ONCE)
    async with trio.open_nursery() as nursery:
        while True:
            await room.acquire()
            fd = await listener.accept()
            nursery.start_soon(_serve_one, fd, render, deadline, room)


async def _serve_one(fd: int, render: Render, deadline: float, room: trio.Semaphore) -> None:
    try:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
        with trio.move_on_after(deadline):
            async with stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(_response(await _request(stream), render))
                    await stream.send_eof()
                    with trio.move_on_after(LINGER):  # a close upon unread bytes would take the answer back
                        while await stream.receive_some(MAX_REQUEST):
                            pass
    finally:
        room.release()


async def _request(stream: trio.SocketStream) -> bytes:
    """The head of a request, or as much of it as came."""
    head = b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head and len(head) < MAX_REQUEST:
        chunk = await stream.receive_some(MAX_REQUEST)
        if not chunk:
            break
        head += chunk
    return head


def _response(head: bytes, render: Render) -> bytes:
    """What is answered to the request that begins with `head`."""
    words = head.split(b"\n", 1)[0].split()
    if len(head) >= MAX_REQUEST:
        return _message("431 Request Header Fields Too Large")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return _message("400 Bad Request")
    method, path = words[0], words[1].split(b"?", 1)[0]
    if method not in (b"GET", b"HEAD"):
        return _message("405 Method Not Allowed", more="Allow: GET, HEAD\r\n")
    if path == b"/":
        answer = _message("200 OK", body=b"vfu-server: see /metrics\n")
    elif path != b"/metrics":
        answer = _message("404 Not Found")
    else:
        try:
            kind, body = render()
            answer = _message("200 OK", kind, body)
        except Exception:
            logger.exception("a scrape failed")
            answer = _message("500 Internal Server Error")
    return answer if method == b"GET" else answer[: answer.index(b"\r\n\r\n") + 4]


def _message(status: str, kind: str = "text/plain; charset=utf-8", body: bytes = b"", more: str = "") -> bytes:
    body = body or f"{status}\n".encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n"
    )
    return head.encode() + body
