"""How an 82574L comes to rest, goes on and is reset. Must not know sections or the server's states.

Everything here is called with the function reachable. The steps and their order are the datasheet's: 4.6 (reset),
7.1 and 7.2 (rings), 7.4 (interrupts).
"""

from contextlib import suppress

import trio

from e1000e.engine import Engine
from e1000e.phy import Phy
from e1000e.registers import COUNTERS, MAC, QUEUES
from e1000e.state import CAUSES, EN, HELD, IGNORED, LINK, OWNED, SEMAPHORE, TAILS
from vfu_server.errors import DeadlineError

DRAIN_SECONDS = 2.0
QUIET_SECONDS = 0.5
"""With the PHY's and the wake-up's, all of it is below the 4 s that the server gives a stop."""
RESET_SECONDS, MASTER_SECONDS = 1.0, 0.2
MESSAGE_SECONDS = 0.05
"""Longer than EITR can put a message off: 65535 times 256 ns."""
MESSAGES = 0x01F00000
"""Causes that have messages of their own."""
ALL = 0xFFFFFFFF
CTRL = MAC["CTRL"]
RST, PHY_RST, MASTER_DISABLE = (CTRL.field(name).mask for name in ("RST", "PHY_RST", "GIO_MASTER_DISABLE"))
FLUSH = MAC["RDTR"].field("FPD").mask
LSC = 1 << 2
RUNNING = ("RCTL", "TCTL")
AS_RESET = {each.name: each.reset for each in MAC.saved if each.reset is not None and each.name not in HELD}


