"""A server of a synthetic device with its model, and a client, each a process of its own that can be killed.

It must not know what is tested.
"""

import base64
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.kills.client_process import NAME
from tests.plugins_synthetic.plugin import options
from tests.server.programs import TREE, Server, environment
from vfu_server.uapi import MigState

SECONDS = 60.0
"""Nothing is measured: what takes longer hangs."""


class CallError(Exception):
    """The client was refused, or there is no server any more; `gone`: there is no client any more."""

    def __init__(self, text: str, number: int = 0, *, gone: bool = False) -> None:
        super().__init__(text)
        self.errno = number
        self.gone = gone


class ClientProcess:
    """See client_process.py."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.kills.client_process", str(path)],
            cwd=TREE,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self._answer("its start")
        except BaseException:
            self.close()
            raise

    def ask(self, op: str, **arguments: object):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        return self._answer(op)

    def _answer(self, what: str):
        assert select.select([self.process.stdout], [], [], SECONDS)[0], f"no answer to {what}"
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise CallError(f"the client died at {what}", gone=True)
        answer = json.loads(line)
        if "error" in answer:
            raise CallError(answer["error"], answer["errno"])
        return answer.get("value")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


class Side:
    """A server at `path`, started again whenever it was killed, and its present client."""

    def __init__(self, folder: Path, name: str, **shape: float) -> None:
        self.name = name
        self.path = folder / f"{name}.sock"
        self._folder, self._shape = folder, shape
        self.server: Server | None = None
        self.client: ClientProcess | None = None
        self.files = self.memory = 0
        """What was held at first with a client, for whoever compares."""
        self.start()

    def start(self) -> None:
        self.server = Server(
            *options(**self._shape),
            "--socket-path",
            self.path,
            sites=[self._folder / "site"],
            TMPDIR=str(self._folder),
        )
        self.server.wait_log("listening at", SECONDS)
        self.models = self._children()
        assert self.models, "no model was started"

    def connect(self) -> None:
        """A client; the one before must be dead. It is refused until the server has brought the device back."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                self.client = ClientProcess(self.path)
                return
            except CallError:
                assert self.server.process.poll() is None, self.said()
                assert time.monotonic() < deadline, f"nobody is served any more:\n{self.said()}"

    @property
    def alive(self) -> bool:
        """The server is."""
        return self.server.process.poll() is None

    @property
    def with_client(self) -> bool:
        """Both are."""
        return self.alive and self.client.process.poll() is None

    @property
    def pid(self) -> int:
        return self.server.process.pid

    def kill(self) -> None:
        """kill -9 of the server."""
        self.server.process.kill()

    def state(self, state: MigState, **fate: object) -> None:
        self.client.ask("state", state=int(state), **fate)

    def read(self, size: int, **fate: object) -> bytes:
        return base64.b64decode(self.client.ask("read", size=size, **fate))

    def write(self, data: bytes, **fate: object) -> None:
        self.client.ask("write", data=base64.b64encode(data).decode(), **fate)

    def said(self) -> str:
        """The log up to now."""
        fd = self.server.process.stderr.fileno()
        while select.select([fd], [], [], 0)[0] and (chunk := os.read(fd, 1 << 16)):
            self.server.log += chunk.decode()
        return self.server.log

    def held(self) -> tuple[int, int]:
        """Open files of the server, and how often guests' memory is open or mapped in the server and its model."""
        processes = [Path(f"/proc/{pid}") for pid in (self.pid, *self.models)]
        memory = sum((root / "maps").read_text().count(NAME) for root in processes)
        for root in processes:
            for link in (root / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    memory += NAME in os.readlink(link)
        return len(os.listdir(processes[0] / "fd")), memory

    def _children(self) -> list[int]:
        found = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
        return found

    def buried(self) -> None:
        """The server was killed: its model must not outlive it, and its log holds no traceback."""
        assert self.server.wait(SECONDS) == -signal.SIGKILL
        deadline = time.monotonic() + SECONDS
        while any(_lives(pid) for pid in self.models):
            assert time.monotonic() < deadline, "the model outlives its server"
            select.select([], [], [], 0.01)
        assert "Traceback" not in self.server.log

    def end(self) -> None:
        if self.client is not None:
            self.client.close()
        if self.alive:
            assert self.server.end(seconds=SECONDS)[0] == 0, self.server.log
        # A plugin that gets no memory is told like one with a bug.
        assert self.server.log.count("Traceback") == self.server.log.count("\nMemoryError"), self.server.log
        self.server.__exit__()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def address_space(pid: int) -> int:
    """Bytes of address space that the process has now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmSize:\s+(\d+) kB", status)[1]) << 10
