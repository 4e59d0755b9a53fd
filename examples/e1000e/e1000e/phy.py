"""The PHY of an 82574L, behind MDIC: which of its registers travel, and how they are read and written.

Its registers are in pages, chosen by register 22 (datasheet, 10.2.2.7 and chapter 8 of the PHY). Who uses its bus owns
it, by a bit of EXTCNF_CTRL; a guest that owned it when it was stopped owns it still. Must not know the MAC's state.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from e1000e.engine import Engine
from e1000e.registers import MAC
from vfu_server.errors import HostError, RestoreError

ADDRESS = 1
PAGE, CONTROL = 22, 0
CONTROL_RESET, CONTROL_RESTART, CONTROL_AUTO = 1 << 15, 1 << 9, 1 << 12
ACTS = CONTROL_RESET | CONTROL_RESTART
WRITE, READ = 1 << 26, 2 << 26
DATA = 0xFFFF
READY, ERROR = MAC["MDIC"].field("READY").mask, MAC["MDIC"].field("ERROR").mask
OURS = MAC["EXTCNF_CTRL"].field("MDIO_SW_OWNERSHIP").mask
SECONDS = 0.5

SAVED = (
    *((0, 4), (0, 7), (0, 9), (0, 16), (0, 18), (0, 20), (0, 26)),
    *((2, 16), (2, 18), (2, 21)),
    *((3, 16), (3, 17), (3, 18)),
    (0, CONTROL),
)
"""(page, register) that software sets: what is advertised, copper control, interrupts, LEDs; last the control."""
NEGOTIATED = ((0, 4), (0, 7), (0, 9), (0, CONTROL))
"""A difference in these wants a new negotiation with the link's other end."""


class Phy:
    """The registers behind MDIC. For the time of `owned` only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @asynccontextmanager
    async def owned(self) -> AsyncIterator[None]:
        """Its bus is ours, and what was under way on it is over; the guest finds its ownership and its last answer."""
        engine = self._engine
        before = engine.read("EXTCNF_CTRL")
        await self._take()
        try:
            yield
        finally:
            engine.write("EXTCNF_CTRL", before & OURS | engine.read("EXTCNF_CTRL") & ~OURS)

    async def _take(self) -> None:
        def taken() -> bool:
            self._engine.write("EXTCNF_CTRL", self._engine.read("EXTCNF_CTRL") | OURS)
            return bool(self._engine.read("EXTCNF_CTRL") & OURS)

        await self._engine.until(taken, SECONDS, "the PHY's bus was not to be had", "EXTCNF_CTRL")

    async def ready(self) -> None:
        """What was asked for by MDIC is there, if anything was. DeadlineError."""
        if self._engine.read("MDIC") & (WRITE | READ):
            await self._engine.until(self._done, SECONDS, "the PHY did not answer", "MDIC")

    async def again(self, mdic: int) -> None:
        """Have MDIC read as it did for the guest: the last command once more. A write of what is there does no harm."""
        if mdic & (WRITE | READ):
            repeated = mdic & ~(READY | ERROR)
            if repeated & WRITE and repeated >> 16 & 31 == CONTROL:
                repeated &= ~ACTS
            self._engine.write("MDIC", repeated)
            await self.ready()

    async def read_saved(self) -> tuple[int, ...]:
        """The values of SAVED, and the page."""
        page = await self.read(PAGE)
        values = []
        try:
            for of_page, register in SAVED:
                await self.write(PAGE, of_page)
                values.append(await self.read(register) & ~(ACTS if register == CONTROL else 0))
        finally:
            with trio.CancelScope(shield=True):  # a guest that goes on finds its page
                await self.write(PAGE, page)
        return (*values, page)

    async def write_saved(self, values: tuple[int, ...]) -> None:
        """Bring SAVED and the page to `values`. RestoreError names a register that did not take its value."""
        *wanted, control, page = values
        wanted.append(control & ~ACTS)
        negotiate = False
        for (of_page, register), value in zip(SAVED, wanted, strict=True):
            await self.write(PAGE, of_page)
            if await self.read(register) == value:
                continue
            await self.write(register, value)
            if (found := await self.read(register)) != value:
                raise RestoreError(f"{self._engine.name}: PHY {of_page}.{register} reads {found:#x}, not {value:#x}")
            negotiate = negotiate or (of_page, register) in NEGOTIATED
        if negotiate and control & CONTROL_AUTO:
            await self.write(CONTROL, wanted[-1] | CONTROL_RESTART)
        await self.write(PAGE, page)

    async def reset(self) -> None:
        """As after power up. The link is negotiated anew."""
        await self.write(PAGE, 0)
        await self.write(CONTROL, await self.read(CONTROL) | CONTROL_RESET)

    async def read(self, register: int) -> int:
        """A register of the page that is chosen."""
        return await self._command(READ | register << 16) & DATA

    async def write(self, register: int, value: int) -> None:
        """Write one."""
        await self._command(WRITE | register << 16 | value)

    async def _command(self, command: int) -> int:
        self._engine.write("MDIC", command | ADDRESS << 21)
        await self._engine.until(self._done, SECONDS, "the PHY did not answer", "MDIC")
        answer = self._engine.read("MDIC")
        if answer & ERROR:
            raise HostError(f"{self._engine.name}: the PHY refused: {MAC['MDIC'].decode(answer)}")
        return answer

    def _done(self) -> bool:
        return bool(self._engine.read("MDIC") & READY)
