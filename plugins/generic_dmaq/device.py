"""A DMA queue device under this plugin's care: it stops by letting its queues run empty, and travels as its registers.

It follows a layout and knows no particular hardware: what a table cannot say is in the profile's hook.
"""

import logging
from collections.abc import Mapping

import trio

from plugins.generic_dmaq import sections
from plugins.generic_dmaq.bench import Bench
from plugins.generic_dmaq.hooks import Hooks
from plugins.generic_dmaq.layout import Layout
from plugins.generic_dmaq.restore import State, quiet, restore, restore_registers, write_again
from vfu_server.device import Capabilities, Device, SavePhase, Section, Sink, StateIdentity, StopKind
from vfu_server.errors import (
    DeadlineError,
    DeviceGoneError,
    HostError,
    StateError,
    StreamFormatError,
    StreamMismatchError,
)
from vfu_server.host_device import HostDevice
from vfu_server.pci_command import memory_space
from vfu_server.policy import Policy

log = logging.getLogger(__name__)

STATE_VERSION = 1
RESTORE_SECONDS = 3.5
"""A client waits 5 s for a change of state."""


class DmaQueueDevice(Device):
    """One device that a profile is for. `drain_seconds` is how long a stop waits for the queues."""

    def __init__(self, host: HostDevice, layout: Layout, hooks: type[Hooks], drain_seconds: float) -> None:
        super().__init__(host)
        self.layout = layout
        self.bench = Bench(host, layout)
        self.hooks = hooks(self.bench)
        self.drain_seconds = drain_seconds
        self._loader = self._new_loader()
        self._mine: Mapping[str, int] = {}
        self._owed: Mapping[str, int] | None = None
        """What `save_memory` has changed and not yet put back."""
        self._counts = {
            "stops": 0,
            "drain_timeouts": 0,
            "drain_microseconds": 0,
            "saves": 0,
            "restores": 0,
            "resets": 0,
        }
        self._counts["memory_not_carried"] = 0

    @property
    def identity(self) -> StateIdentity:
        """The profile's name, and as features the number of queues: arrays of another size cannot take the state."""
        firmware = self.host.identity().firmware
        return StateIdentity(self.layout.profile.name, STATE_VERSION, firmware, features=len(self.layout.queues))

    def check_identity(self, identity: StateIdentity) -> None:
        """All must be equal, the number of queues too."""
        super().check_identity(identity)
        if identity.features != len(self.layout.queues):
            raise StreamMismatchError(
                f"saved with {identity.features} queues, this device has {len(self.layout.queues)}"
            )

    @property
    def policy(self) -> Policy:
        """The profile's: all passes while it runs, nothing gets through while it does not."""
        return self.layout.policy

    @property
    def capabilities(self) -> Capabilities:
        """Migratable; nothing can be given early, and P2P cannot be offered (the policy says why)."""
        by_registers = self.layout.profile.reset != "function"
        return Capabilities(migratable=True, pre_copy=False, p2p=False, resets=by_registers)

    async def stop(self, kind: StopKind) -> None:
        """Wait until the queues are empty; the policy has closed the doorbells. DeadlineError: it goes on as before."""
        if kind is StopKind.P2P:
            raise StateError(f"{self.host.name}: P2P is not offered: {self.layout.profile.p2p_reason}")
        with memory_space(self.host):
            try:
                took = await self.bench.wait_empty(self.drain_seconds, self.layout.profile.settle_seconds)
            except DeadlineError:
                self._counts["drain_timeouts"] += 1
                raise
        self._counts["stops"] += 1
        self._counts["drain_microseconds"] += round(took * 1e6)

    async def start(self, kind: StopKind) -> None:
        """Nothing holds the device but the policy; only what a broken-off save has left is put right."""
        if self._owed is not None:
            with memory_space(self.host):
                await self._put_back()

    async def reset(self) -> None:
        """The function's own reset if it has one; a profile that says `registers` has reset values written besides.

        By registers, since a device may have no reset code at all: memory of a guest must not be found by the next one.
        HostError, DeadlineError, RestoreError: it is not reset and must not be given to anybody.
        """
        self._owed = None
        self._loader = self._new_loader()
        if self.layout.profile.reset == "function":
            await self.host.reset()
        else:
            await self._reset_function()
            await self._reset_registers()
        self._counts["resets"] += 1

    async def estimate(self) -> int:
        """The same at all times."""
        return sections.size(self.layout, self.hooks.memory_size)

    async def save(self, phase: SavePhase, sink: Sink) -> None:
        """Registers and memory; the registers that fetching the memory has changed are put back before it returns."""
        if phase is SavePhase.PRE_COPY:
            return
        with memory_space(self.host):
            if self._owed is not None:
                await self._put_back()
            await self.bench.wait_empty(self.drain_seconds, self.layout.profile.settle_seconds)
            identity = self._identity_registers()
            values = self.bench.port.snapshot(r.name for r in self.layout.saved)
            write_again(self.bench, values)
            problem = self.hooks.problem(values)
            if problem:
                raise HostError(f"{self.host.name}: its state cannot be carried: {problem}")
            memory = await self._save_memory(values)
        for section in sections.encode(self.layout, identity, State(values, memory)):
            await sink.send(section)
        self._counts["saves"] += 1

    async def load_begin(self) -> None:
        """Forget an abandoned load. The registers by which a section is judged are read now, while the client waits:
        when it has given its data it writes COMMAND, and may do so before the last section was looked at.
        """
        self._loader = self._new_loader()
        with memory_space(self.host):
            self._mine = self._identity_registers()

    async def load(self, section: Section) -> None:
        """Check and keep a section; the first one tells early what this device cannot take."""
        self._loader.take(section, self._mine)
        arrived = section.tag == sections.TAG_DEVICE and self._loader.carries_memory
        if arrived and not await self.hooks.can_restore_memory():
            raise StreamMismatchError(
                f"{self.host.name}: the state carries the device's memory, which cannot be written here: "
                "the device's door has no scratch memory for DMA"
            )
        if section.tag == sections.TAG_REGISTERS:
            problem = self.hooks.problem(self._loader.values)
            if problem:
                raise StreamFormatError(f"the saved registers cannot be: {problem}")

    async def load_done(self) -> None:
        """Write all into the device and compare. StreamFormatError, RestoreError; DeadlineError: a step hangs."""
        state = self._loader.state()
        if state.memory is None and self.hooks.memory_size:
            self._not_carried("the state was saved without the device's memory: what the guest had there is lost")
            state = await self._without_memory(state.values)
        await self._write(state)
        self._loader = self._new_loader()
        self._counts["restores"] += 1

    def statistics(self) -> Mapping[str, int]:
        """How often it was stopped, saved, restored, reset; what draining took in all; what could not be carried."""
        return {**self._counts, **self.hooks.counters()}

    def _new_loader(self) -> sections.Loader:
        return sections.Loader(self.layout, self.hooks.memory_size)

    def _identity_registers(self) -> dict[str, int]:
        return self.bench.port.snapshot(self.layout.profile.identity)

    def _not_carried(self, text: str) -> None:
        self._counts["memory_not_carried"] += 1
        self.bench.warn(text)

    async def _save_memory(self, values: Mapping[str, int]) -> bytes | None:
        if not self.hooks.memory_size:
            return None
        # should the client give up meanwhile, `start` puts back what is owed
        self._owed = values
        memory = await self.hooks.save_memory()
        await self._put_back()
        if memory is None:
            self._counts["memory_not_carried"] += 1
        return memory

    async def _put_back(self) -> None:
        if self._owed is not None:
            await restore_registers(self.bench, self.hooks, self._owed, self.hooks.borrowed)
            self._owed = None

    async def _without_memory(self, values: Mapping[str, int]) -> State:
        """A state with empty memory if it can be written, else with none: what an earlier guest left must not stay."""
        writable = await self.hooks.can_restore_memory()
        return State(values, bytes(self.hooks.memory_size) if writable else None)

    async def _write(self, state: State) -> None:
        """Bring the device to rest and write `state` into it, within the time that a client waits."""
        with trio.move_on_after(RESTORE_SECONDS) as scope, memory_space(self.host):
            await quiet(self.bench, self.drain_seconds)
            await restore(self.bench, self.hooks, state)
        if scope.cancelled_caught:
            raise DeadlineError(f"{self.host.name}: writing its state took longer than {RESTORE_SECONDS} s")

    async def _reset_function(self) -> None:
        """The function's reset as far as there is one; the registers are written in any case."""
        if not self.host.can_reset:
            return
        try:
            await self.host.reset()
        except DeviceGoneError:
            raise
        except HostError as error:
            self.bench.warn(f"its function reset failed ({error}); going on with its registers")

    async def _reset_registers(self) -> None:
        values = {r.name: r.reset or 0 for r in self.layout.saved}
        state = State(values)
        if self.hooks.memory_size:
            state = await self._without_memory(values)
            if state.memory is None:
                self.bench.warn("no scratch memory for DMA: its memory could not be cleared by the reset")
        await self._write(state)
