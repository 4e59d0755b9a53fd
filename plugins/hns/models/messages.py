"""Messages between the PF and its VFs: what was said, to whom, and who has not acknowledged yet.

Functions are counted as the hardware does: 0 the PF, VF index + 1. It must not know by which registers or mailbox
commands a generation passes them.
"""

from collections.abc import Sequence

EVERY_VF = 0xFFFF


class Messages:
    """The post between function 0 and functions 1..vfs."""

    def __init__(self, vfs: int) -> None:
        self._vfs = vfs
        self.to_pf = [0] * (vfs + 1)
        """What each function said last."""
        self.to_vf = [0] * (vfs + 1)
        """What each function was told last."""
        self.for_pf = 0
        """A bit for each VF whose message the PF has not acknowledged."""
        self.for_vf = 0
        """A bit for each VF that has not acknowledged the PF's."""

    def reset(self) -> None:
        """Nothing was ever said."""
        self.to_pf = [0] * (self._vfs + 1)
        self.to_vf = [0] * (self._vfs + 1)
        self.for_pf = self.for_vf = 0

    def forget(self, function: int) -> None:
        """A VF is reset: nothing waits from it or for it."""
        self.for_pf &= ~(1 << function)
        self.for_vf &= ~(1 << function)
        self.to_pf[function] = self.to_vf[function] = 0

    def write_to_vf(self, target: int, message: int) -> bool:
        """The PF prepares a message for one function, or EVERY_VF. False: there is no such VF."""
        functions = self.targets(target, EVERY_VF)
        for function in functions:
            self.to_vf[function] = message
        return bool(functions)

    def targets(self, target: int, everyone: int) -> Sequence[int]:
        """The VFs that `target` names, `everyone` being the number for all."""
        if target == everyone:
            return range(1, self._vfs + 1)
        return [target] if 1 <= target <= self._vfs else []
