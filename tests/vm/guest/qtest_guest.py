"""Owns a guest whose processor is the check, by qtest, as traffic of models sees a guest: accesses, memory, interrupts.

QEMU writes messages of the device into the guest's memory. A look there turns them into eventfds, as a VMM would have
them, and what was not looked at yet moves with the memory. It must not know the device.
"""

import os
import select
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Self

from tests.qemu.qtest import Qtest
from tests.qemu_migration.side import SLOT
from tests.vm.guest.served import SECONDS
from vfu_server.testing import pci
from vfu_server.uapi import PCI_CAP_ID_MSI

MAILBOX, MESSAGE = 0x90000, 0x4320
"""Where messages are written, and the first vector's; the others are or-ed into it."""

BARS, BARS_OF_ONE = 0xE0000000, 16 << 20
"""Where BARs are: so many bytes for each slot."""


class Config:
    """Config space, in the form that the kit's functions for it take."""

    def __init__(self, guest: Qtest, slot: int) -> None:
        self._guest = guest
        self._slot = slot

    def read(self, offset: int, width: int) -> int:
        return self._guest.config_read(self._slot, offset, width)

    def write(self, offset: int, width: int, value: int) -> None:
        self._guest.config_write(self._slot, offset, width, value)


class QtestGuest:
    """A guest whose firmware has placed the BARs. It is its own memory and its own client."""

    def __init__(self, guest: Qtest, slot: int, bars: dict[int, int], fds: list[int]) -> None:
        self._guest = guest
        self._slot = slot
        self._bars = bars
        self.config = Config(guest, slot)
        self.interrupts = SimpleNamespace(fds=fds)
        self.memory = SimpleNamespace(read=guest.load, write=guest.store)
        self.client = SimpleNamespace(serve=self._pause, wait_readable=self._wait_readable)

    @classmethod
    def started(cls, guest: Qtest, slot: int = SLOT) -> Self:
        """Place the BARs and switch decoding and bus mastering on."""
        config = Config(guest, slot)
        return cls(guest, slot, pci.place_bars(config, pci.size_bars(config), memory=BARS + slot * BARS_OF_ONE), [])

    def at(self, guest: Qtest) -> Self:
        """The same guest, where it has moved to."""
        return type(self)(guest, self._slot, self._bars, self.interrupts.fds)

    def read(self, region: int, offset: int, width: int) -> int:
        return self._guest.read(self._bars[region] + offset, width)

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        self._guest.write(self._bars[region] + offset, width, value)

    def enable_msi(self, count: int) -> SimpleNamespace:
        """Messages of `count` vectors, a power of two, into memory."""
        at = pci.find_capability(self.config, PCI_CAP_ID_MSI)
        flags = self.config.read(at + pci.MSI_FLAGS, 2)
        self._guest.write(MAILBOX, 4, 0)
        self.config.write(at + 4, 4, MAILBOX)
        if flags & pci.MSI_64BIT:
            self.config.write(at + 8, 4, 0)
        self.config.write(at + (12 if flags & pci.MSI_64BIT else 8), 2, MESSAGE)
        several = (count - 1).bit_length() << pci.MSI_QUEUE_SIZE_SHIFT
        self.config.write(at + pci.MSI_FLAGS, 2, flags & ~(7 << pci.MSI_QUEUE_SIZE_SHIFT) | several | pci.MSI_ENABLE)
        self.interrupts.fds += [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
        return self.interrupts

    def _wait_readable(self, fd: int, seconds: float) -> bool:
        """Look for messages until the eventfd has one; False when the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            self._look()
            if select.select([fd], [], [], 0)[0]:
                return True
            if time.monotonic() > deadline:
                return False

    def _look(self) -> None:
        if message := self._guest.read(MAILBOX, 4):
            # One that comes before this write is not lost: its cause has not been looked at yet.
            self._guest.write(MAILBOX, 4, 0)
            os.eventfd_write(self.interrupts.fds[message - MESSAGE], 1)

    def _pause(self, _seconds: float) -> None:
        """Each access takes its time, and QEMU serves the device."""


class Port:
    """The guest as the driver of a ConnectX' data path sees it."""

    def __init__(self, guest: QtestGuest) -> None:
        self.read, self.write = guest.read, guest.write
        self.load, self.store = guest.memory.read, guest.memory.write

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Each look at the rings takes its time."""
        deadline = time.monotonic() + SECONDS
        while not until():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come within {SECONDS:g} s")
