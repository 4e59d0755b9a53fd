"""Owns a migration by registers alone, as the public driver does it; it shares nothing with the plugin.

`Window` is where a function's migration registers are: its own BAR2 (VF_CTRL), or a part of the PF's (PF_CTRL).
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from plugins.hns.models.guest_driver import Port

BUSY, GET = 1 << 13, 1 << 14
REGION = 2
MASKS = (0x04, 0x0C, 0x20, 0x24, 0x2C)


@dataclass(frozen=True)
class Window:
    """How the mover reaches one function: its port, where the window begins, where EQC and AEQC are in it."""

    port: Port
    start: int = 0
    eqc: int = 0x8000
    aeqc: int = 0x8020

    def read(self, offset: int, width: int = 4) -> int:
        return self.port.read(REGION, self.start + offset, width)

    def write(self, offset: int, value: int, width: int = 4) -> None:
        self.port.write(REGION, self.start + offset, width, value)

    def wait(self, done: Callable[[], bool], what: str) -> None:
        for _ in range(10_000):
            if done():
                return
            self.port.pause()
        raise TimeoutError(what)

    def command(self, code: int, *, get: bool = False, queue: int = 0, base: int = 0) -> int:
        self.wait(lambda: not self.read(0x300) & BUSY, "mailbox busy")
        word0 = code | BUSY | (GET if get else 0)
        self.port.store(REGION, self.start + 0x300, struct.pack("<HHQI", word0, queue, base, 0))
        self.wait(lambda: not self.read(0x300) & BUSY, "mailbox")
        assert not self.read(0x300) >> 9 & 0xF, f"command {code:#x} failed"
        return self.read(0x304) | self.read(0x308) << 32


@dataclass
class Saved:
    """The registers that travel."""

    queues: int
    plain: dict[int, int]
    eqc: list[int]
    aeqc: list[int]
    sqc_table: int
    cqc_table: int


def stop(window: Window, *, write_back: bool = True) -> None:
    window.command(0xE)
    assert (window.read(0x28), window.read(0x2C)) == (0, 0)
    if write_back:
        window.write(0x204, 1)
        window.wait(lambda: bool(window.read(0x208) & 1), "write-back")


def save(window: Window) -> Saved:
    assert window.read(0x60) == 0
    word = window.command(6, get=True)
    assert word >> 44 & 1
    plain = {offset: window.read(offset) for offset in (*MASKS, 0x30, 0x34)}
    eqc = [window.read(window.eqc + 4 * i) for i in range(7)]
    aeqc = [window.read(window.aeqc + 4 * i) for i in range(7)]
    tables = [window.command(code, get=True) for code in (4, 5)]
    for command, words in ((2, eqc), (3, aeqc)):
        window.write(0x2000, command << 12 | (words[0] & 0xFFFF) << 32, 8)
    return Saved((word >> 45 & 0x3FF) + 1, plain, eqc, aeqc, *tables)


def load(window: Window, saved: Saved) -> None:
    window.write(0x60, 0)
    for offset, value in saved.plain.items():
        window.write(offset, value)
    for start, words in ((window.eqc, saved.eqc), (window.aeqc, saved.aeqc)):
        for index, value in enumerate(words):
            window.write(start + 4 * index, value)
    window.command(4, base=saved.sqc_table)
    window.command(5, base=saved.cqc_table)
    window.write(0x20, 1)
    window.write(0x24, 0)


def start(window: Window, queues: int) -> None:
    window.write(0x20, 1)
    window.write(0x24, 0)
    for queue in range(queues):
        window.write(0x1000, queue | 1 << 48, 8)


def move(source: Window, target: Window) -> Saved:
    """The whole way; the guest's memory is moved by whoever calls, between save and start."""
    stop(source)
    saved = save(source)
    stop(target)
    load(target, saved)
    return saved
