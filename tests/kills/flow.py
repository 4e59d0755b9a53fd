"""One migration as a row of messages, and what can die at each: the guest's fate is judged by who is left.

Order and answers to failures are QEMU's. Written apart from tests/matrix, whose clients are threads of one process.
"""

import contextlib
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.kills.sides import CallError, Side
from vfu_server.uapi import MigState

PAGES, PAGE, CHUNK = 4, 64 << 10, 128 << 10
SHAPE = {"size": PAGES * PAGE, "page": PAGE, "pre_copy": True, "p2p": True}
CHUNKS = 3
"""Reads of the first pass, and of the rest: each page once more."""
VICTIMS = ("source's client", "destination's client", "source", "destination")
MOMENTS = {"client": ("half", "whole"), "server": ("before", "behind")}


@dataclass(frozen=True, slots=True)
class Death:
    """`victim` is killed at message `op`: a client in the middle of it or behind it, a server before or behind it."""

    op: str
    victim: str
    moment: str

    def __str__(self) -> str:
        return f"{self.victim} {self.moment} {self.op}"


def ops() -> tuple[str, ...]:
    """All messages of a migration, in order, by side."""
    early = [f"{side} {n} early" for n in range(CHUNKS) for side in ("source reads", "destination writes")]
    late = [f"{side} {n} late" for n in range(CHUNKS) for side in ("source reads", "destination writes")]
    return (
        "destination RESUMING",
        "source PRE_COPY",
        *early,
        "source PRE_COPY_P2P",
        "source STOP_COPY",
        *late,
        "destination STOP",
        "destination RUNNING_P2P",
        "destination RUNNING",
        "source STOP",
    )


def deaths() -> Iterator[Death]:
    """Every victim at every message: a client at its own, a server at those of both."""
    for op in ops():
        for victim in VICTIMS:
            if victim.endswith("client"):
                if op.startswith(victim.partition("'")[0]):
                    yield from (Death(op, victim, moment) for moment in MOMENTS["client"])
            else:
                moments = MOMENTS["server"] if op.startswith(victim) else MOMENTS["server"][:1]
                yield from (Death(op, victim, moment) for moment in moments)


@dataclass
class Migration:
    """Of the guest at `source`. `outcome`: 'completed', 'recovered' (the source runs on), 'lost' (nobody can)."""

    source: Side
    destination: Side
    death: Death | None = None
    outcome: str = ""
    error: str = ""
    struck: bool = False
    digest: int = 0
    held: bytes = b""
    done: list[str] = field(default_factory=list)

    def run(self) -> None:
        for page in (0, 1, 1, 3):
            self.source.client.ask("change", page=page)
        self.digest = self.source.client.ask("digest")
        try:
            for op, action in self._plan():
                with self._mourned(op):
                    action(**self._fate(op))
                self.done.append(op)
        except CallError as error:
            self.error = f"at {op}: {error}"
            self._recover()
        else:
            self._completed()

    def _completed(self) -> None:
        """Whoever runs the guest now, keeps it."""
        self.outcome = "completed" if self.destination.with_client else "lost"

    def _fate(self, op: str) -> dict[str, object]:
        if self.death is None or self.death.op != op:
            return {}
        self.struck = True
        if self.death.victim.endswith("client"):
            return {"death": self.death.moment}
        side = self.source if self.death.victim == "source" else self.destination
        if self.death.moment == "behind":
            return {"kill": side.pid}
        side.kill()
        side.server.process.wait()
        return {}

    @contextlib.contextmanager
    def _mourned(self, op: str) -> Iterator[None]:
        """A server that is killed within is dead afterwards."""
        try:
            yield
        finally:
            if self.death is not None and self.death.op == op and self.death.moment == "behind":
                side = self.source if self.death.victim == "source" else self.destination
                side.server.process.wait()

    def _plan(self) -> Iterator[tuple[str, Callable[..., None]]]:
        source, destination = self.source, self.destination
        for op in ops():
            side, what, *_ = op.split()
            if what == "reads":
                yield op, self._read
            elif what == "writes":
                yield op, lambda **fate: destination.write(self.held, **fate)
            elif op == "source PRE_COPY_P2P":
                self._change_again()
                yield op, lambda **fate: source.state(MigState.PRE_COPY_P2P, **fate)
            else:
                there = source if side == "source" else destination
                yield op, lambda there=there, what=what, **fate: there.state(MigState[what], **fate)

    def _change_again(self) -> None:
        """Every page changes, so that as much is left as was given."""
        for page in range(PAGES):
            self.source.client.ask("change", page=page)
        self.digest = self.source.client.ask("digest")

    def _read(self, **fate: object) -> None:
        """One chunk; the end of a pass makes it shorter. What has come is kept if the next read fails."""
        self.held = b""
        while len(self.held) < CHUNK:
            try:
                data = self.source.read(CHUNK - len(self.held), **fate)
            except CallError as error:
                if error.errno != errno.ENOMSG:
                    raise
                return
            fate = {}
            if not data:
                return
            self.held += data

    def _recover(self) -> None:
        """What a VMM does: the destination is dropped, the source goes on; but not once the destination runs."""
        if "destination RUNNING" in self.done:
            self._completed()
            return
        self.destination.client.close()
        try:
            self.source.state(MigState.RUNNING)
        except CallError as error:
            self.error += f"; then {error}"
            self.outcome = "lost"
        else:
            self.outcome = "recovered"
