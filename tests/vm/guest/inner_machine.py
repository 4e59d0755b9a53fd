"""Owns a machine inside the test machine: QEMU with KVM, one program as its system, one function; /qemu, /inner shared.

Results are the lines that the program prints; times go to the session's summary. It must not know the function.

Under an emulated processor the inner kernel now and then hangs while it boots. Such a boot is begun anew by a reset,
which is told; what comes after the boot is never tried twice.
"""

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.vm.guest.checks import equal
from tests.vm.guest.served import SECONDS, serve, socket_of

QEMU, INNER = Path("/qemu"), Path("/inner")
LIBRARIES = QEMU / "usr/lib/x86_64-linux-gnu"
MEMORY = "160M"
"""edu reaches addresses of 28 bits only."""
BOOT, BOOTS = 200.0, 4
"""Seconds after which a boot hangs (it takes ten on an idle machine), and how many there may be."""
WORK = 600.0
CHECK_SECONDS = 2000
"""For a check that boots such a machine twice."""
COMMAND_LINE = "console=ttyS0 quiet panic=-1 mitigations=off nohz=off highres=off"
"""Its timer is periodic, as the outer machine's: one that waits for a single event loses it now and then."""
STARTED, DONE, FAILED, RESULT, CONFIG = "started", "done", "failed: ", "result: ", "config "


@dataclass(frozen=True, slots=True)
class Found:
    """What the program said: its results in order, the function's config space as `lspci -F` reads it, and all."""

    results: list[str]
    config: str
    said: list[str]


@dataclass(slots=True)
class Used:
    """What was found in a machine before and after its reset, and meanwhile the function as the outer kernel has it."""

    inside: list[Found] = field(default_factory=list)
    outside: str = ""

    @property
    def results(self) -> list[list[str]]:
        """Those of each boot."""
        return [found.results for found in self.inside]


class Console:
    """The inner machine's serial line, which is also kept in a file."""

    def __init__(self, copy: Path) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._copy = copy.open("wb")
        self._begun = b""
        self.lines: list[str] = []

    def wait(self, text: str, seconds: float) -> bool:
        """Read until there is the line `text`, from the lines not taken yet; False when the time is over.

        AssertionError when the program gives up or the machine ends.
        """
        deadline = time.monotonic() + seconds
        while text not in self.lines:
            if any(line.startswith(FAILED) for line in self.lines):
                raise AssertionError("the inner machine's program gave up:\n" + self.end())
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._ours], [], [], left)[0]:
                return False
            data = self._ours.recv(1 << 16)
            if not data:
                raise AssertionError("the inner machine ended before its program did:\n" + self.end())
            self._copy.write(data)
            self._copy.flush()
            *whole, self._begun = (self._begun + data).split(b"\n")
            self.lines += [line.decode(errors="replace").strip() for line in whole]
        return True

    def take(self) -> list[str]:
        """The lines up to now, which are then forgotten."""
        taken, self.lines = self.lines, []
        return taken

    def end(self) -> str:
        """The last lines, without the dump of config space."""
        return "\n".join([line for line in self.lines if not line.startswith(CONFIG)][-25:])

    def close(self) -> None:
        """Let go of it."""
        self._ours.close()
        self._copy.close()


