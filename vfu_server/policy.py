"""The access policy as data: what is answered to a client's access, for each byte range of a region and each class of
states.

Policy knows nothing of how the table is walked (C does that) or of who asks; it declares, checks and prints.
"""

import enum
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vfu_server.errors import PluginError
from vfu_server.uapi import PAGE_SIZE, MigState, RegionIndex


class StateClass(enum.IntEnum):
    """The migration states that an access rule tells apart. The numbers index the compiled table."""

    RUNNING = 0
    P2P = 1
    STOPPED = 2
    RESUMING = 3
    ERROR = 4


STATE_CLASS: dict[MigState, StateClass] = {
    MigState.RUNNING: StateClass.RUNNING,
    MigState.PRE_COPY: StateClass.RUNNING,
    MigState.RUNNING_P2P: StateClass.P2P,
    MigState.PRE_COPY_P2P: StateClass.P2P,
    MigState.STOP: StateClass.STOPPED,
    MigState.STOP_COPY: StateClass.STOPPED,
    MigState.RESUMING: StateClass.RESUMING,
    MigState.ERROR: StateClass.ERROR,
}


class Answer(enum.IntEnum):
    """What is done with an access. The numbers are those of the compiled table (csrc/access.h)."""

    REFUSE = 0
    """An error reply with the rule's errno, counted."""
    PASS = 1
    """To the hardware, same width."""
    TRAP = 2
    """The plugin's `trap_read` or `trap_write`."""
    SHADOW = 3
    """Reads: the value snapshot when the class was switched. Writes: kept in the snapshot, given to the plugin on
    start.
    """
    DISCARD = 4
    """Reads: all ones. Writes: dropped. Counted."""
    MMAP = 5
    """The client maps the range and we never see the access; where it does not map, as PASS."""


NUM_CLASSES = len(StateClass)
NUM_ANSWERS = len(Answer)

WIDTH_1, WIDTH_2, WIDTH_4, WIDTH_8 = 1, 2, 4, 8
WIDTH_ANY = 16
"""Any byte count, also one that is no register access (config space, memory-like ranges)."""
WIDTHS_REGISTER = WIDTH_1 | WIDTH_2 | WIDTH_4 | WIDTH_8


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer for each state class, in one direction."""

    running: Answer
    p2p: Answer
    stopped: Answer
    resuming: Answer
    error: Answer

    @classmethod
    def always(cls, answer: Answer) -> "Answers":
        """The same answer in every state."""
        return cls(answer, answer, answer, answer, answer)

    @classmethod
    def while_running(cls, running: Answer, otherwise: Answer) -> "Answers":
        """`running` while the device runs (p2p included), `otherwise` in all other states."""
        return cls(running, running, otherwise, otherwise, otherwise)

    def __getitem__(self, state_class: StateClass) -> Answer:
        return (self.running, self.p2p, self.stopped, self.resuming, self.error)[state_class]

    def as_tuple(self) -> tuple[Answer, ...]:
        """The answers in the order of `StateClass`."""
        return (self.running, self.p2p, self.stopped, self.resuming, self.error)


@dataclass(frozen=True, slots=True)
class Rule:
    """What is answered to accesses of `[start, start + length)` of region `region`.

    `widths` is a set of WIDTH_ bits that the hardware allows; another width is refused with EINVAL. `reason` says in
    one sentence why, for the print-out. `errno` is what REFUSE answers.
    """

    region: int
    start: int
    length: int
    read: Answers
    write: Answers
    name: str
    reason: str = ""
    widths: int = WIDTHS_REGISTER
    errno: int = 1  # EPERM

    @property
    def end(self) -> int:
        """First byte behind the range."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules of a device, and why it does or does not offer P2P. Uncovered bytes are refused in every state.

    The config space needs no rule: it is added with PASS in every state unless the plugin names it.
    """

    rules: Sequence[Rule]
    p2p: bool = False
    p2p_reason: str = ""
    mmap_never: str = field(default="")
    """If not empty: the reason why no area of this device may ever be mapped (hidden registers share the BAR)."""

    def with_config_space(self, size: int) -> "Policy":
        """This policy with the rule for config space, if the plugin has not said any."""
        if any(rule.region == RegionIndex.CONFIG for rule in self.rules):
            return self
        rule = Rule(
            region=RegionIndex.CONFIG,
            start=0,
            length=size,
            read=Answers.always(Answer.PASS),
            write=Answers.always(Answer.PASS),
            name="config space",
            reason="the kernel's contract: config space works in every state",
            widths=WIDTHS_REGISTER | WIDTH_ANY,
        )
        return Policy((*self.rules, rule), self.p2p, self.p2p_reason, self.mmap_never)

    def check(self, region_sizes: dict[int, int]) -> None:
        """Raise PluginError for what cannot be meant: overlap, out of the region, no width, unaligned MMAP, MMAP in one
        direction.
        """
        for rule in self.rules:
            _check_rule(rule, region_sizes)
        ordered = sorted(self.rules, key=lambda rule: (rule.region, rule.start))
        for before, after in itertools.pairwise(ordered):
            if before.region == after.region and before.end > after.start:
                raise PluginError(
                    f"policy: rules {before.name!r} and {after.name!r} overlap "
                    f"in region {before.region} at {after.start:#x}"
                )

    def gaps(self, region_sizes: dict[int, int]) -> Iterable[tuple[int, int, int]]:
        """The `(region, start, length)` that no rule covers and that are therefore refused."""
        for region, size in sorted(region_sizes.items()):
            at = 0
            for rule in sorted((r for r in self.rules if r.region == region), key=lambda r: r.start):
                if rule.start > at:
                    yield region, at, rule.start - at
                at = rule.end
            if at < size:
                yield region, at, size - at


def _check_rule(rule: Rule, region_sizes: dict[int, int]) -> None:
    where = f"policy: rule {rule.name!r} (region {rule.region}, {rule.start:#x}+{rule.length:#x})"
    size = region_sizes.get(rule.region, 0)
    if rule.length <= 0 or rule.start < 0 or rule.end > size:
        raise PluginError(f"{where} lies outside of its region of {size:#x} bytes")
    if not rule.widths & (WIDTHS_REGISTER | WIDTH_ANY) or rule.widths & ~(WIDTHS_REGISTER | WIDTH_ANY):
        raise PluginError(f"{where} allows no known width ({rule.widths:#x})")
    if not 0 < rule.errno < 4096:
        raise PluginError(f"{where} has no errno ({rule.errno})")
    mapped = [a == Answer.MMAP for a in (*rule.read.as_tuple(), *rule.write.as_tuple())]
    if any(mapped):
        if rule.start % PAGE_SIZE or rule.length % PAGE_SIZE:
            raise PluginError(f"{where} is an MMAP area but not aligned to pages of {PAGE_SIZE} bytes")
        if not (rule.read.running == rule.write.running == Answer.MMAP):
            raise PluginError(
                f"{where}: MMAP cannot be taken back, so it must be the answer to reads and writes while running"
            )
