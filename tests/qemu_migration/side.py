"""Owns one side of a migration: a QEMU with its own vfu-server and software model, and the doors to all of them.

The guest's processor is the test itself, through QEMU's qtest channel, or a Linux under TCG. Must not know which way
the guest moves.
"""

import json
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from tests.qemu.qtest import Qtest
from tests.qemu_migration.monitor import SECONDS, Monitor
from tests.server.programs import Server
from tools.qemu_root import QemuRoot

SLOT = 4
MEMORY = "160M"
"""edu reaches addresses of 28 bits only."""


class Side:
    """A running QEMU. `log` is what it has said; `server` is None for a machine without our device."""

    def __init__(
        self,
        qemu: QemuRoot,
        folder: Path,
        *arguments: str,
        server: Server | None,
        device: dict[str, object] | None = None,
        accel: Sequence[str] = ("qtest",),
        memory: str = MEMORY,
    ) -> None:
        self.server = server
        self.folder = folder
        self._log = folder / "qemu.log"
        pairs = {name: socket.socketpair() for name in ("qtest", "qmp")}
        argv = [*qemu.argv, "-machine", "q35,memory-backend=ram", "-m", memory, "-nodefaults", "-no-user-config"]
        argv += ["-object", f"memory-backend-memfd,id=ram,size={memory},share=on", "-display", "none"]
        argv += ["-accel", ",".join(accel), "-qtest", "chardev:qtest", "-qtest-log", "none", "-qmp", "chardev:qmp"]
        for name, (_, theirs) in pairs.items():
            argv += ["-chardev", f"socket,id={name},fd={theirs.fileno()}"]
        if server is not None:
            address = {"type": "unix", "path": str(socket_of(folder))}
            described = {"driver": "vfio-user-pci", "id": "edu", "addr": f"{SLOT:#x}", "socket": address}
            argv += ["-device", json.dumps(described | (device or {}))]
        with self._log.open("wb") as said:
            self.process = subprocess.Popen(
                [*argv, *arguments],
                env=os.environ | qemu.environment,
                pass_fds=[theirs.fileno() for _, theirs in pairs.values()],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
        for _, theirs in pairs.values():
            theirs.close()
        try:
            self.monitor = Monitor(pairs["qmp"][0])
        except Exception as error:
            self.process.kill()
            self.process.wait()
            for ours, _ in pairs.values():
                ours.close()
            raise AssertionError(f"QEMU did not start: {error}\n{self.log}") from error
        pairs["qtest"][0].settimeout(SECONDS)
        self.guest = Qtest(pairs["qtest"][0], None, self.process)
        self._sockets = [ours for ours, _ in pairs.values()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.monitor.close()
        self.guest.close()
        for ours in self._sockets:
            ours.close()

    @property
    def log(self) -> str:
        """What QEMU has printed."""
        return self._log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """QEMU runs."""
        return self.process.poll() is None

    def status(self) -> str:
        """The machine's run state."""
        found: str = self.monitor.execute("query-status")["status"]
        return found


def socket_of(folder: Path) -> Path:
    """Where the server of this side listens."""
    return folder / "edu.sock"


@contextmanager
def serving(folder: Path, *options: object, model: str = "edu") -> Iterator[Server]:
    """A vfu-server with its model."""
    where = ("--socket-path", socket_of(folder))
    with Server("--plugin", "generic_dmaq", "--model", model, *where, *options) as server:
        server.wait_log("listening", SECONDS)
        yield server


@contextmanager
def side(
    qemu: QemuRoot,
    folder: Path,
    *arguments: str,
    options: Sequence[object] = ("--dirty-tracking", "all"),
    **more: object,
) -> Iterator[Side]:
    """A side with a server of its own."""
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        server = stack.enter_context(serving(folder, *options))
        yield stack.enter_context(Side(qemu, folder, *arguments, server=server, **more))
