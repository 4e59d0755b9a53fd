"""The listening UNIX socket of a device: made at a path, inherited by its number, or handed over by systemd.

It must not know what is spoken over a connection. A path is published in one step, by renaming a socket that already
listens, and only ever replaces a socket that nobody listens at; it is removed only if it is still ours.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import trio

from vfu_server.errors import UsageError
from vfu_server.exit_codes import SocketError

logger = logging.getLogger(__name__)

MAX_PATH = 107
"""Longest path that a client can connect to: `sun_path` less its terminating zero."""

BACKLOG = 16
_LOCK_DEADLINE = 2.0
_ACTIVATION_FIRST_FD = 3
_ACCEPT_PAUSE = 0.2
_OUT_OF_FDS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class _Published:
    """A path that is ours: the directory (an open fd), the name in it, and the inode that we put there."""

    directory: int
    name: str
    device: int
    inode: int


class Listener:
    """Where a device's clients come from. `one_client`: an inherited connection instead of a listening socket."""

    def __init__(self, sock: socket.socket, description: str, published: _Published | None = None) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.description = description
        self.one_client = not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        self._published = published

    async def accept(self) -> int:
        """The next client's connected socket, a blocking one, close-on-exec; the caller owns the fd."""
        while True:
            await trio.lowlevel.wait_readable(self.socket)
            try:
                client, _ = self.socket.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                continue
            except OSError as error:
                if error.errno not in _OUT_OF_FDS:
                    raise
                logger.warning("a client has to wait: %s", error)
                await trio.sleep(_ACCEPT_PAUSE)
                continue
            client.setblocking(True)
            return client.detach()

    def take_connection(self) -> int:
        """The inherited connection itself (`one_client`); the caller owns the fd."""
        client = os.dup(self.socket.fileno())
        os.set_blocking(client, True)
        return client

    def close(self) -> None:
        """Listen no more and remove the path, if it is still ours. Idempotent."""
        published, self._published = self._published, None
        if published is not None:
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(published.name, dir_fd=published.directory, follow_symlinks=False)
                if (found.st_dev, found.st_ino) == (published.device, published.inode):
                    os.unlink(published.name, dir_fd=published.directory)
                else:
                    logger.warning("%s was replaced by another process and is left alone", self.description)
            os.close(published.directory)
        self.socket.close()


def listen(path: str, group: str = "") -> Listener:
    """Listen at `path`, mode 0600, or 0660 and owned by `group` if one is given.

    A stale socket there is replaced, a live one refused. Raises SocketError; UsageError for an unknown group.
    """
    target = Path(path).absolute()
    if len(os.fsencode(target)) > MAX_PATH:
        raise SocketError(
            f"{target} has {len(os.fsencode(target))} bytes, a socket's path at most {MAX_PATH}: choose a shorter one"
        )
    gid = _group_id(group)
    try:
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SocketError(
            f"the directory of {target} does not exist: create it, or choose another --socket-path"
        ) from None
    except OSError as error:
        raise SocketError(f"{target}: {error.strerror}: choose another --socket-path", error.errno) from error
    try:
        with _locked(directory, target):
            _refuse_occupied(directory, target)
            sock, status = _publish(directory, target, gid)
    except BaseException:
        os.close(directory)
        raise
    return Listener(sock, str(target), _Published(directory, target.name, status.st_dev, status.st_ino))


def _group_id(group: str) -> int | None:
    if not group:
        return None
    if group.isascii() and group.isdigit():
        return int(group)
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise UsageError(f"--socket-group {group}: there is no such group on this machine") from None


@contextlib.contextmanager
def _locked(directory: int, target: Path) -> Iterator[None]:
    """Two servers that start at once must not both find the same socket stale. The lock ends with the fd.

    It is looked for again and again: a flock that waits has no deadline, and nothing tells when one is given up.
    """
    deadline = time.monotonic() + _LOCK_DEADLINE
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise SocketError(
                    f"{target.parent} is locked by another process (flock): find it with lsof, or choose another path"
                ) from None
            time.sleep(0.01)
    try:
        yield
    finally:
        fcntl.flock(directory, fcntl.LOCK_UN)


