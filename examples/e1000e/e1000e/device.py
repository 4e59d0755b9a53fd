"""An 82574L under this plugin's care: the contract's methods, each in terms of engine, PHY, rest and state."""

from collections.abc import Mapping

import trio

from e1000e.engine import Engine
from e1000e.phy import Phy
from e1000e.policy import NEVER_WRITTEN, policy_for
from e1000e.registers import BAR_FLASH, BAR_IO, BAR_MAC, BAR_MSIX, IO, IO_SIZE, MAC, MAC_SIZE
from e1000e.rest import RST, Rest
from e1000e.state import EN, HELD, IGNORED, OWNED, PLAIN, SEMAPHORE, SIZES, State, state_of
from e1000e.statistics import MOST, NAMES, Counted
from vfu_server.device import Capabilities, Device, SavePhase, Section, Sink, StateIdentity, StopKind
from vfu_server.errors import ClientError, PluginError, RestoreError, StreamFormatError
from vfu_server.host_device import HostDevice
from vfu_server.policy import Policy
from vfu_server.uapi import RegionIndex

VARIANT = "82574l"
STATE_VERSION = 1
MEMORY_REGIONS = (BAR_MAC, BAR_FLASH, BAR_IO, BAR_MSIX, int(RegionIndex.ROM))
HEADS = {f"{ring}[{n}].{ring[0]}DT": f"{ring}[{n}].{ring[0]}DH" for ring in ("RX", "TX") for n in (0, 1)}
"""Tail to head."""
IOADDR, IODATA = IO["IOADDR"].offset, IO["IODATA"].offset
CONTROLS = (MAC["CTRL"].offset, MAC["CTRL_DUP"].offset)
EERD_START, EERD_DONE, EERD_ADDRESS = 1, 2, 0xFFFC


