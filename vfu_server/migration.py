"""The kernel's migration v2 state machine: the states a device goes through for a wish, and what is done on each arc.

Decisions only: it knows no client, no device, no stream and no clock. The session walks the path and does the steps.

There is one table, the kernel's (drivers/vfio/vfio_main.c, vfio_mig_get_next_state; include/uapi/linux/vfio.h, enum
vfio_device_mig_state). States that a device does not offer are skipped by looking them up again, as the kernel does.
"""

import enum
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from vfu_server.device import Capabilities
from vfu_server.errors import PluginError, StateError
from vfu_server.policy import STATE_CLASS, StateClass
from vfu_server.uapi import MIGRATION_P2P, MIGRATION_PRE_COPY, MIGRATION_STOP_COPY, MigState

_S, _R, _SC, _RES = MigState.STOP, MigState.RUNNING, MigState.STOP_COPY, MigState.RESUMING
_RP, _P, _PP, _X = MigState.RUNNING_P2P, MigState.PRE_COPY, MigState.PRE_COPY_P2P, MigState.ERROR

_COLUMNS: Final = (_S, _R, _RP, _SC, _RES, _P, _PP)

# Row: the present state; column: the wish; cell: the next state on the way. _X: the kernel blocks it. No row: ERROR.
_NEXT: Final = MappingProxyType(
    {
        #         S    R    Rp   SC   RES  P    Pp
        _S:   (_S,  _RP, _RP, _SC, _RES, _RP, _RP),
        _R:   (_RP, _R,  _RP, _RP, _RP,  _P,  _RP),
        _RP:  (_S,  _R,  _RP, _S,  _S,   _R,  _PP),
        _SC:  (_S,  _S,  _S,  _SC, _S,   _X,  _X),
        _RES: (_S,  _S,  _S,  _S,  _RES, _S,  _S),
        _P:   (_R,  _R,  _R,  _PP, _R,   _P,  _PP),
        _PP:  (_RP, _RP, _RP, _SC, _RP,  _P,  _PP),
    }
)  # fmt: skip

_NEEDS: Final = MappingProxyType(
    {
        _S: MIGRATION_STOP_COPY,
        _R: MIGRATION_STOP_COPY,
        _SC: MIGRATION_STOP_COPY,
        _RES: MIGRATION_STOP_COPY,
        _RP: MIGRATION_STOP_COPY | MIGRATION_P2P,
        _P: MIGRATION_STOP_COPY | MIGRATION_PRE_COPY,
        _PP: MIGRATION_STOP_COPY | MIGRATION_P2P | MIGRATION_PRE_COPY,
    }
)
"""The feature flags that a device must have for each state. ERROR is in no device's set: nobody may ask for it."""

FLAG_SETS: Final = (
    MIGRATION_STOP_COPY,
    MIGRATION_STOP_COPY | MIGRATION_P2P,
    MIGRATION_STOP_COPY | MIGRATION_PRE_COPY,
    MIGRATION_STOP_COPY | MIGRATION_P2P | MIGRATION_PRE_COPY,
)
"""The values that feature MIGRATION may answer."""


def migration_flags(capabilities: Capabilities) -> int:
    """What feature MIGRATION answers for a device; 0: the device cannot migrate and the feature is not there."""
    if not capabilities.migratable:
        return 0
    return (
        MIGRATION_STOP_COPY
        | (MIGRATION_P2P if capabilities.p2p else 0)
        | (MIGRATION_PRE_COPY if capabilities.pre_copy else 0)
    )


def offers(flags: int, state: int) -> bool:
    """A device with `flags` can be asked for `state` (any number)."""
    needs = _NEEDS.get(MigState(state)) if 0 <= state < len(MigState) else None
    return needs is not None and flags & needs == needs


def states(flags: int) -> frozenset[MigState]:
    """All states that a device with `flags` can be asked for."""
    _check_flags(flags)
    return frozenset(state for state in _NEEDS if offers(flags, state))


