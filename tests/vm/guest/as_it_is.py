"""Checks in the test machine that a function is presented as it is: `as_it_is.py group|cdev SEED`.

What VFIO tells and every access to config space is compared between whoever opens the function and the server's client:
edu (with a ROM), nvme, and a virtual function of igb. SEED makes the random writes; the machine's kernel is the oracle.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from plugins.vfio.layout import msix_table
from tests.vm.guest import checks, functions, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.raw_vfio import COMMAND, COMMAND_MEMORY, CONFIG_REGION
from tests.vm.guest.sides import Access, Raw, Served, Shape, Side, hardware
from vfu_server.testing.pci import BarInfo, ConfigSpace, capabilities, extended_capabilities, size_bars
from vfu_server.uapi import (
    PCI_CAP_ID_EXP,
    PCI_CAP_ID_MSI,
    PCI_CAP_ID_MSIX,
    REGION_INFO_FLAG_MMAP,
    RegionIndex,
)

DOOR, SEED = sys.argv[1], int(sys.argv[2])
STANDARD = 256
WIDTHS = (1, 2, 4)
STEPS = 1200
HEADER = range(0x40)
IO, PREFETCHABLE, WIDE = 0x100, 0x2000, 0x100000
"""Flags of a resource in sysfs (linux/ioport.h)."""


class SideConfig:
    """Config space of a side, for walking it."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def read(self, offset: int, width: int) -> int:
        (value,) = self._side.config([Access(offset, width)])
        if isinstance(value, str):
            raise AssertionError(f"config space at {offset:#x}: {value}")
        return value

    def write(self, offset: int, width: int, value: int) -> None:
        self._side.config([Access(offset, width, value)])


class BytesConfig:
    """Config space that was read."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, offset: int, width: int) -> int:
        return int.from_bytes(self._data[offset : offset + width], "little")

    def write(self, offset: int, width: int, value: int) -> None:
        raise AssertionError("walking writes nothing")


@dataclass(frozen=True, slots=True)
class Visit:
    """What one side said of a function, in the order of asking."""

    shape: Shape
    bars: list[BarInfo]
    capabilities: list[tuple[int, int]]
    reads: list[int | str]
    answers: list[int | str]
    rom: bytes


def every_read(size: int) -> Iterator[Access]:
    """Every offset with every width, aligned or not; of the extended part the aligned ones."""
    for width in WIDTHS:
        yield from (Access(at, width) for at in range(size - width + 1) if at < STANDARD or not at % width)


def random_steps(size: int, found: list[tuple[int, int]]) -> list[Access]:
    """Writes and reads, mostly where something is: the header and the capabilities. The same for the same SEED."""
    chance = random.Random(f"{SEED} {size} {found}")
    steps: list[Access] = []
    starts = [offset for _, offset in found]
    for _ in range(STEPS):
        place = chance.random()
        if place < 0.35:
            offset = chance.choice(HEADER)
        elif place < 0.9 and starts:
            offset = chance.choice(starts) + chance.randrange(0x3C)
        else:
            offset = chance.randrange(size)
        width = chance.choice((1, 2, 4, 4, 8))
        offset = min(offset if chance.random() < 0.2 else offset & -min(width, 4), size - width)
        if chance.random() < 0.5:
            value = chance.choice(
                (0, (1 << 8 * width) - 1, chance.getrandbits(8 * width), 1 << chance.randrange(8 * width))
            )
            steps.append(Access(offset, width, value))
        steps.append(Access(offset, width))
    return steps


def visit(side: Side, size: int, steps: list[Access]) -> Visit:
    config = SideConfig(side)
    reads = side.config(list(every_read(size)))
    bars, found, shape = size_bars(config), walked(config, size), side.shape()
    config.write(COMMAND, 2, COMMAND_MEMORY)
    rom = side.block(RegionIndex.ROM, shape.regions[RegionIndex.ROM][1])
    answers = side.config(steps)
    clear_away(side, size, reads[:size])
    return Visit(shape, bars, found, reads, answers, rom)


def clear_away(side: Side, size: int, before: list[int | str]) -> None:
    """Write back what reads otherwise now, byte by byte. QEMU's functions keep what is written where nothing is, and
    neither the kernel nor a reset clears that.
    """
    after = side.config([Access(at, 1) for at in range(size)])
    changed = [at for at in range(len(HEADER), size) if before[at] != after[at]]
    side.config([Access(at, 1, int(before[at])) for at in changed])


def walked(config: ConfigSpace, size: int) -> list[tuple[int, int]]:
    """(id, offset) of each capability, standard ones first."""
    found = capabilities(config) + (extended_capabilities(config) if size > STANDARD else [])
    return [(one.id, one.offset) for one in found]


@cache
def visits(bdf: str) -> tuple[Visit, Visit, list[Access]]:
    """The function as the server's client sees it, as VFIO shows it, and the random steps that both were asked."""
    with Raw(bdf, DOOR) as raw:
        size = raw.shape().regions[CONFIG_REGION][1]
        steps = random_steps(size, walked(SideConfig(raw), size))
    with Served(bdf, "--mmap", "all", "--option", "without-reset=serve") as served:
        ours = visit(served, size, steps)
    with Raw(bdf, DOOR) as raw:
        theirs = visit(raw, size, steps)
    return ours, theirs, steps


