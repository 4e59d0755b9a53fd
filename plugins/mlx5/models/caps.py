"""Capability blocks: which there are, what they say for a PF and its VFs, and which bits SET_HCA_CAP may change.

Places are those of mlx5_ifc.h in Linux, inside of the block. It must not know commands.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from plugins.mlx5.models.layouts import Layout, bits, u64
from plugins.mlx5.models.messages import CAP_SIZE

GENERAL, ROCE, FLOW_TABLE, ESWITCH_FLOW_TABLE, ESWITCH, GENERAL_2, ADV_VIRTUALIZATION = 0, 4, 7, 8, 9, 0x20, 0x26
MAX, CURRENT = 0, 1

LAYOUTS: Mapping[int, Layout] = {
    GENERAL: Layout(
        "GENERAL",
        CAP_SIZE,
        bits("page_request_disable", 0x0, 25),
        bits("vhca_resource_manager", 0x0, 0),
        bits("hca_cap_2", 0x4, 31),
        bits("vhca_id", 0x4, 15, 0),
        bits("fast_teardown", 0x1C, 4),
        bits("force_teardown", 0x20, 15),
        bits("release_all_pages", 0x28, 26),
        bits("vport_group_manager", 0x34, 31),
        bits("eswitch_manager", 0x34, 24),
        bits("disable_link_up", 0x34, 11),
        bits("log_max_msg", 0x38, 28, 24),
        bits("cqe_version", 0x3C, 3, 0),
        bits("cmdif_checksum", 0x40, 15, 14),
        bits("uar_4k", 0x48, 31),
        bits("mkey_by_name", 0x4C, 25),
        bits("icm_mng_function_id_mode", 0x54, 31),
        u64("general_obj_types", 0x80),
        bits("sq_ts_format", 0x88, 31, 30),
        bits("log_max_l2_table", 0x90, 28, 24),
        bits("log_uar_page_sz", 0x90, 15, 0),
        bits("adv_virtualization", 0xAC, 6),
        bits("sw_owner_id", 0xC0, 1),
        bits("migration", 0xD0, 18),
        bits("num_total_dynamic_vf_msix", 0xE0, 23, 0),
        bits("dynamic_msix_table_size", 0xE4, 11, 0),
    ),
    ROCE: Layout("ROCE", CAP_SIZE, bits("qp_ts_format", 0, 1, 0)),
    FLOW_TABLE: Layout("FLOW_TABLE", CAP_SIZE, bits("modify_root", 0x40, 27)),
    ESWITCH_FLOW_TABLE: Layout(
        "ESWITCH_FLOW_TABLE",
        CAP_SIZE,
        bits("ft_support", 0x40, 31),
        bits("log_max_ft_size", 0x44, 29, 24),
        bits("max_ft_level", 0x44, 7, 0),
    ),
    ESWITCH: Layout("ESWITCH", CAP_SIZE, bits("vport_cvlan_strip", 0, 30), bits("vport_cvlan_insert", 0, 28)),
    GENERAL_2: Layout(
        "GENERAL_2",
        CAP_SIZE,
        bits("migratable", 0x10, 31),
        bits("migration_multi_load", 0x18, 23),
        bits("migration_tracking_state", 0x18, 22),
        bits("migration_in_chunks", 0x18, 15),
        bits("migration_state", 0x18, 6),
        u64("general_obj_types_127_64", 0x38),
        bits("function_id_type_vhca_id", 0xB8, 29),
    ),
    ADV_VIRTUALIZATION: Layout(
        "ADV_VIRTUALIZATION",
        CAP_SIZE,
        bits("pg_track_log_max_num", 0x0, 28, 24),
        bits("pg_track_max_num_range", 0x0, 23, 16),
        bits("pg_track_log_min_addr_space", 0x0, 15, 8),
        bits("pg_track_log_max_addr_space", 0x0, 7, 0),
        bits("pg_track_log_min_msg_size", 0x4, 28, 24),
        bits("pg_track_log_max_msg_size", 0x4, 20, 16),
        bits("pg_track_log_min_page_size", 0x4, 12, 8),
        bits("pg_track_log_max_page_size", 0x4, 4, 0),
    ),
}

PAGE_TRACK_TYPE = 0x46
OWN_SETTABLE = frozenset(
    (
        *("cmdif_checksum", "log_uar_page_sz", "uar_4k", "mkey_by_name", "release_all_pages"),
        *("icm_mng_function_id_mode", "disable_link_up"),
    )
)
"""Fields of a function's own GENERAL block that SET_HCA_CAP may change, up to what the maximum says."""
OTHER_SETTABLE = {GENERAL: frozenset({"dynamic_msix_table_size"}), GENERAL_2: frozenset({"migratable"})}
"""Fields that a PF may change for a VF."""

