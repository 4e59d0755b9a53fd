"""What I/OAT's table cannot say: a channel counts finished descriptors in a place that cannot be read or written.

A guest's driver writes DMACOUNT as a running total. On a fresh chain, whose count is 0, its next kick would run too
far. So the count is brought back by running as many null descriptors, whose last one points at the guest's next one:
the channel then goes on where the guest thinks it is. Not proven on hardware. Where that cannot be done the channel is
left halted, as after a reset: Linux' driver then restarts it after its time-out and fails what it had queued since.

Facts from the kernel's headers and driver (drivers/dma/ioat) and its VFIO self-test.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import trio

from plugins.generic_dmaq.bench import Bench
from plugins.generic_dmaq.drain import FIRST_PAUSE, LONGEST_PAUSE
from plugins.generic_dmaq.hooks import Hooks
from vfu_server.errors import DeadlineError, DeviceGoneError, HostError, RestoreError
from vfu_server.host_device import Scratch
from vfu_server.pci_command import lent_command
from vfu_server.regmap import Register
from vfu_server.uapi import PAGE_SIZE, PCI_COMMAND_MASTER, RegionIndex

DESCRIPTOR: Final = struct.Struct("<IIQQQ32x")
"""Size, control, source, destination, next; 64 bytes, 64-aligned."""
CONTROL_NULL: Final = 1 << 5
CONTROL_FENCE: Final = 1 << 4
OP_COPY: Final = 0
NEXT_OFFSET: Final = 24

RESET: Final = 0x20
DONE: Final = 1
HALTED: Final = 3
STATE_MASK: Final = 0x7
ADDRESS_MASK: Final = ~0x3F

CHANERR_INT: Final = 0x180
"""Config space: a second copy of the channel's errors, which devices before version 3.3 want cleared too."""
VERSION_3_3: Final = 0x33

RESET_SECONDS: Final = 0.2
FETCH_SECONDS: Final = 0.2
CHAINS_SECONDS: Final = 2.5
"""For all channels together, each with up to 65535 null descriptors: a restore must end while the client waits."""
SLICE: Final = 1024
"""Descriptors written between two looks at what else there is to do."""

# the scratch memory: one page for what is around the chain, then the null descriptors
_COMPLETION, _FETCH, _FETCHED, _CHAIN = 0, 64, 128, PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Channel:
    """What was saved of a channel."""

    name: str
    state: int
    last: int
    chain: int
    completion: int
    count: int
    errors: int

    @classmethod
    def of(cls, name: str, values: Mapping[str, int]) -> "Channel":
        """The channel `name` out of all saved registers."""
        status = values[f"{name}.chansts"]
        return cls(
            name,
            status & STATE_MASK,
            status & ADDRESS_MASK & (2**64 - 1),
            values[f"{name}.chainaddr"],
            values[f"{name}.chancmp"],
            values[f"{name}.dmacount"],
            values[f"{name}.chanerr"],
        )

    @property
    def has_run(self) -> bool:
        """It is at rest behind a chain that it has run: its place in there must be kept."""
        return self.state == DONE and self.last != 0


