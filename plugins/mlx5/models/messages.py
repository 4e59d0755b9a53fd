"""The commands' inputs and outputs and the contexts inside of them, as layouts.

Offsets are those of mlx5_ifc.h in Linux, bytes from the message's start. It must not know what a command does.
"""

from plugins.mlx5.models.layouts import Bits, Layout, bits, moved, raw, u32, u64

HEADER = (bits("opcode", 0, 31, 16), bits("uid", 0, 15, 0), bits("op_mod", 4, 15, 0))


def command(name: str, size: int, *fields: Bits) -> Layout:
    """An input: the header that all have, and its own fields."""
    return Layout(name, size, *HEADER, *fields)


def output(name: str, size: int, *fields: Bits) -> Layout:
    """An output; its first 8 bytes are status and syndrome."""
    return Layout(name, size, bits("status", 0, 31, 24), u32("syndrome", 4), *fields)


def named(name: str, field: str) -> Layout:
    """An input of 16 bytes that names one object by a number of 24 bits."""
    return command(name, 0x10, bits(field, 8, 23, 0))


PLAIN_OUT = output("output", 0x10)
NUMBER_OUT = output("output with a number", 0x10, bits("number", 8, 23, 0))

# --- boot -------------------------------------------------------------------------------------------------------------

FUNCTION = (bits("embedded_cpu_function", 8, 31), bits("function_id_type", 8, 28), bits("function_id", 8, 15, 0))
ENABLE_HCA = command("ENABLE_HCA", 0x10, *FUNCTION)
DISABLE_HCA = command("DISABLE_HCA", 0x10, *FUNCTION)
QUERY_ISSI = command("QUERY_ISSI", 0x10)
QUERY_ISSI_OUT = output("QUERY_ISSI", 0x70, bits("current_issi", 8, 15, 0), u32("supported_issi", 0x6C))
SET_ISSI = command("SET_ISSI", 0x10, bits("current_issi", 8, 15, 0))
INIT_HCA = command("INIT_HCA", 0x20, bits("sw_vhca_id", 0xC, 29, 16), raw("sw_owner_id", 0x10, 16))
TEARDOWN_HCA = command("TEARDOWN_HCA", 0x10, bits("profile", 8, 15, 0))
TEARDOWN_HCA_OUT = output("TEARDOWN_HCA", 0x10, bits("failed", 0xC, 0))
QUERY_ADAPTER = command("QUERY_ADAPTER", 0x10)
QUERY_ADAPTER_OUT = output(
    "QUERY_ADAPTER",
    0x110,
    bits("ieee_vendor_id", 0x28, 23, 0),
    bits("vsd_vendor_id", 0x2C, 15, 0),
    raw("vsd", 0x30, 208),
    raw("psid", 0x100, 16),
)
ACCESS_REG = command("ACCESS_REG", 0x10, bits("register_id", 8, 15, 0), u32("argument", 0xC))
QUERY_HCA_CAP = command(
    "QUERY_HCA_CAP",
    0x10,
    bits("other_function", 8, 31),
    bits("ec_vf_function", 8, 30),
    bits("function_id_type", 8, 28),
    bits("function_id", 8, 15, 0),
)
SET_HCA_CAP = command(
    "SET_HCA_CAP",
    0x10,
    bits("other_function", 8, 31),
    bits("ec_vf_function", 8, 30),
    bits("function_id_type", 8, 28),
    bits("function_id", 8, 15, 0),
)
CAP_SIZE = 0x1000

# --- pages ------------------------------------------------------------------------------------------------------------

QUERY_PAGES = command("QUERY_PAGES", 0x10, bits("embedded_cpu_function", 8, 31), bits("function_id", 8, 15, 0))
QUERY_PAGES_OUT = output(
    "QUERY_PAGES",
    0x10,
    bits("embedded_cpu_function", 8, 31),
    bits("function_id", 8, 15, 0),
    u32("num_pages", 0xC),
)
MANAGE_PAGES = command(
    "MANAGE_PAGES", 0x10, bits("embedded_cpu_function", 8, 31), bits("function_id", 8, 15, 0), u32("num_entries", 0xC)
)
MANAGE_PAGES_OUT = output("MANAGE_PAGES", 0x10, u32("num_entries", 8))

# --- objects ----------------------------------------------------------------------------------------------------------

