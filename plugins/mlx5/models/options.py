"""What can be set about the card: sizes, capabilities, demands. Records only; the command line is `__main__`'s."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MOST_VFS = 16
LEAST_IMAGE = 64 << 10
MOST_SINGLE_IMAGE = (1 << 32) - 4096
"""Without chunks a state has to fit one image."""


@dataclass(frozen=True, slots=True)
class Options:
    """A card as it is built.

    `image_size`: bytes of one VF's whole state. `chunk_size`: least buffer that a chunk needs (where the card has the
    capability). `save_rate`: bytes of state that are saved or loaded in a second of the model's time.
    """

    vfs: int = 1
    image_size: int = 1 << 20
    chunk_size: int = 1 << 20
    save_rate: float = 8e9
    command_seconds: int = 60
    """What the initialization segment says that a command may take."""
    boot_pages: int = 64
    init_pages: int = 600
    vf_pages: int = 32
    save_pages: int = 16
    migratable: bool = False
    device_id: int = 0x1021
    psid: str = "MT_0000000838"
    firmware: tuple[int, int, int] = (28, 43, 1014)
    caps: Mapping[str, int] = field(default_factory=dict)
    """Capabilities of the PF that differ from the usual ones, by name (see `caps`)."""