class Inner:
    """A machine inside the machine, with a program and a device as `device` says. Ended by `close`."""

    def __init__(self, name: str, program: str, device: dict[str, object], *, iommu: bool = False) -> None:
        self.name = name
        machine = f"q35,memory-backend=ram{',kernel-irqchip=split' if iommu else ''}"
        before = ["-device", "intel-iommu,intremap=on,caching-mode=on"] if iommu else []
        self._console = Console(Path(f"/results/{name}.log"))
        ours, theirs = socket.socketpair()
        argv = [
            *(str(QEMU / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path", str(LIBRARIES)),
            *(str(QEMU / "usr/bin/qemu-system-x86_64"), "-L", str(QEMU / "usr/share/qemu")),
            *("-L", str(QEMU / "usr/share/seabios"), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-accel", "kvm", "-cpu", "host,-tsc-deadline", "-machine", machine, "-m", MEMORY),
            *("-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on"),
            *("-kernel", str(INNER / "bzImage"), "-initrd", str(INNER / f"{program}.initrd"), "-append", COMMAND_LINE),
            *("-chardev", f"socket,id=console,fd={self._console.theirs.fileno()}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"),
            *before,
            # Behind a port a PCIe function is an endpoint, as it is outside; on the bus itself it would be another.
            *("-device", "pcie-root-port,id=downstream,chassis=1,addr=0x4", "-device", json.dumps(device)),
        ]
        passed = [theirs.fileno(), self._console.theirs.fileno()]
        environment = os.environ | {"QEMU_MODULE_DIR": str(LIBRARIES / "qemu")}
        with open(f"/results/{name}.qemu", "wb") as said:
            self.process = subprocess.Popen(argv, env=environment, stderr=said, pass_fds=passed, preexec_fn=_stay)
        theirs.close()
        self._console.theirs.close()
        self._qmp = ours
        self._qmp.settimeout(BOOT)
        self._lines = ours.makefile("rb")
        self._lines.readline()
        self.command("qmp_capabilities")

    def command(self, name: str) -> None:
        """One command to QEMU, answered."""
        self._qmp.sendall(json.dumps({"execute": name}).encode() + b"\n")
        while "return" not in (answer := json.loads(self._lines.readline() or b"{}")):
            if "event" not in answer:
                said = Path(f"/results/{self.name}.qemu").read_text(errors="replace")
                raise AssertionError(f"QEMU answered {name} with {answer}; {said}")

    def boot(self) -> None:
        """Wait until the program has started; a boot that hangs is begun anew."""
        for hung in range(BOOTS):
            if self._console.wait(STARTED, BOOT):
                return
            print(f"report: {self.name}: boot {hung + 1} of the inner machine hung:\n{self._console.end()}", flush=True)
            self._console.take()
            self.command("system_reset")
        raise AssertionError(f"the inner machine did not boot {BOOTS} times:\n{self._console.end()}")

    def work(self) -> Found:
        """What the program finds, once it is done."""
        if not self._console.wait(DONE, WORK):
            raise AssertionError(f"the program was not done after {WORK:g} s:\n{self._console.end()}")
        lines = self._console.take()
        config = "".join(line.removeprefix(CONFIG) + "\n" for line in lines if line.startswith(CONFIG))
        return Found([line for line in lines if line.startswith(RESULT)], config, lines)

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
        self._console.close()


def _stay() -> None:
    """Keep to one processor: emulated ones are not good at handing an inner one over."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@contextmanager
def timed(name: str, what: str) -> Iterator[None]:
    """Tell how long it took."""
    began = time.monotonic()
    yield
    print(f"report: {name}: {what} {time.monotonic() - began:.2f} s", flush=True)


def use(name: str, program: str, bdf: str, device: dict[str, object], *, iommu: bool) -> Used:
    """Boot, let the program work, reset the machine, let it work again.

    `iommu`: the machine has one, and is booted once only: each page that is mapped there costs a message, or an exit.
    """
    used = Used()
    with timed(name, "start"):
        inner = Inner(name, program, device, iommu=iommu)
    try:
        for when in ("",) if iommu else ("", " again"):
            with timed(name, f"boot{when}"):
                inner.boot()
            with timed(name, f"work{when}"):
                used.inside.append(inner.work())
            if not when and not iommu:
                used.outside = lspci("-s", bdf)
                inner.command("system_reset")
        inner.end()
    finally:
        inner.close()
    return used


def lspci(*arguments: str) -> str:
    """All that lspci tells."""
    command = ["lspci", "-vvv", "-xxxx", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def by_our_server(
    bdf: str, program: str, place: dict[str, object], *options: object, plugin: str, iommu: bool = False
) -> Used:
    """The program with a function that our server presents; `place` is where in the inner machine."""
    with serve(bdf, *options, plugin=plugin) as server:
        address = {"type": "unix", "path": str(socket_of(bdf))}
        device = {"driver": "vfio-user-pci", "socket": address, **place}
        try:
            used = use(f"{program}-vfio-user-pci", program, bdf, device, iommu=iommu)
        except AssertionError as error:
            server.end(seconds=SECONDS)
            raise AssertionError(f"{error}\nthe server's log:\n{server.log}") from error
        code, _ = server.end(seconds=SECONDS)
        equal((code, "Traceback" in server.log), (0, False), server.log)
    return used


def by_the_kernel(bdf: str, program: str, place: dict[str, object], *, iommu: bool = False) -> Used:
    """The program with a function that QEMU has from the kernel itself."""
    return use(f"{program}-vfio-pci", program, bdf, {"driver": "vfio-pci", "host": bdf, **place}, iommu=iommu)
