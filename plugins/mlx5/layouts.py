"""Every command's layout and opcode, in one place.

Facts only: it sends nothing and knows no order. Source: the interface header of Linux (`mlx5_ifc.h`); places are
`bits(name, byte, high, low)` of big-endian dwords. What a context holds is in `contexts`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from plugins.mlx5 import contexts
from plugins.mlx5.bits import Bits, Layout, bits, flag, whole

HEAD: Final = 0x10
"""Bytes of the smallest message, either way."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its opcode and what goes in and comes out. `tail`: a list may follow the fixed part."""

    name: str
    opcode: int
    input: Layout
    output: Layout

    def encode(self, op_mod: int = 0, tail: bytes = b"", **values: int) -> bytes:
        """The message: fields not named are zero, `tail` follows the fixed part."""
        return bytes(self.input.encode({"opcode": self.opcode, "op_mod": op_mod, **values})) + tail


def _command(
    name: str,
    opcode: int,
    fields: Iterable[Bits] = (),
    results: Iterable[Bits] = (),
    *,
    size: int = HEAD,
    reply: int = HEAD,
) -> Command:
    head = (bits("opcode", 0, 31, 16), bits("uid", 0, 15, 0), bits("op_mod", 4, 15, 0))
    answer = (bits("status", 0, 31, 24), bits("syndrome", 4))
    return Command(
        name, opcode, Layout(f"{name} in", size, (*head, *fields)), Layout(f"{name} out", reply, (*answer, *results))
    )


def _named(name: str) -> tuple[Bits, ...]:
    return (bits(name, 8, 23, 0),)


_FUNCTION: Final = (flag("embedded_cpu_function", 8, 31), bits("function_id", 8, 15, 0))
_OTHER: Final = (
    flag("other_function", 8, 31),
    flag("ec_vf_function", 8, 30),
    flag("function_id_type", 8, 28),
    bits("function_id", 8, 15, 0),
)
_VHCA: Final = (bits("vhca_id", 8, 15, 0),)
_VPORT: Final = (flag("other_vport", 8, 31), bits("vport_number", 8, 15, 0))
_TABLE: Final = (bits("table_type", 0x10, 31, 24), bits("table_id", 0x14, 23, 0))

# boot, pages, capabilities
QUERY_HCA_CAP: Final = _command("QUERY_HCA_CAP", 0x100, _OTHER, reply=HEAD + contexts.CAP_SIZE)
SET_HCA_CAP: Final = _command("SET_HCA_CAP", 0x109, _OTHER)
"""The capability block follows as its tail."""
QUERY_ADAPTER: Final = _command(
    "QUERY_ADAPTER",
    0x101,
    (),
    (bits("ieee_vendor_id", 0x28, 23, 0), bits("vsd_vendor_id", 0x2C, 15, 0), whole("psid", 0x100, 16)),
    reply=0x110,
)
INIT_HCA: Final = _command(
    "INIT_HCA", 0x102, (bits("sw_vhca_id", 0xC, 29, 16), whole("sw_owner_id", 0x10, 16)), size=0x20
)
TEARDOWN_HCA: Final = _command("TEARDOWN_HCA", 0x103, (bits("profile", 8, 15, 0),), (flag("failed", 0xC, 0),))
ENABLE_HCA: Final = _command("ENABLE_HCA", 0x104, (*_FUNCTION, flag("function_id_type", 8, 28)))
DISABLE_HCA: Final = _command("DISABLE_HCA", 0x105, (*_FUNCTION, flag("function_id_type", 8, 28)))
QUERY_PAGES: Final = _command("QUERY_PAGES", 0x107, _FUNCTION, (*_FUNCTION, bits("num_pages", 0xC)))
MANAGE_PAGES: Final = _command("MANAGE_PAGES", 0x108, (*_FUNCTION, bits("count", 0xC)), (bits("count", 8),))
QUERY_ISSI: Final = _command(
    "QUERY_ISSI", 0x10A, (), (bits("current_issi", 8, 15, 0), bits("supported", 0x6C)), reply=0x70
)
SET_ISSI: Final = _command("SET_ISSI", 0x10B, (bits("current_issi", 8, 15, 0),))
ACCESS_REG: Final = _command("ACCESS_REG", 0x805, (bits("register_id", 8, 15, 0), bits("argument", 0xC)))

