"""What follows from a profile for one device: its blocks with the arrays it has, queues, what travels, and the policy.

Everything here is worked out once. It must not touch the device: what was read from it is handed in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from plugins.generic_dmaq.drain import Queue
from plugins.generic_dmaq.form import Area, Plan, Profile
from vfu_server.policy import Answer, Answers, Policy, Rule
from vfu_server.regmap import Block, Register, RuleShape

STOPPED_WRITE = "writes are dropped while it is not running: a doorbell would start work"
NO_REGISTER = "the hardware answers here too: passed on while it runs, nothing to keep while it does not"


@dataclass(frozen=True)
class Layout:
    """A profile applied to a device. `plans` is by expanded names, `saved` in restore order, over all BARs."""

    profile: Profile
    blocks: Mapping[int, Block]
    plans: Mapping[str, Plan]
    saved: tuple[Register, ...]
    bar_of: Mapping[str, int]
    queues: tuple[Queue, ...]
    policy: Policy

    @property
    def sizes(self) -> dict[int, int]:
        """Region sizes, by index."""
        return {bar.index: bar.size for bar in self.profile.bars}


def layout_of(profile: Profile, counts: Mapping[str, int]) -> Layout:
    """The layout for a device with `counts[array]` elements of an array; an array that is not named: as declared."""
    blocks = {bar.index: bar.block(profile.name, counts) for bar in profile.bars}
    plans = {r.name: profile.plans[_declared(r.name)] for block in blocks.values() for r in block}
    saved = [r for block in blocks.values() for r in block.saved]
    return Layout(
        profile=profile,
        blocks=blocks,
        plans=plans,
        saved=tuple(sorted(saved, key=lambda r: r.order)),
        bar_of={r.name: bar for bar, block in blocks.items() for r in block},
        queues=tuple(_queues(profile, counts)),
        policy=_policy(profile, blocks, plans),
    )


def _declared(name: str) -> str:
    """`channel[3].status` as it was declared: `channel.status`."""
    array, bracket, rest = name.partition("[")
    return array + rest.partition("]")[2] if bracket else name


def _queues(profile: Profile, counts: Mapping[str, int]) -> list[Queue]:
    found = []
    declared = {array.name: array.count for bar in profile.bars for array in bar.arrays}
    for table in profile.queues:
        if not table.array:
            found.append(table.queue)
            continue
        count = counts.get(table.array, declared[table.array])
        found += [_within(table.queue, f"{table.array}[{index}]") for index in range(count)]
    return found


def _within(queue: Queue, element: str) -> Queue:
    def full(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{element}.{name}" for name in names)

    return replace(
        queue,
        name=f"{queue.name} of {element}",
        doorbells=full(queue.doorbells),
        busy=full(queue.busy),
        idle=f"{element}.{queue.idle}" if queue.idle else "",
        head=f"{element}.{queue.head}" if queue.head else "",
        tail=f"{element}.{queue.tail}" if queue.tail else "",
        show=full(queue.show),
    )


def _answers(stopped: Answer) -> Answers:
    """P2P is not offered: should a device get there, it counts as stopped. What is resuming holds nobody's values."""
    return Answers(Answer.PASS, stopped, stopped, Answer.DISCARD, Answer.DISCARD)


def _policy(profile: Profile, blocks: Mapping[int, Block], plans: Mapping[str, Plan]) -> Policy:
    def shape(register: Register) -> RuleShape:
        plan = plans[register.name]
        kept = (
            "reads give the value at the stop" if plan.stopped is Answer.SHADOW else "reads give all ones when stopped"
        )
        if plan.reads_act:
            kept = f"a read changes the device, so {kept}"
        reason = plan.reason or f"{kept}; {STOPPED_WRITE}"
        return RuleShape(_answers(plan.stopped), _answers(Answer.DISCARD), reason)

    gap = RuleShape(_answers(Answer.DISCARD), _answers(Answer.DISCARD), NO_REGISTER)
    rules: list[Rule] = []
    for bar, block in blocks.items():
        areas = sorted((a for a in profile.areas if a.bar == bar), key=lambda a: a.offset)
        for rule in block.rules(bar, shape, gap):
            rules += [rule] if rule.name in plans else _cut(rule, areas)
        rules += [_area_rule(area) for area in areas]
    rules.sort(key=lambda rule: (rule.region, rule.start))
    return Policy(tuple(rules), p2p=False, p2p_reason=profile.p2p_reason)


def _cut(gap: Rule, areas: list[Area]) -> list[Rule]:
    """The parts of a gap that no area takes."""
    found, at = [], gap.start
    for area in areas:
        if area.offset >= gap.end or area.offset + area.length <= gap.start:
            continue
        if area.offset > at:
            found.append((at, area.offset - at))
        at = area.offset + area.length
    if at < gap.end:
        found.append((at, gap.end - at))
    return [replace(gap, start=s, length=n, name=f"no register {s:#x}+{n:#x}") for s, n in found]


def _area_rule(area: Area) -> Rule:
    answers = Answers.always(Answer.MMAP) if area.mapped else _answers(Answer.DISCARD)
    return Rule(area.bar, area.offset, area.length, answers, answers, area.name, area.reason)