ALLOC_PD = command("ALLOC_PD", 0x10)
DEALLOC_PD = named("DEALLOC_PD", "pd")
ALLOC_UAR = command("ALLOC_UAR", 0x10)
DEALLOC_UAR = named("DEALLOC_UAR", "uar")
MKEY_CONTEXT = (
    bits("free", 0, 30),
    bits("access_mode_4_2", 0, 28, 26),
    bits("a", 0, 14),
    bits("rw", 0, 13),
    bits("rr", 0, 12),
    bits("lw", 0, 11),
    bits("lr", 0, 10),
    bits("access_mode_1_0", 0, 9, 8),
    bits("qpn", 4, 31, 8),
    bits("mkey_7_0", 4, 7, 0),
    bits("length64", 0xC, 31),
    bits("pd", 0xC, 23, 0),
    u64("start_addr", 0x10),
    u64("len", 0x18),
    u32("bsf_octword_size", 0x20),
    u32("translations_octword_size", 0x34),
    bits("log_page_size", 0x38, 5, 0),
)
CREATE_MKEY = command(
    "CREATE_MKEY",
    0x110,
    bits("pg_access", 0xC, 31),
    bits("mkey_umem_valid", 0xC, 30),
    *moved(MKEY_CONTEXT, 0x10),
    u32("translations_octword_actual_size", 0x60),
)
DESTROY_MKEY = named("DESTROY_MKEY", "mkey_index")

EQ_CONTEXT = (
    bits("status", 0, 31, 28),
    bits("st", 0, 11, 8),
    bits("log_eq_size", 0xC, 28, 24),
    bits("uar_page", 0xC, 23, 0),
    bits("intr", 0x14, 11, 0),
    bits("log_page_size", 0x18, 28, 24),
)
CREATE_EQ = command(
    "CREATE_EQ",
    0x110,
    *moved(EQ_CONTEXT, 0x10),
    *(u64(f"event_bitmask_{word}", 0x58 + 8 * word) for word in range(4)),
)
CREATE_EQ_OUT = output("CREATE_EQ", 0x10, bits("number", 8, 7, 0))
DESTROY_EQ = command("DESTROY_EQ", 0x10, bits("eq_number", 8, 7, 0))
QUERY_EQ = command("QUERY_EQ", 0x10, bits("eq_number", 8, 7, 0))
QUERY_EQ_OUT = Layout(
    "QUERY_EQ",
    0x110,
    bits("out_status", 0, 31, 24),
    u32("syndrome", 4),
    *moved(EQ_CONTEXT, 0x10),
    *(u64(f"event_bitmask_{word}", 0x58 + 8 * word) for word in range(4)),
)

CQ_CONTEXT = (
    bits("cqe_sz", 0, 23, 21),
    bits("log_cq_size", 0xC, 28, 24),
    bits("uar_page", 0xC, 23, 0),
    u32("eqn", 0x14),
    bits("log_page_size", 0x18, 28, 24),
    u64("dbr_addr", 0x38),
)
CREATE_CQ = command("CREATE_CQ", 0x110, *moved(CQ_CONTEXT, 0x10))
DESTROY_CQ = named("DESTROY_CQ", "cqn")

QP_CONTEXT = (
    bits("st", 0, 23, 16),
    bits("pm_state", 0, 12, 11),
    bits("pd", 4, 23, 0),
    bits("mtu", 8, 31, 29),
    bits("log_msg_max", 8, 28, 24),
    bits("log_rq_size", 8, 22, 19),
    bits("log_rq_stride", 8, 18, 16),
    bits("no_sq", 8, 15),
    bits("ts_format", 8, 7, 6),
    bits("uar_page", 0xC, 23, 0),
    bits("user_index", 0x10, 23, 0),
    bits("log_page_size", 0x14, 28, 24),
    bits("remote_qpn", 0x14, 23, 0),
    bits("fl", 0x18, 31),
    bits("ack_timeout", 0x20, 31, 27),
    bits("vhca_port_num", 0x3C, 23, 16),
    bits("retry_count", 0x70, 18, 16),
    bits("rnr_retry", 0x70, 15, 13),
    bits("rre", 0x90, 15),
    bits("rwe", 0x90, 14),
    bits("min_rnr_nak", 0x94, 28, 24),
    bits("cqn_rcv", 0x9C, 23, 0),
    u64("dbr_addr", 0xA0),
    bits("rq_type", 0xAC, 26, 24),
)
CREATE_QP = command("CREATE_QP", 0x110, *moved(QP_CONTEXT, 0x18))
DESTROY_QP = named("DESTROY_QP", "qpn")
MODIFY_QP = command(
    "QP transition", 0x110, bits("qpn", 8, 23, 0), u32("opt_param_mask", 0x10), *moved(QP_CONTEXT, 0x18)
)

