"""A guest's driver for tests (`Traffic`): numbered frames out, their answers in, each compared. It may be moved.

It knows the card by its datasheet and the station at the other end by `wire.py`. Must not know the plugin.
"""

import random
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from e1000e.registers import MAC
from e1000e.wire import ADDRESSES, HEADER, SHORTEST, TURNED, frame_of
from vfu_server.testing import Guest, Interrupts
from vfu_server.uapi import IrqIndex

ENTRIES, BUFFER = 16, 2048
DESCRIPTOR = 16
RINGS = 4096
SIZE = RINGS + 2 * ENTRIES * BUFFER
"""Bytes of guest memory that it takes."""
LONGEST = 1514
RST, SLU, LINK_UP = 1 << 26, 1 << 6, 1 << 1
EN, BROADCASTS, STRIP_CRC = 1 << 1, 1 << 15, 1 << 26
TRANSMIT = EN | 1 << 3 | 0x0F << 4 | 0x3F << 12
"""Enabled, short ones padded, collisions as 10.2.7.1 recommends."""
EOP, IFCS, RS, DONE = 1, 2, 8, 1
TXDW, LSC, RXT0, RXQ0, TXQ0 = 1, 4, 1 << 7, 1 << 20, 1 << 22
WANTED = TXDW | RXT0 | RXQ0 | TXQ0 | LSC
VECTORS = 3
IVAR = 0x8 | 0x9 << 8 | 0xA << 16
"""Received frames by message 0, sent ones by 1, the rest by 2."""
NVM_START, NVM_DONE = 1, 2
STATION = b"\xff" * 6


@dataclass(slots=True)
class Count:
    """What became of the frames: by number, how often an answer came; and those whose answer the wire lost."""

    sent: int = 0
    answers: dict[int, int] = field(default_factory=dict)
    interrupts: int = 0

    @property
    def lost(self) -> int:
        """Frames without an answer until now."""
        return self.sent - len(self.answers)


