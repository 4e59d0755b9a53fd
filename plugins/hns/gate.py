"""The guest's side of the mailbox: its commands put together and passed on; busy while the mailbox is ours.

The methods are called in the pump's thread; whoever shares them holds the device's lock. It must not know commands.
"""

import errno

from plugins.hns.mailbox import BUSY
from plugins.hns.registers import MAILBOX, MAILBOX_SIZE, QM_REGION
from vfu_server.errors import ClientError
from vfu_server.host_device import HostDevice


class Gate:
    """The mailbox of one function as its guest sees it. Offsets are within the mailbox's 16 bytes.

    A guest stores 16 bytes at once; an emulator makes two halves of them, a copy may have four words. They are put
    together here, and what holds the last byte makes them one store.
    """

    def __init__(self, host: HostDevice) -> None:
        self._host = host
        self._staged = bytearray(MAILBOX_SIZE)
        self._closed = False
        self._view: bytes | None = None
        """What the guest reads of its last command, since the mailbox has had ones of ours after it."""

    def reset(self) -> None:
        """As after a reset of the function."""
        self._staged[:] = bytes(MAILBOX_SIZE)
        self._closed = False
        self._view = None

    def close(self) -> None:
        """The mailbox is ours: it is busy for the guest."""
        self._closed = True

    def open(self) -> None:
        """It is the guest's again."""
        self._closed = False

    @property
    def view(self) -> bytes | None:
        """What the guest is to read of its last command; None: what the hardware has."""
        return self._view

    @view.setter
    def view(self, words: bytes | None) -> None:
        self._view = words

    def read(self, at: int, length: int) -> bytes:
        """A read of the guest's."""
        if self._closed:
            return BUSY[at : at + length]
        if self._view is not None:
            return self._view[at : at + length]
        if length in (1, 2, 4, 8):
            return self._host.read(QM_REGION, MAILBOX + at, length).to_bytes(length, "little")
        return self._host.read_block(QM_REGION, MAILBOX + at, length)

    def write(self, at: int, data: bytes) -> None:
        """A write of the guest's. ClientError EBUSY while the mailbox is ours: the guest saw that it is busy."""
        if self._closed:
            raise ClientError("the mailbox is busy", errno.EBUSY)
        self._staged[at : at + len(data)] = data
        if at + len(data) == MAILBOX_SIZE:
            self._host.write_wide(QM_REGION, MAILBOX, bytes(self._staged))
            self._view = None
