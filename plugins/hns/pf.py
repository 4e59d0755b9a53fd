"""The physical function (PF) beside a VF: what only it can tell, as registers of its BAR2.

One for all VFs of a process. It must not know what is done about what it tells.
"""

import errno
import logging
from typing import Final

import trio

from plugins.hns import registers
from plugins.hns.generation import generation_name, version_of
from plugins.hns.registers import KIND_OF_PF, Kind
from plugins.hns.window import Window
from vfu_server.errors import HostError
from vfu_server.host_device import HostDevice
from vfu_server.regmap import Register
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_MEMORY, RegionIndex

log = logging.getLogger(__name__)

MOST_VFS: Final = 63
"""VFs of one device, at most: the registers for messages have 64 bits, one for each function."""


class PhysicalFunction:
    """The PF behind `host`. HostError, when its door's access fails."""

    def __init__(self, host: HostDevice, kind: Kind) -> None:
        self.host = host
        self.kind = kind
        self._block = registers.PF_BLOCKS[kind.name]

    @property
    def name(self) -> str:
        """For messages."""
        return self.host.name

    def register(self, name: str) -> Register:
        """The register `name`."""
        return self._block[name]

    def read(self, name: str) -> int:
        """Its value."""
        register = self._block[name]
        return self.host.read(registers.QM_REGION, register.offset, register.width)

    def isolation(self) -> int:
        """The device's queue isolation."""
        return self.read("queue_isolation")

    def has_windows(self) -> bool:
        """Mode PF_CTRL: migration goes through the PF's BAR2. For devices later than V3."""
        return bool(self.register("migration_region").field("pf_ctrl").get(self.read("migration_region")))

    def window(self, vf: HostDevice, index: int) -> Window:
        """The migration window of VF number `index`, in mode PF_CTRL."""
        base = registers.PF_WINDOWS + (index + 1) * registers.PF_WINDOW_STRIDE
        if base + registers.PF_WINDOW_STRIDE > self.host.regions[registers.QM_REGION].size:
            raise HostError(f"{self.name}: its BAR2 has no migration window for VF {index}", errno.EINVAL)
        return Window(self.host, vf, base, registers.WINDOW_EQC, registers.WINDOW_AEQC)


async def serve_pf(host: HostDevice, task_status: trio.TaskStatus[PhysicalFunction]) -> None:
    """Run a PF for its users until cancelled. HostError: it is none of the known ones, or has no BAR2 to speak of."""
    who = host.identity()
    kind = KIND_OF_PF.get(who.device) if who.vendor == registers.VENDOR else None
    if kind is None:
        raise HostError(
            f"{host.name} ({who.vendor:04x}:{who.device:04x}) is not the PF of a ZIP, SEC2 or HPRE", errno.ENODEV
        )
    last = max(register.end for register in registers.PF_BLOCKS[kind.name])
    if host.regions[registers.QM_REGION].size < last:
        raise HostError(f"{host.name}: its BAR2 has no room for the registers of a {kind.name} PF", errno.ENODEV)
    command = host.read(RegionIndex.CONFIG, PCI_COMMAND, 2)
    host.write(RegionIndex.CONFIG, PCI_COMMAND, 2, command | PCI_COMMAND_MEMORY)
    log.info("%s is the PF of a %s, %s", host.name, kind.name, generation_name(version_of(host)))
    task_status.started(PhysicalFunction(host, kind))
    await trio.sleep_forever()
