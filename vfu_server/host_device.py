"""What every device door offers (`HostDevice`), and the records it speaks in.

Doors implement it; the session and plugins use it. It must not know which kernel or socket is behind it.

Register access is synchronous: a few microseconds on hardware, bounded by a deadline of three seconds on a socket.
Everything that may take longer is a coroutine.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from vfu_server.uapi import Command, MigState

if TYPE_CHECKING:
    from vfu_server.device import PrecopyInfo


@dataclass(frozen=True, slots=True)
class MmapArea:
    """A part of a region that may be mapped: `offset` in the region, both in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """One region as the device has it. `size` 0: not there. `flags` as in VFIO_DEVICE_GET_REGION_INFO.

    `fd` (or -1) and `fd_offset` are what a client must map for `areas`; the door owns the fd.
    """

    index: int
    size: int
    flags: int = 0
    areas: tuple[MmapArea, ...] = ()
    fd: int = -1
    fd_offset: int = 0


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """One interrupt index: `count` vectors, `flags` as in VFIO_DEVICE_GET_IRQ_INFO."""

    index: int
    count: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the device is. Ids are those of config space; `firmware` is empty where there is none to read."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    revision: int
    class_code: int
    firmware: str = ""


@dataclass(frozen=True, slots=True)
class DmaMap:
    """Guest memory at `iova`: `size` bytes of `fd` from `fd_offset`; fd -1: reachable by messages only. `prot`:
    uapi.DMA_FLAG_*.
    """

    iova: int
    size: int
    prot: int
    fd: int = -1
    fd_offset: int = 0


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory of our own that the device can reach by DMA at `iova`, `len(memory)` bytes, read and written by us as
    `memory`.
    """

    iova: int
    memory: memoryview


@dataclass(frozen=True, slots=True)
class HostEvent:
    """What the device's side says by itself: kind 'gone', 'error' or 'request' (the kernel wants the device back)."""

    kind: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """Numbers for operators: maps and bytes mapped now, requests made, errors answered by the device's side, and calls
    of the kernel that took long (`host/in_kernel.py`).
    """

    dma_maps: int = 0
    dma_bytes: int = 0
    requests: int = 0
    errors: int = 0
    slow_calls: int = 0
    extra: dict[str, int] = field(default_factory=dict)


class StateFile(Protocol):
    """The data of one migration session of a device that is migrated by its own side; for one coroutine at a time.

    Who is cancelled loses nothing: what was under way goes on, and the next call of the same kind has its result.
    """

    async def read(self, size: int) -> bytes:
        """The next bytes of the state, at most `size`; none: its end, or nothing for now while the device runs.

        HostError ENOMSG: nothing for now. ENODEV: the session is over.
        """
        ...

    async def write(self, data: bytes) -> None:
        """Give all of `data`. HostError: the driver refused it; what it has taken of it is unknown."""
        ...

    async def precopy_info(self) -> "PrecopyInfo":
        """What it could give now while the device runs; several may ask. HostError EINVAL in any other state."""
        ...

    def close(self) -> None:
        """Close it, at the latest when what is under way has ended. Idempotent."""
        ...


class DirtyDoor(Protocol):
    """A HostDevice that tells dirty pages without copies of its own, besides answering DMA_LOGGING_REPORT."""

    async def merge_dirty(self, iova: int, length: int, page_size: int, bits: memoryview) -> None:
        """Set in `bits` the pages of the range that were written since they were asked for last; no bit is cleared.

        Bit 0 is the page at `iova`; `bits` has whole 64-bit words. HostError: what it has not told may be forgotten.
        """
        ...


class MigrationDoor(Protocol):
    """What migrates a device by itself behind a door: its driver in the kernel, with migration protocol v2."""

    flags: int
    """uapi.MIGRATION_*."""
    migrator: str
    """What migrates it, for people and for comparison with the other side: the driver, of an mdev its type."""

    async def set_state(self, state: MigState) -> StateFile | None:
        """Lead the device to `state`, by the kernel's own way; returns the data of a session that this has opened.

        HostError: refused or failed on the way; `state()` tells where it stands. Cancelled: the change goes on.
        """
        ...

    async def state(self) -> MigState:
        """Where the device stands, once no change is under way."""
        ...

    async def data_size(self) -> int:
        """Bytes that a STOP_COPY would give now, an estimate. HostError ENOTTY where the driver cannot tell."""
        ...