# --- migration --------------------------------------------------------------------------------------------------------

SUSPEND_VHCA = command("SUSPEND_VHCA", 0x10, bits("vhca_id", 8, 15, 0))
RESUME_VHCA = command("RESUME_VHCA", 0x10, bits("vhca_id", 8, 15, 0))
QUERY_MIGRATION = command(
    "QUERY_VHCA_MIGRATION_STATE", 0x10, bits("incremental", 8, 31), bits("chunk", 8, 30), bits("vhca_id", 8, 15, 0)
)
QUERY_MIGRATION_OUT = output(
    "QUERY_VHCA_MIGRATION_STATE",
    0x40,
    bits("migration_state", 0xC, 31, 28),
    u32("required_umem_size", 0x10),
    u64("remaining_total_size", 0x18),
)
SAVE_VHCA_STATE = command(
    "SAVE_VHCA_STATE",
    0x20,
    bits("incremental", 8, 31),
    bits("set_track", 8, 30),
    bits("vhca_id", 8, 15, 0),
    u64("va", 0x10),
    u32("mkey", 0x18),
    u32("size", 0x1C),
)
SAVE_VHCA_STATE_OUT = output("SAVE_VHCA_STATE", 0x10, u32("actual_image_size", 8), u32("next_required_umem_size", 0xC))
LOAD_VHCA_STATE = command(
    "LOAD_VHCA_STATE", 0x20, bits("vhca_id", 8, 15, 0), u64("va", 0x10), u32("mkey", 0x18), u32("size", 0x1C)
)

# --- page tracker -----------------------------------------------------------------------------------------------------

OBJECT_HEADER = (
    bits("opcode", 0, 31, 16),
    bits("uid", 0, 15, 0),
    bits("vhca_tunnel_id", 4, 31, 16),
    bits("op_mod", 4, 15, 0),
    u32("obj_id", 8),
)
"""General objects: what is op_mod elsewhere is the object's type here; op_param at 0xc has to be 0."""
PAGE_TRACK = (
    u64("modify_field_select", 0),
    bits("vhca_id", 8, 15, 0),
    bits("state", 0x10, 31, 28),
    bits("track_type", 0x10, 27, 24),
    bits("log_addr_space_size", 0x10, 23, 16),
    bits("log_page_size", 0x10, 12, 8),
    bits("log_msg_size", 0x10, 4, 0),
    bits("reporting_qpn", 0x14, 23, 0),
    bits("num_ranges", 0x18, 7, 0),
    u64("range_start_address", 0x20),
    u64("range_length", 0x28),
)
CREATE_PAGE_TRACK = Layout("CREATE page track", 0x40, *OBJECT_HEADER, *moved(PAGE_TRACK, 0x10))
MODIFY_PAGE_TRACK = Layout("MODIFY page track", 0x40, *OBJECT_HEADER, *moved(PAGE_TRACK, 0x10))
OBJECT_ONLY = Layout("general object", 0x10, *OBJECT_HEADER)
OBJECT_OUT = output("general object", 0x10, u32("obj_id", 8))
QUERY_PAGE_TRACK_OUT = Layout(
    "QUERY page track",
    0x40,
    bits("out_status", 0, 31, 24),
    u32("syndrome", 4),
    u32("obj_id", 8),
    *moved(PAGE_TRACK, 0x10),
)

# --- events and completions -------------------------------------------------------------------------------------------

EQE = Layout(
    "EQE",
    0x40,
    bits("type", 0, 23, 16),
    bits("sub_type", 0, 7, 0),
    raw("data", 0x20, 0x1C),
    bits("signature", 0x3C, 15, 8),
    bits("owner", 0x3C, 0),
)
CQE = Layout(
    "CQE",
    0x40,
    u32("immediate", 0x24),
    u32("byte_cnt", 0x2C),
    bits("qpn", 0x38, 23, 0),
    bits("wqe_counter", 0x3C, 31, 16),
    bits("opcode", 0x3C, 7, 4),
    bits("owner", 0x3C, 0),
)
RECEIVE_WQE = Layout("receive WQE", 0x10, u32("byte_count", 0), u32("lkey", 4), u64("addr", 8))
