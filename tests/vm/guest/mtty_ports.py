"""Owns mtty's ports as tests use them: mediated devices made, a 16550's registers, and work that leaves traces in them.

Ports are reached by functions `read(port, offset)` and `write(port, offset, value)` of the caller's. Must not know
what is below them.
"""

from collections.abc import Callable
from pathlib import Path

MAKERS = Path("/sys/class/mdev_bus/mtty/mdev_supported_types")
RX, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)
DLAB, FIFO_ON = 0x80, 0x01
QUIET = (IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR)
"""Registers whose reads change nothing."""
TEXT = b"fifteen bytes.."
"""With a sixteenth, mtty takes its FIFO for empty."""


def create(uuid: str, kind: str) -> None:
    """Make a mediated device; `kind` is mtty-1 or mtty-2, by the number of ports."""
    (MAKERS / kind / "create").write_text(uuid)


def use(write: Callable[[int, int, int], None], scratch: int) -> None:
    """Work that leaves traces in every part of the state: port 0 with a full FIFO, port 1 with its divisor in view."""
    for offset, value in ((LCR, 0x03), (IIR_FCR, FIFO_ON), (MCR, 0x0B), (SCR, scratch), (IER, 0x0D)):
        write(0, offset, value)
    for byte in TEXT:
        write(0, RX, byte)
    for offset, value in ((SCR, scratch ^ 0xFF), (MCR, 0x02), (LCR, DLAB | 0x1B), (RX, 0x34), (IER, 0x12)):
        write(1, offset, value)


def clear(write: Callable[[int, int, int], None], ports: int = 2) -> None:
    """All ports as after a reset, as far as mtty lets registers be written: closing it forgets nothing."""
    for port in range(ports):
        for offset, value in ((LCR, DLAB), (LCR, 0), (IER, 0), (MCR, 0), (IIR_FCR, FIFO_ON | 0x06), (SCR, 0)):
            write(port, offset, value)


def look(read: Callable[[int, int], int]) -> list[int]:
    """What can be seen without changing it: the quiet registers of both ports, and port 1's divisor."""
    return [read(port, offset) for port in (0, 1) for offset in QUIET] + [read(1, RX), read(1, IER)]


def empty(read: Callable[[int, int], int]) -> bytes:
    """What comes out of port 0's FIFO."""
    return bytes(read(0, RX) for _ in TEXT)
