"""What may be done with the regions of a function that nobody knows: where its MSI-X table is, and the policy.

Everything follows from what the door tells of regions and from config space. It must not touch a register.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vfu_server.host_device import RegionInfo
from vfu_server.policy import WIDTH_ANY, WIDTHS_REGISTER, Answer, Answers, Policy, Rule
from vfu_server.uapi import (
    PAGE_SIZE,
    PCI_CAP_ID_MSIX,
    PCI_CAPABILITY_LIST,
    PCI_CFG_SPACE_SIZE,
    PCI_STATUS,
    PCI_STATUS_CAP_LIST,
    REGION_INFO_FLAG_MMAP,
    RegionIndex,
)

WIDTHS = WIDTHS_REGISTER | WIDTH_ANY
PASSED = Answers.while_running(Answer.PASS, Answer.DISCARD)
MAPPED = Answers.while_running(Answer.MMAP, Answer.DISCARD)
MSIX_ENTRY = 16

PASSED_REASON = "the hardware's own business while it runs; dropped otherwise, since nobody knows which accesses act"
MAPPED_REASON = f"{PASSED_REASON}; the kernel lets it be mapped, which --mmap all hands to the client"
TABLE_REASON = "messages are set up by SET_IRQS; here the kernel answers all ones and drops what is written"
ROM_REASON = "the ROM's contents; the kernel refuses writes"


@dataclass(frozen=True, slots=True)
class MsixTable:
    """Where a function's MSI-X table is: `size` bytes from `offset` of BAR `region`."""

    region: int
    offset: int
    size: int

    @property
    def pages(self) -> tuple[int, int]:
        """First byte and end of the pages that it touches."""
        return self.offset // PAGE_SIZE * PAGE_SIZE, -(-(self.offset + self.size) // PAGE_SIZE) * PAGE_SIZE


EXAMPLE = (RegionInfo(0, 0x4000, REGION_INFO_FLAG_MMAP),)
EXAMPLE_TABLE = MsixTable(0, 0x2000, 32 * MSIX_ENTRY)


def msix_table(header: bytes) -> MsixTable | None:
    """The table, from the first 256 bytes of config space; None without MSI-X. A broken list ends where it does.

    Source: PCI Local Bus Specification 3.0, 6.8.2.
    """
    if len(header) < PCI_CFG_SPACE_SIZE or not header[PCI_STATUS] & PCI_STATUS_CAP_LIST:
        return None
    at, seen = header[PCI_CAPABILITY_LIST] & ~3, set[int]()
    while 0x40 <= at <= PCI_CFG_SPACE_SIZE - 12 and at not in seen:
        seen.add(at)
        if header[at] == PCI_CAP_ID_MSIX:
            count = (int.from_bytes(header[at + 2 : at + 4], "little") & 0x7FF) + 1
            where = int.from_bytes(header[at + 4 : at + 8], "little")
            return MsixTable(where & 7, where & ~7, count * MSIX_ENTRY)
        at = header[at + 1] & ~3
    return None


def policy_of(regions: Sequence[RegionInfo], table: MsixTable | None, *, p2p: bool = False) -> Policy:
    """Pass everything while the function runs, drop it while it does not; mapped where the kernel allows it.

    The pages of the MSI-X table are never mapped: QEMU keeps the table itself, and so does the kernel. `p2p`: the
    function's driver can hold its DMA back and still take accesses.
    """
    rules = [rule for region in regions for rule in _region_rules(region, table)]
    reason = "" if p2p else "nobody knows how to keep its own DMA back"
    return Policy(tuple(rules), p2p=p2p, p2p_reason=reason)


def _region_rules(region: RegionInfo, table: MsixTable | None) -> Iterator[Rule]:
    if not region.size or region.index == RegionIndex.CONFIG:
        return
    if region.index == RegionIndex.ROM:
        yield Rule(region.index, 0, region.size, PASSED, PASSED, "ROM", ROM_REASON, WIDTHS)
        return
    first = last = region.size
    if table is not None and table.region == region.index:
        first, last = (min(at, region.size) for at in table.pages)
    yield from _registers(region, 0, first)
    if first < last:
        yield Rule(region.index, first, last - first, PASSED, PASSED, "MSI-X table", TABLE_REASON, WIDTHS)
    yield from _registers(region, last, region.size)


def _registers(region: RegionInfo, start: int, end: int) -> Iterator[Rule]:
    """Registers from a page's beginning on: whole pages may be mapped (the server sees to it that the kernel agrees),
    the rest of a last one is passed on.
    """
    whole = end // PAGE_SIZE * PAGE_SIZE if region.flags & REGION_INFO_FLAG_MMAP else start
    if start < whole:
        yield Rule(region.index, start, whole - start, MAPPED, MAPPED, "registers", MAPPED_REASON, WIDTHS)
    if (rest := max(start, whole)) < end:
        yield Rule(region.index, rest, end - rest, PASSED, PASSED, "registers", PASSED_REASON, WIDTHS)
