"""A software model as a process for tests: started, waited for, its control socket spoken to, ended.

It must not know which model it is or what is tested.
"""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vfu_server.device import ModelCommand
from vfu_server.errors import DeadlineError, HostError

START_SECONDS = 60.0
"""A machine may be busy; a model that ends before it listens is noticed at once."""
END_SECONDS = 5.0


class ModelProcess:
    """`python -m module *args` of a `ModelCommand`, listening at `path` when the constructor returns.

    It lives in a folder of its own, ends with this process, and what it says is kept for `said`.
    """

    def __init__(self, command: ModelCommand, *, time_scale: float = 0.01) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vfu-model-")
        self.path = f"{self._folder.name}/model.sock"
        self._control_path = f"{self._folder.name}/control.sock"
        self._control: socket.socket | None = None
        self._log = open(f"{self._folder.name}/log", "w+b")  # noqa: SIM115 - it is closed with the process
        ours, theirs = os.pipe()
        arguments = [command.module, *command.args, "--socket-path", self.path, "--control", self._control_path]
        arguments += ["--time-scale", str(time_scale), "--exit-with-fd", str(ours)]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path or str(Path.cwd()) for path in sys.path))
        self._life = theirs
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", *arguments],
                pass_fds=[ours],
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
            )
        except BaseException:
            os.close(theirs)
            self._log.close()
            self._folder.cleanup()
            raise
        finally:
            os.close(ours)
        try:
            self._wait_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def said(self) -> str:
        """What it wrote to standard error up to now."""
        self._log.flush()
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def control(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request to the control socket and its answer. Raises HostError: it was refused, or the model has gone."""
        if self._control is None:
            self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._control.settimeout(START_SECONDS)
            self._control.connect(self._control_path)
        self._control.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            chunk = self._control.recv(1 << 20)
            if not chunk:
                raise HostError("the model has closed its control socket")
            answer += chunk
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise HostError(f"control request {op!r}: {found['error']}")
        return found

    def registers(self) -> dict[str, int]:
        """What the model's `state` gives: its registers, read without touching them."""
        found: dict[str, int] = self.control("state")["registers"]
        return found

    def accesses(self, region: int | None = None) -> int:
        """How many accesses have reached the model since the last `clear`, of `region` or of all."""
        counts: Sequence[dict[str, Any]] = self.control("accesses")["counts"]
        return sum(row["count"] for row in counts if region is None or row["region"] == region)

    def order_fault(self, name: str, times: int = 1) -> None:
        """Arm one of the faults that the model documents; -1: always, 0: never."""
        self.control("fault", name=name, times=times)

    def kill(self) -> None:
        """End it as a machine's failure would."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it, by force if need be. Idempotent."""
        if self._life < 0:
            return
        os.close(self._life)
        self._life = -1
        if self._control is not None:
            self._control.close()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def _wait_ready(self) -> None:
        assert self.process.stdout is not None
        output, deadline, heard = self.process.stdout.fileno(), time.monotonic() + START_SECONDS, b""
        while b"ready " not in heard:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([output], [], [], left)[0]:
                raise DeadlineError(f"the model was not ready within {START_SECONDS:g} s")
            chunk = os.read(output, 4096)
            if not chunk:
                status = self.process.wait()
                raise HostError(f"the model ended with status {status} before it was ready: {self.said.strip()}")
            heard += chunk
