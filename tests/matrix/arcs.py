"""Single arcs of the state machine, for every set of features: each call that the plugin gets on one is spoilt, and
then each call that takes the arc back as well.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from tests.matrix.cases import ERRNO, OVERRUN, Case, failure, since
from tests.matrix.judge import Before, nothing_is_left
from tests.matrix.vmm import CLIENT_PATIENCE, Flow
from tests.matrix.world import Side, World, until
from tests.plugins_synthetic.device import MAILBOX, REG_CHANGE, REG_MAGIC
from vfu_server.device import StopKind
from vfu_server.errors import DeviceGoneError, HostError, VfuServerError
from vfu_server.migration import FLAG_SETS, Arc, arcs
from vfu_server.policy import STATE_CLASS, StateClass
from vfu_server.testing import ConnectionClosedError, ReplyError, save
from vfu_server.testing.failing import COROUTINES, Call, Raise
from vfu_server.uapi import MIGRATION_P2P, MIGRATION_PRE_COPY, MigState

BESIDE = frozenset({"save", "send", "load", "knows", "check_identity", "estimate", "precopy_info"})
"""Calls that come beside the arcs, whenever data moves: a migration's cases."""
KINDS = ("raises", "unexpected", "no memory", "hangs", "overruns", "device gone", "client gone")
SECOND = ("raises", "unexpected", "hangs")
STOPPED = frozenset({StateClass.STOPPED, StateClass.RESUMING, StateClass.ERROR})
MAIL = 0x3333
HARMLESS = frozenset({"save_end"})
"""Whatever the plugin does there, the change of state goes on."""


@dataclass(frozen=True, slots=True)
class ArcCase:
    """`kind` of fault at `call` on `arc`; `second`: the call that takes the arc back and fails, too, by `then`."""

    flags: int
    arc: Arc
    call: Call
    kind: str
    second: Call | None = None
    then: str = ""

    def __str__(self) -> str:
        also = f", then {self.second}: {self.then}" if self.second else ""
        return f"flags {self.flags}, {self.arc}, {self.call}: {self.kind}{also}"

    @property
    def fault(self) -> Case:
        """The same as one side's case."""
        return Case(flow_of(self.flags), "source", str(self.call), self.kind)


def flow_of(flags: int) -> Flow:
    return Flow("arc", p2p=bool(flags & MIGRATION_P2P), pre_copy=bool(flags & MIGRATION_PRE_COPY))


def cases(world: World) -> Iterator[ArcCase]:
    """All of them."""
    for flags in FLAG_SETS:
        stream = saved(world, flags)
        for arc in sorted(arcs(flags), key=str):
            for call in calls_on(world, flags, arc, stream):
                for kind in KINDS:
                    if kind not in ("hangs", "overruns") or call.method in COROUTINES:
                        yield ArcCase(flags, arc, call, kind)
                for second in calls_on(world, flags, arc, stream, call):
                    for then in SECOND:
                        if then != "hangs" or second.method in COROUTINES:
                            yield ArcCase(flags, arc, call, "raises", second, then)


def saved(world: World, flags: int) -> bytes:
    """A stream for such a device."""
    side = Side(world, "source", flow_of(flags).shape)
    try:
        client = side.connect()
        client.set_mig_state(MigState.STOP_COPY)
        return b"".join(save(client))
    finally:
        side.close()


def calls_on(world: World, flags: int, arc: Arc, stream: bytes, first: Call | None = None) -> list[Call]:
    """What the plugin is asked on an arc, or to take it back after `first` has raised."""
    trial = Trial(world, flags, arc, stream)
    try:
        if first is not None:
            trial.side.device.order(first.method, Raise(HostError("first", ERRNO)), first.nth)
        mark = len(trial.side.device.calls)
        error = trial.wish()
        found = [call for call in since(trial.side.device.calls, mark) if call.method not in BESIDE]
        if first is None:
            assert error is None, f"{arc} with flags {flags}: {error}"
            return found
        return found[found.index(first) + 1 :]
    finally:
        trial.side.close()


class Trial:
    """A device that was led to the source of an arc."""

    def __init__(self, world: World, flags: int, arc: Arc, stream: bytes) -> None:
        self.world = world
        self.flags = flags
        self.arc = arc
        self.side = Side(world, "source", flow_of(flags).shape)
        self.client = self.side.connect()
        for page in (1, 1, 4):
            self.client.write(0, REG_CHANGE, 4, page)
        self.digest = self.side.inner.digest
        if arc.source is not MigState.RUNNING:
            self.client.set_mig_state(arc.source)
        if arc.source is MigState.RESUMING:
            self.client.mig_data_write(stream)
        self.mail = 0
        if STATE_CLASS[arc.source] is StateClass.STOPPED:
            self.mail = MAIL
            self.client.write(0, MAILBOX, 4, self.mail)

    def wish(self) -> VfuServerError | None:
        """Ask for the arc."""
        try:
            self.client.set_mig_state(self.arc.target)
        except VfuServerError as error:
            return error
        return None


