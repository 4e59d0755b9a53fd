"""Whether a device is ours, and which of the two ways to migrate it is tried.

The order: the kernel's driver if it offers to migrate, since it needs nothing else; else the physical function, which
`own_way` opens later. It changes nothing of the device.
"""

import logging
from collections.abc import Mapping

from plugins.mlx5 import identity, options
from plugins.mlx5.init_segment import InitSegment
from plugins.mlx5.kernel_way import KernelWay
from plugins.mlx5.own_way import OwnWay
from plugins.mlx5.policy import msix_table, policy_of
from vfu_server.device import Device
from vfu_server.errors import HostError
from vfu_server.host_device import HostDevice
from vfu_server.kernel_migration import migration_of
from vfu_server.pci_command import memory_space
from vfu_server.uapi import MIGRATION_P2P, PCI_CFG_SPACE_SIZE, RegionIndex

log = logging.getLogger(__name__)


def probe(host: HostDevice, said: Mapping[str, str]) -> Device | None:
    """The device, or None if it is none of ours. UsageError: an option that cannot be."""
    if not identity.is_ours(host.identity()):
        return None
    chosen = options.parse(said)
    firmware = firmware_of(host)
    door = migration_of(host)
    if door is None or chosen.pf:
        if door is not None:
            log.info("%s: its driver would migrate it, but --option pf asks for our own driver", host.name)
        else:
            log.info("%s: its kernel driver does not migrate it: trying its physical function", host.name)
        return OwnWay(host, chosen, firmware)
    log.info("%s: migrated by its kernel driver %s, firmware %s", host.name, door.migrator, firmware or "unknown")
    header = host.read_block(RegionIndex.CONFIG, 0, min(PCI_CFG_SPACE_SIZE, host.regions[RegionIndex.CONFIG].size))
    policy = policy_of(host.regions, msix_table(header), p2p=bool(door.flags & MIGRATION_P2P))
    return KernelWay(host, policy, firmware)


def firmware_of(host: HostDevice) -> str:
    """The firmware's version, which every function tells; empty where it does not."""
    try:
        with memory_space(host):
            return InitSegment(host).firmware()
    except HostError as error:
        log.info("%s: its firmware's version cannot be read: %s", host.name, error)
        return ""
