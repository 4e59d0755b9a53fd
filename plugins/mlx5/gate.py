"""Whether a virtual function can be migrated: every capability that this needs, and what to do about one that lacks.

Decisions only, from capability blocks that others have queried. Source: Linux' mlx5-vfio-pci (cmd.c,
mlx5vf_cmd_set_migratable).
"""

from dataclasses import dataclass
from typing import Final

from plugins.mlx5.boot import Adapter, Caps
from plugins.mlx5.contexts import PAGE_TRACK_TYPE

_FIRMWARE: Final = (
    "needs a ConnectX-7 or BlueField-3 with firmware of 2024 or later and VF_MIGRATION_MODE=2 (mlxconfig)"
)

FEATURE_MULTI_LOAD: Final = 1
FEATURE_TRACKING: Final = 2
FEATURE_CHUNKS: Final = 4
FEATURE_NAMES: Final = {
    FEATURE_MULTI_LOAD: "migration_multi_load",
    FEATURE_TRACKING: "migration_tracking_state",
    FEATURE_CHUNKS: "migration_in_chunks",
}
_NEEDED: Final = (FEATURE_MULTI_LOAD, FEATURE_TRACKING)


@dataclass(frozen=True, slots=True)
class Missing:
    """A capability that is not there, and the way out."""

    name: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name} ({self.advice})"


def missing(adapter: Adapter, migratable: bool) -> tuple[Missing, ...]:
    """What keeps a virtual function from being migrated; `migratable`: its own bit."""
    found = []
    if not adapter.general["migration"]:
        found.append(Missing("migration", _FIRMWARE))
    if not adapter.general["hca_cap_2"]:
        found.append(Missing("hca_cap_2", _FIRMWARE))
    for name in ("migration_multi_load", "migration_tracking_state"):
        if not adapter.general_2[name]:
            found.append(Missing(name, _FIRMWARE))
    if not migratable:
        found.append(
            Missing("migratable", "the virtual function's own bit; vhca_resource_manager is needed to set it from here")
        )
    return tuple(found)


def features(adapter: Adapter) -> int:
    """The capabilities that matter to the other side of a migration, as bits."""
    caps = adapter.general_2
    return (
        FEATURE_MULTI_LOAD * caps["migration_multi_load"]
        | FEATURE_TRACKING * caps["migration_tracking_state"]
        | FEATURE_CHUNKS * caps["migration_in_chunks"]
    )


def lacking(theirs: int, mine: int) -> list[str]:
    """What state with the bits `theirs` needs and a device with `mine` has not."""
    return [FEATURE_NAMES[bit] for bit in _NEEDED if theirs & bit and not mine & bit]


def can_track_pages(general: Caps, general_2: Caps) -> bool:
    """The firmware keeps a log of the pages that a function writes."""
    bit = PAGE_TRACK_TYPE - 64
    return bool(general["adv_virtualization"] and general_2["general_obj_types_127_64"] >> bit & 1)
