"""A device whose state is N bytes of which some change while it runs: a plugin for tests of migration, on any door.

Its state is pages, each made of its number, its generation and a pattern, so that gigabytes are produced and checked at
memory speed and kept as one number for each page. It keeps the contract strictly itself: a call that the contract rules
out is a ContractError in `broken`, whatever the server does with it.
"""

import random
import struct
from dataclasses import dataclass, field
from functools import cache

import trio

from vfu_server.device import Capabilities, Device, PrecopyInfo, SavePhase, Section, StateIdentity, StopKind
from vfu_server.errors import (
    HostError,
    RestoreError,
    StreamFormatError,
    StreamMismatchError,
    UsageError,
    VfuServerError,
)
from vfu_server.policy import Answer, Answers, Policy, Rule

REGISTERS = 0x800
MAILBOX = 0x800
"""4 bytes; writes to a stopped device are kept and arrive when it runs again."""
REG_MAGIC, MAGIC = 0x00, 0x544E5953
REG_PAGES = 0x04
REG_CHANGE = 0x08
"""Write: the page of that number changes."""
REG_CHANGE_MANY = 0x0C
"""Write: so many pages change, one after the other."""
REG_DIGEST = 0x10
"""Read, 8 bytes: tells states apart."""
"""So many pages change each second from now on, while it runs."""
REG_FAULT = 0x1C
"""Write: index into FAULTS; it strikes once, after those that were ordered before with the same name."""
REG_COUNT = 0x20
"""Write: index into COUNTS; read: that count."""

FAULTS = (
    "none",
    "stop",
    "start",
    "save",
    "save early",
    "save_end",
    "load",
    "load_done",
    "reset",
    "precopy_info",
    "estimate",
    "shadow_write",
)
COUNTS = ("stop p2p", "stop full", "start p2p", "start full", "save pre-copy", "save stop-copy", "save_end", "reset")
HEAD = struct.Struct("<QQ")
MASK = (1 << 64) - 1


