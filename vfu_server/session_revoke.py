"""`--revoke`: while a device is stopped its memory decoding is off, so that the kernel takes clients' mappings away.

vfio-pci zaps every mapping of a function's BARs when COMMAND's memory bit is written 0, and lets them fault in again
when it is written 1. It closes our own way to the registers as well (EIO): so the bit comes back for whatever the
plugin has to do there (`lifted`), and is last to go and first to come. Virtual functions have no such bit.

It must not know states: it is told when the device is at rest. Catches strays; a client can write the bit itself.
"""

import contextlib
import logging
from collections.abc import Iterator

from vfu_server.errors import HostError, UsageError
from vfu_server.host_device import HostDevice
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_MEMORY, RegionIndex

log = logging.getLogger(__name__)


class Revocation:
    """Takes mappings away from a device at rest. Does nothing unless `wanted` and something is `mapped`."""

    def __init__(self, host: HostDevice, *, wanted: bool, mapped: bool) -> None:
        """Raises UsageError where it cannot work."""
        if wanted and host.cannot_revoke:
            raise UsageError(f"--revoke: {host.name}: {host.cannot_revoke}")
        if wanted and not mapped:
            log.warning("--revoke: nothing is mapped by clients, so nothing is taken away")
        self._host = host
        self._active = wanted and mapped
        self._holders = 0
        self._at_rest = False
        self._left = -1
        """What COMMAND was left at, or -1: the mappings stand."""

    def at_rest(self, at_rest: bool) -> None:
        """The device is stopped, or it is not (any more); what follows is done when nobody needs the registers."""
        self._at_rest = at_rest
        self._settle()

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """The registers can be reached for the time of the `with`. Raises HostError if they cannot."""
        self._holders += 1
        try:
            self._settle()
            yield
        finally:
            self._holders -= 1
            self._settle()

    def _settle(self) -> None:
        wanted = self._active and self._at_rest and not self._holders
        if wanted == (self._left >= 0):
            return
        if not wanted:
            self._put_back()
            return
        try:
            self._take_away()
        except HostError as error:
            log.error("--revoke: the mappings of a stopped device could not be taken away: %s", error)

    def _take_away(self) -> None:
        command = self._host.read(RegionIndex.CONFIG, PCI_COMMAND, 2)
        if command & PCI_COMMAND_MEMORY:
            left = command & ~PCI_COMMAND_MEMORY
            self._host.write(RegionIndex.CONFIG, PCI_COMMAND, 2, left)
            self._left = left

    def _put_back(self) -> None:
        """Unless the client has written COMMAND meanwhile: then the bit is as it wants it."""
        if self._host.read(RegionIndex.CONFIG, PCI_COMMAND, 2) == self._left:
            self._host.write(RegionIndex.CONFIG, PCI_COMMAND, 2, self._left | PCI_COMMAND_MEMORY)
        self._left = -1
