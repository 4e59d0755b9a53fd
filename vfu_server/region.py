"""An access policy made ready: the table that C walks, the areas a client may map, and the print-out for people.

Decisions only: it knows no client and no device beyond the sizes and areas of its regions.

How far a client is trusted with mappings is the operator's choice (`--mmap`). A mapping cannot be taken back over
vfio-user, and the fd that goes with it opens the whole device to whoever holds it:

- `never`: none. Every access is answered by the table.
- `plugin`: ranges whose rule says MMAP in every state of a device that can run or be restored, that is, those that the
  plugin calls harmless while the device is stopped.
- `all`: every range whose rule says MMAP while the device runs, and nothing that the plugin did not name.

A plugin that says why its device must not be mapped (`Policy.mmap_never`) is believed in every mode.
"""

import enum
import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from vfu_server.errors import PluginError, UsageError
from vfu_server.host_device import MmapArea, RegionInfo
from vfu_server.policy import WIDTH_ANY, Answer, Answers, Policy, Rule, StateClass
from vfu_server.uapi import HOST_PAGE_SIZE, REGION_INFO_FLAG_MMAP, RegionIndex

if TYPE_CHECKING:
    from rich.table import Table

Areas = Mapping[int, Sequence[MmapArea]]
"""By region index: the areas that are handed out, ascending, page aligned, apart from each other."""


class MmapMode(enum.StrEnum):
    """The values of `--mmap`."""

    NEVER = "never"
    PLUGIN = "plugin"
    ALL = "all"

    @classmethod
    def parse(cls, text: str) -> "MmapMode":
        """The mode of that name. Raises UsageError."""
        try:
            return cls(text)
        except ValueError:
            raise UsageError(f"--mmap {text}: it is one of {', '.join(mode.value for mode in cls)}") from None


_HARMLESS_AT_REST: Final = (StateClass.RUNNING, StateClass.P2P, StateClass.STOPPED, StateClass.RESUMING)


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """One line of the table that C walks: `[start, end)` of a region.

    `read` and `write`: one `Answer` for each `StateClass`, as bytes. `widths`: WIDTH_ bits. `errno` goes with REFUSE.
    """

    region: int
    start: int
    end: int
    read: bytes
    write: bytes
    widths: int
    errno: int


def may_map(rule: Rule, policy: Policy, mode: MmapMode) -> bool:
    """The mode and the plugin allow that a client maps the rule's range, if the device can be mapped there."""
    if mode is MmapMode.NEVER or policy.mmap_never:
        return False
    classes = (StateClass.RUNNING,) if mode is MmapMode.ALL else _HARMLESS_AT_REST
    return all(answers[each] == Answer.MMAP for each in classes for answers in (rule.read, rule.write))


def shown_regions(regions: Sequence[RegionInfo], sizes: Mapping[int, int]) -> tuple[RegionInfo, ...]:
    """`regions` as a client is to see them: those of `sizes` so much shorter, with their areas cut. PluginError."""
    for index, size in sizes.items():
        if not 0 <= index < len(regions) or index == RegionIndex.CONFIG or not 0 < size <= regions[index].size:
            raise PluginError(f"region {index} cannot be shown with {size:#x} bytes")
        if size & (size - 1):
            raise PluginError(f"region {index} cannot be shown with {size:#x} bytes: that is no power of two")
    return tuple(_shorter(r, sizes[r.index]) if r.index in sizes else r for r in regions)


def _shorter(region: RegionInfo, size: int) -> RegionInfo:
    areas = tuple(MmapArea(a.offset, min(a.size, size - a.offset)) for a in region.areas if a.offset < size)
    if region.areas and not areas:  # none are left: no areas at all would mean that all may be mapped
        return replace(region, size=size, flags=region.flags & ~REGION_INFO_FLAG_MMAP, areas=())
    return replace(region, size=size, areas=areas)


def mmap_areas(policy: Policy, regions: Iterable[RegionInfo], mode: MmapMode) -> dict[int, tuple[MmapArea, ...]]:
    """The areas that may be handed out, of those that the device offers; regions without any are left out.

    A device that says MMAP but names no areas can be mapped as a whole (the kernel's rule). Whole pages only.
    """
    result = {}
    for region in regions:
        if not region.flags & REGION_INFO_FLAG_MMAP or region.fd < 0:
            continue
        rules = [rule for rule in policy.rules if rule.region == region.index and may_map(rule, policy, mode)]
        allowed = [(rule.start, rule.end) for rule in rules]
        offered = [(area.offset, area.offset + area.size) for area in region.areas] or [(0, region.size)]
        pages = _whole_pages(_common(_merge(allowed), _merge(offered)), region.size)
        if pages:
            result[region.index] = tuple(MmapArea(start, end - start) for start, end in pages)
    return result


