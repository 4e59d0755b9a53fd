"""One device on its way through the migration states: the steps of each arc, awaited one by one, undone where one
fails.

It joins the state machine (`migration`), the plugin's coroutines, the policy table and the two data sessions. It must
not know messages or sockets; who waits for a state change is told by return or exception.
"""

import contextlib
import errno
import logging
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from vfu_server.device import Device, PrecopyInfo, StopKind
from vfu_server.errors import (
    DeadlineError,
    DeviceGoneError,
    HostError,
    PluginError,
    StateError,
    StateLostError,
    VfuServerError,
)
from vfu_server.libvfio_user.context import Context, KeptWrite
from vfu_server.migration import Arc, Step, data_session, migration_flags, next_step, steps, undo
from vfu_server.policy import StateClass
from vfu_server.session_counts import MigrationCounts
from vfu_server.session_load import Load
from vfu_server.session_machine import Machine
from vfu_server.session_revoke import Revocation
from vfu_server.session_save import Save
from vfu_server.uapi import MigState

log = logging.getLogger(__name__)

ARC_DEADLINE = 4.0
"""Seconds for all steps of one wish; QEMU gives its connection up after 5."""

UNDO_DEADLINE = 0.8
"""Seconds to take the steps of a failed arc back: still below the client's 5."""

RESET_DEADLINE = 3.0

STREAM_OVERHEAD = 16 << 10
"""Bytes that our own header, sections and sums may add to a plugin's estimate."""