# migration
SUSPEND_VHCA: Final = _command("SUSPEND_VHCA", 0x115, _VHCA)
RESUME_VHCA: Final = _command("RESUME_VHCA", 0x116, _VHCA)
QUERY_VHCA_MIGRATION_STATE: Final = _command(
    "QUERY_VHCA_MIGRATION_STATE",
    0x117,
    (flag("incremental", 8, 31), flag("chunk", 8, 30), *_VHCA),
    (bits("migration_state", 0xC, 31, 28), bits("required_umem_size", 0x10), whole("remaining_total_size", 0x18)),
    reply=0x40,
)
_UMEM: Final = (whole("va", 0x10), bits("mkey", 0x18), bits("size", 0x1C))
SAVE_VHCA_STATE: Final = _command(
    "SAVE_VHCA_STATE",
    0x118,
    (flag("incremental", 8, 31), flag("set_track", 8, 30), *_VHCA, *_UMEM),
    (bits("actual_image_size", 8), bits("next_required_umem_size", 0xC)),
    size=0x20,
)
LOAD_VHCA_STATE: Final = _command("LOAD_VHCA_STATE", 0x119, (*_VHCA, *_UMEM), size=0x20)

# resources
ALLOC_PD: Final = _command("ALLOC_PD", 0x800, (), _named("pd"))
DEALLOC_PD: Final = _command("DEALLOC_PD", 0x801, _named("pd"))
ALLOC_UAR: Final = _command("ALLOC_UAR", 0x802, (), _named("uar"))
DEALLOC_UAR: Final = _command("DEALLOC_UAR", 0x803, _named("uar"))
CREATE_MKEY: Final = _command(
    "CREATE_MKEY",
    0x200,
    (
        flag("pg_access", 0xC, 31),
        flag("mkey_umem_valid", 0xC, 30),
        *contexts.MKC.at(0x10),
        bits("translations_octword_actual_size", 0x60),
    ),
    _named("mkey_index"),
    size=0x110,
)
DESTROY_MKEY: Final = _command("DESTROY_MKEY", 0x202, _named("mkey_index"))
CREATE_EQ: Final = _command(
    "CREATE_EQ",
    0x301,
    (*contexts.EQC.at(0x10), *(whole(f"event_bitmask_{word}", 0x58 + 8 * word) for word in range(4))),
    (bits("eqn", 8, 7, 0),),
    size=0x110,
)
DESTROY_EQ: Final = _command("DESTROY_EQ", 0x302, (bits("eqn", 8, 7, 0),))
CREATE_CQ: Final = _command("CREATE_CQ", 0x400, contexts.CQC.at(0x10), _named("cqn"), size=0x110)
DESTROY_CQ: Final = _command("DESTROY_CQ", 0x401, _named("cqn"))
CREATE_QP: Final = _command("CREATE_QP", 0x500, contexts.QPC.at(0x18), _named("qpn"), size=0x110)
DESTROY_QP: Final = _command("DESTROY_QP", 0x501, _named("qpn"))
_MODIFY_QP: Final = (*_named("qpn"), bits("opt_param_mask", 0x10), *contexts.QPC.at(0x18))
RST2INIT_QP: Final = _command("RST2INIT_QP", 0x502, _MODIFY_QP, size=0x110)
INIT2RTR_QP: Final = _command("INIT2RTR_QP", 0x503, _MODIFY_QP, size=0x110)
RTR2RTS_QP: Final = _command("RTR2RTS_QP", 0x504, _MODIFY_QP, size=0x110)

# general objects: what the others have as op_mod is their type
_OBJECT: Final = (bits("vhca_tunnel_id", 4, 31, 16), bits("obj_id", 8), bits("op_param", 0xC))
_TRACK: Final = tuple(contexts.PAGE_TRACK.at(0x10))
CREATE_OBJECT: Final = _command("CREATE_GENERAL_OBJECT", 0xA00, (*_OBJECT, *_TRACK), (bits("obj_id", 8),), size=0x40)
MODIFY_OBJECT: Final = _command("MODIFY_GENERAL_OBJECT", 0xA01, (*_OBJECT, *_TRACK), (bits("obj_id", 8),), size=0x40)
QUERY_OBJECT: Final = _command("QUERY_GENERAL_OBJECT", 0xA02, _OBJECT, (bits("obj_id", 8), *_TRACK), reply=0x40)
DESTROY_OBJECT: Final = _command("DESTROY_GENERAL_OBJECT", 0xA03, _OBJECT, (bits("obj_id", 8),))

