"""What the firmware says of a command that failed: status, delivery status and syndrome as an error with a name.

It sends nothing. Numbers and errnos are those of Linux' driver (mlx5_core, cmd.c).
"""

import errno
from typing import Final

from vfu_server.errors import HostError

OK: Final = 0
BAD_RESOURCE_STATE: Final = 0x09
"""The one status with a meaning to drivers: a SAVE that the firmware will not do now."""

STATUS: Final = {
    0x00: ("ok", 0),
    0x01: ("internal error", errno.EIO),
    0x02: ("bad operation", errno.EINVAL),
    0x03: ("bad parameter", errno.EINVAL),
    0x04: ("bad system state", errno.EIO),
    0x05: ("bad resource", errno.EINVAL),
    0x06: ("resource busy", errno.EBUSY),
    0x07: ("firmware not ready", errno.EAGAIN),
    0x08: ("limits exceeded", errno.ENOMEM),
    BAD_RESOURCE_STATE: ("bad resource state", errno.EINVAL),
    0x0A: ("bad index", errno.EINVAL),
    0x0F: ("no resources", errno.EAGAIN),
    0x10: ("bad queue pair state", errno.EINVAL),
    0x30: ("bad packet", errno.EINVAL),
    0x40: ("too many outstanding completions", errno.EINVAL),
    0x50: ("bad input length", errno.EIO),
    0x51: ("bad output length", errno.EIO),
}
DELIVERY: Final = {
    0x00: ("ok", 0),
    0x01: ("signature error", errno.EBADR),
    0x02: ("token error", errno.EBADR),
    0x03: ("bad block number", errno.EFAULT),
    0x04: ("bad output pointer", errno.EFAULT),
    0x05: ("bad input pointer", errno.EFAULT),
    0x06: ("firmware internal error", errno.EIO),
    0x07: ("input length error", errno.ENOMSG),
    0x08: ("output length error", errno.ENOMSG),
    0x09: ("reserved field not zero", errno.ENOMSG),
    0x10: ("bad descriptor type", errno.ENOMSG),
}


class CommandError(HostError):
    """The firmware refused a command. `status`: its answer; 0 if the command was not even delivered (`delivery`)."""

    def __init__(self, where: str, command: str, status: int = 0, syndrome: int = 0, delivery: int = 0) -> None:
        if delivery:
            name, number = DELIVERY.get(delivery, ("unknown", errno.EINVAL))
            text = f"{where}: {command} was not delivered: status {delivery:#x} ({name})"
        else:
            name, number = STATUS.get(status, ("unknown", errno.EIO))
            text = f"{where}: {command} failed: status {status:#x} ({name}), syndrome {syndrome:#010x}"
        super().__init__(text, number)
        self.command = command
        self.status = status
        self.syndrome = syndrome
        self.delivery = delivery


class CommandLostError(HostError):
    """What a command did is not known: its answer is none of it."""


class CommandTimeoutError(CommandLostError):
    """A command did not complete in time; it may still act."""

    default_errno = errno.ETIMEDOUT


class PfDeadError(HostError):
    """The physical function's firmware or the card is dead, or its driver here has been ended: nothing is sent."""

    default_errno = errno.ENXIO
