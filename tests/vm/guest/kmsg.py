"""Owns the kernel's log from a moment on, as the test machine writes it."""

import os
import re
import select
import time


class KernelLog:
    """What the kernel says after this object was made."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)
        self.lines: list[str] = []

    def wait(self, pattern: str, seconds: float = 60.0) -> str:
        """The first new line that matches; AssertionError with what was said instead."""
        deadline = time.monotonic() + seconds
        seen = 0
        while True:
            self._read()
            for line in self.lines[seen:]:
                if re.search(pattern, line):
                    return line
            seen = len(self.lines)
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"the kernel did not say {pattern!r} but {self.lines}")
            select.select([self._fd], [], [], left)

    def new(self) -> list[str]:
        """All lines so far."""
        self._read()
        return self.lines

    def close(self) -> None:
        """Let go of the log."""
        os.close(self._fd)

    def _read(self) -> None:
        while True:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                return
            except BrokenPipeError:
                continue  # records were overwritten before they were read; the next read goes on behind them
            self.lines.append(record.decode(errors="replace").partition(";")[2].split("\n")[0])
