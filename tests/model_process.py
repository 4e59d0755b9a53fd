"""Owns a software model as a process for tests: started, waited for, its control socket spoken to, ended.

It must not know which model it is or what is tested. Shared by the lanes that need a device behind a socket.
"""

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TREE = Path(__file__).resolve().parents[1]
START_SECONDS = 60.0
STOP_SECONDS = 60.0


class ModelProcess:
    """`python -m MODULE ARGUMENTS --socket-path ...`, listening when the constructor returns."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        module: str = "plugins.generic_dmaq.models",
        time_scale: float = 0.01,
        listener: socket.socket | None = None,
    ) -> None:
        self.path = folder / "model.sock"
        self._control_path = folder / "control.sock"
        self._control: socket.socket | None = None
        self.life, theirs = os.pipe()[::-1]
        fds = [theirs]
        where = ["--socket-path", str(self.path)]
        if listener is not None:
            where = ["--fd", str(listener.fileno())]
            fds.append(listener.fileno())
        command = [sys.executable, "-m", module, *arguments, *where, "--control", str(self._control_path)]
        command += ["--time-scale", str(time_scale), "--exit-with-fd", str(theirs)]
        self.process = subprocess.Popen(
            command, cwd=TREE, pass_fds=fds, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        os.close(theirs)
        try:
            self.ready = self._first_line()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def control(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request to the control socket and its answer."""
        return self.control_line(json.dumps({"op": op, **fields}).encode())

    def control_line(self, line: bytes) -> dict[str, Any]:
        """One line as it is, and the answer."""
        if self._control is None:
            self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._control.settimeout(STOP_SECONDS)
            self._control.connect(str(self._control_path))
        self._control.sendall(line + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            chunk = self._control.recv(1 << 20)
            assert chunk, "the control socket was closed"
            answer += chunk
        found: dict[str, Any] = json.loads(answer)
        return found

    def registers(self) -> dict[str, int]:
        """The model's registers and sums, read without touching them."""
        found: dict[str, int] = self.control("state")["registers"]
        return found

    def accesses(self, region: int | None = None) -> int:
        """How many accesses have reached the model since the last clear, of `region` or of all."""
        report = self.control("accesses")
        return sum(row["count"] for row in report["counts"] if region is None or row["region"] == region)

    def fds(self) -> int:
        """How many fds the process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def terminate(self) -> tuple[int, str]:
        """SIGTERM; exit status and what was said on standard error."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Wait for the end; exit status and what was said on standard error."""
        _, said = self.process.communicate(timeout=STOP_SECONDS)
        return self.process.returncode, said

    def close(self) -> None:
        """End it, by force if need be. Idempotent."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self.life >= 0:
            os.close(self.life)
            self.life = -1
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.communicate(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def _first_line(self) -> str:
        assert self.process.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll((deadline - time.monotonic()) * 1000):
            raise TimeoutError("the model was not ready in time")
        line = self.process.stdout.readline()
        if not line:
            _, said = self.wait()
            raise RuntimeError(f"the model ended with {self.process.returncode}: {said}")
        return line


def run_model(*arguments: str, module: str = "plugins.generic_dmaq.models") -> "subprocess.CompletedProcess[str]":
    """A run that is expected to end by itself."""
    command: Sequence[str] = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=START_SECONDS, check=False)
