"""What is found out about a VF before it is served: kind, generation, mode, whether and why not it can be migrated.

It changes nothing on the device, and must not know how migration works.
"""

from dataclasses import dataclass
from typing import Final

from plugins.hns.generation import generation_name, version_of
from plugins.hns.registers import (
    HALF,
    KIND_OF_VF,
    QM_REGION,
    REVISION_V3,
    VENDOR,
    VF_SIZE,
    Kind,
)
from vfu_server.errors import HostError
from vfu_server.host_device import HostDevice

LATER_THAN_V3: Final = "later than V3"


@dataclass(frozen=True, slots=True)
class Facts:
    """`revision`: the hardware's version, which may differ from config space's."""

    kind: Kind
    revision: int

    @property
    def generation(self) -> str:
        """For people and comparison: `V3`, or the number of a version that nobody has named."""
        return generation_name(self.revision).partition(" ")[0]

    @property
    def variant(self) -> str:
        """The name in a state's identity: state goes to the same kind and generation only."""
        return f"{self.kind.name} {self.generation}"

    @property
    def may_have_windows(self) -> bool:
        """Mode PF_CTRL is possible, which the PF alone tells."""
        return self.revision > REVISION_V3

    def obstacle(self, size: int) -> str:
        """Why a VF with `size` bytes of BAR2 cannot be migrated by its own registers; empty if it can."""
        if self.revision < REVISION_V3:
            return f"{self.kind.name} {self.generation} has no migration registers: V3 or later is needed"
        if size != VF_SIZE:
            return (
                f"its BAR2 shows {size:#x} of {VF_SIZE:#x} bytes: the half for migration is kept back by its kernel "
                "driver, which does not migrate it"
            )
        return ""


def facts_of(host: HostDevice) -> Facts | None:
    """None: not one of these VFs. HostError: it is one by its ids, but not by its regions."""
    who = host.identity()
    kind = KIND_OF_VF.get(who.device) if who.vendor == VENDOR else None
    if kind is None:
        return None
    size = host.regions[QM_REGION].size
    if size < HALF:
        raise HostError(f"{host.name}: BAR2 of a {kind.name} VF has {size:#x} bytes, less than {HALF:#x}")
    return Facts(kind, version_of(host))
