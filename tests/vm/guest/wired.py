"""Owns the two 82574L of the test machine, each with a server of examples/e1000e: a source and a destination.

The example is found as pip would have installed it: its folder on the path and a distribution's metadata beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e1000e.traffic import SIZE, Traffic

from tests.server.programs import Server
from tests.vm.guest import pci
from tests.vm.guest.checks import equal
from tests.vm.guest.served import IOVA, SECONDS, connect, serve
from vfu_server.testing import Guest, GuestMemory

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "e1000e"
SITE = Path("/run/vfu-site")
MEMORY = 128 << 10
ADDRESS = bytes.fromhex("020000c0ffee")
UNTOUCHED = IOVA + SIZE
"""Where memory begins that the driver does not use."""

running: dict[str, Server] = {}


def installed() -> Path:
    """The metadata; the checkout is read-only."""
    metadata = SITE / "e1000e-0.1.dist-info"
    if not metadata.exists():
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: e1000e\nVersion: 0.1\n")
        (metadata / "entry_points.txt").write_text("[vfu_server]\ne1000e = e1000e\n")
    return SITE


def servers() -> list[str]:
    """The addresses of both functions, each with a server of its own."""
    found = pci.find(pci.E1000E)
    for bdf in found:
        if bdf not in running:
            pci.bind(bdf)
            running[bdf] = serve(bdf, plugin="e1000e", sites=[EXAMPLE, installed()])
    return found


def end() -> None:
    """End the servers as an operator does, and look that they end well."""
    while running:
        bdf, server = running.popitem()
        code, _ = server.end(seconds=SECONDS)
        equal((code, "Traceback" in server.log), (0, False), f"{bdf}: {server.log}")


def give_up() -> str:
    """Kill the servers; their logs."""
    logs = ""
    while running:
        bdf, server = running.popitem()
        server.process.kill()
        server.wait(SECONDS)
        logs += f"the log of {bdf}'s server:\n{server.log}"
    return logs


@contextmanager
def guests() -> Iterator[tuple[Guest, Guest]]:
    """A guest that has started, and one that waits for it to arrive, each with memory of its own."""
    source, destination = servers()
    with (
        GuestMemory.of(MEMORY, IOVA) as memory,
        GuestMemory.of(MEMORY, IOVA) as other,
        connect(source, memory) as here,
        connect(destination, other) as there,
    ):
        here.start()
        there.plug_in()
        there.machine_reset()
        yield here, there


def traffic_of(guest: Guest, messages: str) -> Traffic:
    """The driver of a guest that has started, brought up."""
    made = Traffic(guest, IOVA, ADDRESS, SECONDS)
    made.bring_up(messages)
    return made