class HostDevice(Protocol):
    """The real device, as a plugin and the session see it.

    All methods raise HostError with the errno of the other side; DeviceGoneError once the device is gone for good.
    """

    name: str
    """For logs: a BDF, or the path of the device's socket."""
    regions: Sequence[RegionInfo]
    """All nine regions, by index."""
    irqs: Sequence[IrqInfo]
    """All five interrupt indexes."""
    can_reset: bool
    """VFIO_DEVICE_RESET (or its like) exists."""
    dma_by_messages: bool
    """The device's side reaches client memory without fd by DMA_READ and DMA_WRITE (`relay`); hardware never does."""
    cannot_revoke: str
    """Why clearing COMMAND's memory bit does not take clients' mappings away (`--revoke`); empty: it does."""
    relay: Callable[[Command, bytes], Awaitable[bytes]] | None
    """Set by the session: sends DMA_READ or DMA_WRITE to the client. For doors whose device reaches memory by messages.
    """
    migration: MigrationDoor | None
    """What migrates the device by itself, if anything does."""

    @property
    def iova_ranges(self) -> Sequence[tuple[int, int]]:
        """Where the IOMMU takes addresses, as (first, last), ascending; none: everywhere."""
        ...

    def read(self, region: int, offset: int, width: int) -> int:
        """Register read of 1, 2, 4 or 8 bytes, little-endian, in one access."""
        ...

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """Register write of 1, 2, 4 or 8 bytes, little-endian, in one access. Returns when the device has taken it."""
        ...

    def read_block(self, region: int, offset: int, length: int) -> bytes:
        """Read `length` bytes; the door may split it into accesses. For config space and memory-like ranges."""
        ...

    def write_block(self, region: int, offset: int, data: bytes) -> None:
        """Write `data`; the door may split it into accesses."""
        ...

    def write_wide(self, region: int, offset: int, data: bytes) -> None:
        """Write 16 bytes, aligned, in one access: for mailboxes that take a command only so. HostError ENOTSUP where
        the machine cannot, EINVAL where the region may not be mapped.

        A door behind which 8 bytes are the widest access makes two of them, the low half first, as emulators do. Not
        for a function whose guest may switch its memory space off at the same time.
        """
        ...

    def identity(self) -> Identity:
        """Ids from config space."""
        ...

    async def set_irqs(
        self, index: int, flags: int, start: int, count: int, data: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        """VFIO_DEVICE_SET_IRQS. `fds` are eventfds in order start..; with DATA_EVENTFD and no fds: those vectors are
        disarmed.

        The fds are passed on (or duplicated); the caller keeps and closes its own.
        """
        ...

    async def dma_map(self, dma_map: DmaMap) -> None:
        """Make guest memory reachable for the device. The fd is passed on; the caller keeps its own."""
        ...

    async def dma_unmap(self, iova: int, size: int) -> None:
        """Undo exactly one earlier map."""
        ...

    async def dma_unmap_all(self) -> None:
        """Undo all maps of the client. Never fails on a device that is gone."""
        ...

    async def is_peer(self, fd: int) -> bool:
        """Whether `fd` is another open device, whose memory `dma_map` could make reachable for this one."""
        ...

    async def reset(self) -> str:
        """Bring the device back to its reset state by the best means there is; returns its name. HostError if none
        worked.
        """
        ...

    async def device_feature(self, flags: int, data: bytes = b"", reply_size: int = 0) -> bytes:
        """VFIO_DEVICE_FEATURE without its header; returns the data behind the header. HostError ENOTTY where not
        supported.
        """
        ...

    def scratch(self, size: int, limit: int = 1 << 64) -> AbstractAsyncContextManager[Scratch | None]:
        """DMA memory of our own below IOVA `limit` for the time of the `async with`; None where the door cannot give
        any.

        Only while the device is stopped: it may take the place of guest memory for that time, and gives it back.
        """
        ...

    def events(self) -> AsyncIterator[HostEvent]:
        """What the device's side says by itself, until it is gone or closed. One reader."""
        ...

    @property
    def native(self) -> Any:
        """The C door that the pump uses for PASS and DMA maps; opaque to Python."""
        ...

    def statistics(self) -> HostStatistics:
        """Counters since the door was opened."""
        ...

    async def aclose(self) -> None:
        """Give the device back. Idempotent."""
        ...
