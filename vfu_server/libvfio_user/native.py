"""The one import of the native extension, and how its results become Python's.

C answers with 0, a count or a negative errno; here a negative one is raised as OSError, which callers turn into errors
of their room.
"""

import os
from collections.abc import Callable
from typing import Any

import vfu_server.libvfio_user._native as _native

ffi: Any = _native.ffi
lib: Any = _native.lib


def check(result: int) -> int:
    """`result`, or OSError if it is a negative errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC32C of `data`, going on from `crc`; by the processor's instruction, without the GIL."""
    view = ffi.from_buffer(data)
    return int(lib.vs_crc32c(crc, view, len(view)))


Crc32c = Callable[[bytes | bytearray | memoryview, int], int]
