"""Layouts that are parts of commands or lie in memory: contexts, capability blocks, events, completions.

Facts only, as in `layouts`; places are within the context.
"""

from typing import Final

from plugins.mlx5.bits import Layout, bits, flag, whole

CAP_SIZE: Final = 0x1000

# Types of capability blocks; a query's op_mod is type * 2 + mode.
CAP_GENERAL: Final = 0
CAP_FLOW_TABLE: Final = 7
CAP_ESWITCH_FLOW_TABLE: Final = 8
CAP_ESWITCH: Final = 9
CAP_GENERAL_2: Final = 0x20
CAP_ADV_VIRTUALIZATION: Final = 0x26
CAP_ROCE: Final = 4
MODE_MAX: Final = 0
MODE_CURRENT: Final = 1

GENERAL: Final = Layout(
    "GENERAL capabilities",
    CAP_SIZE,
    (
        flag("page_request_disable", 0x0, 25),
        flag("vhca_resource_manager", 0x0, 0),
        flag("hca_cap_2", 0x4, 31),
        bits("vhca_id", 0x4, 15, 0),
        flag("force_teardown", 0x20, 15),
        flag("fast_teardown", 0x1C, 4),
        flag("release_all_pages", 0x28, 26),
        flag("vport_group_manager", 0x34, 31),
        flag("eswitch_manager", 0x34, 24),
        flag("disable_link_up", 0x34, 11),
        bits("log_max_msg", 0x38, 28, 24),
        bits("cqe_version", 0x3C, 3, 0),
        bits("cmdif_checksum", 0x40, 15, 14),
        flag("uar_4k", 0x48, 31),
        flag("mkey_by_name", 0x4C, 25),
        whole("general_obj_types", 0x80),
        bits("sq_ts_format", 0x88, 31, 30),
        bits("log_max_l2_table", 0x90, 28, 24),
        bits("log_uar_page_sz", 0x90, 15, 0),
        flag("adv_virtualization", 0xAC, 6),
        flag("sw_owner_id", 0xC0, 1),
        flag("migration", 0xD0, 18),
    ),
)

GENERAL_2: Final = Layout(
    "GENERAL_2 capabilities",
    CAP_SIZE,
    (
        flag("migratable", 0x10, 31),
        flag("migration_multi_load", 0x18, 23),
        flag("migration_tracking_state", 0x18, 22),
        flag("migration_in_chunks", 0x18, 15),
        flag("migration_state", 0x18, 6),
        whole("general_obj_types_127_64", 0x38),
    ),
)

ADV_VIRTUALIZATION: Final = Layout(
    "ADV_VIRTUALIZATION capabilities",
    CAP_SIZE,
    (
        bits("log_max_num", 0x0, 28, 24),
        bits("max_num_range", 0x0, 23, 16),
        bits("log_min_addr_space", 0x0, 15, 8),
        bits("log_max_addr_space", 0x0, 7, 0),
        bits("log_min_msg_size", 0x4, 28, 24),
        bits("log_max_msg_size", 0x4, 20, 16),
        bits("log_min_page_size", 0x4, 12, 8),
        bits("log_max_page_size", 0x4, 4, 0),
    ),
)

ESWITCH_FLOW_TABLE: Final = Layout(
    "ESWITCH_FLOW_TABLE capabilities",
    CAP_SIZE,
    (
        flag("ft_support", 0x40, 31),
        bits("log_max_ft_size", 0x44, 29, 24),
        bits("max_ft_level", 0x44, 7, 0),
    ),
)
FLOW_TABLE: Final = Layout("FLOW_TABLE capabilities", CAP_SIZE, (flag("modify_root", 0x40, 27),))
ESWITCH: Final = Layout(
    "ESWITCH capabilities", CAP_SIZE, (flag("vport_cvlan_strip", 0, 30), flag("vport_cvlan_insert", 0, 28))
)
ROCE: Final = Layout("ROCE capabilities", CAP_SIZE, (bits("qp_ts_format", 0, 1, 0),))

MKC: Final = Layout(
    "mkey context",
    0x40,
    (
        flag("free", 0x0, 30),
        bits("access_mode_4_2", 0x0, 28, 26),
        flag("a", 0x0, 14),
        flag("rw", 0x0, 13),
        flag("rr", 0x0, 12),
        flag("lw", 0x0, 11),
        flag("lr", 0x0, 10),
        bits("access_mode_1_0", 0x0, 9, 8),
        bits("qpn", 0x4, 31, 8),
        bits("mkey_7_0", 0x4, 7, 0),
        flag("length64", 0xC, 31),
        bits("pd", 0xC, 23, 0),
        whole("start_addr", 0x10),
        whole("len", 0x18),
        bits("bsf_octword_size", 0x20),
        bits("translations_octword_size", 0x34),
        bits("log_page_size", 0x38, 5, 0),
    ),
)

EQC: Final = Layout(
    "EQ context",
    0x40,
    (
        bits("status", 0x0, 31, 28),
        bits("st", 0x0, 11, 8),
        bits("log_eq_size", 0xC, 28, 24),
        bits("uar_page", 0xC, 23, 0),
        bits("intr", 0x14, 11, 0),
        bits("log_page_size", 0x18, 28, 24),
    ),
)