def compile_rules(
    policy: Policy, mode: MmapMode, region_sizes: Mapping[int, int], areas: Areas | None = None
) -> tuple[CompiledRule, ...]:
    """The table for C: sorted by region and start, without overlap.

    MMAP stays where the client can really map (inside `areas`; without `areas`, wherever `mode` allows it) and is PASS
    elsewhere: a rule that is mapped in parts is cut. Config space is added. Raises PluginError for a policy that cannot
    be meant.
    """
    complete = _complete(policy, region_sizes)
    compiled = []
    for rule in sorted(complete.rules, key=lambda rule: (rule.region, rule.start)):
        mapped = _mapped_ranges(rule, complete, mode, areas)
        for start, end, keep in _cut(rule.start, rule.end, mapped):
            read, write = (answers if keep else _unmapped(answers) for answers in (rule.read, rule.write))
            compiled.append(
                CompiledRule(
                    rule.region, start, end, bytes(read.as_tuple()), bytes(write.as_tuple()), rule.widths, rule.errno
                )
            )
    return tuple(compiled)


def _complete(policy: Policy, region_sizes: Mapping[int, int]) -> Policy:
    sizes = dict(region_sizes)
    if config := sizes.get(RegionIndex.CONFIG, 0):
        policy = policy.with_config_space(config)
    policy.check(sizes)
    return policy


def _unmapped(answers: Answers) -> Answers:
    return Answers(*(Answer.PASS if answer == Answer.MMAP else answer for answer in answers.as_tuple()))


def _mapped_ranges(rule: Rule, policy: Policy, mode: MmapMode, areas: Areas | None) -> list[tuple[int, int]]:
    if not may_map(rule, policy, mode):
        return []
    if areas is None:
        return [(rule.start, rule.end)]
    offered = [(area.offset, area.offset + area.size) for area in areas.get(rule.region, ())]
    return _common([(rule.start, rule.end)], _merge(offered))


# --- ranges as (start, end), ascending and apart


