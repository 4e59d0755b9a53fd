"""A device that its own driver in the kernel migrates (`KernelMigrationDevice`): states forwarded, its bytes carried.

For plugins: as it is, or as the base of one that has more to say of its device. Nothing here knows what the state
means. The driver's bytes travel unchanged, in sections with the tag `kernel`: all of them in order are exactly what a
program reads from the driver's data fd, and what one that restores the device writes to it.
"""

import errno
import logging
from typing import Final

import trio

from vfu_server.device import (
    Capabilities,
    Device,
    PrecopyInfo,
    SavePhase,
    Section,
    Sink,
    StateIdentity,
    StopKind,
)
from vfu_server.errors import HostError, PluginError, RestoreError, StateError, StateLostError
from vfu_server.host_device import HostDevice, MigrationDoor, StateFile
from vfu_server.policy import Policy
from vfu_server.uapi import MIGRATION_P2P, MIGRATION_PRE_COPY, MigState

log = logging.getLogger(__name__)

TAG: Final = "kernel"
SECTION_VERSION: Final = 1
"""Of sections with that tag: the driver's bytes and nothing else."""
CHUNK: Final = 1 << 20
"""Bytes of the driver's state in one section, at most: what it gives in one read."""
GO_BACK_DEADLINE: Final = 0.5
"""Seconds to wait for a change that took too long, and to take it back: a client waits not much longer."""

_R, _RP, _S, _SC = MigState.RUNNING, MigState.RUNNING_P2P, MigState.STOP, MigState.STOP_COPY
_P, _PP, _RES = MigState.PRE_COPY, MigState.PRE_COPY_P2P, MigState.RESUMING

# Where the driver goes for what the server asks of a device, by where it is; what is not here cannot be asked.
_STOP: Final = {
    StopKind.P2P: {_R: _RP, _P: _PP},
    StopKind.FULL: {_R: _S, _RP: _S, _P: _SC, _PP: _SC},
}
_START: Final = {StopKind.P2P: {_RP: _R, _PP: _P}}
_SAVE: Final = {_R: _P, _RP: _PP, _S: _SC}
_END: Final = {save: before for before, save in _SAVE.items()}


def migration_of(host: HostDevice) -> MigrationDoor | None:
    """What migrates the device behind `host` by itself, for a probe; None: a plugin has to know how."""
    door: MigrationDoor | None = getattr(host, "migration", None)  # doors of tests may know nothing of it
    return door


