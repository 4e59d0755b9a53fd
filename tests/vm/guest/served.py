"""Owns the server as a process in the test machine, with a real function as its device."""

from collections.abc import Sequence
from pathlib import Path

from tests.server.programs import Server
from vfu_server.testing import EduDriver, Guest, GuestMemory

SOCKETS = Path("/run/vfu")
SECONDS = 120.0
MEMORY, IOVA = 64 << 10, 0x100000


def serve(bdf: str, *options: object, plugin: str = "generic_dmaq", sites: Sequence[Path] = ()) -> Server:
    """A server for the function, listening; killed at the end of its `with`. `sites` have further plugins."""
    SOCKETS.mkdir(mode=0o700, exist_ok=True)
    server = Server("--plugin", plugin, "--bdf", bdf, "--socket-path", socket_of(bdf), *options, sites=sites)
    try:
        server.wait_log("listening at", SECONDS)
    except BaseException:
        server.__exit__()
        raise
    return server


def socket_of(bdf: str) -> Path:
    """Where the function's server listens."""
    return SOCKETS / f"{bdf}.sock"


def connect(bdf: str, memory: GuestMemory | None = None) -> Guest:
    """A guest that is connected and has not started. Its own memory is small: an emulated IOMMU is told each page."""
    memory = GuestMemory.of(MEMORY, IOVA) if memory is None else memory
    return Guest.connect(socket_of(bdf), memory, timeout=SECONDS)


def edu_of(guest: Guest) -> EduDriver:
    """The driver of a guest that has started."""
    return EduDriver(guest, timeout=SECONDS)
