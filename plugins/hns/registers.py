"""The queue manager ("QM") of HiSilicon's SEC2, HPRE and ZIP as register tables: ids, generations, the VF's, the PF's.

Read by the plugin and by its models, so it knows neither migration nor policy, and touches no device. Source of all
offsets and bits: Linux 7.2.8, drivers/crypto/hisilicon (qm.c, qm_common.h, zip, sec2, hpre) and
drivers/vfio/pci/hisilicon.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vfu_server.regmap import Access, Block, Field, Register, Save

VENDOR: Final = 0x19E5

REVISION_V1: Final = 0x20
REVISION_V2: Final = 0x21
"""Kunpeng 920."""
REVISION_V3: Final = 0x30
"""Kunpeng 930: the first generation that can be migrated. Register `sub_version`, when not zero, overrides it."""
REVISION_V4: Final = 0x50
REVISION_V5: Final = 0x51
GENERATIONS: Final[Mapping[int, str]] = {
    REVISION_V1: "V1",
    REVISION_V2: "V2 (Kunpeng 920)",
    REVISION_V3: "V3 (Kunpeng 930)",
    REVISION_V4: "V4",
    REVISION_V5: "V5",
}
"""By PCI revision."""

QM_REGION: Final = 2
"""The BAR with the queue manager's registers, of a VF and of the PF."""
DOORBELL_REGION: Final = 4
"""The BAR with a doorbell page for each queue, of devices with doorbell isolation (`queue_isolation` bit 0)."""

VF_SIZE: Final = 0x10000
"""Bytes of a VF's BAR2."""
HALF: Final = VF_SIZE // 2
"""Up to here a VF's BAR2 is the guest's, from here on it is for migration (mode VF_CTRL)."""
PF_SIZE: Final = 0x400000
"""Bytes of the PF's BAR2: the next power of two above the core's registers."""
DOORBELL_PAGE: Final = 0x10000
"""Bytes of BAR4 for each queue; its SQ/CQ doorbell is at `DOORBELL_SQ_CQ` of it."""
DOORBELL_SQ_CQ: Final = 0x1000

PF_WINDOWS: Final = 0x180000
PF_WINDOW_STRIDE: Final = 0x2000
"""PF_CTRL mode: the migration window of function n (VF index + 1) is at PF BAR2 + PF_WINDOWS + n * PF_WINDOW_STRIDE."""
WINDOW_EQC: Final = 0x1C00
WINDOW_AEQC: Final = 0x1C20
"""Where EQC and AEQC words are in such a window; in a VF's own BAR2 they are at EQC and AEQC."""

MAILBOX: Final = 0x300
MAILBOX_SIZE: Final = 16
EQC: Final = 0x8000
AEQC: Final = 0x8020
CONTEXT_WORDS: Final = 7
"""Words of EQC, and of AEQC."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the accelerators. `core_status`: its core's error status in the PF's BAR2, 0 while there is no error."""

    name: str
    pf_id: int
    vf_id: int
    core_status: int
    core: tuple[Register, ...]
    """The core's error registers, in the PF's BAR2."""
    nfe_mask: int
    reset_mask: int
    """V3 values of `cap_nfe_mask` and `cap_reset_mask`."""


_PHASE_WORD = (Field("depth_less_1", 15, 0), Field("phase", 16, 16))
_RING_WORD = (Field("head", 15, 0), Field("tail", 31, 16))
_MASKED = Field("masked", 0, 0, {0: "enabled", 1: "masked"})
_MESSAGE = Field("message", 0, 0)
_DOORBELL = (
    Field("queue", 11, 0),
    Field("cmd", 15, 12, {0: "SQ", 1: "CQ", 2: "EQ", 3: "AEQ"}),
    Field("random", 31, 16),
    Field("index", 47, 32),
    Field("priority", 63, 48),
)


def _context(name: str, start: int, order: int) -> tuple[Register, ...]:
    """The seven words of EQC or AEQC, saved."""
    told = (
        (_RING_WORD, "head and tail"),
        ((), "IOVA of the ring, low half"),
        ((), "IOVA of the ring, high half"),
        ((), "saved and restored as it is"),
        ((), "reserved; saved and restored as it is"),
        ((), "reserved; saved and restored as it is"),
        (_PHASE_WORD, "depth and phase"),
    )
    return tuple(
        Register(f"{name}{i}", start + 4 * i, 4, Access.RW, Save.SAVE, 0, fields, order + i, f"{name.upper()} {doc}")
        for i, (fields, doc) in enumerate(told)
    )


