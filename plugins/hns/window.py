"""The window through which a VF is saved and restored: its own BAR2, or (V4, mode PF_CTRL) a part of the PF's.

Every access of this plugin to a function's registers goes through here, by name. It must not know what they are for.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from plugins.hns import registers
from plugins.hns.doorbell import Doorbell
from vfu_server.errors import PluginError
from vfu_server.host_device import HostDevice

MAILBOX = registers.MAILBOX
EQ_AEQ = registers.FUNCTION["doorbell_eq_aeq"].offset


@dataclass(frozen=True, slots=True)
class Window:
    """`host` and `base`: where the window is, in BAR2. `vf`: the VF's own door, the same in mode VF_CTRL.

    `eqc` and `aeqc`: where these words are, from `base`.
    """

    host: HostDevice
    vf: HostDevice
    base: int = 0
    eqc: int = registers.EQC
    aeqc: int = registers.AEQC

    @property
    def name(self) -> str:
        """The VF's, for messages."""
        return self.vf.name

    def offset(self, name: str) -> int:
        """Where the register is in BAR2. PluginError if there is none of that name."""
        if name.startswith(("eqc", "aeqc")):
            start, number = (self.eqc, name[3:]) if name.startswith("eqc") else (self.aeqc, name[4:])
            if number not in ("0", "1", "2", "3", "4", "5", "6"):
                raise PluginError(f"there is no context word {name!r}")
            return self.base + start + 4 * int(number)
        return self.base + registers.FUNCTION[name].offset

    def read(self, name: str) -> int:
        """The register's value, in one access of its width."""
        return self.host.read(registers.QM_REGION, self.offset(name), registers.VF[name].width)

    def write(self, name: str, value: int) -> None:
        """Write the register in one access."""
        register = registers.VF[name]
        self.host.write(registers.QM_REGION, self.offset(name), register.width, value & register.mask)

    def snapshot(self, names: Iterable[str]) -> dict[str, int]:
        """The registers' values, in the order of `names`."""
        return {name: self.read(name) for name in names}

    def show(self, *names: str) -> str:
        """What the registers read, for a message."""
        return ", ".join(registers.VF[name].decode(self.read(name)) for name in names)

    def mailbox_words(self) -> bytes:
        """The mailbox as it reads, 16 bytes."""
        at = self.base + MAILBOX
        words = (self.host.read(registers.QM_REGION, at + 4 * i, 4) for i in range(4))
        return b"".join(word.to_bytes(4, "little") for word in words)

    def write_mailbox(self, data: bytes) -> None:
        """One store of 16 bytes."""
        self.host.write_wide(registers.QM_REGION, self.base + MAILBOX, data)

    def ring(self, doorbell: Doorbell) -> None:
        """A doorbell of an SQ or CQ at the window, one of EQ or AEQ at the VF itself.

        A window of the PF ends before the place of EQ and AEQ doorbells: there is the next function's window.
        """
        if doorbell.is_queue:
            self.write("doorbell_sq_cq", doorbell.word())
        else:
            self.vf.write(registers.QM_REGION, EQ_AEQ, 8, doorbell.word())
