"""What a guest may do with a VF's registers, in which state, and how much of BAR2 it sees.

Everything follows from the sizes of the regions and the mode. It must not touch a register.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from plugins.hns.registers import (
    DOORBELL_PAGE,
    DOORBELL_REGION,
    DOORBELL_SQ_CQ,
    FUNCTION,
    HALF,
    MAILBOX,
    MAILBOX_SIZE,
    QM_REGION,
    VF_SIZE,
)
from vfu_server.policy import WIDTH_ANY, WIDTHS_REGISTER, Answer, Answers, Policy, Rule
from vfu_server.regmap import READABLE, Register, RuleShape
from vfu_server.uapi import RegionIndex

P2P_REASON: Final = "the devices are endpoints inside of the processor, with no PCI path between them"
MMAP_NEVER: Final = (
    "behind the guest's half of BAR2 are shadows of its queues' contexts, in the same page where pages have 64 KiB; "
    "and the file of a mapping would open both halves"
)
MAILBOX_REASON: Final = (
    "one mailbox for the guest and for us: while it runs, its commands are passed on as one store of 16 bytes; "
    "while the mailbox is ours, it is busy for the guest"
)
DOORBELL_REASON: Final = "a doorbell starts work: one that comes while it is stopped is kept until it runs again"
REGISTER_REASON: Final = "reads give the value at the stop; a write is kept until it runs again"
GAP_REASON: Final = "the hardware answers here too: passed on while it runs, nothing to keep while it does not"
OTHER_REASON: Final = "not the queue manager's: passed on while it runs, dropped while it does not"
MOST_PAGES: Final = 1024
"""Doorbell pages of one function, at most."""

_MAILBOX_NAMES: Final = frozenset(r.name for r in FUNCTION if MAILBOX <= r.offset < MAILBOX + MAILBOX_SIZE)


def shown_sizes(sizes: Mapping[int, int], *, pf_ctrl: bool) -> dict[int, int]:
    """What of the regions the guest sees less than there is: half of BAR2, unless migration has its window elsewhere.

    `sizes`: the door's, by index. A kernel driver that migrates has halved it already.
    """
    return {QM_REGION: HALF} if not pf_ctrl and sizes.get(QM_REGION) == VF_SIZE else {}


def policy_of(sizes: Mapping[int, int]) -> Policy:
    """`sizes`: the regions' as the guest sees them."""
    rules: list[Rule] = []
    for region, size in sorted(sizes.items()):
        if region == RegionIndex.CONFIG or not size:
            continue
        if region == QM_REGION and size >= HALF:
            rules += _queue_manager(size)
        elif region == DOORBELL_REGION and size % DOORBELL_PAGE == 0 and size // DOORBELL_PAGE <= MOST_PAGES:
            rules += _doorbell_pages(size)
        else:
            rules.append(_passed(region, 0, size, f"region {region}", OTHER_REASON, WIDTHS_REGISTER | WIDTH_ANY))
    return Policy(tuple(rules), p2p=False, p2p_reason=P2P_REASON, mmap_never=MMAP_NEVER)


def _answers(stopped: Answer) -> Answers:
    """P2P is not offered: should a device get there, it counts as stopped. What is resuming holds nobody's values."""
    return Answers(Answer.PASS, stopped, stopped, Answer.DISCARD, Answer.DISCARD)


def _passed(region: int, start: int, length: int, name: str, reason: str, widths: int = WIDTHS_REGISTER) -> Rule:
    answers = _answers(Answer.DISCARD)
    return Rule(region, start, length, answers, answers, name, reason, widths)


def _shape(register: Register) -> RuleShape:
    if register.access in READABLE:
        return RuleShape(_answers(Answer.SHADOW), _answers(Answer.SHADOW), f"{register.doc}; {REGISTER_REASON}")
    return RuleShape(_answers(Answer.DISCARD), _answers(Answer.SHADOW), DOORBELL_REASON)


def _queue_manager(size: int) -> Iterator[Rule]:
    gap = RuleShape(_answers(Answer.DISCARD), _answers(Answer.DISCARD), GAP_REASON)
    for rule in FUNCTION.rules(QM_REGION, _shape, gap):
        if rule.name not in _MAILBOX_NAMES:
            yield rule
    trap = Answers(Answer.TRAP, Answer.TRAP, Answer.TRAP, Answer.DISCARD, Answer.DISCARD)
    widths = WIDTHS_REGISTER | WIDTH_ANY
    yield Rule(QM_REGION, MAILBOX, MAILBOX_SIZE, trap, trap, "mailbox", MAILBOX_REASON, widths)
    if size > HALF:
        yield _passed(QM_REGION, HALF, size - HALF, "upper half", f"mode PF_CTRL: {GAP_REASON}")


def _doorbell_pages(size: int) -> Iterator[Rule]:
    for page in range(size // DOORBELL_PAGE):
        start, doorbell = page * DOORBELL_PAGE, page * DOORBELL_PAGE + DOORBELL_SQ_CQ
        yield _passed(DOORBELL_REGION, start, DOORBELL_SQ_CQ, f"page {page}", GAP_REASON)
        ring = _answers(Answer.SHADOW)
        name = f"doorbell {page}"
        yield Rule(DOORBELL_REGION, doorbell, 8, _answers(Answer.DISCARD), ring, name, DOORBELL_REASON)
        end = doorbell + 8
        yield _passed(DOORBELL_REGION, end, start + DOORBELL_PAGE - end, f"rest of page {page}", GAP_REASON)
