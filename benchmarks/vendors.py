"""Whole migrations of the vendors' plugins before their software models: how long each step keeps the guest waiting.

They are compared with nothing: there is no other program that migrates these models. The hardware is software, so what
a firmware takes for a save is the model's; the server's part, and how it grows with the state, is what can be read
here. One part is compared: an image that the firmware has written, on its way from its memory to the socket.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.machine import Machine
from benchmarks.native_build import program
from benchmarks.processes import Running, load, python
from benchmarks.rounds import interleaved
from benchmarks.rows import Goal, Row, absolute, compared
from plugins.hns.models.traffic import Traffic
from vfu_server.testing import Guest, migrate
from vfu_server.testing.migrate import MigrationRecord

MIB = 1 << 20
CHUNK = MIB
IMAGE = 1 << 30
STEPS = ("source STOP_COPY", "stop-copy data", "destination RUNNING")
"""What the downtime is made of, besides memory, which is the VMM's."""
QUESTIONS = 300
ENTRIES = 100
TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its arguments, and the plugin that migrates it. `works`: brings its guest's driver to work."""

    name: str
    plugin: str
    module: str
    arguments: tuple[str, ...]
    pre_copy: bool
    works: Callable[[Guest], object] | None = None


def _compressing(guest: Guest) -> object:
    """Queues that are full, in a guest's memory that both machines have."""
    traffic = Traffic(guest, queues=4, timeout=TIMEOUT)
    traffic.run_entries(ENTRIES)
    traffic.submit()
    return traffic


def _card(size: str, *, pre_copy: bool) -> Subject:
    how = "with" if pre_copy else "without"
    arguments = ("connectx", "--image-size", size)
    return Subject(f"mlx5, image of {size}, {how} pre-copy", "mlx5", "plugins.mlx5.models", arguments, pre_copy)


SUBJECTS = (
    Subject("hns zip, under load", "hns", "plugins.hns.models", ("zip",), pre_copy=True, works=_compressing),
    Subject("hns zip, without a driver", "hns", "plugins.hns.models", ("zip",), pre_copy=True),
    *(_card(size, pre_copy=pre_copy) for size in ("64K", "16M", "256M") for pre_copy in (True, False)),
)


def measure(machine: Machine, rounds: int, where: Path) -> Iterator[Row]:
    """All rows about whole migrations, and about large images."""
    yield from _images(machine, rounds, where)
    for number, subject in enumerate(SUBJECTS):
        with ExitStack() as stack:
            sockets = [_served(stack, machine, where, f"{number}{side}", subject) for side in "ab"]
            records = [_move(sockets[n % 2], sockets[(n + 1) % 2], subject) for n in range(max(rounds, 3))]
            yield from _rows(subject, records)
            if subject.plugin == "mlx5" and subject.pre_copy and subject.arguments[-1] == "64K":
                yield _questions(sockets[0])


def _served(stack: ExitStack, machine: Machine, where: Path, name: str, subject: Subject) -> Path:
    device, sock = where / f"{name}.model", where / f"{name}.sock"
    stack.enter_context(Running(python("-m", subject.module, *subject.arguments, "--socket-path", device)))
    options = ("--plugin", subject.plugin, "--device-socket", device, "--socket-path", sock, "--log-level", "error")
    stack.enter_context(Running(machine.bound(python("-m", "vfu_server", *options)), listens=sock))
    return sock


def _move(here: Path, there: Path, subject: Subject) -> MigrationRecord:
    with Guest.connect(str(here), timeout=TIMEOUT) as source, Guest.connect(str(there), timeout=TIMEOUT) as destination:
        source.start()
        if subject.works is not None:
            subject.works(source)
        destination.plug_in()
        destination.machine_reset()
        return migrate(source.client, destination.client, pre_copy=subject.pre_copy)


def _rows(subject: Subject, records: list[MigrationRecord]) -> Iterator[Row]:
    downtime = median(record.downtime for record in records) * 1e3
    late = median(record.stop_copy_bytes for record in records) / MIB
    steps = ", ".join(f"{name} {median(record.seconds(name) for record in records) * 1e3:.1f}" for name in STEPS)
    reason = f"ms by step: {steps}; {late:.2f} MiB of state while the guest stood still"
    yield absolute(f"downtime of {subject.name}", "ms", downtime, reason=reason)
    rates = [
        (record.pre_copy_bytes + record.stop_copy_bytes)
        / MIB
        / (record.seconds("pre-copy data") + record.seconds("stop-copy data"))
        for record in records
    ]
    yield absolute(f"state of {subject.name}, from firmware to firmware", "MiB/s", median(rates))


def _images(machine: Machine, rounds: int, where: Path) -> Iterator[Row]:
    """A state of 1 GiB: in one image, from when the firmware has written it; and in chunks, firmware included."""
    registers, peer = where / "registers", where / "peer.sock"
    registers.write_bytes(bytes(64 << 10))
    with ExitStack() as stack:
        stack.enter_context(Running(machine.bound([str(program("peer")), str(peer), str(registers), str(IMAGE)])))
        sock = _served(stack, machine, where, "image", _large("--no-chunks"))
        ours, theirs = interleaved(rounds, lambda: _rate(machine, sock, "flow"), lambda: _rate(machine, peer, "flow"))
    name = "save of mlx5, one image of 1 GiB, from the firmware's memory to the socket, summed"
    yield compared(name, "MiB/s", ours, theirs, Goal(0.85, at_most=False))
    with ExitStack() as stack:
        sock = _served(stack, machine, where, "chunks", _large())
        rates = [_rate(machine, sock, "save") for _ in range(rounds)]
    name = "save of mlx5, 1 GiB in chunks, the firmware's writing included"
    yield absolute(name, "MiB/s", median(rates), reason="the firmware is a Python program beside the server")


def _large(*how: str) -> Subject:
    return Subject("mlx5", "mlx5", "plugins.mlx5.models", ("connectx", "--image-size", str(IMAGE), *how), False)


def _rate(machine: Machine, sock: Path, test: str) -> float:
    """MiB a second, of the client's test."""
    return IMAGE / MIB / load(machine, sock, test, IMAGE, CHUNK, far=True)[-1]


def _questions(sock: Path) -> Row:
    """MIG_DATA_SIZE is a QUERY_VHCA_MIGRATION_STATE on the card's command queue each time."""
    with Guest.connect(str(sock), timeout=TIMEOUT) as guest:
        guest.start()
        began = time.perf_counter()
        for _ in range(QUESTIONS):
            guest.client.mig_data_size()
        taken = time.perf_counter() - began
    name = "commands through the command queue, one after the other, each asked for by a client"
    return absolute(name, "1/s", QUESTIONS / taken)