class Migration:
    """The migration state of one device, and what moves it. `state` is what the client is told."""

    def __init__(
        self,
        name: str,
        device: Device,
        context: Context,
        save: Save,
        load: Load,
        revocation: Revocation,
        machine: Machine,
    ) -> None:
        self.state = MigState.RUNNING
        self.counts = MigrationCounts()
        self._revocation = revocation
        self._name = name
        self._machine = machine
        self._device = device
        self._context = context
        self._save = save
        self._load = load
        self._lost: DeviceGoneError | None = None
        self._kept: deque[KeptWrite] = deque()
        """Writes that were taken out of C and not yet given to the plugin."""
        self._failed_write: KeptWrite | None = None
        self._steps: dict[Step, Callable[[Arc], Awaitable[None]]] = {
            Step.SWITCH_CLASS: lambda arc: self.switch_class(arc.target_class),
            Step.SWITCH_BACK: lambda arc: self.switch_class(arc.source_class),
            Step.STOP_P2P: lambda _: device.stop(StopKind.P2P),
            Step.STOP_FULL: lambda _: device.stop(StopKind.FULL),
            Step.START_P2P: lambda _: device.start(StopKind.P2P),
            Step.START_FULL: lambda _: device.start(StopKind.FULL),
            Step.APPLY_SHADOW: lambda _: self._apply_kept_writes(),
            Step.OPEN_SAVE: lambda arc: save.open(pre_copy=arc.target is not MigState.STOP_COPY),
            Step.SAVE_PRE_COPY: lambda _: save.begin_pre_copy(),
            Step.PAUSE_PRE_COPY: lambda _: save.pause_pre_copy(),
            Step.SAVE_STOP_COPY: lambda _: save.begin_stop_copy(),
            Step.CLOSE_SAVE: lambda _: save.close(),
            Step.OPEN_LOAD: lambda _: self._open_load(),
            Step.FINISH_LOAD: lambda _: load.finish(),
        }

    @property
    def flags(self) -> int:
        """What feature MIGRATION answers; 0: it is not offered."""
        return 0 if self._machine.refusal(self._name) else migration_flags(self._device.capabilities)

    async def set_state(self, target: int) -> None:
        """Walk to `target`. On an error the state is the last one reached, or ERROR if even that could not be held."""
        flags = self.flags
        began = trio.current_time()
        try:
            with trio.fail_after(ARC_DEADLINE):
                if next_step(flags, self.state, target) is not self.state:
                    await self._go(flags, target)
        except trio.TooSlowError:
            raise DeadlineError(f"the way to state {target} took longer than {ARC_DEADLINE} s") from None
        log.debug("state %s after %.1f ms", self.state.name, (trio.current_time() - began) * 1e3)

    async def _go(self, flags: int, target: int) -> None:
        with self._revocation.lifted():
            try:
                while (step := next_step(flags, self.state, target)) is not self.state:
                    arc, total = Arc(self.state, step), self._context.ring.total
                    self._machine.set_out(self._name, arc, target)
                    with self.counts.timed(arc):
                        await self._walk(arc)
                    self.counts.data_over(arc.closes, total)
            finally:
                self._machine.present(self._name, self.state)
                self._revocation.at_rest(self.state in (MigState.STOP, MigState.STOP_COPY))

    async def _open_load(self) -> None:
        await self._load.open()
        self._drop_kept_writes()  # they were for the state that is given up

    async def precopy_info(self) -> PrecopyInfo:
        """What a pre-copy has still to give. StateError in any other state, as the kernel's."""
        if self.state not in (MigState.PRE_COPY, MigState.PRE_COPY_P2P):
            raise StateError(f"MIG_PRECOPY_INFO is for PRE_COPY, the state is {self.state.name}")
        return await self._save.precopy_info()

    async def data_size(self) -> int:
        """About how many bytes a STOP_COPY would still give now."""
        with self._revocation.lifted():
            return await self._device.estimate() + self._save.unfetched + STREAM_OVERHEAD

    async def _walk(self, arc: Arc) -> None:
        began = trio.current_time()
        for step in steps(arc):
            try:
                await self._steps[step](arc)
                self._must_be_there()
            except BaseException as error:
                await self._undo(arc, step, error)
                if _bug(error) is not None:
                    raise PluginError(f"{arc}, step '{step.value}': unexpected {error!r}", errno.EIO) from error
                raise
        self.state = arc.target
        log.info("migration: %s in %.1f ms", arc, (trio.current_time() - began) * 1e3)

    async def _undo(self, arc: Arc, failed: Step, error: BaseException) -> None:
        cause = "it was cancelled or timed out" if isinstance(error, trio.Cancelled) else str(error)
        bug = _bug(error)
        level = logging.WARNING if bug is None else logging.ERROR
        log.log(level, "migration: %s failed at step '%s': %s", arc, failed.value, cause, exc_info=bug)
        if isinstance(error, StateLostError) or self._lost is not None:
            await self.fail()
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + UNDO_DEADLINE) as scope:
            try:
                for step in undo(arc, failed):
                    await self._steps[step](arc)
                return
            except Exception as second:
                log.error("migration: %s could not be undone: %s", arc, second, exc_info=_bug(second))
        if scope.cancelled_caught:
            log.error("migration: undoing %s took longer than %s s", arc, UNDO_DEADLINE)
        await self.fail()

    async def fail(self) -> None:
        """Nobody knows what the device does any more: state ERROR, left by a reset only."""
        with trio.CancelScope(shield=True):
            try:
                await self.switch_class(StateClass.ERROR)
            finally:  # last: who reads the state finds accesses answered as it says
                self.state = MigState.ERROR
                self._machine.present(self._name, self.state)

    async def lose(self, cause: DeviceGoneError) -> None:
        """The device is gone for good: ERROR, also for a change of state that is under way."""
        self._lost = cause
        await self.fail()

    def _must_be_there(self) -> None:
        if self._lost is not None:
            raise self._lost.with_traceback(None)

    async def reset(self) -> None:
        """Bring the device to RUNNING by a reset, from any state. On failure the state is ERROR."""
        with self._revocation.lifted():
            self._revocation.at_rest(False)
            await self._reset()

    async def _reset(self) -> None:
        self.counts.data_over(data_session(self.state), self._context.ring.total)
        with trio.CancelScope(shield=True):
            for session in (self._save, self._load):
                with contextlib.suppress(StateLostError):
                    await session.close()
        if stuck := self._save.task.stuck or self._load.task.stuck:  # a reset beside it would be as good as none
            await self.fail()
            raise DeadlineError(stuck)
        self._drop_kept_writes()
        try:
            with trio.fail_after(RESET_DEADLINE):
                await self._device.reset()
            self._must_be_there()
        except trio.TooSlowError:
            await self.fail()
            raise DeadlineError(f"the device's reset took longer than {RESET_DEADLINE} s") from None
        except VfuServerError as error:
            if self.state is not MigState.RUNNING or isinstance(error, StateLostError):
                await self.fail()
            error.add_note("while the device was reset")
            raise
        except Exception as error:
            log.exception("the plugin's reset failed")
            await self.fail()
            raise PluginError(f"the plugin's reset failed: {error!r}", errno.EIO) from error
        self.counts.resets += 1
        self._context.mark_reset()
        self.state = MigState.RUNNING
        self._machine.present(self._name, self.state)
        await self.switch_class(StateClass.RUNNING)

    async def switch_class(self, state_class: StateClass) -> None:
        """Switch the access policy; returns when the access in flight has finished and the new class holds."""
        if self._context.state_class is state_class:
            return
        while True:
            try:
                await trio.to_thread.run_sync(self._context.set_class, state_class)
                return
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise HostError(f"the access policy cannot be switched: {error.strerror}", error.errno) from error
            await self._apply_kept_writes()

    async def _apply_kept_writes(self) -> None:
        """In their order. One that fails is tried once more, with all behind it, when the device starts again; after
        that it is dropped, since a guest that stands still for good would be worse.
        """
        self._kept += self._context.take_kept_writes()
        while self._kept:
            kept = self._kept[0]
            try:
                self._device.shadow_write(kept.region, kept.offset, kept.width, kept.value)
            except Exception as error:
                if self._failed_write is not kept:
                    self._failed_write = kept
                    raise
                where = f"region {kept.region} at {kept.offset:#x}"
                log.error("a write to %s that was kept is lost: %s", where, error, exc_info=_bug(error))
            self._kept.popleft()
        await trio.lowlevel.checkpoint()

    def _drop_kept_writes(self) -> None:
        self._context.drop_kept_writes()
        self._kept.clear()


def _bug(error: BaseException) -> Exception | None:
    """`error`, if it is nobody's known fault: the log gets its traceback."""
    return error if isinstance(error, Exception) and not isinstance(error, VfuServerError) else None
