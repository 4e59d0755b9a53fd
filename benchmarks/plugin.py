"""A plugin whose device has as much state as it is told: what a server makes of a plugin's sections is measured by it.

The option `control` names a JSON file, read anew at each save: `early` and `late` are the bytes of state that can be
given while the device runs and that are given once it is stopped, `fresh` says whether each buffer is made anew by
Python, or the same memory is given again and again, as fast as memory is.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from vfu_server.device import Capabilities, Device, PrecopyInfo, SavePhase, Section, Sink, StateIdentity, StopKind
from vfu_server.errors import StreamFormatError, UsageError
from vfu_server.hookspecs import hookimpl
from vfu_server.host_device import HostDevice
from vfu_server.policy import Answer, Answers, Policy, Rule

VFU_SERVER_API = 1
CHUNK = 1 << 20


class BenchmarkDevice(Device):
    """Any device. Its registers are passed on; its state is made up, and counted when it comes in."""

    def __init__(self, host: HostDevice, control: Path) -> None:
        super().__init__(host)
        self._control = control
        self._memory = os.memfd_create("state", os.MFD_CLOEXEC)
        os.write(self._memory, os.urandom(CHUNK))
        self._same = os.pread(self._memory, CHUNK, 0)
        self._early_left: int | None = None
        self._loaded = 0

    @property
    def identity(self) -> StateIdentity:
        return StateIdentity("benchmark", 1)

    @property
    def policy(self) -> Policy:
        answers = Answers.always(Answer.PASS)
        return Policy([Rule(r.index, 0, r.size, answers, answers, "all") for r in self.host.regions[:6] if r.size])

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(pre_copy=True, resets=True)

    async def stop(self, kind: StopKind) -> None:
        return None

    async def start(self, kind: StopKind) -> None:
        return None

    async def reset(self) -> None:
        return None

    def _wanted(self, name: str) -> int:
        return int(json.loads(self._control.read_text())[name])

    async def precopy_info(self) -> PrecopyInfo:
        early = self._wanted("early") if self._early_left is None else self._early_left
        return PrecopyInfo(initial_bytes=early)

    async def save(self, phase: SavePhase, sink: Sink) -> None:
        fresh = bool(self._wanted("fresh"))
        left = self._wanted("late")
        if phase is SavePhase.PRE_COPY:
            left = self._wanted("early") if self._early_left is None else self._early_left
        while left > 0:
            payload = os.pread(self._memory, min(CHUNK, left), 0) if fresh else self._same[:left]
            left -= len(payload)
            if phase is SavePhase.PRE_COPY:
                self._early_left = left
            await sink.send(Section("state", 1, payload))

    async def save_end(self) -> None:
        self._early_left = None

    async def load_begin(self) -> None:
        self._loaded = 0

    async def load(self, section: Section) -> None:
        self._loaded += len(section.payload)

    async def load_done(self) -> None:
        if not self._loaded:
            raise StreamFormatError("no state came in")


@hookimpl
def vfu_server_probe(host: HostDevice, options: Mapping[str, str]) -> Device | None:
    """Takes whatever it is given."""
    if set(options) != {"control"}:
        raise UsageError("the plugin benchmark has one option, control=FILE")
    return BenchmarkDevice(host, Path(options["control"]))
