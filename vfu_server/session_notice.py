"""Notices a client that uses the device and has never asked whether it can be migrated, and says so once.

QEMU without migration for vfio-user asks for no device feature at all, and does not refuse to migrate either: such a
migration completes, and the device's state is lost. It must not know messages beyond what it is told of them.
"""

import logging

from vfu_server.uapi import IrqIndex

log = logging.getLogger(__name__)

DRIVER = (IrqIndex.MSI, IrqIndex.MSIX)
"""Interrupts that only a guest's driver sets up; a VMM arms the others when it takes the device."""


class MigrationNotice:
    """What one client has done so far."""

    def __init__(self) -> None:
        self._asked = self._told = False

    def renew(self) -> None:
        """Another client."""
        self._asked = self._told = False

    def feature_asked(self) -> None:
        """The client knows device features, or it would not ask for one; it does so before the guest runs."""
        self._asked = True

    def armed(self, index: int) -> None:
        """The client has set up interrupts of `index`."""
        if index in DRIVER and not self._asked and not self._told:
            self._told = True
            log.warning(
                "the guest's driver is at work, and the client has never asked whether this device migrates, as a QEMU "
                "that cannot migrate vfio-user devices: should it migrate its guest, it will not carry the device's "
                "state, and will not say so. Unplug the device before (device_del), or use a QEMU that can"
            )
