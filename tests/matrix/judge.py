"""What must hold after any failure: the source runs with its state, or the destination with all of it; never both,
never neither; nothing is left over; the log names step and cause.

Neither is allowed in two cases only, and then said so: the source's hardware was pulled out, or its VMM has died.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from tests.matrix.cases import OVERRUN, SIDES, Case, Watched, arm
from tests.matrix.vmm import CLIENT_PATIENCE, RAM_NAME, CancelledByUser, Vmm, works
from tests.matrix.world import Side, World, open_files, pumps, until
from vfu_server.errors import DeviceGoneError, VfuServerError
from vfu_server.uapi import MigState

STEPS = re.compile(
    r"migration: \w+ -> \w+ failed at step '"
    r"|saving the device's state \((pre|stop)-copy\)"
    r"|the state that came in was refused"
    r"|(loading|writing) the device's state failed"
    r"|the plugin's (estimate|precopy_info) "
    r"|the plugin (could|did) not end the save"
    r"|(client|the device) .* in state \w+"
)
CAUSES = {
    "hangs": r"took longer than|it was cancelled or timed out|did not end the save within|the plugin gave nothing",
    "device gone": "was pulled out",
    "too large": "split it",
    "client gone": "client disconnected",
    "client dies": "client disconnected",
}
OWN_LIMITS = 0.5
"""Seconds within which whatever does not wait for a plugin is answered, on a busy machine."""


@dataclass(frozen=True, slots=True)
class Before:
    """What there was before a case."""

    files: frozenset[str]
    tasks: int

    @classmethod
    def look(cls, world: World) -> "Before":
        return cls(frozenset(open_files()), world.tasks())


def try_case(world: World, case: Case, seen: Watched) -> None:
    """Run one case and judge it. AssertionError says what does not hold."""
    before = Before.look(world)
    world.records.clear()
    sides = [Side(world, name, case.flow.shape) for name in SIDES]
    try:
        vmm = Vmm(world, case.flow, *sides)
        vmm.begin()
        arm(case, vmm, seen)
        vmm.run()
        Judge(case, vmm).judge()
    finally:
        for side in sides:
            side.close()
    nothing_is_left(world, before)


class Judge:
    """Looks at a run that is over."""

    def __init__(self, case: Case, vmm: Vmm) -> None:
        self.case = case
        self.vmm = vmm
        self.world = vmm.world
        self.source, self.destination = vmm.source, vmm.destination
        self.hit = {"source": self.source, "destination": self.destination}[case.side]

    @property
    def log(self) -> list[tuple[str, str, logging.LogRecord]]:
        """What was said up to now: by which side, in which words."""
        return [
            (record.device, record.getMessage() + (repr(record.exc_info[1]) if record.exc_info else ""), record)
            for record in list(self.world.records)
        ]

    @property
    def struck(self) -> bool:
        """The fault did strike: the place was come by."""
        place = self.case.place
        if place.startswith(("host", "chunk", "before", "at")):
            return not self.hit.host.orders
        return bool(self.hit.device.struck)

    def judge(self) -> None:
        """All of it."""
        self.answers_in_time()
        {
            "completed": self.completed,
            "recovered": self.recovered,
            "source lost": self.source_lost,
        }[self.vmm.outcome]()
        self.log_tells()
        self.others_may_come()
        for side in (self.source, self.destination):
            assert side.inner.broken == [], f"contract of {side.name}: {side.inner.broken}"

    def answers_in_time(self) -> None:
        """No wish takes as long as a client waits, whatever the plugin does, unless it cannot be cancelled."""
        slack = OVERRUN if self.case.kind == "overruns" else 0.0
        slow = [
            (name, round(seconds, 2))
            for name, seconds in self.vmm.answers
            if seconds >= CLIENT_PATIENCE + slack and not name.startswith("read")
        ]
        assert not slow, f"answered late: {slow}"

    # outcomes

    def completed(self) -> None:
        """The destination runs with all of the state, the source does not run."""
        side = self.destination
        if side is self.hit and self.case.kind in ("device gone", "client gone"):
            return  # once it ran; others_may_come looks at what is left of it
        assert side.session.mig_state is MigState.RUNNING
        assert side.inner.stopped == set()
        assert side.inner.digest == self.vmm.digest, "the state is not what the guest had"
        assert bytes(side.host.config) == self.vmm.config
        state = self.source.session.mig_state
        if self.vmm.error is None and not self.source.host.gone:
            assert state is MigState.STOP, f"the source is in {state.name}"
            assert self.source.inner.stopped
        assert not self.vmm.runs(self.source)

    def recovered(self) -> None:
        """The source runs as if nothing had been."""
        side = self.source
        if side.host.gone:
            self.source_lost()
            return
        assert side.session.mig_state is MigState.RUNNING
        assert side.inner.stopped == set(), "it was said to run and does not"
        assert side.inner.digest == self.vmm.digest, "the source's state was changed"
        assert bytes(side.host.config) == self.vmm.config
        assert side.inner.mailbox == self.vmm.mail, "a write that was kept is lost"
        assert side.inner.saving is None
        assert not side.inner.tracker.on or self.case.place.startswith("save_end"), "the plugin still follows changes"
        self.vmm.change(2)
        self.dropped_destination()

    def source_lost(self) -> None:
        """Its hardware or its VMM is gone: that is said, and nothing runs anywhere."""
        gone = self.case.kind == "device gone" or self.case.kind.startswith("client")
        assert gone, f"the source is lost, after {self.vmm.error!r}"
        assert self.hit is self.source, f"the source is lost by what happened to the other side: {self.vmm.error!r}"
        if self.case.kind == "device gone":
            until(
                lambda: self.source.session.mig_state is MigState.ERROR,
                "a device that is gone is in no state but ERROR",
            )
            assert self.source.client.mig_state() is MigState.ERROR, "its client is served on"
        self.dropped_destination()

    def dropped_destination(self) -> None:
        """A destination that was not told to run, or whose VMM has gone, does not run with the guest's state."""
        side = self.destination
        if side.host.gone:
            return
        until(lambda: side.session.mig_state is MigState.RUNNING or side.session.refused, "it is not free again")
        assert side.inner.digest != self.vmm.digest, "the guest's state outlives it"

    # what was said

    def log_tells(self) -> None:
        """The step and the cause are in the log, with a traceback only for what nobody could expect."""
        expected = self.case.kind in ("unexpected", "no memory")
        traces = [text for _, text, record in self.log if record.exc_info]
        assert expected or not traces, f"traceback for {traces}"
        assert traces or not expected or not self.struck, f"no traceback in:\n{self.words()}"
        if not self.struck or self.case.kind == "overruns":
            return
        harmless = self.vmm.outcome == "completed" or isinstance(self.vmm.error, CancelledByUser)
        if harmless and self.case.kind not in ("raises", "unexpected", "no memory"):
            return
        least = logging.INFO if self.case.kind.startswith("client") else logging.WARNING
        for what in (self.cause(), STEPS.pattern):
            until(lambda what=what: self.said(what, least), f"the log has no {what}:\n{self.words()}", 1.0)

    def said(self, what: str, least: int) -> bool:
        """Whether the side that was hit said so, with weight `least` at least."""
        return any(
            re.search(what, text)
            for device, text, record in self.log
            if device == self.case.side and record.levelno >= least
        )

    def words(self) -> str:
        return "\n".join(f"{device}: {record.levelname}: {text}" for device, text, record in self.log)

    def cause(self) -> str:
        kind = self.case.kind
        if kind in ("raises", "unexpected", "no memory"):
            return re.escape(self.case.cause)
        if self.case.place.startswith("chunk"):
            return "the state that came in was refused: StreamFormatError: "
        return CAUSES["client dies" if kind.startswith("client dies") else kind]

    # afterwards

    def others_may_come(self) -> None:
        """The next client of each side finds a device as new, or is told why not."""
        for side in (self.source, self.destination):
            side.device.forget_orders()  # the place may not have been come by: how much is given early is chance
            side.host.orders.clear()
            side.client.close()
            if side.host.gone:
                until(lambda side=side: not side.served, f"{side.name} is gone and goes on")
                assert isinstance(side.failure, DeviceGoneError), repr(side.failure)
                continue
            assert side.failure is None, repr(side.failure)
            client = side.connect()
            assert client.mig_state() is MigState.RUNNING
            assert side.inner.generations == [0] * side.inner.shape.pages, "the last guest's state is still there"
            assert side.host.door.dma_maps() == [], "the last guest's memory is still mapped"
            works(side)


def nothing_is_left(world: World, before: Before) -> None:
    """No fd, no map, no thread, no task."""
    assert pumps() == 0
    assert world.tasks() == before.tasks
    assert RAM_NAME not in Path("/proc/self/maps").read_text()
    left = open_files() - before.files
    assert not left, f"left open: {left}"


def verdict(world: World, case: Case, seen: Watched) -> str:
    """What does not hold; empty if all does."""
    try:
        try_case(world, case, seen)
    except (AssertionError, VfuServerError) as error:
        return f"{case}: {type(error).__name__}: {error}"
    return ""
