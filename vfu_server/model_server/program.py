"""The program around one model, or several that are one piece of hardware: options, sockets, signals, exit status.

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
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import trio

from vfu_server.errors import PluginError, UsageError, VfuServerError
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
    return _program(lambda: {"": factory()}, argv)


def main_functions(functions: Mapping[str, Model], argv: Sequence[str] | None = None) -> int:
    """Serve several functions of one piece of hardware, such as a PF and its VFs; returns the exit status.

    The first in the mapping at `--socket-path P`, each other at `P.<name>`; their control sockets likewise. All methods
    and callbacks of all of them run under one lock, so that they may call each other, and use each other's bus.
    """
    return _program(lambda: functions, argv)


def _program(make: Callable[[], Mapping[str, Model]], argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    logging.basicConfig(level=options.log_level.upper(), format="%(name)s: %(levelname)s: %(message)s")
    sys.setswitchinterval(SWITCH_INTERVAL)
    status = 0
    try:
        trio.run(_run, make, options)
    except* VfuServerError as group:
        for error in _leaves(group):
            sys.stderr.write(f"{error}\n")
        status = 1
    return status


async def _run(make: Callable[[], Mapping[str, Model]], options: argparse.Namespace) -> None:
    models, lock = make(), threading.Condition(threading.Lock())
    functions = [Function(model, options.time_scale, _failed, lock) for model in models.values()]
    with contextlib.ExitStack() as stack:
        listeners, where = _listeners(list(models), options, stack)
        controls = []
        if options.control is not None:
            controls = [stack.enter_context(_listening(path)) for path in _paths(options.control, list(models))]
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))
        servers = [ModelServer(Path(where).name, function) for function in functions]
        try:
            async with trio.open_nursery() as nursery:
                for server, listener in zip(servers, listeners, strict=True):
                    nursery.start_soon(server.run, listener)
                for function, control in zip(functions, controls, strict=False):  # none, or one for each
                    nursery.start_soon(serve_control, _of_trio(control), function)
                nursery.start_soon(_exit_on_signal, signals, nursery.cancel_scope)
                if options.exit_with_fd is not None:
                    nursery.start_soon(_exit_with, options.exit_with_fd, nursery.cancel_scope)
                sys.stdout.write(f"ready {where}\n")
                sys.stdout.flush()
        finally:
            for server in servers:
                server.end()
            for server in servers:
                server.close()


def _paths(path: str, names: Sequence[str]) -> list[str]:
    """Where each function is found; the first at `path` itself."""
    if not names or any(not name or "/" in name for name in names[1:]):
        raise PluginError(f"functions called {', '.join(map(repr, names)) or 'nothing'} cannot have sockets")
    return [path, *(f"{path}.{name}" for name in names[1:])]


def _listeners(
    names: Sequence[str], options: argparse.Namespace, stack: contextlib.ExitStack
) -> tuple[list[socket.socket], str]:
    """A socket for each function, and what people call the first. That listens last: who sees it may count on all."""
    if options.fd is None:
        paths = _paths(options.socket_path, names)
        return [stack.enter_context(_listening(path)) for path in reversed(paths)][::-1], options.socket_path
    if len(names) != 1:
        raise UsageError(f"--fd is one socket, and there are {len(names)} functions: use --socket-path")
    return [_inherited(options.fd)], f"fd {options.fd}"


def _of_trio(listener: socket.socket) -> trio.SocketListener:
    return trio.SocketListener(trio.socket.from_stdlib_socket(listener))


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
