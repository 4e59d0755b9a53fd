"""The file of `--trace-regions` being written: made before the device is opened, its header when the device is known.

It must not know what is in a record. A file of somebody else's is never overwritten: only a trace, or an empty file.
"""

import fcntl
import logging
import os
import stat
import time

from vfu_server.errors import UsageError
from vfu_server.libvfio_user.trace import Trace
from vfu_server.trace_format import MAGIC, TraceHeader

logger = logging.getLogger(__name__)


class TraceFile:
    """A file that is ours to write a trace to; `begin` hands it to the pump."""

    def __init__(self, path: str) -> None:
        """Open and lock `path`, mode 0600: a trace holds what a guest writes. Raises UsageError."""
        self.path = path
        self._fd = -1
        self._trace: Trace | None = None
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o600)
            self._check()
        except OSError as error:
            self.close()
            raise UsageError(f"--trace-regions {path}: {error.strerror}", error.errno) from None
        except UsageError:
            self.close()
            raise

    def _check(self) -> None:
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise UsageError(f"--trace-regions {self.path} is no regular file")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--trace-regions {self.path}: another process writes its trace there") from None
        if os.pread(self._fd, len(MAGIC), 0) not in (MAGIC, b""):
            raise UsageError(f"--trace-regions {self.path} exists and is no trace: remove it, or choose another name")

    def begin(self, header: TraceHeader) -> Trace:
        """Put the header there, in the place of an older trace. Raises UsageError."""
        try:
            os.ftruncate(self._fd, 0)
            os.write(self._fd, header.pack())
            self._trace = Trace(self._fd)
        except OSError as error:
            raise UsageError(f"--trace-regions {self.path}: {error.strerror}", error.errno) from None
        self._fd = -1
        return self._trace

    async def watch(self) -> None:
        """Tell when the file cannot be written any more; the device is served on."""
        if self._trace is not None:
            error = await self._trace.failed()
            logger.error("the trace ends here: %s: %s", self.path, os.strerror(error))

    def close(self) -> None:
        """Write out what is there, and tell how much that was. Blocks as long as the disk does; idempotent."""
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.close()
            numbers = trace.numbers()
            level = logging.WARNING if numbers.lost else logging.INFO
            logger.log(level, "%s has %d accesses, %d were lost", self.path, numbers.written, numbers.lost)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def clocks() -> tuple[int, int]:
    """Now, as nanoseconds since 1970 and of the monotonic clock."""
    return time.time_ns(), time.monotonic_ns()