def _word(name: str, offset: int, access: Access, doc: str, reset: int | None = None) -> Register:
    return Register(name, offset, 4, access, reset=reset, doc=doc)


def _saved(order: int, name: str, offset: int, field: Field, doc: str, access: Access = Access.RW) -> Register:
    """A word of one field that travels; `order` is its turn when it is restored."""
    return Register(name, offset, 4, access, Save.SAVE, fields=(field,), order=order, doc=doc)


FUNCTION_REGISTERS: Final = (
    _word("aeq_int_source", 0x00, Access.RW, "AEQ interrupt source"),
    _saved(1, "aeq_int_mask", 0x04, _MASKED, "AEQ interrupt mask"),
    _word("eq_int_source", 0x08, Access.RW, "EQ interrupt source"),
    _saved(2, "eq_int_mask", 0x0C, _MASKED, "EQ interrupt mask"),
    _saved(
        3, "ifc_int_source", 0x20, _MESSAGE, "writing bit 0 clears it: the PF's message is acknowledged", Access.W1C
    ),
    _saved(4, "ifc_int_mask", 0x24, _MASKED, "mask of messages between PF and VF"),
    Register("ifc_int_status", 0x28, 4, Access.RO, fields=(_MESSAGE,), doc="a message from the PF waits"),
    _saved(5, "ifc_int_set", 0x2C, _MESSAGE, "writing bit 0 interrupts the PF; hardware drops it at its answer"),
    _saved(6, "queue_isolation", 0x30, Field("doorbell", 0, 0), "bit 0: a doorbell page for each queue in BAR4"),
    _saved(
        7,
        "page_size",
        0x34,
        Field("size", 1, 0, {0: "4K", 1: "16K", 2: "64K"}),
        "page size of the guest's SVA prefetch",
    ),
    Register("doorbell_drop", 0x38, 4, Access.RW, fields=(Field("drop", 0, 0),), doc="V5: doorbells are dropped"),
    _saved(
        0,
        "vf_state",
        0x60,
        Field("state", 0, 0, {0: "ready", 1: "not ready"}),
        "whether the guest's driver is loaded: written by it on start and stop, and by a restore",
    ),
    Register("write_back_start", 0x204, 4, Access.RW, doc="writing 1 starts the write-back of queue contexts"),
    Register("write_back_done", 0x208, 4, Access.RO, fields=(Field("done", 0, 0),), doc="the write-back is done"),
    Register("sub_version", 0x210, 4, Access.RO, doc="when not 0: the version instead of the PCI revision's"),
    Register(
        "mailbox0",
        MAILBOX,
        4,
        Access.RW,
        fields=(
            Field("command", 7, 0),
            Field("event", 8, 8),
            Field("status", 12, 9),
            Field("busy", 13, 13),
            Field("op", 14, 14, {0: "set", 1: "get"}),
            Field("queue", 31, 16),
        ),
        doc="mailbox: command and queue; the four words are written by one store of 16 bytes",
    ),
    Register("mailbox1", MAILBOX + 4, 4, Access.RW, doc="mailbox: address or answer, low half"),
    Register("mailbox2", MAILBOX + 8, 4, Access.RW, doc="mailbox: address or answer, high half"),
    Register("mailbox3", MAILBOX + 12, 4, Access.RW, doc="mailbox: reserved"),
    Register("message_write", 0x320, 8, Access.RW, doc="V4 and later: message to the PF"),
    Register("message_read", 0x380, 8, Access.RO, doc="V4 and later: message from the PF"),
    Register("doorbell_sq_cq", DOORBELL_SQ_CQ, 8, Access.WO, fields=_DOORBELL, doc="SQ and CQ doorbell"),
    Register("doorbell_eq_aeq", 0x2000, 8, Access.WO, fields=_DOORBELL, doc="EQ and AEQ doorbell"),
    Register(
        "cap_valid",
        0x3100,
        4,
        Access.RO,
        reset=0x6F01,
        fields=(
            Field("version", 7, 0),
            Field("qos", 8, 8),
            Field("stop_queue", 9, 9),
            Field("stop_function", 10, 10),
            Field("messages", 11, 11),
            Field("vf_runtime_pm", 12, 12),
            Field("pf_runtime_pm", 13, 13),
            Field("sva_prefetch", 14, 14),
            Field("dae", 15, 15),
        ),
        doc="capability words: these are valid if the version is not 0",
    ),
    Register(
        "cap_eq_depth",
        0x3104,
        4,
        Access.RO,
        reset=0x0400_0800,
        fields=(Field("eq", 15, 0), Field("aeq", 31, 16)),
        doc="depths of AEQ and EQ",
    ),
    Register(
        "cap_queue_depth",
        0x3108,
        4,
        Access.RO,
        reset=0x0400_0400,
        fields=(Field("sq", 15, 0), Field("cq", 31, 16)),
        doc="depths of CQ and SQ",
    ),
    _word("cap_eq_vector", 0x310C, Access.RO, "EQ interrupt: type (0: absent), vector", 0x10000),
    _word("cap_aeq_vector", 0x3110, Access.RO, "AEQ interrupt: type (0: absent), vector", 0x10001),
    _word("cap_abnormal_vector", 0x3114, Access.RO, "abnormal interrupt: type (0: absent), vector", 0x10003),
    _word("cap_message_vector", 0x3118, Access.RO, "message interrupt: type (0: absent), vector", 0x10002),
    _word("cap_vectors", 0x311C, Access.RO, "vectors of the PF (high half) and of a VF", 0x40003),
    _word("cap_reserved_vectors", 0x3120, Access.RO, "capability word", 0x14),
)
"""What VF and PF have at the same offsets of their BAR2: the functional half. Resets: V3 values of capability words."""

