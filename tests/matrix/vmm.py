"""Two VMMs and the guest between them: a migration as a row of single operations, each of which can be spoilt.

The order and the answers to failures are QEMU's: whatever fails before the destination runs, the destination is
dropped and the source set running again.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from tests.matrix.world import Side, World
from tests.plugins_synthetic.device import MAILBOX, REG_CHANGE, REG_DIGEST, Shape
from vfu_server import uapi
from vfu_server.errors import VfuServerError
from vfu_server.testing import ReplyError
from vfu_server.uapi import Feature, MigState, RegionIndex

RAM = 1 << 16
RAM_NAME = "matrix-ram"
CLIENT_PATIENCE = 5.0
"""Seconds after which QEMU takes its server for dead."""
GIVE_UP = 120.0
"""Virtual seconds that a person looks at a guest that is stopped and gets nothing."""


@dataclass(frozen=True, slots=True)
class Flow:
    """One way through a migration. `stepwise`: each arc is a wish of its own. `cancel`: the state to turn back in."""

    name: str
    pre_copy: bool = False
    p2p: bool = False
    stepwise: bool = False
    cancel: MigState | None = None
    pages: int = 6
    page: int = 4096
    chunk: int = 8192

    @property
    def shape(self) -> Shape:
        return Shape(self.pages * self.page, self.page, p2p=self.p2p, pre_copy=self.pre_copy)


@dataclass(frozen=True, slots=True)
class Op:
    """One thing that a VMM does, and to which side."""

    name: str
    side: str
    action: Callable[[], object]


class CancelledByUser(Exception):  # noqa: N818 - no error
    """The flow is to turn back."""


@dataclass
class Vmm:
    """One migration of a guest from `source` to `destination`; `put` may spoil the data on its way.

    `before` is called with each operation before it is done. `outcome` afterwards: 'completed', 'recovered' (the source
    runs), 'source lost'.
    """

    world: World
    flow: Flow
    source: Side
    destination: Side
    before: Callable[[Op], None] = lambda op: None
    put: Callable[["Vmm", int, bytes], list[bytes]] = lambda vmm, index, data: [data]
    names: list[str] = field(default_factory=list)
    outcome: str = ""
    failed_at: str = ""
    error: Exception | None = None
    answers: list[tuple[str, float]] = field(default_factory=list)
    digest: int = 0
    mail: int = 0
    config: bytes = b""
    chunks: int = 0
    held: bytes = b""
    fetched: bytes = b""
    ended: bool = False
    waited: float = 0.0

    def begin(self) -> None:
        """Both VMMs are up, the guest works at the source."""
        for side in (self.source, self.destination):
            client = side.connect()
            ram = os.memfd_create(RAM_NAME)
            os.ftruncate(ram, RAM)
            client.dma_map(0, RAM, fd=ram)
            os.close(ram)
        client = self.source.client
        for offset, width, value in ((uapi.PCI_BASE_ADDRESS_0, 4, 0xFEB00000), (uapi.PCI_INTERRUPT_LINE, 1, 11)):
            self.source.host.write(RegionIndex.CONFIG, offset, width, value)
        for page in (0, 2, 2, 5):
            self.change(page)
        self.mail = 0x1111
        client.write(0, MAILBOX, 4, self.mail)
        self.config = bytes(self.source.host.config)

    def change(self, page: int) -> None:
        """The guest works."""
        self.source.client.write(0, REG_CHANGE, 4, page)
        self.digest = self.source.inner.digest

    def run(self) -> None:
        """All of it, up to the outcome."""
        try:
            for op in self._ops():
                if op.name in self.names:
                    op = replace(op, name=f"{op.name} again")
                self.failed_at = op.name
                self.names.append(op.name)
                self.before(op)
                self._do(op)
        except (VfuServerError, CancelledByUser) as error:
            self.error = error
            self.recover()
        else:
            self.failed_at = ""
            self.outcome = "completed"

    def _do(self, op: Op) -> None:
        begun = self.world.clock.current_time()
        try:
            op.action()
        finally:
            self.answers.append((op.name, self.world.clock.current_time() - begun))
            self.never_both(op.name)

    def never_both(self, where: str) -> None:
        """The guest's device runs in one place at most."""
        running = [side.name for side in (self.source, self.destination) if self.runs(side)]
        assert len(running) < 2, f"it runs at {running} after {where}"

    def runs(self, side: Side) -> bool:
        """The guest's device is alive here."""
        return side.session.mig_state in (MigState.RUNNING, MigState.PRE_COPY) and side.inner.digest == self.digest

    def recover(self) -> None:
        """The destination is dropped, the source goes on."""
        if self.failed_at == "the end of the source":
            self.outcome = "completed" if self.runs(self.destination) else "source lost"
            return
        self.destination.client.close()
        for _ in range(2):
            begun = self.world.clock.current_time()
            try:
                self.source.client.set_mig_state(MigState.RUNNING)
            except ReplyError as error:
                self.error.add_note(f"the source: {error}")
                continue
            except VfuServerError as error:
                self.error.add_note(f"the source: {error}")
                break
            else:
                self.outcome = "recovered"
                return
            finally:
                self.answers.append(("recovery", self.world.clock.current_time() - begun))
        self.outcome = "source lost"

    # operations

    def _ops(self) -> Iterator[Op]:
        source, destination, flow = self.source, self.destination, self.flow
        yield from self._states(destination, MigState.STOP, MigState.RESUMING)
        if flow.pre_copy:
            yield from self._states(source, MigState.PRE_COPY)
            yield from self._data("early", until_end=False)
            yield Op("ask precopy_info", "source", self._ask)
            yield Op("guest works", "source", lambda: [self.change(page) for page in (1, 4)])
            yield Op("ask precopy_info again", "source", self._ask)
            yield from self._data("dirty", until_end=False)
            yield Op("guest works on", "source", lambda: self.change(3))
            yield from self._turn_back(MigState.PRE_COPY)
            if flow.p2p:
                yield from self._states(source, MigState.PRE_COPY_P2P)
                yield from self._turn_back(MigState.PRE_COPY_P2P)
            yield from self._states(source, MigState.STOP_COPY)
        else:
            stops = [MigState.RUNNING_P2P] if flow.p2p else []
            yield from self._states(source, *stops, MigState.STOP, MigState.STOP_COPY)
        yield Op("ask data_size", "source", source.client.mig_data_size)
        yield Op("late write", "source", self._late_write)
        yield from self._turn_back(MigState.STOP_COPY)
        yield from self._data("late", until_end=True)
        ends = [MigState.RUNNING_P2P] if flow.p2p else []
        yield from self._states(destination, MigState.STOP, *ends, MigState.RUNNING)
        yield Op("the end of the source", "source", lambda: source.client.set_mig_state(MigState.STOP))

    def _states(self, side: Side, *states: MigState) -> Iterator[Op]:
        for state in states if self.flow.stepwise else states[-1:]:
            yield Op(f"{side.name} {state.name}", side.name, lambda state=state: side.client.set_mig_state(state))

    def _turn_back(self, state: MigState) -> Iterator[Op]:
        if self.flow.cancel is not state:
            return
        if state is MigState.PRE_COPY_P2P:
            yield Op("back to PRE_COPY", "source", lambda: self.source.client.set_mig_state(MigState.PRE_COPY))
        raise CancelledByUser(f"in {state.name}")

    def _ask(self) -> None:
        self.source.client.feature_get(Feature.MIG_PRECOPY_INFO)

    def _late_write(self) -> None:
        """A vCPU's last write, that comes in when the device has stopped: it must not be lost if the guest goes on."""
        self.mail = 0x2222
        self.source.client.write(0, MAILBOX, 4, self.mail)

    def _data(self, name: str, *, until_end: bool) -> Iterator[Op]:
        self.ended = False
        self.waited = 0.0
        index = 0
        while not self.ended:
            yield Op(f"read {name} {index}", "source", lambda: self._fetch(until_end))
            if self.fetched:
                yield Op(f"write {name} {index}", "destination", self._give)
                index += 1
        if until_end:
            yield Op("write the rest", "destination", self._give_held)

    def _fetch(self, until_end: bool) -> None:
        """One chunk, in as many reads as it takes."""
        self.fetched = b""
        while len(self.fetched) < self.flow.chunk:
            assert self.waited < GIVE_UP, "the guest is stopped, and nobody says why"
            asked_at = self.world.clock.current_time()
            try:
                data = self.source.client.mig_data_read(self.flow.chunk - len(self.fetched))
            except ReplyError as error:
                if until_end or error.errno != errno.ENOMSG:
                    raise
                data = b""
            finally:
                self.waited += self.world.clock.current_time() - asked_at
            self.ended = not data
            if self.ended:
                return
            self.fetched += data

    def _give(self) -> None:
        self.chunks += 1
        for piece in self.put(self, self.chunks - 1, self.fetched):
            self.destination.client.mig_data_write(piece)

    def _give_held(self) -> None:
        if self.held:
            self.destination.client.mig_data_write(self.held)

    def end(self) -> None:
        """Both VMMs are gone."""
        for side in (self.source, self.destination):
            for client in side.clients:
                with contextlib.suppress(OSError):
                    client.close()


def works(side: Side) -> None:
    """Whoever is there now can use the device and stop and start it."""
    client = side.client
    before = client.read(0, REG_DIGEST, 8)
    client.write(0, REG_CHANGE, 4, 1)
    assert client.read(0, REG_DIGEST, 8) not in (0, before)
    client.set_mig_state(MigState.STOP_COPY)
    client.mig_data_read(100)
    client.set_mig_state(MigState.RUNNING)
    client.write(0, REG_CHANGE, 4, 1)