class IoatHooks(Hooks):
    """Restores the channels. The option `null_chain = false` leaves all of them halted that have run."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self._chains = 0
        self._halted = 0
        self._until = 0.0

    def counters(self) -> Mapping[str, int]:
        """Channels whose place was kept, and channels that were left halted instead."""
        return {"channels_kept": self._chains, "channels_halted": self._halted}

    def problem(self, values: Mapping[str, int]) -> str:
        """Every channel was done or halted."""
        for name in _channels(values):
            channel = Channel.of(name, values)
            if channel.state not in (DONE, HALTED):
                return f"{name} was not at rest (state {channel.state})"
        return ""

    async def restore_begin(self, values: Mapping[str, int]) -> None:
        """The time for all chains begins."""
        self._until = trio.current_time() + CHAINS_SECONDS

    async def restore(self, register: Register, value: int, values: Mapping[str, int]) -> None:
        """A channel, in the turn of its status register; CHANCMP, where the channel does not have it yet."""
        if not register.name.endswith(".chansts"):
            if self.bench.port.read(register.name) != value:
                self.bench.port.write_halves(register.name, value)
            return
        channel = Channel.of(register.name.rpartition(".")[0], values)
        if channel.errors:
            self.bench.warn(f"{channel.name}: the errors {channel.errors:#x} that it had are not carried")
        await self._reset(channel)
        if not channel.has_run:
            if channel.state == DONE:
                await self._leave_halted(channel, "it was done, but with no descriptor")
            elif channel.chain:
                self.bench.port.write_halves(f"{channel.name}.chainaddr", channel.chain)
            return
        if not self.bench.layout.profile.hook_options.get("null_chain", True):
            await self._leave_halted(channel, "null_chain is off in the profile")
            return
        try:
            kept = await self._keep_place(channel)
        except DeviceGoneError:
            raise
        except (DeadlineError, RestoreError, HostError) as error:
            await self._leave_halted(channel, str(error))
            return
        if kept:
            self._chains += 1
        else:
            await self._leave_halted(channel, "there is no scratch memory for DMA")

    async def _leave_halted(self, channel: Channel, why: str) -> None:
        self._halted += 1
        self.bench.warn(f"{channel.name}: left halted, its driver must restart it: {why}")
        await self._reset(channel)

    async def _reset(self, channel: Channel) -> None:
        """Clear old errors and reset the channel; it is halted then. DeadlineError with what it reads."""
        port, host, name = self.bench.port, self.bench.host, channel.name
        port.write(f"{name}.chanerr", port.read(f"{name}.chanerr"))
        if port.read("version") < VERSION_3_3 and host.regions[RegionIndex.CONFIG].size >= CHANERR_INT + 4:
            host.write(RegionIndex.CONFIG, CHANERR_INT, 4, host.read(RegionIndex.CONFIG, CHANERR_INT, 4))
        port.write(f"{name}.chancmd", RESET)

        def halted() -> bool:
            return not port.read(f"{name}.chancmd") & RESET and port.field(f"{name}.chansts.state") == HALTED

        if not await _soon(halted, RESET_SECONDS):
            shown = port.show((f"{name}.chancmd", f"{name}.chansts", f"{name}.chanerr"))
            raise DeadlineError(f"{host.name}: {name} is not reset after {RESET_SECONDS} s: {shown}")

    async def _keep_place(self, channel: Channel) -> bool:
        """Bring the channel to where it was; False without scratch memory. RestoreError, DeadlineError: it failed."""
        port = self.bench.port
        size = _CHAIN + -(-DESCRIPTOR.size * channel.count // PAGE_SIZE) * PAGE_SIZE
        async with self.bench.scratch(size) as scratch:
            if scratch is None:
                return False
            with lent_command(self.bench.host, PCI_COMMAND_MASTER):
                try:
                    following = await self._fetch_next(channel, scratch)
                    await self._reset(channel)
                    # the driver writes CHANCMP of halted channels only, so before the chain; null descriptors ask for
                    # no completion, so that none is written
                    port.write_halves(f"{channel.name}.chancmp", channel.completion)
                    await self._run_nulls(channel, following, scratch)
                except BaseException:
                    # the channel must be done with the scratch memory before that is gone
                    with trio.CancelScope(shield=True):
                        await self._reset(channel)
                    raise
        return True

    async def _fetch_next(self, channel: Channel, scratch: Scratch) -> int:
        """The address in the last finished descriptor's `next`, copied out of guest memory by the channel itself."""
        memory = scratch.memory
        source, destination = channel.last + NEXT_OFFSET, scratch.iova + _FETCHED
        memory[_FETCH : _FETCH + 64] = DESCRIPTOR.pack(8, CONTROL_FENCE, source, destination, 0)
        memory[_FETCHED : _FETCHED + 8] = bytes(8)
        self.bench.port.write_halves(f"{channel.name}.chancmp", scratch.iova + _COMPLETION)
        await self._run(channel, scratch.iova + _FETCH, 1, scratch.iova + _FETCH, FETCH_SECONDS)
        (following,) = struct.unpack_from("<Q", memory, _FETCHED)
        return int(following)

    async def _run_nulls(self, channel: Channel, following: int, scratch: Scratch) -> None:
        """Have the channel count to where it was. For a multiple of 65536 a fresh chain has the right count."""
        if not channel.count:
            self.bench.port.write_halves(f"{channel.name}.chainaddr", following)
            return
        first = scratch.iova + _CHAIN
        for index in range(channel.count):
            if index % SLICE == 0:
                await trio.lowlevel.checkpoint()
            address = first + DESCRIPTOR.size * (index + 1) if index + 1 < channel.count else following
            at = _CHAIN + DESCRIPTOR.size * index
            DESCRIPTOR.pack_into(scratch.memory, at, 1, CONTROL_NULL, 0, 0, address)
        last = first + DESCRIPTOR.size * (channel.count - 1)
        await self._run(channel, first, channel.count, last, self._until - trio.current_time())

    async def _run(self, channel: Channel, first: int, count: int, last: int, seconds: float) -> None:
        """Run `count` descriptors from `first` on a halted channel, up to the one at `last`, without interrupt."""
        port, name = self.bench.port, channel.name
        port.write(f"{name}.chanctrl", 0)
        port.write_halves(f"{name}.chainaddr", first)
        port.write(f"{name}.dmacount", count)

        def finished() -> bool:
            return port.read(f"{name}.chansts") & (STATE_MASK | ADDRESS_MASK) == last | DONE

        # it was halted before it was kicked, so only an error tells that it has stopped
        ended = await _soon(lambda: finished() or port.read(f"{name}.chanerr") != 0, seconds)
        if not ended or not finished():
            shown = port.show((f"{name}.chansts", f"{name}.chanerr", f"{name}.dmacount"))
            raise RestoreError(f"{self.bench.host.name}: {name} did not run {count} descriptors of ours: {shown}")


def _channels(values: Mapping[str, int]) -> list[str]:
    """The names of the channels whose registers are in `values`."""
    return [name.rpartition(".")[0] for name in values if name.endswith(".chansts")]


async def _soon(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` comes true within `seconds`; it is looked at once at least."""
    until = trio.current_time() + seconds
    pause = FIRST_PAUSE
    while not condition():
        if trio.current_time() >= until:
            return False
        await trio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return True
