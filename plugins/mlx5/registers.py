"""The initialization segment of a ConnectX function: the first 0x2010 bytes of its BAR 0, as declared registers.

Shared with the software model, so it knows nothing of commands, migration or policy, and touches no device.

Every register is a big-endian dword. The fields and reset values here are those of the number that the device means:
what a little-endian access of the region gives is turned over by `swap32` first. The interface is that of
`mlx5_ifc.h` in Linux (`initial_seg`, `health_buffer`).
"""

from typing import Final

from vfu_server.regmap import Access, Array, Block, Field, Register

INIT_SEGMENT_SIZE: Final = 0x2010
"""What drivers map; the region behind it is doorbell pages (UAR)."""
CMD_INTERFACE_REV: Final = 5
"""The only revision of the command interface that drivers know."""
NIC_FULL: Final = 0
NIC_DISABLED: Final = 1
NIC_NO_DRAM: Final = 2
NIC_SW_RESET: Final = 7

FW_REV: Final = 0x0
CMDIF_REV_FW_SUB: Final = 0x4
CMDQ_ADDR_HIGH: Final = 0x10
CMDQ_ADDR_LOW: Final = 0x14
CMD_DOORBELL: Final = 0x18
INITIALIZING: Final = 0x1FC
HEALTH_BUFFER: Final = 0x200
HEALTH_FW_VER: Final = 0x230
HEALTH_RFR: Final = 0x238
HEALTH_SYND: Final = 0x23C
CMD_EXEC_TIMEOUT: Final = 0xFF8
CMD_INIT_TIMEOUT: Final = 0xFFC
INTERNAL_TIMER: Final = 0x1000
HEALTH_COUNTER: Final = 0x1010

SYNDROMES: Final = {
    0x0: "fine",
    0x1: "firmware error",
    0x7: "irisc not responding",
    0x8: "hardware fatal",
    0x9: "firmware CRC",
    0xA: "ICM fetch PCI error",
    0xB: "ICM page error",
    0xC: "asynchronous EQ overrun",
    0xD: "EQ in error",
    0xE: "EQ invalid",
    0xF: "FFSER",
    0x10: "temperature",
    0x12: "ICM poisoned",
    0x13: "trust lockdown",
}
"""Syndromes of the health buffer."""

_NIC = {NIC_FULL: "full", NIC_DISABLED: "disabled", NIC_NO_DRAM: "no DRAM", NIC_SW_RESET: "software reset"}
_TIMEOUT = (Field("unit", 31, 29, {0: "ms", 1: "s", 2: "min", 3: "h"}), Field("value", 19, 0))
_RO, _RW, _WO = Access.RO, Access.RW, Access.WO


def swap32(value: int) -> int:
    """A dword as an access of the region gives or takes it, to or from what the device means by it."""
    return int.from_bytes((value & 0xFFFFFFFF).to_bytes(4, "little"), "big")


INIT_SEGMENT: Final = Block(
    "mlx5.init",
    INIT_SEGMENT_SIZE,
    (
        Register("fw_rev", FW_REV, 4, _RO, fields=(Field("minor", 31, 16), Field("major", 15, 0))),
        Register(
            "cmdif_rev_fw_sub",
            CMDIF_REV_FW_SUB,
            4,
            _RO,
            fields=(Field("cmd_interface_rev", 31, 16), Field("fw_subminor", 15, 0)),
        ),
        Register("cmdq_addr_high", CMDQ_ADDR_HIGH, 4, _RW, doc="command queue address, bits 63:32"),
        Register(
            "cmdq_addr_low",
            CMDQ_ADDR_LOW,
            4,
            _RW,
            fields=(
                Field("cmdq_phy_addr", 31, 12),
                Field("nic_interface", 10, 8, _NIC),
                Field("log_cmdq_size", 7, 4),
                Field("log_cmdq_stride", 3, 0),
            ),
            doc="bits 31:12 of the command queue's address; size and stride are read before it is written",
        ),
        Register("cmd_doorbell", CMD_DOORBELL, 4, _WO, doc="a one for each entry that was posted"),
        Register(
            "initializing",
            INITIALIZING,
            4,
            _RO,
            fields=(
                Field("initializing", 31, 31),
                Field("fw_reset_supported", 30, 30),
                Field("nic_interface_supported", 26, 24),
                Field("embedded_cpu", 23, 23),
            ),
        ),
        Register("health.assert_exit_ptr", 0x220, 4, _RO),
        Register("health.assert_callra", 0x224, 4, _RO),
        Register("health.time", 0x22C, 4, _RO),
        Register("health.fw_ver", HEALTH_FW_VER, 4, _RO, doc="all ones: the function does not answer any more"),
        Register("health.hw_id", 0x234, 4, _RO),
        Register(
            "health.rfr",
            HEALTH_RFR,
            4,
            _RO,
            fields=(
                Field("rfr", 31, 31),
                Field("crr", 30, 30),
                Field("severity_valid", 27, 27),
                Field("severity", 26, 24),
            ),
            doc="rfr: the firmware asks for a reset",
        ),
        Register(
            "health.synd",
            HEALTH_SYND,
            4,
            _RO,
            fields=(Field("irisc_index", 31, 24), Field("synd", 23, 16, SYNDROMES), Field("ext_synd", 15, 0)),
        ),
        Register("no_dram_nic_offset", 0x240, 4, _RO),
        Register("cmd_exec_timeout", CMD_EXEC_TIMEOUT, 4, _RO, fields=_TIMEOUT, doc="valid if cmd_init_timeout is"),
        Register("cmd_init_timeout", CMD_INIT_TIMEOUT, 4, _RO, fields=_TIMEOUT, doc="0: neither time-out is given"),
        Register("internal_timer_high", INTERNAL_TIMER, 4, _RO),
        Register("internal_timer_low", INTERNAL_TIMER + 4, 4, _RO),
        Register(
            "health_counter",
            HEALTH_COUNTER,
            4,
            _RO,
            fields=(Field("health_syndrome", 31, 24, SYNDROMES), Field("health_counter", 23, 0)),
            doc="the counter must advance",
        ),
        Register("real_time_high", 0x1040, 4, _RO),
        Register("real_time_low", 0x1044, 4, _RO),
        Register("internal_timer_1588_high", 0x2000, 4, _RO),
        Register("internal_timer_1588_low", 0x2004, 4, _RO),
        Register("clock_type", 0x2008, 4, _RO),
        Register("clear_int", 0x200C, 4, _WO),
    ),
    (Array("health.assert_var", HEALTH_BUFFER, 4, 6, (Register("value", 0, 4, _RO),)),),
)
