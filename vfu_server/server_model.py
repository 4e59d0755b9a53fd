"""A plugin's software model as a child process: started before its device is opened, ended with us in any case.

It must not know what the model models. The child's own side of the bond is `server_model_child`.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import trio

from vfu_server.device import ModelCommand
from vfu_server.errors import HostError

logger = logging.getLogger(__name__)

START_DEADLINE = 30.0
STOP_DEADLINE = 0.4
_TRY_INTERVAL = 0.005
_MAX_LINE = 8192
PREFIX = "vfu-model-"
LEFT_BEHIND = 60.0
"""Seconds: a younger folder may be one that its server is about to lock."""
_ACCEPTING = 0x10000
"""`__SO_ACCEPTCON` in the flags of /proc/net/unix."""


class ModelProcess:
    """The child, its socket in a folder of its own, and what it says."""

    def __init__(self, process: subprocess.Popen[bytes], output: int, socket_path: Path) -> None:
        self._process = process
        self._output = trio.lowlevel.FdStream(output)
        self.socket_path = str(socket_path)

    async def listening(self) -> None:
        """Wait until the model's socket can be connected to. HostError: it ended, or took too long."""
        with trio.move_on_after(START_DEADLINE):
            while not _listens(self.socket_path):
                status = self._process.poll()
                if status is not None:
                    raise HostError(
                        f"the model ended before it listened ({_ending(status)}); what it said is in the log"
                    )
                await trio.sleep(_TRY_INTERVAL)
            return
        raise HostError(f"the model did not listen within {START_DEADLINE:g} s")

    async def relay_output(self) -> None:
        """Put what the model writes into our log, line by line, until it ends."""
        pending = b""
        async with self._output:
            async for chunk in self._output:
                *lines, pending = (pending + chunk).split(b"\n")
                if len(pending) > _MAX_LINE:
                    lines, pending = [*lines, pending], b""
                _relay(lines)
        _relay([pending] if pending else [])

    def abandon(self) -> None:
        """End it at once and remove its folder."""
        self._process.kill()
        shutil.rmtree(Path(self.socket_path).parent, ignore_errors=True)

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if that does not help. Idempotent; also when cancelled nothing is left running."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                with trio.move_on_after(STOP_DEADLINE):
                    while self._process.poll() is None:  # noqa: ASYNC110 - Popen has no event
                        await trio.sleep(_TRY_INTERVAL)
        finally:
            if self._process.poll() is None:
                logger.warning("the model does not end by itself and is killed")
                self._process.kill()
            status = self._process.wait()
            if status not in (0, -signal.SIGTERM):
                logger.warning("the model has ended: %s", _ending(status))


@contextlib.asynccontextmanager
async def running(command: ModelCommand, name: str) -> AsyncIterator[ModelProcess]:
    """The model of `command`, listening, for the time of the `async with`. Raises HostError."""
    _remove_leftovers()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder, _held(Path(folder)):
        socket_path = Path(folder) / f"{name[:32].replace('/', '_')}.sock"
        process, output = _spawn([command.module, *command.args, "--socket-path", str(socket_path)])
        model = ModelProcess(process, output, socket_path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(model.relay_output)
            try:
                await model.listening()
                yield model
            finally:
                with trio.CancelScope(deadline=trio.current_time() + 2 * STOP_DEADLINE, shield=True):
                    await model.stop()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder is in use: locked, which ends with this process in any case."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _remove_leftovers() -> None:
    """Folders of ours that a server which was killed has left behind: nobody holds them, and they are not quite new."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime > LEFT_BEHIND:
                with _held(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def _spawn(arguments: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start the child; the fd is the reading end of what it says.

    From this thread: the death signal is bound to the thread that starts, and ours is the main one. A process group of
    its own keeps a Ctrl-C at the terminal from ending the hardware before its driver.
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path or str(Path.cwd()) for path in sys.path))
    command = [sys.executable, "-P", "-m", "vfu_server.server_model_child", str(os.getpid()), *arguments]
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, process_group=0
        )
    except OSError as error:
        os.close(reader)
        raise HostError(f"cannot start the model: {error.strerror}", error.errno) from error
    finally:
        os.close(writer)
    return process, reader


def _relay(lines: list[bytes]) -> None:
    for line in lines:
        level = logging.DEBUG if line.startswith(b"ready ") else logging.INFO  # what model_server says when it listens
        logger.log(level, "model: %s", line.decode(errors="replace"))


def _listens(path: str) -> bool:
    """Whether somebody listens at `path`, without becoming its first client."""
    if not os.path.exists(path):  # noqa: PTH110 - asked every few milliseconds
        return False
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as table:
        rows = (line.split(maxsplit=7) for line in table if line.rstrip("\n").endswith(path))
        return any(int(row[3], 16) & _ACCEPTING for row in rows)


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
