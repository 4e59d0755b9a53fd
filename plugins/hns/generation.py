"""Which generation of the hardware a function is, VF or PF: its PCI revision, or what a register says beside it.

Source: Linux 7.2.8, drivers/crypto/hisilicon/qm.c. It must not know what a generation can do.
"""

from plugins.hns.registers import FUNCTION, GENERATIONS, QM_REGION, REVISION_V3
from vfu_server.host_device import HostDevice


def version_of(host: HostDevice) -> int:
    """The version that counts: later parts may show V3's revision, and tell their own in `sub_version`. HostError.

    A PF's memory space has to be on.
    """
    revision = host.identity().revision
    if revision != REVISION_V3:
        return revision
    register = FUNCTION["sub_version"]
    return host.read(QM_REGION, register.offset, register.width) or REVISION_V3


def generation_name(version: int) -> str:
    """`V3 (Kunpeng 930)`, or the number of a version that nobody has named."""
    return GENERATIONS.get(version, f"version {version:#x}")