FUNCTION: Final = Block("hns.function", HALF, FUNCTION_REGISTERS)
"""The first half of a VF's BAR2, the one that is the guest's."""

MIGRATION_REGISTERS: Final = (*_context("eqc", EQC, 20), *_context("aeqc", AEQC, 30))

VF: Final = Block("hns.vf", VF_SIZE, (*FUNCTION_REGISTERS, *MIGRATION_REGISTERS))
"""A VF's whole BAR2, with the half that the guest never sees (mode VF_CTRL)."""

PF_REGISTERS: Final = (
    Register("qm_error_source", 0x100000, 4, Access.W1C, doc="QM errors: source"),
    Register("qm_error_mask", 0x100004, 4, Access.RW, doc="QM errors: mask, 1 = off"),
    Register("qm_error_status", 0x100008, 4, Access.RO, reset=0, doc="QM errors: status; 0 or nothing is saved"),
    Register("qm_error_set", 0x10000C, 4, Access.WO, doc="QM errors: injection"),
    _word("qm_fifo_detail", 0x100010, Access.RO, "details of a FIFO overflow"),
    _word("qm_timeout_detail", 0x100014, Access.RO, "details of a doorbell timeout"),
    _word("qm_axi_detail", 0x100018, Access.RO, "details of an AXI read error; bit 22: poison"),
    _word("memory_init_start", 0x100040, Access.RW, "memory initialisation: start"),
    _word("memory_init_done", 0x100044, Access.RO, "memory initialisation: done"),
    _word("vft_start", 0x100054, Access.WO, "VFT: writing 1 starts the operation"),
    _word("vft_op", 0x100058, Access.RW, "VFT: 1 = read, 0 = write"),
    Register(
        "vft_type",
        0x10005C,
        4,
        Access.RW,
        fields=(Field("type", 1, 0, {0: "SQC", 1: "CQC", 2: "shaper"}),),
        doc="VFT: which table",
    ),
    _word("vft_function", 0x100060, Access.RW, "VFT: which function, 0 = PF"),
    _word("vft_data_low", 0x100064, Access.RW, "VFT: the entry, low half"),
    _word("vft_data_high", 0x100068, Access.RW, "VFT: the entry, high half"),
    Register("vft_ready", 0x10006C, 4, Access.RW, fields=(Field("ready", 0, 0),), doc="VFT: the operation is done"),
    _word("qm_ce_enable", 0x1000EC, Access.RW, "corrected errors: enable"),
    _word("qm_fe_enable", 0x1000F0, Access.RW, "fatal errors: enable"),
    _word("qm_nfe_enable", 0x1000F4, Access.RW, "not fatal errors: enable"),
    _word("qm_ce_threshold", 0x1000F8, Access.RW, "corrected errors: threshold"),
    Register("pf_message_done", 0x100128, 8, Access.RO, doc="a bit for each VF that has not acknowledged yet"),
    _word("pf_message_send", 0x100130, Access.RW, "bit 0 sends the message to the VF that pf_message_target names"),
    Register("pf_message_target", 0x100134, 4, Access.RW, fields=(Field("vf", 6, 0),), doc="VF, or 0x7f for all"),
    Register("pf_message_source", 0x100138, 8, Access.W1C, doc="a bit for each VF whose message waits"),
    Register(
        "cap_queues",
        0x100158,
        4,
        Access.RO,
        fields=(Field("all", 10, 0), Field("most", 21, 11)),
        doc="queues of the device, most queues of one function",
    ),
    Register(
        "migration_region",
        0x100198,
        4,
        Access.RW,
        fields=(Field("pf_ctrl", 0, 0),),
        doc="V4 and later: migration windows are in the PF's BAR2 (mode PF_CTRL)",
    ),
    Register("pf_doorbell_drop", 0x100250, 8, Access.RW, doc="V5: doorbells of all functions are dropped"),
    _word("master_stop_mask", 0x1040F8, Access.RW, "errors that stop the bus master"),
    _word("master_stop", 0x300000, Access.RW, "writing 1 stops the bus master"),
    Register("master_state", 0x300150, 4, Access.RO, doc="3: the bus master has stopped"),
)
"""What the PF alone has in its BAR2."""