def _refuse_occupied(directory: int, target: Path) -> None:
    """Raise SocketError unless `target` is free or a socket that nobody listens at."""
    try:
        found = os.stat(target.name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        kind = (
            "a symbolic link"
            if stat.S_ISLNK(found.st_mode)
            else "a directory"
            if stat.S_ISDIR(found.st_mode)
            else "no socket"
        )
        raise SocketError(f"{target} exists and is {kind}: remove it, or choose another --socket-path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(f"/proc/self/fd/{directory}/{target.name}")
        except (ConnectionRefusedError, FileNotFoundError):
            logger.debug("%s is a stale socket and is replaced", target)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            raise SocketError(
                f"{target} exists and cannot be tried ({error.strerror}): remove it, or choose another path"
            ) from None
    raise SocketError(f"a live server listens at {target}: stop it, or choose another --socket-path", errno.EADDRINUSE)


def _publish(directory: int, target: Path, gid: int | None) -> tuple[socket.socket, os.stat_result]:
    """A socket that listens at `target`, and its inode. The path appears when mode, group and backlog are right."""
    temporary = f".{target.name}.{os.getpid()}"
    if len(os.fsencode(target.parent / temporary)) > MAX_PATH:
        temporary = f".{os.getpid()}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177 if gid is None else 0o117)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        try:
            sock.bind(
                f"/proc/self/fd/{directory}/{temporary}"
                if len(os.fsencode(target.parent / temporary)) > MAX_PATH
                else str(target.parent / temporary)
            )
            if gid is not None:
                os.chown(temporary, -1, gid, dir_fd=directory, follow_symlinks=False)
            sock.listen(BACKLOG)
            status = os.stat(temporary, dir_fd=directory, follow_symlinks=False)
            os.rename(temporary, target.name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise
    except OSError as error:
        sock.close()
        raise SocketError(f"cannot listen at {target}: {error.strerror}", error.errno) from error
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(umask)
    return sock, status


def adopt(fd: int, description: str) -> Listener:
    """Use an inherited UNIX stream socket: a listening one, or a client's connection."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise SocketError(f"{description}: {error.strerror}: it was not inherited", error.errno) from None
    if not stat.S_ISSOCK(mode):
        raise SocketError(f"{description} is not a socket")
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    problem = ""
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        problem = "is not a UNIX stream socket"
    elif not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        try:
            sock.getpeername()
        except OSError:
            problem = "neither listens nor is connected"
    if problem:
        sock.detach()
        raise SocketError(f"{description} {problem}")
    return Listener(sock, description)


@dataclass(frozen=True, slots=True)
class Activated:
    """A socket that systemd has opened for us: its fd, FileDescriptorName= and the path it is bound to."""

    fd: int
    name: str
    path: str


def activated(environ: MutableMapping[str, str]) -> list[Activated]:
    """The sockets that systemd handed over. Takes LISTEN_* out of `environ`: children have no part in it."""
    pid, count, names = (environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isascii() or not count.isdigit():
        return []
    fds = range(_ACTIVATION_FIRST_FD, _ACTIVATION_FIRST_FD + int(count))
    labels = names.split(":")
    if len(labels) != len(fds):  # a unit's own name may hold colons, and then they cannot be told apart
        labels = [""] * len(fds)
    return [Activated(fd, label, _bound_path(fd)) for fd, label in zip(fds, labels, strict=True)]


def _bound_path(fd: int) -> str:
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            address = sock.getsockname()
    except OSError:
        return ""
    return address if isinstance(address, str) else ""


def default_directory(environ: MutableMapping[str, str]) -> Path:
    """Where sockets go by default: the unit's RuntimeDirectory=, /run/vfu for root, XDG_RUNTIME_DIR/vfu for users."""
    given = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/run/vfu")
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if not runtime:
        raise SocketError("there is no place for the socket (neither root nor XDG_RUNTIME_DIR): give --socket-path")
    return Path(runtime) / "vfu"


def make_default_directory(directory: Path) -> None:
    """Create our own directory if it is not there: /run/vfu for everybody to enter, a user's own for the user."""
    try:
        directory.mkdir(mode=0o755 if directory == Path("/run/vfu") else 0o700, exist_ok=True)
    except OSError as error:
        raise SocketError(
            f"cannot make {directory} for the socket: {error.strerror}: give --socket-path", error.errno
        ) from None
