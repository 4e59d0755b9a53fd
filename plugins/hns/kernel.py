"""A VF that its own driver in the kernel (hisi_acc_vfio_pci) migrates: states forwarded, its bytes carried.

What is this plugin's is the policy and the name of the state; it touches no register of migration.
"""

import logging
from collections.abc import Mapping

from plugins.hns.facts import Facts
from plugins.hns.gate import Gate
from plugins.hns.policy import policy_of, shown_sizes
from plugins.hns.registers import HALF, MAILBOX, QM_REGION
from vfu_server.device import StateIdentity
from vfu_server.host_device import HostDevice
from vfu_server.kernel_migration import SECTION_VERSION, TAG, KernelMigrationDevice
from vfu_server.uapi import HOST_PAGE_SIZE

log = logging.getLogger(__name__)


class HnsKernelDevice(KernelMigrationDevice):
    """One VF. Its state goes to and comes from an `HnsDevice` as well: the bytes are the same."""

    def __init__(self, host: HostDevice, facts: Facts) -> None:
        sizes = {region.index: region.size for region in host.regions}
        # The driver halves BAR2 itself; where it does not, it has its window in the PF.
        self._sizes = shown_sizes(sizes, pf_ctrl=facts.may_have_windows)
        super().__init__(host, policy_of({**sizes, **self._sizes}), facts.variant)
        self._facts = facts
        self._gate = Gate(host)
        if host.regions[QM_REGION].size == HALF < HOST_PAGE_SIZE:
            log.warning(
                "%s: this host has pages of %#x bytes, and its driver lets nobody map one with both halves of BAR2: "
                "the guest's mailbox commands are refused; under vfio-pci they are not",
                host.name,
                HOST_PAGE_SIZE,
            )

    @property
    def identity(self) -> StateIdentity:
        return StateIdentity(self._facts.variant, SECTION_VERSION)

    @property
    def region_sizes(self) -> Mapping[int, int]:
        """As the driver has it."""
        return self._sizes

    def knows(self, tag: str, version: int) -> bool:
        """The driver's bytes only: the guest's view of its mailbox is optional."""
        return tag == TAG and version == SECTION_VERSION

    def trap_read(self, region: int, offset: int, width: int) -> int:
        return int.from_bytes(self.trap_read_block(region, offset, width), "little")

    def trap_write(self, region: int, offset: int, width: int, value: int) -> None:
        self.trap_write_block(region, offset, value.to_bytes(width, "little"))

    def trap_read_block(self, region: int, offset: int, length: int) -> bytes:
        with self.lock:
            return self._gate.read(offset - MAILBOX, length)

    def trap_write_block(self, region: int, offset: int, data: bytes) -> None:
        with self.lock:
            self._gate.write(offset - MAILBOX, data)
