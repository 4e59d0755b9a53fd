"""A plugin for `peer_model`, with P2P states: a device that can hold its DMA back and still be written to.

With the option p2p=false it does not say so.
"""

import struct
from pathlib import Path

import trio

from tests.plugins_synthetic.peer_model import (
    BAR_SIZE,
    FREEZE,
    HOLD,
    IDENTIFICATION,
    REG_BUSY,
    REG_CONTROL,
    REG_ID,
    SEND,
    STATE,
)
from tests.server.programs import install
from vfu_server.device import Capabilities, Device, ModelCommand, SavePhase, Section, StateIdentity, StopKind
from vfu_server.errors import DeadlineError, StreamFormatError
from vfu_server.hookspecs import hookimpl
from vfu_server.policy import Answer, Answers, Policy, Rule

VFU_SERVER_API = 1
LAYOUT = struct.Struct(f"<I{len(STATE)}Q")
AT_REST = {StopKind.P2P: HOLD, StopKind.FULL: FREEZE}
SECONDS = 3.0


class PeerDevice(Device):
    """One function."""

    def __init__(self, host, *, p2p: bool) -> None:
        super().__init__(host)
        self._p2p = p2p
        self._loaded = b""

    @property
    def identity(self) -> StateIdentity:
        return StateIdentity("peer", 1)

    @property
    def policy(self) -> Policy:
        open_ = Answer.PASS if self._p2p else Answer.DISCARD
        answers = Answers(Answer.PASS, open_, Answer.DISCARD, Answer.DISCARD, Answer.DISCARD)
        rule = Rule(0, 0, BAR_SIZE, answers, answers, "registers")
        return Policy([rule], p2p=self._p2p, p2p_reason="" if self._p2p else "ordered so")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(p2p=self._p2p, resets=True)

    @property
    def control(self) -> int:
        return self.host.read(0, REG_CONTROL, 4)

    @control.setter
    def control(self, value: int) -> None:
        self.host.write(0, REG_CONTROL, 4, value)

    async def stop(self, kind: StopKind) -> None:
        self.control |= AT_REST[kind]
        with trio.move_on_after(SECONDS):
            while self.host.read(0, REG_BUSY, 4):  # noqa: ASYNC110 - hardware has no event
                await trio.sleep(0.001)
            return
        self.control &= ~AT_REST[kind]
        raise DeadlineError("a number is still on its way")

    async def start(self, kind: StopKind) -> None:
        self.control &= ~AT_REST[kind]

    async def reset(self) -> None:
        for offset in (REG_CONTROL, *STATE):
            self.host.write(0, offset, 8, 0)

    async def save(self, phase: SavePhase, sink) -> None:
        if phase is SavePhase.STOP_COPY:
            values = [self.host.read(0, offset, 8) for offset in STATE]
            await sink.send(Section("registers", 1, LAYOUT.pack(self.control & SEND, *values)))

    async def load_begin(self) -> None:
        self._loaded = b""

    async def load(self, section: Section) -> None:
        if section.tag != "registers" or len(section.payload) != LAYOUT.size:
            raise StreamFormatError("no registers")
        self._loaded = section.payload

    async def load_done(self) -> None:
        if not self._loaded:
            raise StreamFormatError("no registers came")
        control, *values = LAYOUT.unpack(self._loaded)
        for offset, value in zip(STATE, values, strict=True):
            self.host.write(0, offset, 8, value)
        self.control = self.control & ~SEND | control


@hookimpl
def vfu_server_probe(host, options):
    if host.read(0, REG_ID, 4) != IDENTIFICATION:
        return None
    return PeerDevice(host, p2p=options.get("p2p", "true") == "true")


@hookimpl
def vfu_server_models():
    return {"peer": ModelCommand("tests.plugins_synthetic.peer_model", "sends numbers to a peer", ())}


def install_peer(folder: Path) -> Path:
    """Make the plugin known by the name `peer`; returns the folder for PYTHONPATH."""
    return install(folder, "peer_plugin", {}, plugins={"peer": __name__})
