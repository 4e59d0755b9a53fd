"""Layouts that are parts of commands or lie in memory: contexts, capability blocks, events, completions.

Facts only, as in `layouts`; places are within the context, written as `table` reads them.
"""

from typing import Final

from plugins.mlx5.bits import table

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

GENERAL: Final = table(
    "GENERAL capabilities",
    CAP_SIZE,
    """
    page_request_disable @0x0[25]
    vhca_resource_manager @0x0[0]
    hca_cap_2 @0x4[31]
    vhca_id @0x4[15:0]
    force_teardown @0x20[15]
    fast_teardown @0x1c[4]
    release_all_pages @0x28[26]
    vport_group_manager @0x34[31]
    eswitch_manager @0x34[24]
    disable_link_up @0x34[11]
    log_max_msg @0x38[28:24]
    cqe_version @0x3c[3:0]
    cmdif_checksum @0x40[15:14]
    uar_4k @0x48[31]
    mkey_by_name @0x4c[25]
    general_obj_types @0x80+8
    sq_ts_format @0x88[31:30]
    log_max_l2_table @0x90[28:24]
    log_uar_page_sz @0x90[15:0]
    adv_virtualization @0xac[6]
    sw_owner_id @0xc0[1]
    migration @0xd0[18]
    """,
)

GENERAL_2: Final = table(
    "GENERAL_2 capabilities",
    CAP_SIZE,
    """
    migratable @0x10[31]
    migration_multi_load @0x18[23]
    migration_tracking_state @0x18[22]
    migration_in_chunks @0x18[15]
    migration_state @0x18[6]
    general_obj_types_127_64 @0x38+8
    """,
)

ADV_VIRTUALIZATION: Final = table(
    "ADV_VIRTUALIZATION capabilities",
    CAP_SIZE,
    """
    log_max_num @0x0[28:24]
    max_num_range @0x0[23:16]
    log_min_addr_space @0x0[15:8]
    log_max_addr_space @0x0[7:0]
    log_min_msg_size @0x4[28:24]
    log_max_msg_size @0x4[20:16]
    log_min_page_size @0x4[12:8]
    log_max_page_size @0x4[4:0]
    """,
)

ESWITCH_FLOW_TABLE: Final = table(
    "ESWITCH_FLOW_TABLE capabilities",
    CAP_SIZE,
    """
    ft_support @0x40[31]
    log_max_ft_size @0x44[29:24]
    max_ft_level @0x44[7:0]
    """,
)
FLOW_TABLE: Final = table(
    "FLOW_TABLE capabilities",
    CAP_SIZE,
    """
    modify_root @0x40[27]
    """,
)
ESWITCH: Final = table(
    "ESWITCH capabilities",
    CAP_SIZE,
    """
    vport_cvlan_strip @0x0[30]
    vport_cvlan_insert @0x0[28]
    """,
)
ROCE: Final = table(
    "ROCE capabilities",
    CAP_SIZE,
    """
    qp_ts_format @0x0[1:0]
    """,
)

MKC: Final = table(
    "mkey context",
    0x40,
    """
    free @0x0[30]
    access_mode_4_2 @0x0[28:26]
    a @0x0[14]
    rw @0x0[13]
    rr @0x0[12]
    lw @0x0[11]
    lr @0x0[10]
    access_mode_1_0 @0x0[9:8]
    qpn @0x4[31:8]
    mkey_7_0 @0x4[7:0]
    length64 @0xc[31]
    pd @0xc[23:0]
    start_addr @0x10+8
    len @0x18+8
    bsf_octword_size @0x20
    translations_octword_size @0x34
    log_page_size @0x38[5:0]
    """,
)

EQC: Final = table(
    "EQ context",
    0x40,
    """
    status @0x0[31:28]
    st @0x0[11:8]
    log_eq_size @0xc[28:24]
    uar_page @0xc[23:0]
    intr @0x14[11:0]
    log_page_size @0x18[28:24]
    """,
)

