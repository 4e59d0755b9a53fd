"""The initialization segment of one function: what its registers read, what writes do, time and health.

The registers are those of `plugins.mlx5.registers`; it must not know commands.
"""

from collections.abc import Callable

from plugins.mlx5 import registers as reg
from plugins.mlx5.models.options import Options
from plugins.mlx5.models.orders import Orders
from plugins.mlx5.models.queue import LOG_SIZE, LOG_STRIDE, CommandQueue
from plugins.mlx5.models.status import Violations
from vfu_server.model import Bus

BOOT_SECONDS = 0.02
QUEUE_SECONDS = 0.005
"""How long `initializing` stays up after a reset, and after the queue's address was written."""
COUNTER_HERTZ = 1000
IN_SECONDS = 1 << 29
INIT_TIMEOUT = 2000
"""2000 ms, and the unit of seconds, in the registers' form."""
HEALTH_HW_ID = 0x234
HARDWARE_ID = 0x0218
_SEVERITY_VALID = 1 << 27
_RFR = 1 << 31
ONES = 0xFFFFFFFF


class Segment:
    """`ready` says whether the function may be done with initializing; a VF is not before it was enabled.
    `heeds_health`: a health error that is ordered shows here; it is the PF's.

    Writes with ones in reserved bits are counted and do nothing (model).
    """

    def __init__(
        self,
        bus: Callable[[], Bus],
        queue: CommandQueue,
        options: Options,
        orders: Orders,
        violations: Violations,
        *,
        ready: Callable[[], bool],
        restart: Callable[[], None],
        heeds_health: bool = False,
    ) -> None:
        self._bus = bus
        self._queue = queue
        major, minor, sub = options.firmware
        self._constant = {
            reg.FW_REV: minor << 16 | major,
            reg.CMDIF_REV_FW_SUB: reg.CMD_INTERFACE_REV << 16 | sub,
            reg.HEALTH_FW_VER: major << 24 | minor << 12 | sub,
            HEALTH_HW_ID: HARDWARE_ID,
            reg.CMD_EXEC_TIMEOUT: IN_SECONDS | options.command_seconds,
            reg.CMD_INIT_TIMEOUT: INIT_TIMEOUT,
        }
        self._orders = orders
        self._violations = violations
        self._ready = ready
        self._restart = restart
        self._heeds_health = heeds_health
        self._busy_until = 0.0
        self._nic = reg.NIC_FULL
        self._high = 0
        self._shown = 0
        self._syndrome = 0
        self._counter = 0

    def reset(self) -> None:
        """A function reset; it takes BOOT_SECONDS."""
        self._nic = reg.NIC_FULL
        self._high = self._shown = 0
        self._syndrome = 0
        self.be_busy(BOOT_SECONDS)

    def be_busy(self, seconds: float) -> None:
        """`initializing` for so long."""
        self._busy_until = self._bus().now() + seconds

    def fail(self, syndrome: int) -> None:
        """The firmware has met an error that it cannot mend: the health buffer says so."""
        self._syndrome = self._syndrome or syndrome

    @property
    def syndrome(self) -> int:
        """What the health buffer says; 0: all is well."""
        return self._syndrome

    @property
    def is_dead(self) -> bool:
        """No command is taken any more."""
        return bool(self._syndrome) or self._nic != reg.NIC_FULL

    def read(self, offset: int, width: int) -> int:
        """A read anywhere in the segment, of 1 to 8 bytes, as the bus has it (little-endian)."""
        first, last = offset & ~3, (offset + width - 1) & ~3
        data = b"".join(self._dword(at).to_bytes(4, "big") for at in range(first, last + 4, 4))
        return int.from_bytes(data[offset - first : offset - first + width], "little")

    def write(self, offset: int, width: int, value: int) -> None:
        """A write of one or two dwords; others are counted and dropped (model)."""
        if width not in (4, 8) or offset % 4:
            self._violations.note("width", f"a write of {width} bytes at {offset:#x}")
            return
        data = value.to_bytes(width, "little")
        for at in range(0, width, 4):
            self._write_dword(offset + at, int.from_bytes(data[at : at + 4], "big"))

    # inside

    @property
    def _busy(self) -> bool:
        return self._bus().now() < self._busy_until

    def _dword(self, at: int) -> int:
        if self._heeds_health and (ordered := self._orders.health()) is not None:
            self.fail(ordered)
        if self._orders.lasts("firmware-dead"):
            return ONES
        if at in self._constant:
            return self._constant[at]
        match at:
            case reg.CMDQ_ADDR_HIGH:
                return self._high
            case reg.CMDQ_ADDR_LOW:
                return self._shown | self._nic << 8 | LOG_SIZE << 4 | LOG_STRIDE
            case reg.INITIALIZING:
                return int(self._busy or not self._ready()) << 31
            case reg.HEALTH_RFR:
                return _RFR | _SEVERITY_VALID if self._syndrome else 0
            case reg.HEALTH_SYND:
                return self._syndrome << 16
            case reg.HEALTH_COUNTER:
                return self._count()
        return self._time(at)

    def _time(self, at: int) -> int:
        ticks = int(self._bus().now() * 1e6)
        match at:
            case 0x1000 | 0x1040 | 0x2000:
                return ticks >> 32 & ONES
            case 0x1004 | 0x1044 | 0x2004:
                return ticks & ONES
        return 0

    def _count(self) -> int:
        if not self._orders.lasts("health-stuck") and not self._syndrome:
            # never the same twice running, however fast or slow time is
            self._counter = max(self._counter + 1, int(self._bus().now() * COUNTER_HERTZ)) & 0xFFFFFF
        return self._syndrome << 24 | self._counter

    def _write_dword(self, at: int, value: int) -> None:
        match at:
            case reg.CMDQ_ADDR_HIGH:
                self._high = value
            case reg.CMDQ_ADDR_LOW:
                self._write_low(value)
            case reg.CMD_DOORBELL:
                if self._syndrome:
                    return  # firmware that died answers nothing, and no driver could know yet
                if self._busy or not self._ready() or self._nic != reg.NIC_FULL:
                    self._violations.note("doorbell", f"command doorbell {value:#x} of a function that takes none")
                    return
                self._queue.doorbell(value)
            case 0x200C:
                return
            case _:
                self._violations.note("read-only", f"a write of {value:#x} at {at:#x}")

    def _write_low(self, value: int) -> None:
        if value & 0x8FF:
            self._violations.note("reserved", f"queue address {value:#x} with ones in reserved bits")
            return
        nic = value >> 8 & 7
        if nic not in (reg.NIC_FULL, reg.NIC_DISABLED, reg.NIC_NO_DRAM, reg.NIC_SW_RESET):
            self._violations.note("reserved", f"the nic interface cannot be {nic}")
            return
        if nic == reg.NIC_SW_RESET:
            self._restart()
            return
        before, self._nic = self._nic, nic
        if nic != reg.NIC_FULL or (before == nic and self._shown == value & ~0xFFF and self._queue.address is not None):
            return
        self._shown = value & ~0xFFF
        address = self._high << 32 | self._shown
        if not address:
            self._violations.note("queue-address", "the command queue cannot be at 0")
            return
        self._queue.address = address
        self.be_busy(QUEUE_SECONDS)

    def snapshot(self) -> int:
        """The queue's address as it was written, for a saved state."""
        return self._high << 32 | self._shown

    def restore(self, address: int) -> None:
        """A state is loaded: the queue is where the guest's driver has put it."""
        self._high, self._shown = address >> 32, address & 0xFFFFF000
        self._queue.address = address or None
