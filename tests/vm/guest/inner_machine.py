"""Owns a machine inside the test machine: QEMU with KVM, one program as its system, one function; /qemu, /inner shared.

Results are the lines that the program prints; times are written to /results/times. It must not know the function.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.vm.guest.checks import equal
from tests.vm.guest.served import SECONDS, serve, socket_of

QEMU, INNER = Path("/qemu"), Path("/inner")
LIBRARIES = QEMU / "usr/lib/x86_64-linux-gnu"
MEMORY = "160M"
"""edu reaches addresses of 28 bits only."""
BOOT = 100.0
CHECK_SECONDS = 170
"""For a check that boots such a machine twice."""

times: dict[str, dict[str, float]] = {}


class Inner:
    """A machine inside the machine, with edu as `device` says. Ended at the end of its `with`."""

    def __init__(self, name: str, device: dict[str, object]) -> None:
        self._console = Path(f"/results/{name}.log")
        self._console.touch()
        ours, theirs = socket.socketpair()
        argv = [
            *(str(QEMU / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path", str(LIBRARIES)),
            *(str(QEMU / "usr/bin/qemu-system-x86_64"), "-L", str(QEMU / "usr/share/qemu")),
            *("-L", str(QEMU / "usr/share/seabios"), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-accel", "kvm", "-cpu", "host", "-machine", "q35,memory-backend=ram", "-m", MEMORY),
            *("-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on"),
            *("-kernel", str(INNER / "bzImage"), "-initrd", str(INNER / "initrd")),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
            *("-chardev", f"file,id=console,path={self._console}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"),
            *("-device", json.dumps(device)),
        ]
        environment = os.environ | {"QEMU_MODULE_DIR": str(LIBRARIES / "qemu")}
        with open(f"/results/{name}.qemu", "wb") as said:
            self.process = subprocess.Popen(argv, env=environment, stderr=said, pass_fds=[theirs.fileno()])
        theirs.close()
        self._qmp = ours
        self._qmp.settimeout(BOOT)
        self._lines = ours.makefile("rb")
        self._seen = 0
        self._lines.readline()
        self.command("qmp_capabilities")

    def command(self, name: str) -> None:
        """One command to QEMU, answered."""
        self._qmp.sendall(json.dumps({"execute": name}).encode() + b"\n")
        while "return" not in (answer := json.loads(self._lines.readline() or b"{}")):
            if "event" not in answer:
                raise AssertionError(f"QEMU answered {name} with {answer}")

    def run(self) -> list[str]:
        """The program's results, once it is done."""
        deadline = time.monotonic() + BOOT
        while True:
            said = self._console.read_text(errors="replace")[self._seen :]
            lines = [line.strip() for line in said.splitlines()]
            if "done" in lines:
                self._seen += len(said)
                return [line for line in lines if line.startswith("result: ")]
            if self.process.poll() is not None or time.monotonic() > deadline or "failed: " in said:
                raise AssertionError(f"the inner machine's program did not get to its end:\n{said[-1500:]}")
            # The console is a file, which nobody is told of; the process is what can be waited for.
            try:
                self.process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue

    def end(self) -> None:
        """Power off; QEMU ends by itself."""
        self.command("quit")
        equal(self.process.wait(SECONDS), 0, "QEMU's exit status")

    def close(self) -> None:
        """End it, by force if need be."""
        self.process.kill()
        self.process.wait()
        self._lines.close()
        self._qmp.close()


@contextmanager
def timed(name: str, what: str) -> Iterator[None]:
    """Write down how long it took."""
    began = time.monotonic()
    yield
    times.setdefault(name, {})[what] = round(time.monotonic() - began, 2)
    Path("/results/times").write_text(json.dumps(times))


def use(name: str, device: dict[str, object]) -> list[list[str]]:
    """Boot, let the program work, reset the machine, let it work again."""
    with timed(name, "start"):
        inner = Inner(name, device)
    try:
        with timed(name, "boot and work"):
            first = inner.run()
        inner.command("system_reset")
        with timed(name, "boot and work again"):
            second = inner.run()
        inner.end()
    finally:
        inner.close()
    return [first, second]


def by_our_server(bdf: str, plugin: str, *options: object) -> list[list[str]]:
    """What the program says of a function that our server presents, before and after a reset of its machine."""
    with serve(bdf, *options, plugin=plugin) as server:
        address = {"type": "unix", "path": str(socket_of(bdf))}
        found = use("vfio-user-pci", {"driver": "vfio-user-pci", "socket": address})
        code, _ = server.end(seconds=SECONDS)
        equal((code, "Traceback" in server.log), (0, False), server.log)
    return found


def by_the_kernel(bdf: str) -> list[list[str]]:
    """The same of a function that QEMU has from the kernel itself."""
    return use("vfio-pci", {"driver": "vfio-pci", "host": bdf})
