"""`python -m benchmarks`: build the peer, measure both in the same run, print a table, write build/bench.json.

Each figure is the median of several rounds in which peer and server take turns. The machine's absolute numbers mean
nothing elsewhere: what counts is the ratio. A goal that is missed is printed as missed.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.ours import ANSWERS, RANGE
from vfu_server.libvfio_user import build
from vfu_server.libvfio_user.upstream import locate

TREE = Path(__file__).resolve().parent.parent
NATIVE = Path(__file__).resolve().parent / "native"
STATE_BYTES = 256 << 20
CHUNK = 1 << 20
START_DEADLINE = 20.0


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: `ratio` is ours against the peer's; `holds` says whether it meets `goal`."""

    name: str
    unit: str
    ours: float
    peer: float
    ratio: float
    goal: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Programs:
    """What was compiled for this run."""

    peer: Path
    client: Path


def compile_programs(folder: Path) -> Programs:
    """The peer from the library's own files, its socket transport included; the client from nothing but libc."""
    source, json_c = locate.locate(), build.json_c()
    includes = [f"-I{path}" for path in build.include_dirs(source, json_c)]
    library = [*build.library_sources(source), str(source.path / "lib" / "tran_sock.c")]
    link = [json_c.archive] if json_c.archive else ["-ljson-c"]
    programs = Programs(folder / "peer", folder / "client")
    flags = [*build.COMMON_FLAGS, "-fvisibility=default", "-w"]
    subprocess.run(["cc", *flags, *includes, "-o", programs.peer, NATIVE / "peer.c", *library, *link], check=True)
    subprocess.run(["cc", *flags, "-o", programs.client, NATIVE / "client.c"], check=True)
    return programs


@contextlib.contextmanager
def serving(command: list[str | Path], socket: Path) -> Iterator[Path]:
    """A server for the time of the `with`."""
    process = subprocess.Popen(command, cwd=TREE, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_DEADLINE
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"error: {command[0]} does not serve")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        yield socket
    finally:
        process.kill()
        process.wait()


class Load:
    """Runs the client; answers are nanoseconds."""

    def __init__(self, client: Path) -> None:
        self._client = client

    def times(self, socket: Path, test: str, count: int, size: int = 0) -> list[int]:
        """Every number that the client prints, sorted."""
        done = subprocess.run(
            [self._client, socket, test, str(count), str(size)], check=True, capture_output=True, text=True, timeout=120
        )
        return sorted(int(line) for line in done.stdout.split())

    def percentile(self, socket: Path, test: str, count: int, offset: int, part: float) -> float:
        """Of `count` round trips, in microseconds."""
        times = self.times(socket, test, count, offset)
        return times[int(len(times) * part)] / 1e3

    def rate(self, socket: Path, test: str, count: int, size: int = 0) -> float:
        """`count` by the second."""
        return count / (self.times(socket, test, count, size)[-1] / 1e9)


def compare(
    name: str, unit: str, goal: float, rounds: int, ours: Callable[[], float], peer: Callable[[], float]
) -> Row:
    """Take turns; times must stay below `goal` times the peer's, rates above it."""
    pairs = [(ours(), peer()) for _ in range(rounds)]
    mine, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = mine / theirs
    less = unit in ("us", "s", "MiB")
    return Row(
        name, unit, mine, theirs, ratio, f"{'<=' if less else '>='} {goal}", ratio <= goal if less else ratio >= goal
    )


def exec_to_listening(folder: Path) -> float:
    """Seconds from exec to a socket at the path."""
    socket = folder / "start.sock"
    arguments = ["-m", "vfu_server", "--plugin", "generic_dmaq", "--model", "edu", "--socket-path", str(socket)]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], cwd=TREE, stderr=subprocess.DEVNULL)
    while not socket.exists() and process.poll() is None:
        pass
    took = time.monotonic() - began
    process.terminate()
    process.wait()
    return took


def import_trio() -> float:
    """Seconds for the least that a trio program can do."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import trio"], check=True)
    return time.monotonic() - began


def measure(programs: Programs, folder: Path, rounds: int) -> Iterator[Row]:
    """All rows that this machine can measure."""
    load = Load(programs.client)
    file = folder / "registers"
    file.write_bytes(bytes(64 << 10))
    server = [sys.executable, "-m", "benchmarks.ours"]

    def start(name: str, command: list[str | Path], *more: str) -> contextlib.AbstractContextManager[Path]:
        socket = folder / f"{name}.sock"
        return serving([*command, socket, file, str(STATE_BYTES), *more], socket)

    def trip(socket: Path, answer: str, part: float) -> Callable[[], float]:
        offset = RANGE * [a.name for a in ANSWERS].index(answer)
        return lambda: load.percentile(socket, "read", 20_000, offset, part)

    with (
        start("peer", [programs.peer]) as peer,
        start("ours", list(server)) as ours,
        start("memory", list(server), "--memory") as memory,
    ):
        yield compare("REGION_READ, PASS, p50", "us", 1.0, rounds, trip(ours, "PASS", 0.5), trip(peer, "PASS", 0.5))
        yield compare("REGION_READ, PASS, p99", "us", 1.25, rounds, trip(ours, "PASS", 0.99), trip(peer, "PASS", 0.99))
        for answer in ("SHADOW", "DISCARD", "REFUSE"):
            mine, passed = trip(ours, answer, 0.5), trip(ours, "PASS", 0.5)
            yield compare(f"{answer} against our PASS, p50", "us", 1.0, rounds, mine, passed)
        yield compare("TRAP into Python, p50", "us", 1.25, rounds, trip(ours, "TRAP", 0.5), trip(peer, "PASS", 0.5))
        for name, test, count, size, goal, mine_at in (
            ("posted REGION_WRITE, PASS", "posted", 200_000, 0, 1.3, ours),
            ("DMA_MAP + DMA_UNMAP of 4 KiB", "dma", 5_000, 0, 0.8, memory),
            ("save, Python producer of 1 MiB", "save", STATE_BYTES, CHUNK, 0.7, ours),
            ("load, Python consumer", "load", STATE_BYTES, CHUNK, 0.85, ours),
        ):
            yield compare(
                name,
                "/s" if size == 0 else "bytes/s",
                goal,
                rounds,
                partial(load.rate, mine_at, test, count, size),
                partial(load.rate, peer, test, count, size),
            )
    with start("peer-2", [programs.peer]) as peer, start("busy", list(server), "--busy") as busy:
        name = "REGION_READ, PASS, p99, a busy Python thread beside"
        yield compare(name, "us", 1.5, rounds, trip(busy, "PASS", 0.99), trip(peer, "PASS", 0.99))
    yield compare("exec to listening socket", "s", 1.4, rounds, lambda: exec_to_listening(folder), import_trio)


def main() -> int:
    """Measure, print, write. Exit code 0 also when a goal is missed: a figure is no test."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare the server with a C server.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--json", type=Path, default=TREE / "build" / "bench.json", help="where the figures go")
    arguments = parser.parse_args()
    rows: list[Row] = []
    table = Table("what", "unit", "ours", "peer", "ratio", "goal", "holds")
    with tempfile.TemporaryDirectory(prefix="vfu-bench-") as name:
        folder = Path(name)
        for row in measure(compile_programs(folder), folder, arguments.rounds):
            rows.append(row)
            print(f"{row.name}: {row.ratio:.2f}", file=sys.stderr, flush=True)
            figures = (f"{row.ours:.4g}", f"{row.peer:.4g}", f"{row.ratio:.2f}")
            table.add_row(row.name, row.unit, *figures, row.goal, "yes" if row.holds else "NO")
    Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main())
