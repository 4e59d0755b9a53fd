"""Decisions about DMA maps that C does not take alone: what a map without memory behind it is, what it means for the
device, and which pages count as written when nobody watches them.

Decisions only: it maps nothing, and knows no IOMMU and no file descriptor's content.
"""

import enum
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from vfu_server.errors import ClientError
from vfu_server.feature import MAX_LOGGING_RANGES
from vfu_server.host_device import DmaMap, RegionInfo
from vfu_server.uapi import (
    DMA_BITMAP,
    DMA_FLAG_READ,
    DMA_FLAG_WRITE,
    DMA_MAP,
    DMA_UNMAP,
    DMA_UNMAP_FLAG_ALL,
    DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
    PAGE_SIZE,
    PCI_BASE_ADDRESS_0,
    PCI_CFG_SPACE_SIZE,
    PCI_COMMAND,
    PCI_COMMAND_MEMORY,
)

ADDRESS_SPACE: Final = 1 << 64
NOTHING_MAPPED: Final = 1 << 32
"""Bytes from address 0 on that are watched for a client that has no memory yet."""
_FILE_END: Final = 1 << 63
_NUM_BARS: Final = 6
# Base address registers (linux/pci_regs.h): I/O, memory type and its value for 64 bits, the address.
_BAR_IO: Final = 0x1
_BAR_TYPE_MASK: Final = 0x6
_BAR_TYPE_64: Final = 0x4
_BAR_ADDRESS: Final = 0xFFFFFFF0


# --- what was asked


def parse_dma_map(payload: bytes, fd: int = -1) -> DmaMap:
    """The map that a DMA_MAP message asks for; `fd` came with it, or -1. The fd's offset counts only with an fd.

    Raises ClientError. EINVAL: too short, neither readable nor writeable, an unknown flag (the protocol's "mmap" and
    "file I/O" are not offered), size 0, address, size or offset not in whole pages. EOVERFLOW: the range runs over the
    end of addresses, or of files.
    """
    if len(payload) < DMA_MAP.size:
        raise ClientError(f"DMA_MAP: {len(payload)} bytes are too short, {DMA_MAP.size} are needed")
    argsz, flags, offset, iova, size = DMA_MAP.unpack_from(payload)
    if argsz < DMA_MAP.size:
        raise ClientError(f"DMA_MAP: argsz {argsz} is below {DMA_MAP.size}")
    if not flags or flags & ~(DMA_FLAG_READ | DMA_FLAG_WRITE):
        raise ClientError(f"DMA_MAP {iova:#x}+{size:#x}: flags {flags:#x}, which are not read, write or both")
    check_range("DMA_MAP", iova, size)
    if fd < 0:
        return DmaMap(iova, size, flags)
    if offset % PAGE_SIZE:
        raise ClientError(f"DMA_MAP {iova:#x}+{size:#x}: file offset {offset:#x} is not a multiple of {PAGE_SIZE:#x}")
    if offset + size >= _FILE_END:
        raise ClientError(f"DMA_MAP {iova:#x}+{size:#x}: no file has bytes at {offset:#x}+{size:#x}", errno.EOVERFLOW)
    return DmaMap(iova, size, flags, fd, offset)


@dataclass(frozen=True, slots=True)
class DmaUnmap:
    """What a DMA_UNMAP message asks for: all maps inside `[iova, iova + size)`, or every map.

    `page_size` is not 0 if the pages that were written shall be told: in `bitmap_size` bytes behind the reply.
    """

    iova: int
    size: int
    everything: bool = False
    page_size: int = 0
    bitmap_size: int = 0


def parse_dma_unmap(payload: bytes, max_bitmap: int) -> DmaUnmap:
    """Decode and check a DMA_UNMAP message; `max_bitmap`: the bytes of bitmap that one reply may carry.

    Raises ClientError. EINVAL: too short, unknown flags, ALL with a range or a bitmap, size 0, not in whole pages, a
    page size that is none, too little room for the bitmap. EOVERFLOW: over the end of addresses. E2BIG: a bitmap larger
    than a reply may be.
    """
    if len(payload) < DMA_UNMAP.size:
        raise ClientError(f"DMA_UNMAP: {len(payload)} bytes are too short, {DMA_UNMAP.size} are needed")
    argsz, flags, iova, size = DMA_UNMAP.unpack_from(payload)
    if argsz < DMA_UNMAP.size:
        raise ClientError(f"DMA_UNMAP: argsz {argsz} is below {DMA_UNMAP.size}")
    if flags & ~(DMA_UNMAP_FLAG_ALL | DMA_UNMAP_FLAG_GET_DIRTY_BITMAP):
        raise ClientError(f"DMA_UNMAP {iova:#x}+{size:#x}: unknown flags {flags:#x}")
    if flags & DMA_UNMAP_FLAG_ALL:
        if iova or size or flags & DMA_UNMAP_FLAG_GET_DIRTY_BITMAP:
            raise ClientError(f"DMA_UNMAP of everything, with range {iova:#x}+{size:#x} or a bitmap")
        return DmaUnmap(0, 0, everything=True)
    check_range("DMA_UNMAP", iova, size)
    if not flags & DMA_UNMAP_FLAG_GET_DIRTY_BITMAP:
        return DmaUnmap(iova, size)
    if len(payload) < DMA_UNMAP.size + DMA_BITMAP.size:
        raise ClientError(f"DMA_UNMAP {iova:#x}+{size:#x}: no page size came for its bitmap")
    page_size, room = DMA_BITMAP.unpack_from(payload, DMA_UNMAP.size)
    if page_size < PAGE_SIZE or page_size & (page_size - 1) or iova % page_size or size % page_size:
        raise ClientError(f"DMA_UNMAP {iova:#x}+{size:#x}: not in pages of {page_size:#x}")
    needed = bitmap_bytes(size, page_size)
    if room < needed:
        raise ClientError(f"DMA_UNMAP {iova:#x}+{size:#x}: a bitmap of {room} bytes is too small, {needed} are needed")
    if needed > max_bitmap:
        raise ClientError(f"DMA_UNMAP {iova:#x}+{size:#x}: a bitmap of {needed} bytes is too large", errno.E2BIG)
    return DmaUnmap(iova, size, False, page_size, needed)


