"""Owns what a guest's driver of edu does through qtest: set-up, DMA both ways, interrupts by message into memory.

edu's DMA takes a tenth of a second by its own clock, so what is in flight when the guest moves can be chosen.
"""

import time
from collections.abc import Callable

from tests.qemu.qtest import Qtest
from tests.qemu_migration.side import SLOT

BAR = 0xFEB00000
MSI = 0x40
MAILBOX = 0x300000
MESSAGE = 0x4321
BUFFER = 0x40000
PAGE = 4096
SECONDS = 60.0
DMA_INTERRUPT = 0x100


def until(holds: Callable[[], bool], what: str) -> None:
    """Ask again and again; each question is an access that takes its time."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, what


def set_up(guest: Qtest) -> None:
    """The BAR, memory decoding, bus mastering, and a message into memory."""
    guest.config_write(SLOT, 0x10, 4, BAR)
    guest.config_write(SLOT, 0x04, 2, 0x6)
    guest.write(MAILBOX, 4, 0)
    guest.config_write(SLOT, MSI + 4, 4, MAILBOX)
    guest.config_write(SLOT, MSI + 8, 4, 0)
    guest.config_write(SLOT, MSI + 12, 2, MESSAGE)
    guest.config_write(SLOT, MSI + 2, 2, 0x81)
    assert guest.read(BAR, 4) == 0x010000ED


def begin(guest: Qtest, source: int, destination: int, count: int, *, out: bool) -> None:
    """Start a transfer that ends with an interrupt."""
    for offset, value in ((0x80, source), (0x88, destination), (0x90, count), (0x98, 0x7 if out else 0x5)):
        guest.write(BAR + offset, 4, value)


def finish(guest: Qtest) -> None:
    """Wait for the transfer's interrupt, which has to be the only one, and acknowledge it."""
    until(lambda: guest.read(MAILBOX, 4) == MESSAGE, "the interrupt of a transfer does not arrive")
    assert guest.read(BAR + 0x24, 4) == DMA_INTERRUPT
    assert not guest.read(BAR + 0x98, 4) & 1
    guest.write(BAR + 0x64, 4, DMA_INTERRUPT)
    guest.write(MAILBOX, 4, 0)


def copy(guest: Qtest, source: int, destination: int, count: int) -> None:
    """Memory to memory by way of the device's buffer."""
    begin(guest, source, BUFFER, count, out=False)
    finish(guest)
    begin(guest, BUFFER, destination, count, out=True)
    finish(guest)
