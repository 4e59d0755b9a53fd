"""Owns a card as a process and its functions as clients see them: the `Port` of `bench`, over sockets.

It must not know what is tested.
"""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.model_process import ModelProcess
from vfu_server.errors import DeadlineError
from vfu_server.testing import Guest, GuestMemory

POLL_SECONDS = 0.002
DEADLINE = 60.0
MODULE = "plugins.mlx5.models"


class SocketPort:
    """A function behind a socket: registers by messages, memory in a memfd, interrupts as eventfds."""

    def __init__(self, path: str, memory: GuestMemory) -> None:
        self.guest = Guest.connect(path, memory, timeout=30.0).start()
        self.vectors = self.guest.enable_msix(8)
        self.others: list[SocketPort] = []
        """Whose memory is asked for by messages while this one waits."""

    def read(self, region: int, offset: int, width: int) -> int:
        return self.guest.read(region, offset, width)

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        self.guest.write(region, offset, width, value)

    def load(self, iova: int, length: int) -> bytes:
        return self.guest.memory.read(iova, length)

    def store(self, iova: int, data: bytes) -> None:
        self.guest.memory.write(iova, data)

    def wait(self, until: Callable[[], bool], what: str = "something", seconds: float = DEADLINE) -> None:
        """TimeoutError if it is never so."""
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                raise TimeoutError(f"waited for {what}")
            for port in (self, *self.others):
                port.guest.client.serve(POLL_SECONDS)

    def interrupts(self, vector: int) -> int:
        """How often it was signalled; waits for the first."""
        try:
            return self.vectors.wait(vector, DEADLINE)
        except DeadlineError:
            return 0

    def close(self) -> None:
        self.guest.close()


class CardProcess:
    """A card in a process; `pf` and `vfs` are ports. `guest_memory`: of VF 0."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        guest_memory: GuestMemory | None = None,
        pf_memory: int = 64 << 20,
        vfs: int = 1,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        small = ("--boot-pages", "8", "--init-pages", "40", "--vf-pages", "8", "--save-pages", "4")
        self.process = ModelProcess(
            folder, "connectx", "--vfs", str(vfs), *small, *arguments, module=MODULE, time_scale=0.1
        )
        self._ports: list[SocketPort] = []
        try:
            self.pf = self._open(f"{self.process.path}.pf", GuestMemory.of(pf_memory))
            memory = GuestMemory.of(8 << 20) if guest_memory is None else guest_memory
            self.vfs = [self._open(str(self.process.path), memory)]
            self.vfs += [self._open(f"{self.process.path}.vf{n}", GuestMemory.of(8 << 20)) for n in range(1, vfs)]
        except BaseException:
            self.close()
            raise

    def _open(self, path: str, memory: GuestMemory) -> SocketPort:
        port = SocketPort(path, memory)
        self._ports.append(port)
        return port

    def state(self) -> dict[str, int]:
        """What the card counts, by the PF's control socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(DEADLINE)
            control.connect(f"{self.process.path.with_name('control.sock')}.pf")
            control.sendall(b'{"op": "state"}\n')
            with control.makefile("rb") as answers:
                found: dict[str, int] = json.loads(answers.readline())["registers"]
                return found

    @property
    def violations(self) -> int:
        return self.state()["violations"]

    def order(self, name: str, times: int = 1) -> None:
        self.process.control("fault", name=name, times=times)

    def close(self) -> None:
        for port in self._ports:
            port.close()
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
