"""What a guest may do with the regions of a virtual function in which state, and why.

Everything follows from sizes and config space; no register is touched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from plugins.mlx5.registers import INIT_SEGMENT, INIT_SEGMENT_SIZE
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

INIT_PAGES: Final = -(-INIT_SEGMENT_SIZE // PAGE_SIZE) * PAGE_SIZE
WIDTHS: Final = WIDTHS_REGISTER | WIDTH_ANY

SEGMENT: Final = Answers(Answer.PASS, Answer.SHADOW, Answer.SHADOW, Answer.DISCARD, Answer.DISCARD)
DOORBELLS: Final = Answers(Answer.MMAP, Answer.MMAP, Answer.MMAP, Answer.MMAP, Answer.DISCARD)
RESERVED: Final = Answers(Answer.PASS, Answer.PASS, Answer.DISCARD, Answer.DISCARD, Answer.DISCARD)
UNMAPPED: Final = Answers(Answer.PASS, Answer.PASS, Answer.DISCARD, Answer.DISCARD, Answer.DISCARD)
TABLE: Final = Answers.while_running(Answer.PASS, Answer.DISCARD)

SEGMENT_REASON: Final = (
    "the function's own command interface: a command needs the function's DMA, so in P2P and STOP a doorbell is kept "
    "until it runs again, and reads give what was there, since all ones would tell a driver that the card is dead"
)
RESERVED_REASON: Final = "no register is known there, so nothing is kept: that would be a read for each eight bytes"
DOORBELL_REASON: Final = (
    "doorbell pages (UAR), far too hot to be trapped; a suspended function drops what is written, its vendor says, and "
    "a mapping cannot be taken back anyway"
)
UNMAPPED_REASON: Final = "doorbell pages (UAR) that the door does not let be mapped: dropped unless the function runs"
TABLE_REASON: Final = "messages are set up by SET_IRQS; the table is never mapped"
OTHER_REASON: Final = "nothing of this family is known there: passed on while it runs"
GRAIN: Final = 32
"""Bytes between registers of the initialization segment that are taken for part of it."""
NO_P2P: Final = "nothing here can suspend the function's initiator alone"


@dataclass(frozen=True, slots=True)
class MsixTable:
    """`size` bytes from `offset` of BAR `region`."""

    region: int
    offset: int
    size: int


EXAMPLE: Final = (RegionInfo(0, 0x200000, REGION_INFO_FLAG_MMAP),)
EXAMPLE_TABLE: Final = MsixTable(0, 0x3000, 12 * 16)


def msix_table(header: bytes) -> MsixTable | None:
    """The table, from the first 256 bytes of config space; None without MSI-X.

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
            return MsixTable(where & 7, where & ~7, count * 16)
        at = header[at + 1] & ~3
    return None


def policy_of(regions: Sequence[RegionInfo], table: MsixTable | None, *, p2p: bool) -> Policy:
    """The whole policy. `p2p`: something can suspend the initiator alone."""
    rules = [rule for region in regions for rule in _region_rules(region, table)]
    return Policy(tuple(rules), p2p=p2p, p2p_reason="" if p2p else NO_P2P)


def _region_rules(region: RegionInfo, table: MsixTable | None) -> Iterator[Rule]:
    if not region.size or region.index == RegionIndex.CONFIG:
        return
    if region.index != RegionIndex.BAR0:
        yield Rule(region.index, 0, region.size, TABLE, TABLE, "other", OTHER_REASON, WIDTHS)
        return
    first = last = region.size
    if table is not None and table.region == region.index:
        first = min(table.offset // PAGE_SIZE * PAGE_SIZE, region.size)
        last = min(-(-(table.offset + table.size) // PAGE_SIZE) * PAGE_SIZE, region.size)
    yield from _span(region, 0, first)
    if first < last:
        yield Rule(region.index, first, last - first, TABLE, TABLE, "MSI-X table", TABLE_REASON, WIDTHS)
    yield from _span(region, last, region.size)


def _segment_spans() -> list[tuple[int, int]]:
    """Where the initialization segment has registers: (first, end), in whole grains, ascending."""
    found: list[tuple[int, int]] = []
    for register in INIT_SEGMENT:
        first, end = register.offset // GRAIN * GRAIN, -(-register.end // GRAIN) * GRAIN
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((first, end))
    return found


def _span(region: RegionInfo, start: int, end: int) -> Iterator[Rule]:
    """Initialization segment and doorbell pages between two places."""
    middle = min(max(start, INIT_PAGES), end)
    at = start
    for first, last in _segment_spans():
        first, last = max(first, at), min(last, middle)
        if first < last:
            if at < first:
                yield Rule(region.index, at, first - at, RESERVED, RESERVED, "reserved", RESERVED_REASON, WIDTHS)
            name = "initialization segment"
            yield Rule(region.index, first, last - first, SEGMENT, SEGMENT, name, SEGMENT_REASON, WIDTHS_REGISTER)
            at = last
    if at < middle:
        yield Rule(region.index, at, middle - at, RESERVED, RESERVED, "reserved", RESERVED_REASON, WIDTHS)
    whole = end // PAGE_SIZE * PAGE_SIZE if region.flags & REGION_INFO_FLAG_MMAP else middle
    if middle < whole:
        yield Rule(region.index, middle, whole - middle, DOORBELLS, DOORBELLS, "doorbells", DOORBELL_REASON, WIDTHS)
    rest = max(middle, whole)
    if rest < end:
        yield Rule(region.index, rest, end - rest, UNMAPPED, UNMAPPED, "doorbells", UNMAPPED_REASON, WIDTHS)
