"""What a profile is: one kind of device, as records.

Records only: how they are written in a file is in `tables` and `profile`, what follows for a device in `layout`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from plugins.generic_dmaq.drain import Queue
from plugins.generic_dmaq.registers import BarTable
from plugins.generic_dmaq.transforms import Transform
from vfu_server.policy import Answer


@dataclass(frozen=True, slots=True)
class Match:
    """The ids of devices that a profile is for; no revision: any."""

    vendor: int
    devices: tuple[int, ...]
    revisions: tuple[int, ...] = ()

    def takes(self, vendor: int, device: int, revision: int) -> bool:
        """It is for a device of these ids."""
        return vendor == self.vendor and device in self.devices and (not self.revisions or revision in self.revisions)


@dataclass(frozen=True, slots=True)
class Interrupts:
    """Vectors of each kind, and the writes `(register, value)` that stop interrupts (`mask`) and take back old ones."""

    intx: int = 0
    msi: int = 0
    msix: int = 0
    mask: tuple[tuple[str, int], ...] = ()
    clear: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a profile says of a register besides its place: how it is restored, compared, and read when stopped.

    `reads_act`: a read changes the device, so it is read at saves and comparisons only, and written again behind them.
    """

    restore: Transform
    verify: int
    stopped: Answer
    reason: str
    reads_act: bool = False


@dataclass(frozen=True, slots=True)
class Area:
    """A range of a BAR without registers; `mapped`: the client may map it."""

    bar: int
    name: str
    offset: int
    length: int
    mapped: bool
    reason: str


@dataclass(frozen=True, slots=True)
class QueueTable:
    """A queue as declared; with `array` there is one for each element, and names are those within the element."""

    queue: Queue
    array: str = ""


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of device. Register names in `plans` are as declared: `status`, `channel.status` within an array."""

    file: str
    name: str
    summary: str
    match: Match
    bars: tuple[BarTable, ...]
    plans: Mapping[str, Plan]
    counts_from: Mapping[str, str]
    areas: tuple[Area, ...]
    queues: tuple[QueueTable, ...]
    identity: tuple[str, ...]
    interrupts: Interrupts
    dma_bits: int
    drain_seconds: float
    settle_seconds: float
    reset: str
    p2p_reason: str
    not_carried: tuple[str, ...] = ()
    hooks: str = ""
    hook_options: Mapping[str, bool] = field(default_factory=dict)