class Rest:
    """One function's way to rest and back."""

    def __init__(self, engine: Engine, phy: Phy) -> None:
        self._engine, self._phy = engine, phy

    async def stop(self) -> dict[str, int]:
        """No DMA, no interrupt. What was read on the way, HELD, by name. Raised: it goes on as before."""
        engine = self._engine
        held = {name: engine.read(name) for name in ("RCTL", "TCTL", "IMS")} | {"ICR": 0}
        try:
            engine.write("IMC", ALL)
            engine.write("RCTL", held["RCTL"] & ~EN)
            self._write_back()
            await self._sent(held["TCTL"])
            engine.write("TCTL", held["TCTL"] & ~EN)
            self._write_back()
            await engine.steady(self._heads, QUIET_SECONDS, "the rings do not come to rest", "RX[0].RDH", "TX[0].TDH")
            await self._phy.ready()
            await engine.until(self._nvm_read, QUIET_SECONDS, "the NVM does not answer", "EERD")
            held["ICR"] = engine.read("ICR") & CAUSES
            return held | self._seen()
        except BaseException:
            self._go_on(held)
            raise

    def _write_back(self) -> None:
        """Descriptors that are done and interrupts that were put off go out now."""
        for name in ("RDTR", "TIDV"):
            self._engine.write(name, self._engine.read(name) | FLUSH)
        self._engine.read("STATUS")  # posted writes have arrived

    async def _sent(self, control: int) -> None:
        """What the guest gave to send is sent: the card keeps descriptors that were fetched where nobody can see them.

        Without a link, or where the guest has switched something off, nothing is under way and nothing is waited for.
        """
        engine = self._engine
        if not control & EN or not engine.masters or engine.read("CTRL") & MASTER_DISABLE:
            return

        def done() -> bool:
            if not engine.field("STATUS", "LU"):
                return True
            return not engine.read("TDFPC") and all(map(self._empty, range(QUEUES)))

        shown = [f"TX[{n}].{name}" for n in range(QUEUES) for name in ("TDH", "TDT")]
        await engine.until(done, DRAIN_SECONDS, "the transmit rings do not run empty", *shown, "TDFPC", "STATUS")

    def _empty(self, queue: int) -> bool:
        ring = f"TX[{queue}]"
        if not self._engine.read(f"{ring}.TDLEN") or not self._engine.field(f"{ring}.TARC", "ENABLE"):
            return True
        return self._engine.read(f"{ring}.TDH") == self._engine.read(f"{ring}.TDT")

    def _heads(self) -> list[int]:
        return [self._engine.read(f"{ring}[{n}].{ring[0]}DH") for ring in ("RX", "TX") for n in range(QUEUES)]

    def _nvm_read(self) -> bool:
        word = self._engine.read("EERD")
        return not word & 1 or bool(word & MAC["EERD"].field("DONE").mask)

    def _seen(self) -> dict[str, int]:
        engine = self._engine
        seen = {name: engine.read(name) for name in ("MDIC", "EERD", "SYSTIML", "SYSTIMH", *TAILS)}
        seen["EXTCNF_CTRL"] = engine.read("EXTCNF_CTRL") & OWNED
        seen["STATUS"] = engine.read("STATUS") & LINK
        seen["SWSM"] = engine.read("SWSM") & SEMAPHORE
        engine.write("SWSM", seen["SWSM"])  # to read it is to take it
        return seen

    async def start(self, held: dict[str, int]) -> None:
        """Undo stop, also on a card that was restored: transmit, receive, interrupts last. Raised: it is stopped."""
        try:
            self._go_on(held)
            await self._messages_again(held["IMS"])
        except BaseException:
            self._engine.write("IMC", ALL)
            for name in RUNNING:
                self._engine.write(name, held[name] & ~EN)
            raise

    async def _messages_again(self, mask: int) -> None:
        """Messages that masked their own cause (EIAC) are sent once more: nobody knows whether the guest has seen them.

        A VMM may have been stopped with a message in its hands; the cause is gone from ICR then, and the guest's driver
        waits for ever. To a driver that has seen it another one says that there is nothing to do.
        """
        engine = self._engine
        again = engine.read("EIAC") & MESSAGES & ~mask
        if not again:
            return
        engine.write("IMS", again)
        engine.write("ICS", again)
        with suppress(DeadlineError):
            await engine.until(lambda: not engine.read("IMS") & again, MESSAGE_SECONDS, "a message does not go", "IMS")
        if left := engine.read("IMS") & again:  # no message is set up for these
            engine.write("IMC", left)
            engine.write("ICR", left)

    def _go_on(self, held: dict[str, int]) -> None:
        engine = self._engine
        for name, tail in (("TCTL", "TDT"), ("RCTL", "RDT")):
            engine.write(name, held[name])
            for n in range(QUEUES):
                if (ring := f"{name[0]}X[{n}].{tail}") in held:
                    engine.write(ring, held[ring])
        causes = held["ICR"]
        if "STATUS" in held and engine.read("STATUS") & LINK != held["STATUS"]:
            causes |= LSC  # the guest shall look at its link
        engine.write("IMS", held["IMS"])
        engine.write("ICS", causes)
        engine.read("STATUS")

    async def reset(self, *, tables: bool = True) -> None:
        """The MAC as after power up, all of it that software can reach; it does no DMA afterwards. DeadlineError.

        Without `tables` what the card's own reset leaves is left: for who writes all of it next.
        """
        engine = self._engine
        engine.write("IMC", ALL)
        for name in RUNNING:
            engine.write(name, engine.read(name) & ~EN)
        engine.write("CTRL", engine.read("CTRL") & ~(RST | PHY_RST) | MASTER_DISABLE)
        with suppress(DeadlineError):  # some transaction may hang; the reset ends it (3.1.3.10)
            await engine.until(self._no_master, MASTER_SECONDS, "it stays a master of the bus", "STATUS")
        engine.write("CTRL", engine.read("CTRL") | RST)
        await trio.sleep(0.001)  # not to be touched for a microsecond (10.2.2.1)
        await engine.until(self._is_reset, RESET_SECONDS, "the reset does not end", "CTRL", "EEC")
        engine.write("IMC", ALL)
        engine.write("CTRL", engine.read("CTRL") & ~(IGNORED["CTRL"] | MASTER_DISABLE))
        if tables:
            await engine.write_all(AS_RESET)
        engine.read("ICR")
        await engine.read_all(COUNTERS)  # which clears them, whatever the reset did

    def _no_master(self) -> bool:
        return not self._engine.field("STATUS", "GIO_MASTER_ENABLED")

    def _is_reset(self) -> bool:
        return not self._engine.read("CTRL") & RST and bool(self._engine.field("EEC", "AUTO_RD"))