_PF_MAX: Mapping[int, Mapping[str, int]] = {
    GENERAL: {
        "vhca_resource_manager": 1,
        "hca_cap_2": 1,
        "fast_teardown": 1,
        "force_teardown": 1,
        "release_all_pages": 1,
        "vport_group_manager": 1,
        "eswitch_manager": 1,
        "disable_link_up": 1,
        "log_max_msg": 30,
        "cqe_version": 1,
        "sq_ts_format": 1,
        "cmdif_checksum": 3,
        "uar_4k": 1,
        "mkey_by_name": 1,
        "icm_mng_function_id_mode": 1,
        "log_max_l2_table": 8,
        "log_uar_page_sz": 0xFFFF,
        "adv_virtualization": 1,
        "sw_owner_id": 1,
        "migration": 1,
        "num_total_dynamic_vf_msix": 1024,
    },
    ROCE: {},
    FLOW_TABLE: {"modify_root": 1},
    ESWITCH_FLOW_TABLE: {"ft_support": 1, "log_max_ft_size": 22, "max_ft_level": 64},
    ESWITCH: {"vport_cvlan_strip": 1, "vport_cvlan_insert": 1},
    GENERAL_2: {
        "migration_multi_load": 1,
        "migration_tracking_state": 1,
        "migration_in_chunks": 1,
        "migration_state": 1,
        "general_obj_types_127_64": 1 << (PAGE_TRACK_TYPE - 64),
        "function_id_type_vhca_id": 1,
    },
    ADV_VIRTUALIZATION: {
        "pg_track_log_max_num": 4,
        "pg_track_max_num_range": 8,
        "pg_track_log_min_addr_space": 12,
        "pg_track_log_max_addr_space": 48,
        "pg_track_log_min_msg_size": 12,
        "pg_track_log_max_msg_size": 16,
        "pg_track_log_min_page_size": 12,
        "pg_track_log_max_page_size": 21,
    },
}
_OFF_AT_FIRST = ("release_all_pages", "uar_4k", "mkey_by_name", "icm_mng_function_id_mode", "disable_link_up")
"""Bits that the maximum has and a reset function has not."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a capability stands: the block's type and the field's name."""

    kind: int
    name: str


PLACES: Mapping[str, Place] = {name: Place(kind, name) for kind, layout in LAYOUTS.items() for name in layout}


class Capabilities:
    """The blocks of one function, current and maximum. `changes` are settings for this card, by name."""

    def __init__(self, *, vhca_id: int, vf: bool, changes: Mapping[str, int]) -> None:
        self._blocks: dict[tuple[int, int], bytes] = {}
        self._vhca_id = vhca_id
        self._vf = vf
        self._changes = changes
        self.reset()

    def reset(self) -> None:
        """What a reset function says."""
        for kind, layout in LAYOUTS.items():
            values = dict(_PF_MAX[kind])
            values |= {name: value for name, value in self._changes.items() if PLACES[name].kind == kind}
            if self._vf:
                values = {name: value for name, value in values.items() if name in ("log_max_msg", "hca_cap_2")}
            if kind == GENERAL:
                values["vhca_id"] = self._vhca_id
                values["dynamic_msix_table_size"] = 0
            self._blocks[kind, MAX] = layout.pack(values)
            if kind == GENERAL:
                values["log_uar_page_sz"] = 0
                values.update(dict.fromkeys(_OFF_AT_FIRST, 0))
            self._blocks[kind, CURRENT] = layout.pack(values)

    def block(self, kind: int, mode: int) -> bytes | None:
        """The block of CAP_SIZE bytes; None if there is no such type."""
        return self._blocks.get((kind, mode))

    def get(self, name: str, mode: int = CURRENT) -> int:
        """One capability."""
        place = PLACES[name]
        return LAYOUTS[place.kind].get(self._blocks[place.kind, mode], place.name)

    def set(self, name: str, value: int, mode: int = CURRENT) -> None:
        """Set one capability, as hardware does."""
        place = PLACES[name]
        block = self._blocks[place.kind, mode]
        self._blocks[place.kind, mode] = LAYOUTS[place.kind].put(block, {place.name: value})