def check_range(what: str, iova: int, size: int) -> None:
    """Raise ClientError for a range that is not whole pages of the address space; one that ends at its end is fine."""
    if size == 0 or iova % PAGE_SIZE or size % PAGE_SIZE:
        raise ClientError(f"{what} {iova:#x}+{size:#x}: not whole pages of {PAGE_SIZE:#x} bytes")
    if iova + size > ADDRESS_SPACE:
        raise ClientError(f"{what} {iova:#x}+{size:#x}: runs over the end of addresses", errno.EOVERFLOW)


# --- what a map is


@dataclass(frozen=True, slots=True)
class BarPlacement:
    """Where the guest has put a BAR: `[start, end)` of its address space, in whole pages."""

    owner: str
    bar: int
    start: int
    end: int


def bar_placements(owner: str, config: bytes, regions: Sequence[RegionInfo]) -> tuple[BarPlacement, ...]:
    """The memory BARs that device `owner` decodes now, by its config space as the guest last wrote it.

    None while memory decoding is off. A BAR at address 0 is not placed (QEMU and the kernel see it so, too).
    """
    config = bytes(config[:PCI_CFG_SPACE_SIZE]).ljust(PCI_CFG_SPACE_SIZE, b"\0")
    if not int.from_bytes(config[PCI_COMMAND : PCI_COMMAND + 2], "little") & PCI_COMMAND_MEMORY:
        return ()
    sizes = {region.index: region.size for region in regions}
    placed = []
    for bar in range(_NUM_BARS):
        at = PCI_BASE_ADDRESS_0 + 4 * bar
        low = int.from_bytes(config[at : at + 4], "little")
        size = sizes.get(bar, 0)
        if not size or low & _BAR_IO:
            continue
        start = low & _BAR_ADDRESS
        if low & _BAR_TYPE_MASK == _BAR_TYPE_64 and bar + 1 < _NUM_BARS:
            start |= int.from_bytes(config[at + 4 : at + 8], "little") << 32
        end = -(-(start + size) // PAGE_SIZE) * PAGE_SIZE
        if start and end <= ADDRESS_SPACE:
            placed.append(BarPlacement(owner, bar, start // PAGE_SIZE * PAGE_SIZE, end))
    return tuple(placed)


class MapKind(enum.Enum):
    """What is behind a DMA map."""

    MEMORY = "memory"
    """Guest memory with a file: it goes into the IOMMU."""
    PEER = "peer"
    """Another device's BAR, or our own: accepted and not mapped; DMA to it faults in the IOMMU."""
    P2P = "p2p"
    """Another device's BAR, by that device's file: it goes into the IOMMU, since the operator and the plugin allow it.
    """
    ROM = "rom"
    """Memory that nobody writes, without a file: accepted and not mapped. Nothing can get dirty in it."""
    UNREACHABLE = "unreachable"
    """Guest memory without a file: hardware cannot reach it. Accepted and not mapped, and no migration is offered."""


@dataclass(frozen=True, slots=True)
class MapDecision:
    """What is done with a map, and the sentence for the log (empty where there is nothing to say)."""

    kind: MapKind
    text: str = ""

    @property
    def into_iommu(self) -> bool:
        """The map is to be made; otherwise it is answered with success and nothing is done."""
        return self.kind in (MapKind.MEMORY, MapKind.P2P)

    @property
    def migratable(self) -> bool:
        """The map is no reason to refuse migration."""
        return self.kind is not MapKind.UNREACHABLE


CURE: Final = (
    "with QEMU, -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem shares main memory, "
    "-machine aux-ram-share=on that of its devices"
)


def decide_map(
    dma_map: DmaMap, bars: Iterable[BarPlacement], *, memory_fd: bool = True, p2p: bool = False
) -> MapDecision:
    """What a map on a hardware door is. `bars`: those of our own device and of its peers in this process.

    `memory_fd`: the fd that came (if any) is a regular file, as memfd, hugetlbfs and shared memory are. A VFIO device's
    fd is not, and opens that whole device: it must never be mapped as memory. `p2p`: it is one, and DMA between devices
    is allowed.
    """
    where = f"DMA_MAP {dma_map.iova:#x}+{dma_map.size:#x}"
    if dma_map.fd >= 0:
        if memory_fd:
            return MapDecision(MapKind.MEMORY)
        if p2p:
            return MapDecision(MapKind.P2P, f"{where}: memory of another device, which this one may reach")
        return MapDecision(MapKind.PEER, f"{where}: memory of another device, accepted and not mapped")
    for bar in bars:
        if bar.start <= dma_map.iova and dma_map.iova + dma_map.size <= bar.end:
            return MapDecision(MapKind.PEER, f"{where}: BAR{bar.bar} of {bar.owner}, accepted and not mapped")
    if not dma_map.prot & DMA_FLAG_WRITE:
        return MapDecision(MapKind.ROM, f"{where}: read-only and without a file descriptor, accepted and not mapped")
    return MapDecision(
        MapKind.UNREACHABLE,
        f"{where}: guest memory without a file descriptor, which the hardware cannot reach: DMA to it faults, and this "
        f"device is not migrated while it is there; {CURE}; a BAR of another server's device counts as such, too: one "
        "server knows the BARs of all its devices",
    )


_CAUSES: Final = {
    errno.ENOSPC: "the host's limit on the number of maps is reached (vfio_iommu_type1.dma_entry_limit, 65535 by "
    "default): larger guest pages or fewer memory slots need fewer",
    errno.ENOMEM: "the host lets this process pin no more memory: raise RLIMIT_MEMLOCK (LimitMEMLOCK=infinity in "
    "a systemd unit) to the guest's memory and some more",
    errno.EEXIST: "a part of the range is mapped already",
    errno.EFAULT: "the client's file has no memory there: it is shorter than the map",
    errno.EPERM: "the client's file may not be mapped so (sealed, or opened read-only)",
    errno.EACCES: "the client's file may not be mapped so (sealed, or opened read-only)",
    errno.EINVAL: "the IOMMU does not take it: a reserved range (such as the one for interrupts), or not in its pages",
}
_P2P_CAUSES: Final = {
    errno.EFAULT: "the kernel does not give one device's memory to another: an iommufd cannot, a type1 container can "
    "while the other device decodes its memory",
    errno.EINVAL: "the other device's file has no memory to map there, or the IOMMU does not take the range",
}
_UNREACHABLE_CAUSES: Final = {errno.ENOSPC: "that many pieces of memory without a file descriptor are all we remember"}
_CAUSES_OF: Final = {MapKind.P2P: {**_CAUSES, **_P2P_CAUSES}, MapKind.UNREACHABLE: {**_CAUSES, **_UNREACHABLE_CAUSES}}


def explain_map_failure(dma_map: DmaMap, error: int, maps: int, kind: MapKind = MapKind.MEMORY) -> str:
    """The sentence for the log when the host refused a map with errno `error`; `maps` are in place."""
    cause = _CAUSES_OF.get(kind, _CAUSES).get(error, "the host refused it")
    name = errno.errorcode.get(error, str(error))
    return f"DMA_MAP {dma_map.iova:#x}+{dma_map.size:#x} failed with {name}, {maps} maps in place: {cause}"


# --- what counts as written


def bitmap_bytes(length: int, page_size: int) -> int:
    """Bytes of a dirty bitmap for `length` bytes: whole 64-bit words."""
    pages = -(-length // page_size)
    return -(-pages // 64) * 8


def logging_ranges(
    ranges: Sequence[tuple[int, int]], maps: Sequence[DmaMap], page_size: int
) -> tuple[tuple[int, int], ...]:
    """The `(iova, length)` that a device is told to watch: those that the client named, else all that is mapped now.

    Ascending, in whole pages, at most `MAX_LOGGING_RANGES`: those with the smallest gaps between them become one.
    """
    if ranges:
        return tuple(sorted(ranges))
    last_end = ADDRESS_SPACE - page_size  # a range that ends with the last address is refused by the kernel
    spans = [
        (m.iova // page_size * page_size, min(-(-(m.iova + m.size) // page_size) * page_size, last_end)) for m in maps
    ]
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif start < end:
            merged.append((start, end))
    gaps = sorted((after[0] - before[1] for before, after in pairwise(merged)), reverse=True)
    least = gaps[MAX_LOGGING_RANGES - 1] if len(gaps) >= MAX_LOGGING_RANGES else 0
    joined: list[tuple[int, int]] = []
    for start, end in merged:
        if joined and start - joined[-1][1] <= least:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple((start, end - start) for start, end in joined) or ((0, NOTHING_MAPPED),)
