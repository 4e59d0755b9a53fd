"""The initialization segment of a function, read and written through its door.

It knows registers, not commands: who writes the queue's address and rings is `command_queue`. Values are what the
device means (big-endian dwords turned over). Source: Linux' mlx5_core (fw.c, health.c, main.c).
"""

from dataclasses import dataclass
from typing import Final

import trio

from plugins.mlx5 import registers
from plugins.mlx5.registers import INIT_SEGMENT, SYNDROMES, swap32
from vfu_server.errors import DeadlineError, HostError
from vfu_server.host_device import HostDevice
from vfu_server.uapi import RegionIndex

BAR: Final = RegionIndex.BAR0
DEAD: Final = 0xFFFFFFFF
INITIALIZING_STEP: Final = 0.002
DEFAULT_COMMAND_SECONDS: Final = 60.0
DEFAULT_INIT_SECONDS: Final = 2.0
_UNITS: Final = (0.001, 1.0, 60.0, 3600.0)
_MAX_SECONDS: Final = 7200.0


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds that a command may take, and that the firmware may take for a queue's new address."""

    command: float = DEFAULT_COMMAND_SECONDS
    init: float = DEFAULT_INIT_SECONDS


class InitSegment:
    """The segment of one function. Its memory space must be on."""

    def __init__(self, host: HostDevice) -> None:
        self._host = host
        self.name = host.name

    def read(self, name: str) -> int:
        """Register `name`."""
        return swap32(self._host.read(BAR, INIT_SEGMENT[name].offset, 4))

    def write(self, name: str, value: int) -> None:
        """Register `name`."""
        self._host.write(BAR, INIT_SEGMENT[name].offset, 4, swap32(value))

    def field(self, register: str, name: str) -> int:
        """Field `name` of register `register`."""
        return INIT_SEGMENT[register].field(name).get(self.read(register))

    def firmware(self) -> str:
        """The firmware's version as vendors write it: `28.41.1000`."""
        first, second = self.read("fw_rev"), self.read("cmdif_rev_fw_sub")
        if DEAD in (first, second):
            raise HostError(f"{self.name}: its initialization segment reads all ones")
        return f"{first & 0xFFFF}.{first >> 16}.{second & 0xFFFF:04}"

    def check_revision(self) -> None:
        """HostError unless this is the command interface that we know."""
        found = self.field("cmdif_rev_fw_sub", "cmd_interface_rev")
        if found != registers.CMD_INTERFACE_REV:
            raise HostError(f"{self.name}: command interface revision {found}, known is {registers.CMD_INTERFACE_REV}")

    async def wait_initialized(self, seconds: float) -> None:
        """Until the firmware has started. DeadlineError."""
        deadline = trio.current_time() + seconds
        while self.field("initializing", "initializing"):
            if trio.current_time() >= deadline:
                break
            await trio.sleep(INITIALIZING_STEP)
        else:
            return
        raise DeadlineError(f"{self.name}: its firmware still says `initializing` after {seconds:g} s")

    def timeouts(self) -> Timeouts:
        """Those that the firmware gives, else Linux' own."""
        init = _seconds(self.read("cmd_init_timeout"))
        if not init:
            return Timeouts()
        return Timeouts(_seconds(self.read("cmd_exec_timeout")) or DEFAULT_COMMAND_SECONDS, init)

    def set_nic_interface(self, state: int) -> None:
        """Ask for another NIC interface state, the queue's address kept."""
        low = self.read("cmdq_addr_low")
        self.write("cmdq_addr_low", low & 0xFFFFF000 | state << 8)

    def fatal(self) -> str:
        """Why the function is dead, as far as its registers say; empty: they do not say so."""
        if self.read("health.fw_ver") == DEAD:
            return "its health buffer reads all ones: the card does not answer"
        state = self.field("cmdq_addr_low", "nic_interface")
        if state in (registers.NIC_DISABLED, registers.NIC_SW_RESET):
            return f"its NIC interface is in state {state}"
        syndrome = self.field("health.synd", "synd")
        if syndrome and self.field("health.rfr", "rfr"):
            return (
                f"its firmware asks for a reset: health syndrome {syndrome:#x} ({SYNDROMES.get(syndrome, 'unknown')})"
            )
        return ""

    def health(self) -> str:
        """What the health buffer says, for messages."""
        syndrome = self.field("health.synd", "synd")
        name = SYNDROMES.get(syndrome, "unknown")
        extended = self.field("health.synd", "ext_synd")
        return f"health syndrome {syndrome:#x} ({name}), extended {extended:#x}"


def _seconds(value: int) -> float:
    unit, number = value >> 29, value & 0xFFFFF
    return min(_UNITS[unit] * number, _MAX_SECONDS) if unit < len(_UNITS) else 0.0
