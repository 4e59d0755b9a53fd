"""Accesses to registers, answered by the table, by Python, and while Python is busy; and DMA maps.

Both servers pass a register on by pread and pwrite of the same file. One processor for server and client: what counts
is the cost of the software, and that neither has to be woken on another processor.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import Machine
from benchmarks.native_build import program
from benchmarks.processes import Running, load, python
from benchmarks.rounds import interleaved, percentile
from benchmarks.rows import Goal, Row, compared, missing

READS = 30_000
BUSY_READS = 10_000
POSTED = 200_000
MAPS = 20_000
PAGE = 4096
PASS, SHADOW, DISCARD, REFUSE, TRAP = (page * PAGE for page in range(5))
"""Offsets in region 0 of `ours.py`, by answer."""
MICRO = 1e6


class _Servers:
    """Ours in its three shapes, and the peer."""

    def __init__(self, machine: Machine, where: Path) -> None:
        self.machine = machine
        registers = where / "registers"
        with registers.open("wb") as file:
            file.truncate(64 << 10)
        self.sockets = {name: where / f"{name}.sock" for name in ("ours", "busy", "memory", "peer")}
        far = ["--busy", str(machine.far)]
        self.commands = {
            "ours": python("-m", "benchmarks.ours", self.sockets["ours"], registers),
            "busy": python("-m", "benchmarks.ours", self.sockets["busy"], registers, *far),
            "memory": python("-m", "benchmarks.ours", self.sockets["memory"], registers, "--memory"),
            "peer": [str(program("peer")), str(self.sockets["peer"]), str(registers), "0"],
        }

    def start(self, name: str) -> Running:
        return Running(self.machine.bound(self.commands[name]))

    def reads(self, name: str, share: float, count: int, offset: int = PASS) -> float:
        """A percentile of the round trips, in microseconds."""
        return percentile(load(self.machine, self.sockets[name], "read", count, offset), share) * MICRO

    def rate(self, name: str, test: str, count: int) -> float:
        """Thousands a second."""
        return count / load(self.machine, self.sockets[name], test, count)[-1] / 1000


def measure(machine: Machine, rounds: int, where: Path) -> Iterator[Row]:
    """All rows about accesses and maps."""
    servers = _Servers(machine, where)
    with servers.start("peer"):
        with servers.start("ours"):
            yield from _passed(servers, rounds)
            yield from _answered(servers, rounds)
            yield from _posted(servers, rounds)
        with servers.start("busy"):
            yield _busy(servers, rounds)
        with servers.start("memory"):
            yield _mapped(servers, rounds)
    yield missing(
        "server's wake-ups for each mapped doorbell, interrupt, DMA",
        "",
        Goal(0, of_ratio=False),
        "needs a function under kernel VFIO and its interrupts, which this benchmark has not",
    )


def _passed(servers: _Servers, rounds: int) -> Iterator[Row]:
    def both(name: str) -> tuple[float, float]:
        times = load(servers.machine, servers.sockets[name], "read", READS, PASS)
        return percentile(times, 0.5) * MICRO, percentile(times, 0.99) * MICRO

    ours, peer = interleaved(rounds, lambda: both("ours"), lambda: both("peer"))
    for place, name, limit in ((0, "p50", 1.0), (1, "p99", 1.25)):
        mine, theirs = [one[place] for one in ours], [one[place] for one in peer]
        yield compared(f"REGION_READ of 4 bytes, PASS, {name}", "µs", mine, theirs, Goal(limit))


def _answered(servers: _Servers, rounds: int) -> Iterator[Row]:
    for name, offset in (("SHADOW", SHADOW), ("DISCARD", DISCARD), ("REFUSE", REFUSE)):
        ours, passed = interleaved(
            rounds,
            lambda offset=offset: servers.reads("ours", 0.5, READS, offset),  # type: ignore[misc]
            lambda: servers.reads("ours", 0.5, READS),
        )
        yield compared(f"{name} (peer: PASS of ours), p50", "µs", ours, passed, Goal(1.0))
    ours, peer = interleaved(
        rounds, lambda: servers.reads("ours", 0.5, READS, TRAP), lambda: servers.reads("peer", 0.5, READS)
    )
    yield compared("TRAP into a Python method, p50", "µs", ours, peer, Goal(1.25))


def _posted(servers: _Servers, rounds: int) -> Iterator[Row]:
    ours, peer = interleaved(
        rounds, lambda: servers.rate("ours", "posted", POSTED), lambda: servers.rate("peer", "posted", POSTED)
    )
    yield compared("posted REGION_WRITE of 4 bytes, PASS", "1000/s", ours, peer, Goal(1.3, at_most=False))


def _busy(servers: _Servers, rounds: int) -> Row:
    ours, peer = interleaved(
        rounds, lambda: servers.reads("busy", 0.99, BUSY_READS), lambda: servers.reads("peer", 0.99, BUSY_READS)
    )
    reason = "" if servers.machine.near != servers.machine.far else "one processor: the busy thread competes for it"
    return compared("REGION_READ beside a busy Python thread, p99", "µs", ours, peer, Goal(1.5), reason)


def _mapped(servers: _Servers, rounds: int) -> Row:
    ours, peer = interleaved(
        rounds, lambda: servers.rate("memory", "dma", MAPS), lambda: servers.rate("peer", "dma", MAPS)
    )
    reason = "without an IOMMU: both map the client's file into their own process, which is a part of either's work"
    return compared("DMA_MAP and DMA_UNMAP of 4 KiB", "1000/s", ours, peer, Goal(0.8, at_most=False), reason)
