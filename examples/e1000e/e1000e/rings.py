"""Descriptor rings of the model, on one register table and one bus: legacy and extended ones. No offload is done.

Layouts: datasheet 7.1.4 and 7.1.5 (receive), 7.2.10 and 7.2.11 (transmit).
"""

import struct
from typing import Protocol

from vfu_server.model import Bus

DESCRIPTOR = 16
EXTENDED = 1 << 29
KIND_CONTEXT = 0
DONE, END = 1, 2
EOP, RS = 1, 8
EXTENDED_STATUS = 1 << 15
"""RFCTL.EXSTEN."""
SIZES = (2048, 1024, 512, 256)


class Registers(Protocol):
    """What rings need of the model."""

    bus: Bus

    def __getitem__(self, name: str) -> int: ...

    def __setitem__(self, name: str, value: int) -> None: ...


class _Ring:
    def __init__(self, model: Registers, name: str) -> None:
        self._model, self._name, self._kind = model, name, name[0]

    def _register(self, name: str) -> str:
        return f"{self._name}.{self._kind}{name}"

    @property
    def _length(self) -> int:
        return self._model[self._register("DLEN")] // DESCRIPTOR

    @property
    def waiting(self) -> bool:
        """It has descriptors for the hardware."""
        head, tail = self._model[self._register("DH")], self._model[self._register("DT")]
        return head < self._length and head != tail

    def _at(self) -> int:
        base = self._model[self._register("DBAL")] & ~0xF | self._model[self._register("DBAH")] << 32
        return base + self._model[self._register("DH")] * DESCRIPTOR

    def _advance(self) -> None:
        head = self._register("DH")
        self._model[head] = (self._model[head] + 1) % max(self._length, 1)


class TransmitRing(_Ring):
    """One of the two."""

    def __init__(self, model: Registers, number: int) -> None:
        super().__init__(model, f"TX[{number}]")
        self._begun = b""
        """Of a frame whose end was not given yet."""

    def next_frame(self) -> bytes:
        """Take descriptors until a frame is whole; nothing if the ring ends before. BusError."""
        while self.waiting:
            at = self._at()
            address, low, high = struct.unpack("<QII", self._model.bus.dma_read(at, DESCRIPTOR))
            extended = bool(low & EXTENDED)
            context = extended and low >> 20 & 0xF == KIND_CONTEXT
            if not context:
                self._begun += self._model.bus.dma_read(address, low & (0xFFFFF if extended else 0xFFFF))
            if low >> 24 & RS:
                self._model.bus.dma_write(at + 12, (high | DONE).to_bytes(4, "little"))
            self._advance()
            if not context and low >> 24 & EOP:
                frame, self._begun = self._begun, b""
                return frame
        return b""


class ReceiveRing(_Ring):
    """One of the two."""

    def __init__(self, model: Registers, number: int) -> None:
        super().__init__(model, f"RX[{number}]")

    def put(self, frame: bytes) -> bool:
        """Write a frame and its descriptors; False if there are too few. BusError."""
        control = self._model["RCTL"]
        size = SIZES[control >> 16 & 3] * (16 if control & 1 << 25 else 1)
        if not control & 1 << 26:  # the check sequence goes with it
            frame += bytes(4)
        head, tail = self._model[self._register("DH")], self._model[self._register("DT")]
        pieces = [frame[start : start + size] for start in range(0, len(frame), size)]
        if not self.waiting or (tail - head) % self._length < len(pieces):
            return False
        for number, piece in enumerate(pieces):
            self._put_piece(piece, last=number == len(pieces) - 1)
        return True

    def _put_piece(self, piece: bytes, *, last: bool) -> None:
        at = self._at()
        address = int.from_bytes(self._model.bus.dma_read(at, 8), "little")
        self._model.bus.dma_write(address, piece)
        status = DONE | (END if last else 0)
        if self._model["RFCTL"] & EXTENDED_STATUS:
            self._model.bus.dma_write(at, struct.pack("<QIHH", 0, status, len(piece), 0))
        else:
            self._model.bus.dma_write(at + 8, struct.pack("<HHBBH", len(piece), 0, status, 0, 0))
        self._advance()
