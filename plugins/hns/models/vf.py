"""A VF: its BAR2, half of it the guest's and half of it for migration, and its doorbell pages.

Source: Linux 7.2.8, drivers/vfio/pci/hisilicon. In mode PF_CTRL the migration half is in the PF's BAR2 and the VF's
own has nothing there. It must not know the PF's registers.
"""

from plugins.hns.models.device import Shared
from plugins.hns.models.eq import EventRing
from plugins.hns.models.function import QmFunction
from plugins.hns.registers import AEQC, CONTEXT_WORDS, DOORBELL_REGION, EQC, HALF, VF_SIZE


class VfModel(QmFunction):
    """VF `index`."""

    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__(shared, index + 1, VF_SIZE, shared.order.kind.vf_id)

    def read(self, region: int, offset: int, width: int) -> int:
        """BAR4 is written only."""
        if region == DOORBELL_REGION:
            return 0
        if offset < HALF:
            return self.qm_read(offset, width)
        found = self._shadow(offset, width)
        return 0 if found is None else self.shadow_read(*found)

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """Registers, migration registers or a doorbell page."""
        if region == DOORBELL_REGION:
            self.page_write(offset, width, value)
        elif offset < HALF:
            self.qm_write(offset, width, value)
        elif (found := self._shadow(offset, width)) is not None:
            self.shadow_write(*found, value)

    def _shadow(self, offset: int, width: int) -> tuple[EventRing, int] | None:
        if self.shared.pf_ctrl or not self.shared.order.can_migrate:
            self.violated("no_register")
            return None
        return self.shadow_place(offset, width, EQC, AEQC)

    def shadow_place(self, offset: int, width: int, eqc: int, aeqc: int) -> tuple[EventRing, int] | None:
        """The ring and word of an access where EQC and AEQC are at these offsets; else None, and it is counted."""
        for start, ring in ((eqc, self.events), (aeqc, self.errors)):
            if start <= offset < start + 4 * CONTEXT_WORDS:
                if width == 4 and offset % 4 == 0:
                    return ring, (offset - start) // 4
                self.violated("width")
                return None
        self.violated("no_register")
        return None