EQE: Final = table(
    "event",
    0x40,
    """
    type @0x0[23:16]
    sub_type @0x0[7:0]
    ec_function @0x20[31]
    release_all @0x20[30]
    func_id @0x20[15:0]
    num_pages @0x24
    signature @0x3c[15:8]
    owner @0x3c[0]
    """,
)
EQE_OBJECT: Final = table(
    "object change event",
    0x40,
    """
    obj_type @0x20[15:0]
    obj_id @0x24
    """,
)
EQE_QP: Final = table(
    "queue pair event",
    0x40,
    """
    queue_type @0x34[31:24]
    qpn @0x38[23:0]
    """,
)
EQE_CQ: Final = table(
    "completion queue event",
    0x40,
    """
    cqn @0x20[23:0]
    error @0x28[7:0]
    """,
)
EQE_VPORT: Final = table(
    "vport change event",
    0x40,
    """
    vport @0x20[15:0]
    """,
)

CQC: Final = table(
    "CQ context",
    0x40,
    """
    cqe_sz @0x0[23:21]
    log_cq_size @0xc[28:24]
    uar_page @0xc[23:0]
    c_eqn @0x14
    log_page_size @0x18[28:24]
    dbr_addr @0x38+8
    """,
)

CQE: Final = table(
    "completion",
    0x40,
    """
    immediate @0x24
    byte_cnt @0x2c
    wqe_counter @0x3c[31:16]
    opcode @0x3c[7:4]
    owner @0x3c[0]
    """,
)

QPC: Final = table(
    "QP context",
    0xE8,
    """
    st @0x0[23:16]
    pm_state @0x0[12:11]
    pd @0x4[23:0]
    mtu @0x8[31:29]
    log_msg_max @0x8[28:24]
    log_rq_size @0x8[22:19]
    log_rq_stride @0x8[18:16]
    no_sq @0x8[15]
    ts_format @0x8[7:6]
    uar_page @0xc[23:0]
    user_index @0x10[23:0]
    log_page_size @0x14[28:24]
    remote_qpn @0x14[23:0]
    fl @0x18[31]
    ack_timeout @0x20[31:27]
    vhca_port_num @0x3c[23:16]
    retry_count @0x70[18:16]
    rnr_retry @0x70[15:13]
    rre @0x90[15]
    rwe @0x90[14]
    min_rnr_nak @0x94[28:24]
    cqn_rcv @0x9c[23:0]
    dbr_addr @0xa0+8
    rq_type @0xac[26:24]
    """,
)

PAGE_TRACK: Final = table(
    "PAGE_TRACK object",
    0x30,
    """
    modify_field_select @0x0+8
    vhca_id @0x8[15:0]
    state @0x10[31:28]
    track_type @0x10[27:24]
    log_addr_space_size @0x10[23:16]
    log_page_size @0x10[12:8]
    log_msg_size @0x10[4:0]
    reporting_qpn @0x14[23:0]
    num_ranges @0x18[7:0]
    range_start_address @0x20+8
    length @0x28+8
    """,
)
PAGE_TRACK_TYPE: Final = 0x46

FTE_MATCH: Final = table(
    "flow match",
    0x200,
    """
    dmac @0x8+6
    source_port @0x44[15:0]
    """,
)
"""Destination address and source port of the outer headers and the miscellaneous part."""

COMMAND_ENTRY: Final = table(
    "command entry",
    0x40,
    """
    type @0x0[31:24]
    input_length @0x4
    input_mailbox @0x8+8
    output_mailbox @0x30+8
    output_length @0x38
    token @0x3c[31:24]
    signature @0x3c[23:16]
    status @0x3c[7:1]
    owner @0x3c[0]
    """,
)
MAILBOX: Final = table(
    "mailbox",
    0x240,
    """
    next @0x230+8
    block_number @0x238
    token @0x23c[23:16]
    control_signature @0x23c[15:8]
    signature @0x23c[7:0]
    """,
)