class E1000eDevice(Device):
    """One function."""

    def __init__(self, host: HostDevice) -> None:
        super().__init__(host)
        self._engine = Engine(host)
        self._phy = Phy(self._engine)
        self._rest = Rest(self._engine, self._phy)
        self._counted = Counted(self._engine.read)
        self._io_address = 0
        self._held: dict[str, int] = {}
        """HELD while it is stopped."""
        self._payloads: dict[str, bytes] = {}

    @property
    def identity(self) -> StateIdentity:
        """One kind, version 1 of its state."""
        return StateIdentity(VARIANT, STATE_VERSION)

    @property
    def capabilities(self) -> Capabilities:
        """The function has no reset that reaches its registers: CTRL.RST is ours."""
        return Capabilities(resets=True)

    @property
    def policy(self) -> Policy:
        """For the regions that this card has."""
        sizes = {index: self.host.regions[index].size for index in MEMORY_REGIONS}
        if (sizes[BAR_MAC], sizes[BAR_IO]) not in ((MAC_SIZE, IO_SIZE), (MAC_SIZE, 0)):
            raise PluginError(f"{self.host.name}: BAR 0 has {sizes[BAR_MAC]:#x} bytes, BAR 2 {sizes[BAR_IO]:#x}")
        return policy_for(sizes)

    # --- accesses that pass by us ---

    def trap_read(self, region: int, offset: int, width: int) -> int:
        """Statistics, and the window of BAR 2."""
        if offset % 4:
            raise ClientError(f"a read of {width} bytes at {offset:#x}: registers have 4 and lie at multiples of 4")
        with self.lock:
            if region == BAR_MAC:
                return self._counted.take(offset)
            if offset == IOADDR:
                return self._io_address
            if self._io_address in NAMES:
                return self._counted.take(self._io_address)
            self.host.write(BAR_IO, IOADDR, 4, self._io_address)
            return self.host.read(BAR_IO, IODATA, 4)

    def trap_write(self, region: int, offset: int, width: int, value: int) -> None:
        """CTRL, for its reset, and the window of BAR 2, through which the flash cannot be written."""
        if offset % 4:
            raise ClientError(f"a write of {width} bytes at {offset:#x}: registers have 4 and lie at multiples of 4")
        with self.lock:
            if region == BAR_IO and offset == IOADDR:
                self._io_address = value
                return
            address = offset if region == BAR_MAC else self._io_address
            if region == BAR_MAC:
                self.host.write(region, offset, width, value)
            elif self._window_writes(address):
                self.host.write(BAR_IO, IOADDR, 4, address)
                self.host.write(BAR_IO, IODATA, 4, value)
            if address in CONTROLS and value & RST:
                self._counted.forget()

    @staticmethod
    def _window_writes(address: int) -> bool:
        register = MAC.at(address) if address < MAC_SIZE else None
        return register is not None and register.offset == address and register.name not in NEVER_WRITTEN

    # --- states ---

    async def stop(self, kind: StopKind) -> None:
        """Receive off, what was given to send sent, transmit off, no interrupt."""
        async with self._engine.reachable():
            self._held = await self._rest.stop()

    async def start(self, kind: StopKind) -> None:
        """Back as it was, or as it came."""
        if not self._held:
            return
        async with self._engine.reachable():
            await self._rest.start(self._held)

    async def reset(self) -> None:
        """The door's, where it has one, then ours, which reaches the registers; nothing of the guest's is left."""
        if self.host.can_reset:
            await self.host.reset()
        async with self._engine.reachable():
            await self._rest.reset()
            async with self._phy.owned():
                await self._phy.reset()
            with self.lock:
                self._counted.forget()
                self._io_address = 0
        self._held = {}

    # --- save and load ---

    async def save(self, phase: SavePhase, sink: Sink) -> None:
        """All in one go; a device that runs has nothing to give that will not change."""
        if phase is not SavePhase.STOP_COPY:
            return
        async with self._engine.reachable():
            state = await self._read()
        for section in state.sections():
            await sink.send(section)

    async def estimate(self) -> int:
        """What save gives."""
        return sum(SIZES.values())

    async def _read(self) -> State:
        registers = _plain(await self._engine.read_all(PLAIN)) | self._held
        return State(registers, await self._read_phy(), await self._counts(), self._io_address)

    async def _read_phy(self) -> tuple[int, ...]:
        async with self._phy.owned():
            try:
                return await self._phy.read_saved()
            finally:
                with trio.CancelScope(shield=True):
                    await self._phy.again(self._held["MDIC"])

    async def _counts(self) -> dict[str, int]:
        counts = {}
        for name in MOST:
            with self.lock:
                counts[name] = self._counted.value(name)
            await trio.lowlevel.checkpoint()
        return counts

    def knows(self, tag: str, version: int) -> bool:
        """Everything else is refused by name before it is read."""
        return tag in SIZES and version == 1

    async def load_begin(self) -> None:
        """Forget an abandoned load."""
        self._payloads = {}

    async def load(self, section: Section) -> None:
        """Keep: what belongs together is checked together, before anything is written."""
        if section.tag in self._payloads or len(section.payload) != SIZES[section.tag]:
            raise StreamFormatError(f"section {section.tag}: {len(section.payload)} bytes, or it came twice")
        self._payloads[section.tag] = section.payload

    async def load_done(self) -> None:
        """Into a card that was just reset; heads while it is off, tails not before the start. Then read it all back."""
        state = state_of(self._payloads)
        async with self._engine.reachable():
            await self._rest.reset(tables=False)
            await self._write_registers(state.registers)
            await self._write_rest(state)
            await self._verify(state)

    async def _write_registers(self, wanted: Mapping[str, int]) -> None:
        """PLAIN, where the card has something else: most are as after a reset. RestoreError names one that it keeps."""
        found = _plain(await self._engine.read_all(PLAIN))
        written = {name: wanted[name] for name in PLAIN if found[name] != wanted[name]}
        await self._engine.write_all(written)
        for name, value in _plain(await self._engine.read_all(written)).items():
            if value != wanted[name]:
                decoded = MAC[name].decode(value)
                raise RestoreError(f"{self.host.name}: {decoded} after {wanted[name]:#x} was written")

    async def _write_rest(self, state: State) -> None:
        engine, held = self._engine, {name: state.registers[name] for name in HELD}
        for tail, head in HEADS.items():
            engine.write(tail, state.registers[head])  # an empty ring, until it is told how full
        for name in ("RCTL", "TCTL"):
            engine.write(name, held[name] & ~EN)
        if state.registers["TIMINCA"]:
            engine.write("SYSTIML", held["SYSTIML"])
            engine.write("SYSTIMH", held["SYSTIMH"])
        async with self._phy.owned():
            await self._phy.write_saved(state.phy)
        if held["EERD"] & EERD_DONE:  # this card's own word, for a guest that has not fetched the answer yet
            engine.write("EERD", held["EERD"] & EERD_ADDRESS | EERD_START)
        engine.write("EXTCNF_CTRL", engine.read("EXTCNF_CTRL") & ~OWNED | held["EXTCNF_CTRL"])
        engine.write("SWSM", held["SWSM"])
        with self.lock:
            self._counted.replace(state.counted)
            self._io_address = state.io_address
        self._held = held

    async def _verify(self, wanted: State) -> None:
        """RestoreError. The rest of HELD is written at the start."""
        if (found := await self._read_phy()) != wanted.phy:
            raise RestoreError(f"{self.host.name}: the PHY reads {found}, not {wanted.phy}")
        semaphore = self._engine.read("SWSM") & SEMAPHORE
        self._engine.write("SWSM", self._held["SWSM"])
        if semaphore & ~1 != self._held["SWSM"] & ~1:
            raise RestoreError(f"{self.host.name}: {MAC['SWSM'].decode(semaphore)}")


def _plain(found: Mapping[str, int]) -> dict[str, int]:
    """Registers without the bits that act and do not stay."""
    return {name: value & ~IGNORED.get(name, 0) for name, value in found.items()}
