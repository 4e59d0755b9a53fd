"""Owns a machine inside the test machine that moves from QEMU to QEMU, from device to device and back.

Its processor is a Linux guest's under KVM, or the check itself by qtest. A place is a device as QEMU is told of it;
each move starts a new QEMU at the next place and ends the last one. It must not know what is below a place.
"""

import hashlib
import json
import os
import re
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.qemu_migration.console import Console, Progress
from tests.qemu_migration.monitor import QmpError
from tests.qemu_migration.moves import PATIENT, finish, move, prepare, start
from tests.qemu_migration.side import SLOT, Side
from tests.server.programs import Server
from tests.vm.guest.checks import equal
from tests.vm.guest.inner_machine import BOOT, BOOTS, COMMAND_LINE, INNER, LIBRARIES, QEMU, STARTED
from tools.qemu_root import QemuRoot

FIRMWARE = ("-L", str(QEMU / "usr/share/qemu"), "-L", str(QEMU / "usr/share/seabios"))
PATCHED_AT = Path("/patched")
PATCHED = QemuRoot(
    PATCHED_AT,
    (
        *(str(PATCHED_AT / "ld-linux-x86-64.so.2"), "--library-path", str(PATCHED_AT)),
        *(str(PATCHED_AT / "qemu-system-x86_64"), *FIRMWARE),
    ),
    {},
)
RELEASED = QemuRoot(
    QEMU,
    (
        *(str(QEMU / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path", str(LIBRARIES)),
        *(str(QEMU / "usr/bin/qemu-system-x86_64"), *FIRMWARE),
    ),
    {"QEMU_MODULE_DIR": str(LIBRARIES / "qemu")},
)
KVM = ("kvm",)
MEMORY = "64M"
"""Every page of it is mapped into an emulated IOMMU."""
SLOWLY = 1 << 20
"""Bytes in a second, of which a millisecond's are less than any device's state."""
TIMES = ("setup-time", "downtime", "total-time")
SECONDS = 120.0
Place = dict[str, object]


def served_at(socket: Path) -> Place:
    """What a server of ours presents."""
    return {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(socket)}, "enable-migration": "on"}


def no_late_access(server: Server, tolerated: str = "") -> None:
    """Nothing has come to the device while it was stopped, neither dropped nor passed on; the client made no mistake.

    It is asked while it still has the client. `tolerated` is the form of mistakes that are none.
    """
    before, server.log = server.log, ""
    server.process.send_signal(signal.SIGUSR1)
    said = server.wait_log(" resets=", SECONDS)
    server.log = before + said
    found = re.search(r"accesses=\[(.*)\] mistakes=\[(.*)\] dma_maps=", said)
    mistakes = found and re.sub(tolerated, "", found[2])
    if not found or "stopped" in found[1] or "drop" in found[1] or mistakes:
        raise AssertionError(f"accesses at rest, or mistakes: {said}")


class Moving:
    """A machine that is at one of its places, in turn. `figures` has query-migrate's times of each move."""

    def __init__(
        self,
        name: str,
        qemu: QemuRoot,
        places: Sequence[Place],
        *arguments: str,
        accel: Sequence[str] = ("qtest",),
        servers: Sequence[Server] = (),
        memory: str = MEMORY,
        tolerated: str = "",
    ) -> None:
        """`servers` are those of the places, in the same order, where we have any: what they say is looked at.

        `tolerated` is the form of what they may call a mistake.
        """
        self.name = name
        self.servers = servers
        self._memory, self._tolerated = memory, tolerated
        self.moves = 0
        self.figures: list[dict[str, Any]] = []
        self._qemu, self._places, self._arguments, self._accel = qemu, places, arguments, accel
        self._folder = Path("/results") / name
        self._folder.mkdir()
        self.console = Console(self._folder)
        self.side = self._start()
        prepare(self.side)

    def _start(self, *arguments: str) -> Side:
        folder = self._folder / str(self.moves)
        folder.mkdir()
        device = {"id": "device", "addr": f"{SLOT:#x}", **self._places[self.moves % len(self._places)]}
        more = [*self._arguments, *self.console.arguments(str(self.moves)), "-device", json.dumps(device), *arguments]
        with _one_processor():
            return Side(self._qemu, folder, *more, server=None, accel=self._accel, memory=self._memory)

    def move(
        self, compare: Callable[[Side, Side], None] | None = None, meanwhile: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """To the next place; query-migrate of the source once the guest runs there.

        `compare` is called with both sides before the last one's QEMU is ended, `meanwhile` when the migration is under
        way, which does not come to its last stage before that is done.
        """
        server = self.servers[self.moves % len(self.servers)] if self.servers else None
        self.moves += 1
        there = self._start("-incoming", "defer")
        try:
            prepare(there)
            found = move(self.side, there) if meanwhile is None else self._slowly(there, meanwhile)
        except BaseException:
            there.__exit__()
            raise
        self.figures.append({key: found[key] for key in TIMES})
        here, self.side = self.side, there
        if compare is not None:
            compare(here, there)
        if server is not None:
            no_late_access(server, self._tolerated)
        end(here)
        return found

    def _slowly(self, there: Side, meanwhile: Callable[[], None]) -> dict[str, Any]:
        prepare(self.side, downtime_limit=1, max_bandwidth=SLOWLY)
        start(self.side, there)
        equal(self.side.monitor.wait_migration("active")["status"], "active", "the migration")
        meanwhile()
        equal(self.side.monitor.execute("query-migrate")["status"], "active", "the migration")
        self.side.monitor.execute("migrate-set-parameters", downtime_limit=PATIENT, max_bandwidth=0)
        return finish(self.side, there)

    def close(self) -> None:
        """End it, by force."""
        self.side.__exit__()

    def report(self) -> None:
        """Tell what the moves took: median, and from where to where."""
        said = []
        for key in TIMES:
            each = [found[key] for found in self.figures]
            said.append(f"{key} {statistics.median(each):.0f} ({min(each)} to {max(each)})")
        print(f"report: {self.name}: {len(self.figures)} moves, ms: {', '.join(said)}", flush=True)


def end(side: Side) -> None:
    """Power off; QEMU ends by itself."""
    with suppress(QmpError, OSError):  # its answer may not get out any more
        side.monitor.execute("quit")
    status = side.process.wait(SECONDS)
    side.__exit__()
    equal(status, 0, f"QEMU's exit status: {side.log}")


def digest(side: Side, start: int = 0x100000) -> str:
    """Of all of the guest's memory from `start` on; below it the machine's ROMs are in view, or not."""
    size = side.monitor.execute("query-memory-size-summary")["base-memory"]
    file = Path("/tmp/memory")
    side.monitor.execute("pmemsave", val=start, size=size - start, filename=str(file))
    with file.open("rb") as saved:
        found = hashlib.file_digest(saved, "sha256").hexdigest()
    file.unlink()
    return found


@contextmanager
def _one_processor() -> Iterator[None]:
    """Keep what is started to one processor: emulated ones are not good at handing an inner one over."""
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(all_of_them)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


@contextmanager
def machine(
    name: str, qemu: QemuRoot, places: Sequence[Place], servers: Sequence[Server] = (), memory: str = MEMORY
) -> Iterator[Moving]:
    """A machine whose processor is the check, by qtest."""
    made = Moving(name, qemu, places, servers=servers, memory=memory)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def linux(
    name: str,
    qemu: QemuRoot,
    places: Sequence[Place],
    program: str,
    servers: Sequence[Server] = (),
    tolerated: str = "",
) -> Iterator[Moving]:
    """A Linux guest that has booted; a boot that hangs is begun anew."""
    files = ("-kernel", str(INNER / "bzImage"), "-initrd", str(INNER / f"{program}.initrd"), "-append", COMMAND_LINE)
    made = Moving(
        name, qemu, places, "-cpu", "host,-tsc-deadline", *files, accel=KVM, servers=servers, tolerated=tolerated
    )
    try:
        for hung in range(BOOTS):
            if made.console.wait_text(made.side, STARTED, BOOT):
                break
            print(
                f"report: {name}: boot {hung + 1} of the inner machine hung:\n{made.console.text[-1000:]}", flush=True
            )
            made.side.monitor.execute("system_reset")
        else:
            raise AssertionError(f"the inner machine did not boot {BOOTS} times:\n{made.console.text[-2000:]}")
        yield made
    finally:
        made.close()


def keep_moving(guest: Moving, moves: int, rounds: int) -> Progress:
    """Move so many times, with so many rounds of the guest's program before each and after the last."""
    progress = guest.console.wait_rounds(guest.side, rounds)
    for _ in range(moves):
        guest.move()
        progress = guest.console.wait_rounds(guest.side, progress.rounds + rounds)
    guest.report()
    return progress
