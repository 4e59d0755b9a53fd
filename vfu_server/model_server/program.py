"""The program around one model: options, sockets, signals, exit status.

It says `ready PATH` on standard output once clients may come, and ends with 0 on SIGTERM or SIGINT, or when the pipe
that `--exit-with-fd` names is closed at its other end.
"""

import argparse
import contextlib
import errno
import logging
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import trio

from vfu_server.errors import UsageError, VfuServerError
from vfu_server.model import Model
from vfu_server.model_server.control import serve_control
from vfu_server.model_server.function import Function
from vfu_server.model_server.server import ModelServer

logger = logging.getLogger(__name__)

BACKLOG = 8
SWITCH_INTERVAL = 1e-4
"""A trap waits for the GIL at most this long, in seconds; Python's own 5 ms would be felt in every access."""


def main(factory: Callable[[], Model], argv: Sequence[str] | None = None) -> int:
    """Serve the model that `factory` makes; returns the exit status. A user's mistake is one line on standard error."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=options.log_level.upper(), format="%(name)s: %(levelname)s: %(message)s")
    sys.setswitchinterval(SWITCH_INTERVAL)
    status = 0
    try:
        trio.run(_run, factory, options)
    except* VfuServerError as group:
        for error in _leaves(group):
            sys.stderr.write(f"{error}\n")
        status = 1
    return status


async def _run(factory: Callable[[], Model], options: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        await _serve_all(Function(factory(), options.time_scale, _failed), options, stack)


async def _serve_all(function: Function, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    signals = stack.enter_context(trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))
    async with trio.open_nursery() as nursery:
        if options.fd is not None:
            listener, where = _inherited(options.fd), f"fd {options.fd}"
        else:
            listener, where = stack.enter_context(_listening(options.socket_path)), options.socket_path
        if options.control is not None:
            control = stack.enter_context(_listening(options.control))
            listen_control = trio.SocketListener(trio.socket.from_stdlib_socket(control))
            nursery.start_soon(serve_control, listen_control, function)
        nursery.start_soon(_exit_on_signal, signals, nursery.cancel_scope)
        if options.exit_with_fd is not None:
            nursery.start_soon(_exit_with, options.exit_with_fd, nursery.cancel_scope)
        nursery.start_soon(ModelServer(Path(where).name, function).run, listener)
        sys.stdout.write(f"ready {where}\n")
        sys.stdout.flush()


async def _exit_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


async def _exit_with(fd: int, scope: trio.CancelScope) -> None:
    """Wait for the other end of a pipe or socket to be closed; what is written there is thrown away."""
    try:
        async with trio.lowlevel.FdStream(fd) as stream:
            async for _ in stream:
                pass
    except OSError as error:
        raise UsageError(f"--exit-with-fd {fd}: {error.strerror}", error.errno) from error
    scope.cancel()


def _inherited(fd: int) -> socket.socket:
    try:
        listener = socket.socket(fileno=fd)
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise UsageError(f"--fd {fd}: {error.strerror}", error.errno) from error
    if listener.family != socket.AF_UNIX or not listening:
        raise UsageError(f"--fd {fd} is not a listening UNIX socket")
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def _listening(path: str) -> Iterator[socket.socket]:
    """A listening socket at `path`, for us alone; removed at the end. One that nobody serves any more is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _bind(listener, path)
        Path(path).chmod(stat.S_IRUSR | stat.S_IWUSR)
        listener.setblocking(False)
        listener.listen(BACKLOG)
        try:
            yield listener
        finally:
            Path(path).unlink(missing_ok=True)
    finally:
        listener.close()


def _bind(listener: socket.socket, path: str) -> None:
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_left_over(path):
                raise
            Path(path).unlink()
            listener.bind(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", error.errno) from error


def _is_left_over(path: str) -> bool:
    """Whether `path` is a socket that nobody listens on any more."""
    if not stat.S_ISSOCK(Path(path).lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _failed(error: BaseException) -> None:
    logger.error("the model failed in a callback", exc_info=error)


def _leaves(group: BaseExceptionGroup[VfuServerError]) -> list[VfuServerError]:
    found: list[VfuServerError] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError("it is a factor above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Serve a software model over vfio-user.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket-path", metavar="PATH", help="where to listen")
    where.add_argument("--fd", type=int, metavar="N", help="a listening UNIX socket that was handed down")
    parser.add_argument(
        "--time-scale", type=_scale, default=1.0, metavar="X", help="0.01: everything takes a hundredth of its time"
    )
    parser.add_argument("--control", metavar="PATH", help="a socket for tests: see the documentation of models")
    parser.add_argument("--exit-with-fd", type=int, metavar="N", help="end when the other end of this pipe is closed")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")
    return parser