class KernelMigrationDevice(Device):
    """A device with a driver that migrates it. `policy`: the plugin's, with `p2p` as the driver offers it.

    `variant` is the plugin's name for the kind of device; without one it is the driver's name (an mdev's type). The
    driver itself checks that a state fits.

    The server's state and the driver's are the same, arc by arc, but for a moment in which a change is under way and
    after one that failed: where the driver then stands is asked, and it is led from there.
    """

    def __init__(self, host: HostDevice, policy: Policy, variant: str = "") -> None:
        super().__init__(host)
        door = migration_of(host)
        if door is None:
            raise PluginError(f"{host.name} has no driver that migrates it")
        self._door = door
        self._policy = policy
        self._variant = variant or door.migrator
        self._state = MigState.RUNNING
        self._known = True
        """Nothing happened since that may have led the driver elsewhere."""
        self._file: StateFile | None = None
        self._held = b""
        """What was read and not given yet."""
        self._loaded = 0

    @property
    def identity(self) -> StateIdentity:
        """The kind of device; whether the state itself fits is the driver's to say."""
        return StateIdentity(self._variant, SECTION_VERSION, features=self._door.flags)

    @property
    def policy(self) -> Policy:
        """The plugin's."""
        return self._policy

    @property
    def capabilities(self) -> Capabilities:
        """What the driver offers."""
        flags = self._door.flags
        return Capabilities(pre_copy=bool(flags & MIGRATION_PRE_COPY), p2p=bool(flags & MIGRATION_P2P))

    # states

    async def stop(self, kind: StopKind) -> None:
        """Out of a pre-copy the full stop is STOP_COPY already: the kernel has no stop between them."""
        before = await self._where()
        await self._go(self._next(_STOP[kind], self._at_rest(before), f"stop({kind.name})"), back=before)

    async def start(self, kind: StopKind) -> None:
        """One arc back; also for a device that was just restored."""
        before = await self._where()
        if kind is StopKind.P2P:
            target = self._next(_START[kind], before, "start(P2P)")
        elif before is _SC and self._file is not None:
            raise StateLostError(f"{self.host.name}: no way leads back from STOP_COPY into a pre-copy")
        else:
            target = _RP if self.capabilities.p2p else _R
        await self._go(target, back=before)

    async def reset(self) -> None:
        """The door's reset: the driver is RUNNING then, whatever was."""
        self._close_file()
        for _ in range(2):  # a change that was given up may have come in behind the first
            self._known = False
            await self.host.reset()
            self._state, self._known = await self._door.state(), True
            if self._state is _R:
                return
        text = f"{self.host.name}: after a reset its driver is in state {self._state.name}, not RUNNING"
        raise StateLostError(text) if self._state is MigState.ERROR else HostError(text)

    async def run_again(self) -> None:
        """Lead the driver to RUNNING without a reset, which forgets nothing of the device. Raises what it refuses."""
        self._close_file()
        self._known = False
        await self._where()
        await self._go(_R, back=None)

    def _at_rest(self, state: MigState) -> MigState:
        """What `state` would be if a save session that could not be ended had been; the kernel ends it on its way."""
        return state if self._file is not None else _END.get(state, state)

    def _next(self, table: dict[MigState, MigState], state: MigState, what: str) -> MigState:
        if state in table.values():
            return state
        if state not in table:
            raise StateError(f"{self.host.name}: {what} does not go with its driver's state {state.name}")
        return table[state]

    async def _where(self) -> MigState:
        """The driver's state. Raises StateLostError if it is ERROR."""
        if not self._known:
            self._state = await self._door.state()
            self._known = True
        if self._state is MigState.ERROR:
            raise StateLostError(f"{self.host.name}: its driver is in state ERROR, which only a reset leaves")
        return self._state

    async def _go(self, target: MigState, *, back: MigState | None) -> None:
        """Lead the driver to `target`. If that fails or is cancelled, lead it to `back`, if there is a way back.

        Raises HostError, the driver being where it was; StateLostError, if nobody can say so.
        """
        if self._state is target:
            return
        self._known = False
        try:
            opened = await self._door.set_state(target)
        except HostError as error:
            await self._go_back(back, str(error), error.errno)
            raise
        except trio.Cancelled:
            if back is not None:
                await self._go_back(back, f"{self.host.name}: {target.name} took too long", errno.ETIMEDOUT)
            raise
        self._state, self._known = target, True
        if opened is not None:
            self._close_file()
            self._file = opened

    async def _go_back(self, back: MigState | None, what: str, number: int) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + GO_BACK_DEADLINE):
            try:
                state = await self._where()
                if back is not None and state is not back:
                    log.warning("%s; it is led back from %s to %s", what, state.name, back.name)
                    self._known = False
                    await self._door.set_state(back)
                    self._state, self._known = back, True
            except (HostError, StateLostError) as error:
                raise StateLostError(f"{what}; then: {error}", number) from error
            return
        raise StateLostError(f"{what}, and it did not come back within {GO_BACK_DEADLINE} s", number)

    # save

    async def estimate(self) -> int:
        """The driver's own. HostError ENOTTY from kernels whose drivers cannot tell."""
        return await self._door.data_size()

    async def precopy_info(self) -> PrecopyInfo:
        """The driver's own, and what was read from it and is still held."""
        info = await self._open_file().precopy_info()
        if not self._held:
            return info
        return PrecopyInfo(info.initial_bytes, info.dirty_bytes + len(self._held), info.reinit)

    async def save_begin(self) -> None:
        """PRE_COPY, PRE_COPY_P2P or STOP_COPY, by where the device is."""
        before = await self._where()
        if before in _END:  # an earlier session that could not be ended
            await self._go(_END[before], back=before)
            before = self._state
        self._held = b""
        await self._go(self._next(_SAVE, before, "saving"), back=before)

    async def save(self, phase: SavePhase, sink: Sink) -> None:
        """All that the driver gives: until it has nothing for now, or to its end."""
        file = self._open_file()
        while data := self._held or await self._read(file, phase):
            self._held = data
            await sink.send(Section(TAG, SECTION_VERSION, data))
            self._held = b""

    async def _read(self, file: StateFile, phase: SavePhase) -> bytes:
        try:
            return await file.read(CHUNK)
        except HostError as error:
            if error.errno != errno.ENOMSG:
                raise
            if phase is SavePhase.PRE_COPY:
                return b""
            # To a client that reads, ENOMSG is no failure.
            raise HostError(f"{error}, although it is stopped", errno.EIO) from error

    async def save_end(self) -> None:
        """Back to RUNNING, RUNNING_P2P or STOP; if the driver refuses, the next change finds it where it stays."""
        self._close_file()
        before = await self._where()
        if before in _END:
            await self._go(_END[before], back=None)

    # load

    async def load_begin(self) -> None:
        """RESUMING."""
        before = await self._where()
        self._loaded = 0
        await self._go(self._next({_S: _RES}, self._at_rest(before), "loading"), back=before)

    def knows(self, tag: str, version: int) -> bool:
        """The driver's bytes."""
        return tag == TAG and version == SECTION_VERSION

    async def load(self, section: Section) -> None:
        """On to the driver, which may look at them at once and makes them the device's state in RESUMING -> STOP."""
        try:
            await self._open_file().write(section.payload)
        except HostError as error:
            error.add_note(f"behind {self._loaded} bytes that it took, in a section of {len(section.payload)}")
            raise
        self._loaded += len(section.payload)

    async def load_done(self) -> None:
        """Let the driver check and take the state. It stays in RESUMING if it refuses: only a reset leaves that."""
        await self._where()
        try:
            await self._go(_S, back=None)
        except HostError as error:
            raise RestoreError(f"{error} (after {self._loaded} bytes of state)", error.errno) from error
        self._close_file()

    async def aclose(self) -> None:
        """Close the data fd; the door closes the device."""
        self._close_file()

    def _open_file(self) -> StateFile:
        if self._file is None:
            raise StateError(
                f"{self.host.name}: no migration data session is open, its driver is in {self._state.name}"
            )
        return self._file

    def _close_file(self) -> None:
        self._held = b""
        if self._file is not None:
            self._file.close()
            self._file = None
