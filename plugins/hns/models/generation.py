"""What one generation of the hardware can do, and how a model of it was ordered: revision, mode, queues.

Source: Linux 7.2.8, drivers/crypto/hisilicon/qm.c and drivers/vfio/pci/hisilicon. It must not know registers' places
or behaviour.
"""

from dataclasses import dataclass

from plugins.hns.registers import REVISION_V2, REVISION_V3, REVISION_V4, REVISION_V5, Kind
from vfu_server.errors import UsageError

MOST_QUEUES = 1024
"""Queues of the whole device (model); `cap_queues` has eleven bits for them."""
MOST_VFS = 63


@dataclass(frozen=True, slots=True)
class Order:
    """One accelerator as it was ordered. UsageError for what cannot be.

    `revision` is PCI's; `sub_version`, when not 0, is what register 0x210 answers and then the version that counts.
    `queues` are those of each VF; VF 0's first is behind the PF's own `pf_queues`. `entry_seconds` is how long an
    entry is at hand before it is done, in the model's time.
    """

    kind: Kind
    revision: int = REVISION_V3
    sub_version: int = 0
    pf_ctrl: bool = False
    vfs: int = 1
    queues: int = 16
    pf_queues: int = 64
    isolation: bool = True
    entry_seconds: float = 5e-6

    def __post_init__(self) -> None:
        if self.version not in (REVISION_V2, REVISION_V3, REVISION_V4, REVISION_V5):
            raise UsageError(f"there is no generation {self.version:#x}: 0x21, 0x30, 0x50 and 0x51 are known")
        if self.pf_ctrl and not self.has_pf_ctrl:
            raise UsageError("mode pf-ctrl needs a generation later than V3 (0x50 or 0x51)")
        if not 1 <= self.vfs <= MOST_VFS:
            raise UsageError(f"there can be 1 to {MOST_VFS} VFs, not {self.vfs}")
        if self.queues < 1 or self.pf_queues < 1 or self.pf_queues + self.vfs * self.queues > MOST_QUEUES:
            raise UsageError(f"the device has {MOST_QUEUES} queues for its PF and VFs, each with one at least")
        if not 0 <= self.entry_seconds <= 10_000:
            raise UsageError("an entry takes 0 to 10000 seconds")

    @property
    def version(self) -> int:
        """The generation that counts."""
        return self.sub_version or self.revision

    @property
    def can_migrate(self) -> bool:
        """V3 and later have the pause command and the shadow registers."""
        return self.version >= REVISION_V3

    @property
    def has_pf_ctrl(self) -> bool:
        """Later than V3: migration windows may lie in the PF's BAR2."""
        return self.version > REVISION_V3

    @property
    def has_message_registers(self) -> bool:
        """V4 and later pass messages by registers instead of the mailbox."""
        return self.version >= REVISION_V4

    @property
    def has_doorbell_drop(self) -> bool:
        """V5 can drop doorbells."""
        return self.version >= REVISION_V5
