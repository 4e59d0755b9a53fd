"""An 82574L in software, from the datasheet: `python -m e1000e.model --socket-path PATH`.

Interrupts, rings, address filters, counters, PHY and NVM. At the other end of its link is a station (`wire.py`).
What it leaves out: offloads, RSS (all frames go to ring 0), VLAN, split headers, delayed interrupts, flow control and
wake-up.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial

from e1000e.mac_filter import accepts
from e1000e.model_phy import PhyRegisters
from e1000e.registers import (
    BAR_FLASH,
    BAR_IO,
    BAR_MAC,
    BAR_MSIX,
    BAR_SIZES,
    DEVICE,
    IO,
    MAC,
    QUEUES,
    VECTORS,
    VENDOR,
)
from e1000e.rings import ReceiveRing, TransmitRing
from e1000e.wire import Station
from vfu_server.model import Bus, BusError
from vfu_server.model_registers import RegisterModel
from vfu_server.model_server import main
from vfu_server.pciconfig import PciConfig
from vfu_server.regmap import Block

ADDRESS = bytes.fromhex("525400123456")
NVM_WORDS, NVM_SUM = 0x40, 0xBABA
NVM = [int.from_bytes(ADDRESS[at : at + 2], "little") for at in (0, 2, 4)]
NVM += [0] * (NVM_WORDS - 1 - len(NVM))
NVM.append(NVM_SUM - sum(NVM) & 0xFFFF)
"""The address, and what makes the sum right (6.1); nothing of it is configured otherwise."""
EN, LINK_UP, GIGABIT, FULL_DUPLEX = 1 << 1, 1 << 1, 2 << 6, 1
RST, PHY_RST, MASTER_DISABLE, MASTER_ENABLED = 1 << 26, 1 << 31, 1 << 2, 1 << 19
NVM_PRESENT, AUTO_RD = 1 << 8, 1 << 9
TXDW, LSC, RXO, RXT0, MDAC = 1, 1 << 2, 1 << 6, 1 << 7, 1 << 9
RXQ0, TXQ0, OTHER, ASSERTED = 1 << 20, 1 << 22, 1 << 24, 1 << 31
OTHERS = LSC | MDAC | RXO
PLACES = 5
"""Causes that have a message of their own: bits 20 to 24 of ICR, from the lowest place of IVAR on."""
IVAR_VALID, IAME = 8, 1 << 27
CONTROL_AFTER_RESET = 0x00140240
TRANSMIT_AFTER_RESET, GAP_AFTER_RESET, ENABLED_QUEUE, SHOWN_QUEUE = 0x3003F0F8, 0x00602006, 0x403, 1 << 22
TABLES = ("MTA", "VFTA", "RA", "RETA", "RSSRK", "FFLT", "FFMT", "FFVT", "IP4AT", "IP6AT")
KEPT = ("PBA", "PBS", *(each.name for each in MAC.ordered if each.name.partition("[")[0] in TABLES))
"""What CTRL.RST leaves as it is."""


class E1000eModel(RegisterModel):
    """One function. Faults to order: `tx-stuck` (a frame is never sent), `phy-silent`, `phy-keeps` (a register of the
    PHY does not take what is written), `no-reset` (a reset that does not end), `frame-lost` (the station's).
    """

    def __init__(self) -> None:
        config = PciConfig(vendor=VENDOR, device=DEVICE, class_code=0x020000, interrupt_pin=1)
        for index, size in BAR_SIZES.items():
            config.add_bar(index, size, io=index == BAR_IO)
        config.add_power_management(0xC8)
        config.add_msi(0xD0, 1)
        config.add_express(0xE0, flr=False, version=1)
        config.add_msix(0xA0, VECTORS, table=(BAR_MSIX, 0), pba=(BAR_MSIX, 0x2000))
        blocks = {
            BAR_MAC: MAC,
            BAR_FLASH: Block("flash", BAR_SIZES[BAR_FLASH]),
            BAR_IO: IO,
            BAR_MSIX: Block("MSI-X", BAR_SIZES[BAR_MSIX]),
        }
        self._phy = PhyRegisters()
        self._life = 0
        self._station = Station()
        super().__init__(blocks, vendor=VENDOR, device=DEVICE, class_code=0x020000, config=config)

    def plug(self, bus: Bus) -> None:
        """Power."""
        super().plug(bus)
        self.reset()

    def reset(self) -> None:
        """As after power up: DEVICE_RESET reaches everything."""
        super().reset()
        self._phy.reset()
        self._mac_reset()
        self["PBA"] = 0x00140014
        self["WUC"] = 0

    def _mac_reset(self) -> None:
        """CTRL.RST: PBA and the filters' tables stay, the first address comes from the NVM again."""
        self._life += 1
        kept = {name: self[name] for name in KEPT}
        self.clear()
        for name, value in kept.items():
            self[name] = value
        self["CTRL"], self["STATUS"] = CONTROL_AFTER_RESET, MASTER_ENABLED | GIGABIT | LINK_UP | FULL_DUPLEX
        self["EEC"] = NVM_PRESENT | AUTO_RD
        self["RA[0].RAL"] = int.from_bytes(ADDRESS[:4], "little")
        self["RA[0].RAH"] = int.from_bytes(ADDRESS[4:], "little") | 1 << 31
        for n in range(QUEUES):
            self[f"TX[{n}].TARC"], self[f"TX[{n}].TXDCTL"] = ENABLED_QUEUE, SHOWN_QUEUE
        self["TCTL"], self["TIPG"] = TRANSMIT_AFTER_RESET, GAP_AFTER_RESET
        self._receive = [ReceiveRing(self, n) for n in range(QUEUES)]
        self._transmit = [TransmitRing(self, n) for n in range(QUEUES)]
        self._raise_intx()

    def state(self) -> Mapping[str, int]:
        """Registers, PHY, and what the station has seen: how many frames, the sum of their numbers, how many twice."""
        seen = self._station.seen
        told = {"frames": len(seen), "numbers": sum(seen), "repeated": sum(seen.values()) - len(seen)}
        return {**super().state(), **self._phy.state(), **{f"station.{name}": value for name, value in told.items()}}

    # --- control ---

    def write_CTRL(self, value: int) -> None:
        """RST resets; PHY_RST the PHY."""
        if value & RST:
            if self.faults.take("no-reset"):
                self["CTRL"] = value
                return
            self._mac_reset()
            return
        if value & PHY_RST:
            self._phy.reset()
        self["CTRL"] = value & ~PHY_RST
        enabled = 0 if value & MASTER_DISABLE else MASTER_ENABLED
        self["STATUS"] = self["STATUS"] & ~MASTER_ENABLED | enabled

    def write_CTRL_DUP(self, value: int) -> None:
        """The same register."""
        self.write_CTRL(value)

    def read_CTRL_DUP(self) -> int:
        """The same register."""
        return self["CTRL"]

    def write_EERD(self, value: int) -> None:
        """A word of the NVM, at once."""
        address = value >> 2 & 0x3FFF
        if value & 1 and address < len(NVM):
            self["EERD"] = NVM[address] << 16 | address << 2 | 2
        else:
            self["EERD"] = address << 2

    def write_MDIC(self, value: int) -> None:
        """A register of the PHY. At once, since drivers give it milliseconds and a busy machine takes more."""
        self["MDIC"] = value & ~(1 << 28)
        if self.faults.take("phy-silent"):
            return
        answer = self._phy.command(value, keeps=bool(value >> 26 & 1) and self.faults.take("phy-keeps"))
        self["MDIC"] = value & ~0xFFFF | answer | 1 << 28
        if value & 1 << 29:
            self.cause(MDAC)

    def read_SWSM(self) -> int:
        """Reading is taking."""
        value = self["SWSM"]
        self["SWSM"] = value | 1
        return value

    def write_SWSM(self, value: int) -> None:
        """The semaphore's bits, and the driver's."""
        self["SWSM"] = value & 0x0F

    # --- interrupts ---

    def read_ICR(self) -> int:
        """Causes. They are taken if none is let through, or if an interrupt was asserted (10.2.4.1)."""
        value = self["ICR"]
        asserted = bool(value & self["IMS"])
        if not self["IMS"] or asserted or not self.bus.msix_enabled:
            self["ICR"] = 0
        if asserted and self["CTRL_EXT"] & IAME:
            self["IMS"] &= ~self["IAM"]
        self._raise_intx()
        return value | (ASSERTED if asserted else 0)

    def write_ICR(self, value: int) -> None:
        """Ones are cleared."""
        self["ICR"] &= ~value
        self._raise_intx()

    def write_ICS(self, value: int) -> None:
        """Raise causes."""
        self.cause(value & 0x01FFFFFF)

    def write_IMS(self, value: int) -> None:
        """Let causes through: those that wait go off."""
        waiting = self["ICR"] & value & ~self["IMS"]
        self["IMS"] |= value & 0x01FFFFFF
        self._signal(waiting)

    def write_IMC(self, value: int) -> None:
        """Mask causes."""
        self["IMS"] &= ~value
        self._raise_intx()

    def cause(self, bits: int) -> None:
        """Something happened."""
        if bits & OTHERS:
            bits |= OTHER
        self["ICR"] |= bits
        self._signal(bits & self["IMS"])

    def _signal(self, causes: int) -> None:
        if not causes:
            return
        if self.bus.msix_enabled:
            for place in range(PLACES):
                if causes & RXQ0 << place:
                    self._message(place)
        elif self.bus.messages_enabled:
            self.interrupt(0)
        self._raise_intx()

    def _message(self, place: int) -> None:
        entry = self["IVAR"] >> 4 * place & 0xF
        if entry & IVAR_VALID:
            self.interrupt(entry & 7)
            cleared = self["EIAC"] & RXQ0 << place
            self["ICR"] &= ~cleared
            if not self["CTRL_EXT"] & IAME:
                self["IMS"] &= ~cleared

    def _raise_intx(self) -> None:
        self.bus.intx(bool(self["ICR"] & self["IMS"]) and not self.bus.messages_enabled)

    # --- rings ---

    def write_RCTL(self, value: int) -> None:
        """Receive on or off."""
        self["RCTL"] = value

    def write_TCTL(self, value: int) -> None:
        """Transmit on or off."""
        self["TCTL"] = value
        self._transmit_later()

    def write_TX_TDT(self, index: int, value: int) -> None:
        """Descriptors to send."""
        self[f"TX[{index}].TDT"] = value & 0xFFFF
        self._transmit_later()

    def write_TX_TDH(self, index: int, value: int) -> None:
        """While it is off."""
        if not self["TCTL"] & EN:
            self[f"TX[{index}].TDH"] = value & 0xFFFF

    def write_RX_RDT(self, index: int, value: int) -> None:
        """Descriptors to fill."""
        self[f"RX[{index}].RDT"] = value & 0xFFFF

    def write_RX_RDLEN(self, index: int, value: int) -> None:
        """In units of 128 bytes."""
        self[f"RX[{index}].RDLEN"] = value & 0xFFF80

    def write_TX_TDLEN(self, index: int, value: int) -> None:
        """In units of 128 bytes."""
        self[f"TX[{index}].TDLEN"] = value & 0xFFF80

    def write_RX_RDH(self, index: int, value: int) -> None:
        """While it is off."""
        if not self["RCTL"] & EN:
            self[f"RX[{index}].RDH"] = value & 0xFFFF

    def write_RDTR(self, value: int) -> None:
        """FPD does not stay."""
        self["RDTR"] = value & 0xFFFF

    def write_TIDV(self, value: int) -> None:
        """FPD does not stay."""
        self["TIDV"] = value & 0xFFFF

    def _transmit_later(self) -> None:
        self.soon(0.0005, self._transmit_one)

    def _transmit_one(self) -> None:
        """A frame of each ring; again while there is more."""
        more = False
        for n, ring in enumerate(self._transmit):
            if (
                not self["TCTL"] & EN
                or not ring.waiting
                or not self["STATUS"] & LINK_UP
                or self.faults.take("tx-stuck")
            ):
                continue
            try:
                frame = ring.next_frame()
            except BusError:
                return  # as on hardware: it hangs
            if frame:
                self._sent(frame)
            self.cause((TXDW if not self.bus.msix_enabled else 0) | TXQ0 << n)
            more = more or ring.waiting
        if more:
            self._transmit_later()

    def _sent(self, frame: bytes) -> None:
        self.count("GPTC", "TPT")
        self.count_bytes(len(frame) + 4, "GOTC", "TOT")
        for answer in self._station.hears(frame):
            self.soon(0.0005, partial(self._received, answer))

    def _received(self, frame: bytes) -> None:
        if not self["RCTL"] & EN or not self["STATUS"] & LINK_UP or self.faults.take("frame-lost"):
            return
        self.count("TPR")
        self.count_bytes(len(frame) + 4, "TOR")
        if not accepts(self, frame):
            return
        try:
            taken = self._receive[0].put(frame)
        except BusError:
            return
        if taken:
            self.count("GPRC")
            self.count_bytes(len(frame) + 4, "GORC")
            self.cause((RXT0 if not self.bus.msix_enabled else 0) | RXQ0)
        else:
            self.count("MPC", "RNBC")
            self.cause(RXO)

    # --- time and counting ---

    def soon(self, seconds: float, what: Callable[[], None]) -> None:
        """Later, unless it was reset meanwhile."""
        life = self._life

        def happen() -> None:
            if life == self._life:
                what()

        self.later(seconds, happen)

    def count(self, *names: str) -> None:
        """One more."""
        for name in names:
            self[name] = min(self[name] + 1, 0xFFFFFFFF)

    def count_bytes(self, length: int, *names: str) -> None:
        """More of a counter of 64 bits."""
        for name in names:
            total = self[f"{name}L"] + (self[f"{name}H"] << 32) + length
            self[f"{name}L"], self[f"{name}H"] = total & 0xFFFFFFFF, total >> 32

    def read_GORCL(self) -> int:
        """The low half stays until the high one is read."""
        return self["GORCL"]

    def read_GOTCL(self) -> int:
        """As GORCL."""
        return self["GOTCL"]

    def read_TORL(self) -> int:
        """As GORCL."""
        return self["TORL"]

    def read_TOTL(self) -> int:
        """As GORCL."""
        return self["TOTL"]

    def read_GORCH(self) -> int:
        """Both are cleared."""
        return self._take_wide("GORC")

    def read_GOTCH(self) -> int:
        """Both are cleared."""
        return self._take_wide("GOTC")

    def read_TORH(self) -> int:
        """Both are cleared."""
        return self._take_wide("TOR")

    def read_TOTH(self) -> int:
        """Both are cleared."""
        return self._take_wide("TOT")

    def _take_wide(self, name: str) -> int:
        high, self[f"{name}L"], self[f"{name}H"] = self[f"{name}H"], 0, 0
        return high

    # --- the window of BAR 2 ---

    def read_IODATA(self) -> int:
        """The register of BAR 0 that IOADDR names."""
        return self.read(BAR_MAC, self["IOADDR"], 4)

    def write_IODATA(self, value: int) -> None:
        """Likewise."""
        self.write(BAR_MAC, self["IOADDR"], 4, value)


if __name__ == "__main__":
    sys.exit(main(E1000eModel))