EQE: Final = Layout(
    "event",
    0x40,
    (
        bits("type", 0x0, 23, 16),
        bits("sub_type", 0x0, 7, 0),
        # PAGE_REQUEST
        flag("ec_function", 0x20, 31),
        flag("release_all", 0x20, 30),
        bits("func_id", 0x20, 15, 0),
        bits("num_pages", 0x24),
        bits("signature", 0x3C, 15, 8),
        flag("owner", 0x3C, 0),
    ),
)
EQE_OBJECT: Final = Layout("object change event", 0x40, (bits("obj_type", 0x20, 15, 0), bits("obj_id", 0x24)))
EQE_QP: Final = Layout("queue pair event", 0x40, (bits("queue_type", 0x34, 31, 24), bits("qpn", 0x38, 23, 0)))
EQE_CQ: Final = Layout("completion queue event", 0x40, (bits("cqn", 0x20, 23, 0), bits("error", 0x28, 7, 0)))
EQE_VPORT: Final = Layout("vport change event", 0x40, (bits("vport", 0x20, 15, 0),))

CQC: Final = Layout(
    "CQ context",
    0x40,
    (
        bits("cqe_sz", 0x0, 23, 21),
        bits("log_cq_size", 0xC, 28, 24),
        bits("uar_page", 0xC, 23, 0),
        bits("c_eqn", 0x14),
        bits("log_page_size", 0x18, 28, 24),
        whole("dbr_addr", 0x38),
    ),
)

CQE: Final = Layout(
    "completion",
    0x40,
    (
        bits("immediate", 0x24),
        bits("byte_cnt", 0x2C),
        bits("wqe_counter", 0x3C, 31, 16),
        bits("opcode", 0x3C, 7, 4),
        flag("owner", 0x3C, 0),
    ),
)

QPC: Final = Layout(
    "QP context",
    0xE8,
    (
        bits("st", 0x0, 23, 16),
        bits("pm_state", 0x0, 12, 11),
        bits("pd", 0x4, 23, 0),
        bits("mtu", 0x8, 31, 29),
        bits("log_msg_max", 0x8, 28, 24),
        bits("log_rq_size", 0x8, 22, 19),
        bits("log_rq_stride", 0x8, 18, 16),
        flag("no_sq", 0x8, 15),
        bits("ts_format", 0x8, 7, 6),
        bits("uar_page", 0xC, 23, 0),
        bits("user_index", 0x10, 23, 0),
        bits("log_page_size", 0x14, 28, 24),
        bits("remote_qpn", 0x14, 23, 0),
        flag("fl", 0x18, 31),
        bits("ack_timeout", 0x20, 31, 27),
        bits("vhca_port_num", 0x3C, 23, 16),
        bits("retry_count", 0x70, 18, 16),
        bits("rnr_retry", 0x70, 15, 13),
        flag("rre", 0x90, 15),
        flag("rwe", 0x90, 14),
        bits("min_rnr_nak", 0x94, 28, 24),
        bits("cqn_rcv", 0x9C, 23, 0),
        whole("dbr_addr", 0xA0),
        bits("rq_type", 0xAC, 26, 24),
    ),
)

PAGE_TRACK: Final = Layout(
    "PAGE_TRACK object",
    0x30,
    (
        whole("modify_field_select", 0x0),
        bits("vhca_id", 0x8, 15, 0),
        bits("state", 0x10, 31, 28),
        bits("track_type", 0x10, 27, 24),
        bits("log_addr_space_size", 0x10, 23, 16),
        bits("log_page_size", 0x10, 12, 8),
        bits("log_msg_size", 0x10, 4, 0),
        bits("reporting_qpn", 0x14, 23, 0),
        bits("num_ranges", 0x18, 7, 0),
        whole("range_start_address", 0x20),
        whole("length", 0x28),
    ),
)
PAGE_TRACK_TYPE: Final = 0x46

FTE_MATCH: Final = Layout("flow match", 0x200, (whole("dmac", 0x8, 6), bits("source_port", 0x44, 15, 0)))
"""Destination address and source port of the outer headers and the miscellaneous part."""

COMMAND_ENTRY: Final = Layout(
    "command entry",
    0x40,
    (
        bits("type", 0x0, 31, 24),
        bits("input_length", 0x4),
        whole("input_mailbox", 0x8),
        whole("output_mailbox", 0x30),
        bits("output_length", 0x38),
        bits("token", 0x3C, 31, 24),
        bits("signature", 0x3C, 23, 16),
        bits("status", 0x3C, 7, 1),
        flag("owner", 0x3C, 0),
    ),
)
MAILBOX: Final = Layout(
    "mailbox",
    0x240,
    (
        whole("next", 0x230),
        bits("block_number", 0x238),
        bits("token", 0x23C, 23, 16),
        bits("control_signature", 0x23C, 15, 8),
        bits("signature", 0x23C, 7, 0),
    ),
)
