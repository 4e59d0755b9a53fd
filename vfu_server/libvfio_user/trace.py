"""The C side of a trace: every access that the table answers goes through a ring to a file, by a thread of C.

It must not know the file's header, nor why it is written: whoever opens the file has put the header there.
"""

from dataclasses import dataclass

import trio

from vfu_server.libvfio_user.native import ffi, lib


@dataclass(frozen=True, slots=True)
class TraceNumbers:
    """Accesses that are in the file, accesses that found no room, bytes of records; the errno that ended it, or 0."""

    written: int
    lost: int
    bytes: int
    error: int


class Trace:
    """A file that is being written. `pointer` is what a Context is given; it must be closed after the Context."""

    def __init__(self, fd: int) -> None:
        """Takes `fd` over and appends from its offset on. OSError: no thread or memory to be had; `fd` stays open."""
        self.pointer = lib.vs_trace_open(fd)
        if self.pointer == ffi.NULL:
            raise OSError(ffi.errno, "the trace's thread cannot be started")
        self._last = TraceNumbers(0, 0, 0, 0)

    def mark_reset(self) -> None:
        """Note that the device was reset: it goes before the next access, or to the end."""
        lib.vs_trace_reset(self.pointer)

    def numbers(self) -> TraceNumbers:
        """Counters since it was opened; also when it is closed."""
        if self.pointer is not None:
            numbers = ffi.new("struct vs_trace_numbers *")
            lib.vs_trace_numbers(self.pointer, numbers)
            self._last = TraceNumbers(numbers.written, numbers.lost, numbers.bytes, numbers.error)
        return self._last

    async def failed(self) -> int:
        """Wait until the file cannot be written any more; the errno."""
        await trio.lowlevel.wait_readable(int(lib.vs_trace_fileno(self.pointer)))
        return self.numbers().error

    def close(self) -> None:
        """Write out what is there and close the file. Blocks, without the GIL, for as long as the disk does."""
        if self.pointer is not None:
            pointer, self.pointer = self.pointer, None
            numbers = ffi.new("struct vs_trace_numbers *")
            lib.vs_trace_close(pointer, numbers)
            self._last = TraceNumbers(numbers.written, numbers.lost, numbers.bytes, numbers.error)