class ContractError(AssertionError):
    """The server called what the contract rules out."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What it is, from the operator's options. `churn`: pages of a pre-copy for which one changes.

    `slow`, `slow_early`, `slow_load`: seconds before the last save's first section, before a pre-copy's, and for taking
    each section.
    """

    size: int = 1 << 20
    page: int = 1 << 20
    p2p: bool = False
    pre_copy: bool = False
    churn: int = 0
    slow: float = 0.0
    slow_early: float = 0.0
    slow_load: float = 0.0

    @property
    def pages(self) -> int:
        return max(1, self.size // self.page)

    @classmethod
    def parse(cls, options: dict[str, str]) -> "Shape":
        kinds = {name: type(value) for name, value in cls.defaults().items()}
        unknown = set(options) - set(kinds)
        if unknown:
            raise UsageError(f"the synthetic device has no option {min(unknown)!r}")
        return cls(**{name: kinds[name](float(value)) for name, value in options.items()})

    @classmethod
    def defaults(cls) -> dict[str, float]:
        shape = cls()
        return {name: getattr(shape, name) for name in cls.__slots__}


@cache
def pattern(page: int) -> bytes:
    return random.Random(page).randbytes(page - HEAD.size)


@dataclass(slots=True)
class Tracker:
    """What of the state a save has still to give: pages of the first pass, and pages that changed since."""

    first: set[int] = field(default_factory=set)
    dirty: set[int] = field(default_factory=set)
    on: bool = False

    def begin(self, pages: int) -> None:
        self.first, self.dirty, self.on = set(range(pages)), set(), True

    def changed(self, page: int) -> None:
        if self.on and page not in self.first:
            self.dirty.add(page)


class SyntheticDevice(Device):
    """One device. `broken` has what the server did against the contract."""

    def __init__(self, host, shape: Shape) -> None:
        super().__init__(host)
        self.shape = shape
        self.generations = [0] * shape.pages
        self.tracker = Tracker()
        self.loaded: dict[int, int] = {}
        self.mailbox = 0
        self.faults: list[str] = []
        self.counts = dict.fromkeys(COUNTS, 0)
        self.counted = COUNTS[0]
        self.broken: list[str] = []
        self.stopped: set[StopKind] = set()
        self.loading = False
        self.saving: SavePhase | None = None
        self.following = 0
        self.given = 0

    # declarations

    @property
    def identity(self) -> StateIdentity:
        return StateIdentity("synthetic", 1, features=self.shape.pages)

    def check_identity(self, identity: StateIdentity) -> None:
        super().check_identity(identity)
        if identity.features != self.shape.pages:
            raise StreamMismatchError(f"saved with {identity.features} pages, this device has {self.shape.pages}")

    @property
    def policy(self) -> Policy:
        traps = Answers(Answer.TRAP, Answer.TRAP, Answer.REFUSE, Answer.REFUSE, Answer.REFUSE)
        kept = Answers(Answer.TRAP, Answer.TRAP, Answer.SHADOW, Answer.REFUSE, Answer.REFUSE)
        rules = [Rule(0, 0, REGISTERS, traps, traps, "registers"), Rule(0, MAILBOX, 4, kept, kept, "mailbox")]
        return Policy(rules, p2p=self.shape.p2p)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(pre_copy=self.shape.pre_copy, p2p=self.shape.p2p, resets=True)

    # registers

    def trap_read(self, region: int, offset: int, width: int) -> int:
        with self.lock:
            values = {
                REG_MAGIC: MAGIC,
                REG_PAGES: self.shape.pages,
                REG_DIGEST: self.digest,
                REG_COUNT: self.counts[self.counted],
                MAILBOX: self.mailbox,
            }
        return values.get(offset, 0) & (1 << 8 * width) - 1

    def trap_write(self, region: int, offset: int, width: int, value: int) -> None:
        with self.lock:
            if offset == REG_CHANGE:
                self._change(value % self.shape.pages)
            elif offset == REG_CHANGE_MANY:
                for _ in range(value):
                    self._change_next()
            elif offset == REG_FAULT:
                self.faults.append(FAULTS[value])
            elif offset == REG_COUNT:
                self.counted = COUNTS[value]
            elif offset == MAILBOX:
                self.mailbox = value

    def shadow_write(self, region: int, offset: int, width: int, value: int) -> None:
        self._strike("shadow_write")
        self.mailbox = value

    @property
    def digest(self) -> int:
        value = 0
        for generation in self.generations:
            value = (value * 0x100000001B3 + generation + 1) & MASK
        return value

    def _change(self, page: int) -> None:
        self.generations[page] += 1
        self.tracker.changed(page)

    def _change_next(self) -> None:
        self._change(self.following)
        self.following = (self.following + 1) % self.shape.pages

    # states

    async def stop(self, kind: StopKind) -> None:
        await trio.lowlevel.checkpoint()
        self._expect(StopKind.FULL not in self.stopped and kind not in self.stopped, f"stop({kind.name})")
        self._expect(kind is not StopKind.P2P or self.shape.p2p, "stop(P2P) of a device without P2P")
        self._strike("stop")
        with self.lock:
            self.stopped.add(kind)
        self.counts[f"stop {kind.value}"] += 1

    async def start(self, kind: StopKind) -> None:
        await trio.lowlevel.checkpoint()
        self._expect(kind in self.stopped, f"start({kind.name})")
        self._expect(kind is StopKind.FULL or StopKind.FULL not in self.stopped, "start(P2P) before start(FULL)")
        self._strike("start")
        with self.lock:
            self.stopped.remove(kind)
        self.counts[f"start {kind.value}"] += 1

    async def reset(self) -> None:
        await trio.lowlevel.checkpoint()
        self._strike("reset")
        with self.lock:
            self.generations = [0] * self.shape.pages
            self.stopped.clear()
            self.following, self.mailbox = 0, 0
        self._expect(not self.tracker.on, "reset while a save is open")
        self.loading = False
        self.counts["reset"] += 1

    # save

    async def estimate(self) -> int:
        self._strike("estimate")
        if not self.tracker.on:
            return self.shape.pages * self.shape.page
        return self._left(self.tracker.first) + self._left(self.tracker.dirty)

    async def precopy_info(self) -> PrecopyInfo:
        self._strike("precopy_info")
        if not self.tracker.on:
            return PrecopyInfo(self.shape.pages * self.shape.page, 0)
        return PrecopyInfo(self._left(self.tracker.first), self._left(self.tracker.dirty))

    def _left(self, pages: set[int]) -> int:
        return len(pages) * self.shape.page

    async def save(self, phase: SavePhase, sink) -> None:
        self._expect(self.saving is None, "two saves at a time")
        fitting = StopKind.FULL in self.stopped if phase is SavePhase.STOP_COPY else not self.stopped
        self._expect(fitting, f"save({phase.name})")
        self.saving = phase
        try:
            self.counts[f"save {phase.value}"] += 1
            if not self.tracker.on:
                with self.lock:
                    self.tracker.begin(self.shape.pages)
            if phase is SavePhase.STOP_COPY:
                await trio.sleep(self.shape.slow)
            else:
                await trio.sleep(self.shape.slow_early)
            await self._give(phase, sink)
        finally:
            self.saving = None

    async def _give(self, phase: SavePhase, sink) -> None:
        for pages in (self.tracker.first, self.tracker.dirty):
            while True:
                self._strike("save" if phase is SavePhase.STOP_COPY else "save early")
                with self.lock:
                    if not pages:
                        break
                    page = next(iter(pages))
                    sent = self.generations[page]
                await sink.send(Section("page", 1, self._payload(page, sent)))
                with self.lock:
                    pages.discard(page)
                    if self.generations[page] != sent:
                        self.tracker.dirty.add(page)
                    self.given += 1
                    if phase is SavePhase.PRE_COPY and self.shape.churn and self.given % self.shape.churn == 0:
                        self._change_next()

    def _payload(self, page: int, generation: int) -> bytes:
        return b"".join((HEAD.pack(page, generation), pattern(self.shape.page)))

    async def save_end(self) -> None:
        self._expect(self.saving is None, "save_end during a save")
        self.tracker = Tracker()
        self.counts["save_end"] += 1
        self._strike("save_end")

    # load

    async def load_begin(self) -> None:
        self._expect(StopKind.FULL in self.stopped, "load_begin of a running device")
        self.loaded, self.loading = {}, True

    def knows(self, tag: str, version: int) -> bool:
        return (tag, version) == ("page", 1)

    async def load(self, section: Section) -> None:
        self._expect(self.loading, "load")
        self._strike("load")
        await trio.sleep(self.shape.slow_load)
        if len(section.payload) != self.shape.page or not section.payload.endswith(pattern(self.shape.page)):
            raise StreamFormatError("a page of another pattern")
        page, generation = HEAD.unpack_from(section.payload)
        if page >= self.shape.pages:
            raise StreamFormatError(f"page {page} of {self.shape.pages}")
        self.loaded[page] = generation

    async def load_done(self) -> None:
        if len(self.loaded) != self.shape.pages:
            raise StreamFormatError(f"{len(self.loaded)} of {self.shape.pages} pages came")
        self._strike("load_done", RestoreError)
        with self.lock:
            self.generations = [self.loaded[page] for page in range(self.shape.pages)]
        self.loaded, self.loading = {}, False

    # its own watch

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            told = f"{what} while stopped {sorted(kind.name for kind in self.stopped)}, loading {self.loading}"
            self.broken.append(told)
            raise ContractError(told)

    def _strike(self, fault: str, kind: type[VfuServerError] = HostError) -> None:
        if fault in self.faults:
            self.faults.remove(fault)
            raise kind(f"{fault} fails as ordered")