def next_step(flags: int, current: MigState, target: int) -> MigState:
    """The state that follows `current` on the way to `target`; `current` itself when it is there already.

    Raises StateError (EINVAL) where the kernel refuses: ERROR or an unknown number as target, a state that the device
    does not offer, any wish from ERROR, and PRE_COPY or PRE_COPY_P2P from STOP_COPY.
    """
    _check_flags(flags)
    if not offers(flags, target):
        raise StateError(f"state {_name(target)} was asked for, which {_why_not(flags, target)}")
    if current is MigState.ERROR:
        raise StateError(f"the device is in state ERROR: {_name(target)} cannot be reached before a reset")
    if not offers(flags, current):
        raise StateError(f"the device is in state {_name(current)}, which {_why_not(flags, current)}")
    wish = _COLUMNS.index(MigState(target))
    step = _NEXT[current][wish]
    while step is not _X and not offers(flags, step):
        step = _NEXT[step][wish]
    if step is _X:
        raise StateError(f"state {_name(target)} cannot be reached from {_name(current)}")
    return step


def path(flags: int, current: MigState, target: int) -> tuple[MigState, ...]:
    """All states from `current` (left out) to `target`; empty when it is there already. Raises as `next_step`."""
    walked: list[MigState] = []
    while (step := next_step(flags, current, target)) is not current:
        walked.append(step)
        current = step
    return tuple(walked)


class DataSession(enum.Enum):
    """What data moves in a state."""

    NONE = "none"
    SAVE = "save"
    LOAD = "load"


def data_session(state: MigState) -> DataSession:
    """The data session that is open in `state`. One and the same stays open from PRE_COPY to STOP_COPY."""
    if state in (_P, _PP, _SC):
        return DataSession.SAVE
    return DataSession.LOAD if state is _RES else DataSession.NONE


class Step(enum.Enum):
    """One thing to do on an arc. The session does them one after the other and awaits each."""

    SWITCH_CLASS = "switch the access policy to the class of the arc's target"
    SWITCH_BACK = "switch the access policy back to the class of the arc's source (only when undoing)"
    STOP_P2P = "stop(P2P)"
    STOP_FULL = "stop(FULL)"
    START_P2P = "start(P2P): undo stop(P2P)"
    START_FULL = "start(FULL): undo stop(FULL)"
    APPLY_SHADOW = "give the plugin the kept writes whose rule does not answer SHADOW in the target's class"
    OPEN_SAVE = "open a save session; the stream's header is its first data"
    SAVE_PRE_COPY = "begin or go on with save(PRE_COPY) beside the session"
    PAUSE_PRE_COPY = "let save(PRE_COPY) return or cancel it; after that no coroutine of the device runs"
    SAVE_STOP_COPY = "begin save(STOP_COPY) beside the session, the end record behind it"
    CLOSE_SAVE = "end the save session: a save that still runs is cancelled, data not fetched is dropped"
    OPEN_LOAD = "load_begin, then take data"
    FINISH_LOAD = "the stream must be complete; load_done; end the load session"


@dataclass(frozen=True, slots=True)
class Arc:
    """One step of the state machine, as a driver sees it."""

    source: MigState
    target: MigState

    @property
    def source_class(self) -> StateClass:
        """The access class that holds before the arc."""
        return STATE_CLASS[self.source]

    @property
    def target_class(self) -> StateClass:
        """The access class that holds after the arc."""
        return STATE_CLASS[self.target]

    @property
    def opens(self) -> DataSession:
        """The data session that this arc begins: NONE for most, also where one stays open."""
        opened = data_session(self.target)
        return DataSession.NONE if opened is data_session(self.source) else opened

    @property
    def closes(self) -> DataSession:
        """The data session that this arc ends."""
        closed = data_session(self.source)
        return DataSession.NONE if closed is data_session(self.target) else closed

    def __str__(self) -> str:
        return f"{self.source.name} -> {self.target.name}"


_STOP_FULL: Final = (Step.SWITCH_CLASS, Step.STOP_FULL)
_STOP_P2P: Final = (Step.SWITCH_CLASS, Step.STOP_P2P)
_START_FULL: Final = (Step.START_FULL, Step.APPLY_SHADOW, Step.SWITCH_CLASS)
_START_P2P: Final = (Step.START_P2P, Step.APPLY_SHADOW, Step.SWITCH_CLASS)

