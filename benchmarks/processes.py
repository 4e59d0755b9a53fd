"""Programs under measurement: started, waited for, asked what they have used, ended; and the load on them."""

import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.machine import Machine
from benchmarks.native_build import program

TREE = Path(__file__).resolve().parent.parent
START_SECONDS = 20.0
LOAD_SECONDS = 300.0
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class BenchmarkError(Exception):
    """A program under measurement did not do what it was to do; the message is for a person."""


class Running:
    """A server, ready when the constructor returns: it said so on its standard output, or `listens` is there."""

    def __init__(
        self, command: Sequence[str], *, listens: Path | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            command, cwd=TREE, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=self._log
        )
        if not (self._has_spoken() if listens is None else self._is_there(listens)):
            self.close()
            raise BenchmarkError(f"{' '.join(command)} did not start:\n{self.log()}")

    def _has_spoken(self) -> bool:
        assert self.process.stdout is not None
        heard = select.select([self.process.stdout], [], [], START_SECONDS)[0]
        return bool(heard and self.process.stdout.readline())

    def _is_there(self, path: Path) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while not path.is_socket() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return path.is_socket()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def log(self) -> str:
        """What it has said on standard error."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def processor_seconds(self) -> float:
        """Time on processors, of all threads that it has or had."""
        fields = self._proc("stat").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def resident(self) -> int:
        """Bytes of memory that it holds."""
        return int(self._proc("statm").split()[1]) * PAGE

    def most_resident(self) -> int:
        """The most that it ever held, since `forget_most`."""
        line = next(line for line in self._proc("status").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10

    def forget_most(self) -> None:
        """Begin anew with `most_resident`."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def switches(self) -> int:
        """How often its threads that live were put to sleep or off a processor: as often as they were woken."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
        return total

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()


def python(*arguments: object) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *map(str, arguments)]


def load(machine: Machine, sock: Path, test: str, *arguments: object, far: bool = False) -> list[float]:
    """The C client's numbers, in seconds: one for each round trip, or the whole time. See client.c."""
    command = machine.bound([str(program("client")), str(sock), test, *map(str, arguments)], far=far)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{' '.join(command)} did not come to an end") from None
    if done.returncode:
        raise BenchmarkError(f"{shlex.join(command)}: {done.stderr.strip()}")
    return [int(line) / 1e9 for line in done.stdout.split()]


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder in memory for sockets and files, gone at the end."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vfu-bench-", dir=where) as name:
        yield Path(name)
