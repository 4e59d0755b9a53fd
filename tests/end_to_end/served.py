"""The real server before a model's process, or before several, and what the kernel says of it. Knows no test.

A server's log is kept from the last `forget` on, so that a test reads what it has caused itself.
"""

import os
import select
import time
from contextlib import ExitStack
from pathlib import Path

from tests.model_process import ModelProcess
from tests.server.programs import Server
from vfu_server.testing import Client, Guest, GuestMemory

SECONDS = 5.0


class Process(Server):
    """`vfu-server` with `arguments`, serving."""

    def __init__(self, *arguments: object, devices: int = 1) -> None:
        super().__init__(*arguments)
        os.set_blocking(self.process.stderr.fileno(), False)
        self._devices = devices

    def __enter__(self):
        deadline = time.monotonic() + 15
        while self.log.count("listening at") < self._devices:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            select.select([self.process.stderr], [], [], 0.1)
            self.said()
        return self

    def said(self) -> str:
        """The log since `forget`."""
        while chunk := self.process.stderr.read(1 << 20):
            self.log += chunk.decode()
        return self.log

    def forget(self) -> None:
        self.said()
        self.log = ""

    # what the kernel knows

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def mappings(self) -> int:
        return len(Path(f"/proc/{self.process.pid}/maps").read_text().splitlines())

    def resident(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096


class Served(Process):
    """A server of one device, which is a model in a process of its own."""

    def __init__(self, folder: Path, model: str, *model_arguments: str, time_scale: float, options=()) -> None:
        self.model = ModelProcess(folder, model, *model_arguments, time_scale=time_scale)
        self.path = str(folder / "served.sock")
        arguments = ("--plugin", "generic_dmaq", "--device-socket", self.model.path, "--socket-path", self.path)
        super().__init__(*arguments, *options)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self.model.close()

    def connect(self, memory: GuestMemory | None = None, **how) -> Guest:
        """A guest, not yet started."""
        return Guest.connect(self.path, memory, **how)

    def client(self) -> Client:
        """A client that has negotiated."""
        return negotiated(self.path)

    def fault(self, name: str, times: int = 1) -> None:
        """Order a fault of the model."""
        assert self.model.control("fault", name=name, times=times) == {}


def negotiated(path: str, **how) -> Client:
    client = Client.connect(path, **how)
    try:
        client.negotiate()
    except BaseException:
        client.close()
        raise
    return client


def until(holds, what: str, seconds: float = SECONDS) -> None:
    """Wait for what gives no sign: a state of another process."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        select.select([], [], [], 0.005)


def started(stack: ExitStack, server: Served) -> Guest:
    """A guest at work at `server`, for the time of `stack`."""
    return stack.enter_context(server.connect()).start()
