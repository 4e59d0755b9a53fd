"""Which access is answered how, in which state. Nothing but config space gets through while the device is stopped."""

from collections.abc import Mapping
from dataclasses import replace

from e1000e.registers import BAR_FLASH, BAR_IO, BAR_MAC, BAR_MSIX, COUNTERS, IO, MAC, TABLES
from vfu_server.policy import WIDTH_4, WIDTH_ANY, Answer, Answers, Policy, Rule
from vfu_server.regmap import READABLE, WRITABLE, Register, RuleShape
from vfu_server.uapi import RegionIndex

PASS, TRAP, SHADOW, DISCARD = Answer.PASS, Answer.TRAP, Answer.SHADOW, Answer.DISCARD
WHY = {
    **dict.fromkeys(COUNTERS, "what was counted before a migration is added"),
    **dict.fromkeys(("CTRL", "CTRL_DUP"), "a reset is the end of what was counted before it"),
    **dict.fromkeys(("EEWR", "FLA"), "the NVM is the card's, and does not travel"),
    **dict.fromkeys(("FLSWCTL", "FLSWDATA", "FLSWCNT", "FLOP"), "the NVM is the card's, and does not travel"),
    **{f"TX[{n}].TDT": "a write starts DMA" for n in (0, 1)},
    **{f"RX[{n}].RDT": "a write gives descriptors to the device" for n in (0, 1)},
    "ICS": "a write would interrupt the guest",
    "ICR": "a read would take causes from the guest",
    "SWSM": "a read would take the semaphore",
}
NEVER_WRITTEN = frozenset({"EEC", "EEWR", "FLA", "FLSWCTL", "FLSWDATA", "FLSWCNT", "FLOP"})
WRITTEN = frozenset({"ICR", "SWSM"})
"""The kit has no access for what may be written and is changed by a read: RC is nearest."""
TABLE_NAMES = frozenset(array.name for array in TABLES)


def _while_running(running: Answer, stopped: Answer = DISCARD) -> Answers:
    return Answers(running=running, p2p=running, stopped=stopped, resuming=DISCARD, error=DISCARD)


NOTHING = Answers.always(DISCARD)


def _shape(register: Register) -> RuleShape:
    name = register.name
    shown = register.access in READABLE and name.partition("[")[0] not in TABLE_NAMES
    read = _while_running(TRAP if name in COUNTERS else PASS, SHADOW if shown else DISCARD)
    write = _while_running(PASS) if name in WRITTEN or register.access in WRITABLE else NOTHING
    if name in NEVER_WRITTEN:
        write = NOTHING
    if name in ("CTRL", "CTRL_DUP"):
        write = _while_running(TRAP)
    return RuleShape(read, write, WHY.get(name) or register.doc or "a stopped device keeps its state", WIDTH_4)


def _io_shape(_: Register) -> RuleShape:
    return RuleShape(
        _while_running(TRAP), _while_running(TRAP), "the way into BAR 0: what is trapped there is here", WIDTH_4
    )


def _whole(region: int, length: int, name: str, write: Answers, reason: str) -> Rule:
    return Rule(region, 0, length, _while_running(PASS), write, name, reason, WIDTH_ANY)


def _with_tables_whole(rules: list[Rule]) -> list[Rule]:
    """A rule for each table in the place of those for its words, so that people can read the list."""
    answers, kept = _while_running(PASS), []
    for rule in rules:
        ends = [last for first, last in _TABLE_RANGES if first <= rule.start < last]
        if not ends:
            kept.append(rule)
        elif rule.end > ends[0]:  # a gap that begins in a table and goes on behind it
            kept.append(replace(rule, start=ends[0], length=rule.end - ends[0]))
    for array, (first, last) in zip(TABLES, _TABLE_RANGES, strict=True):
        why = "a filter: a stopped device keeps its state"
        kept.append(Rule(BAR_MAC, first, last - first, answers, answers, array.name, why, WIDTH_4))
    return kept


_TABLE_RANGES = [(array.first, array.first + array.stride * array.count) for array in TABLES]


def policy_for(sizes: Mapping[int, int]) -> Policy:
    """For regions of these sizes in bytes; a card's NVM says how large flash and ROM are, or whether there are any."""
    no_register = RuleShape(NOTHING, NOTHING, "no register that the datasheet tells of", WIDTH_4)
    rules = [*_with_tables_whole(MAC.rules(BAR_MAC, _shape, no_register)), *IO.rules(BAR_IO, _io_shape, no_register)]
    never = "the flash is the card's, and does not travel"
    for region, name, write, reason in (
        (BAR_FLASH, "flash", NOTHING, never),
        (BAR_MSIX, "MSI-X", _while_running(PASS), "the client's: it sets its messages up anew"),
        (int(RegionIndex.ROM), "ROM", NOTHING, never),
    ):
        if sizes.get(region):
            rules.append(_whole(region, sizes[region], name, write, reason))
    return Policy(
        tuple(rules),
        p2p_reason="a peer's write to TDT or RDT would start DMA",
        mmap_never="statistics, doorbells and what a read changes share pages with all else",
    )
