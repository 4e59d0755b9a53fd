"""An 82574L through the door: registers by name, waits with deadlines, making it reachable. Not what travels.

The guest may have switched memory decoding off or put the function to sleep: both are lent and put back.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

import trio

from e1000e.registers import BAR_MAC, MAC
from vfu_server.errors import DeadlineError, HostError
from vfu_server.host_device import HostDevice
from vfu_server.pci_command import memory_space
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_MASTER, RegionIndex

LOOK_SECONDS = 0.001
QUIET_LOOKS = 3
"""So often the same has to be seen, a look apart, until something counts as at rest."""
CAPABILITIES, PM_ID, PM_CONTROL, PM_STATE = 0x34, 1, 4, 3
PM_WAKE_SECONDS = 0.01
"""From D3hot to D0 (PCI Power Management 1.2, 5.6.1)."""
PME_STATUS = 0x8000
NO_ANSWER = 0xFFFFFFFF


class Engine:
    """The hardware of one function."""

    def __init__(self, host: HostDevice) -> None:
        self._host = host
        self.name = host.name
        self._power: int | None = None

    def read(self, name: str) -> int:
        """A register."""
        return self._host.read(BAR_MAC, MAC[name].offset, 4)

    def write(self, name: str, value: int) -> None:
        """Write a register."""
        self._host.write(BAR_MAC, MAC[name].offset, 4, value)

    async def read_all(self, names: Iterable[str]) -> dict[str, int]:
        """Many registers, in turn with whoever else waits for this thread."""
        found = {}
        for name in names:
            found[name] = self.read(name)
            await trio.lowlevel.checkpoint()
        return found

    async def write_all(self, values: Mapping[str, int]) -> None:
        """Many registers, in their order, likewise."""
        for name, value in values.items():
            self.write(name, value)
            await trio.lowlevel.checkpoint()

    def field(self, register: str, field: str) -> int:
        """A field of a register."""
        return MAC[register].field(field).get(self.read(register))

    async def until(self, done: Callable[[], bool], seconds: float, what: str, *shown: str) -> None:
        """Wait. DeadlineError says what for, and what the registers `shown` read."""
        with trio.move_on_after(seconds):
            while not done():  # noqa: ASYNC110 - registers are looked at
                await trio.sleep(LOOK_SECONDS)
            return
        seen = ", ".join(MAC[name].decode(self.read(name)) for name in shown)
        raise DeadlineError(f"{self.name}: {what} within {seconds:g} s: {seen}")

    async def steady(self, look: Callable[[], object], seconds: float, what: str, *shown: str) -> None:
        """Wait until `look` has given the same for some looks. DeadlineError."""
        seen: list[object] = []

        def same() -> bool:
            seen.append(look())
            return len(seen) >= QUIET_LOOKS and all(found == seen[-1] for found in seen[-QUIET_LOOKS:])

        await self.until(same, seconds, what, *shown)

    @property
    def masters(self) -> bool:
        """It may do DMA."""
        return bool(self._host.read(RegionIndex.CONFIG, PCI_COMMAND, 2) & PCI_COMMAND_MASTER)

    @asynccontextmanager
    async def reachable(self) -> AsyncIterator[None]:
        """With memory decoding on and awake. HostError if the registers do not answer all the same."""
        async with self._awake():
            with memory_space(self._host):
                if self.read("STATUS") == NO_ANSWER:
                    raise HostError(f"{self.name}: its registers do not answer")
                yield

    @asynccontextmanager
    async def _awake(self) -> AsyncIterator[None]:
        """In D0. Waking it resets it, as it would if the guest woke it."""
        at = self._power_control()
        control = self._host.read(RegionIndex.CONFIG, at, 2) & ~PME_STATUS if at else 0
        if not control & PM_STATE:
            yield
            return
        self._host.write(RegionIndex.CONFIG, at, 2, control & ~PM_STATE)
        try:
            await trio.sleep(PM_WAKE_SECONDS)
            yield
        finally:
            self._host.write(RegionIndex.CONFIG, at, 2, control)

    def _power_control(self) -> int:
        """Where PMCSR is in config space, or 0."""
        if self._power is None:
            at, seen = self._host.read(RegionIndex.CONFIG, CAPABILITIES, 1), 0
            while at and seen < 48 and self._host.read(RegionIndex.CONFIG, at, 1) != PM_ID:
                at, seen = self._host.read(RegionIndex.CONFIG, at + 1, 1), seen + 1
            self._power = at + PM_CONTROL if at and seen < 48 else 0
        return self._power
