"""The ladder of resets of a real function: its own, else that of its slot or bus where nobody else is hit.

It must not know what the reset is for; the function's client writes COMMAND and arms interrupts again.
"""

import errno
import logging
from collections.abc import Set as AbstractSet

import trio

from vfu_server.errors import HostError
from vfu_server.host import ioctl as kernel_calls
from vfu_server.host.attachment import Attachment
from vfu_server.host.in_kernel import InKernel
from vfu_server.host.ioctl import HotReset, Ioctl

log = logging.getLogger(__name__)

# EAGAIN: somebody else works on the function at this moment (a reset of a sibling, power management).
TRIES = 20
PAUSE = 0.05


def resets_unannounced(ioctl: Ioctl, attachment: Attachment) -> bool:
    """Whether a mediated device takes DEVICE_RESET without having said so, as the kernel's sample mtty does.

    The reset is made: a device that is just being opened is reset anyhow, where it can be.
    """
    try:
        kernel_calls.device_reset(ioctl, attachment.device_fd)
    except OSError:
        return False
    return True


class Ladder:
    """The resets of one function, best first. `open_here`: BDFs that this process has open."""

    def __init__(
        self,
        ioctl: Ioctl,
        bdf: str,
        attachment: Attachment,
        open_here: AbstractSet[str],
        in_kernel: InKernel,
        *,
        by_function: bool,
    ) -> None:
        self._in_kernel = in_kernel
        self._ioctl = ioctl
        self._bdf = bdf
        self._attachment = attachment
        self._open_here = open_here
        self._by_function = by_function

    def exists(self) -> bool:
        """Whether there is a rung at all, as things stand now. Blocks."""
        if self._by_function:
            return True
        try:
            info = kernel_calls.hot_reset_info(self._ioctl, self._attachment.device_fd)
        except OSError:
            return False
        return not self._obstacle(info)

    async def reset(self) -> str:
        """The name of the one that worked. HostError if none did, with what stood in the way of each."""
        failed = "it has no function reset"
        if self._by_function:
            try:
                await self._function_reset()
                return "DEVICE_RESET"
            except OSError as error:
                failed = f"DEVICE_RESET: {error.strerror}"
                log.warning("%s: %s", self._bdf, failed)
        try:
            await self._in_kernel.run(self._hot_reset, "PCI_HOT_RESET")
            return "PCI_HOT_RESET"
        except OSError as error:
            text = f"{self._bdf} cannot be reset: {failed}; hot reset: {error.strerror}"
            raise HostError(text, error.errno) from error

    async def _function_reset(self) -> None:
        for left in reversed(range(TRIES)):
            try:
                await self._in_kernel.run(
                    lambda: kernel_calls.device_reset(self._ioctl, self._attachment.device_fd), "DEVICE_RESET"
                )
                return
            except OSError as error:
                if error.errno != errno.EAGAIN or not left:
                    raise
            await trio.sleep(PAUSE)

    def _hot_reset(self) -> None:
        device = self._attachment.device_fd
        info = kernel_calls.hot_reset_info(self._ioctl, device)
        if obstacle := self._obstacle(info):
            raise OSError(errno.EBUSY, obstacle)
        kernel_calls.hot_reset(self._ioctl, device, self._attachment.hot_reset_groups(info) or ())

    def _obstacle(self, info: HotReset) -> str:
        """Why the slot or bus must not be reset, or nothing. A function of ours that is not in use may be hit."""
        others = [bdf for _, bdf in info.devices if bdf != self._bdf]
        if self._attachment.hot_reset_groups(info) is None:
            return f"it would reset {', '.join(others) or 'what'} is not ours"
        if busy := [bdf for bdf in others if bdf in self._open_here]:
            return f"it would reset {', '.join(busy)}, in use here"
        return ""
