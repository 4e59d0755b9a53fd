"""The process itself: how soon it listens, and what it holds for each device."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import Machine
from benchmarks.processes import START_SECONDS, TREE, BenchmarkError, Running, python
from benchmarks.rounds import interleaved
from benchmarks.rows import Goal, Row, absolute, compared
from benchmarks.served import model
from vfu_server.testing import Client

FURTHER = 4
MIB = 1 << 20


def measure(machine: Machine, rounds: int, where: Path) -> Iterator[Row]:
    """All rows about the process."""
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(model(where, f"device{i}")) for i in range(1 + FURTHER)]
        yield _start(machine, rounds, where, models[0])
        yield from _resident(where, models)


def _server(where: Path, models: list[Path]) -> tuple[list[str], list[Path]]:
    """A command that serves `models`, and the sockets at which it does."""
    sockets = [where / f"served-{path.name}" for path in models]
    command = python("-m", "vfu_server", "--plugin", "generic_dmaq", "--log-level", "error")
    for device, sock in zip(models, sockets, strict=True):
        command += ["--device-socket", str(device), "--socket-path", str(sock)]
    return command, sockets


def _start(machine: Machine, rounds: int, where: Path, device: Path) -> Row:
    """READY=1 is sent when the socket listens."""
    command, _ = _server(where, [device])

    def ours() -> float:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            path = where / "notify"
            path.unlink(missing_ok=True)
            ready.bind(str(path))
            ready.settimeout(START_SECONDS)
            began = time.perf_counter()
            process = subprocess.Popen(machine.bound(command), cwd=TREE, env={**os.environ, "NOTIFY_SOCKET": str(path)})
            try:
                while b"READY=1" not in ready.recv(4096):
                    continue
                return (time.perf_counter() - began) * 1e3
            except TimeoutError:
                raise BenchmarkError("the server did not say that it is ready") from None
            finally:
                process.terminate()
                process.wait(10)

    def peer() -> float:
        began = time.perf_counter()
        subprocess.run(machine.bound(python("-c", "import trio")), cwd=TREE, check=True)
        return (time.perf_counter() - began) * 1e3

    mine, theirs = interleaved(max(rounds, 5), ours, peer)
    return compared('from exec to listening socket (peer: python -c "import trio")', "ms", mine, theirs, Goal(1.4))


def _resident(where: Path, models: list[Path]) -> Iterator[Row]:
    """Each device with a client that has connected and looked around."""
    one, more = (_held(where, models[:count]) / MIB for count in (1, 1 + FURTHER))
    yield absolute("resident memory, one device with its client", "MiB", one)
    each = (more - one) / FURTHER
    yield absolute("resident memory, each further device with its client", "MiB", each, Goal(2, of_ratio=False))


def _held(where: Path, models: list[Path]) -> int:
    command, sockets = _server(where, models)
    for sock in sockets:
        sock.unlink(missing_ok=True)
    with Running(command, listens=sockets[-1]) as server, contextlib.ExitStack() as stack:
        for sock in sockets:
            client = stack.enter_context(Client.connect(str(sock)))
            client.negotiate()
            client.get_info()
            client.read(0, 0, 4)
        return server.resident()
