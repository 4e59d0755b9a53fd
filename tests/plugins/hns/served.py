"""The real server before this plugin's model, and a guest with its driver under load. Knows no test."""

import json
import socket
from contextlib import ExitStack, contextmanager
from pathlib import Path

from plugins.hns.models.traffic import Traffic
from tests.end_to_end.served import Process
from tests.model_process import ModelProcess
from vfu_server.testing import Guest, GuestMemory

MODULE = "plugins.hns.models"
MEMORY = 8 << 20
SECONDS = 60.0
"""For what takes milliseconds: the machine may stand still in between."""


class Served(Process):
    """A server of one VF, with its PF beside it; `model` are the model's arguments, `options` the server's."""

    def __init__(self, folder: Path, *model: str, options: tuple[str, ...] = ()) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.model = ModelProcess(folder, *(model or ("zip",)), module=MODULE, time_scale=1.0)
        self.path = str(folder / "served.sock")
        arguments = ("--plugin", "hns", "--device-socket", self.model.path, "--socket-path", self.path)
        super().__init__(*arguments, *options)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self.model.close()

    def connect(self, memory: GuestMemory | None = None) -> Guest:
        """A guest, not yet started."""
        return Guest.connect(self.path, memory, timeout=SECONDS)

    def fault(self, name: str, times: int = 1) -> None:
        """Order a fault of the VF."""
        assert self.model.control("fault", name=name, times=times) == {}

    def pf_fault(self, name: str, times: int = 1) -> None:
        """Order a fault of the PF."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(SECONDS)
            control.connect(f"{self.folder / 'control.sock'}.pf")
            control.sendall(json.dumps({"op": "fault", "name": name, "times": times}).encode() + b"\n")
            assert json.loads(control.makefile().readline()) == {}


@contextmanager
def arrival(server: Served):
    """A guest with memory of its own at `server`, plugged in and reset: somebody is about to move there."""
    with GuestMemory.of(MEMORY) as memory, server.connect(memory) as guest:
        guest.plug_in()
        guest.machine_reset()
        yield guest


def at_work(stack: ExitStack, server: Served, **how) -> tuple[Guest, Traffic]:
    """A guest with its driver loaded, for the time of `stack`."""
    memory = stack.enter_context(GuestMemory.of(MEMORY))
    guest = stack.enter_context(server.connect(memory)).start()
    return guest, Traffic(guest, queues=4, timeout=SECONDS, **how)
