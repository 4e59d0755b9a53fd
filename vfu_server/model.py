"""The contract of a software model: hardware written as a class, served over vfio-user by `model_server`.

A model knows its registers and its bus. It knows nothing of sockets, clients or migration: state that a migration moves
is moved by a plugin through the model's registers and DMA, as on hardware.

All methods of a model and all callbacks it asks for run under one lock of the server, one at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vfu_server.pciconfig import PciConfig


class BusError(Exception):
    """A DMA access that no memory answered, or that bus mastering forbids."""


class Timer(Protocol):
    """A callback that is yet to come."""

    def cancel(self) -> None:
        """It shall not come any more. Harmless if it has."""
        ...


class Bus(Protocol):
    """What the hardware around a model does for it."""

    def dma_read(self, iova: int, length: int) -> bytes:
        """Read client memory. BusError if any byte is unmapped, write-only, or bus mastering is off.

        Not from `read` or `write` of the model (the client waits for their answer and may not serve us): use
        `call_later(0, ...)`. Accesses of the client may be served while it waits.
        """
        ...

    def dma_write(self, iova: int, data: bytes) -> None:
        """Write client memory; as `dma_read`."""
        ...

    def message(self, vector: int) -> None:
        """Send MSI or MSI-X message `vector` if the client has armed it and bus mastering is on; else it is lost."""
        ...

    def intx(self, level: bool) -> None:
        """Drive the INTx line. The server does masking, auto-masking and signalling again on unmask."""
        ...

    @property
    def messages_enabled(self) -> bool:
        """MSI or MSI-X is in use: INTx is not driven by hardware then."""
        ...

    @property
    def msix_enabled(self) -> bool:
        """It is MSI-X that is in use."""
        ...

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call back after `seconds` of the model's time (scaled by `--time-scale`), under the lock."""
        ...

    def now(self) -> float:
        """The model's time in seconds."""
        ...


@dataclass(frozen=True, slots=True)
class Bar:
    """One base address register: `size` a power of two; `mappable` parts are shared memory that a client may map."""

    size: int
    io: bool = False
    wide: bool = False
    prefetchable: bool = False


@dataclass(frozen=True, slots=True)
class Interrupts:
    """Vectors of each kind."""

    intx: bool = False
    msi: int = 0
    msix: int = 0


@dataclass(frozen=True, slots=True)
class Access:
    """One access as it reached the hardware, for tests that count: `time` is CLOCK_MONOTONIC in seconds."""

    time: float
    write: bool
    region: int
    offset: int
    width: int
    value: int


@dataclass(slots=True)
class Faults:
    """Faults to order, by name, for tests: `name -> how many times still` (-1: always). A model documents the names it
    knows.
    """

    armed: dict[str, int] = field(default_factory=dict)

    def take(self, name: str) -> bool:
        """Whether fault `name` happens now; uses one up."""
        left = self.armed.get(name, 0)
        if left > 0:
            self.armed[name] = left - 1
        return left != 0


class Model(ABC):
    """A PCI function in software."""

    bars: dict[int, Bar]
    interrupts: Interrupts
    config: PciConfig
    can_reset: bool = False
    """Whether VFIO_DEVICE_RESET exists. Without it the reset message is refused, as the kernel does."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.bus: Bus = _Unplugged()

    def plug(self, bus: Bus) -> None:
        """Called once, before the first access."""
        self.bus = bus

    @abstractmethod
    def read(self, region: int, offset: int, width: int) -> int:
        """A BAR read of 1, 2, 4 or 8 bytes (unaligned ones too: answer as the hardware would)."""

    @abstractmethod
    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """A BAR write of 1, 2, 4 or 8 bytes."""

    def reset(self) -> None:
        """VFIO_DEVICE_RESET or FLR. The server resets config space, INTx and MSI before it calls."""
        return None

    def state(self) -> Mapping[str, int]:
        """All registers, and sums of the buffers, for tests and people. It changes nothing, as a read might."""
        return {}

    def bus_reset(self) -> None:
        """A client has gone: the part of a machine reset that reaches every device is done by the server; most models
        do nothing.
        """
        return None


class _Unplugged:
    """The bus of a model that nobody plugged in yet."""

    messages_enabled = False
    msix_enabled = False

    def dma_read(self, iova: int, length: int) -> bytes:
        raise BusError("not plugged in")

    def dma_write(self, iova: int, data: bytes) -> None:
        raise BusError("not plugged in")

    def message(self, vector: int) -> None:
        raise BusError("not plugged in")

    def intx(self, level: bool) -> None:
        raise BusError("not plugged in")

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        raise BusError("not plugged in")

    def now(self) -> float:
        raise BusError("not plugged in")