def each() -> Iterator[tuple[str, Visit, Visit]]:
    """The address of each function with its two visits."""
    for bdf in (edu(), nvme(), virtual()):
        yield bdf, *visits(bdf)[:2]


def edu() -> str:
    return functions.ready(pci.EDU)


def nvme() -> str:
    return functions.ready(pci.NVME)


def virtual() -> str:
    return functions.virtual_functions()[0]


def check_visiting_edu() -> None:
    equal(len(visits(edu())[0].reads) > 3 * 250, True, "reads")


def check_visiting_nvme() -> None:
    equal(len(visits(nvme())[0].reads) > 4096 // 4, True, "reads")


def check_visiting_a_virtual_function() -> None:
    equal(len(visits(virtual())[0].reads) > 4096 // 4, True, "reads")


def check_regions_interrupts_and_reset_are_the_same() -> None:
    for bdf, ours, theirs in each():
        equal(ours.shape.irqs, theirs.shape.irqs, f"{bdf}: flags and counts of interrupts")
        equal(ours.shape.resets, theirs.shape.resets, f"{bdf}: whether it resets")
        for index, (our, their) in enumerate(zip(ours.shape.regions, theirs.shape.regions, strict=True)):
            if their != our and only_the_msix_table(bdf, index, their[1]):
                their = their[0] & ~REGION_INFO_FLAG_MMAP, their[1]
            equal(our, their, f"{bdf}: flags and size of region {index}")
    equal([visits(bdf)[0].shape.resets for bdf in (edu(), nvme(), virtual())], [False, True, True], "resets")


def only_the_msix_table(bdf: str, index: int, size: int) -> bool:
    """Nothing of the BAR can be mapped but for the pages of the table."""
    table = msix_table(hardware(bdf)[:256])
    return table is not None and table.region == index and table.pages[1] - table.pages[0] >= size


def check_every_read_is_the_same() -> None:
    for bdf, ours, theirs in each():
        size = theirs.shape.regions[CONFIG_REGION][1]
        for access, our, their in zip(every_read(size), ours.reads, theirs.reads, strict=True):
            equal(our, their, f"{bdf}: {access}")


def check_random_writes_lead_to_the_same() -> None:
    for bdf, ours, theirs in each():
        steps = visits(bdf)[2]
        for at, (our, their) in enumerate(zip(ours.answers, theirs.answers, strict=True)):
            if our != their:
                before = "; ".join(str(step) for step in steps[max(0, at - 12) : at] if step.value is not None)
                equal(our, their, f"{bdf}, seed {SEED}, step {at}: {steps[at]} after {before}")
        told = sum(step.value is None and answer != 0 for step, answer in zip(steps, ours.answers, strict=True))
        equal(told > 100, True, f"{bdf}: reads that gave something ({told})")


def check_bars_are_those_of_the_hardware() -> None:
    for bdf, ours, theirs in each():
        equal(ours.bars, theirs.bars, f"{bdf}: BARs as firmware sizes them")
        with open(pci.DEVICES / bdf / "resource") as resource:
            lines = [[int(word, 16) for word in line.split()] for line in resource][:6]
        wanted = [
            BarInfo(index, last - first + 1, bool(flags & IO), bool(flags & WIDE), bool(flags & PREFETCHABLE))
            for index, (first, last, flags) in enumerate(lines)
            if flags
        ]
        equal(ours.bars, wanted, f"{bdf}: BARs as the kernel has them")
    equal([bar.wide and bar.prefetchable for bar in visits(virtual())[0].bars], [True, True], "64-bit, prefetchable")


def check_capabilities_are_where_they_are() -> None:
    for bdf, ours, theirs in each():
        equal(ours.capabilities, theirs.capabilities, f"{bdf}: capabilities")
        config = hardware(bdf)
        real = walked(BytesConfig(config), len(config))
        equal([one for one in ours.capabilities if one not in real], [], f"{bdf}: not at a real place, of {real}")
        hidden = [one for one in real if one not in ours.capabilities]
        equal([one for one in hidden if one[1] < STANDARD], [], f"{bdf}: standard capabilities that are hidden")
    kinds = {bdf: {one[0] for one in ours.capabilities if one[1] < STANDARD} for bdf, ours, _ in each()}
    equal(PCI_CAP_ID_MSI in kinds[edu()], True, "edu has MSI")
    equal({PCI_CAP_ID_EXP, PCI_CAP_ID_MSIX} <= kinds[nvme()] & kinds[virtual()], True, "the others have MSI-X, PCIe")


def check_rom_is_the_devices() -> None:
    ours, theirs, _ = visits(edu())
    equal((len(ours.rom), ours.rom == theirs.rom), (len(theirs.rom), True), "edu's ROM, of both sides")
    equal(ours.rom[: functions.ROM_SIZE] == functions.option_rom(SEED), True, "it is what the machine was given")
    equal([len(visits(bdf)[0].rom) for bdf in (nvme(), virtual())], [0, 0], "ROMs of those without")


checks.run(globals())