class Traffic:
    """One function of a guest that has started. `start`: where its memory begins. AssertionError for what is wrong."""

    def __init__(self, guest: Guest, start: int, address: bytes, seconds: float) -> None:
        self.guest, self._start, self.address, self._seconds = guest, start, address, seconds
        self._receive, self._transmit = start, start + ENTRIES * DESCRIPTOR
        self._received = self._sent = self._done = 0
        """Descriptors used since the start."""
        self._messages = 0
        self.count = Count()

    # --- registers ---

    def read(self, name: str) -> int:
        """A register."""
        return self.guest.read(0, MAC[name].offset, 4)

    def write(self, name: str, value: int) -> None:
        """Write a register."""
        self.guest.write(0, MAC[name].offset, 4, value)

    def word_of_nvm(self, number: int) -> int:
        """A word of the NVM."""
        self.write("EERD", number << 2 | NVM_START)
        self._wait("the NVM", lambda: bool(self.read("EERD") & NVM_DONE))
        return self.read("EERD") >> 16

    def bring_up(self, messages: str = "msi") -> None:
        """As a driver does after its probe. `messages`: msi, msix or intx."""
        self.write("IMC", 0xFFFFFFFF)
        self.write("CTRL", self.read("CTRL") | RST)
        self._wait("the reset", lambda: not self.read("CTRL") & RST)
        self.write("IMC", 0xFFFFFFFF)
        self.write("CTRL", self.read("CTRL") | SLU)
        self.write("RA[0].RAL", int.from_bytes(self.address[:4], "little"))
        self.write("RA[0].RAH", int.from_bytes(self.address[4:], "little") | 1 << 31)
        self._interrupts(messages)
        for n in range(ENTRIES):
            self._give(n)
        for ring, kind, base in (("RX[0]", "R", self._receive), ("TX[0]", "T", self._transmit)):
            self.write(f"{ring}.{kind}DBAL", base & 0xFFFFFFFF)
            self.write(f"{ring}.{kind}DBAH", base >> 32)
            self.write(f"{ring}.{kind}DLEN", ENTRIES * DESCRIPTOR)
            self.write(f"{ring}.{kind}DH", 0)
            self.write(f"{ring}.{kind}DT", 0)
        self.write("TCTL", TRANSMIT)
        self.write("RCTL", EN | BROADCASTS | STRIP_CRC)
        self.write("RX[0].RDT", ENTRIES - 1)
        self._wait("the link", lambda: bool(self.read("STATUS") & LINK_UP))
        self.write("IMS", WANTED)

    def _interrupts(self, messages: str) -> None:
        self._messages = VECTORS if messages == "msix" else 1
        if messages == "msix":
            self.guest.enable_msix(VECTORS)
            self.write("IVAR", IVAR)
            self.write("EIAC", RXQ0 | TXQ0)
        elif messages == "msi":
            self.guest.enable_msi(1)
        else:
            self.guest.enable_intx()

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._seconds
        while not done():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {self._seconds:g} s")

    # --- frames ---

    def frame(self, number: int) -> bytes:
        """The frame of that number, of a length that it chooses."""
        chance = random.Random(number)
        length = chance.randrange(SHORTEST, LONGEST + 1)
        body = number.to_bytes(8, "big") + chance.randbytes(length - HEADER - 8)
        return frame_of(STATION, self.address, body)

    def send(self, frames: int) -> None:
        """Give frames to the card, as many as there is room for; the tail is written once."""
        self._reap()
        frames = min(frames, ENTRIES - 1 - (self._sent - self._done))
        for _ in range(frames):
            place, data = self._sent % ENTRIES, self.frame(self.count.sent)
            at = self._start + RINGS + (ENTRIES + place) * BUFFER
            self.guest.memory.write(at, data)
            command = (EOP | IFCS | RS) << 24 | len(data)
            self.guest.memory.write(self._transmit + place * DESCRIPTOR, struct.pack("<QII", at, command, 0))
            self._sent += 1
            self.count.sent += 1
        self.write("TX[0].TDT", self._sent % ENTRIES)

    def _reap(self) -> None:
        while self._done < self._sent:
            at = self._transmit + self._done % ENTRIES * DESCRIPTOR
            if not self.guest.memory.read(at + 12, 1)[0] & DONE:
                return
            self._done += 1

    def _give(self, place: int) -> None:
        buffer = self._start + RINGS + place * BUFFER
        self.guest.memory.write(self._receive + place * DESCRIPTOR, struct.pack("<QQ", buffer, 0))

    def collect(self) -> int:
        """Take what has come, compare it, and give the descriptors back; how many frames that were."""
        came = 0
        while True:
            place = self._received % ENTRIES
            at = self._receive + place * DESCRIPTOR
            length, _, status, errors, _ = struct.unpack("<HHBBH", self.guest.memory.read(at + 8, 8))
            if not status & DONE:
                break
            self._answer(self.guest.memory.read(self._start + RINGS + place * BUFFER, length), errors)
            self._give(place)
            self._received += 1
            came += 1
        if came:
            self.write("RX[0].RDT", (self._received - 1) % ENTRIES)
        return came

    def _answer(self, frame: bytes, errors: int) -> None:
        number = int.from_bytes(frame[HEADER : HEADER + 8].translate(TURNED), "big")
        if errors or number >= self.count.sent:
            raise AssertionError(
                f"a frame of {len(frame)} bytes, errors {errors:#x}, that answers none: {frame[:40].hex()}"
            )
        sent = self.frame(number)
        if (frame[:6], frame[ADDRESSES:]) != (self.address, sent[ADDRESSES:HEADER] + sent[HEADER:].translate(TURNED)):
            raise AssertionError(f"the answer to frame {number} is damaged: {frame[:40].hex()}")
        self.count.answers[number] = self.count.answers.get(number, 0) + 1
        if self.count.answers[number] > 1:
            raise AssertionError(f"the answer to frame {number} came {self.count.answers[number]} times")

    def exchange(self, frames: int) -> None:
        """Send frames one after the other and wait for the last one's answer, by interrupts."""
        for left in range(frames, 0, -ENTRIES // 2):
            self.collect()  # else the answers find no room
            self.send(min(left, ENTRIES // 2))
            last = self.count.sent - 1
            while last not in self.count.answers:
                if not self.collect():
                    self.interrupt()
        self._wait("the last descriptor", self._all_sent)

    def _all_sent(self) -> bool:
        self._reap()
        return self._done == self._sent

    def interrupt(self) -> None:
        """Wait for one, and acknowledge it. AssertionError: none comes."""
        self._interrupts_of(self.guest).wait(0, self._seconds)
        self._acknowledge()

    def _acknowledge(self) -> None:
        self.count.interrupts += 1
        if self._messages == VECTORS:  # what EIAC clears by itself, a message masks as well
            self.write("IMS", RXQ0 | TXQ0)
            return
        self.read("ICR")
        interrupts = self._interrupts_of(self.guest)
        if interrupts.index == IrqIndex.INTX:
            interrupts.unmask()

    def _interrupts_of(self, guest: Guest) -> Interrupts:
        if guest.interrupts is None:
            raise AssertionError("no interrupts are set up")
        return guest.interrupts

    def one_by_interrupt(self) -> None:
        """A frame there and back that an interrupt tells of, for none that came before."""
        while self.collect():
            pass
        if any(self._interrupts_of(self.guest).counts()):
            self._acknowledge()
        self.send(1)
        last = self.count.sent - 1
        self.interrupt()
        while not self.collect() and last not in self.count.answers:
            self.interrupt()

    def move(self, guest: Guest) -> None:
        """It is in another place now: memory and registers are that guest's. Interrupts that came before come along."""
        pending = any(self._interrupts_of(self.guest).counts())
        self.guest = guest
        if pending:
            self._acknowledge()
