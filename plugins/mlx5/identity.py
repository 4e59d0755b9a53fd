"""Who a virtual function is to the other side of a migration, whichever way it is migrated.

Decisions only. Both ways write the same bytes, so a state saved by the one can be loaded by the other.
"""

import zlib
from typing import Final

from plugins.mlx5 import gate
from vfu_server.device import StateIdentity
from vfu_server.errors import StreamMismatchError
from vfu_server.host_device import HostDevice, Identity
from vfu_server.kernel_migration import SECTION_VERSION

VENDOR: Final = 0x15B3
VF_DEVICE: Final = 0x101E
"""The one id of virtual functions that can be migrated: ConnectX-6 Dx and later families."""
OLDER_VFS: Final = frozenset({0x1012, 0x1014, 0x1016, 0x1018, 0x101A, 0x101C})
"""Virtual functions of ConnectX-IB to ConnectX-6: no firmware of theirs migrates."""
VARIANT: Final = "connectx-vf"
BARE_VARIANT: Final = "connectx-vf-bare"
"""From kernels before 6.2, whose driver writes one image without records."""
_BOARD: Final = 32
_LOW: Final = (1 << _BOARD) - 1


def is_ours(found: Identity) -> bool:
    """A virtual function of this family."""
    return found.vendor == VENDOR and (found.device == VF_DEVICE or found.device in OLDER_VFS)


def too_old(host: HostDevice) -> bool:
    """A family that never migrates."""
    return host.identity().device in OLDER_VFS


def driven_identity(firmware: str, features: int, psid: str) -> StateIdentity:
    """With our own driver: firmware, capabilities and the board's id are known."""
    board = zlib.crc32(psid.encode()) if psid else 0
    return StateIdentity(VARIANT, SECTION_VERSION, firmware, features | board << _BOARD)


def kernel_identity(firmware: str, *, records: bool) -> StateIdentity:
    """With the kernel's driver: of the physical function nothing is known. `records`: its state has them."""
    return StateIdentity(VARIANT if records else BARE_VARIANT, SECTION_VERSION, firmware)


def check(theirs: StateIdentity, mine: StateIdentity) -> None:
    """Raise StreamMismatchError if a state of `theirs` cannot be loaded into `mine`; what one side does not know is
    left to the firmware, which checks each image.
    """
    if theirs.variant != mine.variant or theirs.state_version != mine.state_version:
        raise StreamMismatchError(
            f"the state was saved for {theirs.variant!r} version {theirs.state_version}, "
            f"this device is {mine.variant!r} version {mine.state_version}"
        )
    if theirs.firmware and mine.firmware and theirs.firmware != mine.firmware:
        raise StreamMismatchError(
            f"the state was saved under firmware {theirs.firmware}, this device has {mine.firmware}: "
            "both sides need the same"
        )
    their_board, my_board = theirs.features >> _BOARD, mine.features >> _BOARD
    if their_board and my_board and their_board != my_board:
        raise StreamMismatchError("the state was saved on a board of another kind (PSID): both sides need the same")
    if mine.features & _LOW and (names := gate.lacking(theirs.features & _LOW, mine.features & _LOW)):
        raise StreamMismatchError(f"the state needs {', '.join(names)}, which this device's firmware has not")