def _merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _common(left: Sequence[tuple[int, int]], right: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    common = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            common.append((start, end))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return common


def _whole_pages(ranges: Iterable[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """What of the ranges can be mapped without a byte beside it: in pages of this machine, which may be larger than a
    device's.
    """
    page, pages = HOST_PAGE_SIZE, []
    for start, end in ranges:
        first, last = -(-start // page) * page, min(end, limit) // page * page
        if first < last:
            pages.append((first, last))
    return pages


def _cut(start: int, end: int, inside: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """`[start, end)` in pieces, each with whether it is one of the ranges `inside`."""
    at = start
    for first, last in inside:
        if at < first:
            yield at, first, False
        yield first, last, True
        at = last
    if at < end:
        yield at, end, False


# --- for people


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One line of the print-out: a rule, or a gap between rules (`rule` is then one that refuses everything)."""

    rule: Rule
    mapped: bool
    gap: bool


_REFUSED: Final = Answers.always(Answer.REFUSE)


def policy_rows(policy: Policy, region_sizes: Mapping[int, int], mode: MmapMode) -> tuple[PolicyRow, ...]:
    """All bytes of all regions in order, gaps included. Raises PluginError as `compile_rules`."""
    complete = _complete(policy, region_sizes)
    rows = [PolicyRow(rule, may_map(rule, complete, mode), gap=False) for rule in complete.rules]
    for region, start, length in complete.gaps(dict(region_sizes)):
        rule = Rule(region, start, length, _REFUSED, _REFUSED, "(not declared)", "what no rule covers is refused")
        rows.append(PolicyRow(rule, mapped=False, gap=True))
    shown = [
        row
        if row.mapped
        else replace(row, rule=replace(row.rule, read=_unmapped(row.rule.read), write=_unmapped(row.rule.write)))
        for row in rows
    ]
    return tuple(sorted(shown, key=lambda row: (row.rule.region, row.rule.start)))


def region_name(region: int) -> str:
    """BAR0 to BAR5, ROM, CONFIG, VGA; or the number."""
    return RegionIndex(region).name if region in frozenset(RegionIndex) else f"region {region}"


def width_names(widths: int) -> str:
    """`1 2 4 8` or `any`."""
    return "any" if widths & WIDTH_ANY else " ".join(str(width) for width in (1, 2, 4, 8) if widths & width)


def _classes(policy: Policy) -> tuple[StateClass, ...]:
    return tuple(each for each in StateClass if policy.p2p or each is not StateClass.P2P)


def _cell(rule: Rule, state_class: StateClass) -> str:
    read, write = (_answer(rule, answers[state_class]) for answers in (rule.read, rule.write))
    return read if read == write else f"r {read}, w {write}"


def _answer(rule: Rule, answer: Answer) -> str:
    return f"refuse {errno.errorcode.get(rule.errno, rule.errno)}" if answer == Answer.REFUSE else answer.name.lower()


def _bytes(rule: Rule) -> str:
    return f"{rule.start:#x}-{rule.end - 1:#x}"


def policy_notes(policy: Policy) -> tuple[str, ...]:
    """The sentences that belong below a table."""
    notes = ["P2P: offered." if policy.p2p else "P2P: not offered."]
    if policy.p2p_reason:
        notes[0] = f"{notes[0][:-1]}: {policy.p2p_reason}"
    if policy.mmap_never:
        notes.append(f"No part of this device may be mapped by a client: {policy.mmap_never}")
    return tuple(notes)


_HEAD: Final = ("region", "bytes", "name", "widths")


def _lines(policy: Policy, region_sizes: Mapping[int, int], mode: MmapMode) -> Iterator[tuple[str, ...]]:
    for row in policy_rows(policy, region_sizes, mode):
        rule = row.rule
        cells = (_cell(rule, each) for each in _classes(policy))
        widths = "-" if row.gap else width_names(rule.widths)
        yield (region_name(rule.region), _bytes(rule), rule.name, widths, *cells, rule.reason)


def policy_table(policy: Policy, region_sizes: Mapping[int, int], mode: MmapMode, title: str = "") -> "Table":
    """The policy as a table for a terminal. A cell without `r` and `w` holds for both."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None, caption="\n".join(policy_notes(policy)), caption_justify="left")
    for head in (*_HEAD, *(each.name.lower() for each in _classes(policy)), "why"):
        table.add_column(head, no_wrap=head in ("region", "bytes"))
    for line in _lines(policy, region_sizes, mode):
        table.add_row(*(escape(cell) for cell in line))
    return table


def policy_markdown(policy: Policy, region_sizes: Mapping[int, int], mode: MmapMode) -> str:
    """The same table for a plugin's documentation, a newline at its end."""
    head = (*_HEAD, *(each.name.lower() for each in _classes(policy)), "why")
    lines = [head, ("---",) * len(head), *_lines(policy, region_sizes, mode)]
    rows = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n".join((*rows, "", *policy_notes(policy))) + "\n"


def policy_json(policy: Policy, region_sizes: Mapping[int, int], mode: MmapMode) -> dict[str, object]:
    """The policy as plain data for programs: numbers as numbers, answers by name, every byte in some entry."""
    regions: dict[int, list[dict[str, object]]] = {index: [] for index, size in sorted(region_sizes.items()) if size}
    for row in policy_rows(policy, region_sizes, mode):
        regions[row.rule.region].append(_rule_json(row))
    return {
        "mmap": mode.value,
        "mmap_never": policy.mmap_never,
        "p2p": policy.p2p,
        "p2p_reason": policy.p2p_reason,
        "regions": [
            {"index": index, "name": region_name(index), "size": region_sizes[index], "rules": rules}
            for index, rules in regions.items()
        ],
    }


def _rule_json(row: PolicyRow) -> dict[str, object]:
    rule = row.rule
    return {
        "start": rule.start,
        "length": rule.length,
        "name": rule.name,
        "declared": not row.gap,
        "mapped": row.mapped,
        "widths": [width for width in (1, 2, 4, 8) if rule.widths & width],
        "any_width": bool(rule.widths & WIDTH_ANY),
        "errno": errno.errorcode.get(rule.errno, str(rule.errno)),
        "read": {each.name.lower(): rule.read[each].name.lower() for each in StateClass},
        "write": {each.name.lower(): rule.write[each].name.lower() for each in StateClass},
        "reason": rule.reason,
    }