# e-switch and vports
QUERY_VPORT_STATE: Final = _command(
    "QUERY_VPORT_STATE",
    0x750,
    _VPORT,
    (bits("max_tx_speed", 0xC, 31, 16), bits("admin_state", 0xC, 7, 4), bits("state", 0xC, 3, 0)),
)
MODIFY_VPORT_STATE: Final = _command(
    "MODIFY_VPORT_STATE", 0x751, (*_VPORT, bits("max_tx_speed", 0xC, 31, 16), bits("admin_state", 0xC, 7, 4))
)
MODIFY_ESW_VPORT_CONTEXT: Final = _command(
    "MODIFY_ESW_VPORT_CONTEXT",
    0x753,
    (*_VPORT, flag("select_vport_cvlan_insert", 0xC, 3), flag("select_vport_cvlan_strip", 0xC, 1)),
    size=0x110,
)
QUERY_NIC_VPORT_CONTEXT: Final = _command(
    "QUERY_NIC_VPORT_CONTEXT",
    0x754,
    (*_VPORT, bits("allowed_list_type", 0xC, 26, 24)),
    (
        bits("promisc", 0x100, 31, 29),
        bits("allowed_list_size", 0x100, 15, 0),
        whole("permanent_address", 0x106, 6),
    ),
    reply=0x110,
)
MODIFY_NIC_VPORT_CONTEXT: Final = _command(
    "MODIFY_NIC_VPORT_CONTEXT",
    0x755,
    (
        *_VPORT,
        flag("select_change_event", 0xC, 5),
        flag("arm_change_event", 0x104, 31),
        flag("event_on_promisc_change", 0x104, 3),
        flag("event_on_mc_change", 0x104, 1),
        flag("event_on_uc_change", 0x104, 0),
    ),
    size=0x200,
)
SET_L2_TABLE_ENTRY: Final = _command(
    "SET_L2_TABLE_ENTRY", 0x829, (bits("table_index", 0x14, 23, 0), whole("mac", 0x22, 6)), size=0x40
)
DELETE_L2_TABLE_ENTRY: Final = _command("DELETE_L2_TABLE_ENTRY", 0x82B, (bits("table_index", 0x14, 23, 0),), size=0x40)
SET_FLOW_TABLE_ROOT: Final = _command("SET_FLOW_TABLE_ROOT", 0x92F, (*_VPORT, *_TABLE), size=0x40)
CREATE_FLOW_TABLE: Final = _command(
    "CREATE_FLOW_TABLE",
    0x930,
    (
        *_VPORT,
        bits("table_type", 0x10, 31, 24),
        bits("miss_action", 0x18, 27, 24),
        bits("level", 0x18, 23, 16),
        bits("log_size", 0x18, 7, 0),
    ),
    _named("table_id"),
    size=0x40,
)
DESTROY_FLOW_TABLE: Final = _command("DESTROY_FLOW_TABLE", 0x931, (*_VPORT, *_TABLE), size=0x40)
CREATE_FLOW_GROUP: Final = _command(
    "CREATE_FLOW_GROUP",
    0x933,
    (
        *(*_VPORT, *_TABLE),
        bits("start_flow_index", 0x1C),
        bits("end_flow_index", 0x24),
        bits("match_criteria_enable", 0x3C, 7, 0),
        *contexts.FTE_MATCH.at(0x40),
    ),
    _named("group_id"),
    size=0x400,
)
DESTROY_FLOW_GROUP: Final = _command("DESTROY_FLOW_GROUP", 0x934, (*_VPORT, *_TABLE, bits("group_id", 0x18)), size=0x40)
SET_FLOW_TABLE_ENTRY: Final = _command(
    "SET_FLOW_TABLE_ENTRY",
    0x936,
    (
        *(*_VPORT, *_TABLE),
        bits("modify_enable_mask", 0x18, 7, 0),
        bits("flow_index", 0x20),
        bits("group_id", 0x44),
        bits("action", 0x4C, 15, 0),
        bits("destination_list_size", 0x50, 23, 0),
        *contexts.FTE_MATCH.at(0x80),
    ),
    size=0x340,
)
DELETE_FLOW_TABLE_ENTRY: Final = _command(
    "DELETE_FLOW_TABLE_ENTRY", 0x938, (*_VPORT, *_TABLE, bits("flow_index", 0x20)), size=0x40
)

COMMANDS: Final = {one.opcode: one for one in list(globals().values()) if isinstance(one, Command)}
"""By opcode, for tests and for people."""