def try_arc(world: World, case: ArcCase, stream: bytes) -> None:
    """Run one case and judge it."""
    before = Before.look(world)
    world.records.clear()
    trial = Trial(world, case.flags, case.arc, stream)
    try:
        device = trial.side.device
        device.order(case.call.method, failure(case.fault, trial.side), case.call.nth)
        if case.second is not None:
            then = failure(replace(case.fault, kind=case.then), trial.side)
            device.order(case.second.method, then, case.second.nth)
        begun = world.clock.current_time()
        error = trial.wish()
        seconds = world.clock.current_time() - begun
        assert seconds < CLIENT_PATIENCE + (OVERRUN if case.kind == "overruns" else 0), (
            f"answered after {seconds:.1f} s"
        )
        assert device.struck, "it was not come by"
        if case.kind == "client gone":
            assert error is None or isinstance(error, ConnectionClosedError), error
        elif case.kind == "device gone":
            device_gone(trial)
        elif case.second is not None:
            undoing_failed(trial)
        else:
            taken_back(trial, case, error)
        log_tells(world, trial, case)
        another_client(trial, case)
        assert trial.side.inner.broken == [], trial.side.inner.broken
    finally:
        trial.side.close()
    nothing_is_left(world, before)


def answered(case: ArcCase) -> set[int]:
    """The errnos that tell of a fault."""
    if case.call.method in HARMLESS:
        return {0}
    if case.kind == "overruns":
        return {0, errno.ETIMEDOUT}  # what was done before the deadline was seen stays done
    return {{"raises": ERRNO, "hangs": errno.ETIMEDOUT}.get(case.kind, errno.EIO)}


def taken_back(trial: Trial, case: ArcCase, error: VfuServerError | None) -> None:
    """The old state, or the new one if nothing was said; the device as the state says; and the way back is open."""
    told = 0 if error is None else error.errno
    assert told in answered(case), f"{error!r}"
    state = trial.client.mig_state()
    assert state is (trial.arc.target if told == 0 else trial.arc.source), f"{state.name} after {error!r}"
    as_the_state_says(trial, state)
    if state is MigState.RESUMING:
        trial.client.reset()
        assert trial.side.inner.generations == [0] * trial.side.inner.shape.pages
    elif state is not MigState.RUNNING:
        trial.client.set_mig_state(MigState.RUNNING)
    as_the_state_says(trial, MigState.RUNNING)
    if MigState.RESUMING not in (trial.arc.source, trial.arc.target):
        assert trial.side.inner.digest == trial.digest, "the state was changed"
        assert trial.side.inner.mailbox == trial.mail, "a write that was kept is lost"
    assert not trial.side.inner.tracker.on, "the plugin still follows changes"


def as_the_state_says(trial: Trial, state: MigState) -> None:
    """Hardware and access policy are those of the state."""
    stopped = STATE_CLASS[state] in STOPPED
    half = STATE_CLASS[state] is StateClass.P2P or (stopped and trial.flags & MIGRATION_P2P)
    wanted = ({StopKind.FULL} if stopped else set()) | ({StopKind.P2P} if half else set())
    assert trial.side.inner.stopped == wanted, f"{state.name}, but stopped {trial.side.inner.stopped}"
    assert reads(trial) is not stopped, f"accesses in {state.name}"


def reads(trial: Trial) -> bool:
    """Whether the guest reaches the registers."""
    try:
        trial.client.read(0, REG_MAGIC, 4)
    except ReplyError:
        return False
    return True


def undoing_failed(trial: Trial) -> None:
    """Nobody knows what the device does: ERROR, no access, nothing but a reset leads out, and that does."""
    assert trial.client.mig_state() is MigState.ERROR
    assert not reads(trial)
    for state in (MigState.RUNNING, MigState.STOP):
        with pytest.raises(ReplyError) as refusal:
            trial.client.set_mig_state(state)
        assert refusal.value.errno == errno.EINVAL
    trial.client.reset()
    as_the_state_says(trial, MigState.RUNNING)
    assert trial.side.inner.generations == [0] * trial.side.inner.shape.pages


def device_gone(trial: Trial) -> None:
    """ERROR, whatever was under way; its client is served on."""
    until(lambda: trial.client.mig_state() is MigState.ERROR, "a device that is gone is in ERROR and stays there")
    assert not reads(trial)
    with pytest.raises(ReplyError):
        trial.client.reset()
    assert trial.client.mig_state() is MigState.ERROR


def log_tells(world: World, trial: Trial, case: ArcCase) -> None:
    """Arc, step and cause; a traceback for what nobody could expect, for nothing else."""
    records = list(world.records)
    said = "\n".join(f"{record.levelname}: {record.getMessage()}" for record in records)
    traces = [record for record in records if record.exc_info]
    assert bool(traces) == bool({case.kind, case.then} & {"unexpected", "no memory"}), said
    if case.kind in ("raises", "unexpected", "no memory"):
        assert f"ordered for source at {case.call.method}" in said, said
    if case.kind in ("raises", "unexpected", "no memory", "hangs"):
        end = "the plugin could not end the save" if case.kind != "hangs" else "the plugin did not end the save"
        step = end if case.call.method in HARMLESS else f"migration: {case.arc} failed at step '"
        assert step in said, said
    if case.second is not None:
        assert f"migration: {case.arc} could not be undone" in said or f"undoing {case.arc} took longer" in said, said
    if case.kind == "device gone":
        assert "was pulled out" in said
        assert "the device is gone" in said


def another_client(trial: Trial, case: ArcCase) -> None:
    """Whoever comes next finds a device as new; nobody comes to one that is gone."""
    side = trial.side
    trial.client.close()
    if case.kind == "device gone":
        until(lambda: not side.served, "it is gone and goes on")
        assert isinstance(side.failure, DeviceGoneError), repr(side.failure)
        return
    trial.client = side.connect()
    assert trial.client.mig_state() is MigState.RUNNING
    as_the_state_says(trial, MigState.RUNNING)
    assert side.inner.generations == [0] * side.inner.shape.pages
    assert side.inner.mailbox == 0, "the last guest's write was given to the next"
