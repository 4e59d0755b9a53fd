"""Migration data: save and load against the plain library, processor time against a loop of read and send, memory.

Ours is the whole product: sections of a plugin, records, sums, the ring, the pump. The peer copies one buffer and sums
nothing. Server and client have a processor each, as a VMM's thread and a server have.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import Machine
from benchmarks.native_build import program
from benchmarks.processes import Running, load
from benchmarks.rounds import interleaved
from benchmarks.rows import Goal, Row, absolute, compared
from benchmarks.served import Served, serve
from vfu_server.testing import Client
from vfu_server.testing.migrate import load as load_state
from vfu_server.testing.migrate import save, save_early
from vfu_server.uapi import MigState

MIB = 1 << 20
BYTES = 1 << 30
MOST = 4 << 30
CHUNK = MIB


class _State:
    """The servers, and what is done to them."""

    def __init__(self, machine: Machine, where: Path, served: Served) -> None:
        self.machine, self.served = machine, served
        self.stream, self.peer, self.loop = where / "stream", where / "peer.sock", where / "loop.sock"

    def save(self, sock: Path, size: int = BYTES) -> float:
        """MiB a second."""
        return size / MIB / load(self.machine, sock, "save", size, CHUNK, far=True)[-1]

    def drain(self) -> float:
        """MiB a second, of the loop."""
        return BYTES / MIB / load(self.machine, self.loop, "drain", BYTES, CHUNK, far=True)[-1]

    def load(self, sock: Path) -> float:
        """MiB a second."""
        size = self.stream.stat().st_size
        return size / MIB / load(self.machine, sock, "load", size, CHUNK, self.stream, far=True)[-1]


def measure(machine: Machine, rounds: int, where: Path) -> Iterator[Row]:
    """All rows about migration data."""
    registers = where / "registers"
    registers.write_bytes(bytes(64 << 10))
    with serve(machine, where) as served:
        state = _State(machine, where, served)
        with Running(machine.bound([str(program("peer")), str(state.peer), str(registers), str(BYTES)])):
            yield from _throughput(state, rounds)
        with Running(machine.bound([str(program("loop")), str(state.loop), str(BYTES)])) as loop:
            name = "server's processor time for 1 GiB saved (peer: read and send)"
            yield _processor(name, state, loop, rounds)
        state.stream.unlink()
    yield from _kernel(machine, where, rounds)
    yield _memory(machine, where)
    yield _downtime(machine, rounds, where)


def _throughput(state: _State, rounds: int) -> Iterator[Row]:
    for name, fresh, limit in (
        ("save of 1 GiB, the same memory again and again, summed", False, 0.85),
        ("save of 1 GiB, each buffer made anew in Python, summed", True, 0.7),
    ):
        state.served.set_state(late=BYTES, fresh=fresh)
        ours, peer = interleaved(rounds, lambda: state.save(state.served.sock), lambda: state.save(state.peer))
        yield compared(name, "MiB/s", ours, peer, Goal(limit, at_most=False))
    load(state.machine, state.served.sock, "save", BYTES, CHUNK, state.stream)
    ours, peer = interleaved(rounds, lambda: state.load(state.served.sock), lambda: state.load(state.peer))
    reason = "the peer has its receive low-water mark set, without which it loses large messages"
    yield compared("load of 1 GiB, sums checked", "MiB/s", ours, peer, Goal(0.85, at_most=False), reason)


def _kernel(machine: Machine, where: Path, rounds: int) -> Iterator[Row]:
    """From the data fd of a driver in the kernel, or rather of what stands in for it, through the whole server."""
    with serve(machine, where, "kernel", plugin="benchmark_kernel") as served:
        state = _State(machine, where, served)
        state.served.set_state(late=BYTES)
        state.loop.unlink(missing_ok=True)
        with Running(machine.bound([str(program("loop")), str(state.loop), str(BYTES)])) as loop:
            ours, peer = interleaved(rounds, lambda: state.save(served.sock), state.drain)
            name = "kernel driver's data fd to socket, summed (peer: read and send)"
            yield compared(name, "MiB/s", ours, peer, Goal(0.85, at_most=False))
            yield _processor("the same, server's processor time for 1 GiB", state, loop, rounds)


def _processor(name: str, state: _State, loop: Running, rounds: int) -> Row:
    """Several GiB in a row: the kernel counts in hundredths of a second."""
    repeat = 4

    def ours() -> float:
        before = state.served.server.processor_seconds()
        for _ in range(repeat):
            state.save(state.served.sock)
        return (state.served.server.processor_seconds() - before) / repeat

    def peer() -> float:
        before = loop.processor_seconds()
        for _ in range(repeat):
            state.drain()
        return (loop.processor_seconds() - before) / repeat

    state.served.set_state(late=BYTES)
    mine, theirs = interleaved(min(rounds, 3), ours, peer)
    return compared(name, "s", mine, theirs, Goal(1.4))


def _memory(machine: Machine, where: Path) -> Row:
    """The most that the server held, saving little and much."""
    with serve(machine, where, "memory") as served:
        most = []
        for size in (MIB, MOST):
            served.set_state(late=size, fresh=True)
            load(machine, served.sock, "save", size, CHUNK)  # once: what is needed anyway is there from now on
            served.server.forget_most()
            load(machine, served.sock, "save", size, CHUNK)
            most.append(served.server.most_resident())
    growth = (most[1] - most[0]) / MIB
    return absolute("growth of resident memory from 1 MiB to 4 GiB saved", "MiB", growth, Goal(8, of_ratio=False))


def _downtime(machine: Machine, rounds: int, where: Path) -> Row:
    """Much and little given early, the same given late."""
    with serve(machine, where, "source", bound=False) as source, serve(machine, where, "target", bound=False) as target:

        def move(early: int) -> float:
            source.set_state(early=early, late=MIB)
            with Client.connect(str(source.sock)) as a, Client.connect(str(target.sock)) as b:
                a.negotiate()
                b.negotiate()
                return _moved(a, b, early) * 1e3

        much, little = interleaved(rounds, lambda: move(BYTES - MIB), lambda: move(MIB))
    return compared("downtime, 1 MiB of 1 GiB late (peer: 1 MiB of 2 MiB)", "ms", much, little, Goal(1.2))


def _moved(source: Client, target: Client, early: int) -> float:
    """Seconds from the wish for STOP_COPY to RUNNING on the other side, after all that can be had early is there."""
    target.set_mig_state(MigState.RESUMING)
    source.set_mig_state(MigState.PRE_COPY)
    moved = 0
    while moved < early:  # "nothing for now" is no end
        moved += load_state(target, save_early(source))
    began = time.monotonic()
    source.set_mig_state(MigState.STOP_COPY)
    load_state(target, save(source))
    target.set_mig_state(MigState.RUNNING)
    return time.monotonic() - began