# The policy is switched before the device is stopped and after it runs: a guest's access never meets a device that is
# half stopped under the rules of a running one. Data is saved early in PRE_COPY only: in PRE_COPY_P2P the session stays
# open and what was saved can still be fetched, but the device is about to be stopped.
_STEPS: Final = MappingProxyType(
    {
        Arc(_R, _S): _STOP_FULL,
        Arc(_S, _R): _START_FULL,
        Arc(_R, _RP): _STOP_P2P,
        Arc(_RP, _R): _START_P2P,
        Arc(_RP, _S): _STOP_FULL,
        Arc(_S, _RP): _START_FULL,
        Arc(_R, _P): (Step.OPEN_SAVE, Step.SAVE_PRE_COPY),
        Arc(_P, _R): (Step.CLOSE_SAVE,),
        Arc(_P, _PP): (Step.PAUSE_PRE_COPY, *_STOP_P2P),
        Arc(_PP, _P): (*_START_P2P, Step.SAVE_PRE_COPY),
        Arc(_RP, _PP): (Step.OPEN_SAVE,),
        Arc(_PP, _RP): (Step.CLOSE_SAVE,),
        Arc(_P, _SC): (Step.PAUSE_PRE_COPY, *_STOP_FULL, Step.SAVE_STOP_COPY),
        Arc(_PP, _SC): (*_STOP_FULL, Step.SAVE_STOP_COPY),
        Arc(_S, _SC): (Step.OPEN_SAVE, Step.SAVE_STOP_COPY),
        Arc(_SC, _S): (Step.CLOSE_SAVE,),
        Arc(_S, _RES): (Step.SWITCH_CLASS, Step.OPEN_LOAD),
        Arc(_RES, _S): (Step.FINISH_LOAD, Step.SWITCH_CLASS),
    }
)

_UNDO: Final = MappingProxyType(
    {
        Step.SWITCH_CLASS: Step.SWITCH_BACK,
        Step.STOP_P2P: Step.START_P2P,
        Step.STOP_FULL: Step.START_FULL,
        Step.START_P2P: Step.STOP_P2P,
        Step.START_FULL: Step.STOP_FULL,
        Step.OPEN_SAVE: Step.CLOSE_SAVE,
        Step.PAUSE_PRE_COPY: Step.SAVE_PRE_COPY,
    }
)
"""What takes a done step back. The others leave nothing to take back, or nothing behind them can fail (FINISH_LOAD)."""


def steps(arc: Arc) -> tuple[Step, ...]:
    """What to do on `arc`, in order. Raises StateError for two states that no arc joins."""
    try:
        return _STEPS[arc]
    except KeyError:
        raise StateError(f"no arc leads from {arc.source.name} to {arc.target.name}") from None


def undo(arc: Arc, failed: Step) -> tuple[Step, ...]:
    """What brings the device back to `arc.source` after step `failed` raised, in order; the client keeps its old state.

    A step that raises has left things as they were before it (the contract of `Device.stop` and `start`), so only the
    steps before it are taken back. If one of the returned steps raises as well, the state is ERROR.
    """
    done = steps(arc)
    return tuple(_UNDO[step] for step in reversed(done[: done.index(failed)]) if step in _UNDO)


def arcs(flags: int) -> frozenset[Arc]:
    """All arcs that a device with `flags` may be led along."""
    offered = states(flags)
    return frozenset(
        Arc(source, step)
        for source in offered
        for target in offered
        if _NEXT[source][_COLUMNS.index(target)] is not _X and (step := next_step(flags, source, target)) is not source
    )


def _check_flags(flags: int) -> None:
    if flags not in FLAG_SETS:
        raise PluginError(
            f"no device may offer migration flags {flags:#x}: STOP_COPY, with or without P2P and PRE_COPY"
        )


def _name(state: int) -> str:
    return MigState(state).name if 0 <= state < len(MigState) else str(state)


def _why_not(flags: int, state: int) -> str:
    if not 0 <= state < len(MigState):
        return "is no migration state"
    if state == MigState.ERROR:
        return "nobody can ask for"
    missing = _NEEDS[MigState(state)] & ~flags
    names = [name for flag, name in ((MIGRATION_P2P, "P2P"), (MIGRATION_PRE_COPY, "PRE_COPY")) if missing & flag]
    return f"needs {' and '.join(names)}, and this device does not offer that"