PF_CAPABILITIES: Final = (
    _word("cap_nfe_mask", 0x3124, Access.RO, "which QM errors are not fatal"),
    _word("cap_reset_mask", 0x3128, Access.RO, "which QM errors reset the device and stop its bus master"),
    _word("cap_ce_mask", 0x312C, Access.RO, "which QM errors are corrected", 8),
)

ZIP: Final = Kind(
    "zip",
    0xA250,
    0xA251,
    0x3010AC,
    (
        _word("core_source", 0x3010A0, Access.W1C, "ZIP core errors: source"),
        _word("core_mask", 0x3010A4, Access.RW, "ZIP core errors: mask, 1 = off"),
        _word("core_set", 0x3010A8, Access.WO, "ZIP core errors: injection"),
        _word("core_status", 0x3010AC, Access.RO, "ZIP core errors: status", 0),
        _word("core_ce", 0x301160, Access.RW, "ZIP core errors: which are corrected"),
        _word("core_nfe", 0x301164, Access.RW, "ZIP core errors: which are not fatal"),
        _word("core_fe", 0x301168, Access.RW, "ZIP core errors: which are fatal"),
        _word("cap_core_nfe", 0x3130, Access.RO, "which ZIP core errors are not fatal", 0x1FFE),
        _word("cap_core_reset", 0x3134, Access.RO, "which ZIP core errors reset the device", 0x7FE),
        _word("cap_core_ce", 0x3138, Access.RO, "which ZIP core errors are corrected", 1),
    ),
    0x7C77,
    0x6C77,
)
SEC: Final = Kind(
    "sec",
    0xA255,
    0xA256,
    0x301008,
    (
        _word("core_mask", 0x301000, Access.RW, "SEC2 core errors: mask, 1 = on"),
        _word("core_status", 0x301008, Access.RO, "SEC2 core errors: status", 0),
        _word("core_source", 0x301010, Access.W1C, "SEC2 core errors: source"),
        _word("core_ce", 0x301050, Access.RW, "SEC2 core errors: which are corrected"),
        _word("core_fe", 0x301054, Access.RW, "SEC2 core errors: which are fatal"),
        _word("core_nfe", 0x301058, Access.RW, "SEC2 core errors: which are not fatal"),
    ),
    0x7C77,
    0x6C77,
)
HPRE: Final = Kind(
    "hpre",
    0xA258,
    0xA259,
    0x301800,
    (
        _word("core_mask", 0x301400, Access.RW, "HPRE core errors: mask, 1 = off"),
        _word("core_ce", 0x301410, Access.RW, "HPRE core errors: which are corrected"),
        _word("core_nfe", 0x301414, Access.RW, "HPRE core errors: which are not fatal"),
        _word("core_fe", 0x301418, Access.RW, "HPRE core errors: which are fatal"),
        _word("core_set", 0x301500, Access.WO, "HPRE core errors: injection"),
        _word("core_source", 0x301600, Access.W1C, "HPRE core errors: source"),
        _word("core_status", 0x301800, Access.RO, "HPRE core errors: status", 0),
    ),
    0x7C37,
    0x6C37,
)
KINDS: Final = (ZIP, SEC, HPRE)
"""`sec` is SEC2."""
KIND_OF_VF: Final[Mapping[int, Kind]] = {kind.vf_id: kind for kind in KINDS}
KIND_OF_PF: Final[Mapping[int, Kind]] = {kind.pf_id: kind for kind in KINDS}


def pf_block(kind: Kind) -> Block:
    """The PF's whole BAR2: the functional registers, those of the PF alone, and its core's error registers."""
    return Block(f"hns.pf.{kind.name}", PF_SIZE, (*FUNCTION_REGISTERS, *PF_CAPABILITIES, *PF_REGISTERS, *kind.core))


PF_BLOCKS: Final[Mapping[str, Block]] = {kind.name: pf_block(kind) for kind in KINDS}
"""By the kind's name."""
